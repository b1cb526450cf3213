"""`minilm watch`: what it shows is what metrics.jsonl says, however the file comes to be."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from experiment_runs import START, loss_at, train_line, write_run
from rich.console import Console

from minilm import processes
from minilm.__main__ import main
from minilm.experiments import braille
from minilm.experiments.following import Curve, Follower, Told
from minilm.experiments.watching import Watched, overview, picture, shown
from minilm.track import read_metrics
from minilm.track.metrics import MetricsFile, encode

EVIL = "\x1b[2J\x9b5A\x07 \u202egnp.\u2066 \r\nsecond"


def view(told: Told) -> tuple:
    """All that a picture is made of."""
    kept = (
        told.train,
        told.validation,
        told.best,
        told.sample,
        told.doctor,
        list(told.events),
        list(told.alarms),
    )
    return (*kept, told.curve.points(), told.num_not_finite, told.num_damaged, told.smoothed)


def fresh(folder: Path) -> tuple:
    follower = Follower(folder)
    follower.poll()
    return view(follower.told)


def lines_of(folder: Path) -> list[str]:
    watched = Watched(folder)
    watched.refresh()
    return [line.plain for line in picture(watched, width=80, height=24)]


def test_pieces_of_a_file_are_the_whole_file(tmp_path: Path) -> None:
    data = (write_run(tmp_path / "run") / "metrics.jsonl").read_bytes()
    growing, follower = tmp_path / "growing", Follower(tmp_path / "growing")
    assert follower.poll() is False and follower.told.train is None  # it has not begun
    growing.mkdir()
    draw, at = random.Random(1), 0
    while at < len(data):
        at += draw.randrange(1, 400)
        (growing / "metrics.jsonl").write_bytes(data[:at]) if at < 400 else append(growing, data, at)
        follower.poll()
        want = [record for record in read_metrics(growing) if record["kind"] == "train"]
        assert follower.told.train == (want[-1] if want else None)
    assert view(follower.told) == fresh(tmp_path / "run")
    assert follower.poll() is False


def append(folder: Path, data: bytes, end: int) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(data[file.tell() : end])


def test_the_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    follower = Follower(run)
    follower.poll()
    told, losses = follower.told, np.array([loss_at(step) for step in range(1, 21)])
    weights = 0.98 ** np.arange(19, -1, -1)
    assert told.smoothed == pytest.approx(float((weights * losses).sum() / weights.sum()), rel=1e-12)
    assert told.best is not None and told.best["step"] == 20 and told.validation == told.best
    assert [event["text"] for event in told.events] == ["spike <b>at</b> step 7 | kept"]
    assert told.curve.points() == [(s, loss_at(s)) for s in range(1, 21)]
    assert told.seconds_left(30) == pytest.approx(10.0)  # a step a second


def test_a_file_that_is_cut_replaced_or_removed_is_read_anew(tmp_path: Path) -> None:
    run, follower = write_run(tmp_path / "run"), Follower(tmp_path / "run")
    follower.poll()
    metrics = MetricsFile(run)
    metrics.truncate_after(10)  # as a resume does
    metrics.append("train", 11, START + 50, {"loss": 1.5})
    metrics.close()
    assert follower.poll() and view(follower.told) == fresh(run)
    assert follower.told.train["loss"] == 1.5 and follower.told.curve.points()[-1] == (11, 1.5)
    place = run / "metrics.jsonl"
    place.write_bytes(
        b"".join(encode("train", s, START, {"loss": 9.0}) for s in range(1, 200))
    )  # the same inode
    assert follower.poll() and view(follower.told) == fresh(run) and follower.told.num_damaged == 0
    assert {y for _, y in follower.told.curve.points()} == {9.0}
    (run / "new").write_bytes(place.read_bytes().replace(b"9.0", b"8.0", 1))  # as long, and ends alike
    (run / "new").replace(place)
    assert follower.poll() and follower.told.curve.points()[0] == (1, 8.0)
    place.unlink()
    assert follower.poll() and follower.told.train is None and not follower.poll()


def test_values_that_are_not_finite_and_damaged_lines_are_counted_not_hidden(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(encode("train", 21, START + 21, {"loss": math.nan, "gradient_norm": math.inf}))
        file.write(
            b"not json\n[]\n" + encode("event", 21, START, {"text": "watch_loss FAIL logged 3, again 2"})
        )
    follower = Follower(run)
    follower.poll()
    assert (follower.told.num_not_finite, follower.told.num_damaged) == (1, 2)
    assert math.isfinite(follower.told.smoothed) and follower.told.curve.points()[-1][0] == 20
    text = "\n".join(lines_of(run))
    assert "loss       nan" in text and "not finite in 1 steps" in text and "gradient norm inf" in text
    assert "watch_loss FAIL logged 3, again 2" in text


def test_the_picture_says_what_the_run_says(tmp_path: Path) -> None:
    text = "\n".join(lines_of(write_run(tmp_path / "run")))
    for part in ("finished", "20/20", "100.0 %", "loss       2.0000", "validation 2.5000 at 20",
                 "bits/byte 1.3000", "tokens/s -",
                 "500 ms; in %: data 10, forward 40, ", "backward 30, optimizer 12, other 8",
                 "process 420 MB", "before 30 passed, 1 failed", "spike <b>at</b> step 7", "one |"):  # fmt: skip
        assert part in text, part
    assert "left" not in text and "MFU" not in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 60), (80, 9)])
def test_the_picture_fits_and_no_text_commands_the_terminal(tmp_path: Path, width: int, height: int) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        for step in range(21, 40):
            file.write(encode("event", step, START, {"text": EVIL * 20}))
        file.write(
            encode("sample", 20, START, {"samples": [{"prompt": EVIL, "text": EVIL + "鸟" * 300}] * 9})
        )
    watched = Watched(run)
    watched.refresh()
    drawn = picture(watched, width=width, height=height)
    assert len(drawn) <= height and max(line.cell_len for line in drawn) <= width
    whole = "".join(line.plain for line in drawn)
    assert not [
        c for c in whole if ord(c) < 32 or 127 <= ord(c) < 160 or 0x202A <= ord(c) < 0x202F or c == "\u2066"
    ]
    if height >= 24:
        assert "second" in whole and "鸟" in whole
    assert shown("a\x1b[31m\nb") == "a\u241b[31m b"


def test_states_and_their_reasons(tmp_path: Path) -> None:
    assert "waiting" in lines_of(tmp_path / "soon")[0]
    (tmp_path / "soon").mkdir()
    assert "it has not begun to write" in lines_of(tmp_path / "soon")[1]
    run = write_run(tmp_path / "run", state="running", steps=7)
    record = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(
        json.dumps(record | {"process": processes.describe() | {"number": 2**22 + 1}})
    )
    watched = Watched(run)
    watched.refresh()
    assert watched.row.state == "died" and watched.has_ended
    assert "its process is gone" in picture(watched, width=80, height=24)[1].plain
    (run / "manifest.json").write_text(json.dumps(record | {"process": processes.describe()}))
    text = lines_of(run)
    assert "running" in text[0] and "0:00:13 left" in text[1] and "7/20" in text[1]


def test_several_runs_can_be_told_apart_on_a_narrow_terminal(tmp_path: Path) -> None:
    runs = [
        Watched(write_run(tmp_path / f"learning_rate=0.003,num_layers=12,name=original,seed={seed}"))
        for seed in (0, 1)
    ]
    for run in runs:
        run.refresh()
    for width in (80, 60):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(overview(runs, width=width))
        lines = console.export_text().splitlines()
        assert len(lines) == 3 and max(map(len, lines)) <= width
        assert "seed=0  finished" in lines[1] and "seed=1  finished" in lines[2] and "2.5000" in lines[1]


def test_a_curve_of_dots_is_the_curve() -> None:
    points = [(float(x), math.sin(x / 30)) for x in range(200)]
    drawn = braille.curve(points, 50, 10, limits=(-1.0, 1.0), plain=False)
    assert [len(line) for line in drawn] == [50] * 10
    dots = [[row * 4 + up for row in range(10) for up in range(4)
             if drawn[row] [column // 2] != " " and ord(drawn[row][column // 2]) - 0x2800 & BITS[up][column % 2]]
            for column in range(100)]  # fmt: skip
    for column, found in enumerate(dots):
        y = (math.sin(2 * column / 30) + math.sin((2 * column + 1) / 30)) / 2  # two points a column
        assert round(39 - (y + 1) / 2 * 39) in found
    assert sum(map(len, dots)) < 300  # a line, not an area
    plain = braille.curve(points, 50, 10, limits=(-1.0, 1.0), plain=True)
    assert set("".join(plain)) == {" ", "*"}
    assert (
        braille.sparkline([(0, 1.0), (1, 3.0), (2, 2.0)], 3, plain=False)
        == "▁█▅"[:2] + braille.sparkline([(0, 1.0), (1, 2.0), (2, 3.0)], 3, plain=False)[1]
    )


BITS = ((1, 8), (2, 16), (4, 32), (64, 128))


def test_a_long_curve_is_thinned_without_moving_it() -> None:
    curve, values = Curve(most=16), np.random.default_rng(0).normal(size=1000)
    for x, y in enumerate(values):
        curve.add(x, float(y))
    points = curve.points()
    assert 8 <= len(points) <= 16
    size = next(2**n for n in range(12) if math.ceil(1000 / 2**n) == len(points))
    for number, (x, y) in enumerate(points):
        part = slice(number * size, min((number + 1) * size, 1000))
        assert x == pytest.approx(np.arange(1000)[part].mean()) and y == pytest.approx(values[part].mean())


def test_the_command_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "group" / "run")
    write_run(tmp_path / "group" / "other", shift=0.5)
    assert main(["watch", str(run), "--once"]) == 0
    assert "20/20" in capsys.readouterr().out
    assert main(["watch", str(run), str(tmp_path / "group" / "other")]) == 0  # no terminal: once
    said = capsys.readouterr().out
    assert "run" in said and "other" in said and "\x1b" not in said
    (tmp_path / "group" / "swanlog").mkdir()
    assert main(["watch", str(tmp_path / "group")]) == 0  # the runs of a folder, and nothing else
    assert len(capsys.readouterr().out.splitlines()) == 3
    bad = [tmp_path / "no" / "such", run / "metrics.jsonl"]
    assert main(["watch", *map(str, bad), "--once", "--every", "0"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "3 problems" in said and "nor the one that it would be in" in said and "is a file" in said


def test_ctrl_c_gives_the_terminal_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", state="running", steps=7)
    record = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(record | {"process": processes.describe()}))
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        [sys.executable, "-m", "minilm", "watch", str(run), "--every", "0.2"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
    )  # fmt: skip
    os.close(theirs)
    seen = read_until(ours, b"7/20")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(json.dumps(train_line(8, 0.0)).encode() + b"\n")
    seen += read_until(ours, b"8/20")
    process.send_signal(signal.SIGINT)
    seen += read_until(ours, None)
    assert process.wait(timeout=20) == 130
    os.close(ours)
    assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen  # the other screen, and back
    assert seen.rfind(b"\x1b[?1049l") < seen.rfind(b"8/20") and b"Traceback" not in seen


def read_until(terminal: int, wanted: bytes | None) -> bytes:
    """What a program writes until something is there; None: until it ends."""
    seen, until = b"", time.monotonic() + 60
    while wanted is None or wanted not in seen:
        assert time.monotonic() < until, seen
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # Linux: the other side is closed
            break
    return seen
