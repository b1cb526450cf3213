"""Whatever SwanLab does, training goes on, metrics.jsonl is complete, and one message says what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from swanlab_stand_in import Told, alive, noted, tracker, wait_for
from training_runs import column, final_weights, make_store, run_here

from minilm.track import dashboard, read_metrics


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_swanlab_that_hangs_neither_stalls_nor_stops_training(
    tmp_path: Path, fake: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "STALL_SECONDS", 0.3)
    notes, told = fake(f"{where} hangs"), Told()
    run = tracker(tmp_path / "run", told, swanlab_close_seconds=1.0)
    start = time.monotonic()
    for step in range(1, 2001):
        run.log("train", step, {"loss": 1.0})
    assert time.monotonic() - start < 2.0
    wait_for(lambda: noted(notes))
    if where != "finish":
        for step in range(2001, 2201):  # a step every 0.1 s, until the clock of the mirror has noticed
            run.log("train", step, {"loss": 1.0})
            if told:
                break
            time.sleep(0.1)
        assert len(told) == 1 and "has not answered" in told[0]
    start = time.monotonic()
    run.close("finished")
    assert time.monotonic() - start < 4.0  # one second for SwanLab, the rest is the drawing of the curve
    assert "did not finish within 1 s" in told[-1]
    assert [r["text"] for r in read_metrics(tmp_path / "run", "event") if "SwanLab" in r["text"]] == told
    assert len(read_metrics(tmp_path / "run", "train")) >= 2000
    assert not alive(noted(notes)[0]["pid"])


@pytest.mark.parametrize("failure", ["init raises", "log raises", "init dies", "log interrupts", "init asks"])
def test_a_swanlab_that_fails_is_one_warning_and_one_event(tmp_path: Path, fake: Any, failure: str) -> None:
    """Also a question on a terminal (E1: the job would wait for ever) and a stop pressed in the board."""
    fake(failure)
    told = Told()
    run = tracker(tmp_path / "run", told)
    run.log("train", 1, {"loss": 1.0})
    assert run._dashboard is not None
    process = run._dashboard._process
    wait_for(lambda: process.poll() is not None)
    for step in range(2, 50):
        run.log("train", step, {"loss": 1.0})
    run.close("finished")
    reasons = {"raises": "the server said no", "dies": "exit code 9", "interrupts": "stopped", "asks": "EOF"}
    assert len(told) == 1
    assert "SwanLab stopped" in told[0] and reasons[failure.split()[1]] in told[0]
    events = [r["text"] for r in read_metrics(tmp_path / "run", "event")]
    assert events.count(told[0]) == 1
    assert [r["step"] for r in read_metrics(tmp_path / "run", "train")] == list(range(1, 50))


def test_ctrl_c_does_not_reach_the_mirror_and_sets_no_handler_here(tmp_path: Path, fake: Any) -> None:
    notes, told = fake("works"), Told()
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    run = tracker(tmp_path / "run", told)
    run.log("train", 1, {"loss": 1.0})
    assert run._dashboard is not None
    assert os.getpgid(run._dashboard._process.pid) != os.getpgid(0)
    run.close("interrupted", "SIGINT")
    assert noted(notes)[-1] == {"finish": "aborted", "error": "SIGINT"} and told == []
    assert signal.getsignal(signal.SIGINT) is handler and sys.excepthook is hook


def test_the_mirror_of_a_killed_run_ends_by_itself(tmp_path: Path, fake: Any) -> None:
    notes = fake("works")
    program = (
        "import os, signal, sys, time\nfrom minilm.track import Tracker, TrackConfig\n"
        "run = Tracker(sys.argv[1], TrackConfig(swanlab='offline', log_every=1), {})\n"
        "for step in (1, 2, 3): run.log('train', step, {'loss': 1.0})\n"
        "while not os.path.exists(sys.argv[2]): time.sleep(0.02)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run"), str(notes)], timeout=60)
    wait_for(lambda: noted(notes) and "finish" in noted(notes)[-1])
    assert noted(notes)[-1] == {"finish": "crashed", "error": "the training process ended without a word"}
    assert [n["step"] for n in noted(notes) if "log" in n] == [1, 2, 3]
    wait_for(lambda: not alive(noted(notes)[0]["pid"]))


def test_no_folder_for_swanlab_is_one_warning(tmp_path: Path, fake: Any) -> None:
    fake("works")
    (tmp_path / "file").write_text("not a folder")
    told = Told()
    run = tracker(tmp_path / "run", told, swanlab_folder=str(tmp_path / "file" / "swanlog"))
    for step in (1, 2, 3):
        run.log("train", step, {"loss": 1.0})
    run.close("finished")
    assert len(told) == 1 and "SwanLab is off" in told[0]


@pytest.mark.parametrize("call", ["import", "init", "log", "Text", "Image", "finish"])
@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_failure_of_any_call_is_one_message_and_costs_no_line(
    tmp_path: Path, fake: Any, call: str, how: str
) -> None:
    fake("import raises" if call == "import" else f"{call} {how}")
    told = Told()
    run = tracker(tmp_path / "run", told)
    for step in range(1, 8):
        run.log("train", step, {"loss": 1.0})
    run.sample(7, [{"prompt": "a", "text": "b"}])
    run.close("finished")
    why = (
        "exit code 9"
        if how == "dies" and call != "import"
        else "libmissing"
        if call == "import"
        else "said no"
    )
    assert len(told) == 1 and "SwanLab stopped" in told[0] and why in told[0]
    assert "metrics.jsonl is complete" in told[0] and "swanlab.log" in told[0]
    assert [r["step"] for r in read_metrics(tmp_path / "run", "train")] == list(range(1, 8))
    assert [r["text"] for r in read_metrics(tmp_path / "run", "event")].count(told[0]) == 1


def test_a_mirror_that_is_killed_is_one_message_and_costs_no_line(tmp_path: Path, fake: Any) -> None:
    notes, told = fake("works"), Told()
    run = tracker(tmp_path / "run", told)
    run.log("train", 1, {"loss": 1.0})
    wait_for(lambda: noted(notes))
    os.kill(noted(notes)[0]["pid"], signal.SIGKILL)
    wait_for(lambda: not alive(noted(notes)[0]["pid"]))
    for step in range(2, 50):
        run.log("train", step, {"loss": 1.0})
    run.close("finished")
    assert len(told) == 1 and "SwanLab stopped (exit code -9)" in told[0]
    assert [r["step"] for r in read_metrics(tmp_path / "run", "train")] == list(range(1, 50))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("behaviour", ["import raises", "init hangs", "log dies", "finish raises"])
def test_a_run_whose_swanlab_fails_is_the_run_without_it(tmp_path: Path, fake: Any, behaviour: str) -> None:
    store = make_store(tmp_path / "store", 40)
    plain = run_here(tmp_path, store, name="plain", train__steps=8, train__save_every=4)
    fake(behaviour)
    swanlab = {"track__swanlab": "offline", "track__log_every": 1, "track__swanlab_close_seconds": 1.0}
    run = run_here(tmp_path, store, train__steps=8, train__save_every=4, **swanlab)
    assert column(run, "loss") == column(plain, "loss") and column(run, "step") == list(range(1, 9))
    told = [r["text"] for r in read_metrics(run, "event") if "SwanLab" in r["text"]]
    assert len(told) == 1 and "metrics.jsonl is complete" in told[0]
    assert json.loads((run / "manifest.json").read_text())["state"] == "finished"
    for name, value in final_weights(run).items():
        assert value.equal(final_weights(plain)[name])
