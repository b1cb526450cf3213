"""The dashboard as a person sees it: SwanLab's local board in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from experiment_runs import SETTINGS, manifest
from swanlab_stand_in import Told, board, tracker

from minilm.track import dashboard
from minilm.track.mirror import section_of

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1500,4000",
    "--virtual-time-budget=8000",
)  # fmt: skip


def page(address: str, profile: Path) -> str:
    """The texts of a page after its scripts have run, separated by |."""
    shown = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", address],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    text = re.sub(r"<(script|style).*?</\1>", "", shown.stdout, flags=re.DOTALL)
    return re.sub(r"\s*(<[^>]*>\s*)+", "|", html.unescape(text))


@pytest.mark.skipif(not CHROMIUM, reason="no browser: apt-get install chromium")
@pytest.mark.skipif(dashboard.choose_mode("auto")[0] != "local", reason="needs swanlab[dashboard]")
def test_the_board_shows_a_run_in_a_browser(tmp_path: Path) -> None:
    told = Told()
    (tmp_path / "walker").mkdir()
    record = manifest(SETTINGS, {}, "running", 0)
    record["machine"]["gpus"] = [{"name": "Tensor Card", "memory_bytes": 24_000_000_000, "capability": "9.0"}]
    (tmp_path / "walker" / "manifest.json").write_text(json.dumps(record))
    run = tracker(tmp_path / "walker", told, swanlab="local", swanlab_close_seconds=60.0)
    run.log("validation", 0, {"loss": 4.0, "bits_per_byte": 1.5})  # comes first, and must not be shown first
    for step in range(1, 6):
        run.log("train", step, {"loss": 4.0 / step, "learning_rate": 1e-3, "seconds": {"step": 0.5},
                                "memory": {"process_mb": 400.0}, "data": {"batch": step}})  # fmt: skip
    run.log("doctor", 5, {"replay_error": 0.0, "failures": 0})
    run.sample(
        5, [{"prompt": "", "text": "began alone"}, {"prompt": "The sailor", "text": "sells bright books"}]
    )
    run.close("finished")
    assert told == []
    with board(tmp_path / "swanlog", tmp_path / "watch.log") as port:
        charts = page(f"http://127.0.0.1:{port}/experiment/1/chart", tmp_path / "profile")
        card = page(f"http://127.0.0.1:{port}/experiment/1/index", tmp_path / "profile")
    assert "|walker|" in charts and "|Finished|" in charts
    names = ["train/loss", "validation/loss", "validation/bits_per_byte", "samples", "train/learning_rate",
             "train/seconds/step", "train/memory/process_mb", "doctor/replay_error", "train/data/batch"]  # fmt: skip
    places = [charts.find(f"|{name}|") for name in names]
    assert min(places) > 0 and places == sorted(places)
    groups = ["loss", "validation", "samples", "optimizer", "speed", "memory", "doctor", "data"]
    assert [found for found in re.findall(r"\|(\w+)\|\d+\|", charts) if found in groups] == groups
    # A table of prompt and text; the board shows none where one prompt is empty and has no name.
    assert "|began alone|" in charts and "|The sailor|sells bright books|" in charts
    assert "|model/dim|8|" in card and "|machine.gpus|Tensor Card, 24.0 GB|" in card
    assert "|machine.cpu|AMD EPYC|" in card and "|machine.memory_gb|25|" in card


def test_every_column_has_a_group() -> None:
    wanted = {
        "train/loss": "loss",
        "train/auxiliary/balance": "loss",
        "validation/ema/loss": "validation",
        "validation/nonfinite": "doctor",
        "train/nonfinite": "doctor",
        "train/gradient_norm": "optimizer",
        "train/mfu": "speed",
        "train/memory/peak_mb": "memory",
        "doctor/failures": "doctor",
        "train/uniformity/cosine": "model",
        "train/data/document": "data",
        "samples": "samples",
        "curve": "picture",
    }
    assert {name: section_of(name) for name in wanted} == wanted
