"""Pictures of curves that say which points they were drawn from: a hash of the points stands in the PNG file itself."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilm.errors import CheckpointError
from minilm.experiments import numbers
from minilm.experiments.runfiles import RunFiles
from minilm.track.curve import smoothed

KEY = "minilm points sha256"
AXES = {"tokens": "tokens trained on", "flops": "FLOPs, computed", "minutes": "minutes in steps"}
_COLORS = ("#2f6db3", "#d9772b", "#3a8f5c", "#8e5bb5", "#b5443c", "#5b6270")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def points(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """What is drawn: of each run its name and, over each axis, training and validation loss."""
    return [
        {
            "run": run.name,
            **{
                f"{kind} over {over}": numbers.curve(run, kind, "loss", over)
                for over in AXES
                for kind in ("train", "validation")
            },
        }
        for run in runs
    ]


def points_hash(runs: Sequence[RunFiles]) -> str:
    """sha256 of the points, every digit of them."""
    return hashlib.sha256(json.dumps(points(runs)).encode()).hexdigest()


def draw(runs: Sequence[RunFiles], path: Path | None = None) -> bytes:
    """The PNG: losses of the runs over tokens, FLOPs and time, beside each other. Written to `path` where given."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    drawn = points(runs)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (over, label) in zip(panels, AXES.items(), strict=True):
        for number, one in enumerate(drawn):
            _draw_run(axes, one, over, _COLORS[number % len(_COLORS)], "-" if number < len(_COLORS) else "--")
        axes.set_xlabel(label, fontsize=9)
        if over != "minutes":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="#e4e6ea", linewidth=0.7)
        axes.tick_params(labelsize=8)
        if not any(one[f"train over {over}"][0] for one in drawn):
            axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    top = _top(drawn)
    if top is not None:
        panels[0].set_ylim(top=top)
    cut = "" if top is None else " (the first steps lie above)"
    panels[0].set_ylabel(f"loss, nats per token{cut}", fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={KEY: points_hash(runs), "Software": None})
    if path is not None:
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(content.getvalue())
        new.replace(path)
    return content.getvalue()


def told_points(path: Path) -> str | None:
    """The hash that a picture carries; None where it carries none. Raises CheckpointError if it is no whole PNG."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    if not content.startswith(_SIGNATURE):
        raise CheckpointError(f"{path}: not a PNG picture.")
    place, found = len(_SIGNATURE), None
    while place + 12 <= len(content):  # a chunk: length, kind, data, checksum
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack(">I", content[place + 8 + length : place + 12 + length] or b"\0\0\0\0")
        if checksum != zlib.crc32(kind + data):
            raise CheckpointError(f"{path}: damaged (the checksum of a part is wrong).")
        name, _, text = data.partition(b"\0")
        if kind == b"tEXt" and name.decode("latin-1") == KEY:
            found = text.decode("latin-1")
        place += 12 + length
        if kind == b"IEND":
            return found
    raise CheckpointError(f"{path}: damaged (its end is missing).")


def _top(drawn: list[dict[str, Any]]) -> float | None:
    """Where the picture ends above: a tenth of the way, so that the fall at the beginning does not flatten the rest."""
    losses = [one["train over tokens"][1] for one in drawn]
    after = [smoothed(ys, max(1, len(ys) // 60))[len(ys) // 10] for ys in losses if ys]
    lowest = min((min(ys) for ys in losses if ys), default=0.0)
    highest = max((max(ys) for ys in losses if ys), default=0.0)
    top = max(after, default=0.0) + 0.1 * (max(after, default=0.0) - lowest)
    return top if top - lowest < 0.5 * (highest - lowest) else None


def _draw_run(axes: Any, one: dict[str, Any], over: str, color: str, style: str) -> None:
    xs, ys = one[f"train over {over}"]
    if xs:
        axes.plot(xs, ys, color=color, linewidth=0.5, alpha=0.25)
        axes.plot(
            xs,
            smoothed(ys, max(1, len(ys) // 60)),
            color=color,
            linewidth=1.3,
            linestyle=style,
            label=one["run"],
        )
    xs, ys = one[f"validation over {over}"]
    if xs:
        axes.plot(xs, ys, color=color, linewidth=0, marker="o", markersize=4, markeredgecolor="white")
