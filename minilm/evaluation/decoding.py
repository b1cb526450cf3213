"""One token more for each row, on a CPU in float32: the original Transformer written out for a single position.

The model itself runs 49 operations a layer, most of them a few microseconds of work. Here a layer is 27, eight of them
views: activation, product of gate and up, and the residual additions are part of oneDNN's products; positions, places
in the cache and the mask are made once a step for all layers. The general way (the model's own forward with its cache)
is the reference that the tests compare with, and what runs for every other model, type and device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.evaluation.products import Products, linear, linear_then
from minilm.models.cache import KVCache
from minilm.models.original import Original
from minilm.models.parts import Attention, Block, RMSNorm, Rotary, SwiGLU

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
    nn.Linear,
)


class _Layer(NamedTuple):
    """Weights of a block; norms are [D], times sqrt(D); the others as `Products` laid them out."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def decodes(model: nn.Module, products: Products) -> bool:
    """Is this a plain original Transformer, with oneDNN's products, whose forward nobody changed or listens to?"""
    modules = list(model.modules())
    return (
        type(model) is Original
        and products.taken
        and model.config.kernel in ("auto", "sdpa")
        and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
        and all(type(m) in KNOWN and "forward" not in vars(m) for m in modules)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        and not any(m.bias is not None for m in modules if isinstance(m, nn.Linear))
    )


class Decoder:
    """Continues the rows of a cache that has their prompts.

    cache     keys and values of the prompts, padded on the left; its buffers are used on, its notes on tokens are not
    lengths   tokens of each prompt, without padding

    Weights are read when this is made (laid out ones) and at each step (the others).
    """

    def __init__(self, model: Original, cache: KVCache, products: Products, lengths: list[int]) -> None:
        config = model.config
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.keys, self.values, self.stored = cache.keys, cache.values, max(lengths)
        self.embedding, self.products = model.embedding.weight.detach(), products
        self.positions = torch.tensor(lengths)  # [B] of the tokens that come next
        # Both halves of a head's rotation in one row: x * cos + (x with its halves changed) * sin.
        cos, sin = model.rotary.cos, model.rotary.sin
        self.cos = torch.cat((cos, cos), dim=1).unsqueeze(1)  # [max_length, 1, d]
        self.sin = torch.cat((-sin, sin), dim=1).unsqueeze(1)
        self.mask: Tensor | None = None  # [B, 1, 1, max_length], -inf at padding, else 0
        if min(lengths) < self.stored:
            padding = self.stored - self.positions.view(-1, 1, 1, 1)
            self.mask = torch.where(torch.arange(cache.max_length) < padding, -math.inf, 0.0)
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
        end = self.stored + 1
        cos, sin = self.cos[self.positions], self.sin[self.positions]  # [B, 1, d]
        mask = None if self.mask is None else self.mask[..., :end]
        # For all layers at once: where the new ones go [B, Hkv, d], and all [B, Hkv, S, d].
        new = zip(self.keys[:, :, self.stored].unbind(), self.values[:, :, self.stored].unbind(), strict=True)
        every = [kept[:, :, :end].transpose(2, 3).unbind() for kept in (self.keys, self.values)]
        x = F.embedding(tokens, self.embedding)  # [B, D]
        for layer, (new_key, new_value), keys, values in zip(self.layers, new, *every, strict=True):
            qkv = linear(layer.qkv, self._normed(x, layer.attention_norm)).view(len(x), -1, self.head_dim)
            qk = qkv[:, : -self.kv_heads]
            first, second = qk.chunk(2, dim=-1)
            qk = torch.addcmul(qk * cos, torch.cat((second, first), dim=-1), sin)
            new_key.copy_(qk[:, self.heads :])
            new_value.copy_(qkv[:, -self.kv_heads :])
            # The heads that share keys are queries of one head: keys are read once.
            q = qk[:, : self.heads].reshape(len(x), self.kv_heads, -1, self.head_dim)  # [B, Hkv, H / Hkv, d]
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = linear_then("add", layer.out, mixed.flatten(1), x)
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
