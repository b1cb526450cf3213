"""Product-key values: in one middle layer a large table of learnt values takes the place of the feed-forward.

Each token reads the `top_values` of side x side values that its query fits best, by product keys (Lample et al., arXiv
1907.05242), several heads at once, and passes their weighted sum through a gate (Memory+, arXiv 2412.09764):

    out( sum over heads and chosen i of softmax(score)_i value_i  *  silu(gate x) )

Queries and keys are normed by LayerNorm, never by BatchNorm: batch statistics let a token see later ones, and differ
between training and evaluation. Scores are float32. The table is a plain parameter whose gradient is dense; a value
that nobody chose has a zero there. Its rows are seen far more seldom than other weights, so they do not decay and learn
`value_rate` times as fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from minilm.models import register
from minilm.models.original import Original, OriginalConfig
from minilm.models.parts import Block, Linear, SwiGLU
from minilm.models.product_keys import best_cells

# Values on a side of the grid: 65,536 values at the reference size, 33.6 M parameters, 0.5 GB of training state.
_SIDES = {"tiny": 8, "6m": 128, "26m": 256, "100m": 256, "350m": 512, "1b": 512}


@register("pkm")
@dataclass(frozen=True, kw_only=True)
class PKMConfig(OriginalConfig):
    """Settings of a model with product-key values; the defaults are the reference size."""

    name: Literal["pkm"] = "pkm"  # type: ignore[assignment]
    value_side: Annotated[int, Field(gt=1, description="the table has value_side^2 values")] = 256
    value_heads: Annotated[int, Field(gt=0, description="queries of a token")] = 2
    top_values: Annotated[int, Field(gt=0, description="values that a query reads")] = 16
    value_key_dim: Annotated[int, Field(gt=0, description="size of a sub-key")] = 128
    value_layer: Annotated[
        int | None, Field(description="the block with the table, from 0; default: the middle one")
    ] = None
    value_place: Annotated[
        Literal["replace", "add"], Field(description="in place of the feed-forward, or beside it")
    ] = "replace"
    value_rate: Annotated[
        float, Field(gt=0, description="learning rate of the values, as a multiple of the others'")
    ] = 4.0

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        size: {
            **fields,
            "value_side": _SIDES[size],
            **({"value_key_dim": 16, "top_values": 4} if size == "tiny" else {}),
        }
        for size, fields in OriginalConfig.sizes.items()
    }

    @property
    def layer(self) -> int:
        return self.num_layers // 2 if self.value_layer is None else self.value_layer

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if not 0 <= self.layer < self.num_layers:
            found.append(("value_layer", f"{self.layer} is none of the blocks 0 to {self.num_layers - 1}"))
        if self.top_values > self.value_side**2:
            found.append(("top_values", f"{self.top_values} of only {self.value_side**2} values"))
        return found

    def parameter_groups(self) -> dict[str, int]:
        groups = super().parameter_groups()
        if self.value_place == "replace":
            groups["feed-forward"] -= 3 * self.dim * self.hidden_dim
        groups["values"] = self.value_side**2 * self.dim
        keys = self.value_heads * 2 * self.value_key_dim * (self.dim + self.value_side)
        groups["value keys"] = keys + 2 * self.dim * self.dim
        return groups

    def active_parameters(self) -> int:
        """Of the values those that a token reads."""
        return self.num_parameters() - (self.value_side**2 - self.value_heads * self.top_values) * self.dim

    def flops_per_token(self, sequence_length: int) -> int:
        groups = self.parameter_groups()
        read = self.value_heads * self.top_values * self.dim
        products = groups["attention"] + groups["feed-forward"] + groups["value keys"] + read
        return 2 * (products + self.vocab_size * self.dim) + 2 * self.num_layers * self.dim * (
            sequence_length + 1
        )

    def module(self) -> PKM:
        return PKM(self)


class PKM(Original):
    """model(inputs [B, L], segments, positions, cache) -> Output, one of its blocks with a table of values."""

    config: PKMConfig

    def block(self, layer: int) -> nn.Module:
        if layer != self.config.layer:
            return super().block(layer)
        values = Values(self.config)
        if self.config.value_place == "replace":
            return Block(self.config, layer, values)
        return Block(self.config, layer, Beside(SwiGLU(self.config.dim, self.config.hidden_dim), values))

    @torch.no_grad()
    def initialise(self) -> None:
        """As `original`; keys and values from the same normal(0, init_std)."""
        super().initialise()
        for module in self.modules():
            if isinstance(module, Values):
                module.keys.normal_(0.0, self.config.init_std)
                module.values.normal_(0.0, self.config.init_std)


class Beside(nn.Module):
    """Two feed-forwards of the same input, added."""

    def __init__(self, ffn: nn.Module, values: nn.Module) -> None:
        super().__init__()
        self.ffn, self.values = ffn, values

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x) + self.values(x)


class Values(nn.Module):
    """x [B, L, D] -> [B, L, D]: what each token reads from the table."""

    def __init__(self, config: PKMConfig) -> None:
        super().__init__()
        self.heads, self.top = config.value_heads, config.top_values
        key_dim, side = config.value_key_dim, config.value_side
        self.query = Linear(config.dim, self.heads * 2 * key_dim)
        self.keys = nn.Parameter(torch.empty(self.heads, 2, side, key_dim))
        self.values = nn.Parameter(torch.empty(side * side, config.dim))
        self.gate = Linear(config.dim, config.dim)
        self.out = Linear(config.dim, config.dim)
        self.tables = {"values": config.value_rate}  # name -> multiple of the learning rate; no decay
        # Stored as small as every weight; the mean of the values read is then as large as a token's embedding.
        self.scale = math.sqrt(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        slots, weights = self.chosen(x.flatten(0, 1))  # [N, heads, k]
        read = F.embedding_bag(
            slots.flatten(1),
            self.values,
            per_sample_weights=weights.flatten(1).to(self.values.dtype),
            mode="sum",
        )
        read = (self.scale * read).to(x.dtype).view_as(x)
        return self.out(read * F.silu(self.gate(x)))

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """States [N, D] -> the slots that each head reads, and their weights, [N, heads, k] both; float32 inside."""
        queries = self.query(x).unflatten(-1, (self.heads, 2, -1))  # [N, heads, 2, key_dim]
        with torch.autocast(x.device.type, enabled=False):
            precise = torch.float64 if queries.dtype == torch.float64 else torch.float32
            width = queries.shape[-1:]
            queries = F.layer_norm(queries.to(precise), width) / math.sqrt(width[0])
            keys = F.layer_norm(self.keys.to(precise), width)
            rows, columns = (
                torch.einsum("nhd,hsd->nhs", queries[:, :, half], keys[:, half]) for half in (0, 1)
            )
            scores, slots = best_cells(rows, columns, self.top)
            return slots, scores.softmax(dim=-1)
