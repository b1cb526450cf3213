"""Which entries of a knowledge store does this token need? Product keys, then an exact second look.

Two questions are asked, both in float32 whatever the model runs in:

    candidates   the C best cells of the store's grid by product keys: query q = (row half, column half), made from
                 the content codes of the last tokens (a lexical retriever from the first step on: its keys start as
                 the mean codes of the rows and columns) and, as training goes on, from the hidden state
    reread       the m best of the candidates by the product of a query with the entry's own code

The selection is continuous: a score carries log(1 - exp(-(distance to the first one left out))), so that an entry comes
in with weight 0 and leaves with weight 0, at either stage. Without it an output would jump when a rounding error swaps
two near-equal entries, and no comparison of a cached with an uncached pass could be strict.

The loss of the language model reaches all of this through those scores, but it hardly teaches retrieval (measured: an
entry that is never read gives no gradient to be read). So where the data say which entry a target needs, there are
three cross entropies: over the rows, over the columns (each a softmax over `side` keys: no key can die), and over the
candidates of the second look. They are sums over the labelled tokens; the model divides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.knowledge.store import KnowledgeStore
from minilm.models.product_keys import best_cells
from minilm.onednn import product

NEAR = 1e-6  # two scores that are nearer count as so far apart: keeps log(1 - exp(-d)) finite


class Retrieved(NamedTuple):
    """What a retriever returns for N tokens.

    slots    [N, m] int64, different from each other within a token
    scores   [N, m] bias of each entry in the softmax that reads; -inf for a slot that holds no entry
    losses   cross entropies over rows, columns and candidates, summed over the labelled tokens
    rows, columns  [N, side] scores of the sub-keys
    """

    slots: Tensor
    scores: Tensor
    losses: Tensor
    rows: Tensor
    columns: Tensor


class SubKeys(nn.Module):
    """The keys of the grid's rows and columns, [2, side, key_dim], and the projection of codes that they live in."""

    def __init__(self, side: int, code_dim: int, key_dim: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(2, side, key_dim))
        self.code_dim = code_dim
        self.tables = {
            "keys": 1.0
        }  # looked up; normed before use, so that decay would only change their step size

    @torch.no_grad()
    def initialise(self, store: KnowledgeStore, generator: torch.Generator) -> Tensor:
        """Keys are the projected mean codes of rows and columns; returns the projection [key_dim, code_dim]."""
        key_dim = self.keys.shape[2]
        drawn = torch.randn(max(key_dim, self.code_dim), self.code_dim, generator=generator)
        projection = torch.linalg.qr(drawn).Q[
            :key_dim
        ]  # orthonormal columns: products of codes stay what they were
        for half, means in enumerate((store.row_means, store.column_means)):
            self.keys[half] = F.layer_norm(means.float() @ projection.T, (key_dim,))
        return projection

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [N, 2, key_dim] -> scores of the rows and of the columns [N, side]. Both sides are normalised."""
        dim = self.keys.shape[2]
        keys = F.layer_norm(self.keys.to(queries.dtype), (dim,))
        queries = F.layer_norm(queries, (dim,)) / math.sqrt(dim)
        rows, columns = (product(queries[:, half], keys[half]) for half in (0, 1))
        return rows, columns


@dataclass(frozen=True)
class RetrievalShape:
    """Sizes of a retriever: C candidates, m entries that are read, and widths."""

    dim: int
    code_dim: int
    key_dim: int
    hidden_dim: int
    num_candidates: int
    num_read: int
    state_gradient: float  # share of the gradient that the states get from the queries


class Retriever(nn.Module):
    """(states [N, D], window codes [N, code_dim]) -> Retrieved. The sub-keys are shared, the queries are its own."""

    def __init__(self, shape: RetrievalShape) -> None:
        super().__init__()
        s = self.shape = shape
        self.from_code = nn.Parameter(torch.empty(2 * s.key_dim, s.code_dim))
        self.hidden = nn.Parameter(torch.empty(s.hidden_dim, s.code_dim + s.dim))
        self.from_hidden = nn.Parameter(torch.empty(2 * s.key_dim, s.hidden_dim))
        self.from_state = nn.Parameter(torch.empty(2 * s.key_dim, s.dim))
        self.reread_hidden = nn.Parameter(torch.empty(s.code_dim, s.hidden_dim))
        self.reread_state = nn.Parameter(torch.empty(s.code_dim, s.dim))
        self.log_scale = nn.Parameter(torch.empty(2))  # of the product-key scores and of the second look

    @torch.no_grad()
    def initialise(self, projection: Tensor, std: float, generator: torch.Generator) -> None:
        """A lexical retriever: both queries are the window code; what learns from the state starts at zero."""
        self.from_code.copy_(torch.cat((projection, projection)))
        self.hidden.normal_(0.0, std, generator=generator)
        for late in (self.from_hidden, self.from_state, self.reread_hidden, self.reread_state):
            late.zero_()
        self.log_scale.copy_(torch.tensor([0.0, math.log(10.0)]))

    def forward(
        self, states: Tensor, codes: Tensor, keys: SubKeys, store: KnowledgeStore, labels: Tensor | None
    ) -> Retrieved:
        """`labels` [N] int64: the slot that each token needs, -1 where unknown; without them there are no losses."""
        with torch.autocast(states.device.type, enabled=False):
            precise = torch.float64 if states.dtype == torch.float64 else torch.float32
            states, codes = states.to(precise), codes.to(precise)
            rows, columns, reread = self._queries(states, codes, keys)
            candidates, gates = self._candidates(rows, columns, store)
            scores = self._looked_at(reread, candidates, store) + gates
            slots, bias = self._best(candidates, scores)
            losses = rows.new_zeros(3)
            # How many are known decides on shapes: an accelerator is waited for, once.
            if labels is not None and len(known := (labels >= 0).nonzero().flatten()):
                queries = self._queries(self._shared(states[known]), codes[known], keys)
                losses = self._losses(queries, candidates[known], labels[known], store)
            return Retrieved(slots, bias, losses, rows, columns)

    def _queries(self, states: Tensor, codes: Tensor, keys: SubKeys) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of rows and of columns [N, side] and the query of the second look [N, code_dim]."""
        weights = self._weights(codes.dtype)
        scale = weights["log_scale"].exp()
        hidden = F.silu(product(torch.cat((codes, states), dim=-1), weights["hidden"]))
        queries = product(codes, weights["from_code"]) + product(hidden, weights["from_hidden"])
        queries = queries + product(states, weights["from_state"])
        rows, columns = (scale[0] * part for part in keys(queries.unflatten(-1, (2, -1))))
        reread = codes + product(hidden, weights["reread_hidden"])
        return rows, columns, scale[1] * (reread + product(states, weights["reread_state"]))

    def _shared(self, states: Tensor) -> Tensor:
        """The same numbers, of whose gradient a share goes on.

        Retrieval is one task of many to the layers below, but its losses are large. With their whole gradient the
        text between the facts was predicted 1.5 % worse than without a memory, with none of it 0.2 % (one seed).
        """
        share = self.shape.state_gradient
        return states if share == 1 else states.detach() + share * (states - states.detach())

    def _losses(
        self,
        queries: tuple[Tensor, Tensor, Tensor],
        candidates: Tensor,
        labels: Tensor,
        store: KnowledgeStore,
    ) -> Tensor:
        """[3] sums over the labelled tokens: -log p of the right row, of the right column, of the right entry.

        Where the right entry is not among the candidates it is set beside them, once: the second look learns it at
        any rate, and no candidate stands there twice.
        """
        rows, columns, reread = queries
        side = rows.shape[1]
        row_loss = _surprise(rows, labels // side).sum()
        column_loss = _surprise(columns, labels % side).sum()
        own = self._looked_at(reread, labels[:, None], store)  # [K, 1]
        others = self._looked_at(reread, candidates, store)
        absent = (candidates == labels[:, None]) | (store.lengths[candidates] == 0)
        scores = torch.cat((own, others.masked_fill(absent, -math.inf)), dim=-1)
        return torch.stack((row_loss, column_loss, _surprise(scores, torch.zeros_like(labels)).sum()))

    def index_loss(self, codes: Tensor, slots: Tensor, keys: SubKeys) -> Tensor:
        """Cross entropies over rows and columns of queries that are codes alone [M, code_dim], without a state.

        slots [M]: where their entries lie; -1: does not count. Summed. What an index learns from its own entries: the
        text names only some, and a query for one that it never names would be answered by chance.
        """
        with torch.autocast(codes.device.type, enabled=False):
            precise = torch.float64 if self.from_code.dtype == torch.float64 else torch.float32
            codes, weights = codes.to(precise), self._weights(precise)
            hidden = F.silu(product(codes, weights["hidden"][:, : self.shape.code_dim]))
            queries = product(codes, weights["from_code"]) + product(hidden, weights["from_hidden"])
            scale = weights["log_scale"].exp()
            rows, columns = (scale[0] * part for part in keys(queries.unflatten(-1, (2, -1))))
            right, side = slots.clamp(min=0), rows.shape[1]
            wrong = _surprise(rows, right // side) + _surprise(columns, right % side)
            return torch.where(slots >= 0, wrong, 0.0).sum()

    def _weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: value.to(dtype) for name, value in self.named_parameters(recurse=False)}

    def _candidates(self, rows: Tensor, columns: Tensor, store: KnowledgeStore) -> tuple[Tensor, Tensor]:
        """The best cells [N, C], and how far inside the selection each is, as a log weight; -inf for empty cells."""
        cells = rows.shape[1] ** 2
        count = min(self.shape.num_candidates, cells)
        scores, slots = best_cells(rows, columns, min(count + 1, cells))
        gates = continuous(scores, count)
        slots = slots[:, :count]
        return slots, gates.masked_fill(store.lengths[slots] == 0, -math.inf)

    def _looked_at(self, reread: Tensor, slots: Tensor, store: KnowledgeStore) -> Tensor:
        """Products of the second query [N, code_dim] with the codes of the slots [N, C] -> [N, C]."""
        codes = store.codes[slots].to(reread.dtype)  # [N, C, code_dim]
        return torch.einsum("nd,ncd->nc", reread, codes) * store.code_scale

    def _best(self, slots: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The m best by score and their biases, [N, m]: the log probability of each among the candidates.

        Probabilities, not scores: those are at most 1 however sharp the scores become, and the null slot (whose bias
        starts at 0) keeps a chance beside them.
        """
        count = min(self.shape.num_read, scores.shape[1])
        # Where no candidate holds anything, the sum would be minus infinity, and its gradient not a number.
        nothing = scores.isneginf().all(dim=-1, keepdim=True)
        total = scores.masked_fill(nothing, 0.0).logsumexp(dim=-1, keepdim=True)
        top, chosen = scores.topk(min(count + 1, scores.shape[1]), dim=-1)
        bias = top[:, :count] - total + continuous(top, count)
        return slots.gather(1, chosen[:, :count]), bias.masked_fill(top[:, :count].isneginf(), -math.inf)


def continuous(sorted_scores: Tensor, count: int) -> Tensor:
    """log(1 - exp(-(score - first one left out))) of the `count` best [N, count]; 0 where nothing was left out.

    sorted_scores  [N, count or count + 1], falling. The one left out may be -inf (then there was none).
    """
    kept = sorted_scores[:, :count]
    if sorted_scores.shape[1] <= count:
        return torch.zeros_like(kept)
    first_out = sorted_scores[:, count:]
    known = first_out.isfinite() & kept.isfinite()
    distance = torch.where(known, kept - torch.where(known, first_out, 0.0), 100.0)
    return torch.log(-torch.expm1(-distance.clamp(min=NEAR)))


def _surprise(scores: Tensor, right: Tensor) -> Tensor:
    """-log p of the right one under scores [N, side] -> [N]."""
    return -scores.log_softmax(dim=-1).gather(1, right[:, None])[:, 0]
