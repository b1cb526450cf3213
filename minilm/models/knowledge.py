"""The knowledge memory: layers that look entries up in a store of short texts, read them, and can show what they read.

    knowledge           `original` with memory layers between attention and feed-forward
    no_ffn_knowledge    `no_ffn` with the same: all knowledge that is not in attention is in the store

The store (`minilm knowledge build`) is text, not weights: an entry can be read by people, replaced or deleted, and the
model's answer follows without training. It belongs to no state dict; a checkpoint keeps its fingerprint, and refuses
another store. `model.memory: none` is the plain model bit for bit, and so is the memory at the first step.

What is trained on: the loss of the language model, where the data say which entry a target needs (`Batch.entries`)
the retrieval losses of `retrieval.py` as the auxiliary loss `retrieval`, and `index`: every fourth token also asks for
an entry drawn by lot with that entry's own code, so that the entries that no text names are found, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.knowledge.store import KnowledgeStore
from minilm.models.attention import Plan
from minilm.models.base import Output
from minilm.models.cache import KVCache
from minilm.models.knowledge_config import RANDOM, KnowledgeConfig, NoFFNKnowledgeConfig, open_store
from minilm.models.memory import (
    AttentionMemoryBlock,
    MemoryBlock,
    MemoryLayer,
    MemoryOutput,
    MemoryPlan,
    Read,
    ReadsMemory,
)
from minilm.models.memory_rows import cached_codes, codes_of, drawn, draws, slots_of, uneven
from minilm.models.memory_usage import collected, usage_columns
from minilm.models.no_ffn import NoFFN
from minilm.models.original import Original
from minilm.models.parts import SwiGLU
from minilm.models.reading import projected
from minilm.models.retrieval import RetrievalShape, SubKeys


class Knowledge(Original):
    """model(inputs [B, L], segments, positions, cache, entries) -> Output.

    entries [B, L]: source row of the entry that the target of each position needs, -1 where unknown (`Batch.entries`).
    """

    takes_entries = True
    config: KnowledgeConfig

    def __init__(self, config: KnowledgeConfig) -> None:
        # On the meta device only shapes are asked for: there is nothing to read with.
        wanted = config.layers and torch.get_default_device().type != "meta"
        store = open_store(config) if wanted else None
        if store is not None and config.store != RANDOM:
            # By where it is, not as seen from here: a checkpoint is also opened from elsewhere.
            place = str(Path(config.store).expanduser().resolve())
            config = dataclasses.replace(config, store=place, store_fingerprint=store.fingerprint)
        super().__init__(config)
        # No module and no buffer: nothing casts it, averages it, broadcasts it or writes it into a checkpoint.
        self.store = store
        self.recorded: dict[int, Read] | None = None
        if config.layers:
            self.keys = SubKeys(config.store_side, config.store_code_dim, config.key_dim)
            self.keys.requires_grad_(not config.freeze_keys)
        if store is not None:
            self._initialise_memory(store)

    def block(self, layer: int) -> nn.Module:
        if layer not in self.config.layers:
            return super().block(layer)
        return self.reading(layer, MemoryLayer(self.config, *_shape(self.config)))

    def reading(self, layer: int, memory: MemoryLayer) -> nn.Module:
        """Block number `layer` with a memory."""
        ffn = SwiGLU(self.config.dim, self.config.hidden_dim)
        return MemoryBlock(self.config, layer, ffn).with_memory(memory)

    def initialise(self) -> None:
        """The backbone as without a memory, from the same draws; the memory from a generator of its own."""
        super().initialise()
        if getattr(self, "store", None) is not None:
            self._initialise_memory(self.store)

    @torch.no_grad()
    def _initialise_memory(self, store: KnowledgeStore) -> None:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        projection = self.keys.initialise(store, generator)
        for block in self.blocks:
            if isinstance(block, ReadsMemory):
                block.memory.initialise(projection, self.config.init_std, generator)

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        entries: Tensor | None = None,
        documents: int | None = None,
    ) -> Output:
        return self._forward(inputs, segments, positions, cache, entries, documents)

    def reads(
        self,
        inputs: Tensor,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        entries: Tensor | None = None,
    ) -> tuple[Output, dict[int, Read]]:
        """A forward pass, and what each memory layer (by number of its block) read for each token."""
        self.recorded = {}
        try:
            return self(inputs, segments, positions, cache, entries), self.recorded
        finally:
            self.recorded = None

    def extended(self, shared: Plan, inputs: Tensor, segments: Tensor | None, entries: Tensor | None) -> Plan:
        if self.store is None:
            return shared
        config, store = self.config, self.store.to(inputs.device)
        table, own = store.token_codes(), self.embedding.weight
        layers = [block.memory for block in self.blocks if isinstance(block, ReadsMemory)]
        weights = [weight for layer in layers for weight in (layer.key, layer.value)]
        tables = projected(own, weights, len(layers), config.norm_eps)
        if shared.cache is None:
            codes = codes_of(table, inputs, segments, config.window, config.window_decay)
        else:
            codes = cached_codes(table, shared.cache, inputs.shape[1], config.window, config.window_decay)
        return MemoryPlan(
            **{f.name: getattr(shared, f.name) for f in dataclasses.fields(shared)},
            store=store,
            keys=self.keys,
            embedding=_normed(own, config.norm_eps) if tables is None else None,
            tables=None if tables is None else dict(zip(layers, tables, strict=True)),
            codes=codes,
            needed=None if entries is None else slots_of(entries, store),
            drawn=drawn(inputs, _given(segments, inputs), store) if self._draws(shared) else None,
            oracle=config.retrieval == "oracle",
            record=self.recorded is not None or self.collector is not None,
        )

    def _draws(self, shared: Plan) -> bool:
        """Only in training: the loss over drawn entries tells nothing about the rows."""
        return bool(self.config.index_weight) and self.training and shared.cache is None

    def stack(self, x: Tensor, plan: Plan, segments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        if self.store is None:
            return super().stack(x, plan, segments)
        assert isinstance(plan, MemoryPlan)
        outputs: list[MemoryOutput] = []
        for number, block in enumerate(self.blocks):
            passed = self.passed(block, x, plan)
            if not isinstance(passed, MemoryOutput):
                x = passed
                continue
            x = passed.x
            outputs.append(passed)
            self._noted(number, passed, plan, segments)
        return x, {} if plan.cache is not None else self._losses(outputs, plan, segments)

    def _losses(
        self, outputs: list[MemoryOutput], plan: MemoryPlan, segments: Tensor | None
    ) -> dict[str, Tensor]:
        """Means over the tokens that `counted` counts, and over the layers; weighted."""
        config, auxiliary = self.config, {}
        if plan.drawn is not None:
            count = max(1, len(plan.drawn[0])) * len(outputs)
            auxiliary["index"] = (
                config.index_weight * torch.stack([o.index_loss for o in outputs]).sum() / count
            )
        if plan.needed is not None and config.retrieval_weight:
            count = (plan.needed >= 0).sum().clamp(min=1) * len(outputs)
            total = torch.stack([output.losses.sum() for output in outputs]).sum()
            auxiliary["retrieval"] = config.retrieval_weight * total / count
        if config.memory_balance_weight:
            keep = torch.ones_like(outputs[0].rows[..., 0]) if segments is None else (segments > 0)
            layers = [uneven(part, keep) for output in outputs for part in (output.rows, output.columns)]
            count = keep.sum().clamp(min=1) * len(layers)
            auxiliary["memory_balance"] = config.memory_balance_weight * torch.stack(layers).sum() / count
        return auxiliary

    def counted(self, segments: Tensor, entries: Tensor | None = None) -> dict[str, Tensor]:
        counts = {}
        if self.store is not None and self.config.index_weight and self.training:
            counts["index"] = draws(segments).sum().double()
        if self.store is not None and entries is not None and self.config.retrieval_weight:
            counts["retrieval"] = (entries >= 0).sum().double()
        if self.store is not None and self.config.memory_balance_weight:
            counts["memory_balance"] = (segments > 0).sum().double()
        return counts

    def _noted(self, number: int, passed: MemoryOutput, plan: MemoryPlan, segments: Tensor | None) -> None:
        if passed.read is None:
            return
        if self.recorded is not None:
            self.recorded[number] = passed.read
        if self.collector is not None and plan.cache is None:
            assert plan.store is not None
            keep = torch.ones_like(passed.read.null, dtype=torch.bool) if segments is None else segments > 0
            for name, value in collected(passed.read, keep, plan.needed, plan.store).items():
                self.collect(f"memory/blocks.{number}/{name}", value)

    def columns(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """As of every model, and how the store was used."""
        own = {name: value for name, value in sums.items() if name.startswith("memory/")}
        rest = {name: value for name, value in sums.items() if name not in own}
        found = super().columns(rest)
        return found | usage_columns(own, self.store) if self.store is not None else found


class NoFFNKnowledge(Knowledge, NoFFN):
    """As `Knowledge`, from blocks of attention alone."""

    config: NoFFNKnowledgeConfig

    def reading(self, layer: int, memory: MemoryLayer) -> nn.Module:
        return AttentionMemoryBlock(self.config, self.attention(layer)).with_memory(memory)


def _shape(config: KnowledgeConfig) -> tuple[RetrievalShape, int, int, int]:
    retriever = RetrievalShape(
        config.dim,
        config.store_code_dim,
        config.key_dim,
        config.router_dim,
        config.num_candidates,
        config.num_read,
        config.state_gradient,
    )
    return retriever, config.memory_heads, config.memory_head_dim, config.store_width


def _given(segments: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ones_like(inputs) if segments is None else segments


def _normed(table: Tensor, eps: float) -> Tensor:
    precise = table if table.dtype == torch.float64 else table.float()
    return F.rms_norm(precise, table.shape[1:], eps=eps).to(table.dtype)
