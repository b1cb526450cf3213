"""The pictures of docs/performance.md: who is how fast, and how speed grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BLUE, GREY, LIGHT, DARK = "#2f6db3", "#8a8f98", "#e4e6ea", "#333840"
CHECKSUM = "minilm-results"  # name of the text in the PNG that says what it was drawn from


def draw(record: Mapping[str, Any], path: Path, checksum: str) -> None:
    """Write the picture of a record (`DRAWN` has its benchmark)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas as objects: pyplot would choose a backend and keep figures in global state.
    figure = Figure(dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    DRAWN[record["benchmark"]](figure, record)
    figure.savefig(path, metadata={CHECKSUM: checksum, "Software": None})


def drawn_from(path: Path) -> str | None:
    """The checksum that a picture was drawn with."""
    from PIL import Image

    with Image.open(path) as image:
        found = image.info.get(CHECKSUM)
    return None if found is None else str(found)


def _training_step(figure: Any, record: Mapping[str, Any]) -> None:
    """A panel per head size, a bar per contender, minilm in blue."""
    cases = record["results"]["cases"]
    longest = max(len(_measured(case)) for case in cases)
    figure.set_size_inches(9, 0.9 + len(cases) * (0.75 + 0.3 * longest))
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for axes, case in zip(panels, cases, strict=True):
        some = sorted(_measured(case), key=lambda x: x["tokens_per_second"]["median"])
        speeds = [x["tokens_per_second"] for x in some]
        middle = [speed["median"] for speed in speeds]
        reach = [[s["median"] - s["lowest"] for s in speeds], [s["highest"] - s["median"] for s in speeds]]
        names = [x["label"] for x in some]
        colors = [BLUE if name.startswith("minilm") else GREY for name in names]
        axes.barh(range(len(some)), middle, color=colors, height=0.68)
        axes.errorbar(
            middle, range(len(some)), xerr=reach, fmt="none", ecolor=DARK, elinewidth=1.1, capsize=2.5
        )
        most = max(s["highest"] for s in speeds)
        for place, speed in enumerate(speeds):
            axes.text(
                speed["highest"] + 0.012 * most,
                place,
                f"{speed['median']:,.0f}",
                va="center",
                fontsize=8,
                color=DARK,
            )
        axes.set_yticks(range(len(some)), names, fontsize=8.5)
        axes.set_xlim(0, 1.12 * most)
        axes.set_title(f"head size {case['head_size']}", fontsize=9.5, loc="left", color=DARK)
        _plain(axes, "x")
    panels[-1].set_xlabel("tokens per second: median, lowest to highest", fontsize=8.5)


def _measured(case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [x for x in case["contenders"].values() if "failed" not in x]


def _scaling(figure: Any, record: Mapping[str, Any]) -> None:
    """A panel per axis: tokens per second and its range at each point, a line per wrapper."""
    done = [one for one in record["results"] if "absent" not in one]
    axes_names = list(dict.fromkeys(one["axis"] for one in done))
    columns = min(3, len(axes_names))
    lines = -(-len(axes_names) // columns)
    figure.set_size_inches(3.2 * columns, 2.7 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, name in zip(panels, axes_names, strict=False):
        some = [one for one in done if one["axis"] == name]
        places = {value: place for place, value in enumerate(dict.fromkeys(one["value"] for one in some))}
        for wrapper in dict.fromkeys(one["wrapper"] for one in some):
            ones = [one for one in some if one["wrapper"] == wrapper]
            speeds = [one["tokens_per_second"] for one in ones]
            reach = [
                [s["median"] - s["lowest"] for s in speeds],
                [s["highest"] - s["median"] for s in speeds],
            ]
            axes.errorbar(
                [places[one["value"]] for one in ones], [s["median"] for s in speeds], yerr=reach, marker="o",
                markersize=4, linewidth=1.4, elinewidth=1, capsize=2.5, label=wrapper or "no wrapper",
            )  # fmt: skip
        if len({one["wrapper"] for one in some}) > 1:
            axes.legend(fontsize=7.5, frameon=False)
        axes.set_xticks(list(places.values()), [str(value) for value in places])
        axes.set_xlim(-0.4, len(places) - 0.6)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_xlabel(name, fontsize=8.5)
        _plain(axes, "y")
    for axes in panels[len(axes_names) :]:
        axes.set_visible(False)
    figure.supylabel("tokens per second", fontsize=8.5)


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color=GREY)
    numbers = axes.xaxis if grid == "x" else axes.yaxis
    numbers.set_major_formatter(lambda value, place: f"{value:,.0f}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)


DRAWN: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "training_step": _training_step,
    "scaling": _scaling,
}
