"""The numbers of a run that records, comparisons and lists show, each from the lines of metrics.jsonl."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minilm.experiments.runfiles import RunFiles

CURVES = (  # kind of record, column, name
    ("train", "loss", "training loss"),
    ("validation", "loss", "validation loss"),
    ("validation", "perplexity", "validation perplexity"),
    ("validation", "bits_per_byte", "validation bits per byte"),
    ("validation", "ema/loss", "validation loss of the average"),
)
PARTS = ("data", "forward", "backward", "optimizer")
MEMORY = (
    ("memory/process_mb", "process"),
    ("memory/allocated_mb", "GPU, allocated"),
    ("memory/reserved_mb", "GPU, reserved"),
    ("memory/peak_mb", "GPU, peak"),
)


@dataclass(frozen=True)
class Place:
    """A value and where it stands: step, and seconds since 1970."""

    value: float
    step: int
    when: float


def last(run: RunFiles, kind: str, column: str) -> Place | None:
    """The last finite value of a column; None where there is none."""
    return next(iter(_places(run, kind, column)[::-1]), None)


def lowest(run: RunFiles, kind: str, column: str) -> Place | None:
    """The lowest value, the first time that it was reached."""
    return min(_places(run, kind, column), key=lambda place: place.value, default=None)


def highest(run: RunFiles, kind: str, column: str) -> Place | None:
    """The highest value, the first time that it was reached."""
    return max(_places(run, kind, column), key=lambda place: place.value, default=None)


def not_finite(run: RunFiles) -> int:
    """Training steps whose loss was nan or infinite."""
    return sum("loss" in record.get("nonfinite", {}) for record in run.of("train"))


def tokens(run: RunFiles) -> int:
    """Targets trained on, over all steps that were taken."""
    place = last(run, "train", "total_tokens")
    return int(place.value) if place else 0


def step_seconds(run: RunFiles) -> dict[str, float]:
    """{part of a step: seconds in all steps}; `step` is all of it, `other` what the parts do not cover."""
    train = run.of("train")
    whole = math.fsum(_finite(record.get("seconds/step")) for record in train)
    found = {part: math.fsum(_finite(r.get(f"seconds/{part}")) for r in train) for part in PARTS}
    return {**found, "other": whole - math.fsum(found.values()), "step": whole}


def tokens_per_second(run: RunFiles) -> float | None:
    """All targets by all seconds spent in steps, of one process: saving and validating are not in it."""
    train = run.of("train")
    seconds = math.fsum(_finite(record.get("seconds/step")) for record in train)
    counted = sum(int(record.get("step_tokens", 0)) for record in train if "seconds/step" in record)
    return counted / seconds if seconds > 0 else None


def curve(run: RunFiles, kind: str, column: str, over: str) -> tuple[list[float], list[float]]:
    """(x, y) of a column over `step`, `tokens`, `flops` or `minutes` (in steps, saves left out).

    A validation counts what was trained on when it was made. Empty where there is no such axis (unknown FLOPs).
    """
    if over == "flops" and run.flops_per_step is None:
        return [], []
    at: dict[int, tuple[float, float]] = {0: (0.0, 0.0)}
    seconds = 0.0
    for record in run.of("train"):
        seconds += _finite(record.get("seconds/step"))
        at[record["step"]] = (float(record.get("total_tokens", 0)), seconds / 60)
    xs, ys = [], []
    for place in _places(run, kind, column):
        if place.step not in at and over in ("tokens", "minutes"):
            continue
        done = at.get(place.step, (0.0, 0.0))
        x = {
            "step": float(place.step),
            "tokens": done[0],
            "flops": place.step * (run.flops_per_step or 0.0),
            "minutes": done[1],
        }[over]
        xs.append(x)
        ys.append(place.value)
    return xs, ys


def _places(run: RunFiles, kind: str, column: str) -> list[Place]:
    return [
        Place(float(record[column]), int(record["step"]), float(record["unix_seconds"]))
        for record in run.of(kind)
        if isinstance(record.get(column), (int, float)) and math.isfinite(record[column])
    ]


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
