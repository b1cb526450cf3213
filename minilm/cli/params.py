"""`minilm params`: how large a model is, what a token costs, and which of several models may be compared."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from minilm.errors import ConfigError

MATCHED = 0.02  # models within 2 % of each other count as equal in size

DESCRIPTION = """\
Parameters, arithmetic and memory of models, before anything is built.

MODEL is NAME:SIZE (original:26m), a folder or its model.json, or a YAML file with the fields of a model
(or a section `model`): name, size, and any field to change.

  minilm params original:26m
  minilm params original:26m original:100m --sequence-length 1024
  minilm params runs/first/checkpoint my.yaml

Arithmetic: 2 operations per weight of a matrix product and token, the output layer included, plus
attention over (length + 1) / 2 keys on average; training is three times the forward pass.
State: float32 weights, float32 gradients and two float32 moments of Adam, without activations.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "params",
        help="parameters, FLOPs per token and bytes of state of models",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("models", nargs="+", metavar="MODEL", help="NAME:SIZE, model folder, model.json or YAML")
    sub.add_argument(
        "--sequence-length",
        type=int,
        default=512,
        metavar="TOKENS",
        help="row length for FLOPs (default 512)",
    )
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table and, for several models, what is matched. Raises ConfigError or CheckpointError."""
    from rich.console import Console
    from rich.table import Table

    length = arguments.sequence_length
    if length < 1:
        raise ConfigError(f"--sequence-length is {length}: it must be at least 1.")
    configs = [read(text) for text in arguments.models]
    table = Table(title=f"{length} tokens a row", title_justify="left")
    table.add_column("")
    for text in arguments.models:
        table.add_column(text, justify="right", overflow="fold")
    groups = [config.parameter_groups() for config in configs]
    for group in dict.fromkeys(name for each in groups for name in each):
        table.add_row(group, *(f"{each.get(group, 0):,}" for each in groups))
    parameters = [config.num_parameters() for config in configs]
    forward = [config.flops_per_token(length) for config in configs]
    training = [config.training_flops_per_token(length) for config in configs]
    active = [config.active_parameters() for config in configs]
    chosen = active != parameters  # somewhere a router chooses
    table.add_row("parameters", *(f"{n:,}" for n in parameters), style="bold", end_section=not chosen)
    if chosen:
        table.add_row("of them active for a token", *(f"{n:,}" for n in active), end_section=True)
    table.add_row("FLOPs per token, forward", *map(_flops, forward))
    table.add_row("FLOPs per token, training", *map(_flops, training), end_section=True)
    for name, size in (("weights, float32", 4), ("gradients, float32", 4), ("Adam moments, float32", 8)):
        table.add_row(name, *(_bytes(n * size) for n in parameters))
    table.add_row("state, training", *(_bytes(n * 16) for n in parameters), style="bold")
    tables = [config.table_bytes() for config in configs]
    if any(tables):
        table.add_row("tables that are not trained", *map(_bytes, tables))
    console = Console(highlight=False)
    console.print(table)
    if len(configs) > 1:
        state = [16 * n for n in parameters]
        measures = {"parameters": parameters}
        if chosen:
            measures["active parameters"] = active
        measures |= {"training FLOPs per token": training, "state": state}
        if any(tables):
            measures["state and tables"] = [a + b for a, b in zip(state, tables, strict=True)]
        for line in compared(arguments.models, measures):
            console.print(line, soft_wrap=True)
    return 0


def read(text: str) -> Any:
    """The config that a command line argument stands for. Raises ConfigError or CheckpointError."""
    from minilm import models
    from minilm.models import folder

    path = Path(text)
    if path.is_dir() or path.name == folder.DESCRIPTION:
        return folder.read_config(path if path.is_dir() else path.parent)
    if path.suffix in (".yaml", ".yml"):
        return models.from_dict(_section(path), where=text)
    name, colon, size = text.partition(":")
    if not colon:
        known = ", ".join(f"{n}:{s}" for n in models.names() for s in models.sizes(n))
        hint = "There is no such file or folder." if "/" in text or path.suffix else "It names no size."
        raise ConfigError(f"{text!r} is not a model. {hint} Presets: {known}.")
    return models.preset(name, size)


def _section(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} could not be read: {error}") from error
    section = content.get("model", content) if isinstance(content, dict) else None
    if isinstance(content, dict) and "model" in content and isinstance(section, dict):
        section = {"name": "original", **section}  # the default of a training run
    if not isinstance(section, dict):
        raise ConfigError(f"{path} has no settings of a model (name: ..., size: ..., or a section `model`).")
    return section


def compared(names: list[str], measures: dict[str, list[int]]) -> list[str]:
    """One line for each pair of models: what is matched within 2 %, and by how much the rest differs."""
    lines = []
    for a, b in itertools.combinations(range(len(names)), 2):
        parts = []
        for what, values in measures.items():
            ratio = values[b] / values[a]
            matched = "matched" if abs(ratio - 1) <= MATCHED else "NOT matched"
            parts.append(f"{what} {matched} (x {ratio:.3g})")
        lines.append(f"{names[b]} against {names[a]}: {', '.join(parts)}")
    return lines


def _flops(count: int) -> str:
    return _scaled(count, 1000, ["", "k", "M", "G", "T"], "FLOP")


def _bytes(count: int) -> str:
    return _scaled(count, 1024, ["", "Ki", "Mi", "Gi", "Ti"], "B")


def _scaled(value: float, base: int, prefixes: list[str], unit: str) -> str:
    step = 0
    while value >= base and step < len(prefixes) - 1:
        value, step = value / base, step + 1
    return f"{value:.4g} {prefixes[step]}{unit}"
