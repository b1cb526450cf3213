"""How a run stands, read from outside: a run that was killed is not "running" for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minilm import manifest, processes
from minilm.errors import CheckpointError

PROGRAM = """
import sys, time
from minilm import manifest
record = manifest.begin(sys.argv[1], config={})
print("begun", flush=True)
sys.stdin.readline()
record.finish("finished", step=3)
"""


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("resumed", [True, False])
def test_a_run_is_running_while_its_process_lives_and_died_when_it_was_killed(
    tmp_path: Path, killed: bool, resumed: bool
) -> None:
    if resumed:
        manifest.begin(tmp_path, config={}).finish("interrupted", step=1)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        assert manifest.state_of(tmp_path) == "running"
        if killed:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its number is still taken
            assert manifest.state_of(tmp_path) == "died"
        process.communicate("\n" if not killed else None)
    finally:
        process.kill()
        process.wait()
    assert manifest.state_of(tmp_path) == ("died" if killed else "finished")


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "running"),
        ({"started_unix_seconds": 1.0}, "died"),  # the number went to another process
        ({"boot": "another"}, "died"),
        ({"host": "another", "boot": "another"}, "running"),  # cannot be seen from here
        ({"namespace": "pid:[1]"}, "running"),  # another container: the number means nothing here
        ({"number": 2**22 + 1}, "died"),
    ],
)
def test_a_process_is_recognised_by_more_than_its_number(tmp_path: Path, change: dict, state: str) -> None:
    record = manifest.begin(tmp_path, config={}).record
    record["process"] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    assert manifest.state_of(tmp_path) == state
    assert processes.lives(processes.describe())


@pytest.mark.parametrize("state", ["finished", "interrupted", "failed"])
def test_an_end_that_was_recorded_is_the_state(tmp_path: Path, state: manifest.State) -> None:
    manifest.begin(tmp_path, config={}).finish(state, step=1)
    assert manifest.state_of(tmp_path) == state


def test_no_manifest_is_no_state(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run folder"):
        manifest.state_of(tmp_path)
