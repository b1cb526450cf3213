"""The SwanLab process: it follows metrics.jsonl and repeats it to SwanLab. Run as a script, never imported by a run.

    python -P mirror.py OPTIONS.json      started by `minilm.track.dashboard`

Why a process and not a call in the training loop: `swanlab.init` replaces `sys.excepthook` and the SIGINT
handler, registers an exit hook that waits for uploads, may wait for a network or ask questions on a terminal,
and its local board raises KeyboardInterrupt when someone presses "stop" there. Here it can do all that to
itself. Training writes a file and never waits; the file is the queue, so nothing is dropped when SwanLab is
slow, and a run that is resumed is mirrored from its first step (SwanLab drops repeated steps without a word,
so continuing an old curve could keep values of steps that were done again).

stdin   one JSON line {"state", "error", "size", "image"}: finish after `size` bytes of the file.
        End of file without it: the training process is gone.
stdout  JSON lines for the parent: {"ready": ...}, {"stalled": seconds}, {"done": ...}
Only the standard library and swanlab are imported: this file runs without minilm on its path.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import queue
import sqlite3
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

_POLL_SECONDS = 0.2
_ORPHAN_SECONDS = 60.0  # what SwanLab may still take once the training process is gone
# Groups of charts on the local board, in this order: with what the names of their columns begin.
SECTIONS = {
    "loss": ("train/loss", "train/auxiliary/"),
    "validation": ("validation/",),
    "samples": ("samples",),
    "optimizer": ("train/learning_rate", "train/muon_learning_rate", "train/gradient_norm", "train/norm"),
    "speed": ("train/tokens_per_second", "train/mfu", "train/seconds/"),
    "memory": ("train/memory/",),
    "doctor": ("doctor/", "train/nonfinite", "validation/nonfinite", "train/skipped", "train/rollbacks"),
    "model": ("",),
    "data": (
        "train/data/",
        "train/epoch",
        "validation/tokens",
        "train/step_tokens",
        "train/total_tokens",
        "train/tokens_share",
    ),
    "picture": ("curve",),
}


class Reports:
    """Messages to the parent, which may be gone or busy."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def send(self, **report: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more; what matters is in the file
            os.write(self._handle, json.dumps(report).encode() + b"\n")


class Clock:
    """Notices that the main thread has been inside SwanLab for long, and says so once per stay."""

    def __init__(self, reports: Reports, limit_seconds: float) -> None:
        self._reports, self._limit = reports, limit_seconds
        self._since: float | None = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def enter(self) -> None:
        self._since = time.monotonic()

    def leave(self) -> None:
        self._since = None

    def _watch(self) -> None:
        told: float | None = None
        while True:
            time.sleep(min(1.0, self._limit / 4))
            since = self._since
            if since is not None and since != told and time.monotonic() - since > self._limit:
                self._reports.send(stalled=round(time.monotonic() - since))
                told = since


def values_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl -> the numbers and texts for SwanLab, named kind/name.

    Values that are not finite are left out (SwanLab's board answers with an error page for the whole chart)
    and counted in kind/nonfinite.
    """
    kind = record["kind"]
    values = {
        f"{kind}/{name}": value
        for name, value in record.items()
        if name not in ("kind", "step", "unix_seconds")
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    }
    if record.get("nonfinite"):
        values[f"{kind}/nonfinite"] = len(record["nonfinite"])
    return values


class Run:
    """One SwanLab run. Counts what it sends, so that the local board can be read back."""

    def __init__(self, options: dict[str, Any], clock: Clock) -> None:
        self.options, self.clock = options, clock
        self.sent: Counter[str] = Counter()
        self.last: dict[str, float] = {}
        self.log_every = int(options["log_every"])
        self._waiting: dict[str, Any] | None = None  # the latest step that the cadence passed over
        clock.enter()
        import swanlab

        self._swanlab = swanlab
        if options["mode"] == "local":
            _number_columns_from_zero()
            _group_charts()
        self._run = swanlab.init(
            project=options["project"],
            name=options["name"],
            mode="online" if options["mode"] == "cloud" else options["mode"],
            log_dir=options["folder"],
            config=options["settings"],
            description=options["description"],
            group=options["group"] or None,
            tags=list(options["tags"]) or None,
            job_type="train",
        )
        clock.leave()
        self.folder = Path(self._run.dir)

    @property
    def url(self) -> str | None:
        return str(self._run.url) if self.options["mode"] == "cloud" else None

    def log(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        values: dict[str, Any] = {}
        if kind == "train":
            # A step that was not finite is shown whatever the cadence.
            shown = step % self.log_every == 0 or step == 1 or record.get("nonfinite")
            self._waiting = None if shown else record
            values = values_of(record) if shown else {}
        elif kind in ("validation", "doctor"):
            values = values_of(record)
        elif kind == "sample":
            texts = [
                # The board draws no table at all where a caption is missing.
                self._swanlab.Text(
                    _text(sample), caption=_clean(str(sample.get("prompt", "")))[:200] or "(start)"
                )
                for sample in record.get("samples", [])
            ]
            values = {"samples": texts} if texts else {}
        if values:
            self._count(values, step)

    def last_step(self) -> None:
        """Curves end where training ended."""
        if self._waiting is not None:
            self._count(values_of(self._waiting), self._waiting["step"])

    def _count(self, values: dict[str, Any], step: int) -> None:
        self._send(values, step)
        for name, value in values.items():
            self.sent[name] += 1
            if isinstance(value, (int, float)):
                self.last[name] = float(value)

    def image(self, path: str, step: int) -> None:
        if Path(path).is_file() and importlib.util.find_spec("PIL") is not None:
            self._send({"curve": self._swanlab.Image(path)}, step)
            self.sent["curve"] += 1

    def finish(self, state: str, error: str | None) -> None:
        self.clock.enter()
        self._swanlab.finish(state=state, error=error)
        self.clock.leave()

    def _send(self, values: dict[str, Any], step: int) -> None:
        self.clock.enter()
        self._swanlab.log(values, step=step)
        self.clock.leave()


def _number_columns_from_zero() -> None:
    """swanlab 0.10 numbers the folders of its local columns from 1, the board's tables read them from 0:
    every column would show its neighbour's values. `differences` checks the result in any version."""
    from swanlab.deprecated.local import LocalCallbacker

    original = LocalCallbacker.__init__

    def numbered_from_zero(self: Any) -> None:
        original(self)
        self._next_kid = 0

    LocalCallbacker.__init__ = numbered_from_zero


def section_of(name: str) -> str:
    """The group of a column: that of the longest beginning that fits."""
    fitting = [
        (len(start), section)
        for section, starts in SECTIONS.items()
        for start in starts
        if name.startswith(start)
    ]
    return max(fitting)[1]


def _group_charts() -> None:
    """swanlab 0.10 puts every chart of the local board into one group called default; the board itself knows groups."""
    from swanboard.db.models import Namespace, Project
    from swanlab.deprecated import local

    original = local.LocalCallbacker._create_column

    class Grouped(local._ColumnInfo):  # type: ignore[misc]
        def __init__(self, key: str, kid: str, chart_type: Any) -> None:
            super().__init__(key, kid, chart_type)
            self.section_name = section_of(key)

    def create_column(self: Any, record: Any, context: Any) -> None:
        if not self._created_columns:
            # The board shows groups in the order in which they were made, and none that is empty.
            places = ({"experiment_id": self.exp.id}, {"project_id": Project.DEFAULT_PROJECT_ID})
            for place, (rank, name) in itertools.product(places, enumerate(SECTIONS)):
                if not Namespace.filter(name=name, **place).exists():
                    Namespace.create(name=name, sort=rank, **place)
        original(self, record, context)

    local._ColumnInfo = Grouped
    local.LocalCallbacker._create_column = create_column


def differences(run: Run) -> list[str]:
    """Read the local board's files back: what it will show that is not what was sent."""
    problems = []
    database = sqlite3.connect(f"file:{run.folder.parent / 'runs.swanlab'}?mode=ro", uri=True, timeout=5)
    try:
        rows = database.execute(
            "select tag.name, tag.sort, tag.folder from tag join experiment on tag.experiment_id = experiment.id "
            "where experiment.run_id = ?",
            (run.folder.name,),
        ).fetchall()
    finally:
        database.close()
    found = {name: (str(sort), str(folder)) for name, sort, folder in rows}
    for name, count in run.sent.items():
        if name not in found:
            problems.append(f"{name} is missing")
            continue
        number, folder = found[name]
        if number != folder:
            problems.append(f"{name} is in folder {folder}, but the board's tables read folder {number}")
        lines, line = 0, b"null"
        for path in sorted((run.folder / "logs" / folder).glob("[0-9]*.log"), key=lambda p: int(p.stem)):
            with path.open("rb") as file:
                for line in file:  # noqa: B007 (the last one is looked at below)
                    lines += 1
        if lines != count:
            problems.append(f"{name} has {lines} of {count} values")
        elif name in run.last and json.loads(line)["data"] != run.last[name]:
            problems.append(f"{name} ends with {json.loads(line)['data']} instead of {run.last[name]}")
    return problems


def retire(options: dict[str, Any]) -> None:
    """Earlier mirrors of this run on the same local board: hidden, renamed, no longer "running"."""
    path = Path(options["folder"]) / "runs.swanlab"
    if options["mode"] != "local" or not options["earlier"] or not path.is_file():
        return
    database = sqlite3.connect(path, timeout=10)
    try:
        for run_id in options["earlier"]:
            database.execute(
                "update experiment set name = substr(name, 1, 60) || ' (superseded ' || id || ')', show = 0, "
                "status = case status when 0 then -1 else status end "
                "where run_id = ? and name not like '%(superseded %'",
                (run_id,),
            )
        database.commit()
    finally:
        database.close()


def follow(run: Run, file: BinaryIO, stop: queue.Queue[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """Send each whole line as it appears, until `stop` says how long the file is. Returns that and the last step."""
    end: dict[str, Any] | None = None
    rest, done, step = b"", 0, 0
    while True:
        if end is None and not stop.empty():
            end = stop.get()
        data = file.read(1 << 20)
        if data:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if end is None or done < end["size"]:
                    record = json.loads(line)
                    step = max(step, record["step"])
                    run.log(record)
                done += len(line) + 1
        elif end is not None:
            return end, step
        else:
            try:
                end = stop.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue


def listen(commands: int, stop: queue.Queue[dict[str, Any]], metrics: Path) -> None:
    """Wait for the parent's word; without a parent, finish with what is there, but not for ever."""
    with os.fdopen(commands, "rb") as file:
        line = file.readline()
        if line.endswith(b"\n"):
            stop.put(json.loads(line))
            file.read()  # returns when the parent is gone
        else:
            gone = {"state": "crashed", "error": "the training process ended without a word", "image": None}
            stop.put({**gone, "size": metrics.stat().st_size})
    time.sleep(_ORPHAN_SECONDS)
    os._exit(3)


def _text(sample: dict[str, Any]) -> str:
    return _clean(str(sample.get("text", json.dumps(sample, ensure_ascii=False))))


def _clean(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()  # SwanLab fails on halves of characters


def main(options_path: str) -> int:
    """Mirror the run of an options file (see dashboard.py) until its training says that it has ended."""
    options = json.loads(Path(options_path).read_text(encoding="utf-8"))
    # Keep the two pipes for ourselves: SwanLab may read stdin (a question) and write to stdout.
    commands, reports = os.dup(0), Reports(os.dup(1))
    with Path(os.devnull).open("rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)
    os.nice(5)  # training comes first
    metrics = Path(options["metrics"])
    stop: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=listen, args=(commands, stop, metrics), daemon=True).start()
    with metrics.open("rb") as file:
        clock = Clock(reports, float(options["stall_seconds"]))
        retire(options)
        run = Run(options, clock)
        reports.send(ready=True, run_id=run.folder.name, folder=str(run.folder), url=run.url)
        end, step = follow(run, file, stop)
    run.last_step()
    if end["image"]:
        run.image(end["image"], step)
    run.finish(end["state"], end["error"])
    problems = differences(run) if options["mode"] == "local" else []
    reports.send(done=True, values=sum(run.sent.values()), problems=problems[:20])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
