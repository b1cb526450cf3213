"""What tokens read of the entries that were found for them: each token attends to the tokens of entries of its own.

So each has other keys. Written in torch's operations all of them are looked up at once and kept for the backward pass,
with a gradient as large: to read 128 tokens with keys and values of 64 that is 64 kB for each token of the text, which
go through memory once per operation. In training on a CPU in float32 tokens are taken some at a time instead: their
keys and values stay in the processor's cache and are gone after them, and the backward pass looks them up again.

Everywhere else `formula` runs: it is the reference that the tests compare with, and what a compiler sees through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.models.fused import suits
from minilm.onednn import linear, to_inputs, to_weight
from minilm.onednn import suits as suits_onednn

AT_ONCE = 2**20  # bytes of keys and values that stay in the processor's cache


def read(
    queries: Tensor, table: Tensor, ids: Tensor, bias: Tensor, positions: Tensor, null: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of N tokens over the m x W tokens of m entries each, and over one slot that holds nothing.

    queries    [N, heads, d], scaled
    table      [V, 2 d] key and value of each id
    ids        [N, m, W] int64
    bias       [N, m, W] of each token's score; -inf where there is none to read
    positions  [N, heads, W] added to the scores of each entry
    null       [N, heads] the score of the slot that holds nothing; finite

    Returns what was read of the values [N, heads, d], the share of each position over all entries [N, heads, W], the
    share of nothing [N, heads, 1], and the attention [N, heads, m x W + 1], of which no gradient should be asked.
    """
    if all(suits(x) for x in (queries, table, bias, positions, null)):
        found: tuple[Tensor, Tensor, Tensor, Tensor]
        found = _Reading.apply(queries, table, ids, bias, positions, null)  # type: ignore[no-untyped-call,unused-ignore]
        return found
    return formula(queries, table, ids, bias, positions, null)


def formula(
    queries: Tensor, table: Tensor, ids: Tensor, bias: Tensor, positions: Tensor, null: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`read`, written out. Scores are of the type of `bias` from the moment when that is added."""
    # Keys and values in one look-up: its backward pass sorts the ids, which costs more than the sums.
    keys, values = F.embedding(ids, table).chunk(2, dim=-1)  # [N, m, W, d]
    scores = torch.einsum("nhd,nmwd->nhmw", queries, keys) + positions.unsqueeze(2)
    scores = scores.to(bias.dtype) + bias.unsqueeze(1)
    attended = torch.cat((scores.flatten(2), null.unsqueeze(-1)), dim=-1).softmax(dim=-1)
    of_entries, of_null = attended.to(values.dtype).split([scores[0, 0].numel(), 1], dim=-1)
    mixed = torch.einsum("nhs,nsd->nhd", of_entries, values.flatten(1, 2))
    return mixed, of_entries.unflatten(-1, scores.shape[2:]).sum(dim=2), of_null, attended


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, table: Tensor, ids: Tensor, bias: Tensor, positions: Tensor, null: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        entries = ids.shape[1:]
        scores = torch.empty(*null.shape, entries.numel() + 1)
        scores[..., -1] = null
        mixed, of_positions = torch.empty(queries.shape), torch.empty(positions.shape)
        given = queries, ids.flatten(1), bias.unsqueeze(1), positions.unsqueeze(2)
        made = scores, scores[..., :-1], scores[..., :-1].unflatten(-1, entries), mixed, of_positions
        for query, some, of_entry, of_place, *into in _in_parts(_at_once(ids, table), *given, *made):
            keys, values = F.embedding(some, table).chunk(2, dim=-1)  # [n, m x W, d]
            both, shares, by_entry, read_here, placed = into
            found = torch.bmm(query, keys.transpose(1, 2)).view(by_entry.shape)
            torch.add(found.add_(of_place), of_entry, out=by_entry)
            both.copy_(torch.softmax(both, dim=-1))  # what was scores is the attention now
            torch.bmm(shares, values, out=read_here)
            torch.sum(by_entry, dim=2, out=placed)
        ctx.save_for_backward(queries, table, ids, scores)
        ctx.mark_non_differentiable(scores)
        ctx.set_materialize_grads(False)  # none is ever asked of the attention, and it is large
        return mixed, of_positions, scores[..., -1:].clone(), scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, of_positions: Tensor | None, of_null: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        queries, table, ids, attended = ctx.saved_tensors
        entries, size = ids.shape[1:], _at_once(ids, table)
        no = torch.zeros(1)  # gradient of a result that nothing came of
        grad = no.expand_as(queries).contiguous() if grad is None else grad.contiguous()
        if of_positions is None:
            of_positions = no.expand(*queries.shape[:2], entries[-1])
        if of_null is None:
            of_null = no.expand(*queries.shape[:2], 1)
        of_queries, of_table = torch.empty(queries.shape), torch.zeros(table.shape)
        of_bias, of_scores = torch.empty(ids.shape), torch.empty(attended.shape)
        of_shares = torch.empty(min(size, len(ids)), *attended.shape[1:])
        given = queries, ids.flatten(1), grad, of_positions.unsqueeze(2), of_null, attended
        made = of_scores, of_scores[..., :-1], of_scores[..., :-1].unflatten(-1, entries), of_queries, of_bias
        for query, some, mixed, of_place, null, both, *into in _in_parts(size, *given, *made):
            pairs = F.embedding(some, table)
            keys, values = pairs.chunk(2, dim=-1)  # [n, m x W, d]
            scores, mine, by_entry, asked, of_entry = into
            of_both = of_shares[: len(some)]
            found = torch.bmm(mixed, values.transpose(1, 2)).view(by_entry.shape)
            torch.add(found, of_place, out=of_both[..., :-1].view(by_entry.shape))
            of_both[..., -1:] = null
            torch._softmax_backward_data(of_both, both, -1, torch.float32, grad_input=scores)
            torch.bmm(mine, keys, out=asked)
            torch.sum(by_entry, dim=1, out=of_entry)
            # Their gradients take the place of keys and values, and are added up while they are in the cache.
            keys.copy_(torch.bmm(mine.transpose(1, 2), query))
            values.copy_(torch.bmm(both[..., :-1].transpose(1, 2), mixed))
            of_table.index_add_(0, some.flatten(), pairs.flatten(0, 1))
        own = of_scores[..., :-1].unflatten(-1, entries).sum(dim=2)
        return of_queries, of_table, None, of_bias, own, of_scores[..., -1]


def _at_once(ids: Tensor, table: Tensor) -> int:
    """Tokens of the text whose keys and values fit into the cache."""
    return max(1, AT_ONCE // (ids.shape[1:].numel() * table.shape[1] * table.element_size()))


def _in_parts(size: int, *whole: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(size) for x in whole), strict=True)


def projected(table: Tensor, weights: Sequence[Tensor], number: int, eps: float) -> tuple[Tensor, ...] | None:
    """The normed rows of a table [V, D] times all weights [d, D], in one product -> `number` results [V, ...].

    Normed is what the product gives, which is narrower. None where this is not done: the rows have to be normed first.
    """
    if not all(suits(x) for x in (table, *weights)):
        return None
    found: tuple[Tensor, ...]
    found = _Projected.apply(table, torch.cat(list(weights)), number, eps)  # type: ignore[no-untyped-call,unused-ignore]
    return found


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, weight: Tensor, number: int, eps: float) -> tuple[Tensor, ...]:
        length = torch.linalg.vector_norm(table, dim=-1, keepdim=True)
        scale = length.square_().div_(table.shape[1]).add_(eps).rsqrt_()  # [V, 1]
        together = linear(weight, table) if suits_onednn(table, weight) else F.linear(table, weight)
        found = tuple(part * scale for part in together.chunk(number, dim=-1))
        ctx.save_for_backward(table, weight, scale, *found)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        table, weight, scale, *found = ctx.saved_tensors
        along = torch.zeros(scale.shape)
        for grad, part in zip(grads, found, strict=True):
            along += (grad * part).sum(dim=-1, keepdim=True)
        along.mul_(scale).mul_(scale).div_(table.shape[1])
        grad = torch.cat(grads, dim=-1).mul_(scale)
        # What would only change the length of a row does nothing to its norm.
        return to_inputs(grad, weight).addcmul_(table, along, value=-1), to_weight(grad, table), None, None
