"""`minilm settings`: every setting of a training run, with its type, default and meaning."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "settings", help="list all settings of a training run", description=__doc__
    )
    parser.add_argument(
        "--model", default="original", help="list the settings of this model (default: original)"
    )
    parser.set_defaults(run=lambda arguments: print_settings(arguments))


def print_settings(arguments: argparse.Namespace | None = None) -> None:
    """One table per section on stdout. Raises ConfigError for an unknown model."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from minilm import models
    from minilm.config import describe
    from minilm.run import RunConfig

    console = Console()
    model = getattr(arguments, "model", "original")
    classes = typing.get_type_hints(RunConfig) | {"model": models.config_class(model)}
    for field in dataclasses.fields(RunConfig):
        table = Table(title=field.name, title_justify="left", box=None, pad_edge=False, expand=True)
        table.add_column("setting", no_wrap=True, min_width=32)
        table.add_column("default", min_width=8, max_width=14, overflow="fold")
        table.add_column("meaning", ratio=1)
        for name, kind, default, text in describe(classes[field.name], field.name):
            choices = f" ({kind})" if " | " in kind and not kind.endswith("none") else ""
            table.add_row(escape(f"--{name}"), escape(default), escape(text + choices))
        console.print(table)
        console.print()
    console.print(
        f"model.size: one of {', '.join(models.sizes(model))}; stands for the settings of that size."
    )
