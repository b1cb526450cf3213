"""What a model tells the training log about itself: right, of one step alone, and without touching the run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from training_runs import column, final_weights, make_store, records, run_here
from zoo_models import tiny, tokens

from minilm.models.moe import predicting, shares
from minilm.models.uniformity import COSINE, columns_of, pairwise
from minilm.training import trainer, usage

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
MOE = {"model__name": "moe", "model__hidden_dim": 32, "model__num_experts": 4, "train__micro_batch": 4}
TIMES = ("seconds", "memory", "tokens_per_second", "unix_seconds")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def lines(run):
    """The lines of the log without what a clock says."""
    return [{k: v for k, v in record.items() if not k.startswith(TIMES)} for record in records(run)]


def told(record):
    return {k: v for k, v in record.items() if k.startswith(("usage/", "uniformity/"))}


def test_the_mean_cosine_is_that_of_all_pairs_of_real_tokens_of_a_row():
    hidden = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)) + 0.7
    hidden[1, 2] = 0  # a state without a direction
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1] * 7, [0, 0, 0, 0, 1, 0, 0]])
    for given in (None, segments):
        pairs = []
        for row in range(3):
            real = [i for i in range(7) if given is None or given[row, i] > 0]
            pairs += [(hidden[row, i], hidden[row, j]) for i in real for j in real if i != j]
        want = sum(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs) / len(pairs)
        assert columns_of(pairwise(hidden, given))[COSINE] == pytest.approx(want, rel=1e-5)
    same = torch.ones(2, 4, 3).bfloat16()
    assert columns_of(pairwise(same, None))[COSINE] == pytest.approx(1, rel=1e-6)
    assert columns_of(pairwise(same[:, :1], None)) == {} == columns_of({})


def test_shares_evenness_and_idle_experts_of_known_choices():
    found = shares(torch.tensor([6.0, 2.0, 0.0, 0.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    want = {
        "expert_0": 0.75,
        "expert_1": 0.25,
        "expert_2": 0,
        "expert_3": 0,
        "evenness": entropy,
        "idle_experts": 2,
    }
    assert found == pytest.approx(want, rel=1e-6)
    assert shares(torch.full((8,), 3.0))["evenness"] == pytest.approx(1)


def test_a_mixture_tells_how_often_its_router_chose_each_expert():
    model = tiny("moe")
    ids = tokens(model, 3, 9)
    segments = torch.tensor([[1] * 9, [1] * 4 + [2] * 5, [1] * 5 + [0] * 4])
    chosen = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda module, args, out: chosen.append(module.route(out[1])[0]))
    model.collector = sums = {}
    model(ids, segments)
    model.collector = None
    model(ids, segments)  # nobody asks
    columns, keep = model.columns(sums), predicting(segments)
    for layer in range(2):
        votes = torch.bincount(chosen[layer][keep].flatten(), minlength=4).double()
        for expert in range(4):
            name = f"usage/blocks.{layer}/expert_{expert}"
            assert columns[name] == pytest.approx(float(votes[expert] / votes.sum()), rel=1e-12)
    with torch.no_grad():
        model.collector = sums = {}
        model(ids[:, :4], cache=model.new_cache(3, 9))
    assert sums == {}  # generation tells nothing


@pytest.mark.parametrize(
    "settings", [{}, {"train__activation_checkpointing": "blocks"}], ids=["plain", "recomputed"]
)
def test_telling_changes_no_bit_of_the_run(settings, tmp_path, store):
    given = MOE | settings | {"train__steps": 7, "model__dropout": 0.1}
    silent = run_here(tmp_path, store, name="silent", **given, train__usage_every="none")
    telling = run_here(tmp_path, store, name="telling", **given, train__usage_every=3)
    assert [{k: v for k, v in line.items() if k not in told(line)} for line in lines(telling)] == lines(
        silent
    )
    assert [line["step"] for line in lines(telling) if told(line)] == [1, 3, 6]
    weights = final_weights(silent)
    assert all(torch.equal(weights[name], value) for name, value in final_weights(telling).items())
    if settings:  # a block that is computed again is not counted twice, nor differently
        plain = run_here(tmp_path, store, name="plain", **given | {"train__activation_checkpointing": "none"},
                         train__usage_every=3)  # fmt: skip
        assert [told(line) for line in lines(plain)] == [told(line) for line in lines(telling)]


def test_columns_of_a_resumed_run_are_those_of_an_undisturbed_one(tmp_path, store, monkeypatch):
    given = MOE | {"train__steps": 9, "train__usage_every": 1, "train__save_every": 4}
    reference = run_here(tmp_path, store, name="reference", **given)
    real, taken = trainer.optimizer_step, []

    def step_or_die(*arguments, **keywords):
        taken.append(1)
        if len(taken) == 7:
            raise KeyError("power cut")
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", step_or_die)
        with pytest.raises(KeyError):
            run_here(tmp_path, store, **given)
    run = run_here(tmp_path, store, resume=True, **given)
    assert [told(line) for line in lines(run)] == [told(line) for line in lines(reference)]
    assert all(len(told(line)) == 1 + 2 * 6 for line in lines(run))


def test_forwards_that_others_make_during_a_step_are_not_told(tmp_path, store, monkeypatch):
    """A check that looks at the gradient, a validation: the columns are of the step's own forwards."""
    given = MOE | {"train__steps": 6, "train__usage_every": 1}
    plain = run_here(tmp_path, store, name="plain", **given)
    real = trainer.optimizer_step

    def curious(layout, batches, **keywords):
        def inspect(result):
            layout.model(batches[0].inputs[:1])

        return real(layout, batches, **keywords | {"inspect": inspect})

    monkeypatch.setattr(trainer, "optimizer_step", curious)
    run = run_here(tmp_path, store, **given, train__validate_every=1)
    assert [told(line) for line in lines(run)] == [told(line) for line in lines(plain)]


def test_a_look_that_finds_tokens_apart_begins_the_count_anew():
    told_at = []
    watch = usage.Usage(1, event=lambda step, text: told_at.append(step))
    for step, cosine in enumerate([0.99, 0.99, 0.5, 0.99, 0.99, 0.99, 0.99], 1):
        model = SimpleNamespace(columns=lambda sums, cosine=cosine: {COSINE: cosine})
        watch.after_step(SimpleNamespace(step=step, model=model, layout=None), {})
    assert told_at == [6]


def test_states_that_have_become_one_direction_and_stay_it_are_told_once_after_the_warm_up(
    tmp_path, store, monkeypatch, capsys
):
    given = {"train__usage_every": 1, "train__steps": 8, "optim__warmup_steps": 3}
    run = run_here(tmp_path, store, name="healthy", **given)
    assert "one direction" not in capsys.readouterr().err
    assert all(-0.1 < value < 0.9 for value in column(run, COSINE))
    monkeypatch.setattr(usage, "COLLAPSED", -1.0)
    run = run_here(tmp_path, store, **given)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        said.count("step 6: the states of different tokens are nearly one direction") == 1
    )  # the third look
    events = [event["text"] for event in records(run, "event") if "one direction" in event["text"]]
    assert len(events) == 1
