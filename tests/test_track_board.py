"""The real SwanLab and its local board, read through its own server."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from swanlab_stand_in import Told, board, get, tracker

from minilm.track import dashboard, read_metrics


@pytest.mark.skipif(dashboard.choose_mode("auto")[0] != "local", reason="needs swanlab[dashboard]")
def test_the_real_board_shows_what_metrics_jsonl_says(tmp_path: Path) -> None:
    """Through swanlab's own server: every point of every curve, and the tables (E3: shifted by one column)."""
    told = Told()
    for attempt in (1, 2):
        run = tracker(tmp_path / "run", told, swanlab="local", log_every=2, swanlab_close_seconds=60.0)
        if attempt == 2:
            run.resume_at(20)
        for step in range(1, 31) if attempt == 1 else range(21, 42):
            loss = math.nan if step == 13 else 9.0 / step + attempt * 1e-9
            run.log("train", step, {"loss": loss, "learning_rate": 1e-3 / step, "auxiliary": {"z": step}})
        run.log("validation", 30 if attempt == 1 else 41, {"loss": 2.0 + attempt / 3})
        run.sample(30 if attempt == 1 else 41, [{"prompt": "def", "text": f"attempt {attempt}: 你好 \udc80"}])
        run.close("finished" if attempt == 2 else "failed", None if attempt == 2 else "test")
    assert told == []

    with board(tmp_path / "swanlog", tmp_path / "watch.log") as port:
        experiments = {e["name"]: e for e in get(port, "project")["experiments"]}
        assert set(experiments) == {"run (superseded 1)", "run (resumed 1)"}
        number = experiments["run (resumed 1)"]["id"]
        records = read_metrics(tmp_path / "run", "train")
        assert [r["step"] for r in records] == list(range(1, 42))
        shown = [r for r in records if r["step"] % 2 == 0 or r["step"] in (1, 13, 41)]
        for name in ("loss", "learning_rate", "auxiliary/z"):
            points = get(port, f"experiment/{number}/tag/train/{name}")["list"]
            want = [(r["step"], r[name]) for r in shown if math.isfinite(r[name])]
            assert [(int(p["index"]), p["data"]) for p in points] == want
        summaries = get(port, "project/summaries?experiment_names=" + "")["summaries"]["run (resumed 1)"]
        card = {s["key"]: s["value"] for s in get(port, f"experiment/{number}/summary")["summaries"]}
        for table in (summaries, card):
            assert table["train/loss"] == records[-1]["loss"]
            assert table["train/learning_rate"] == records[-1]["learning_rate"]
            assert table["train/auxiliary/z"] == 41
            assert table["train/nonfinite"] == 1
            assert table["validation/loss"] == 2.0 + 2 / 3
            assert table["samples"] == ["attempt 2: 你好 ?"]
