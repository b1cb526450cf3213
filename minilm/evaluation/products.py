"""Faster products with the weights of a model while it generates on a CPU in float32.

A step of generation multiplies a few rows by every weight, and torch's product for that (MKL) reaches half of the
memory's speed for one row and a quarter of the processor's for 16. oneDNN, which torch has inside, does better
(`minilm.onednn`): with the weights as they are, and better still with weights laid out anew (a copy, made within one
call and dropped). The sums are the same up to their order: float32 rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.models.parts import Linear
from minilm.onednn import laid_out, linear, works

# Laying all weights out takes as long as this many steps gain by it: of several rows, and of one.
STEPS_TO_PAY = 16
STEPS_TO_PAY_ONE_ROW = 64
FEWEST_WEIGHTS = 2**20  # in smaller models all is in the processor's cache
# Told that there will be one row, oneDNN takes a layout that is slower for one row than that for several.
LAYOUT_ROWS = 16


class Products:
    """The products of one generation: `within` puts them in the model's linear layers, `head` is for the output layer.

    rows   of a step
    steps  at most; 0 where only the prompts are multiplied by these
    """

    def __init__(self, model: nn.Module, head: Tensor | None, *, rows: int, steps: int) -> None:
        layers = [
            m
            for m in model.modules()
            if isinstance(m, nn.Linear) and type(m) in (nn.Linear, Linear) and "forward" not in vars(m)
        ]
        weights: list[Tensor] = [m.weight for m in layers] + ([] if head is None else [head])
        self._weights: dict[nn.Linear, Tensor] = {}
        self._head = None if head is None else functools.partial(F.linear, weight=head)
        self.taken = fits(weights)
        if not self.taken:
            return
        anew = pays(rows, steps)
        for layer in layers:
            self._weights[layer] = _prepared(layer.weight, anew)
        if head is not None:
            self._head = functools.partial(linear, _prepared(head, anew))

    def weight(self, layer: nn.Linear) -> Tensor:
        """The weight of a linear layer, for `linear`."""
        return self._weights[layer]

    @property
    def head(self) -> Callable[[Tensor], Tensor] | None:
        """Hidden states [..., D] -> logits [..., V]; None where the model makes its logits another way."""
        return self._head

    @contextmanager
    def within(self) -> Iterator[None]:
        """The model's linear layers compute with these products; afterwards they are as they were."""
        for layer, weight in self._weights.items():
            bias = None if layer.bias is None else layer.bias.detach()
            # On the instance: hooks still run, nothing is saved.
            vars(layer)["forward"] = functools.partial(linear, weight, bias=bias)
        try:
            yield
        finally:
            for layer in self._weights:
                vars(layer).pop("forward", None)


def fits(weights: list[Tensor]) -> bool:
    """Are these weights for oneDNN: plain float32 on a CPU, many, and an operator that does what it should?"""
    return (
        sum(w.numel() for w in weights) >= FEWEST_WEIGHTS
        and all(w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous() for w in weights)
        and not torch.is_autocast_enabled("cpu")
        and works()
    )


def pays(rows: int, steps: int) -> bool:
    """Is a copy of all weights in oneDNN's own layout made up for by faster products?

    A rule and not a trial by the clock: the same call is to take the same sums, and so give the same text, every time.
    """
    return steps >= (STEPS_TO_PAY_ONE_ROW if rows == 1 else STEPS_TO_PAY)


def _prepared(weight: Tensor, anew: bool) -> Tensor:
    weight = weight.detach()
    return laid_out(weight, LAYOUT_ROWS) if anew else weight
