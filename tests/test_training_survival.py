"""One run folder belongs to one process; what kill -9 leaves is continued without a trace."""

from __future__ import annotations

import json
import signal
import sys
import time

import pytest
import torch
from training_runs import (
    ROOT,
    SETTINGS,
    column,
    final_weights,
    flags,
    launched_script,
    make_store,
    run_here,
    started,
)

from minilm import manifest
from minilm.errors import CheckpointError, ConfigError
from minilm.training import checkpoint

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

WORKER = ROOT / "tests" / "survival_worker.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


# ---------------------------------------------------------------- one run folder, one run


def test_a_second_process_on_the_same_run_folder_is_refused_until_the_first_is_gone(tmp_path, store):
    process = started(store, tmp_path, train__save_every=5)
    try:
        for resume in (False, True):
            with pytest.raises(ConfigError, match=rf"is being written by process {process.pid} on "):
                run_here(tmp_path, store, resume=resume, train__steps=100_000, train__save_every=5)
    finally:
        process.kill()  # -9: nothing is cleaned up
        process.communicate()
    done = column(tmp_path / "run", "step")
    assert done == list(range(1, len(done) + 1))  # the refused ones wrote nothing
    with pytest.raises(ConfigError, match=r"train\.steps: 100000 before, 6 now"):  # the folder is free again
        run_here(tmp_path, store, resume=True, train__steps=6)


# ---------------------------------------------------------------- kill -9


def test_three_kills_at_random_moments_leave_no_trace_in_the_run(tmp_path, store):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import soak
    finally:
        sys.path.pop(0)
    report = soak.soak(tmp_path / "soak", store, kills=3, steps=40, seed=1, quiet=True)
    assert report["differences"] == [] and report["finish_code"] == 0
    codes = [
        trial["code"] for trial in report["trials"]
    ]  # one that waits for a save too late finds the run ended
    assert len(codes) == 3 and codes.count(-signal.SIGKILL) >= 2 and set(codes) <= {-signal.SIGKILL, 0}
    assert json.loads((tmp_path / "soak" / "soak.json").read_text())["trials"] == report["trials"]
    # The comparison is no formality: one changed number is found.
    path = tmp_path / "soak" / "killed" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"total_tokens": ', '"total_tokens": 1', 1))
    assert soak._differences(tmp_path / "soak" / "killed", tmp_path / "soak" / "undisturbed")


def test_a_run_that_died_before_its_first_checkpoint_begins_again_and_says_so(tmp_path, store):
    settings = SETTINGS | {"data.store": store, "run.folder": tmp_path, "train.steps": 8}
    whole = launched_script(WORKER, ["[]", *flags(settings | {"run.name": "whole"})])
    assert whole.returncode == 0, whole.stderr[-3000:]
    given = flags(settings | {"run.name": "run"})
    planned = json.dumps([{"step": 5, "rank": 0, "what": "die"}])
    assert launched_script(WORKER, [planned, *given]).returncode == -signal.SIGKILL
    run = tmp_path / "run"
    assert column(run, "step") == [1, 2, 3, 4] and not list((run / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint.find(run)
    refused = launched_script(WORKER, ["[]", *given])
    assert refused.returncode == 2 and "Continue it with --resume" in " ".join(refused.stderr.split())
    again = launched_script(WORKER, ["[]", *given, "--resume"])
    assert again.returncode == 0 and "begins again with its first step" in again.stderr, again.stderr[-3000:]
    assert column(run, "step") == list(range(1, 9))
    assert column(run, "loss") == column(tmp_path / "whole", "loss")


# ---------------------------------------------------------------- two ranks, one in trouble

TWO = {"train.ranks": 2, "train.steps": 16, "train.save_every": 4, "train.keep_last": 9, "model.dropout": 0.1}


def on_two(folder, store, name, planned, *more, really=False):
    settings = SETTINGS | TWO | {"data.store": store, "run.folder": folder, "run.name": name}
    start = time.monotonic()
    arguments = [json.dumps(planned), *flags(settings), *more]
    result = launched_script(WORKER, arguments, launcher="cpu2.yaml", timeout=120, really=really)
    return result, folder / name, time.monotonic() - start


def complete(folder, step):
    """What is there when the checkpoint of this step is complete."""
    return str(folder / "run" / "checkpoints" / f"step-{step:08d}" / "files.json")


@pytest.mark.xdist_group("two ranks")
def test_a_rank_that_dies_ends_the_other_and_a_resume_leaves_no_trace(tmp_path, store):
    whole, undisturbed, whole_seconds = on_two(tmp_path, store, "undisturbed", [])
    assert whole.returncode == 0, whole.stderr[-3000:]
    # The sixth step of each start: step 6, when the checkpoint of step 4 is complete; then, from there, step 10, when
    # that of step 8 may be half written.
    for dead, saved, more in ((0, (4,), ()), (1, (4, 8), ("--resume",))):
        planned = {"step": 6, "rank": dead, "what": "die", "after": complete(tmp_path, 4)}
        killed, run, seconds = on_two(tmp_path, store, "run", [planned], *more, really=True)
        assert killed.returncode != 0 and seconds < whole_seconds + 60
        assert "SIGKILL" in killed.stderr, killed.stderr[-3000:]  # the launcher's word
        assert manifest.state_of(run) in ("died", "failed") and not checkpoint.find(run)[1]
        assert checkpoint.find(run)[0].step in saved
    again, run, _ = on_two(tmp_path, store, "run", [], "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    assert column(run, "step") == list(range(1, 17)) and column(run, "loss") == column(undisturbed, "loss")
    for name, value in final_weights(undisturbed).items():
        assert torch.equal(value, final_weights(run)[name])


@pytest.mark.xdist_group("two ranks")
def test_a_save_that_fails_in_the_background_of_the_first_rank_ends_both_with_a_message(tmp_path, store):
    planned = {"step": 6, "rank": 0, "what": "disk", "after": complete(tmp_path, 4)}
    result, run, _ = on_two(tmp_path, store, "run", [planned])
    words = " ".join(result.stderr.split())
    assert result.returncode != 0 and f'File "{ROOT}/minilm' not in words  # a message, no traceback of ours
    assert "step-00000008 could not be written" in words and "No space left" in words
    assert "another rank failed" in words  # the second rank's
    assert [c.step for c in checkpoint.list_checkpoints(run / "checkpoints")] == [4]
    # At the next step border; on a slow disk at the latest where the next save waits for this one.
    assert 8 <= column(run, "step")[-1] <= 12 and manifest.state_of(run) == "failed"
