"""metrics.jsonl: one JSON object per line, the truth about a run. Everything else that is shown mirrors it.

    {"kind": "train", "step": 12, "unix_seconds": 1790000000.25, "loss": 4.125, "learning_rate": 0.0003, ...}

kind        "train" (every step), "validation", "sample", "doctor" (a look of the watch) or "event"
step        number of optimizer steps done when the line was written
nonfinite   only where a value was nan or infinite: {"gradient_norm": "inf"}. JSON has no such numbers, so the
            value itself is null; it is never left out, replaced or smoothed. `read_metrics` puts it back.

Floats are written with as many digits as Python needs to read the same float back. A line counts once its
line feed is there: a process that is killed can leave half a line at the end, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minilm.errors import CheckpointError

FILE = "metrics.jsonl"
SUPERSEDED = "metrics.superseded.jsonl"
KINDS = ("train", "validation", "sample", "event", "doctor")
_OURS = ("kind", "step", "unix_seconds", "nonfinite")


class MetricsFile:
    """Appends to RUN/metrics.jsonl, each line in one write; half a last line is set aside when it is opened.

    `last_step` holds the highest step of each kind that is in the file.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / FILE
        self.superseded = run_folder / SUPERSEDED
        run_folder.mkdir(parents=True, exist_ok=True)
        self._set_aside_half_a_line()
        self.last_step = _last_steps(read_metrics(self.path))
        self._file = self.path.open("ab", buffering=0)  # unbuffered: what was logged survives kill -9

    def append(self, kind: str, step: int, unix_seconds: float, values: Mapping[str, Any]) -> None:
        """Add one line. Scalars of numpy and torch become Python numbers, nested mappings "outer/inner".

        Raises CheckpointError when the disk refuses it (the file then ends with the line before).
        """
        line = encode(kind, step, unix_seconds, values)
        size = self.size
        try:
            written = self._file.write(line)
            if written != len(line):  # the disk filled up in the middle of a line
                raise OSError(28, os.strerror(28))
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            raise CheckpointError(
                f"{self.path}: step {step} could not be written ({error.strerror or error}). "
                "Free some space or choose another run folder; the lines before it are intact."
            ) from error
        self.last_step[kind] = max(step, self.last_step.get(kind, step))

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> None:
        """Return when the lines are on the disk, not only in the memory of the operating system."""
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int, into: Path | None = None) -> int:
        """Move the lines of later steps to metrics.superseded.jsonl, or to a file of their own; returns how many.

        A run that resumes from a checkpoint at `step`, or goes back to it, does these steps again. Killed at any
        moment, this leaves either the old file or the new one, and no line is lost.
        """
        kept: list[bytes] = []
        moved: list[bytes] = []
        for number, line in _lines(self.path):
            record = _decoded(self.path, number, line)
            (moved if record["step"] > step else kept).append(line + b"\n")
        if not moved:
            return 0
        # First the copy, then the replacement. If an earlier try was killed in between, the copy is there.
        text = b"".join(moved)
        if into is not None:
            into.unlink(missing_ok=True)  # of the same move, before a kill
            _append_safely(into, text)
        elif not (self.superseded.exists() and self.superseded.read_bytes().endswith(text)):
            _append_safely(self.superseded, text)
        new = self.path.with_suffix(".jsonl.new")
        with new.open("wb") as file:
            file.write(b"".join(kept))
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        new.replace(self.path)
        _sync_folder(self.path.parent)
        self._file = self.path.open("ab", buffering=0)
        self.last_step = _last_steps(read_metrics(self.path))
        return len(moved)

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _set_aside_half_a_line(self) -> None:
        self.path.touch()
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            rest = {"kind": "torn", "text": data[whole:].decode("utf-8", errors="backslashreplace")}
            _append_safely(self.superseded, json.dumps(rest).encode() + b"\n")
            os.truncate(self.path, whole)


def encode(kind: str, step: int, unix_seconds: float, values: Mapping[str, Any]) -> bytes:
    """One line of metrics.jsonl, with its line feed."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step is {step!r}; it must be an integer from 0.")
    nonfinite: dict[str, str] = {}
    record: dict[str, Any] = {"kind": kind, "step": step, "unix_seconds": unix_seconds}
    for name, value in flat(values):
        if name in _OURS:
            raise ValueError(f"a value may not be called {name!r}: that name is the file's own.")
        record[name] = _plain(value, name, nonfinite)
    if nonfinite:
        record["nonfinite"] = nonfinite
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    # Generated text can hold halves of characters (lone surrogates); backslashreplace writes them as \udc80,
    # which is what JSON calls them too.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a/b", 1). Used for metrics and for the settings that a dashboard shows."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def read_metrics(run_folder: Path | str, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run folder (or of a metrics.jsonl), in file order; of one kind where that is given.

    Values that were not finite are nan, inf or -inf again. Half a last line, as kill -9 leaves it, is passed
    over. Raises CheckpointError, with the line number, for anything else that is not a record.
    """
    path = Path(run_folder)
    path = path / FILE if path.is_dir() else path
    records = [_decoded(path, number, line) for number, line in _lines(path)]
    return records if kind is None else [record for record in records if record["kind"] == kind]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Is this a run folder?") from error
    # Split at line feeds alone: str.splitlines would also cut at the exotic separators of a generated text.
    yield from enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], 1)


def _decoded(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record: Any = json.loads(line)
    except ValueError as error:  # also UnicodeDecodeError
        raise CheckpointError(f"{path}, line {number}: not a JSON object ({error}). {_DAMAGED}") from error
    problem = None
    if not isinstance(record, dict):
        problem = f"is {type(record).__name__}, not an object"
    elif record.get("kind") not in KINDS:
        problem = f"has kind {record.get('kind')!r}"
    elif not isinstance(record.get("step"), int):
        problem = f"has step {record.get('step')!r}"
    if problem:
        raise CheckpointError(f"{path}, line {number}: {problem}. {_DAMAGED}")
    for name, text in record.get("nonfinite", {}).items():
        if name in record:
            record[name] = float(text)
    return dict(record)


_DAMAGED = "The file was changed or damaged after it was written: restore it, or start a new run."


def _last_steps(records: list[dict[str, Any]]) -> dict[str, int]:
    last: dict[str, int] = {}
    for record in records:
        last[record["kind"]] = max(record["step"], last.get(record["kind"], 0))
    return last


def _plain(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite[path] = str(float(value))  # nan, inf or -inf
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(v, f"{path}/{name}", nonfinite) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{path}/{number}", nonfinite) for number, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        return _plain(value.item(), path, nonfinite)
    raise TypeError(f"{path} is a {type(value).__name__}; metrics hold numbers, texts, lists and mappings.")


def _append_safely(path: Path, text: bytes) -> None:
    with path.open("ab") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
