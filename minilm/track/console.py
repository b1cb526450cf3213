"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere, and log.txt.

    step 1,200/5,000  loss 3.1416  lr 3.0e-04  grad 0.52  41.3k tok/s  0:12:31 left

The live line stands on stderr. Where stderr is not a terminal (a job log, a pipe), a plain line is written
every `log_every` steps instead, because a redrawn line would fill the file. log.txt in the run folder gets
the messages and the plain lines in both cases, with the time of day. No number is made here: `update` shows
values that were already written to metrics.jsonl.
"""

from __future__ import annotations

import datetime
import math
import time
from collections import deque
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

import rich.console
import rich.markup
import rich.progress
import rich.text

FILE = "log.txt"
_RATE_STEPS = 50  # time left is estimated over this many steps: long enough to be calm, short enough to adapt


class Console:
    """The progress of one run. `enabled=False` (ranks other than 0) shows and writes nothing.

    run_folder  where log.txt goes; None writes none
    log_every   steps between plain lines
    stream      for tests; default stderr
    """

    def __init__(
        self,
        run_folder: Path | None = None,
        *,
        log_every: int = 10,
        enabled: bool = True,
        stream: TextIO | None = None,
        live: bool | None = None,
    ) -> None:
        self.enabled = enabled
        self.log_every = log_every
        self._console = rich.console.Console(
            file=stream, stderr=stream is None, highlight=False, soft_wrap=True
        )
        self._live = self._console.is_terminal if live is None else live
        self._progress: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._total = 0
        self._times: deque[tuple[int, float]] = deque(maxlen=_RATE_STEPS + 1)
        self._shown_step = -1
        self._latest: tuple[int, Mapping[str, Any]] | None = None
        self._log: FileIO | None = None
        if enabled and run_folder is not None:
            run_folder.mkdir(parents=True, exist_ok=True)
            self._log = (run_folder / FILE).open("ab", buffering=0)

    def start(self, total_steps: int, initial: int = 0) -> None:
        """Show the line. `initial`: steps already done (a resumed run); time left counts the new ones alone."""
        self._total = total_steps
        self._times.clear()
        self._times.append((initial, time.monotonic()))
        if not (self.enabled and self._live):
            return
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("step {task.fields[position]}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.fields[stats]}"),
            console=self._console,
            transient=False,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=initial, position=self._position(initial), stats=""
        )
        self._progress.start()

    def update(self, step: int, stats: Mapping[str, Any]) -> None:
        """Show the values of a step: loss, learning_rate, gradient_norm, tokens_per_second where they exist."""
        if not self.enabled:
            return
        self._times.append((step, time.monotonic()))
        self._latest = step, stats
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task, completed=step, position=self._position(step), stats=self._described(step, stats)
            )
        if step % self.log_every == 0 or step == self._total or _not_finite(stats):
            self._plain(step, stats)

    def message(self, text: str) -> None:
        """A line above the progress line, and in log.txt."""
        if not self.enabled:
            return
        self._console.print(rich.text.Text(text))  # as Text: brackets in a path or a sample are not markup
        self._write(text)

    def close(self) -> None:
        """Leave the last state on the screen and close log.txt. May be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._latest is not None and self._latest[0] != self._shown_step:
            self._plain(*self._latest)
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _plain(self, step: int, stats: Mapping[str, Any]) -> None:
        self._shown_step = step
        line = f"step {self._position(step)}  {self._described(step, stats)}"
        if not self._live:
            self._console.print(rich.text.Text(line))
        self._write(line)

    def _write(self, text: str) -> None:
        if self._log is not None:
            now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            # One unbuffered write: a signal handler may call `message` while another line is being written.
            line = f"{now}  {text}\n".encode(errors="backslashreplace")
            try:
                self._log.write(line)
            except OSError as error:  # a full disk: metrics.jsonl decides whether the run can go on
                self._log.close()
                self._log = None
                self._console.print(rich.text.Text(f"{FILE} is no longer written: {error.strerror}"))

    def _position(self, step: int) -> str:
        return f"{step:,}/{self._total:,}"

    def _described(self, step: int, stats: Mapping[str, Any]) -> str:
        parts = []
        for name, template in _SHOWN.items():
            value = stats.get(name)
            if value is not None:
                parts.append(template.format(_short(value) if "tok/s" in template else float(value)))
        parts.append(f"{self._left(step)} left")
        return "  ".join(parts)

    def _left(self, step: int) -> str:
        first_step, first_time = self._times[0] if self._times else (step, 0.0)
        if step <= first_step:
            return "-:--:--"
        seconds = (self._times[-1][1] - first_time) / (step - first_step) * max(self._total - step, 0)
        return str(datetime.timedelta(seconds=round(seconds)))


_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.1e}",
    "gradient_norm": "grad {:.2f}",
    "tokens_per_second": "{} tok/s",
}


def _not_finite(stats: Mapping[str, Any]) -> bool:
    """Such a step is shown whatever the cadence."""
    return any(isinstance(value, float) and not math.isfinite(value) for value in stats.values())


def _short(number: float) -> str:
    """41,273 -> 41.3k"""
    number = float(number)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
