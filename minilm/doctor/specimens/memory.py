"""A small product-key memory in place of a feed-forward, in plain torch (after Lample et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor.specimens.model import FeedForward, Model, Size
from minilm.doctor.specimens.subject import subject
from minilm.doctor.subject import Subject
from minilm.doctor.views import MemoryReads, MemoryView

HALF, LENGTH, TOP = 12, 5, 4  # keys of each half (144 entries), token ids of an entry, entries that are read
PAD = 0


class Memory(nn.Module):
    """x [..., D] -> x-shaped: the best entries by product keys, their texts averaged, weighted, gated."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.query = nn.Linear(size.dim, 2 * size.dim // 2, bias=False)
        self.keys = nn.Parameter(torch.randn(2, HALF, size.dim // 2))
        self.words = nn.Embedding(size.vocab_size, size.dim)
        self.out = nn.Linear(size.dim, size.dim, bias=False)
        self.gate = nn.Linear(size.dim, 1)
        generator = torch.Generator().manual_seed(5)
        texts = torch.randint(3, size.vocab_size, (HALF * HALF, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (HALF * HALF, 1), generator=generator)
        self.register_buffer("texts", torch.where(torch.arange(LENGTH) < lengths, texts, PAD))
        self.seen: Tensor | None = None  # the states of the last call
        self.used: MemoryReads | None = None  # and what it read

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().flatten(0, -2)
        entries, scores = self.retrieve(x)
        weights, gate = self.weights(scores), self.gated(x)
        read = (weights.unsqueeze(-1) * self.values(entries)).sum(-2)
        flat = (t.detach().flatten(0, -2) for t in (entries, weights))
        self.used = MemoryReads(*flat, gates=gate.detach().flatten())
        return gate * self.out(read)

    def queries(self, x: Tensor) -> Tensor:
        return self.query(x)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the two halves, each [..., HALF]."""
        first, second = self.queries(x).chunk(2, dim=-1)
        return first @ self.keys[0].T, second @ self.keys[1].T

    def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The TOP best entries of all: the best pair is made of the TOP best of each half."""
        one, two = self.halves(x)
        (a, i), (b, j) = one.topk(TOP), two.topk(TOP)
        sums = (a.unsqueeze(-1) + b.unsqueeze(-2)).flatten(-2)
        scores, place = sums.topk(TOP)
        return self.entry(i.gather(-1, place // TOP), j.gather(-1, place % TOP)), scores

    def entry(self, i: Tensor, j: Tensor) -> Tensor:
        return i * HALF + j

    def all_keys(self) -> Tensor:
        """[E, D] in the order of the entries: entry i * HALF + j has halves i and j."""
        first, second = self.keys
        return torch.cat([first.repeat_interleave(HALF, 0), second.repeat(HALF, 1)], dim=1)

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def values(self, entries: Tensor) -> Tensor:
        ids = self.texts[entries]
        real = (ids != PAD).unsqueeze(-1)
        return (self.words(ids) * real).sum(-2) / real.sum(-2).clamp(min=1)

    def gated(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid()

    def edit(self, entry: int, ids: Sequence[int]) -> None:
        self.texts[entry] = torch.tensor([*ids, *[PAD] * (LENGTH - len(ids))][:LENGTH])


class WithMemory(nn.Module):
    """The feed-forward of a block with a memory beside it."""

    memory: type[Memory] = Memory

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.ffn, self.store = FeedForward(size), self.memory(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x) + self.store(x)


def memory_subject(memory: type[Memory] = Memory, **parts: Any) -> Subject:
    """The specimen with a memory in each block; the memory of the last block is handed over."""

    class Holding(WithMemory):
        pass

    Holding.memory = memory
    made = subject(ffn=Holding, **parts)
    module = made.module
    assert isinstance(module, Model)
    store: Memory = module.layers[-1].ffn.store

    def states(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            module(tokens)
        assert store.seen is not None
        return store.seen

    def silenced(tokens: Tensor) -> Tensor:
        kept = [layer.ffn.store.texts.clone() for layer in module.layers]
        try:
            for layer in module.layers:
                layer.ffn.store.texts.fill_(PAD)
            return module(tokens)
        finally:
            for layer, texts in zip(module.layers, kept, strict=True):
                layer.ffn.store.texts.copy_(texts)

    def reads(tokens: Tensor, segments: Tensor) -> MemoryReads:
        with torch.no_grad():
            module(tokens, segments)
        assert store.used is not None and store.used.gates is not None
        keep = segments.flatten() > 0
        return MemoryReads(store.used.entries[keep], store.used.weights[keep], gates=store.used.gates[keep])

    view = MemoryView(
        states=states,
        queries=store.queries,
        keys=store.all_keys,
        retrieve=store.retrieve,
        values=store.values,
        edit=store.edit,
        silenced=silenced,
        reads=reads,
        columns=HALF,
        pad_id=PAD,
    )
    return made.but(memory=view)
