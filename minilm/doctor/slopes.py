"""Derivatives by autograd against differences of the function itself, with the noise of both measured.

For a scalar f of some tensors and a random direction d in one of them, (f(+hd) - f(-hd)) / 2h is taken with two step
sizes. What the two disagree by is the noise of the measurement: rounding, curvature, a choice (top-k, ReLU, rounding)
that jumps in between. An error that is not far above its own noise says nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor.blocks import replaced, stream

DIRECTIONS = 3
WIDE, NARROW = 8e-3, 4e-3  # steps in float64, of the tensor's own size; parts of most models stay in float32
IN_FLOAT32 = 4.0  # times as far there
SHORT, JUMPY = 1 / 32, 2e-3  # steps where the noise of long ones is more than this
STANDS = 0.2  # of the slope over long steps: less over short ones is a rounding, straight through
ITS_INPUT = "(its input)"
FACTOR = 10.0  # an error counts from so many times its noise on


@dataclass(frozen=True)
class Slope:
    """One tensor: error and noise in units of its usual slope, the root mean square over directions."""

    name: str
    error: float
    noise: float
    still: bool  # f does not move, or by jumps alone: it is piecewise constant in it
    without: bool  # autograd gives no gradient, or zero

    def limit(self, least: float) -> float:
        return max(least, FACTOR * self.noise)

    def is_wrong(self, least: float) -> bool:
        """Off by more than `least` and than the noise. A function that stands still is a rounding with a gradient
        of its own (straight-through), or has no slope at all."""
        return not self.still and self.error > self.limit(least)

    def is_judged(self, least: float) -> bool:
        """Was the noise small enough for an error of half the slope to be seen."""
        return not self.still and self.limit(least) < 0.5


def slopes(
    value: Callable[[], Tensor],
    tensors: Mapping[str, Tensor],
    *,
    seed: int = 0,
    over: Sequence[Tensor] = (),
    fixed: Mapping[str, int] | None = None,
    seconds: float = math.inf,
) -> list[Slope]:
    """`value()` is a scalar that depends on `tensors` (leaves; they are moved in place and put back). `over`: further
    leaves whose `.grad` is to be cleared first. `fixed`: a row of a tensor that is not moved, as it learns nothing by
    design. `seconds`: tensors whose turn comes later than that are left out."""
    leaves = list(tensors.values())
    for leaf in [*leaves, *over]:
        leaf.grad = None
    with torch.enable_grad():
        value().backward()
    gradients = [leaf.grad.detach().clone() if leaf.grad is not None else None for leaf in leaves]
    for leaf in [*leaves, *over]:
        leaf.grad = None
    generator = torch.Generator().manual_seed(seed)
    deadline, measured = time.monotonic() + seconds, []
    for name, leaf, gradient in zip(tensors, leaves, gradients, strict=True):
        if measured and time.monotonic() > deadline:
            break
        measured.append(_steady(value, leaf, gradient, generator, (fixed or {}).get(name)))
    usual = [max(_size([d[0] for d in part]), _size([d[1] for d in part])) for part in measured]
    least = 1e-4 * float(torch.tensor(usual).median()) if usual else 0.0
    found = []
    for name, gradient, part, unit in zip(tensors, gradients, measured, usual, strict=False):
        unit = max(unit, least, 1e-300)
        error = _size([told - narrow for told, narrow, _ in part]) / unit
        noise = max(abs(wide - narrow) for _, narrow, wide in part) / unit
        still = all(narrow == wide == 0 for _, narrow, wide in part)
        found.append(Slope(name, error, noise, still, gradient is None or not bool(gradient.any())))
    return found


def slopes_alone(
    part: nn.Module, args: Any, kwargs: Any, *, seconds: float, parameters: bool = True
) -> list[Slope]:
    """One module on its own: the slopes of its output in its first floating input (ITS_INPUT) and in its parameters.

    None where it cannot be called on its own."""
    given = next(
        (v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.is_floating_point()), None
    )
    given = stream(args) if given is None else given
    tensors: dict[str, Tensor] = {n: p for n, p in part.named_parameters() if p.requires_grad}
    tensors = tensors if parameters else {}
    leaf = None
    if given is not None:
        leaf = given.detach().clone().requires_grad_()
        tensors[ITS_INPUT] = leaf

    def value() -> Tensor:
        new = leaf if leaf is None else leaf.clone()  # a module may write into what it is given
        a, k = (args, kwargs) if given is None else (replaced(args, given, new), replaced(kwargs, given, new))
        made = part(*a, **k)
        made = made if isinstance(made, Tensor) else next(v for v in made if isinstance(v, Tensor))
        weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return (made.double() * weights.to(made.device)).mean()

    try:
        return slopes(value, tensors, over=list(part.parameters()), fixed=fixed_rows(part), seconds=seconds)
    except (RuntimeError, TypeError, ValueError, StopIteration):
        return []


def fixed_rows(module: nn.Module) -> dict[str, int]:
    """Rows of embeddings that get no gradient by design."""
    found: dict[str, int] = {}
    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            found |= {n: part.padding_idx for n, p in module.named_parameters() if p is part.weight}
    return found


Measured = list[tuple[float, float, float]]  # slope by autograd, by narrow differences, by wide ones


def _steady(
    value: Callable[[], Tensor],
    leaf: Tensor,
    gradient: Tensor | None,
    generator: torch.Generator,
    fixed: int | None,
) -> Measured:
    """With long steps, for what is rounded to float32 on the way; where those meet jumps, with short ones."""
    far = 1.0 if leaf.dtype == torch.float64 else IN_FLOAT32
    long = _directions(value, leaf, gradient, generator, far, fixed)
    if _unsteady(long) < JUMPY:
        return long
    short = _directions(value, leaf, gradient, generator, far * SHORT, fixed)
    told, near, wide = (_size(values) for values in ([t for t, _, _ in long], [n for _, n, _ in short],
                                                     [n for _, n, _ in long]))  # fmt: skip
    if near < STANDS * min(told, wide):  # what moves it are jumps, and its gradient says so
        return [(t, 0.0, 0.0) for t, _, _ in long]
    return min(long, short, key=_unsteady)


def _unsteady(part: Measured) -> float:
    """The noise, of the slope."""
    unit = max(_size([told for told, _, _ in part]), _size([narrow for _, narrow, _ in part]))
    return max(abs(wide - narrow) for _, narrow, wide in part) / max(unit, 1e-300)


@torch.no_grad()
def _directions(
    value: Callable[[], Tensor],
    leaf: Tensor,
    gradient: Tensor | None,
    generator: torch.Generator,
    far: float,
    fixed: int | None,
) -> Measured:
    """For some random directions."""
    kept = leaf.detach().clone()
    size = float(kept.double().square().mean().sqrt()) or 0.1
    found = []
    for _ in range(DIRECTIONS):
        drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64) * size
        if fixed is not None:
            drawn[fixed] = 0
        direction = drawn.to(leaf.device, leaf.dtype)

        def difference(step: float, direction: Tensor = direction) -> float:
            ends = []
            for sign in (1, -1):
                leaf.copy_(kept + sign * step * far * direction)
                ends.append(float(value()))
            leaf.copy_(kept)
            return (ends[0] - ends[1]) / (2 * step * far)

        told = 0.0 if gradient is None else float((gradient.double() * direction.double()).sum())
        found.append((told, difference(NARROW), difference(WIDE)))
    return found


def _size(values: Sequence[float]) -> float:
    return (sum(v * v for v in values) / max(1, len(values))) ** 0.5
