"""Flags by which commands name a model, the same in all of them."""

from __future__ import annotations

import argparse

PLACE = "a run folder (its newest checkpoint) or a checkpoint"


def add_checkpoint(parser: argparse._ActionsContainer, place: str = PLACE) -> None:
    """--checkpoint and --weights. `place` says what the command takes."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=place)
    parser.add_argument(
        "--weights",
        choices=("last", "ema"),
        default="last",
        help="those of the last step, or their moving average (train.ema_decay); default: last",
    )


def add_store(parser: argparse._ActionsContainer) -> None:
    """--store."""
    parser.add_argument(
        "--store",
        metavar="DIR",
        help="knowledge store to read in place of the one that the model was trained with",
    )


def add_dtype(parser: argparse._ActionsContainer) -> None:
    """--dtype."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (default: float32)",
    )
