"""Reads a run's metrics.jsonl while the run writes it, and keeps what one picture of the run needs.

The file grows by whole lines, each in one write; a resume or a rollback puts another file in its place, and a start
that failed removes it. Only what is new is read. What is kept does not grow with the run: the curve is thinned.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from minilm.track.metrics import FILE as METRICS
from minilm.track.metrics import KINDS

_BLOCK_BYTES = 1 << 20
_MARK_BYTES = 256  # of the end of what was read: another file has other bytes there
_RATE_STEPS = 50  # time left is estimated over this many steps, as in the progress line of the run itself
_SMOOTHING = 0.98  # the weight of the past: an average over about 50 steps
_MOST_POINTS = 1024
_MOST_EVENTS = 20


class Curve:
    """Points of a curve, at most `most`: when they are too many, two neighbours become one."""

    def __init__(self, most: int = _MOST_POINTS) -> None:
        self._most, self._group = most, 1
        self._points: list[tuple[float, float, int]] = []  # sums of x and y, and of how many

    def add(self, x: float, y: float) -> None:
        if self._points and self._points[-1][2] < self._group:
            before_x, before_y, number = self._points[-1]
            self._points[-1] = before_x + x, before_y + y, number + 1
        else:
            self._points.append((x, y, 1))
        if len(self._points) > self._most:
            pairs = zip(self._points[::2], [*self._points[1::2], (0.0, 0.0, 0)], strict=False)
            self._points = [(a[0] + b[0], a[1] + b[1], a[2] + b[2]) for a, b in pairs]
            self._group *= 2

    def points(self) -> list[tuple[float, float]]:
        """(x, y), each the middle of its group."""
        return [(x / number, y / number) for x, y, number in self._points]


@dataclass
class Told:
    """What the lines read so far say. Records are as in metrics.jsonl, values that were not finite put back.

    smoothed    running average of the loss, over steps whose loss was finite; nats per token
    best        validation record with the lowest loss
    alarms      events that report a failed check or a value that was not finite
    """

    train: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    sample: dict[str, Any] | None = None
    doctor: dict[str, Any] | None = None
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MOST_EVENTS))
    alarms: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MOST_EVENTS))
    curve: Curve = field(default_factory=Curve)
    num_not_finite: int = 0
    num_damaged: int = 0  # lines that are no records
    smoothed: float | None = None
    _weight: float = 0.0
    _times: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RATE_STEPS + 1))

    def take(self, line: bytes) -> None:
        """One line of the file, without its line feed."""
        try:
            record = json.loads(line)
            known = record["kind"] in KINDS and isinstance(record["step"], int)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            self.num_damaged += 1
            return
        for name, text in (record.get("nonfinite") or {}).items():
            record[name] = float(text)
        getattr(self, f"_take_{record['kind']}")(record)

    def seconds_left(self, steps: int | None) -> float | None:
        """Until `steps` steps are done, at the pace of the last ones, saves and validations included."""
        if steps is None or len(self._times) < 2:
            return None
        (first, since), (last, until) = self._times[0], self._times[-1]
        return (until - since) / (last - first) * max(steps - last, 0) if last > first else None

    def _take_train(self, record: dict[str, Any]) -> None:
        self.train = record
        if isinstance(record.get("unix_seconds"), (int, float)):
            if self._times and record["step"] <= self._times[-1][0]:
                self._times.clear()
            self._times.append((record["step"], record["unix_seconds"]))
        value = number(record, "loss")
        self.num_not_finite += bool(record.get("nonfinite"))
        if value is None or not math.isfinite(value):
            return
        # An average that begins with its first value would be held near it: divided by the weights so far it is not.
        self._weight = _SMOOTHING * self._weight + 1 - _SMOOTHING
        before = 0.0 if self.smoothed is None else self.smoothed
        self.smoothed = before + (1 - _SMOOTHING) / self._weight * (value - before)
        self.curve.add(record["step"], value)

    def _take_validation(self, record: dict[str, Any]) -> None:
        self.validation = record
        value, best = number(record, "loss"), number(self.best or {}, "loss")
        if value is not None and math.isfinite(value) and (best is None or value < best):
            self.best = record

    def _take_sample(self, record: dict[str, Any]) -> None:
        self.sample = record

    def _take_doctor(self, record: dict[str, Any]) -> None:
        self.doctor = record

    def _take_event(self, record: dict[str, Any]) -> None:
        text = str(record.get("text", ""))
        if text != "run":  # the first line of every file
            self.events.append(record)
        if " FAIL " in text:
            self.alarms.append(record)


class Follower:
    """`poll()` reads what is new; `told` holds it. The file may be missing, growing, or replaced by another."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / METRICS
        self.told = Told()
        self._identity: tuple[int, int] | None = None
        self._done = 0  # bytes of whole lines that were read
        self._mark = b""

    def poll(self) -> bool:
        """Returns whether something changed. Raises OSError where the file is there and cannot be read."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            changed = self._identity is not None
            self._begin(None)
            return changed
        with file:
            changed = self._same_file(file)
            return self._read(file) or changed

    def _same_file(self, file: BinaryIO) -> bool:
        """Begin again where it is another file, or another content; returns whether it is."""
        found = os.fstat(file.fileno())
        identity = found.st_dev, found.st_ino
        file.seek(self._done - len(self._mark))
        same = identity == self._identity and file.read(len(self._mark)) == self._mark
        if not same:
            self._begin(identity)
        return not same

    def _begin(self, identity: tuple[int, int] | None) -> None:
        self.told, self._identity, self._done, self._mark = Told(), identity, 0, b""

    def _read(self, file: BinaryIO) -> bool:
        file.seek(self._done)
        rest, before = b"", self._done
        while block := file.read(_BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                self.told.take(line)
                self._done += len(line) + 1
                self._mark = (self._mark + line + b"\n")[-_MARK_BYTES:]
        return self._done > before  # half a line is read again, with its other half


def number(record: dict[str, Any], name: str) -> float | None:
    """A value as a float; None where it is missing or is none."""
    value = record.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
