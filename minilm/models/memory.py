"""A layer that reads entries of a knowledge store: gated cross-attention over the tokens of the retrieved entries.

Keys and values are made in vocabulary space: a projection of an embedded token is a row of the projected embedding
table, W E[ids] = (W E)[ids] (E: each row normed, as a block norms its input). So the table is projected once per
forward pass, and an entry's keys are looked up instead of computed: about a tenth of the work. The embedding is the
model's own, and no embedded entry is kept anywhere: there is nothing that could go stale when the embedding learns.

    keys, values    of token j of entry i: (E Wk^T)[id] + position j; one head for keys and values, several for queries
    scores          query . key / sqrt(head size) + bias of the entry (see retrieval.py)
    null slot       a learnt key and value beside them: "nothing here is of use" can be said, and no softmax is empty
    out             x + sum over heads of sigmoid(gate) x (what the head read) through `out`, which starts as zero

Nothing else in that path starts at zero: with a gate of zero besides, no gradient would ever come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.knowledge.store import KnowledgeStore
from minilm.models.attention import Plan
from minilm.models.base import ModelConfig
from minilm.models.parts import AttentionBlock, Block, RMSNorm
from minilm.models.reading import read
from minilm.models.retrieval import RetrievalShape, Retrieved, Retriever, SubKeys
from minilm.onednn import product


@dataclass(frozen=True)
class MemoryPlan(Plan):
    """A plan with what the memory layers of one forward pass share.

    store      on the model's device
    keys       the sub-keys of the grid
    embedding  [V, D] the model's own table, each row normed; None where there are `tables`
    tables     of each memory layer: keys and values of all tokens [V, 2 d], or None: the layer makes them
    codes      [B, L, code_dim] content of the last tokens of each token's document, itself included
    drawn      codes [M, code_dim] that ask for entries drawn by lot and their slots [M], or None
    needed     [B, L] slot that each token needs, -1 where unknown, or None
    oracle     read the labelled entry and nothing else, to see what perfect retrieval would give
    record     return what was read (for statistics and inspection)
    """

    store: KnowledgeStore | None = None
    keys: SubKeys | None = None
    embedding: Tensor | None = None
    tables: Mapping[MemoryLayer, Tensor] | None = None
    codes: Tensor | None = None
    drawn: tuple[Tensor, Tensor] | None = None
    needed: Tensor | None = None
    oracle: bool = False
    record: bool = False


class Read(NamedTuple):
    """What one layer read, for B x L tokens.

    slots    [B, L, m] the entries
    weights  [B, L, m] share of the attention on each entry, mean over heads
    null     [B, L] share on the null slot; with the weights it adds up to 1
    gates    [B, L, heads] how far each head's reading was let through
    tokens   [B, L, m, W] share on each token of each entry
    """

    slots: Tensor
    weights: Tensor
    null: Tensor
    gates: Tensor
    tokens: Tensor


class MemoryOutput(NamedTuple):
    """The stream after a memory layer, what its retriever returned of losses and sub-key scores, and the record."""

    x: Tensor
    losses: Tensor  # [3]
    index_loss: Tensor
    rows: Tensor  # [B, L, side]
    columns: Tensor
    read: Read | None


class MemoryLayer(nn.Module):
    """x [B, L, D] -> MemoryOutput, whose x has the reading added."""

    def __init__(
        self, config: ModelConfig, shape: RetrievalShape, heads: int, head_dim: int, width: int
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.retriever = Retriever(shape)
        # Parameters instead of linear layers: those are drawn by the backbone's initialisation, whose draws must be the
        # same with and without a memory.
        self.query = nn.Parameter(torch.empty(heads * head_dim, config.dim))
        self.key = nn.Parameter(torch.empty(head_dim, config.dim))
        self.value = nn.Parameter(torch.empty(head_dim, config.dim))
        self.key_positions = nn.Parameter(torch.empty(width, head_dim))
        self.value_positions = nn.Parameter(torch.empty(width, head_dim))
        self.null_key = nn.Parameter(torch.empty(head_dim))
        self.null_value = nn.Parameter(torch.empty(head_dim))
        self.null_bias = nn.Parameter(torch.empty(heads))
        self.gate = nn.Parameter(torch.empty(heads, config.dim))
        self.gate_bias = nn.Parameter(torch.empty(heads))
        self.out = nn.Parameter(torch.empty(config.dim, heads * head_dim))

    @torch.no_grad()
    def initialise(self, projection: Tensor, std: float, generator: torch.Generator) -> None:
        """From a generator of the memory's own. `out` is zero: at the first step the model is the plain one."""
        self.retriever.initialise(projection, std, generator)
        self.norm.weight.fill_(1.0)
        drawn = (self.query, self.key, self.value, self.gate, self.key_positions, self.value_positions)
        for weight in (*drawn, self.null_key, self.null_value):
            weight.normal_(0.0, std, generator=generator)
        self.null_bias.zero_()
        self.gate_bias.fill_(-1.0)
        self.out.zero_()

    def forward(self, x: Tensor, plan: MemoryPlan) -> MemoryOutput:
        assert plan.store is not None and plan.keys is not None and plan.codes is not None
        rows, length = x.shape[:2]
        states = self.norm(x)
        labels = None if plan.needed is None else plan.needed.flatten()
        found = self.retriever(states.flatten(0, 1), plan.codes.flatten(0, 1), plan.keys, plan.store, labels)
        if plan.oracle:
            found = _known(found, labels)
        mixed, attended = self._read(states.flatten(0, 1), found, plan)
        gates = torch.sigmoid(F.linear(states, self.gate, self.gate_bias))  # [B, L, heads]
        gated = mixed.unflatten(0, (rows, length)) * gates.unsqueeze(-1)
        x = x + product(gated.flatten(2), self.out)
        shape = (rows, length)
        read = _record(found, attended.detach(), gates.detach(), shape) if plan.record else None
        index_loss = found.losses.new_zeros(())
        if plan.drawn is not None:
            index_loss = self.retriever.index_loss(*plan.drawn, plan.keys)
        return MemoryOutput(
            x,
            found.losses,
            index_loss,
            found.rows.unflatten(0, shape),
            found.columns.unflatten(0, shape),
            read,
        )

    def _read(self, states: Tensor, found: Retrieved, plan: MemoryPlan) -> tuple[Tensor, Tensor]:
        """States [N, D] -> what each head read [N, heads, head_dim], and the attention [N, heads, m x W + 1]."""
        store = plan.store
        assert store is not None
        queries = product(states, self.query).unflatten(-1, (self.heads, self.head_dim))
        queries = queries / math.sqrt(self.head_dim)
        ids = store.ids[found.slots].long()  # [N, m, W]
        width = torch.arange(ids.shape[-1], device=ids.device)
        there = width < store.lengths[found.slots].unsqueeze(-1)  # [N, m, W]
        bias = found.scores.unsqueeze(-1).masked_fill(~there, -math.inf)
        # Positions are added to the products, which are smaller than keys and values: q (k + p) = q k + q p.
        positions = queries @ self.key_positions.to(queries.dtype).T  # [N, heads, W]
        # In float32: a difference of two biases of 20 would be lost in 16 bits.
        null = torch.einsum("nhd,d->nh", queries, self.null_key.to(queries.dtype))
        null = null.to(bias.dtype) + self.null_bias
        mixed, of_positions, of_null, attended = read(queries, self._table(plan), ids, bias, positions, null)
        mixed = mixed + of_positions.to(mixed.dtype) @ self.value_positions.to(mixed.dtype)
        return mixed + of_null * self.null_value.to(mixed.dtype), attended

    def _table(self, plan: MemoryPlan) -> Tensor:
        """Keys and values of all tokens, [V, 2 d]."""
        if plan.tables is not None:
            return plan.tables[self]
        assert plan.embedding is not None
        return product(plan.embedding, torch.cat((self.key, self.value)))


def _known(found: Retrieved, labels: Tensor | None) -> Retrieved:
    """The labelled entry in place of what was retrieved; the null slot alone where there is no label."""
    if labels is None:
        return found._replace(scores=torch.full_like(found.scores, -math.inf))
    slots = torch.where(labels >= 0, labels, 0)[:, None]
    scores = torch.where(labels >= 0, 0.0, -math.inf)[:, None].to(found.scores.dtype)
    return found._replace(slots=slots, scores=scores)


def _record(found: Retrieved, attended: Tensor, gates: Tensor, shape: tuple[int, int]) -> Read:
    share = attended.float().mean(dim=1)  # over heads
    of_entries, null = share.split([share.shape[1] - 1, 1], dim=1)
    tokens = of_entries.unflatten(-1, (found.slots.shape[1], -1))  # [N, m, W]
    parts = found.slots, tokens.sum(dim=-1), null[:, 0], gates.flatten(0, 1), tokens
    return Read(*(part.unflatten(0, shape) for part in parts))


class ReadsMemory(nn.Module):
    """A block that reads between its halves: after attention, which gathers what the query is about."""

    memory: MemoryLayer

    def with_memory(self, memory: MemoryLayer) -> ReadsMemory:
        self.memory = memory
        return self

    def forward(self, x: Tensor, plan: MemoryPlan) -> MemoryOutput:
        output = self.memory(self.attended(x, plan), plan)
        return output._replace(x=self.fed(output.x))


class MemoryBlock(ReadsMemory, Block):
    """Attention, memory, feed-forward; x [B, L, D] -> MemoryOutput."""


class AttentionMemoryBlock(ReadsMemory, AttentionBlock):
    """Attention, memory; x [B, L, D] -> MemoryOutput."""
