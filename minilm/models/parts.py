"""The parts that models are made of: norm, rotary embedding, attention, feed-forward, block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.models.attention import Plan, attend
from minilm.models.base import ModelConfig
from minilm.models.fused import gated, rms_norm, suits
from minilm.models.fused import rotate as rotate_fused
from minilm.onednn import product
from minilm.onednn import suits as suits_onednn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 whatever x is.

    In bfloat16 the mean of squares alone would be wrong by up to 0.4 %. Source: arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if suits(x) and self.weight.dtype == torch.float32:
            return rms_norm(x, self.weight, self.eps)
        precise = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(precise, self.weight.shape, self.weight.to(precise.dtype), self.eps).to(x.dtype)


class Rotary(nn.Module):
    """The cosines and sines of rotary position embedding (arXiv 2104.09864), looked up by position.

    Angles are computed in float64 and stored in float32. Both matter: at position 2,000 a bfloat16 angle is
    wrong by up to 4 radians, and a bfloat16 table makes neighbouring positions the same. So the table refuses
    to be rounded: after any cast of the module (`.to(torch.bfloat16)`, an engine that casts buffers, `.to_empty`)
    it is made again. It is no part of the checkpoint, being a function of the config.
    """

    cos: Tensor  # [max_length, head_dim / 2]
    sin: Tensor

    def __init__(self, head_dim: int, max_length: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.max_length, self.theta = head_dim, max_length, theta
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self._make(self.cos.device, torch.float32)

    def _make(self, device: torch.device, dtype: torch.dtype) -> None:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu") / self.head_dim
        frequencies = self.theta**-exponents  # [head_dim / 2]
        angles = torch.arange(self.max_length, dtype=torch.float64, device="cpu")[:, None] * frequencies
        self.cos, self.sin = (f(angles).to(device=device, dtype=dtype) for f in (torch.cos, torch.sin))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)
        # float64 is kept for models in double precision; everything narrower than float32 is refused.
        self._make(self.cos.device, torch.float64 if self.cos.dtype == torch.float64 else torch.float32)
        return self

    def forward(self, positions: Tensor | int) -> tuple[Tensor, Tensor]:
        """Positions [B, L], or a length L for 0 to L - 1 -> cos, sin [B or 1, L, 1, head_dim / 2]."""
        if self.cos.dtype not in (torch.float32, torch.float64):  # cast from outside, without `_apply`
            self._make(self.cos.device, torch.float32)
        if isinstance(positions, int):
            return self.cos[None, :positions, None], self.sin[None, :positions, None]
        return self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x [B, L, heads, d] by their angles, as Llama checkpoints expect.

    A 16-bit x meets float32 factors, so the products are float32; only the result is rounded.
    """
    if suits(x) and cos.dtype == torch.float32:
        return rotate_fused(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer without bias, x [..., in] -> [..., out], by the faster product where there is one."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions. x [B, L, D] -> [B, L, D].

    Queries, keys and values are one product: `qkv.weight` holds the rows of all query heads, then all key
    heads, then all value heads.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, config.dim)
        # An optimizer that works on matrices (Muon) has to know that one parameter holds three.
        kv_rows = self.kv_heads * self.head_dim
        self.stacked = {"qkv.weight": (self.heads * self.head_dim, kv_rows, kv_rows)}

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [B, L, H + 2 Hkv, d]
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        qk = self.prepared(qk)
        q, k = rotate(qk, plan.cos, plan.sin).split([self.heads, self.kv_heads], dim=2)
        if plan.cache is not None:
            k, v = plan.cache.extend(self.layer, k, v)
        mixed = self.mixed(q, k, v, plan, qk[:, :, : self.heads])
        return self.out(mixed.flatten(2))

    def prepared(self, qk: Tensor) -> Tensor:
        """Queries and keys [B, L, H + Hkv, d] before they are rotated: what a variant that normalises them replaces."""
        return qk

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, unrotated: Tensor) -> Tensor:
        """Values mixed by attention [B, L, H, d]; `unrotated` are the queries without their positions."""
        return attend(q, k, v, plan, self.dropout if self.training else 0.0)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): x [B, L, D] -> [B, L, D]. Source: arXiv 2002.05202.

    Unlike queries, keys and values, gate and up are two products: their gradients would have to be copied
    together for a fused one, which measured no faster.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden_dim)
        self.up = Linear(dim, hidden_dim)
        self.down = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate(x), self.up(x), self.down
        # Whoever listens to the last product, or has replaced it, is to see it.
        own = type(down) is Linear and "forward" not in vars(down)
        if own and not (down._forward_hooks or down._forward_pre_hooks):
            return gated_product(gate, up, down.weight)
        found: Tensor = down(F.silu(gate) * up)
        return found


def gated_product(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(gate) * up) @ down.T: gate and up [..., F], down [D, F] -> [..., D], fused where it can be."""
    if suits(gate) and suits_onednn(gate, down):
        return gated(gate, up, down)
    return product(F.silu(gate) * up, down)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)): the residual stream itself is never normalised."""

    def __init__(self, config: ModelConfig, layer: int, ffn: nn.Module) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = ffn
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        return self.fed(self.attended(x, plan))

    def attended(self, x: Tensor, plan: Plan) -> Tensor:
        """The first half, x [B, L, D] -> [B, L, D]: a variant may put something between the two."""
        return x + self.dropout(self.attention(self.attention_norm(x), plan))

    def fed(self, x: Tensor) -> Tensor:
        """The second half."""
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class AttentionBlock(nn.Module):
    """x + attention(norm(x)): a block without a feed-forward. One norm, as there is one branch."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = attention
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        return self.fed(self.attended(x, plan))

    def attended(self, x: Tensor, plan: Plan) -> Tensor:
        """As of `Block`."""
        return x + self.dropout(self.attention(self.attention_norm(x), plan))

    def fed(self, x: Tensor) -> Tensor:
        """There is no second half."""
        return x


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with this weight runs: autocast's where it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
