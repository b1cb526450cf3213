"""How training goes through the blocks of a model: plainly, recomputed in the backward pass, compiled.

A model calls `model.through(block, x, plan)` in training where it is set, else the block itself; validation and
generation, whose shapes change from call to call, always go plainly. Modules and their names stay as they are, so a
checkpoint does not know how its run went.

recomputed  of each block only the input is kept; the backward pass runs the block again. Memory of activations falls
            from everything inside of all blocks to one block and the borders, for a third more arithmetic. Random
            states are put back for the second run: with dropout, too, losses and gradients are the same bit for bit.
compiled    torch.compile on a block: one graph, used for all blocks, as they differ in values only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilm.errors import ConfigError


def arrange(model: nn.Module, *, recompute: bool, compiled: bool, backend: str = "inductor") -> None:
    """Set how `model` goes through its blocks in training. ConfigError if it has no say in that.

    backend  of torch.compile
    """
    if not (recompute or compiled):
        return
    if not hasattr(model, "through"):
        raise ConfigError(
            f"{type(model).__name__} cannot recompute or compile its blocks: set train.activation_checkpointing to "
            "none and train.compile to false, or give the model an attribute `through` as models/original.py has."
        )
    one_block: Callable[..., Tensor] = torch.compile(_plainly, backend=backend) if compiled else _plainly

    def recomputed(block: nn.Module, x: Tensor, plan: Any) -> Tensor:
        result: Tensor = checkpoint(one_block, block, x, plan, use_reentrant=False)
        return result

    model.through = recomputed if recompute else one_block


def _plainly(block: nn.Module, x: Tensor, plan: Any) -> Tensor:
    result: Tensor = block(x, plan)
    return result
