"""How the global batch is cut does not show: ranks x micro-batch x kind of rows x wrapper x precision, against float64.

One launch per layout (tests/exactness_worker.py) serves all tests of this file. Each promise is held from two sides:
the right layout keeps it, and the layout with the mistake built in breaks it visibly.
"""

from __future__ import annotations

import json

import pytest
from exactness_worker import CLIP, KINDS, MEASURED, MICRO_BATCHES, PLANTS, fresh_model, main, new_layout
from training_runs import ROOT, launched_script
from update_worker import CLIPS

from minilm.errors import ConfigError
from minilm.training import optim
from minilm.training.objective import Objective

pytestmark = pytest.mark.xdist_group("two ranks")
GRID = [f"{kind}, micro-batch {micro}" for kind in KINDS for micro in MICRO_BATCHES]
LAYOUTS = {
    "one process": (None, "one process", 1),
    "DDP": ("cpu2.yaml", "DDP on 2 ranks", 2),
    "ZeRO-2 alone": ("zero2.yaml", "DeepSpeed ZeRO-2 on 1 rank(s)", 1),
    "ZeRO-2": ("cpu2_zero2.yaml", "DeepSpeed ZeRO-2 on 2 rank(s)", 2),
}
EXACT = 1e-5
# A layout rounds elsewhere than the plain loops that measured the floor, and not worse.
FLOORS = 2.0


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    """(what the worker measured, how the layout calls itself, number of ranks)"""
    from accelerate.state import AcceleratorState, GradientState

    launcher, wrapper, ranks = LAYOUTS[request.param]
    out = tmp_path_factory.mktemp("exactness") / "out.json"
    if launcher is None:
        AcceleratorState._reset_state(reset_partial_state=True)
        main(out, "updates")
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    else:
        worker = ROOT / "tests" / "exactness_worker.py"
        result = launched_script(worker, [str(out), "updates"], launcher=launcher)
        assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["world_size"] == ranks
    return found, wrapper, ranks


def floor_of(found):
    """The largest over the kinds of rows: one kind alone can come out near the reference by chance."""
    return {name: max(floor[name] for floor in found["floor"].values()) for name in MEASURED}


def assert_whole_grid(cases, wrapper):
    assert [case.partition(f", {wrapper}")[0] for case in cases] == GRID  # on the layout that was asked
    assert any(errors["empty_micro_batches"] for case, errors in cases.items() if case.startswith("masked"))


def test_float32_loss_norm_and_gradients_are_those_of_the_float64_loop(layout):
    found, wrapper, _ = layout
    assert_whole_grid(found["fp32"], wrapper)
    for case, errors in found["fp32"].items():
        for name in MEASURED:
            assert errors[name] < EXACT, (case, name, errors[name])


def test_bf16_loss_norm_and_gradients_are_those_of_the_float64_loop_to_the_measured_floor(layout):
    found, wrapper, _ = layout
    assert_whole_grid(found["bf16"], wrapper)
    floor = floor_of(found)
    # The floor itself is noise of eight bits, not a loop gone wrong.
    assert 1e-5 < floor["loss"] < 1e-3 and floor["gradient_norm"] < 1e-2 and 1e-3 < floor["gradient"] < 6e-2
    for case, errors in found["bf16"].items():
        for name in MEASURED:
            assert errors[name] < FLOORS * floor[name], (case, name, errors[name], floor[name])


@pytest.mark.parametrize("plant", PLANTS)
def test_a_wrong_factor_or_a_lost_micro_batch_would_be_seen_in_both_precisions(layout, plant):
    found, _, ranks = layout
    if plant == "over_ranks" and ranks == 1:
        assert found["planted fp32"][plant]["gradient"] < EXACT  # nothing to forget on one rank
        return
    floor = floor_of(found)
    fp32, bf16 = found["planted fp32"][plant], found["planted bf16"][plant]
    assert max(fp32["gradient_norm"], fp32["gradient"]) > 1000 * EXACT
    assert (
        max(bf16["gradient_norm"] / floor["gradient_norm"], bf16["gradient"] / floor["gradient"]) > 5 * FLOORS
    )
    if plant == "last_row_not_seen":
        assert fp32["loss"] > 100 * EXACT and bf16["loss"] > 5 * FLOORS * floor["loss"]


def test_updates_are_those_of_torch_with_the_clip_that_was_configured(layout):
    found, _, _ = layout
    for clip in map(str, CLIPS):
        for other in map(str, CLIPS):
            distance = found["clipping"][clip][f"from {other}"]
            if other == clip:
                assert distance < 1e-3, (clip, distance)
            else:  # the values tell each other apart
                assert distance > 0.5, (clip, other, distance)
        # What is logged is the norm before clipping, above the values that clip.
        assert found["clipping"][clip]["smallest_norm"] > 1


def test_a_clip_that_is_ignored_or_done_per_micro_batch_or_per_rank_would_be_seen(layout):
    found, _, ranks = layout
    planted = found["planted clipping"]
    assert planted["ignored"]["from None"] < 1e-3 < 0.5 < planted["ignored"]["from 0.3"]
    assert planted["each micro-batch"]["from 0.3"] > 0.1
    # One rank with one micro-batch has nothing but the full gradient.
    assert planted["each rank"]["from 0.3"] > 0.1 if ranks > 1 else planted["each rank"]["from 0.3"] < 1e-3


def test_updates_smaller_than_bf16_can_hold_are_not_lost(layout):
    found, _, _ = layout
    right = found["masters"]["right"]
    assert right["types"] == ["torch.float32"]  # master weights and all optimizer state
    assert right["largest"] < 2.0**-9  # less than half of the distance from 1 to its lower neighbour in bf16
    assert right["share_ones"] == pytest.approx(1, abs=0.02) and right["share_all"] == pytest.approx(
        1, abs=0.02
    )
    assert right["distance_ones"] < 0.1 and right["distance_all"] < 0.1
    for plant, lost in found["planted masters"].items():
        assert lost["share_ones"] == 0 and lost["share_all"] < 0.1, plant


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_layout_refuses_an_optimizer_over_bf16_weights():
    layout, model = new_layout(4, "bf16"), fresh_model().bfloat16()
    with pytest.raises(ConfigError, match="16-bit weights in the optimizer"):
        layout.prepare(Objective(model), optim.build(model, optim.OptimConfig(clip_norm=CLIP)))


def test_zero2_holds_a_share_of_gradients_master_weights_and_moments(layout):
    found, wrapper, ranks = layout
    if "ZeRO" not in wrapper:
        assert found["bytes"] == {}
        return
    held, n = found["bytes"], found["bytes"]["num_parameters"]
    assert held["weights"] == 2 * n
    assert held["gradients"] == 4 * n / ranks
    assert held["masters"] == 4 * n / ranks
    assert held["moments"] == 8 * n / ranks
