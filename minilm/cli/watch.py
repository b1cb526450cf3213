"""`minilm watch`: runs as they go, in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Watch runs in the terminal: progress, losses, speed, memory, the doctor's looks, events, the last sample.

  minilm watch runs/first              one run, redrawn until it ends
  minilm watch runs/sweep_lr           all runs of a folder, a line each, also those that begin later
  minilm watch runs/first --once       one picture, and the end

Reads the files of the run and touches nothing, so it may be started and left at any time, also over ssh. A run that
has not begun is waited for. It ends when every run that was named has ended; Ctrl-C leaves it earlier.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "watch",
        help="watch runs in the terminal",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of runs")
    sub.add_argument("--once", action="store_true", help="one picture, and end; so it is without a terminal")
    sub.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between pictures; default 2"
    )
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for folders that cannot be runs. Ctrl-C ends it with 130, without a word."""
    from rich.console import Console

    from minilm.errors import ConfigError, listed

    wrong = [problem for folder in arguments.folders for problem in _problems(folder)]
    if not 0.1 <= arguments.every <= 3600:
        wrong.append(f"--every {arguments.every:g}: give 0.1 to 3600 seconds.")
    if wrong:
        raise ConfigError(listed(wrong))
    console, shown = Console(highlight=False), _Shown(arguments.folders)
    if arguments.once or not console.is_terminal:
        shown.refresh()
        _print(console, shown.runs)
        return 0
    return _live(console, shown, arguments.every)


class _Shown:
    """The runs that are shown: those that were named, and those that are in folders that were named."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self._known: dict[Path, Any] = {}
        self.runs: list[Any] = []

    def refresh(self) -> None:
        from minilm.experiments.watching import Watched

        places = [place for folder in self._folders for place in _places(folder)]
        for place in places:
            self._known.setdefault(place, Watched(place)).refresh()
        # Those that go on stand first: a screen has fewer lines than a large sweep has runs.
        self.runs = sorted(
            (self._known[place] for place in dict.fromkeys(places)), key=lambda run: run.has_ended
        )

    def has_ended(self) -> bool:
        """Never for a folder of runs, in which another one may begin."""
        return self.runs == [run for run in self.runs if run.has_ended and run.folder in self._folders]


def _places(folder: Path) -> list[Path]:
    from minilm.experiments.listing import find_runs

    if (folder / "manifest.json").exists() or not folder.is_dir():
        return [folder]
    return list(find_runs(folder)) or [folder]


def _problems(folder: Path) -> Iterator[str]:
    """What can never become a run: a file, a place without a parent folder."""
    if folder.is_file():
        yield f"{folder} is a file: name the run folder."
    elif not folder.exists() and not folder.absolute().parent.is_dir():
        yield f"There is no folder {folder}, nor the one that it would be in."


def _live(console: Any, shown: _Shown, every: float) -> int:
    from rich.live import Live

    # The last picture stays on the screen: the other one, of full-screen programs, is gone when they end.
    code = 0
    try:
        with _ended_by_signals(), Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                shown.refresh()
                live.update(_drawn(console, shown.runs), refresh=True)
                if shown.has_ended():
                    break
                time.sleep(every)
    except KeyboardInterrupt:
        code = 130
    _print(console, shown.runs)
    return code


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a lost connection end it as Ctrl-C does, so that the terminal is given back as it was."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _drawn(console: Any, runs: list[Any], height: int | None = None) -> Any:
    from rich.console import Group

    from minilm.experiments.watching import overview, picture

    plain = console.options.ascii_only
    if len(runs) > 1:
        return overview(runs, width=console.width, plain=plain)
    lines = picture(runs[0], width=console.width, height=height or console.height, plain=plain)
    for line in lines:  # a terminal that knows fewer characters shows ? for the others
        line.plain = line.plain.encode(console.encoding, errors="replace").decode(console.encoding)
    return Group(*lines)


def _print(console: Any, runs: list[Any]) -> None:
    height = console.height - 1 if console.is_terminal else 30  # the prompt takes a line
    console.print(_drawn(console, runs, height), crop=True)
