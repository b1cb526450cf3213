"""One token more for each row, on a CPU in float32: the original Transformer written out for a single position.

The model itself runs 49 operations a layer, most of them a few microseconds of work. Here a layer is 29, eight of them
views: activation, product of gate and up, and the residual additions are part of oneDNN's products; positions, places
in the cache and the mask are made once a step for all layers. Attention is two batched products and a softmax: with one
query a row torch's own kernel (flash attention) is 1.4 times slower, on two threads five times.

One row alone goes through numpy where it can (`minilm.evaluation.single`). The general way (the model's own forward
with its cache) is the reference that the tests compare with, and what runs for every other model, type and device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.evaluation.products import Products
from minilm.models.cache import KVCache
from minilm.models.original import Original
from minilm.models.parts import Attention, Block, Linear, RMSNorm, Rotary, SwiGLU
from minilm.onednn import linear, linear_then

# A subclass may compute anything else: only these themselves.
KNOWN = (
    Original,
    nn.Embedding,
    nn.Dropout,
    nn.ModuleList,
    Block,
    RMSNorm,
    Rotary,
    Attention,
    SwiGLU,
    Linear,
    nn.Linear,
)
KERNELS = ("auto", "blockwise", "sdpa")  # of attention: what they compute for one query is written out here


class Decodes(Protocol):
    """What continues rows whose prompts are in a cache."""

    def logits(self, tokens: Tensor) -> Tensor:
        """The next token of each row [B] -> logits [B, V] of what follows."""


class _Layer(NamedTuple):
    """Weights of a block; norms are [D], times sqrt(D); the others as `Products` laid them out."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def plain(model: nn.Module) -> bool:
    """Is this the original Transformer in float32 on a CPU, whose forward nobody changed or listens to?"""
    modules = list(model.modules())
    return (
        type(model) is Original
        and model.config.kernel in KERNELS
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
        and all(type(m) in KNOWN and "forward" not in vars(m) for m in modules)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        and not any(m.bias is not None for m in modules if isinstance(m, nn.Linear))
        and not torch.is_autocast_enabled("cpu")
    )


def kept(cache: KVCache, room: int) -> Tensor:
    """Keys and values of a cache as a step reads them: [layers, 2, B, Hkv, room, d], what is not there yet undefined.

    A head's keys follow each other, so that all heads of all rows are one batch of matrices.
    """
    layers, rows, _, heads, width = cache.keys.shape
    both = cache.keys.new_empty(layers, 2, rows, heads, room, width)
    for into, stored in zip(both.unbind(1), (cache.keys, cache.values), strict=True):
        into[..., : cache.length, :] = stored[:, :, : cache.length].transpose(2, 3)
    return both


class Decoder:
    """Continues the rows of a cache that has their prompts, which it copies.

    cache     keys and values of the prompts, padded on the left
    lengths   tokens of each prompt, without padding
    room      tokens that there will be in a row at most, padding included

    Weights are read when this is made (laid out ones) and at each step (the others).
    """

    def __init__(
        self, model: Original, cache: KVCache, products: Products, lengths: list[int], room: int
    ) -> None:
        config = model.config
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.kept, self.stored = kept(cache, room), cache.length
        self.embedding, self.products = model.embedding.weight.detach(), products
        self.positions = torch.tensor(lengths)  # [B] of the tokens that come next
        # Both halves of a head's rotation in one row: x * cos + (x with its halves changed) * sin.
        cos, sin = model.rotary.cos[:room], model.rotary.sin[:room]
        self.cos = torch.cat((cos, cos), dim=1).unsqueeze(1)  # [room, 1, d]
        self.sin = torch.cat((-sin, sin), dim=1).unsqueeze(1)
        self.factors = torch.ones(
            self.heads + self.kv_heads, 1
        )  # of the rotated: queries are scaled by it, too
        self.factors[: self.heads] = self.head_dim**-0.5
        self.mask: Tensor | None = None  # [B, 1, room], -inf at padding, else 0
        if min(lengths) < self.stored:
            padding = self.stored - self.positions.view(-1, 1, 1)
            self.mask = torch.where(torch.arange(room) < padding, -math.inf, 0.0)
        # x / sqrt(mean(x^2) + eps) = sqrt(D) x / sqrt(sum(x^2) + D eps)
        self.least = torch.tensor(math.sqrt(config.dim * config.norm_eps))
        self.scale = math.sqrt(config.dim)
        self.norm = self._norm(model.norm)
        self.layers = [self._layer(block) for block in model.blocks]

    def _norm(self, norm: Any) -> Tensor:
        scaled: Tensor = norm.weight.detach() * self.scale
        return scaled

    def _layer(self, block: Any) -> _Layer:
        attention, ffn, weight = block.attention, block.ffn, self.products.weight
        return _Layer(
            attention_norm=self._norm(block.attention_norm),
            qkv=weight(attention.qkv),
            out=weight(attention.out),
            ffn_norm=self._norm(block.ffn_norm),
            gate=weight(ffn.gate),
            up=weight(ffn.up),
            down=weight(ffn.down),
        )

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """The next token of each row [B] -> logits [B, V] of what follows."""
        rows, end = len(tokens), self.stored + 1
        cos = self.cos[self.positions] * self.factors  # [B, H + Hkv, d]
        sin = self.sin[self.positions] * self.factors
        mask = None if self.mask is None else self.mask[..., :end]
        # For all layers at once: where the new ones go [2, B, Hkv, d], and all: [B Hkv, d, S] and [B Hkv, S, d].
        new = self.kept[..., self.stored, :].unbind()
        keys, values = self.kept[..., :end, :].flatten(2, 3).unbind(1)
        every = zip(self.layers, new, keys.transpose(2, 3).unbind(), values.unbind(), strict=True)
        x = F.embedding(tokens, self.embedding)  # [B, D]
        for layer, new_ones, all_keys, all_values in every:
            qkv = linear(layer.qkv, self._normed(x, layer.attention_norm)).view(rows, -1, self.head_dim)
            qk = qkv[:, : -self.kv_heads]
            first, second = qk.chunk(2, dim=-1)
            turned = torch.cat((second, first), dim=-1)
            qk.mul_(cos).addcmul_(turned, sin)
            new_ones.copy_(qkv[:, self.heads :].view(rows, 2, self.kv_heads, -1).transpose(0, 1))
            # The heads that share keys are queries of one head: keys are read once.
            q = qk[:, : self.heads].reshape(rows * self.kv_heads, -1, self.head_dim)  # [B Hkv, H / Hkv, d]
            scores = torch.bmm(q, all_keys)  # [B Hkv, H / Hkv, S]
            if mask is not None:
                scores.view(rows, -1, end).add_(mask)
            mixed = torch.bmm(scores.softmax(dim=-1), all_values)
            x = linear_then("add", layer.out, mixed.view(rows, -1), x)
            h = self._normed(x, layer.ffn_norm)
            gated = linear(layer.gate, h, "swish")
            x = linear_then("add", layer.down, linear_then("mul", layer.up, h, gated), x)
        self.stored = end
        self.positions += 1
        assert self.products.head is not None
        return self.products.head(self._normed(x, self.norm))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm, `weight` times sqrt(D): `F.rms_norm` is twice as many operations."""
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / length.hypot_(self.least)).mul_(weight)
