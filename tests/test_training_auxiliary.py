"""Auxiliary losses are means over the tokens of the step, and columns sums over it, however the step is cut."""

from __future__ import annotations

import json

import pytest
import torch
from auxiliary_worker import ROWS, Recalling, fresh_model, grid, reference, whole_batch
from training_runs import ROOT, launched_script

from minilm.training import optim
from minilm.training.layout import Asked, Layout
from minilm.training.objective import Objective
from minilm.training.step import accumulate, counts_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def alone():
    return grid()


def held(cases, layout):
    assert all(layout in case["layout"] for case in cases)
    for case in cases:
        assert case["float64"] < 1e-10, case
        assert case["float32"] < 1e-5, case


def test_logged_values_and_gradients_are_those_of_one_batch_for_every_micro_batch(alone):
    assert len(alone) == 16
    held(alone, "one process")


def test_columns_do_not_feel_the_micro_batch(alone):
    for case in alone:
        name = case["case"].rpartition(",")[0]
        for other in alone:
            if other["case"].startswith(name):
                assert other["columns"] == pytest.approx(case["columns"], rel=1e-9)
    assert len(alone[0]["columns"]) == 1 + 2 * (5 + 2)  # cosine; five experts, evenness, idle in two layers


@pytest.mark.xdist_group("two ranks")
def test_two_ranks_are_one_process(alone, tmp_path):
    result = launched_script(
        ROOT / "tests" / "auxiliary_worker.py", [str(tmp_path / "out.json")], launcher="cpu2.yaml"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    cases = json.loads((tmp_path / "out.json").read_text())
    held(cases, "DDP on 2 ranks")
    expected = {case["case"]: case["columns"] for case in alone}
    assert len(cases) == 8
    for case in cases:
        assert case["columns"] == pytest.approx(expected[case["case"]], rel=1e-9)


@pytest.mark.parametrize("name", ["moe", "recalling"])
def test_the_parts_of_several_ranks_computed_by_one_process_are_the_whole_step(name):
    """As a replay computes them."""
    layout = Layout(Asked(ROWS, 2, "fp32", "cpu", None, None))
    model = fresh_model(name, torch.float64)
    layout.prepare(Objective(model), optim.build(model, optim.OptimConfig()))
    batch = whole_batch("uneven")
    pieces = [batch.rows(i, i + 2) for i in range(0, ROWS, 2)]
    total, counts = float(batch.num_targets()), counts_of(model, pieces)
    parts = [accumulate(layout, pieces[i : i + 2], total, counts=counts) for i in range(0, 8, 2)]
    loss, auxiliary, gradients = reference(name, "uneven")
    assert sum(float(part.nats) for part, _ in parts) / total == pytest.approx(loss, rel=1e-12)
    for loss_name, value in auxiliary.items():
        assert sum(float(extra[loss_name]) for _, extra in parts) == pytest.approx(value, rel=1e-12)
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], rtol=1e-10, atol=1e-14)


def test_a_loss_for_which_no_token_of_the_step_counts_is_zero_and_teaches_nothing():
    layout = Layout(Asked(4, 2, "fp32", "cpu", None, None))
    model = fresh_model("recalling", torch.float64)
    layout.prepare(Objective(model), optim.build(model, optim.OptimConfig()))
    pieces = [whole_batch("packed").rows(i, i + 2) for i in (0, 2)]  # no entry there
    counts = counts_of(model, pieces)
    assert counts["recall"] == 0 < counts["everywhere"]
    _, extra = accumulate(layout, pieces, 1.0, counts=counts)
    assert float(extra["recall"]) == 0
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_model_that_does_not_count_the_tokens_of_its_losses_is_refused():
    class Forgetful(Recalling):
        def counted(self, segments, entries=None):
            counts = super().counted(segments, entries)
            del counts["recall"]
            return counts

    layout = Layout(Asked(ROWS, None, "fp32", "cpu", None, None))
    model = Forgetful(fresh_model("recalling", torch.float64).config).double()
    layout.prepare(Objective(model), optim.build(model, optim.OptimConfig()))
    batch = whole_batch("packed")
    with pytest.raises(RuntimeError, match=r"\['recall'\].*`counted` must name every loss"):
        accumulate(layout, [batch], 1.0, counts=counts_of(model, [batch]))
