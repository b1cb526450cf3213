"""The knowledge memory of our models, as the doctor's checks of memories ask for it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.doctor.views import MemoryReads, MemoryView
from minilm.knowledge.store import KnowledgeStore
from minilm.models import retrieval
from minilm.models.knowledge import Knowledge
from minilm.models.memory import MemoryLayer, MemoryPlan

# The queries of all memory layers begin in the space of the keys, which they share.
SAME_START = ("blocks.*.memory.retriever.from_code",)

MOST_KEYS = (
    20_000_000  # numbers in the joined keys of all entries: beyond, scores are added up from the halves
)


def memory_view(model: nn.Module) -> MemoryView | None:
    """The last memory layer; None for a model without one, and for one that is told what to read.

    States come and results go on the CPU, wherever the model is. A state here is what the layer sees of a token: its
    normed hidden state and the code of its window, joined.
    """
    if not isinstance(model, Knowledge) or model.store is None or model.config.retrieval == "oracle":
        return None
    ours = _Ours(model)
    store = model.store
    return MemoryView(
        states=ours.states,
        queries=ours.queries,
        keys=ours.keys,
        retrieve=ours.retrieve,
        scores=ours.scores if store.num_slots * 2 * model.config.key_dim > MOST_KEYS else None,
        num_entries=store.num_slots,
        columns=store.side,
        occupied=lambda: model.store.lengths > 0,
        values=ours.values,
        edit=ours.edit,
        silenced=ours.silenced,
        reads=ours.reads,
        pad_id=0 if ours.zero_is_padding() else None,
    )


def without_gradient(model: nn.Module) -> tuple[str, ...]:
    """What the checks' rows, which name no entry, cannot reach: a memory that reads the named entry alone."""
    told = isinstance(model, Knowledge) and model.config.retrieval == "oracle"
    return ("blocks.*.memory.*",) if told else ()


def entries_of(model: nn.Module) -> Callable[[], Sequence[np.ndarray]] | None:
    """The token ids of each entry that a model reads, for `DataView.knowledge`; None for a model without a store."""
    store = getattr(model, "store", None)
    if not isinstance(store, KnowledgeStore):
        return None

    def entries() -> list[np.ndarray]:
        held = store.lengths > 0
        ids, lengths = store.ids[held].numpy(), store.lengths[held].tolist()
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]

    return entries


def initial_stds(model: nn.Module) -> dict[str, float]:
    """`Subject.initial_stds` of one of our models: all alike, but for a memory.

    What learns later starts at zero there, and the projection of the codes is orthogonal. The sub-keys are means of
    codes: how far they spread is the store's affair, and no rule is given.
    """
    config: Any = model.config
    std = float(config.init_std)
    if not isinstance(model, Knowledge) or model.store is None:
        return {"*": std}
    own = {"from_code": max(config.key_dim, config.store_code_dim) ** -0.5, "memory.out": 0.0}
    own |= {
        f"retriever.{name}": 0.0 for name in ("from_hidden", "from_state", "reread_hidden", "reread_state")
    }
    names = [name for name, p in model.named_parameters() if p.dim() >= 2 and name != "keys.keys"]
    return {name: next((value for end, value in own.items() if name.endswith(end)), std) for name in names}


class _Ours:
    """The parts of a view, as methods over one model."""

    def __init__(self, model: Knowledge) -> None:
        self.model = model
        self.number = model.config.layers[-1]

    @property
    def layer(self) -> MemoryLayer:
        layer: MemoryLayer = self.model.blocks[self.number].memory  # type: ignore[assignment, union-attr]
        return layer

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def zero_is_padding(self) -> bool:
        """Does no entry hold the id 0 as a token of its own."""
        store = self.model.store
        assert store is not None
        inside = torch.arange(store.width) < store.lengths.unsqueeze(1)
        return not bool(((store.ids == 0) & inside).any())

    # --- from tokens to entries

    def states(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            states, codes = self._given(self.layer.retriever, lambda: self.model(tokens.to(self.device)))[:2]
        return torch.cat((states, codes.to(states.dtype)), dim=1).cpu()

    def _found(self, states: Tensor) -> Any:
        parts = states.to(self.device).split([self.model.config.dim, self.model.config.store_code_dim], dim=1)
        assert self.model.store is not None
        return self.layer.retriever(*parts, self.model.keys, self.model.store.to(self.device), None)

    def queries(self, states: Tensor) -> Tensor:
        """Both halves normed, as they meet the keys; with the temperature in them."""
        (halves,) = self._given(self.model.keys, lambda: self._found(states))
        dim = halves.shape[-1]
        scale = self.layer.retriever.log_scale[0].exp() / dim**0.5
        return (F.layer_norm(halves, (dim,)) * scale).flatten(1).cpu()

    def keys(self) -> Tensor:
        halves = self.model.keys.keys
        rows, columns = F.layer_norm(halves, halves.shape[-1:]).cpu()
        side = len(rows)
        return torch.cat((rows.repeat_interleave(side, 0), columns.repeat(side, 1)), dim=1)

    def retrieve(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates that are looked at again: they are what product keys find."""
        found, count = self._found(states), self.model.config.num_candidates
        scores, slots = retrieval.best_cells(found.rows, found.columns, count)
        return slots.cpu(), scores.cpu()

    def scores(self, states: Tensor) -> Tensor:
        rows, columns = (self.queries(states).chunk(2, dim=1)[h] @ self._half(h).T for h in (0, 1))
        return (rows.unsqueeze(2) + columns.unsqueeze(1)).flatten(1)

    def _half(self, half: int) -> Tensor:
        keys = self.model.keys.keys[half]
        return F.layer_norm(keys, keys.shape[-1:]).cpu()

    # --- from entries to what is read

    def values(self, entries: Tensor) -> Tensor:
        """Each entry as the only one that is read, by the query zero: its tokens and the null slot weigh alike."""
        layer, store = self.layer, self.model.store
        assert store is not None
        example = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        plan: MemoryPlan = self._given(layer, lambda: self.model(example))[1]
        x = torch.zeros(1, len(entries), self.model.config.dim, device=self.device)
        codes = x.new_zeros(1, len(entries), store.code_dim)
        labels = entries.to(self.device)[None]
        alone = dataclasses.replace(plan, codes=codes, needed=labels, oracle=True, record=False)
        read: Tensor = layer(x.to(self.model.embedding.weight.dtype), alone).x[0]
        return read.cpu()

    def edit(self, entry: int, ids: Sequence[int]) -> Callable[[], None]:
        store = self.model.store
        assert store is not None
        words = torch.tensor(list(ids)[: store.width], dtype=store.ids.dtype)
        changed, lengths = store.ids.clone(), store.lengths.clone()
        changed[entry] = 0
        changed[entry, : len(words)] = words
        lengths[entry] = len(words)
        self.model.store = _with(store, ids=changed, lengths=lengths)

        def undo() -> None:
            self.model.store = store

        return undo

    def silenced(self, tokens: Tensor) -> Tensor:
        store = self.model.store
        assert store is not None
        with self._reading(_with(store, lengths=torch.zeros_like(store.lengths))):
            logits: Tensor = self.model(tokens.to(self.device)).logits
        return logits.cpu()

    def reads(self, tokens: Tensor, segments: Tensor) -> MemoryReads:
        tokens, segments = tokens.to(self.device), segments.to(self.device)
        keep = segments > 0
        read = self.model.reads(tokens, segments)[1][self.number]
        return MemoryReads(
            entries=read.slots[keep].cpu(),
            weights=read.weights[keep].cpu(),
            null=read.null[keep].cpu(),
            gates=read.gates[keep].float().mean(dim=-1).cpu(),
        )

    @contextlib.contextmanager
    def _reading(self, store: KnowledgeStore) -> Iterator[None]:
        before = self.model.store
        self.model.store = store
        try:
            yield
        finally:
            self.model.store = before

    @staticmethod
    def _given(part: nn.Module, run: Callable[[], Any]) -> tuple[Any, ...]:
        """What `part` is called with while `run` runs, the last time."""
        seen: list[tuple[Any, ...]] = []
        handle = part.register_forward_pre_hook(lambda _, given: seen.append(given))
        try:
            run()
        finally:
            handle.remove()
        return seen[-1]


def _with(store: KnowledgeStore, **tensors: Tensor) -> KnowledgeStore:
    """The store with other contents, for a look at what they do: its checksums are those of the real one."""
    return KnowledgeStore(store.description, {**store.tensors(), **tensors}, store.path)
