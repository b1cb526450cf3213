"""Matrix products of float32 on a CPU by oneDNN, for training and for generation.

torch multiplies float32 matrices with MKL, which on an AMD processor was half as fast as oneDNN, which torch has inside
as well (`benchmarks/parts.py` measures both). `product` is a drop-in for `torch.nn.functional.linear` that takes oneDNN
where it may, value and gradient; the sums are the same up to their order, that is to float32 rounding.

torch offers these operators to its own compiler only, so they are tried once before they are used (`works`): where
they are absent, fail or give another answer, everything goes on as before. What is taken depends on the tensors alone
and never on the clock, so that the same run takes the same sums every time.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_WEIGHT = 2**16  # numbers: below, the product is over before a call's overhead is


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in], weight [out, in] -> x @ weight.T [..., out]."""
    if not suits(x, weight):
        return F.linear(x, weight)
    if torch.compiler.is_compiling():
        return _compiled(x, weight)
    found: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call,unused-ignore]
    return found


def suits(x: Tensor, weight: Tensor) -> bool:
    """May oneDNN multiply these: float32 in the memory of a CPU, large enough, no autocast, and it is known to work?"""
    return (
        weight.numel() >= SMALLEST_WEIGHT
        and x.numel() > 0  # it refuses a product without rows
        and weight.is_contiguous()
        and _plain(x)
        and _plain(weight)
        and works()
    )


def _plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def linear(weight: Tensor, x: Tensor, then: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out] without a graph; `then` is "none", or "swish" for silu of it. Any strides."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, then, [], "")
    return y


def linear_then(then: str, weight: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """The product with x [..., in], then "add" or "mul" with `other` [..., out]. No graph."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, then)
    return y


def laid_out(weight: Tensor, rows: int) -> Tensor:
    """A copy of `weight` in oneDNN's own layout, for products with `rows` rows: opaque but for `linear`."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return copy


def to_inputs(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [..., out] @ weight [out, in] -> [..., in]: the gradient of the inputs."""
    return linear(weight.T, grad) if suits(grad, weight) else grad @ weight


def to_weight(grad: Tensor, x: Tensor) -> Tensor:
    """grad [N, out].T @ x [N, in] -> [out, in]: the gradient of the weight.

    oneDNN takes its second factor with any strides and copies the first where it is not in rows, slowly: the narrower
    of the two is turned round before.
    """
    out, width = grad.shape[1], x.shape[1]
    if out * width < SMALLEST_WEIGHT or not (len(x) and _plain(grad) and _plain(x) and works()):
        return grad.T @ x
    if width < out:
        return linear(grad.T, x.T.contiguous()).T
    return linear(x.T, grad.T.contiguous())


class _Product(torch.autograd.Function):
    """x [..., in], weight [out, in] -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(weight, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        return (
            to_inputs(grad, weight) if wants_x else None,
            to_weight(grad.flatten(0, -2), x.flatten(0, -2)) if wants_weight else None,
        )


# Operators are named after their module: a model that was exported with its code brings its own.
_OWN = re.sub(r"\W", "_", __name__)


# For torch.compile a product is one closed operator: its compiler would want the weights packed beforehand.
@torch.library.custom_op(f"{_OWN}::product", mutates_args=())
def _compiled(x: Tensor, weight: Tensor) -> Tensor:
    return linear(weight, x)


@torch.library.custom_op(f"{_OWN}::product_backward", mutates_args=())
def _compiled_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return to_inputs(grad, weight), to_weight(grad.flatten(0, -2), x.flatten(0, -2)).contiguous()


@_compiled.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_compiled_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _compiled_backward(grad.contiguous(), *ctx.saved_tensors)
    return found


_compiled.register_autograd(_backward, setup_context=_keep)


@torch.compiler.assume_constant_result
def works() -> bool:
    """Are the operators there, and do they give the sums that they should?"""
    return _tried()


@functools.cache
@torch.no_grad()
def _tried() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # type: ignore[no-untyped-call]
        return False
    # A few numbers of known sums: no generator is moved, and rounding in 16 bits would show.
    x = torch.arange(48, dtype=torch.float32).view(3, 16).sin()
    weight = torch.arange(128, dtype=torch.float32).view(8, 16).cos()
    other = torch.arange(24, dtype=torch.float32).view(3, 8).sin()
    right = (x.double() @ weight.double().T).float()
    wanted = (right, F.silu(right), right + other, right * other)
    try:
        found = [_each(w, x, other) for w in (weight, laid_out(weight, 3))]
        turned = linear(weight.T.contiguous().T, x)  # strides that are not those of rows
    except (AttributeError, RuntimeError, TypeError):  # no such operator, or it takes other arguments
        return False
    close = functools.partial(torch.allclose, rtol=1e-5, atol=1e-5)
    return close(turned, right) and all(
        close(y, z) for some in found for y, z in zip(some, wanted, strict=True)
    )


def _each(weight: Tensor, x: Tensor, other: Tensor) -> list[Tensor]:
    """All that is used of the forward operators."""
    binary = [linear_then(then, weight, x, other) for then in ("add", "mul")]
    return [linear(weight, x), linear(weight, x, "swish"), *binary]
