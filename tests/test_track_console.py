"""The progress line, the plain lines and log.txt."""

from __future__ import annotations

import io
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest

from minilm.track import Console
from minilm.track import console as module

STATS = {"loss": 3.14159, "learning_rate": 3e-4, "gradient_norm": 0.52, "tokens_per_second": 41_273.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_not_a_terminal_gets_plain_lines_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(tmp_path, log_every=10, stream=stream)
    console.start(25)
    for step in range(1, 26):
        console.update(step, STATS)
    console.close()
    lines = stream.getvalue().splitlines()
    assert [re.match(r"step (\d+)/25 ", line).group(1) for line in lines] == ["10", "20", "25"]  # type: ignore[union-attr]
    assert all("loss 3.1416  lr 3.0e-04  grad 0.52  41.3k tok/s" in line for line in lines)
    assert "\x1b" not in stream.getvalue()
    assert lines[-1].endswith("0:00:00 left")


def test_an_interrupted_run_shows_its_last_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(tmp_path, log_every=10, stream=stream) as console:
        console.start(100)
        for step in range(1, 14):
            console.update(step, STATS)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["10/100", "13/100"]


def test_a_step_that_is_not_finite_is_shown_at_once_and_as_it_is(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(tmp_path, log_every=1000, stream=stream)
    console.start(5000)
    console.update(7, {**STATS, "loss": math.nan})
    console.close()
    assert "loss nan" in stream.getvalue()


def test_terminal_gets_one_live_line_and_log_txt_the_plain_ones(tmp_path: Path) -> None:
    stream = Terminal()
    console = Console(tmp_path, log_every=10, stream=stream)
    console.start(20)
    for step in range(1, 21):
        console.update(step, STATS)
    console.message("saved step-20")
    console.close()
    assert "\x1b" in stream.getvalue() and "saved step-20" in stream.getvalue()
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("  ", 1)[1].split("  ")[0] for line in log] == [
        "step 10/20",
        "step 20/20",
        "saved step-20",
    ]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  ", line) for line in log)


def test_brackets_in_a_message_are_not_markup(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(tmp_path, stream=stream) as console:
        console.message("wrote [red]x[/red] to [/tmp]")
    assert stream.getvalue() == "wrote [red]x[/red] to [/tmp]\n"


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(tmp_path / "run", enabled=False, stream=stream) as console:
        console.start(10)
        console.update(10, STATS)
        console.message("x")
    assert stream.getvalue() == "" and not (tmp_path / "run").exists()


def test_time_left_counts_only_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run did 900 of 1000 steps in another process: the 10 done here took 20 s."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(stream=stream, log_every=10)
    console.start(1000, 900)
    for step in range(901, 911):
        now[0] += 2.0
        console.update(step, STATS)
    console.close()
    assert "step 910/1,000" in stream.getvalue() and stream.getvalue().rstrip().endswith("0:03:00 left")


def test_missing_statistics_are_left_out_and_log_txt_is_continued(tmp_path: Path) -> None:
    for _ in range(2):
        with Console(tmp_path, stream=io.StringIO(), log_every=1) as console:
            console.start(1)
            console.update(1, {"loss": 1.0})
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 2 and all("loss 1.0000  " in line and "lr" not in line for line in lines)


def test_a_signal_handler_may_write_a_message_while_a_line_is_being_written(tmp_path: Path) -> None:
    """A buffered log raises "reentrant call" then, and the save on SIGTERM is lost."""
    console = Console(tmp_path, stream=io.StringIO(), log_every=1)
    former = signal.signal(signal.SIGALRM, lambda *_: console.message("stopping"))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            console._write("x" * 2000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    console.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert {line.split("  ", 1)[1] for line in lines} == {"x" * 2000, "stopping"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_under_log_txt_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    stream = io.StringIO()
    with Console(tmp_path, stream=stream) as console:
        console.message("one")
        console.message("two")
    assert stream.getvalue().splitlines() == [
        "one",
        "log.txt is no longer written: No space left on device",
        "two",
    ]
