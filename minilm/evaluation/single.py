"""One token more for a single row, on a CPU in float32: the original Transformer written out in numpy.

One row times a matrix is bound by reading the matrix. numpy's OpenBLAS reads the weights as they lie in the model at
the memory's speed, for which oneDNN needs a copy of them all; and at vectors of this length an operation of numpy costs
a third of one of torch. So a text of its own neither copies weights nor waits for operators. Nothing within a step is
torch's: its threads and OpenBLAS's would wait for each other in turns, and each waits by spinning.

Only where numpy computes with OpenBLAS, as its packages for Linux and Windows do, and where its number of threads can
be held to torch's.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minilm.evaluation.decoding import kept
from minilm.models.cache import KVCache
from minilm.models.original import Original

Array = NDArray[np.float32]


def available() -> bool:
    """Is numpy's linear algebra OpenBLAS, in a library of which the number of threads can be set?"""
    config: Any = np.show_config(mode="dicts")
    name = config.get("Build Dependencies", {}).get("blas", {}).get("name", "")
    return "openblas" in name and bool(openblas().lib_controllers)


@functools.cache
def openblas() -> Any:
    """The OpenBLAS libraries of this process, whose threads can be set: a `ThreadpoolController`.

    Looking through all libraries takes as long as two steps; numpy's is there since numpy is.
    """
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped, unused-ignore]

    return ThreadpoolController().select(internal_api="openblas")


def held(blas: Any) -> AbstractContextManager[Any]:
    """Context in which the libraries use no more threads than torch may; untouched where they have no more."""
    most = torch.get_num_threads()
    if all(library.num_threads <= most for library in blas.lib_controllers):
        return nullcontext()
    context: AbstractContextManager[Any] = blas.limit(limits=most)
    return context


class _Layer(NamedTuple):
    """Weights of a block, and its keys and values [2, Hkv, room, d]."""

    attention_norm: Array
    qkv: Array
    out: Array
    ffn_norm: Array
    gate: Array
    up: Array
    down: Array
    kept: Array


class Single:
    """Continues the one row of a cache that has its prompt, which it copies; unpadded.

    room  tokens that there will be in the row at most

    Weights are read at each step.
    """

    def __init__(self, model: Original, cache: KVCache, room: int) -> None:
        config = model.config
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.dim, self.eps = config.dim, config.norm_eps
        self.stored = cache.length
        self.blas = openblas()
        self.embedding, self.head = _array(model.embedding.weight), _array(model.head_weight)
        self.norm = _array(model.norm.weight)
        # Both halves of a head's rotation: x * cos + (x with its halves changed) * sin.
        cos, sin = (_array(table[:room]) for table in (model.rotary.cos, model.rotary.sin))
        self.cos, self.sin = np.stack((cos, cos), axis=1), np.stack((-sin, sin), axis=1)  # [room, 2, d / 2]
        # [layers, 2, Hkv, room, d]
        both = _array(kept(cache, room).squeeze(2))
        self.layers = [_layer(block, mine) for block, mine in zip(model.blocks, both, strict=True)]

    def logits(self, tokens: Tensor) -> Tensor:
        """The next token [1] -> logits [1, V] of what follows."""
        # Of a diverged model numbers may be infinite: whoever draws the token tells.
        with np.errstate(all="ignore"), held(self.blas):
            x = self.embedding[int(tokens)].copy()  # [D]
            for layer in self.layers:
                x += layer.out.dot(self._mixed(layer, self._normed(x, layer.attention_norm)))
                h = self._normed(x, layer.ffn_norm)
                x += layer.down.dot(_gated(layer.gate.dot(h), layer.up.dot(h)))
            self.stored += 1
            return torch.from_numpy(self.head.dot(self._normed(x, self.norm))).unsqueeze(0)

    def _mixed(self, layer: _Layer, h: Array) -> Array:
        """Attention: the normed row [D] -> values mixed [H d]; its key and value are kept."""
        qkv = layer.qkv.dot(h)
        parts = qkv.reshape(-1, 2, self.head_dim // 2)
        qk = parts[: -self.kv_heads]  # [H + Hkv, 2, d / 2]
        turned = qk[:, ::-1] * self.sin[self.stored]
        qk *= self.cos[self.stored]
        qk += turned
        heads = qkv.reshape(-1, self.head_dim)
        layer.kept[:, :, self.stored] = heads[self.heads :].reshape(2, self.kv_heads, -1)
        # The heads that share keys are queries of one head: keys are read once.
        q = heads[: self.heads].reshape(self.kv_heads, -1, self.head_dim)
        q *= self.head_dim**-0.5
        keys, values = layer.kept[:, :, : self.stored + 1]
        scores = np.matmul(q, keys.transpose(0, 2, 1))  # [Hkv, H / Hkv, S]
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        mixed: Array = np.matmul(scores, values)
        mixed /= scores.sum(axis=-1, keepdims=True)
        return mixed.reshape(-1)

    def _normed(self, x: Array, weight: Array) -> Array:
        h: Array = x * weight
        h *= (np.dot(x, x) / self.dim + self.eps) ** -0.5
        return h


def _gated(gate: Array, up: Array) -> Array:
    """silu(gate) * up, in place."""
    shrunk = np.negative(gate)
    np.exp(shrunk, out=shrunk)
    shrunk += 1
    gate /= shrunk
    gate *= up
    return gate


def _layer(block: Any, both: Array) -> _Layer:
    attention, ffn = block.attention, block.ffn
    return _Layer(
        attention_norm=_array(block.attention_norm.weight),
        qkv=_array(attention.qkv.weight),
        out=_array(attention.out.weight),
        ffn_norm=_array(block.ffn_norm.weight),
        gate=_array(ffn.gate.weight),
        up=_array(ffn.up.weight),
        down=_array(ffn.down.weight),
        kept=both,
    )


def _array(x: Tensor) -> Array:
    """The same memory."""
    array: Array = x.detach().numpy()
    return array
