"""How training goes through the blocks of a model: plainly, recomputed in the backward pass, compiled.

A model calls `model.through(block, x, plan)` in training where it is set, else the block itself; validation and
generation, whose shapes change from call to call, always go plainly. Modules and their names stay as they are, so a
checkpoint does not know how its run went.

recomputed  of a block only the input is kept; the backward pass runs the block again. Random states are put back for
            the second run: with dropout, too, losses and gradients are the same bit for bit.
            blocks  all of them: of everything inside of all blocks, one block and the borders are left, for up to a
                    third more arithmetic
            half    every second one, but never the last: half of the memory for half of the price. The last one is
                    kept because its inside would come back at once, while nothing of the others is gone yet.
compiled    torch.compile on a block: one graph, used for all blocks, as they differ in values only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilm.errors import ConfigError

Recompute = Literal["none", "half", "blocks"]
_AGAIN = "is_recomputed"


def recomputed_blocks(policy: Recompute, num_layers: int) -> list[bool]:
    """Is block number i run again in the backward pass?"""
    if policy == "half":
        return [(num_layers - 1 - number) % 2 == 1 for number in range(num_layers)]
    return [policy == "blocks"] * num_layers


def arrange(model: nn.Module, *, recompute: Recompute, compiled: bool, backend: str = "inductor") -> None:
    """Set how `model` goes through its blocks in training. ConfigError if it has no say in that.

    recompute  which blocks are run again in the backward pass instead of kept
    backend    of torch.compile
    """
    if recompute == "none" and not compiled:
        return
    if not (hasattr(model, "through") and hasattr(model, "blocks")):
        raise ConfigError(
            f"{type(model).__name__} cannot recompute or compile its blocks: set train.activation_checkpointing to "
            "none and train.compile to false, or give the model `blocks` and an attribute `through` as in "
            "models/original.py."
        )
    one_block: Callable[..., Tensor] = torch.compile(_plainly, backend=backend) if compiled else _plainly

    def through(block: nn.Module, x: Tensor, plan: Any) -> Tensor:
        if compiled and plan.borders is not None:  # one graph for any number of documents
            torch._dynamo.maybe_mark_dynamic(plan.borders, 0)
        if not getattr(block, _AGAIN, False):
            return one_block(block, x, plan)
        result: Tensor = checkpoint(one_block, block, x, plan, use_reentrant=False)
        return result

    # Noted on the block and not here: a copy of the model is copied with its notes.
    for block, again in zip(model.blocks, recomputed_blocks(recompute, len(model.blocks)), strict=True):
        setattr(block, _AGAIN, again)
    model.through = through


def _plainly(block: nn.Module, x: Tensor, plan: Any) -> Tensor:
    result: Tensor = block(x, plan)
    return result
