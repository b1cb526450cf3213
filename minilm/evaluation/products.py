"""Faster products with the weights of a model while it generates on a CPU in float32.

A step of generation multiplies a few rows by every weight, and torch's product for that (MKL) reaches half of the
memory's speed for one row and a quarter of the processor's for 16. oneDNN, which torch has inside, does better: for
few rows with the weights as they are, else with weights laid out anew (a copy, made within one call and dropped).
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
STEPS_TO_PAY_FEW_ROWS = 48  # with several threads
FEWEST_WEIGHTS = 2**20  # in smaller models all is in the processor's cache


class Products:
    """The products of one generation: `within` puts them in the model's linear layers, `head` is for the output layer.

    rows   of a step
    steps  at most
    """

    def __init__(self, model: nn.Module, head: Tensor | None, *, rows: int, steps: int) -> None:
        layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        weights = [m.weight for m in layers] + ([] if head is None else [head])
        self._weights: dict[nn.Linear, Tensor] = {}
        self._head = None if head is None else functools.partial(F.linear, weight=head)
        self.taken = fits(weights)
        if not self.taken:
            return
        anew = rows if pays(rows, steps) else None
        for layer in layers:
            self._weights[layer] = _laid_out(layer.weight, anew)
        if head is not None:
            self._head = functools.partial(linear, _laid_out(head, anew))

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
        and _works()
    )


def pays(rows: int, steps: int) -> bool:
    """Is a copy of all weights in oneDNN's own layout made up for by faster products?

    A rule and not a trial by the clock: the same call is to take the same sums, and so give the same text, every time.
    """
    if rows >= LAID_OUT_FROM:
        return steps >= STEPS_TO_PAY
    # One thread reads a few rows' weights as fast the way they are.
    return torch.get_num_threads() > 1 and steps >= STEPS_TO_PAY_FEW_ROWS


def _laid_out(weight: Tensor, rows: int | None) -> Tensor:
    weight = weight.detach()
    return weight if rows is None else torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def linear(weight: Tensor, x: Tensor, then: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out]; `then` is "none", or "swish" for silu of it. `weight` as `Products` has it."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, then, [], "")
    return y


def linear_then(then: str, weight: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """The product with x [..., in], then "add" or "mul" with `other` [..., out]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, then)
    return y


@torch.no_grad()
def _works() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # type: ignore[no-untyped-call]
        return False
    # A few numbers of known sums: no generator is moved, and rounding in 16 bits would show.
    x = torch.arange(48, dtype=torch.float32).view(3, 16).sin()
    weight = torch.arange(128, dtype=torch.float32).view(8, 16).cos()
    other = torch.arange(24, dtype=torch.float32).view(3, 8).sin()
    right = (x.double() @ weight.double().T).float()
    wanted = (right, F.silu(right), right + other, right * other)
    try:
        found = [_each(w, x, other) for w in (weight, _laid_out(weight, 3))]
    except (AttributeError, RuntimeError, TypeError):  # no such operator, or it takes other arguments
        return False
    close = functools.partial(torch.allclose, rtol=1e-5, atol=1e-5)
    return all(close(y, z) for some in found for y, z in zip(some, wanted, strict=True))


def _each(weight: Tensor, x: Tensor, other: Tensor) -> list[Tensor]:
    """All that is used of oneDNN."""
    binary = [linear_then(then, weight, x, other) for then in ("add", "mul")]
    return [linear(weight, x), linear(weight, x, "swish"), *binary]
