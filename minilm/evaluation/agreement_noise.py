"""What rounding can do to a number of this model over these rows, measured instead of guessed.

Two programs that compute the same thing in float32 or bfloat16 round at other places: another batch size, another
kernel, another machine. So roundings are drawn at random where they fall: every weight matrix and whatever goes into or
comes out of a layer is multiplied by 1 + u x, x uniform in [-1, 1], u the unit of the type. The number is computed anew
for some drawings, and the largest change is the noise.

Units: 2^-24 for float32, 2^-8 for bfloat16, the largest relative error of a rounding to nearest. In float32 a sum over
K terms is itself rounded K times, which adds up to about sqrt(K) roundings; bfloat16 products are summed in float32.
Source: Higham, Accuracy and Stability of Numerical Algorithms (2002), chapters 2 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

UNITS = {"fp32": 2.0**-24, "bf16": 2.0**-8}
DRAWS = 6
# Two computations round on their own, and six drawings seldom show the worst. Attention rounds to bfloat16 within,
# where no layer can be asked.
FACTORS = {"fp32": 4.0, "bf16": 8.0}
FLOOR = 1e-6  # of the number: what the sums of the loss itself may round


@dataclass(frozen=True)
class Noise:
    """How far two ways to a number may be apart, in its unit, and how that was found out."""

    limit: float
    how: str


def noise(
    model: nn.Module, compute: Callable[[], Tensor], precision: str, *, seed: int = 0, draws: int = DRAWS
) -> Noise:
    """The noise of the numbers that `compute` returns ([N] float64; the largest of them counts).

    compute    computes in float32 here, whatever the precision: the roundings are drawn
    precision  "fp32" or "bf16": whose roundings
    """
    exact = compute()
    changes = [0.0]
    for number in range(draws):
        with roundings(model, precision, seed + number):
            changes.append(float((compute() - exact).abs().max()))
    limit = FACTORS[precision] * max(changes) + FLOOR * float(exact.abs().max())
    return Noise(limit, f"{draws} drawings of {precision} roundings move it by at most {max(changes):.1e}")


@contextmanager
def roundings(model: nn.Module, precision: str, seed: int) -> Iterator[None]:
    """Within, the model computes with drawn roundings; afterwards its weights are bit for bit what they were."""
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    draw = _Draw(UNITS[precision], seed)
    handles = []
    try:
        with torch.no_grad():
            for parameter, _ in kept:
                if parameter.dim() > 1:  # gains and biases stay in float32 under autocast
                    parameter.copy_(draw.rounded(parameter, 1))
        for module in model.modules():
            if not any(module.children()):
                handles.append(module.register_forward_pre_hook(draw.before))
                handles.append(module.register_forward_hook(draw.after))
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)


class _Draw:
    """Roundings from a generator of their own."""

    def __init__(self, unit: float, seed: int) -> None:
        self.unit, self.seed = unit, seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def rounded(self, x: Tensor, terms: int) -> Tensor:
        """x, each element off by a rounding; that of a float32 sum over `terms`, where the unit is float32's."""
        generator = self.generators.get(x.device)
        if generator is None:
            generator = torch.Generator(device=x.device).manual_seed(self.seed)
            self.generators[x.device] = generator
        unit = self.unit * math.sqrt(terms) if self.unit == UNITS["fp32"] else self.unit
        drawn = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        # In float64: in float32 the product would be rounded itself, by as much.
        return (x.double() * (1 + unit * (2 * drawn.double() - 1))).to(x.dtype)

    def before(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook: what a layer is given is rounded on the way, in attention and between layers."""
        return tuple(self.rounded(x, 1) if _is_float(x) else x for x in inputs)

    def after(self, module: nn.Module, _: Any, output: Any) -> Any:
        """A forward hook: tensors that come out of a layer, others as they are."""
        terms = int(getattr(module, "in_features", 1))
        return self.rounded(output, terms) if _is_float(output) else output


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
