"""A run that goes back to an earlier step by itself: no step twice, in metrics.jsonl or SwanLab, and no line lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swanlab_stand_in import Told, noted, tracker

from minilm.track import read_metrics


def lines(path: Path) -> list[tuple[str, int]]:
    return [(r["kind"], r["step"]) for r in map(json.loads, path.read_text().splitlines())]


def test_the_abandoned_lines_are_in_the_given_file_and_nowhere_else(tmp_path: Path) -> None:
    run = tracker(tmp_path / "run", Told(), swanlab="off")
    for step in range(1, 8):
        run.log("train", step, {"loss": float(step)})
    run.log("validation", 6, {"loss": 9.0})
    run.event(7, "a spike")
    aside = tmp_path / "abandoned.jsonl"
    aside.write_text("of the same way back, before a kill\n")
    run.go_back(4, aside)
    for step in range(5, 9):
        run.log("train", step, {"loss": 0.0})
    run.log("validation", 6, {"loss": 8.0})
    run.close("finished")
    assert lines(aside) == [
        ("train", 5), ("train", 6), ("train", 7), ("validation", 6), ("event", 7)
    ]  # fmt: skip
    train = read_metrics(tmp_path / "run", "train")
    assert [(r["step"], r["loss"]) for r in train] == [
        *((s, float(s)) for s in range(1, 5)),
        *((s, 0.0) for s in range(5, 9)),
    ]
    assert [r["loss"] for r in read_metrics(tmp_path / "run", "validation")] == [8.0]
    assert not (tmp_path / "run" / "metrics.superseded.jsonl").exists()


def test_without_a_file_they_are_superseded_lines(tmp_path: Path) -> None:
    run = tracker(tmp_path / "run", Told(), swanlab="off")
    for step in range(1, 4):
        run.log("train", step, {"loss": 1.0})
    run.go_back(1, None)
    run.close("finished")
    assert lines(tmp_path / "run" / "metrics.superseded.jsonl") == [("train", 2), ("train", 3)]


def test_swanlab_gets_one_whole_curve_without_doubled_steps(tmp_path: Path, fake: Any) -> None:
    notes, told = fake("works"), Told()
    run = tracker(tmp_path / "run", told)
    for step in range(1, 8):
        run.log("train", step, {"loss": 1.0})
    run.go_back(4, tmp_path / "abandoned.jsonl")
    ended = noted(notes)[-1]
    assert ended == {"finish": "aborted", "error": "went back to step 4"}
    notes.unlink()
    for step in range(5, 10):
        run.log("train", step, {"loss": 2.0})
    run.close("finished")
    first, *logs, end = noted(notes)
    assert first["init"]["name"] == "run (resumed 1)" and end["finish"] == "success"
    curve = [(n["step"], n["log"]["train/loss"]) for n in logs if "train/loss" in n["log"]]
    assert curve == [(s, 1.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 10)]
    assert told == []
