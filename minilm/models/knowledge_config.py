"""Settings of the models with a knowledge memory, and the store that they name (the models: knowledge.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from minilm.errors import CheckpointError, ConfigError, listed
from minilm.knowledge.store import KnowledgeStore
from minilm.models import register
from minilm.models.no_ffn import NoFFNConfig
from minilm.models.original import OriginalConfig

RANDOM = "random"  # in place of a folder: entries of random tokens, for tests and timing


def _sizes(sizes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    small = {
        "store": RANDOM,
        "store_side": 16,
        "store_width": 8,
        "store_code_dim": 16,
        "key_dim": 16,
        "router_dim": 16,
        "num_candidates": 16,
        "memory_head_dim": 8,
        "memory_heads": 2,
    }
    return {size: {**fields, **(small if size == "tiny" else {})} for size, fields in sizes.items()}


@register("knowledge")
@dataclass(frozen=True, kw_only=True)
class KnowledgeConfig(OriginalConfig):
    """Settings of a model with a knowledge memory; the backbone is `original`."""

    name: Literal["knowledge", "no_ffn_knowledge"] = "knowledge"  # type: ignore[assignment]
    memory: Annotated[
        Literal["knowledge", "none"], Field(description="none: the plain model, without a store")
    ] = "knowledge"
    store: Annotated[
        str, Field(description="folder of the knowledge store; random: entries of random tokens, for tests")
    ] = ""
    store_fingerprint: Annotated[
        str, Field(description="of the store that must be found there; set by a checkpoint")
    ] = ""
    store_side: Annotated[int, Field(gt=1, description="rows and columns of the store's grid")] = 1024
    store_width: Annotated[int, Field(gt=0, description="tokens of an entry of the store")] = 32
    store_code_dim: Annotated[int, Field(gt=0, description="length of the store's codes")] = 64
    memory_layers: Annotated[
        list[int] | None,
        Field(description="blocks with a memory, from 0; default: at 3/8 and 6/8 of the depth"),
    ] = None
    memory_heads: Annotated[int, Field(gt=0, description="query heads of the reading")] = 8
    memory_head_dim: Annotated[int, Field(gt=0, description="size of such a head")] = 64
    num_read: Annotated[int, Field(gt=0, description="entries that a token reads")] = 4
    num_candidates: Annotated[
        int, Field(gt=0, description="entries found by product keys that are looked at exactly")
    ] = 64
    key_dim: Annotated[int, Field(gt=0, description="size of a sub-key")] = 128
    router_dim: Annotated[int, Field(gt=0, description="inner width of the retriever's queries")] = 256
    window: Annotated[
        int, Field(gt=0, description="last tokens whose content looks for entries (same document)")
    ] = 16
    window_decay: Annotated[
        float, Field(gt=0, le=1, description="weight of a token in that window, per step back")
    ] = 0.95
    retrieval: Annotated[
        Literal["learned", "oracle"],
        Field(description="oracle reads the labelled entry: an upper bound, not a model"),
    ] = "learned"
    retrieval_weight: Annotated[
        float, Field(ge=0, description="of the retrieval loss where the data name the entry")
    ] = 0.2
    index_weight: Annotated[
        float,
        Field(ge=0, description="of a loss that asks for entries drawn by lot with their own codes"),
    ] = 0.4
    state_gradient: Annotated[
        float,
        Field(
            ge=0, le=1, description="share of the retrieval losses' gradient that goes on to the layers below"
        ),
    ] = 0.1
    memory_balance_weight: Annotated[
        float, Field(ge=0, description="of a loss that spreads the choices over the sub-keys; off by default")
    ] = 0.0
    freeze_keys: Annotated[bool, Field(description="keep the sub-keys as they were made from the store")] = (
        False
    )

    sizes: ClassVar[dict[str, dict[str, Any]]] = _sizes(OriginalConfig.sizes)

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks with a memory. Never the first by default: its query would know one token only."""
        if self.memory == "none":
            return ()
        if self.memory_layers is not None:
            return tuple(self.memory_layers)
        return tuple(sorted({max(1, self.num_layers * eighths // 8) for eighths in (3, 6)}))

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.memory == "none":
            return found
        wrong = [layer for layer in self.layers if not 0 <= layer < self.num_layers]
        if wrong or len(set(self.layers)) != len(self.layers) or not self.layers:
            known = f"different numbers from 0 to {self.num_layers - 1}, at least one"
            found.append(("memory_layers", f"{list(self.layers)} should be {known} (or set memory: none)"))
        cells = self.store_side**2
        if not self.num_read < self.num_candidates < cells:
            order = (
                f"num_read {self.num_read} < num_candidates {self.num_candidates} < slots of the grid {cells}"
            )
            found.append(("num_candidates", f"it must hold that {order}"))
        if self.store_side & (self.store_side - 1):
            found.append(("store_side", f"{self.store_side} is no power of two, so no store has such a grid"))
        return found

    def parameter_groups(self) -> dict[str, int]:
        groups = super().parameter_groups()
        if self.layers:
            code, hidden, keys = self.store_code_dim, self.router_dim, 2 * self.key_dim
            retriever = keys * (code + hidden + self.dim) + hidden * (code + self.dim)
            retriever += code * (hidden + self.dim) + 2
            heads, size = self.memory_heads, self.memory_head_dim
            read = 2 * heads * size * self.dim + 2 * size * (self.dim + self.store_width + 1)
            read += heads * (self.dim + 2) + self.dim
            groups["sub-keys"] = self.store_side * keys
            groups["memory"] = len(self.layers) * (retriever + read)
        return groups

    def table_bytes(self) -> int:
        """Of the store, full: ids, codes, lengths and the two directions of the layout."""
        if not self.layers:
            return 0
        id_bytes = 2 if self.vocab_size <= 32767 else 4
        return self.store_side**2 * (id_bytes * self.store_width + self.store_code_dim + 1 + 4 + 4)

    def flops_per_token(self, sequence_length: int) -> int:
        """Of the memory: its weights, the sub-keys, the codes looked at, and the entries read.

        The projections of the embedding table are made once per forward pass, not per token; they are spread over
        16,384 tokens.
        """
        plain = super().flops_per_token(sequence_length)
        if not self.layers:
            return plain
        groups, heads = self.parameter_groups(), self.memory_heads
        per_token = groups["memory"] - len(self.layers) * self.dim * 2 * self.memory_head_dim
        lookups = len(self.layers) * (
            groups["sub-keys"]
            + self.num_candidates * self.store_code_dim
            + 2 * heads * self.num_read * self.store_width * self.memory_head_dim
            + self.vocab_size * self.dim * 2 * self.memory_head_dim // 16_384
        )
        return plain + 2 * (per_token + lookups)

    def module(self) -> nn.Module:
        from minilm.models.knowledge import Knowledge

        return Knowledge(self)


@register("no_ffn_knowledge")
@dataclass(frozen=True, kw_only=True)
class NoFFNKnowledgeConfig(KnowledgeConfig, NoFFNConfig):
    """Settings of pure attention with a knowledge memory."""

    name: Literal["no_ffn_knowledge"] = "no_ffn_knowledge"  # type: ignore[assignment]

    unused: ClassVar[tuple[str, ...]] = NoFFNConfig.unused
    sizes: ClassVar[dict[str, dict[str, Any]]] = _sizes(NoFFNConfig.sizes)

    def module(self) -> nn.Module:
        from minilm.models.knowledge import NoFFNKnowledge

        return NoFFNKnowledge(self)


def open_store(config: KnowledgeConfig) -> KnowledgeStore:
    """The store that a config names. Raises ConfigError for one that does not fit, naming every difference."""
    if config.store == RANDOM:
        return KnowledgeStore.random(
            config.store_side, config.store_width, config.vocab_size, code_dim=config.store_code_dim
        )
    if not config.store:
        raise ConfigError(
            "model.store is not set: a model with a knowledge memory reads the entries of a store. Make one with "
            "`minilm knowledge build --source FILE --tokenizer DIR --out DIR` and give model.store=DIR, or set "
            "model.memory=none for the plain model (model.store=random: entries of random tokens, for tests)."
        )
    try:
        store = KnowledgeStore.open(config.store)
    except CheckpointError as error:
        if not config.store_fingerprint:
            raise
        raise CheckpointError(
            f"{error} The model was trained with the store of fingerprint {config.store_fingerprint[:16]}: if it lies "
            "elsewhere now, give --store DIR."
        ) from error
    wanted = {
        "store_side": (config.store_side, store.side),
        "store_width": (config.store_width, store.width),
        "store_code_dim": (config.store_code_dim, store.code_dim),
        "vocab_size": (config.vocab_size, store.vocab_size),
    }
    wrong = [
        f"model.{name} is {ours}, the store has {its}" for name, (ours, its) in wanted.items() if ours != its
    ]
    if wrong:
        raise ConfigError(f"The knowledge store {config.store} does not fit the model: {listed(wrong)}")
    if config.store_fingerprint not in ("", store.fingerprint):
        edited = (
            " (it was made from that one by edits)" if store.descends_from(config.store_fingerprint) else ""
        )
        raise ConfigError(
            f"The knowledge store {config.store} is not the one that the model was trained with: its fingerprint is "
            f"{store.fingerprint[:16]}, expected {config.store_fingerprint[:16]}{edited}. Give the store of the "
            "training (model.store), or say that another one is meant: --store DIR where a checkpoint is used."
        )
    return store
