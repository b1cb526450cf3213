"""`minilm record`: the program's parts of an experiment's record, written from the files of a run, or verified."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Write or refresh the program's parts of a record. What people wrote is left as it is.

  minilm record runs/first --out experiment/EXPERIMENT_1_5_0.md
  minilm record runs/second --baseline runs/first --out experiment/EXPERIMENT_1_5_1.md --keep experiment/runs
  minilm record --verify experiment/

Scores, samples with their truth and the agreement come from RUN/eval.json:
  python eval.py --checkpoint RUN --json RUN/eval.json

--verify computes every figure again from the run's files and names file, line, figure, the stated and the true value
of each that is not theirs. Exit code 0: all agree, 1: something does not, 2: wrong usage or nothing to verify.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "record",
        help="write or verify the record of an experiment",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("folder", nargs="?", type=Path, metavar="RUN", help="run folder")
    sub.add_argument("--baseline", type=Path, metavar="RUN", help="run that this one is held against")
    sub.add_argument(
        "--other", type=Path, action="append", default=[], metavar="RUN", help="further run of the comparison"
    )
    sub.add_argument("--out", type=Path, metavar="FILE", help="the record (default: experiment/NAME.md)")
    sub.add_argument("--lang", choices=("en", "zh"), help="language (default: of the record, else English)")
    sub.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="copy the run's small files to DIR/NAME and record the copy, for a repository",
    )
    sub.add_argument("--force", action="store_true", help="overwrite parts changed by hand; keeps a .bak")
    sub.add_argument(
        "--verify", type=Path, nargs="+", metavar="PLACE", help="records, or folders with records"
    )
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for wrong use and for parts changed by hand, CheckpointError for a run that cannot be read."""
    from minilm.errors import ConfigError

    if arguments.verify:
        if arguments.folder or arguments.out or arguments.baseline or arguments.keep or arguments.other:
            raise ConfigError(
                "--verify changes nothing and takes records only: leave RUN and the other flags out."
            )
        return _verify(arguments.verify)
    if arguments.folder is None:
        raise ConfigError(
            "Name a run folder to record, or records to verify: minilm record --verify experiment/"
        )
    return _write(arguments)


def _write(arguments: argparse.Namespace) -> int:
    from minilm.experiments import record

    main, baseline, others = arguments.folder, arguments.baseline, arguments.other
    if arguments.keep:
        main = record.keep(main, arguments.keep)
        baseline = record.keep(baseline, arguments.keep) if baseline else None
        others = [record.keep(other, arguments.keep) for other in others]
    end = ".zh.md" if arguments.lang == "zh" else ".md"
    out = arguments.out or Path("experiment") / f"{main.resolve().name}{end}"
    overwritten = record.write(
        main, out, baseline=baseline, others=others, language=arguments.lang, force=arguments.force
    )
    for text in overwritten:
        print(f"{text} Overwritten; the record before is {out}.bak")
    print(f"wrote {out}")
    return 0


def _verify(places: list[Path]) -> int:
    from minilm.experiments import record

    looked_at, problems = record.verify(places)
    for problem in problems:
        print(problem)
    said = (
        "every figure is that of the run's files"
        if not problems
        else f"{len(problems)} figures or places do not hold"
    )
    print(f"{len(looked_at)} records: {said}")
    return 1 if problems else 0
