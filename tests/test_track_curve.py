"""loss.png and the tracker's own promises."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from minilm.errors import CheckpointError
from minilm.track import TrackConfig, Tracker, curve, plot_curve, read_metrics

OFF = TrackConfig(swanlab="off")


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def colored(image: np.ndarray, hexadecimal: str) -> np.ndarray:
    """Which pixels have this colour: [H, W] bool."""
    wanted = [int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(image - wanted).max(axis=2) < 12


def run(folder: Path, losses: list[float], **facts: Any) -> Path:
    tracker = Tracker(folder, OFF, {}, **facts)
    for step, loss in enumerate(losses, 1):
        tracker.log("train", step, {"loss": loss, "learning_rate": 1e-3, "gradient_norm": 1.0})
        if step % 50 == 0:
            tracker.log("validation", step, {"loss": loss})
    tracker.close("finished")
    return folder / "loss.png"


def test_the_curve_falls_on_the_picture_and_leaves_no_global_state(tmp_path: Path) -> None:
    before = set(sys.modules)
    path = run(tmp_path, [2 + 6 * math.exp(-s / 60) for s in range(300)], vocab_size=6400, floor=1.9)
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    image = pixels(path)
    assert image.shape[1] > 1000
    top = image[: image.shape[0] // 2]
    rows = [np.flatnonzero(column).mean() for column in colored(top, curve._BLUE).T[80:700] if column.any()]
    assert rows[-1] - rows[0] > 200  # pixels downward
    assert colored(top, curve._ORANGE).sum() > 100  # validation points
    assert not list(tmp_path.glob(".*"))  # the picture was renamed into place


def test_reference_lines_are_drawn_only_where_they_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.axes

    drawn: list[float] = []
    real = matplotlib.axes.Axes.axhline

    def spy(self: Any, y: float, **options: Any) -> Any:
        drawn.append(y)
        return real(self, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "axhline", spy)
    run(tmp_path / "both", [3.0, 2.0], vocab_size=6400, floor=1.25)
    assert drawn == [math.log(6400), 1.25]
    drawn.clear()
    run(tmp_path / "none", [3.0, 2.0])
    assert drawn == []


def test_values_that_are_not_finite_leave_a_gap_and_a_red_line(tmp_path: Path) -> None:
    image = pixels(run(tmp_path, [3.0, math.nan, 2.0, math.inf, 1.0]))
    red = (image[..., 0] > 150) & (image[..., 0] - image[..., 1:].max(axis=2) > 60)
    assert (red.sum(axis=0) > 400).sum() >= 2  # two lines from top to bottom of the upper panel


def test_no_steps_no_curve(tmp_path: Path) -> None:
    Tracker(tmp_path, OFF, {}).close("failed", "stopped before the first step")
    assert not (tmp_path / "loss.png").exists()
    with pytest.raises(CheckpointError, match="no training step"):
        plot_curve(tmp_path)


def test_smoothing_does_not_lag_and_keeps_a_straight_line() -> None:
    line = [10 - 0.5 * i for i in range(50)]
    assert curve.smoothed(line, 7) == pytest.approx(line)
    noisy = list(np.random.default_rng(0).normal(size=400))
    reference = [np.mean(noisy[i - min(9, i, 399 - i) : i + min(9, i, 399 - i) + 1]) for i in range(400)]
    assert curve.smoothed(noisy, 9) == pytest.approx(reference)


def test_thinning_a_long_curve_keeps_its_spikes() -> None:
    values = [1.0] * 100_000
    values[54_321], values[77_777] = 9.0, -9.0
    steps, kept = curve._thinned((list(range(100_000)), values))
    assert len(steps) <= 4000
    assert dict(zip(steps, kept, strict=True))[54_321] == 9.0
    assert dict(zip(steps, kept, strict=True))[77_777] == -9.0


def test_repeated_steps_are_refused_per_kind(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, OFF, {})
    tracker.log("train", 5, {"loss": 1.0})
    tracker.log("validation", 5, {"loss": 1.0})
    for kind in ("train", "validation"):
        with pytest.raises(CheckpointError, match="--resume"):
            tracker.log(kind, 5, {"loss": 2.0})
    tracker.close("finished")
    again = Tracker(tmp_path, OFF, {})  # a new run in an old folder, by mistake
    with pytest.raises(CheckpointError, match="--resume"):
        again.log("train", 1, {"loss": 2.0})
    again.close("failed", "test")
    assert [r["loss"] for r in read_metrics(tmp_path, "train")] == [1.0]


def test_resume_continues_without_lost_or_doubled_steps(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, OFF, {}, vocab_size=10)
    for step in range(1, 8):
        tracker.log("train", step, {"loss": 1.0})
    tracker.close("interrupted", "SIGTERM")
    tracker = Tracker(tmp_path, OFF, {}, vocab_size=10)
    tracker.resume_at(5)
    for step in range(6, 11):
        tracker.log("train", step, {"loss": 2.0})
    tracker.close("finished")
    records = read_metrics(tmp_path)
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    assert train == [(s, 1.0) for s in range(1, 6)] + [(s, 2.0) for s in range(6, 11)]
    assert [r["text"] for r in records if r["kind"] == "event"] == ["run", "resumed at step 5", "finished"]
    superseded = (tmp_path / "metrics.superseded.jsonl").read_text()
    assert superseded.count('"train"') == 2 and "interrupted: SIGTERM" in superseded


def test_resuming_after_the_first_log_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(tmp_path, OFF, {})
    monkeypatch.setattr(tracker, "_dashboard", object())
    with pytest.raises(RuntimeError, match="before the first log"):
        tracker.resume_at(3)
    monkeypatch.undo()
    tracker.close("finished")


def test_a_picture_that_cannot_be_written_does_not_hide_the_end_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "loss.png").mkdir()
    told: list[str] = []
    tracker = Tracker(tmp_path, OFF, {}, message=told.append)
    tracker.log("train", 1, {"loss": 1.0})
    tracker.close("finished")
    assert len(told) == 1 and "loss.png was not drawn" in told[0]


@pytest.mark.parametrize(
    ("raw", "ok"),
    [
        ({"swanlab": False}, True),  # YAML: `swanlab: off`
        ({"swanlab": "cloud", "tags": ["a", "b"], "project": "my-lab_1.0+x"}, True),
        ({"swanlab": "online"}, False),
        ({"project": "my lab"}, False),
        ({"log_every": 0}, False),
    ],
)
def test_settings(raw: dict[str, Any], ok: bool) -> None:
    if ok:
        assert TypeAdapter(TrackConfig).validate_python(raw).swanlab in ("off", "cloud")
    else:
        with pytest.raises(ValidationError):
            TypeAdapter(TrackConfig).validate_python(raw)


def test_messages_go_to_stderr_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    tracker = Tracker(tmp_path, OFF, {})
    tracker.event(3, "something happened", show=True, seconds=1.5)
    tracker.close("finished")
    assert stream.getvalue() == "something happened\n"
    event = read_metrics(tmp_path, "event")[1]
    assert (event["step"], event["text"], event["seconds"]) == (3, "something happened", 1.5)
