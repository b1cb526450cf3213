"""What every part of an evaluation is made from, and what eval.py asks of a part.

A part is a module with

    add_flags(parser)                          its flags, in a group of their own; imports nothing heavy
    problems(arguments) -> list[str]           what is wrong with them (optional): asked before a model is loaded
    sections(arguments, material) -> list[Section]   called on every process, after the losses were computed

What a part has returned is kept, whatever happens to the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minilm.data.tokenizer import Tokenizer
from minilm.evaluation.heldout import HeldOut, How


@dataclass(frozen=True, kw_only=True)
class Material:
    """A model and the data that it is evaluated on.

    tokenizer    None where the model was trained on token ids
    held_out     the split of a store, or the texts of a file
    how          batch size, precision, and whether progress is shown
    folder       of the checkpoint; run_folder the run that it lies in, or None
    config       settings of that run (`minilm.run.RunConfig`), or None
    is_main      the process that prints and writes
    """

    model: nn.Module
    tokenizer: Tokenizer | None
    held_out: HeldOut
    how: How
    folder: Path
    run_folder: Path | None = None
    config: Any = None
    is_main: bool = True
