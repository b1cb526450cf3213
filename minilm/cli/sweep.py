"""`minilm sweep`: many runs from one file, and one table of what came out."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Train every combination of some settings, with every seed, and show means and deviations over the seeds.

  minilm sweep run_file/sweep_lr.yaml --dry-run          the runs, and what would be done with each
  minilm sweep run_file/sweep_lr.yaml --jobs 2           two at a time, each on a GPU of its own where there are GPUs
  minilm sweep run_file/sweep_lr.yaml --table            the table of what is there by now
  minilm sweep FILE --launch '--config_file run_file/accelerate/zero2.yaml' --gpus 4

Started again, it skips what is finished and goes on with what was stopped. Ctrl-C lets every run save first. Exit code:
0 when every run is finished, 1 when some are not, 130 after Ctrl-C.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "sweep",
        help="train many settings and seeds, and compare them",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("file", type=Path, metavar="FILE", help="YAML: config, folder, seeds, set, grid or list")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; default 1")
    sub.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of a run; default 1")
    sub.add_argument("--launch", metavar="ARGS", help="start each run by `accelerate launch ARGS`")
    sub.add_argument("--stop-on-failure", action="store_true", help="start no more runs after one has failed")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list the runs, and stop")
    what.add_argument("--table", action="store_true", help="show and write the table, and stop")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError with every problem of the file and its runs, before anything starts."""
    from minilm.errors import ConfigError, listed
    from minilm.sweeping.definition import read
    from minilm.sweeping.progress import standings, strangers
    from minilm.sweeping.running import Runner, devices_of, train_command

    counts = {"--jobs": arguments.jobs, "--gpus": arguments.gpus}
    if wrong := [f"{flag} {number}: give 1 or more." for flag, number in counts.items() if number < 1]:
        raise ConfigError(listed(wrong))
    sweep = read(arguments.file)
    found = standings(sweep)
    for name in strangers(sweep):
        print(f"note: {sweep.folder / name} is not of this sweep", file=sys.stderr)
    if arguments.dry_run:
        return _list(sweep, found)
    if arguments.table:
        return _table(sweep)
    devices = devices_of(arguments.jobs, arguments.gpus)
    if devices == []:
        raise ConfigError(f"--gpus {arguments.gpus}: fewer are visible. Give a smaller number.")
    if devices is not None and len(devices) < arguments.jobs:
        print(f"note: {len(devices)} at a time: no GPU is given twice", file=sys.stderr)
    due = [one.run for one in found if one.is_due]
    print(
        f"{len(found)} runs, {len(found) - len(due)} of them finished or running elsewhere", file=sys.stderr
    )
    runner = Runner(
        sweep,
        jobs=arguments.jobs if devices is None else len(devices),
        devices=devices,
        stop_on_failure=arguments.stop_on_failure,
        say=functools.partial(print, file=sys.stderr, flush=True),
        command=functools.partial(train_command, launch=arguments.launch),
    )
    asked = runner.run(due)
    if asked is not None:
        print(f"\nstopped; go on with: {_again(arguments)}", file=sys.stderr)
        return 128 + asked
    return _table(sweep)


def _again(arguments: argparse.Namespace) -> str:
    import shlex

    words = ["minilm", "sweep", str(arguments.file)]
    words += [f"--jobs={arguments.jobs}"] if arguments.jobs > 1 else []
    words += [f"--gpus={arguments.gpus}"] if arguments.gpus > 1 else []
    words += ["--launch", arguments.launch] if arguments.launch else []
    return shlex.join(words)


def _list(sweep: Any, found: Any) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from minilm.sweeping.progress import WORDS

    table = Table(box=None, pad_edge=False)
    for name in ("run", "seed", "is", "would", "settings"):
        table.add_column(name, no_wrap=True)
    for one in found:
        settings = " ".join(flag for flag in one.run.flags if not flag.startswith("--run."))
        row = (one.run.name, str(one.run.seed), one.state, WORDS[one.state], settings)
        table.add_row(*map(Text, row))
    Console(width=1000).print(table, crop=False)
    print(f"{len(found)} runs in {sweep.folder}, base settings {sweep.config or 'the defaults'}")
    return 0


def _table(sweep: Any) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from minilm.experiments.markdown import visible
    from minilm.sweeping.progress import standing
    from minilm.sweeping.table import cells, table, write

    found = [standing(run) for run in sweep.runs]
    told = table(sweep, found)
    head, rows = cells(told)
    shown = Table(box=None, pad_edge=False)
    for name in head:
        shown.add_column(Text(name), no_wrap=True)
    for row in rows:
        shown.add_row(*(Text(visible(text)) for text in row))
    console = Console(width=1000)
    console.print(shown, crop=False)
    for note in told["notes"]:
        console.print(Text(note, style="dim"))
    for path in write(sweep, told):
        print(f"wrote {path}")
    return int(any(one.state != "finished" for one in found))
