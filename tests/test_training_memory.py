"""Recomputed and compiled blocks: the same numbers, less memory, no compilation after the first steps, same names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from training_runs import column, final_weights, make_store, run_here

from minilm import models
from minilm.alignment import align
from minilm.errors import ConfigError
from minilm.run import load_checkpoint
from minilm.training import passing
from minilm.training.objective import Objective


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(**changes):
    torch.manual_seed(0)
    return models.build(models.preset("original", "tiny", **{"num_layers": 4, "dropout": 0.2, **changes}))


def a_batch(seed=1, documents=3):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (4, 33), generator=draw)
    return align(tokens, torch.randint(1, documents + 1, (4, 33), generator=draw).sort(dim=1).values)


def loss_and_gradients(model, batch, seed=5):
    torch.manual_seed(seed)  # of dropout
    model.zero_grad()
    nats, _ = Objective(model.train())(batch)
    loss = nats.share(batch.num_targets())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, torch.rand(3)


def bytes_kept(model, batch):
    """What autograd keeps between forward and backward, without the parameters."""
    own = {p.data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(batch.inputs, segments=batch.segments, positions=batch.positions)
    assert output.hidden.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("policy", ["half", "blocks"])
def test_recomputed_blocks_give_the_same_bits_with_dropout_and_leave_the_same_random_state(policy):
    plain, batch = tiny(), a_batch()
    recomputed = copy.deepcopy(plain)
    passing.arrange(recomputed, recompute=policy, compiled=False)
    loss, gradients, after = loss_and_gradients(plain, batch)
    again, same, after_again = loss_and_gradients(recomputed, batch)
    assert torch.equal(loss, again) and torch.equal(after, after_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]), name
    other, _, _ = loss_and_gradients(plain, batch, seed=6)
    assert not torch.equal(loss, other)  # dropout does something here


def test_recomputed_blocks_keep_little_more_than_their_inputs():
    plain, batch = tiny(), a_batch()
    recomputed = copy.deepcopy(plain)
    passing.arrange(recomputed, recompute="blocks", compiled=False)
    everything, little = bytes_kept(plain, batch), bytes_kept(recomputed, batch)
    inputs = 4 * 32 * 32 * 4  # rows x tokens x dim x bytes, one per block
    assert little < everything / 5
    assert little < (4 + 4) * inputs  # four blocks, and what lies before and after them
    halved = copy.deepcopy(plain)
    passing.arrange(halved, recompute="half", compiled=False)
    assert bytes_kept(halved, batch) == pytest.approx((everything + little) / 2, rel=0.05)


@pytest.mark.parametrize(
    ("policy", "num_layers", "expected"),
    [
        ("blocks", 4, [0, 1, 2, 3, 3, 2, 1, 0]),
        ("half", 4, [0, 1, 2, 3, 2, 0]),
        ("half", 3, [0, 1, 2, 1]),
        ("half", 1, [0]),
    ],
)
def test_recomputed_blocks_run_twice_in_training_and_once_elsewhere(policy, num_layers, expected):
    """Also in a copy of the model: the doctor takes copies."""
    original, batch, calls = tiny(num_layers=num_layers), a_batch(), []
    passing.arrange(original, recompute=policy, compiled=False)
    model = copy.deepcopy(original)
    del original
    for number, block in enumerate(model.blocks):
        block.attention_norm.register_forward_hook(lambda *_, number=number: calls.append(number))
    loss_and_gradients(model, batch)
    assert calls == expected
    calls.clear()
    with torch.no_grad():
        model.eval()(batch.inputs)
    assert calls == list(range(num_layers))


def test_a_model_that_cannot_is_refused():
    with pytest.raises(ConfigError, match=r"train\.compile"):
        passing.arrange(torch.nn.Linear(2, 2), recompute="none", compiled=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_with_recomputed_blocks_is_the_run_without(tmp_path, store):
    changes = {"model__dropout": 0.1, "train__steps": 8, "train__micro_batch": 4}
    plain = run_here(tmp_path, store, name="plain", **changes)
    for policy in ("half", "blocks"):
        run = run_here(tmp_path, store, name=policy, train__activation_checkpointing=policy, **changes)
        assert column(run, "loss") == column(plain, "loss")
        assert column(run, "gradient_norm") == column(plain, "gradient_norm")
        expected = final_weights(plain)
        assert all(torch.equal(value, expected[name]) for name, value in final_weights(run).items())


# torch looks at .grad of every tensor while it traces, and silences its own warning except where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("recompute", ["none", "half", "blocks"])
def test_compiled_blocks_compute_the_same_in_one_graph_for_all(recompute):
    plain = tiny(dropout=0.0)
    compiled = copy.deepcopy(plain)
    passing.arrange(compiled, recompute=recompute, compiled=True, backend="aot_eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for seed in range(4):
        batch = a_batch(seed)
        loss, gradients, _ = loss_and_gradients(plain, batch)
        again, same, _ = loss_and_gradients(compiled, batch)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
    assert not counters["graph_break"], counters["graph_break"]
    with torch.no_grad():  # other shapes and no gradients: not the compiled function's business
        compiled.eval()(batch.inputs[:1, :7])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("fresh_dynamo", "fresh_accelerate")
def test_a_compiled_run_is_the_plain_one_to_rounding_and_its_checkpoint_does_not_know(
    tmp_path, monkeypatch, store
):
    monkeypatch.setitem(
        passing.arrange.__kwdefaults__, "backend", "aot_eager"
    )  # inductor takes a minute here
    plain = run_here(tmp_path, store, name="plain", train__steps=10)
    run = run_here(tmp_path, store, train__steps=10, train__compile=True)
    assert counters["stats"]["unique_graphs"] == 1  # two layers, ten steps, two validations
    assert column(run, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
    weights = final_weights(run)
    assert weights.keys() == final_weights(plain).keys()
    loaded = load_checkpoint(run).model
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in weights.items())
