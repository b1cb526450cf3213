"""`minilm runs`: how each run stands, and why, without touching any of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from experiment_runs import START, loss_at, write_run

from minilm import processes
from minilm.__main__ import main
from minilm.experiments.listing import list_runs, look

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def running(folder: Path, process: dict | None = None) -> Path:
    """A run without an end; its process is gone unless another one is given."""
    write_run(folder, state="running", steps=7)
    gone = processes.describe() | {"number": 2**22 + 1}
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(record | {"process": process or gone}))
    return folder


def test_states_and_numbers(tmp_path):
    write_run(tmp_path / "group" / "whole")
    stopped = write_run(tmp_path / "stopped", state="interrupted", steps=12)
    record = json.loads((stopped / "manifest.json").read_text())
    (stopped / "manifest.json").write_text(json.dumps(record | {"error": "signal 15"}))
    running(tmp_path / "killed")
    rows = {Path(row.folder).name: row for row in list_runs(tmp_path, now=START + 100)}
    assert {name: row.state for name, row in rows.items()} == {
        "whole": "finished",
        "stopped": "interrupted",
        "killed": "died",
    }
    assert rows["stopped"].why == "signal 15"
    assert "its process is gone" in rows["killed"].why and "spike" in rows["killed"].why
    whole = rows["whole"]
    assert (whole.step, whole.steps, whole.loss) == (20, 20, pytest.approx(loss_at(20)))
    assert whole.validation_loss == pytest.approx(loss_at(20) + 0.5)
    assert whole.age_seconds == pytest.approx(80.0)
    assert (
        next(Path(row.folder).name for row in list_runs(tmp_path, now=START + 100)) == "whole"
    )  # written to last


def test_a_live_process_or_a_held_lock_is_a_running_run(tmp_path):
    own = running(tmp_path / "own", processes.describe())
    assert look(own, now=time.time()).state == "running"
    held = running(tmp_path / "held")  # its process cannot be found, but somebody holds the lock
    assert look(held, now=time.time()).state == "died"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(held / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert [look(held, now=time.time()).state for _ in range(2)] == ["running", "running"]
    finally:
        holder.communicate("")
    assert look(held, now=time.time()).state == "died"


def test_a_run_of_another_machine_is_not_declared_dead(tmp_path):
    far = running(tmp_path / "far", processes.describe() | {"host": "elsewhere", "number": 2**22 + 1})
    row = look(far, now=START + 3600)
    assert row.state == "running"
    assert "on elsewhere, which cannot be seen from here; silent for 60 minutes" in row.why
    assert "silent" not in look(far, now=START + 60).why


def test_damaged_folders_do_not_stop_the_list(tmp_path, capsys):
    write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad")
    (bad / "manifest.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "only" / "checkpoints").mkdir(parents=True)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "metrics.jsonl").write_text("[]\nnot json\n")
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps({"state": "running"}))
    torn = write_run(tmp_path / "torn")
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 21, "lo')
    lines = (torn / "metrics.jsonl").read_text().replace('"loss": 3.9', '"loss": 3.9,,')
    (torn / "metrics.jsonl").write_text(lines)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    rows = {Path(row["folder"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "good": "finished", "bad": "damaged", "only": "damaged", "odd": "damaged", "torn": "finished",
    }  # fmt: skip
    assert "not JSON" in rows["bad"]["why"] and rows["torn"]["step"] == 20
    assert rows["torn"]["why"] == "1 lines of metrics.jsonl are damaged"
    assert main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in rows) and "damaged" in said
    assert main(["runs", str(tmp_path / "nothing")]) == 2


def test_a_loss_that_is_not_finite_is_shown_as_such(tmp_path, capsys):
    run = write_run(tmp_path / "nan")
    line = {
        "kind": "train",
        "step": 21,
        "unix_seconds": START + 21,
        "loss": None,
        "nonfinite": {"loss": "nan"},
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["loss"] == "nan"


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    run = write_run(tmp_path / "long")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(next(line for line in reversed(lines) if '"train"' in line))
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(21, 2500):
            file.write(json.dumps(last | {"step": step}) + "\n")
    row = look(run, now=START + 100)
    assert (run / "metrics.jsonl").stat().st_size > 600_000
    assert row.step == 2499 and row.why == ""
