"""The facts experiment as a table and two plots: mean and standard deviation over the seeds of each arm."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm.errors import DataError

FILE = "facts.json"
BEGIN, END = "<!-- minilm facts table: begin -->", "<!-- minilm facts table: end -->"
SPLITS = ("head", "mid", "tail", "database_only", "text_only", "counterfactual", "without_answer")
AXES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time in seconds"}
HEADLINES = {"tail": "facts seen a few times, accuracy", "followed": "edits followed"}
_COLOURS = ("#2f6db3", "#d9772b", "#3a8f5c", "#9b4fa5", "#8a8f98", "#b5473c", "#3aa0a8", "#a38a2f")


@dataclass(frozen=True)
class Arm:
    """The runs of an arm, one a seed, each as `minilm facts score` wrote it."""

    name: str
    runs: tuple[dict[str, Any], ...]

    def values(self, of: Callable[[dict[str, Any]], float | None]) -> list[float]:
        """One number of each run; runs without it are left out."""
        return [value for run in self.runs if (value := of(run)) is not None]


def cost_of_run(run_folder: Path, step: int) -> dict[str, float]:
    """Targets trained on up to a step, and seconds: the median step times their number, which a pause does not move."""
    tokens, seconds = 0, []
    for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train" and record["step"] <= step:
            tokens = max(tokens, record["total_tokens"])
            seconds.append(record["seconds/step"])
    return {"tokens": tokens, "seconds": statistics.median(seconds) * step if seconds else 0.0}


def collect(folder: str | Path) -> list[Arm]:
    """The arms of a folder with a folder ARM-SEED for each run. Raises DataError where there are none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob(f"*/{FILE}")):
        if match := re.fullmatch(r"(.+)-(\d+)", path.parent.name):
            run = json.loads(path.read_text(encoding="utf-8"))
            run["flops"] = run["training_flops_per_token"] * run["tokens"]
            found.setdefault(match[1], []).append(run)
    if not found:
        raise DataError(f"{folder} has no ARM-SEED/{FILE}: `minilm facts score --json` writes them.")
    return [Arm(name, tuple(runs)) for name, runs in found.items()]


def written(arms: Sequence[Arm]) -> str:
    """The tables in Markdown: what is known, what is read, losses and costs."""
    known = {split: _of("questions", split, "accuracy") for split in SPLITS}
    edits = {
        "edits followed": _of("edits", "followed"),
        "old answer kept": _of("edits", "kept_old_answer"),
        "knowledge sensitivity": _of("edits", "knowledge_sensitivity"),
        "answer put back": _of("with_answer_put_back", "accuracy"),
    }
    read = {f"read, {split}": _of("questions", split, "hit") for split in ("tail", "database_only")}
    read |= {
        "right if read": _of("questions", "database_only", "accuracy_given_hit"),
        "right if not": _of("questions", "database_only", "accuracy_given_miss"),
    }
    losses = {
        f"loss {kind.replace('_', ' ')}": _of("losses", kind, "loss")
        for kind in ("fact_in_database", "fact_text_only", "other")
    }
    costs: dict[str, Callable[[dict[str, Any]], float | None]] = {
        name: (lambda run, name=name: run[name])  # type: ignore[misc]
        for name in ("parameters", "tokens", "flops", "seconds")
    }
    title = f"Chance: {arms[0].runs[0]['chance']:.4f}. Mean ± standard deviation over the seeds.\n"
    parts = [
        title,
        _table(arms, {"seeds": lambda run: None, **known}, _share),
        _table(arms, edits | read, _share),
        _table(arms, losses, lambda value: f"{value:.4f}"),
        _table(arms, costs, lambda value: f"{value:.3g}"),
    ]
    return "\n".join(parts)


def placed(record: str, tables: str, where: str) -> str:
    """The record with these tables between its marks. Raises DataError, naming `where`, if it has no such marks."""
    parts = record.split(BEGIN), record.split(END)
    if any(len(part) != 2 for part in parts) or record.index(BEGIN) > record.index(END):
        raise DataError(f"{where} needs one line {BEGIN} and after it one line {END}: the tables go between.")
    return f"{parts[0][0]}{BEGIN}\n\n{tables}\n{END}{parts[1][1]}"


def differing(record: str, tables: str, where: str) -> list[str]:
    """Lines of the record's tables that are not those of the runs: where, what stands there, what should."""
    right = placed(record, tables, where).splitlines()
    stated = record.splitlines()
    found = [
        f"{where}:{number}: {there!r} should be {line!r}"
        for number, (there, line) in enumerate(zip(stated, right, strict=False), 1)
        if there != line
    ]
    if len(stated) != len(right):
        found.append(f"{where} has {len(stated)} lines and should have {len(right)}")
    return found


def plot(arms: Sequence[Arm], out: Path) -> list[Path]:
    """Accuracy on tail facts, and edits followed, against tokens, FLOPs and time: a point for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    of = {"tail": _of("questions", "tail", "accuracy"), "followed": _of("edits", "followed")}
    for headline, title in HEADLINES.items():
        figure = Figure(figsize=(12, 4), dpi=130, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for axes, (axis, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
            for number, arm in enumerate(arms):
                points = [(run[axis], of[headline](run)) for run in arm.runs]
                axes.plot(
                    *zip(*points, strict=True),
                    "osD^vP"[number // len(_COLOURS)],
                    color=_COLOURS[number % len(_COLOURS)],
                    label=arm.name,
                    markersize=6,
                    alpha=0.8,
                )
            axes.axhline(arms[0].runs[0]["chance"], color="#8a8f98", linewidth=0.8, linestyle=":")
            axes.set_xlabel(label, fontsize=9)
            axes.set_ylim(-0.03, 1.03)
            axes.set_xlim(0, 1.06 * max(run[axis] for arm in arms for run in arm.runs))
            axes.grid(color="#e4e6ea", linewidth=0.7)
            axes.tick_params(labelsize=8)
        figure.axes[0].set_ylabel(title, fontsize=9)
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False
        )
        paths.append(out / f"{headline}.png")
        figure.savefig(paths[-1])
    return paths


def _of(*keys: str) -> Callable[[dict[str, Any]], float | None]:
    def value(run: dict[str, Any]) -> float | None:
        found: Any = run
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return None if found is None else float(found)

    return value


def _share(value: float) -> str:
    return f"{value:.3f}"


def _table(
    arms: Sequence[Arm],
    columns: dict[str, Callable[[dict[str, Any]], float | None]],
    shown: Callable[[float], str],
) -> str:
    lines = ["| arm | " + " | ".join(name.replace("_", " ") for name in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for arm in arms:
        cells = [arm.name]
        for name, of in columns.items():
            values = arm.values(of)
            if name == "seeds":
                cells.append(str(len(arm.runs)))
            elif not values:
                cells.append("")
            elif len(values) == 1:
                cells.append(shown(values[0]))
            else:
                cells.append(f"{shown(statistics.fmean(values))} ± {shown(statistics.stdev(values))}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
