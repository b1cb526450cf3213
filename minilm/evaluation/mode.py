"""Look at a model without changing what happens next: mode, gradients and random states as before.

Training calls evaluation in the middle of a run. If that moved one random number, or left one dropout layer
in the other mode, a run with validation would no longer be the run without it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm.errors import ConfigError

PRECISIONS = ("fp32", "bf16")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients within; afterwards every submodule has the mode that it had.

    `model.train(was_training)` would not do: it gives all submodules the mode of the top one, so a part that
    was frozen in eval mode on purpose would start to drop out.

    Not inference mode: a table that a module makes and keeps there could not be used in training later.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The random states of torch (CPU and every CUDA device in use), Python and numpy are as before afterwards."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else [], random.getstate()
    numpy_state = np.random.get_state()  # the legacy state: other code may draw from it
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        if cuda:
            torch.cuda.set_rng_state_all(states[1])
        random.setstate(states[2])
        np.random.set_state(numpy_state)


def autocast(device: torch.device, precision: str | None) -> AbstractContextManager[Any]:
    """None computes in whatever context is active; "fp32" in the type of the parameters; "bf16" with autocast."""
    if precision is None:
        return nullcontext()
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}.")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def context_tokens(model: nn.Module) -> int | None:
    """How many tokens the model can take as input (`config.max_length`); None where it does not say."""
    config = getattr(model, "config", None)
    value = getattr(config, "max_length", None)
    return int(value) if value else None


def head_of(model: nn.Module) -> Tensor | None:
    """The weight [V, D] for which logits = hidden @ weight.T; None where the model makes its logits another way."""
    try:
        return getattr(model, "head_weight", None)
    except ConfigError:  # a model from elsewhere that has a bias or a cap after the product
        return None
