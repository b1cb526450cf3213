"""How much memory a step takes on one device, from the shapes alone, before anything is built.

Held against measurements on a CPU: the activations agree with the tensors that autograd really keeps to within 1 %
(tests/test_training_estimate.py). The rules for CUDA and for ZeRO are read off the sources of torch and DeepSpeed:
computed, not measured. Not counted: the CUDA context, the allocator's fragmentation, communication libraries.

What autograd keeps for the backward pass of `original`, in bytes per position and layer. c is the width of the
compute type (float32 4, bfloat16 2), D = dim, F = hidden_dim, H and K query and key/value heads of size d, L the
length of a row.

    each of the two norms   4 D + 4      its float32 input and the factor 1 / rms; on a CPU 4 D more, the normed input
    inputs of qkv and out   2 c D        out's input is also the output of the attention kernel, and one tensor
    attention, fused        c (H + 2 K) d for qkv (values are a view of it), c (H + K) d for the rotated queries and
                            keys, 4 H for the log-sum-exp, and c L for the mask where the kernel is torch's. On CUDA
                            torch's kernel gets keys and values repeated to all heads: 2 c H d in place of qkv
    attention, eager        3 c D for queries, keys and values head by head, 4 H L for the softmax (and c H L for its
                            rounded copy in bfloat16), L for the mask; with dropout 2 c H L for its mask and product
    feed-forward            c D for its input (autocast rounds it twice, for gate and up: 2 c D), 4 c F for gate, silu,
                            up and their product

Once per position: the last norm, 4 d for rotary factors, 8 for the ids, c D for the gradient of the hidden states,
which `score_hidden` makes in the forward pass; and once in all 4 V D for the gradient of the output layer, made there
too, and under autocast the bfloat16 copies of the matrices of the blocks. Dropout keeps a mask: as wide as the values
on a CPU, one byte on CUDA. Torch's fused kernels for the CPU know no dropout: attention there is written out in
float32 and keeps 12 D for queries, keys and values and 12 H L for softmax, mask and product.

Recomputed blocks keep their input, 4 D (2 D in bfloat16 weights), and one block at a time is there as above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minilm.models.base import ModelConfig
from minilm.training.layout import BUCKET, Kind

_INSIDE = ("norms", "attention", "feed-forward", "dropout")  # the parts of blocks
CHUNK = 1024  # positions whose logits score_hidden holds at a time


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a run is laid out, as far as memory is concerned. rows: of one forward on one device."""

    kind: Kind
    ranks: int
    bf16: bool
    device: Literal["cpu", "cuda"]
    rows: int
    accumulation: int = 1
    zero_stage: int = 2
    recompute: bool = False  # activations are kept at the borders of blocks only


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device. `activations` is None for a model whose activations nobody has derived."""

    weights: int
    gradients: int
    optimizer: int  # moments, and under bf16 ZeRO the float32 master weights
    average: int  # of the weights, where the run keeps one
    buckets: int  # in which gradients travel between ranks
    activations: int | None  # what autograd keeps of one micro-batch
    logits: int  # of the chunk of positions that is being scored, with their gradient; gone afterwards

    accumulates: bool = False  # more than one micro-batch a step
    recomputed: int = 0  # of the activations: made anew in the backward pass, when the logits are gone

    @property
    def peak(self) -> int | None:
        """The most that is there at once.

        Gradients are forgotten after the update and activations shrink while gradients grow, so with one
        micro-batch the two do not meet in full.
        """
        if self.activations is None:
            return None
        forward = max(self.activations, self.activations - self.recomputed + self.logits)
        moving = forward + self.gradients if self.accumulates else max(forward, self.gradients)
        return self.weights + self.optimizer + self.average + self.buckets + moving


def memory(
    config: ModelConfig,
    spread: Spread,
    *,
    length: int,
    backend: str,
    num_moments: int,
    averages: bool = False,
) -> Memory:
    """Memory of one device while training.

    length       tokens of a row
    backend      flash, sdpa or eager: what `minilm.models.attention.resolve` chose
    num_moments  values that the optimizer keeps over all parameters: two for each of AdamW's, one for each of Muon's
    averages     does the run keep a moving average of the weights (train.ema_decay)
    """
    n = config.num_parameters()
    if spread.kind == "zero":
        shards = spread.ranks
        width = 2 if spread.bf16 else 4
        # Master weights are float32 and sharded also where the weights themselves are float32. Gradients are reduced
        # into a bucket and kept as float32 shards; stage 1 keeps them whole.
        weights, optimizer = width * n, 4 * (n + num_moments) // shards
        gradients = 4 * n // shards if spread.zero_stage == 2 else 4 * n
        buckets = min(n, BUCKET) * (
            width if spread.zero_stage == 2 else 4
        )  # reduce_bucket_size of our layout
    else:
        weights, gradients, optimizer = 4 * n, 4 * n, 4 * num_moments
        buckets = 4 * n if spread.kind == "ddp" else 0  # DDP's buckets are copies of the gradients
    parts = activations(config, spread, length=length, backend=backend)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        average=(4 * n // (spread.ranks if spread.kind == "zero" else 1)) if averages else 0,
        buckets=buckets,
        activations=None if parts is None else sum(parts.values()),
        logits=_logits(config, spread, length),
        accumulates=spread.accumulation > 1,
        recomputed=sum(parts[name] for name in _INSIDE) if parts and spread.recompute else 0,
    )


def activations(config: ModelConfig, spread: Spread, *, length: int, backend: str) -> dict[str, int] | None:
    """Bytes that autograd keeps of one micro-batch, by part; None for models other than `original`.

    See the module's text for the derivation.
    """
    if config.name != "original":
        return None
    cuda, dropout = spread.device == "cuda", config.dropout > 0
    autocast = spread.bf16 and spread.kind != "zero"
    c = 2 if spread.bf16 else 4
    residual = 2 if spread.bf16 and not autocast else 4  # the embedding's own type
    dim, heads = config.dim, config.num_heads
    norm = 4 * dim * (1 if cuda else 2) + 4
    masks = {"embedding": 0, "block": 0}
    if dropout:
        masks = {
            "embedding": dim * (1 if cuda else residual),
            "block": 2 * dim * (1 if cuda else c),
        }

    attention = _fused(config, length, c, backend, cuda)
    if backend == "eager":
        rounded = c if spread.bf16 else 0
        weights = 4 + ((1 if cuda else c) + c if dropout else rounded)
        attention = 3 * c * dim + weights * heads * length + length
    elif backend == "sdpa" and dropout and not cuda:
        attention = 3 * 4 * (dim + heads * length)  # written out, in float32
    inputs = 2 * c * dim
    feed_forward = c * dim * (2 if autocast else 1) + 4 * c * config.hidden_dim
    positions, layers = spread.rows * length, config.num_layers
    once = norm + 4 * config.head_dim + 8 + masks["embedding"]
    groups = config.parameter_groups()
    copies = 2 * (groups["attention"] + groups["feed-forward"]) if autocast else 0
    kept = 1 if spread.recompute else layers  # blocks whose inside is there at once
    mask = length if backend != "flash" else 0  # [rows, 1, L, L] of bool, handed to the second run
    return {
        "borders of blocks": positions * (layers * residual * dim + mask) if spread.recompute else 0,
        "norms": positions * kept * 2 * norm,
        "attention": positions * kept * (inputs + attention),
        "feed-forward": positions * kept * feed_forward,
        "dropout": positions * kept * masks["block"],
        "embedding and last norm": positions * once,
        "output layer": positions * c * dim + 4 * config.vocab_size * dim,
        "bf16 copies of weights": copies,
    }


def _fused(config: ModelConfig, length: int, c: int, backend: str, cuda: bool) -> int:
    """Bytes per position and layer of the flash kernels, in torch or in the package."""
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    rotated = c * (heads + kv_heads) * size
    mask = c * length if backend == "sdpa" else 0
    values = c * (heads + 2 * kv_heads) * size
    if backend == "sdpa" and cuda and heads != kv_heads:
        values = 2 * c * heads * size
    return values + rotated + 4 * heads + mask


def _logits(config: ModelConfig, spread: Spread, length: int) -> int:
    """What `score_hidden` holds while it works on a chunk, beside what it keeps.

    From the second chunk on the former chunk's probabilities and gradient are still there when the next logits and
    their logarithms are made: two float32 and two of the compute type. And one product as large as the output layer.
    """
    c = 2 if spread.bf16 else 4
    positions = spread.rows * length
    former = 2 if positions > CHUNK else 1
    table = c * config.vocab_size * config.dim
    return former * min(CHUNK, positions) * config.vocab_size * (4 + c) + table * (2 if spread.bf16 else 1)
