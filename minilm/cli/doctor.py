"""`minilm doctor`: examine a model, its data, training step, checkpoint and generation for silent bugs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from minilm.errors import ConfigError

DESCRIPTION = """\
Examine TARGET for bugs that raise no error. Every check says PASS, FAIL or NOT RUN with what it measured.

TARGET is a run folder or a checkpoint; a settings file (fresh weights, as the run would start); a Hugging Face
folder; hf:FAMILY (a tiny random model of a family that transformers knows); or path/file.py:factory (a function
without arguments that returns a minilm.Subject, a torch module, or a function from tokens to logits).

  minilm doctor runs/first
  minilm doctor run_file/quickstart_cpu.yaml --suite quick
  minilm doctor hf:llama --only causality,cache_parity
  minilm doctor my_model.py:make --html report.html
  minilm doctor --prove                 plant every known bug and see it found
  minilm doctor --list                  all checks, with what they need

Exit code: 0 nothing found, 1 findings (or nothing could be checked), 2 wrong usage.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "doctor",
        help="examine a model, its data and its training for silent bugs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("target", nargs="?", metavar="TARGET", help="what to examine")
    sub.add_argument("--data", metavar="STORE", help="a store, in place of the one that the run names")
    sub.add_argument(
        "--store",
        metavar="DIR",
        help="a knowledge store, in place of the one that a checkpoint was trained with",
    )
    sub.add_argument("--suite", choices=("quick", "full"), default="full", help="default: full")
    sub.add_argument("--only", metavar="A,B", default="", help="checks or groups, by name")
    sub.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code in a Hugging Face folder whose model comes with its own",
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    other = sub.add_mutually_exclusive_group()
    other.add_argument("--prove", action="store_true", help="plant every known bug and see it found")
    other.add_argument("--list", action="store_true", help="list the checks")
    other.add_argument(
        "--survey",
        action="store_true",
        help="examine a tiny random model of every causal LM family of the installed transformers",
    )
    other.add_argument("--pages", type=Path, metavar="DIR", help="write a page for each check")
    sub.add_argument(
        "--matrix", type=Path, metavar="FILE", help="with --prove, --survey: write the table as Markdown"
    )
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for; returns 0 or 1. Raises ConfigError and what reading a target raises."""
    _refuse_contradictions(arguments)
    only = [name for name in arguments.only.split(",") if name]
    if arguments.list:
        return _list(arguments.suite, only)
    if arguments.pages:
        from minilm.doctor.pages import write_pages
        from minilm.examination import chosen_checks

        write_pages(chosen_checks("full", ()), arguments.pages)
        return 0
    if arguments.prove or arguments.survey:
        from minilm.doctor.matrix import prove_all
        from minilm.doctor.survey import survey_all
        from minilm.examination import chosen_checks

        do = prove_all if arguments.prove else survey_all
        return do(chosen_checks(arguments.suite, only), json_file=arguments.json, page=arguments.matrix)
    return _examine(arguments, only)


def _examine(arguments: argparse.Namespace, only: list[str]) -> int:
    from rich.console import Console

    from minilm.doctor.report import print_examination
    from minilm.examination import chosen_checks, examine

    total, seen = len(chosen_checks(arguments.suite, only)), 0
    shown = sys.stderr.isatty()

    def progress(finding: Any) -> None:
        nonlocal seen
        seen += 1
        if shown:
            print(
                f"\r\x1b[K{seen}/{total} {finding.check} {finding.status}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    examination = examine(
        arguments.target,
        data=arguments.data,
        suite=arguments.suite,
        only=only,
        watch=progress,
        trust_remote_code=arguments.trust_remote_code,
    )
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr)
    print_examination(examination, Console())
    if arguments.json:
        examination.write_json(arguments.json)
    if arguments.html:
        examination.write_html(arguments.html)
    return examination.exit_code


def _list(suite: str, only: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from minilm.examination import chosen_checks

    table = Table(box=None, pad_edge=False)
    for name in ("group", "check", "quick", "planted bugs", "needs"):
        table.add_column(name)
    for check in chosen_checks(suite, only):
        bugs = len({plant.bug for plant in check.plants})
        table.add_row(
            check.group, check.name, "yes" if check.quick else "", str(bugs), ", ".join(check.needs)
        )
    Console().print(table)
    return 0


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    special = next((n for n in ("prove", "list", "survey", "pages") if getattr(arguments, n)), None)
    problems = []
    if special is None and arguments.target is None:
        problems.append(
            "TARGET is missing: what should be examined? (`minilm doctor --help` lists the forms)"
        )
    if special is not None and arguments.target is not None:
        problems.append(f"--{special} takes no TARGET")
    if special is not None and (arguments.data or arguments.html or arguments.trust_remote_code):
        problems.append(f"--data, --html and --trust-remote-code are for a TARGET, not for --{special}")
    if arguments.matrix and special not in ("prove", "survey"):
        problems.append("--matrix goes with --prove or --survey")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
