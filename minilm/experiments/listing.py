"""The runs of a folder and how each stands: running, finished, interrupted, failed or died, and why.

A run that does not say that it ended is looked at more closely: does somebody hold its lock, does its process live,
when was the last line written? A damaged folder becomes a row that says so, and stops nothing.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minilm import manifest, processes
from minilm.errors import CheckpointError
from minilm.track.metrics import FILE as METRICS

LOCK = ".lock"
SILENT_SECONDS = 600.0  # a run of another machine that has been silent for so long is suspicious, no more
_TAIL_BYTES = 262_144
_DEPTH = 3


@dataclass(frozen=True)
class Row:
    """One run. `why` says what the state was read from where the run itself does not; numbers are None where unknown.

    loss             of the last training step in the log; nats per token
    age_seconds      since the last line of the log
    """

    folder: str
    state: str
    why: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    age_seconds: float | None = None
    started: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a loss that is not finite is written as text."""
        return {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()
        }


def list_runs(folder: Path, *, now: float | None = None) -> list[Row]:
    """The runs below a folder, those that were written to last first."""
    now = time.time() if now is None else now
    rows = [look(place, now=now) for place in find_runs(folder)]
    return sorted(rows, key=lambda row: math.inf if row.age_seconds is None else row.age_seconds)


def find_runs(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Folders with a manifest or metrics of a run; what lies within a run is not looked at."""
    if (folder / METRICS).exists() or (folder / "checkpoints").is_dir():
        yield folder
        return
    try:
        inside = sorted(place for place in folder.iterdir() if place.is_dir() and not place.is_symlink())
    except OSError:  # not ours to read: no run that could be told of
        return
    for place in inside if depth else ():
        yield from find_runs(place, depth - 1)


def look(folder: Path, *, now: float) -> Row:
    """How one run stands. Raises nothing for a damaged run: its state is then "damaged", and `why` says what is."""
    try:
        record = manifest.Manifest.read(folder).record
        last, problem = _last_lines(folder / METRICS)
        state, why = _state(folder, record, last, now)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
        return Row(str(folder), "damaged", " ".join(str(error).split()) or type(error).__name__)
    train, validation = last.get("train", {}), last.get("validation", {})
    lines = [line["unix_seconds"] for line in last.values() if isinstance(line.get("unix_seconds"), float)]
    return Row(
        folder=str(folder),
        state=state,
        why="; ".join(text for text in (why, problem) if text),
        step=train.get("step", record.get("step")),
        steps=_planned(record, train),
        loss=_number(train, "loss"),
        validation_loss=_number(validation, "loss"),
        tokens_per_second=_number(train, "tokens_per_second"),
        age_seconds=max(0.0, now - max(lines)) if lines else None,
        started=record.get("started"),
    )


def _state(folder: Path, record: dict[str, Any], last: dict[str, Any], now: float) -> tuple[str, str]:
    state = str(record["state"])
    if state != "running":
        return state, str(record.get("error") or "")
    process = record["resumes"][-1]["process"] if record.get("resumes") else record["process"]
    if (
        process["number"] == os.getpid()
    ):  # closing a file gives up this process's own lock on it: leave it alone
        return "running", ""
    if _locked(folder / LOCK):
        return "running", ""
    if not processes.lives(process):
        ended = "its process is gone and no end was written: killed, out of memory, or the machine stopped"
        return "died", ended + _last_event(last)
    here = processes.describe()
    if process["host"] != here["host"] or process["namespace"] != here["namespace"]:
        lines = [line["unix_seconds"] for line in last.values() if "unix_seconds" in line]
        silent = now - max(lines, default=now)
        told = f"on {process['host']}, which cannot be seen from here"
        return "running", told + (
            f"; silent for {silent / 60:.0f} minutes" if silent > SILENT_SECONDS else ""
        )
    return "running", ""


def _locked(path: Path) -> bool:
    """Does another process of this machine hold the run's lock? It is asked for, never taken: a run may start now."""
    question = struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0)  # struct flock of Linux: the whole file
    try:
        with path.open("rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError:  # no lock, or not ours to open: the process decides
        return False
    return int(struct.unpack("hhqqi", answer)[0]) != fcntl.F_UNLCK


def _last_event(last: dict[str, Any]) -> str:
    text = last.get("event", {}).get("text")
    return f"; the last event: {text}" if text and text != "run" else ""


def _last_lines(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """({kind: its last record}, what is wrong): the end of the file only, so that long runs are listed as fast."""
    if not path.is_file():
        return {}, "no metrics"
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        data = file.read()
    lines = data.split(b"\n")
    whole = lines[:-1] if size <= _TAIL_BYTES else lines[1:-1]
    found: dict[str, dict[str, Any]] = {}
    damaged = 0
    for line in reversed(whole):
        try:
            record = json.loads(line)
            found.setdefault(str(record["kind"]), record)
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return found, f"{damaged} lines of {METRICS} are damaged" if damaged else ""


def _planned(record: dict[str, Any], train: dict[str, Any]) -> int | None:
    """Steps in all: as the settings say, or from the share of the planned tokens."""
    steps = (record.get("config") or {}).get("train.steps")
    if steps:
        return int(steps)
    share = train.get("tokens_share")
    return round(train["step"] / share) if share else None


def _number(record: dict[str, Any], name: str) -> float | None:
    text = (record.get("nonfinite") or {}).get(name)
    if text is not None:
        return float(text)
    value = record.get(name)
    return float(value) if isinstance(value, (int, float)) else None
