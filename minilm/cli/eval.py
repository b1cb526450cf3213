"""`minilm eval`, and eval.py of a checkout: the command that scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minilm import cli
from minilm.cli.model_flags import PLACE, add_checkpoint, add_store

DESCRIPTION = """\
Score a checkpoint: loss, perplexity, bits per byte, accuracy, continuations by prompt length, samples, tasks.

    python eval.py --checkpoint runs/first
    python eval.py --checkpoint runs/first --data held_out.jsonl --json scores.json --html scores.html
    python eval.py --checkpoint a_hugging_face_folder --data texts/ --overlap-with data/corpus
    accelerate launch --num_processes 2 eval.py --checkpoint runs/first

`minilm eval` is the same where there is no checkout; on several processes `accelerate launch -m minilm eval`.

Without --data the store that the run was trained on is used. Rows of a store are scored exactly as training
validates on them; texts of a file as whole documents, longer ones in rolling windows. The numbers do not
depend on the number of processes or on --batch-rows. See docs/evaluation.md.

Exit codes: 0 done, 1 a check found something, 2 wrong usage or a part that failed, 130 interrupted. What was
computed before is printed and written all the same.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "eval",
        help="score a checkpoint",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    _all_flags(sub)
    sub.set_defaults(run=run)


def main(argv: list[str]) -> int:
    """eval.py: parse, score, return the exit code."""
    parser = cli.parser(DESCRIPTION, prog="eval.py")
    _all_flags(parser)
    arguments = parser.parse_args(argv)
    return cli.guarded(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    """Score as asked. Raises the errors of `assessment.run`."""
    from minilm.assessment import run

    return run(arguments, parts())


def parts() -> list[Any]:
    """The modules that answer further questions, in the order of the report; see minilm/evaluation/material.py."""
    from minilm import agreement
    from minilm.evaluation import free_running, tasks

    return [agreement, free_running, tasks]


def _all_flags(parser: argparse.ArgumentParser) -> None:
    _add_flags(parser)
    for part in parts():
        part.add_flags(parser)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser, f"{PLACE}, or a Hugging Face folder")
    add_store(parser)
    add = parser.add_argument
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the code of a Hugging Face folder that has its own",
    )
    add(
        "--data",
        nargs="+",
        metavar="PLACE",
        help="a store, or texts as `minilm data build` reads them (jsonl, txt, folder); several files are also scored "
        "apart",
    )
    add("--split", default="validation", help="split of a store (default: validation)")
    add(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens of context (default: the run's, or the model's)",
    )
    add(
        "--overlap-with",
        metavar="STORE",
        help="score documents that share 13 words in a row with its training documents apart",
    )
    add(
        "--prompt-lengths",
        type=_lengths,
        metavar="16,64,128",
        help="prompts, in tokens, to score continuations of",
    )
    add(
        "--continuation-tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens of a continuation (default: 64)",
    )
    add(
        "--continuation-documents",
        type=int,
        default=512,
        metavar="N",
        help="documents for this (default: 512)",
    )
    add("--samples", type=int, default=3, metavar="N", help="samples to show (default: 3)")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--html", type=Path, metavar="FILE", help="write a page there, without scripts")
    add("--per-document", action="store_true", help="the scores of each document, in the JSON file")
    add("--batch-rows", type=int, metavar="N", help="rows computed together; changes speed, not numbers")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the computation (default: fp32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    add("--on-bad-line", choices=("error", "skip"), default="error", help="of a text file (default: error)")


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 16,64,128") from error
