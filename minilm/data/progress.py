"""Progress of long work: a bar with rate and time left on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_LINE_EVERY_SECONDS = 20.0

Advance = Callable[[float, str], None]  # (amount done so far, a short note)


@contextlib.contextmanager
def progress(title: str, total: float, unit: str = "MB", scale: float = 1e6) -> Iterator[Advance]:
    """Yields `advance(done, note)`. `total` 0: unknown. Amounts are shown divided by `scale`, in `unit`.

    Nothing is printed by work that is done before the first line is due and is not watched on a terminal.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total or None, amount="", note="")
            began = time.monotonic()

            def advance(done: float, note: str = "") -> None:
                text = _amount(done, total, unit, scale, time.monotonic() - began)
                bar.update(task, completed=min(done, total) if total else done, amount=text, note=note)

            yield advance
        return

    began = last = time.monotonic()

    def line(done: float, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_SECONDS:
            last = now
            left = (
                f", {(now - began) * (total - done) / done:.0f} s left" if total and 0 < done <= total else ""
            )
            print(
                f"{title}: {_amount(done, total, unit, scale, now - began)}{left} {note}",
                file=sys.stderr,
                flush=True,
            )

    yield line


def _amount(done: float, total: float, unit: str, scale: float, seconds: float) -> str:
    of = f" of {total / scale:.1f}" if total else ""
    rate = f", {done / scale / seconds:.1f} {unit}/s" if seconds > 0.5 else ""
    return f"{done / scale:.1f}{of} {unit}{rate}"
