"""`minilm train`, and train.py of a checkout: the command that trains."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minilm import cli

DESCRIPTION = """\
Train a language model.

    python train.py --config run_file/quickstart.yaml --optim.learning_rate=3e-4
    accelerate launch --config_file run_file/accelerate/zero2.yaml train.py --config FILE --section.key=value
    python train.py --config FILE --resume
    python train.py --config FILE --run.name=second --init-from runs/first
    python train.py --config FILE --dry-run
    python train.py --config FILE --profile 10:13

`minilm train` is the same where there is no checkout; on several processes `accelerate launch -m minilm train`.
Settings come from defaults, then the file, then the flags. --help lists all of them.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand. What it does not know are settings of the run."""
    sub = subparsers.add_parser(
        "train",
        help="train a language model",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    sub.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    _flags(sub)
    sub.set_defaults(run=run, settings=[], show=sub.print_help)


def main(argv: list[str]) -> int:
    """train.py: parse, train, return the exit code."""
    parser = cli.parser(DESCRIPTION, prog="train.py", add_help=False)
    _flags(parser)
    parser.set_defaults(show=parser.print_help)
    arguments, arguments.settings = parser.parse_known_args(argv)
    return cli.guarded(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    """Train as asked; `arguments.settings` are words like --train.steps=50. Raises the errors of `launch.train`."""
    if arguments.help:
        from minilm.cli.settings import print_settings

        arguments.show()
        with cli.importing("torch"):
            print_settings()
        return 0
    with cli.importing("torch"):
        from minilm.launch import train
        from minilm.run import load_config

    settings = list(arguments.settings)
    if arguments.init_from is not None:
        settings.append(f"--train.init_from={arguments.init_from}")
    if arguments.check is not None:
        settings.append(f"--doctor.check={arguments.check}")
    return train(
        load_config(arguments.config, settings),
        resume=arguments.resume,
        dry_run=arguments.dry_run,
        profile=arguments.profile,
    )


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings, or a run folder")
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="begin with the weights of a run, a checkpoint or a Hugging Face folder (train.init_from)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be trained, with its memory, and stop"
    )
    parser.add_argument(
        "--profile", metavar="STEPS", help="write where the time and memory of these steps go (10:13 or 10)"
    )
    parser.add_argument(
        "--check",
        choices=("quick", "off"),
        help="the doctor's checks before the first step (doctor.check; default: quick)",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this page with all settings")
