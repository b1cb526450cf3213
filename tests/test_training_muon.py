"""Muon and AdamW as one optimizer, held against a plain loop in float64 written from Keller Jordan's description."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from training_runs import SETTINGS, column, final_weights, flags, launched, make_store, run_here

from minilm import models
from minilm.alignment import align
from minilm.training import optim
from minilm.training.muon import orthogonalised
from minilm.training.objective import Objective
from minilm.training.optim import OptimConfig

MUON = {"optim__name": "muon", "optim__muon_learning_rate": 0.01, "model__dropout": 0.1, "train__steps": 20}


def newton_schulz(gradient):
    """The description's code, in float64: the quintic with his three coefficients, five times, transposed if tall."""
    x = gradient.double() / gradient.double().norm()
    if gradient.shape[0] > gradient.shape[1]:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8), (1, 9)])
def test_orthogonalised_is_the_description_in_float64_and_has_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-4
    got = orthogonalised(matrix)
    torch.testing.assert_close(got.double(), newton_schulz(matrix), rtol=1e-4, atol=1e-5)
    # The same singular vectors, all directions of about the same strength.
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = u.T @ got.double() @ v.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4
    assert inner.diagonal().min() > 0.6 and inner.diagonal().max() < 1.3


@pytest.mark.parametrize("shape", [(256, 704), (704, 256)])
def test_large_matrices_are_multiplied_another_way_with_the_same_result(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got = orthogonalised(matrix)
    torch.testing.assert_close(got.double(), newton_schulz(matrix), rtol=1e-3, atol=1e-5)


def test_orthogonalised_takes_each_matrix_of_a_stack_alone_and_leaves_zero_alone():
    stack = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(2))
    each = torch.stack([newton_schulz(m) for m in stack.flatten(0, 1)]).view(2, 3, 6, 4)
    torch.testing.assert_close(orthogonalised(stack).double(), each, rtol=1e-4, atol=1e-5)
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


def tiny(**changes):
    torch.manual_seed(0)
    return models.build(models.preset("original", "tiny", **changes))


def batches(number):
    draw = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 256, (4, 17), generator=draw) for _ in range(number)]
    return [align(t, torch.ones_like(t)) for t in tokens]


@pytest.mark.parametrize("tied", [True, False])
def test_training_is_the_plain_loop_with_queries_keys_and_values_taken_apart(tied):
    config = OptimConfig(
        name="muon", learning_rate=3e-3, muon_learning_rate=0.02, warmup_steps=3, weight_decay=0.2, beta2=0.9
    )
    model, plain = tiny(tie_embeddings=tied), tiny(tie_embeddings=tied).double()
    optimizer = optim.build(model, config)
    # heads 4, key/value heads 2, head size 8
    cuts = {name: [32, 16, 16] for name, _ in plain.named_parameters() if "qkv" in name}
    memory = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    squares = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for step, batch in enumerate(batches(8)):
        optim.set_rate(optimizer, optim.rate_at(config, step, 8))
        Objective(model)(batch)[0].share(batch.num_targets()).backward()
        optimizer.step()
        optimizer.zero_grad()

        Objective(plain)(batch)[0].share(batch.num_targets()).backward()
        share = optim.rate_at(config, step, 8) / 3e-3
        with torch.no_grad():
            for name, p in plain.named_parameters():
                g, m = p.grad, memory[name]
                if p.dim() == 2 and name not in ("embedding.weight", "head.weight"):
                    m.mul_(0.95).add_(g)  # his momentum; a factor does not matter to the orthogonalised
                    ahead = g + 0.95 * m
                    parts = ahead.split(cuts.get(name, [len(p)]))
                    scaled = [newton_schulz(q) * max(1, q.shape[0] / q.shape[1]) ** 0.5 for q in parts]
                    p.sub_(0.2 * 0.02 * share * p + 0.02 * share * torch.cat(scaled))
                else:
                    m.mul_(0.9).add_(g, alpha=0.1)
                    squares[name].mul_(0.9).add_(g * g, alpha=0.1)
                    mean, square = m / (1 - 0.9 ** (step + 1)), squares[name] / (1 - 0.9 ** (step + 1))
                    decay = 0.2 if p.dim() == 2 else 0.0
                    p.sub_(3e-3 * share * (decay * p + mean / (square.sqrt() + 1e-8)))
                p.grad = None
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < 1e-4, (name, float(error))


def test_the_same_as_torch_muon_to_bfloat16_where_nothing_is_stacked():
    model, other = tiny(), tiny()
    for module in model.modules():
        if hasattr(module, "stacked"):
            module.stacked = {}
    optimizer = optim.build(model, OptimConfig(name="muon", muon_learning_rate=0.02, weight_decay=0.1))
    named = dict(other.named_parameters())
    matrices = {n: p for n, p in named.items() if p.dim() == 2 and n != "embedding.weight"}
    theirs = torch.optim.Muon(matrices.values(), lr=0.02, weight_decay=0.1, momentum=0.95)
    before = {n: p.detach().clone() for n, p in matrices.items()}
    for step in range(2):
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            two.grad = None
            if two.dim() == 2:
                two.grad = torch.randn(two.shape, generator=torch.Generator().manual_seed(step))
            one.grad = two.grad
        optimizer.step()
        theirs.step()
    for name, p in matrices.items():
        ours, its = model.get_parameter(name) - before[name], p - before[name]
        assert (ours - its).norm() / its.norm() < 0.03, name


def test_every_parameter_is_in_exactly_one_group_and_tables_are_not_muons():
    model = tiny(tie_embeddings=False)
    optimizer = optim.build(model, OptimConfig(name="muon"))
    seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    muon = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in muon}
    kinds = ("attention.qkv", "attention.out", "ffn.gate", "ffn.up", "ffn.down")
    assert names == {f"blocks.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}


def test_each_group_follows_the_schedule_from_its_own_highest_rate():
    optimizer = optim.build(tiny(), OptimConfig(name="muon", learning_rate=0.004, muon_learning_rate=0.03))
    optim.set_rate(optimizer, 0.001)
    assert optim.rates_of(optimizer) == pytest.approx(
        {"learning_rate": 0.001, "muon_learning_rate": 0.0075}, rel=1e-12
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path, store):
    run = run_here(tmp_path, store, train__save_every=10, **MUON)
    losses, weights = column(run, "loss"), final_weights(run)
    assert losses[-1] < losses[0] - 0.3
    assert column(run, "muon_learning_rate") == pytest.approx(
        [2 * rate for rate in column(run, "learning_rate")]  # 0.01 and 0.005
    )
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    run_here(tmp_path, store, resume=True, train__save_every=10, **MUON)
    assert column(run, "loss") == losses and column(run, "step") == list(range(1, 21))
    for name, value in final_weights(run).items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.xdist_group("two ranks")
def test_two_ranks_are_one_process_and_zero_is_refused(tmp_path, store):
    alone = run_here(tmp_path, store, **MUON | {"model__dropout": 0.0})
    settings = SETTINGS | {
        "data.store": store,
        "run.folder": tmp_path,
        "train.steps": 20,
        "train.micro_batch": 2,
    }
    settings |= {"optim.name": "muon", "optim.muon_learning_rate": 0.01, "train.ranks": 2}
    result = launched(flags(settings | {"run.name": "two"}), launcher="cpu2.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    assert column(tmp_path / "two", "loss") == pytest.approx(column(alone, "loss"), rel=1e-4)
    assert column(tmp_path / "two", "gradient_norm") == pytest.approx(
        column(alone, "gradient_norm"), rel=1e-3
    )

    result = launched(flags(settings | {"run.name": "zero"}), launcher="cpu2_zero2.yaml")
    assert result.returncode != 0
    assert "optim.name muon does not go with DeepSpeed ZeRO" in result.stderr
    assert not (tmp_path / "zero" / "metrics.jsonl").exists()


def test_a_copy_of_model_and_optimizer_together_takes_the_same_steps() -> None:
    model = models.build(models.preset("original", "tiny"))
    optimizer = optim.build(model, optim.OptimConfig(name="muon"))
    other, its = copy.deepcopy((model, optimizer))
    for mine, theirs in ((model, optimizer), (other, its)):
        for _ in range(2):
            mine(torch.arange(12)[None]).logits.square().sum().backward()
            theirs.step()
            theirs.zero_grad()
    weights = dict(other.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(p is weights[name] for name, p in model.named_parameters())
