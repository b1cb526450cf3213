"""All-attention: learnt key and value vectors in the attention take the place of the feed-forward.

Sukhbaatar et al. 2019 (arXiv 1907.01470). Every query head has `num_persistent` key/value pairs of its own, which
stand beside the keys of the tokens in one softmax: a token divides its attention between what was said and what
the model knows. 2,112 of them a head are exactly one feed-forward of width 1,408.

They belong to no document and have no place: no mask hides them, no cache stores them, and they meet the query as
it is before its rotation (rotated, the logits would depend on absolute positions). Both kinds of score come out of
one kernel, by queries and keys of double width:

    (rotated query, plain query) . (key of a token, 0) = rotated query . key
    (rotated query, plain query) . (0, persistent key) = plain query . persistent key

That costs every score and every value twice its arithmetic, and a copy of the vectors for each row of the batch, but
needs nothing of the kernel besides a mask, and no scores are kept for the backward pass. The flash-attn package takes
no mask, so `auto` is torch's kernel here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from minilm.models import register
from minilm.models.attention import BY_DOCUMENT, Plan, allowed, attend, repeated
from minilm.models.base import Backend
from minilm.models.original import Original, OriginalConfig
from minilm.models.parts import Attention, AttentionBlock


def _size(fields: dict[str, Any]) -> dict[str, Any]:
    """A size of `original` with as many vectors as make up its feed-forward: 2 N D = 3 D F."""
    kept = {field: value for field, value in fields.items() if field != "hidden_dim"}
    return {**kept, "num_persistent": 3 * fields["hidden_dim"] // 2}


@register("persistent")
@dataclass(frozen=True, kw_only=True)
class PersistentConfig(OriginalConfig):
    """Settings of the all-attention model; the defaults are the reference size, 25,825,792 parameters."""

    name: Literal["persistent"] = "persistent"  # type: ignore[assignment]
    num_persistent: Annotated[int, Field(gt=0, description="learnt key/value pairs of each query head")] = (
        2112
    )

    unused: ClassVar[tuple[str, ...]] = ("hidden_dim",)
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        size: _size(fields) for size, fields in OriginalConfig.sizes.items()
    }

    @property
    def kernel(self) -> Backend:
        return "sdpa" if self.attention == "auto" else self.attention

    def problems(self) -> list[tuple[str, str]]:
        found = [problem for problem in super().problems() if problem[0] != "attention"]
        if self.attention in BY_DOCUMENT:
            reason = f"model persistent needs a mask, and the kernel {self.attention} takes none. "
            found.append(("attention", reason + "Choose auto or sdpa: torch's kernels."))
        return found

    def parameter_groups(self) -> dict[str, int]:
        groups = super().parameter_groups()
        del groups["feed-forward"]
        groups["norms"] = (self.num_layers + 1) * self.dim
        groups["persistent"] = self.num_layers * 2 * self.num_persistent * self.dim
        return groups

    def flops_per_token(self, sequence_length: int) -> int:
        """As for every model: what the formula needs. The double width of this implementation is not counted."""
        groups = self.parameter_groups()
        products = groups["attention"] + groups["persistent"] + self.vocab_size * self.dim
        return 2 * products + 2 * self.num_layers * self.dim * (sequence_length + 1)

    def module(self) -> Persistent:
        return Persistent(self)


class Persistent(Original):
    """model(inputs [B, L], segments, positions, cache) -> Output, from blocks of all-attention."""

    config: PersistentConfig

    def block(self, layer: int) -> nn.Module:
        return AttentionBlock(self.config, AllAttention(self.config, layer))

    @torch.no_grad()
    def initialise(self) -> None:
        """As `original`; persistent vectors from the same normal(0, init_std)."""
        super().initialise()
        for module in self.modules():
            if isinstance(module, AllAttention):
                module.persistent_keys.normal_(0.0, self.config.init_std)
                module.persistent_values.normal_(0.0, self.config.init_std)

    def stack(self, x: Tensor, plan: Plan, segments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """One mask for all layers: that of the tokens, and the persistent vectors open to everyone."""
        mask = plan.mask
        if mask is None:
            total = x.shape[1] if plan.cache is None else plan.cache.all_segments.shape[1]
            one = torch.ones(1, total, dtype=torch.long, device=x.device)
            mask = allowed(one[:, total - x.shape[1] :], one)
        mask = F.pad(mask, (0, self.config.num_persistent), value=True)  # [B or 1, 1, L, S + N]
        return super().stack(x, dataclasses.replace(plan, mask=mask), segments)


class AllAttention(Attention):
    """Attention over the tokens and over learnt vectors, [heads, num_persistent, head_dim] keys and values."""

    def __init__(self, config: PersistentConfig, layer: int) -> None:
        super().__init__(config, layer)
        shape = (self.heads, config.num_persistent, self.head_dim)
        self.persistent_keys = nn.Parameter(torch.empty(shape))
        self.persistent_values = nn.Parameter(torch.empty(shape))
        # Stored as small as every other weight, so that one learning rate and one decay suit all. At the start the
        # keys are then as large as those of tokens, whose projection sums over `dim` inputs, and the mean of the N
        # values is as large as one value, as in the paper.
        self.scales = math.sqrt(config.dim), math.sqrt(config.num_persistent)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, unrotated: Tensor) -> Tensor:
        known_k, known_v = (
            (scale * vectors).to(k.dtype).transpose(0, 1).expand(k.shape[0], -1, -1, -1)  # [B, N, H, d]
            for scale, vectors in zip(
                self.scales, (self.persistent_keys, self.persistent_values), strict=True
            )
        )
        k, v = repeated(k, self.heads), repeated(v, self.heads)  # [B, S, H, d]: the vectors are by query head
        keys = torch.cat((F.pad(k, (0, self.head_dim)), F.pad(known_k, (self.head_dim, 0))), dim=1)
        # Values of double width too: fused kernels want one width for all three.
        values = F.pad(torch.cat((v, known_v), dim=1), (0, self.head_dim))
        # The kernels divide scores by the root of the width, which is 2 d here and should be d.
        queries = torch.cat((q, unrotated), dim=-1) * math.sqrt(2)
        mixed = attend(queries, keys, values, plan, self.dropout if self.training else 0.0)
        return mixed[..., : self.head_dim]
