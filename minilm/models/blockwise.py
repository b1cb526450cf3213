"""Exact attention on a CPU, document by document and block by block of queries.

torch's kernel for CPUs spends its time on the scores and not on the products when heads are narrow, and given a mask it
computes every score of a row of packed documents, hidden ones too. Here a block of queries meets only the keys of its
own document up to its last query. The query heads that share a key head stand in one matrix, so that keys are read once
and the products are large enough to be fast (`minilm.onednn`); a block's scores stay in the processor's cache and are
gone after it. The backward pass makes them again.

Blocks do not change what is computed: each row of scores is whole, and its softmax is torch's own.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minilm.onednn import linear, works

# Queries of a block. Long documents and wide heads: one product per key head, by oneDNN. Else all key heads in one
# batched product, and fewer queries at once, so that their scores stay in the cache.
LARGE, SMALL = 128, 32
LARGE_FROM = 2**23  # multiplications of a key head's product with all keys of the document


def attend(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
    """q [N, H, d], k and v [N, Hkv, d] of all rows one after another -> [N, H, d]; float32 on a CPU.

    borders  int [documents + 1]: where each document begins, then N; a query sees the keys of its document up to itself
    """
    if torch.compiler.is_compiling():
        return _compiled(q, k, v, borders)
    found: Tensor = _Blockwise.apply(q, k, v, borders)  # type: ignore[no-untyped-call,unused-ignore]
    return found


class _Block(NamedTuple):
    """What is multiplied at once: a key head, or all of them; rows of queries; rows of keys."""

    head: int | slice
    rows: slice
    keys: slice


class _Work:
    """The parts of all heads: queries and what goes with them [Hkv, N x G, d], keys and values [Hkv, N, d]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.tokens, heads, self.width = q.shape
        self.kv_heads = k.shape[1]
        self.group = heads // self.kv_heads
        self.q = self.by_head(q).mul_(1 / math.sqrt(self.width))
        self.k, self.v = (x.transpose(0, 1).contiguous() for x in (k, v))
        index = torch.arange(LARGE)
        later = index > index.repeat_interleave(self.group)[:, None]  # [LARGE x G, LARGE]
        self.later = torch.zeros(later.shape).masked_fill_(later, -math.inf)

    def by_head(self, x: Tensor) -> Tensor:
        """[N, H, d] -> a copy [Hkv, N x G, d], the G query heads of a key head side by side for each token."""
        parted = x.reshape(self.tokens, self.kv_heads, self.group, self.width).transpose(0, 1)
        whole = torch.empty(self.kv_heads, self.tokens, self.group, self.width)
        return whole.copy_(parted).view(self.kv_heads, -1, self.width)

    def by_token(self, x: Tensor) -> Tensor:
        """The way back."""
        parted = x.view(self.kv_heads, self.tokens, self.group, self.width).transpose(0, 1)
        return parted.reshape(self.tokens, -1, self.width)

    def blocks(self, borders: Tensor) -> Iterator[_Block]:
        """All of them, document by document."""
        for first, after in itertools.pairwise(borders.tolist()):
            large = LARGE * self.group * (after - first) * self.width >= LARGE_FROM and works()
            size, heads = (LARGE, range(self.kv_heads)) if large else (SMALL, [slice(None)])
            for start in range(first, after, size):
                end = min(start + size, after)
                for head in heads:
                    yield _Block(head, slice(start * self.group, end * self.group), slice(first, end))

    def weights(self, head: int | slice, rows: slice, keys: slice) -> Tensor:
        """[..., rows, keys] after the softmax."""
        scores = times(self.q[head, rows], self.k[head, keys])
        length = (rows.stop - rows.start) // self.group
        scores[..., -length:] += self.later[: length * self.group, :length]
        return torch.softmax(scores, dim=-1)


def times(a: Tensor, b: Tensor) -> Tensor:
    """a [..., n, c] times b [..., m, c], turned round -> [..., n, m]."""
    return linear(b, a) if a.dim() == 2 else torch.bmm(a, b.transpose(1, 2))


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, borders)
        return forward(q, k, v, borders)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *backward(grad, *ctx.saved_tensors), None


def forward(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
    """`attend` without a graph."""
    work = _Work(q, k, v)
    mixed = torch.empty_like(work.q)
    for head, rows, keys in work.blocks(borders):
        weights = work.weights(head, rows, keys)
        mixed[head, rows] = times(weights, work.v[head, keys].transpose(-1, -2))
    return work.by_token(mixed)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from that of the result [N, H, d]."""
    work = _Work(q, k, v)
    grad = work.by_head(grad)
    grad_q, grad_k, grad_v = torch.empty_like(work.q), torch.zeros_like(work.k), torch.zeros_like(work.v)
    for head, rows, keys in work.blocks(borders):
        weights = work.weights(head, rows, keys)
        mine = grad[head, rows]
        grad_v[head, keys] += _turned(weights, mine)
        of_weights = times(mine, work.v[head, keys])
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, torch.float32)
        grad_q[head, rows] = times(of_scores, work.k[head, keys].transpose(-1, -2))
        grad_k[head, keys] += _turned(of_scores, work.q[head, rows])
    grad_q = work.by_token(grad_q.mul_(1 / math.sqrt(work.width)))
    return grad_q, grad_k.transpose(0, 1), grad_v.transpose(0, 1)


def _turned(scores: Tensor, x: Tensor) -> Tensor:
    """scores [..., rows, keys], turned round, times x [..., rows, d] -> [..., keys, d]."""
    if scores.dim() == 2:
        return linear(scores.T, x.T.contiguous()).T
    return torch.bmm(scores.transpose(1, 2), x)


# Operators are named after their module: a model that was exported with its code brings its own.
_OWN = re.sub(r"\W", "_", __name__)


# For torch.compile attention is one closed operator: its blocks depend on where documents end.
@torch.library.custom_op(f"{_OWN}::attend", mutates_args=())
def _compiled(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
    return forward(q, k, v, borders)


@torch.library.custom_op(f"{_OWN}::attend_backward", mutates_args=())
def _compiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = backward(grad, q, k, v, borders)
    return grad_q, grad_k.contiguous(), grad_v.contiguous()


@_compiled.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@_compiled_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_compiled_backward(grad.contiguous(), *ctx.saved_tensors), None


_compiled.register_autograd(_gradients, setup_context=_keep)
