"""Pure attention: the original Transformer without its feed-forwards. What does the feed-forward buy?

A block is one norm, one attention and one residual. Two names, because two questions are asked:

    no_ffn           as many layers as `original`: one thing removed, a third of the parameters left
    no_ffn_matched   as many parameters as `original`: depth in place of width, and more arithmetic

Without feed-forwards the softmax is the only non-linearity besides the norms, and scores grow without a bound in
training: attention-only models diverged without normalised queries and keys (arXiv 2607.18363). The norm here has
no weights, so that it changes no count; `qk_norm: false` is the strict removal. Skip connections stay: without them
pure attention loses rank doubly exponentially with depth (arXiv 2103.03404).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from minilm.models import register
from minilm.models.base import ModelConfig
from minilm.models.original import Original, OriginalConfig
from minilm.models.parts import Attention, AttentionBlock


@register("no_ffn")
@dataclass(frozen=True, kw_only=True)
class NoFFNConfig(OriginalConfig):
    """Settings of pure attention; the defaults are `original` without feed-forward, 8,524,288 parameters."""

    name: Literal["no_ffn", "no_ffn_matched"] = "no_ffn"  # type: ignore[assignment]
    qk_norm: Annotated[
        bool, Field(description="normalise queries and keys by head (without weights) before the rotation")
    ] = True

    unused: ClassVar[tuple[str, ...]] = ("hidden_dim",)
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        size: {field: value for field, value in fields.items() if field != "hidden_dim"}
        for size, fields in OriginalConfig.sizes.items()
    }

    def parameter_groups(self) -> dict[str, int]:
        groups = super().parameter_groups()
        del groups["feed-forward"]
        groups["norms"] = (self.num_layers + 1) * self.dim
        return groups

    def flops_per_token(self, sequence_length: int) -> int:
        products = self.parameter_groups()["attention"] + self.vocab_size * self.dim
        return 2 * products + 2 * self.num_layers * self.dim * (sequence_length + 1)

    def module(self) -> NoFFN:
        return NoFFN(self)


# Layers with which the parameters come nearest to those of `original` of the same size (within 1.6 %).
_MATCHED = {"tiny": 8, "6m": 22, "26m": 34, "100m": 48, "350m": 120, "1b": 95}


@register("no_ffn_matched")
@dataclass(frozen=True, kw_only=True)
class NoFFNMatchedConfig(NoFFNConfig):
    """Pure attention with the parameters of `original`; the defaults are 34 layers, 25,576,960 parameters."""

    name: Literal["no_ffn_matched"] = "no_ffn_matched"  # type: ignore[assignment]
    num_layers: Annotated[int, Field(gt=0, description="number of blocks")] = 34

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        size: {**NoFFNConfig.sizes[size], "num_layers": layers} for size, layers in _MATCHED.items()
    }


class NoFFN(Original):
    """model(inputs [B, L], segments, positions, cache) -> Output, from blocks of attention alone."""

    config: NoFFNConfig

    def block(self, layer: int) -> nn.Module:
        return AttentionBlock(self.config, self.attention(layer))

    def attention(self, layer: int) -> Attention:
        """The attention of block number `layer`."""
        return (NormedAttention if self.config.qk_norm else Attention)(self.config, layer)


class NormedAttention(Attention):
    """Attention whose queries and keys have length sqrt(d) each: no score is above sqrt(d) (arXiv 2010.04245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.eps = config.norm_eps

    def prepared(self, qk: Tensor) -> Tensor:
        precise = qk if qk.element_size() == 8 else qk.float()
        return F.rms_norm(precise, (self.head_dim,), eps=self.eps).to(qk.dtype)
