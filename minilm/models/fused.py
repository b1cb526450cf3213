"""Norm, rotation and gated feed-forward for training on a CPU in float32, each with a backward pass of its own.

Written in torch's operations, each of these keeps every intermediate result for the backward pass, and passes through
memory once per operation. Here a norm keeps its input and one number per token, a rotation nothing but its angles, a
gated feed-forward its two inner products: what else is needed is cheap and is made again. With the kernel for CPUs a
block of the reference size then keeps 27 kB a token, where formulas and torch's kernel with a mask keep 45.

Everywhere else the formulas of `minilm.models.parts` run: they are the reference that the tests compare with. CUDA has
fused kernels of its own, and a compiler sees through formulas better than through these.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.onednn import linear, to_inputs, to_weight

ROWS = 1024  # of a norm's backward pass at once: their intermediate results stay in the processor's cache


def suits(x: Tensor) -> bool:
    """May these functions take x: float32 on a CPU, no compiler? With a graph and without, so that the bits agree."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / sqrt(mean(x^2) + eps) * weight [D]."""
    found: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call,unused-ignore]
    return found


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, heads, d], cos and sin [B or 1, L, 1, d / 2]: see `parts.rotate`."""
    found: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call,unused-ignore]
    return found


def gated(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(gate) * up) @ down.T: gate and up [..., F], down [D, F], fit for `onednn.suits`, -> [..., D]."""
    found: Tensor = _Gated.apply(gate, up, down)  # type: ignore[no-untyped-call,unused-ignore]
    return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        of_x, of_weight = torch.empty(x.shape), torch.zeros(weight.shape)
        parts = (t.reshape(-1, t.shape[-1]).split(ROWS) for t in (x, scale, grad, of_x))
        for x_part, scale_part, grad_part, into in zip(*parts, strict=True):
            normed = x_part * scale_part
            along = grad_part * normed
            of_weight += along.sum(dim=0)
            # What would only change the length of a row does nothing to its norm.
            along_row = (along @ weight).div_(width).unsqueeze(1)
            torch.mul(grad_part, weight, out=into)
            into.addcmul_(normed, along_row, value=-1).mul_(scale_part)
        return of_x, of_weight, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, sign=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(grad, *ctx.saved_tensors, sign=-1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, sign: int) -> Tensor:
    """Rotated forwards (sign 1) or back (sign -1)."""
    rotated = torch.empty(x.shape)
    for (first, second), into, turn in zip(
        (pair := x.chunk(2, dim=-1), pair[::-1]), rotated.chunk(2, dim=-1), (-sign, sign), strict=True
    ):
        torch.mul(first, cos, out=into)
        into.addcmul_(second, sin, value=turn)
    return rotated


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, down)
        return linear(down, F.silu(gate).mul_(up))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = ctx.saved_tensors
        activated = F.silu(gate)
        inner = (activated * up).flatten(0, -2)
        of_down = to_weight(grad.flatten(0, -2), inner)
        del inner
        of_inner = to_inputs(grad, down)
        of_up = activated.mul_(of_inner)
        of_gate: Tensor = torch.ops.aten.silu_backward(of_inner.mul_(up), gate)
        return of_gate, of_up, of_down
