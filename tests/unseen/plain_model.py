"""The model of the plain set-up: a small pre-norm GPT with a key/value cache."""

from __future__ import annotations

import contextlib
import math
import string
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYMBOLS = string.ascii_letters + string.digits + " .,"


@dataclass
class Settings:
    vocab: int = 3 + len(SYMBOLS)
    dim: int = 32
    layers: int = 2
    heads: int = 4
    length: int = 64
    dropout: float = 0.0
    rotary: bool = True  # False: learned positions
    tied: bool = True
    lr: float = 1e-2
    min_lr: float = 1e-3
    warmup: int = 5
    steps: int = 60
    decay: float = 0.1
    clip: float = 1.0
    batch_rows: int = 16  # of all ranks together
    micro_rows: int = 4
    average: float = 0.9  # the moving average of the weights keeps this share at each step
    seed: int = 0
    rank: int = 0
    world: int = 1


class Cache:
    """Keys and values [B, heads, T, dim of a head] of each layer, and the segments [B, T] seen so far."""

    def __init__(self):
        self.layers, self.segments = {}, None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = (k, v)
        return k, v


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions, halves convention. x [B, H, T, C], positions [B, T]."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x.split(half, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Attention(nn.Module):
    def __init__(self, settings: Settings, layer: int):
        super().__init__()
        self.settings, self.layer, dim = settings, layer, settings.dim
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.drop = nn.Dropout(settings.dropout)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.settings.dim // self.settings.heads)).transpose(1, 2)

    def weights(self, q: Tensor, k: Tensor, causal: Tensor, same: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~(causal & same), -math.inf).softmax(-1)

    def forward(
        self, x: Tensor, positions: Tensor, causal: Tensor, same: Tensor, cache: Cache | None
    ) -> Tensor:
        q, k, v = (self.heads(part(x)) for part in (self.q, self.k, self.v))
        if self.settings.rotary:
            q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        mixed = self.drop(self.weights(q, k, causal, same)) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    attention = Attention

    def __init__(self, settings: Settings, layer: int):
        super().__init__()
        dim = settings.dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = self.attention(settings, layer)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, *how) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x), *how))
        return x + self.drop(self.ffn(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.token = nn.Embedding(settings.vocab, settings.dim)
        self.position = None if settings.rotary else nn.Embedding(settings.length, settings.dim)
        self.blocks = nn.ModuleList(self.block(layer) for layer in range(settings.layers))
        self.norm, self.drop = nn.LayerNorm(settings.dim), nn.Dropout(settings.dropout)
        self.head = nn.Linear(settings.dim, settings.vocab, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_stream = name.endswith(("attn.out.weight", "ffn.2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * settings.layers) if into_stream else 0.02)
        self.tie()

    def block(self, layer: int) -> Block:
        return Block(self.settings, layer)

    def tie(self) -> None:
        if self.settings.tied:
            self.head.weight = self.token.weight

    def causal(self, total: int, new: int) -> Tensor:
        """[new, total]: the queries are the last `new` of `total` positions."""
        return torch.ones(total, total, dtype=torch.bool).tril()[total - new :]

    def same_document(self, segments: Tensor, new: int) -> Tensor:
        """[B, 1, new, total]"""
        return (segments[:, -new:, None] == segments[:, None, :])[:, None]

    def positions(self, segments: Tensor) -> Tensor:
        """[B, T]: counted from the first token of each document."""
        index = torch.arange(segments.shape[1]).expand_as(segments)
        first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        return index - torch.where(first, index, 0).cummax(1).values

    def new_positions(self, segments: Tensor, new: int, cache: Cache | None) -> Tensor:
        return self.positions(segments)[:, -new:]

    def forward(self, ids: Tensor, segments: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits [B, T, vocab] for ids [B, T]; with a cache, ids follow what it holds."""
        new = ids.shape[1]
        segments = torch.ones_like(ids) if segments is None else segments
        if cache is not None:
            if cache.segments is not None:
                segments = torch.cat([cache.segments, segments], 1)
            cache.segments = segments
        total = segments.shape[1]
        if total > self.settings.length:
            raise ValueError(f"{total} tokens, more than length {self.settings.length}")
        positions = self.new_positions(segments, new, cache)
        x = self.token(ids) if self.position is None else self.token(ids) + self.position(positions)
        x, causal, same = self.drop(x), self.causal(total, new), self.same_document(segments, new)
        for block in self.blocks:
            x = block(x, positions, causal, same, cache)
        return self.head(self.norm(x))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of before comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
