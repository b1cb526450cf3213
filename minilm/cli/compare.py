"""`minilm compare`: runs beside each other: what differs, curves, scores with intervals, speed, memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Compare runs. The first is the one that the others are held against.

  minilm compare runs/original runs/knowledge runs/no_ffn --out comparison
  minilm compare runs/a runs/b --html ab.html --json ab.json

Whether a difference is one is asked of the documents that both were evaluated on; each run needs
  python eval.py --checkpoint RUN --per-document --json RUN/eval.json
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "compare",
        help="compare runs",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="run folders, two or more")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write a page, complete in itself")
    sub.add_argument("--png", type=Path, metavar="FILE", help="write the curves as a picture")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    sub.add_argument("--out", type=Path, metavar="DIR", help="all three: DIR/comparison.html, .png, .json")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for wrong use, CheckpointError for a run that cannot be read."""
    from minilm.errors import ConfigError, listed
    from minilm.experiments.comparing import compare
    from minilm.experiments.page import page
    from minilm.experiments.picture import draw
    from minilm.experiments.runfiles import RunFiles
    from minilm.manifest import write_atomically

    places = {kind: getattr(arguments, kind) for kind in ("html", "png", "json")}
    if arguments.out is not None:
        places = {kind: place or arguments.out / f"comparison.{kind}" for kind, place in places.items()}
    given = [place for kind, place in places.items() if place and getattr(arguments, kind)]
    wrong = [
        f"There is no folder {p.absolute().parent} for {p}."
        for p in given
        if not p.absolute().parent.is_dir()
    ]
    if wrong:
        raise ConfigError(listed(wrong))
    runs = [RunFiles.read(folder) for folder in arguments.folders]
    told = compare(runs)
    _show(told)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    picture = draw(runs) if places["html"] or places["png"] else b""
    contents = {
        "html": page(told, picture).encode(),
        "png": picture,
        "json": (json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    for kind, place in places.items():
        if place is not None:
            write_atomically(place, contents[kind])
            print(f"wrote {place}")
    return 0


def _show(told: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from minilm.experiments import tables
    from minilm.experiments.markdown import visible

    console = Console(width=1000)  # a number that is cut off reads as another number
    for warning in told["warnings"]:
        console.print(Text(f"NOTE  {visible(warning)}", style="bold red"))
    for (head, rows), first in (
        (tables.differing(told), 99),
        (tables.results(told), 1),
        (tables.differences(told), 2),
    ):
        table = Table(box=None, pad_edge=False)
        for place, name in enumerate(head):
            table.add_column(Text(visible(name)), justify="right" if place >= first else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(visible(text)) for text in row))
        console.print(table, crop=False)
        console.print()
    console.print(Text(tables.NOTE, style="dim"))
