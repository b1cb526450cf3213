"""A small decoder in plain torch, every piece a method or class that a planted bug can override."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Of the specimen; small enough for a check to take milliseconds."""

    vocab_size: int = 61
    dim: int = 32
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    hidden_dim: int = 64
    max_length: int = 64
    theta: float = 10_000.0
    dropout: float = 0.0
    tied: bool = False
    init_std: float = 0.02
    window: int | None = None  # keys that a query sees, itself included; None: all before it

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


class Norm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Rotary(nn.Module):
    """Rotary positions (Su et al., 2021): tables in float32, halves rotated."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.register_buffer("table", self.angles(size), persistent=False)  # [max_length, head_dim / 2]

    def angles(self, size: Size) -> Tensor:
        pairs = torch.arange(0, size.head_dim, 2, dtype=torch.float64)
        frequencies = size.theta ** (-pairs / size.head_dim)
        return torch.outer(torch.arange(size.max_length, dtype=torch.float64), frequencies).float()

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        """`.bfloat16()` must not round the table: device moves only."""
        table = self.table
        super()._apply(fn, recurse)
        self.table = table.to(self.table.device)
        return self

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, T, head_dim], positions [B, T]."""
        angles = self.table[positions].unsqueeze(1)
        angles = torch.cat([angles, angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return (x.float() * angles.cos() + turned.float() * angles.sin()).to(x.dtype)


class Attention(nn.Module):
    """Causal attention within segments, with grouped keys and values and a cache."""

    def __init__(self, size: Size, rotary: Rotary) -> None:
        super().__init__()
        self.size, self.rotary = size, rotary
        kv = size.num_kv_heads * size.head_dim
        self.q = nn.Linear(size.dim, size.dim, bias=False)
        self.k = nn.Linear(size.dim, kv, bias=False)
        self.v = nn.Linear(size.dim, kv, bias=False)
        self.out = nn.Linear(size.dim, size.dim, bias=False)
        self.dropout = size.dropout

    def forward(
        self, x: Tensor, positions: Tensor, segments: Tensor, cache: dict[str, Tensor] | None
    ) -> Tensor:
        q = self.heads(self.q(x), self.size.num_heads)
        k = self.heads(self.k(x), self.size.num_kv_heads)
        v = self.heads(self.v(x), self.size.num_kv_heads)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        k, v, key_segments, key_places, places = self.remember(k, v, segments, places, cache)
        allowed = self.allowed(places, key_places, segments, key_segments)
        return self.out(self.attend(q, k, v, allowed).transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, self.size.head_dim)).transpose(1, 2)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rotary(x, positions)

    def remember(
        self, k: Tensor, v: Tensor, segments: Tensor, places: Tensor, cache: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of the past in front; places are counted from the start of the row."""
        if cache is None:
            return k, v, segments, places, places
        if "k" in cache:
            places = places + cache["k"].shape[2]
            k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            segments = torch.cat([cache["segments"], segments], dim=1)
        cache.update(k=k, v=v, segments=segments)
        return k, v, segments, torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1), places

    def allowed(self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor) -> Tensor:
        """[B, Tq, Tk]: may the query see the key. A row without any key sees itself, so that nothing is NaN."""
        back = places.unsqueeze(2) - key_places.unsqueeze(1)
        seen = back >= 0
        if self.size.window is not None:
            seen = seen & (back < self.size.window)
        same = segments.unsqueeze(2) == key_segments.unsqueeze(1)
        return (seen & same & (key_segments > 0).unsqueeze(1)) | (back == 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        k, v = self.shared(k), self.shared(v)
        scores = self.scores(q, k).masked_fill(~allowed.unsqueeze(1), -math.inf)
        weights = scores.float().softmax(-1).to(v.dtype)
        return nn.functional.dropout(weights, self.dropout, self.training) @ v

    def shared(self, x: Tensor) -> Tensor:
        """Each key/value head serves a run of query heads."""
        return x.repeat_interleave(self.size.num_heads // self.size.num_kv_heads, dim=1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(2, 3) / math.sqrt(self.size.head_dim)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate = nn.Linear(size.dim, size.hidden_dim, bias=False)
        self.up = nn.Linear(size.dim, size.hidden_dim, bias=False)
        self.down = nn.Linear(size.hidden_dim, size.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm block: attention, feed-forward, each on a residual."""

    def __init__(self, size: Size, attention: nn.Module, ffn: nn.Module, norm: type[nn.Module]) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(size.dim), attention
        self.ffn_norm, self.ffn = norm(size.dim), ffn
        self.dropout = nn.Dropout(size.dropout)

    def forward(
        self, x: Tensor, positions: Tensor, segments: Tensor, cache: dict[str, Tensor] | None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, segments, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Model(nn.Module):
    """tokens [B, T] -> logits [B, T, V]. Plants pass another class for a part, or subclass this one."""

    def __init__(
        self,
        size: Size,
        *,
        attention: type[Attention] = Attention,
        ffn: type[nn.Module] = FeedForward,
        norm: type[nn.Module] = Norm,
        rotary: type[Rotary] = Rotary,
        block: type[nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocab_size, size.dim)
        self.rotary = rotary(size)
        self.layers = nn.ModuleList(
            block(size, attention(size, self.rotary), ffn(size), norm) for _ in range(size.num_layers)
        )
        self.norm = norm(size.dim)
        self.head = nn.Linear(size.dim, size.vocab_size, bias=False)
        self.initialise()
        if size.tied:
            self.head.weight = self.embedding.weight

    def initialise(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=self.size.init_std)

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        caches: list[dict[str, Tensor]] | None = None,
    ) -> Tensor:
        segments = torch.ones_like(tokens) if segments is None else segments
        positions = self.positions(segments) if positions is None else positions
        x = self.embed(tokens)
        for number, layer in enumerate(self.layers):
            x = layer(x, positions, segments, caches[number] if caches is not None else None)
        return self.head(self.norm(x))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def positions(self, segments: Tensor) -> Tensor:
        """Counted from the start of each document, 0 at padding."""
        index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
        starts = torch.ones_like(segments, dtype=torch.bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        first = torch.where(starts, index, 0).cummax(dim=1).values
        return torch.where(segments > 0, index - first, 0)

    def from_place(self, tokens: Tensor, offset: int) -> Tensor:
        """Logits when the first token is at position `offset`."""
        segments = torch.ones_like(tokens)
        return self(tokens, segments, self.positions(segments) + offset)

    def lowered(self) -> Model:
        """A copy in bfloat16."""
        return copy.deepcopy(self).bfloat16()

    def new_caches(self) -> list[dict[str, Tensor]]:
        return [{} for _ in self.layers]

    def step(
        self, tokens: Tensor, segments: Tensor, positions: Tensor, caches: list[dict[str, Tensor]]
    ) -> Tensor:
        """Logits of some more tokens of rows whose past is in `caches`."""
        return self(tokens, segments, positions, caches)
