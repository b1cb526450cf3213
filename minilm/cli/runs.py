"""`minilm runs`: the runs of a folder, how each stands and why."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
List runs with their state, step, loss, speed and the time since their last line.

  minilm runs                  those below runs/
  minilm runs runs/sweep --json

States: running, finished, interrupted (by a signal; go on with --resume), failed (with an error), died (its process is
gone and it never said why), damaged (its files cannot be read).
"""
_STYLES = {"running": "green", "interrupted": "yellow", "failed": "red", "died": "red", "damaged": "bold red"}


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "runs",
        help="list runs and how each stands",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs"
    )
    sub.add_argument("--json", action="store_true", help="as JSON on stdout")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError where there is no such folder."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from minilm.errors import ConfigError
    from minilm.experiments.listing import list_runs
    from minilm.experiments.markdown import number, visible

    if not arguments.folder.is_dir():
        raise ConfigError(f"There is no folder {arguments.folder}. Name the one that holds your runs.")
    rows = list_runs(arguments.folder)
    if arguments.json:
        print(json.dumps([row.as_dict() for row in rows], indent=1, ensure_ascii=False, allow_nan=False))
        return 0
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "step", "loss", "validation", "tokens/s", "age"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right", no_wrap=True)
    if explained := any(row.why for row in rows):
        table.add_column("why", overflow="fold")
    for row in rows:
        steps = "-" if row.step is None else f"{row.step:,}" + (f"/{row.steps:,}" if row.steps else "")
        cells = (
            number(row.loss),
            number(row.validation_loss),
            number(row.tokens_per_second, 0),
            _age(row.age_seconds),
        )
        name = Path(row.folder).relative_to(arguments.folder).as_posix()
        state = Text(row.state, style=_STYLES.get(row.state, ""))
        table.add_row(
            Text(visible(name)), state, steps, *cells, *([Text(visible(row.why))] if explained else [])
        )
    # As wide as it is, whatever the terminal: a number that is cut off reads as another number.
    Console(width=None if Console().is_terminal and explained else 200).print(
        table if rows else f"There is no run in {arguments.folder}."
    )
    return 0


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
