"""A step that is not finite: skipped with a budget, alike on one process and on two."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    ROOT,
    SETTINGS,
    column,
    final_weights,
    flags,
    incidents,
    launched_script,
    make_store,
    records,
    report_of,
    run_here,
)

from minilm.__main__ import main as minilm
from minilm.training import checkpoint
from minilm.training.step import NonFinite

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

WORKER = ROOT / "tests" / "survival_worker.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


# ---------------------------------------------------------------- skipping


def skipped_by_hand(tmp_path, store, step, **changes):
    """The same run, its update of `step` left out without any code for it: the checkpoint before is moved on."""
    run = run_here(tmp_path, store, name="by hand", **changes, train__save_every=step - 1, train__keep_last=9)
    folder = run / "checkpoints" / f"step-{step - 1:08d}"
    for other in (run / "checkpoints").glob("step-*"):
        if other != folder:
            shutil.rmtree(other)
    state = json.loads((folder / "trainer.json").read_text())
    state["step"] = state["loader"]["next_step"] = step
    (folder / "trainer.json").write_text(json.dumps(state))
    moved = folder.rename(folder.with_name(f"step-{step:08d}"))
    (moved / "files.json").unlink()
    checkpoint._seal(moved)
    return run_here(
        tmp_path,
        store,
        name="by hand",
        resume=True,
        **changes,
        train__save_every=step - 1,
        train__keep_last=9,
    )


@pytest.mark.parametrize("what", ["loss", "gradient", "loss only"])
def test_a_skipped_step_changes_nothing_but_the_place_in_data_and_schedule(tmp_path, store, accidents, what):
    accidents((5, what))
    run = run_here(tmp_path, store, train__steps=10, train__on_nonfinite="skip", train__micro_batch=4)
    accidents()
    reference = skipped_by_hand(tmp_path, store, 5, train__steps=10, train__micro_batch=4)
    bad = records(run)[4]
    assert bad["step"] == 5 and bad["skipped"] is True
    assert set(bad["nonfinite"]) == {
        "loss": {"loss", "gradient_norm"}, "gradient": {"gradient_norm"}, "loss only": {"loss"}
    }[what]  # fmt: skip
    assert all("skipped" not in r for r in records(run) if r["step"] != 5)
    assert bad["total_tokens"] == records(run)[3]["total_tokens"]  # nothing was learnt from them
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert column(run, name)[5:] == column(reference, name)[-5:], name
    for name, value in final_weights(run).items():
        assert torch.equal(value, final_weights(reference)[name]), name


def test_a_run_stops_when_its_budget_is_used_up_and_a_resume_remembers_what_was_used(
    tmp_path, store, accidents
):
    settings = {
        "train__steps": 12,
        "train__on_nonfinite": "skip",
        "train__skip_budget": 2,
        "train__save_every": 4,
    }
    accidents((2, "loss"), (3, "gradient"), (6, "loss"))
    with pytest.raises(NonFinite, match=r"2 steps were skipped before"):
        run_here(tmp_path, store, **settings)
    assert column(tmp_path / "run", "step")[-1] == 6 and len(incidents(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "failed"
    accidents((3, "loss"))  # step 7: the first two since the resume at step 4 are good
    with pytest.raises(NonFinite, match=r"2 steps were skipped before"):
        run_here(tmp_path, store, resume=True, **settings)
    run = run_here(tmp_path, store, resume=True, **settings | {"train__skip_budget": 3})
    assert column(run, "step") == list(range(1, 13))


def test_a_first_step_that_is_skipped_can_be_saved_and_resumed(tmp_path, store, accidents):
    """Before the first update there is no optimizer state, and that is no damage."""
    settings = {
        "train__steps": 8,
        "train__on_nonfinite": "skip",
        "train__save_every": 1,
        "train__keep_last": 9,
    }
    accidents((1, "loss"))
    run = run_here(tmp_path, store, **settings)
    losses = column(run, "loss")
    for folder in sorted((run / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    accidents()
    run_here(tmp_path, store, resume=True, **settings)
    assert column(run, "loss")[1:] == losses[1:]


# ---------------------------------------------------------------- two ranks


def on_two(folder, store, launcher, accidents_planned, *more, **changes):
    settings = SETTINGS | {"data.store": store, "run.folder": folder, "run.name": "two", "train.ranks": 2}
    settings |= {"train.micro_batch": 2, "train.steps": 16, "train.save_every": 1, "train.keep_last": 99}
    settings |= {"train.on_nonfinite": "skip", "optim.learning_rate": 1e-4, "train.spike_factor": 0.001}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return launched_script(
        WORKER, [json.dumps(accidents_planned), *flags(settings), *more], launcher=launcher
    ), folder / "two"


@pytest.mark.xdist_group("two ranks")
@pytest.mark.parametrize(
    ("launcher", "precision", "what"),
    [
        ("cpu2.yaml", "fp32", "gradient"),
        ("cpu2_zero2.yaml", "bf16", "gradient"),
        ("cpu2_zero2.yaml", "fp32", "loss only"),
    ],
)
def test_two_ranks_skip_together_bit_for_bit_and_one_process_replays_them(
    tmp_path, store, launcher, precision, what, capsys
):
    accident = [{"step": 4, "rank": 1, "what": what}]
    result, run = on_two(tmp_path, store, launcher, accident, train__precision=precision)
    assert result.returncode == 0, result.stderr[-3000:]
    bad = records(run)[3]
    assert bad["skipped"] is True and bad["nonfinite"].keys() == {
        "gradient_norm" if what == "gradient" else "loss"
    }
    folders = [run / "checkpoints" / f"step-{step:08d}" for step in (3, 4, 5)]
    for name in ("model.safetensors", "optimizer.safetensors"):  # float32 masters, moments and their counts
        before, skipped, after = (load_file(folder / name) for folder in folders)
        for key, value in skipped.items():
            assert torch.equal(value, before[key]), key
        assert any(not torch.equal(value, after[key]) for key, value in skipped.items())
    # Nothing of the step is left in the wrappers: fresh processes that never saw it go on with the same numbers.
    losses, norms, weights = column(run, "loss"), column(run, "gradient_norm"), final_weights(run)
    for folder in sorted((run / "checkpoints").glob("step-*"))[4:]:
        shutil.rmtree(folder)
    kept = incidents(run)
    assert [report_of(folder)["kind"] for folder in kept[:2]] == ["nonfinite", "spike"]
    assert minilm(["replay", str(kept[1])]) == 0, capsys.readouterr()
    result, run = on_two(tmp_path, store, launcher, [], "--resume", train__precision=precision)
    assert result.returncode == 0, result.stderr[-3000:]
    assert column(run, "loss")[4:] == losses[4:] and column(run, "gradient_norm")[4:] == norms[4:]
    for name, value in final_weights(run).items():
        assert torch.equal(value, weights[name]), name
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert json.loads((newest / "trainer.json").read_text())["num_skipped"] == 1
