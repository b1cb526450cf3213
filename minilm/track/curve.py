"""loss.png: the curve of a run, from its metrics.jsonl, with the two losses that a reader should know.

ln(V) is the loss of a model that knows nothing: a curve that starts far from it was scaled or is not fresh.
Where the data is synthetic, its entropy rate is the loss of a model that knows everything: a curve below it
counts something twice or sees what it should predict.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from minilm.errors import CheckpointError
from minilm.track.metrics import read_metrics

FILE = "loss.png"
_BLUE, _ORANGE, _GREEN, _GREY = "#2f6db3", "#d9772b", "#3a8f5c", "#8a8f98"
_MOST_POINTS = 4000  # more than the picture has columns: the drawing of a long run stays fast and small


def plot_curve(run_folder: Path | str) -> Path:
    """Draw RUN/loss.png and return its path. Raises CheckpointError where no training step was logged."""
    # Figure and canvas as objects: pyplot would choose a backend and keep figures in global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(run_folder)
    records = read_metrics(folder)
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        raise CheckpointError(f"{folder}: no training step was logged, so there is no curve to draw.")
    validation = [record for record in records if record["kind"] == "validation" and "loss" in record]
    facts = next((r for r in records if r["kind"] == "event" and "vocab_size" in r), {})

    figure = Figure(figsize=(9, 7), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=[4.2, 1, 1])
    _draw_loss(loss, train, validation, facts)
    for axes, name, label, color in (
        (rate, "learning_rate", "learning rate", _GREEN),
        (norm, "gradient_norm", "gradient norm", _ORANGE),
    ):
        points = _column(train, name)
        axes.plot(*_thinned(points), color=color, linewidth=1.1)
        axes.set_ylabel(label, fontsize=8)
        if not points[0]:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=_GREY, fontsize=8)
    positive = [value for value in _column(train, "gradient_norm")[1] if value > 0]
    if positive and max(positive) > 20 * min(positive):
        norm.set_yscale("log")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate.yaxis.get_offset_text().set_fontsize(8)
    for axes in (loss, rate, norm):
        axes.grid(color="#e4e6ea", linewidth=0.7)
        axes.tick_params(labelsize=8, color=_GREY)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_GREY)
    norm.set_xlabel("optimizer step", fontsize=9)
    norm.xaxis.get_major_locator().set_params(integer=True)

    path = folder / FILE
    new = folder / f".{FILE}.new"
    figure.savefig(new, format="png")
    return new.replace(path)


def smoothed(values: list[float], half_width: int) -> list[float]:
    """Mean over `half_width` values to each side, over fewer at the ends, the same number on both sides.

    A running average that looks backward only would lie above a falling curve and show a model worse, a
    rising one better, than it is.
    """
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for i in range(len(values)):
        reach = min(half_width, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def _draw_loss(
    axes: Any, train: list[dict[str, Any]], validation: list[dict[str, Any]], facts: dict[str, Any]
) -> None:
    steps, losses = _column(train, "loss")
    few = len(steps) < 40
    raw = _thinned((steps, losses))
    if len(steps) <= _MOST_POINTS:  # with nan, where matplotlib breaks the line
        raw = [record["step"] for record in train], [record.get("loss", math.nan) for record in train]
    axes.plot(
        *raw,
        marker="." if few else None,
        color=_BLUE,
        alpha=1 if few else 0.35,
        linewidth=1.4 if few else 0.7,
        label="training, each step",
    )
    if not few:
        # The window grows with the run, so that the smooth line keeps its look at any length.
        window = smoothed(losses, max(2, len(losses) // 100))
        axes.plot(*_thinned((steps, window)), color=_BLUE, linewidth=1.9, label="training, smoothed")
    if validation:
        points = _column(validation, "loss")
        axes.plot(*points, "o-", color=_ORANGE, markersize=4, linewidth=1.2, label="validation")
        if points[1]:
            axes.annotate(
                f"{points[1][-1]:.3f}",
                (points[0][-1], points[1][-1]),
                xytext=(4, 5),
                textcoords="offset points",
                fontsize=8,
                color=_ORANGE,
                ha="right",
            )
    if facts.get("vocab_size"):
        value = math.log(facts["vocab_size"])
        axes.axhline(
            value,
            color=_GREY,
            linestyle="--",
            linewidth=1,
            label=f"ln({facts['vocab_size']:,}) = {value:.3f}: knows nothing",
        )
    if facts.get("floor_nats") is not None:
        value = facts["floor_nats"]
        axes.axhline(
            value,
            color="black",
            linestyle=":",
            linewidth=1.2,
            label=f"{value:.3f}: entropy of the data, knows everything",
        )
    broken = [record["step"] for record in train if "loss" in record.get("nonfinite", {})]
    for number, step in enumerate(broken[:50]):
        axes.axvline(step, color="#c0392b", linewidth=1, label="loss not finite" if number == 0 else None)
    axes.set_ylabel("loss, nats per token", fontsize=9)
    # Below the top line, ln(V), which a fresh run starts on.
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.94))


def _column(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values where the value is a finite number."""
    found = [
        (record["step"], float(record[name]))
        for record in records
        if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])
    ]
    return [step for step, _ in found], [value for _, value in found]


def _thinned(points: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    """Of a long curve the lowest and highest point of each stretch: spikes stay, unlike with every n-th point."""
    steps, values = points
    if len(steps) <= _MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(steps) / _MOST_POINTS)
    kept: list[int] = []
    for start in range(0, len(steps), stretch):
        window = range(start, min(start + stretch, len(steps)))
        kept += sorted({min(window, key=values.__getitem__), max(window, key=values.__getitem__)})
    return [steps[i] for i in kept], [values[i] for i in kept]
