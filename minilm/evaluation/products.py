"""Faster products with the weights of a model while it generates on a CPU in float32.

A step of generation multiplies a few rows by every weight, and torch's product for that (MKL) reaches half of the
memory's speed for one row and a quarter of the processor's for 16. oneDNN, which torch has inside, does better: for
few rows with the weights as they are, for more with weights laid out anew (a copy, made within one call and dropped).
The sums are the same up to their order: float32 rounding.

torch offers these operators to its own compiler only, so they are tried before they are used: where they are absent,
fail, or give another answer, everything goes on as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAID_OUT_FROM = 4  # rows from which the other layout pays
# Laying weights out takes as long as a few products with 16 rows.
STEPS_TO_PAY = 8
FEWEST_WEIGHTS = 2**20  # in smaller models all is in the processor's cache


class Products:
    """The products of one generation: `within` puts them in the model's linear layers, `head` is for the output layer.

    rows   of a step
    steps  at most
    """

    def __init__(self, model: nn.Module, head: Tensor | None, *, rows: int, steps: int) -> None:
        layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        weights = [m.weight for m in layers] + ([] if head is None else [head])
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        self._head = None if head is None else functools.partial(F.linear, weight=head)
        if not fits(weights):
            return
        anew = rows >= LAID_OUT_FROM and steps >= STEPS_TO_PAY
        for layer in layers:
            self._forwards.append((layer, _product(layer.weight, layer.bias, rows if anew else None)))
        if head is not None:
            self._head = _product(head, None, rows if anew else None)

    @property
    def head(self) -> Callable[[Tensor], Tensor] | None:
        """Hidden states [..., D] -> logits [..., V]; None where the model makes its logits another way."""
        return self._head

    @contextmanager
    def within(self) -> Iterator[None]:
        """The model's linear layers compute with these products; afterwards they are as they were."""
        for layer, forward in self._forwards:
            vars(layer)["forward"] = forward  # on the instance: hooks still run, nothing is saved
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                vars(layer).pop("forward", None)


def fits(weights: list[Tensor]) -> bool:
    """Are these weights for oneDNN: plain float32 on a CPU, many, and an operator that does what it should?"""
    return (
        sum(w.numel() for w in weights) >= FEWEST_WEIGHTS
        and all(w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous() for w in weights)
        and not torch.is_autocast_enabled("cpu")
        and _works()
    )


def _product(weight: Tensor, bias: Tensor | None, rows: int | None) -> Callable[[Tensor], Tensor]:
    weight = weight.detach()
    if rows is not None:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return functools.partial(_linear, weight, None if bias is None else bias.detach())


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


@torch.no_grad()
def _works() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    # A few numbers of known sums: no generator is moved, and rounding in 16 bits would show.
    x = torch.arange(48, dtype=torch.float32).view(3, 16).sin()
    weight = torch.arange(128, dtype=torch.float32).view(8, 16).cos()
    try:
        found = [_product(weight, None, rows)(x) for rows in (None, 3)]
    except (AttributeError, RuntimeError, TypeError):  # no such operator, or it takes other arguments
        return False
    right = (x.double() @ weight.double().T).float()
    return all(bool(torch.allclose(y, right, rtol=1e-5, atol=1e-5)) for y in found)
