"""How much memory a step takes on one device, from the shapes alone, before anything is built.

Held against measurements on a CPU: the activations agree with the tensors that autograd really keeps to within 1 %
(tests/test_training_estimate.py). The rules for CUDA and for ZeRO are read off the sources of torch and DeepSpeed:
computed, not measured. Not counted: the CUDA context, the allocator's fragmentation, communication libraries.

What autograd keeps for the backward pass of `original`, in bytes per position and layer (for the variants that are
derived, `BLOCKS` has what differs). c is the width of the
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

What single blocks of a model keep beside the others, a knowledge memory or a table of values: `estimate_extra.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from minilm.models.base import ModelConfig
from minilm.training.estimate_extra import EXTRAS, nothing
from minilm.training.layout import BUCKET, Kind

_INSIDE = ("norms", "attention", "feed-forward", "dropout", "memory", "values")  # the parts of blocks
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
    tables: int = 0  # read and not trained: the store of a knowledge memory

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
        return self.weights + self.tables + self.optimizer + self.average + self.buckets + moving


def memory(
    config: ModelConfig,
    spread: Spread,
    *,
    length: int,
    backend: str,
    num_moments: int,
    averages: bool = False,
    labelled: float = 0.0,
) -> Memory:
    """Memory of one device while training.

    length       tokens of a row
    backend      flash, sdpa or eager: what `minilm.models.attention.resolve` chose
    num_moments  values that the optimizer keeps over all parameters: two for each of AdamW's, one for each of Muon's
    averages     does the run keep a moving average of the weights (train.ema_decay)
    labelled     share of the tokens whose entry in the knowledge store the data name
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
    parts = activations(config, spread, length=length, backend=backend, labelled=labelled)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        average=(4 * n // (spread.ranks if spread.kind == "zero" else 1)) if averages else 0,
        buckets=buckets,
        activations=None if parts is None else sum(parts.values()),
        logits=_logits(config, spread, length),
        tables=config.table_bytes(),
        accumulates=spread.accumulation > 1,
        recomputed=sum(parts[name] for name in (*_INSIDE, "largest gradient"))
        if parts and spread.recompute
        else 0,
    )


def activations(
    config: ModelConfig, spread: Spread, *, length: int, backend: str, labelled: float = 0.0
) -> dict[str, int] | None:
    """Bytes that autograd keeps of one micro-batch, by part; None for models that nobody has derived.

    See the module's text for the derivation.
    """
    of_block = BLOCKS.get(config.name)
    if of_block is None:
        return None
    case = Case.of(config, spread, length=length, backend=backend, labelled=labelled)
    c, dim, cuda = case.c, config.dim, case.cuda
    extra = EXTRAS.get(config.name, nothing)(config, case)
    blocks, special = of_block(config, case), extra.inside
    positions, layers = spread.rows * length, config.num_layers
    mask = dim * (1 if cuda else case.residual) if case.dropout else 0
    once = case.norm + 4 * config.head_dim + 8 + mask
    kept = 1 if spread.recompute else layers  # blocks whose inside is there at once
    # Recomputed, the block that keeps most is what counts.
    of_those = int(sum(special.values()) > 0) if spread.recompute else extra.blocks
    handed = case.keys if backend != "flash" else 0  # the mask [rows, 1, L, keys] of bool, for the second run
    return {
        "borders of blocks": positions * (layers * case.residual * dim + handed) if spread.recompute else 0,
        **{
            name: round(positions * (kept * blocks.get(name, 0) + of_those * special.get(name, 0)))
            for name in _INSIDE
        },
        "embedding and last norm": positions * once,
        "output layer": positions * c * dim + 4 * config.vocab_size * dim,
        "bf16 copies of weights": 2 * _products(config) if case.autocast else 0,
        # Recomputed, all that the last of them keeps is still there when its gradients are made.
        "largest gradient": round(positions * extra.backward) if spread.recompute else 0,
        "shared by blocks": round(positions * extra.per_position + extra.once),
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the derivation of a block depends on, beside its config."""

    c: int  # bytes of the compute type
    residual: int  # of the stream between blocks: the embedding's own type
    norm: int  # bytes that a norm over the stream keeps per position
    autocast: bool
    bf16: bool
    cuda: bool
    dropout: bool
    backend: str
    length: int
    keys: int  # that a query meets, whether it may attend to them or not
    labelled: float = 0.0  # share of the positions whose entry is known

    @classmethod
    def of(
        cls, config: ModelConfig, spread: Spread, *, length: int, backend: str, labelled: float = 0.0
    ) -> Case:
        autocast, cuda = spread.bf16 and spread.kind != "zero", spread.device == "cuda"
        return cls(
            c=2 if spread.bf16 else 4,
            residual=2 if spread.bf16 and not autocast else 4,
            norm=4 * config.dim * (1 if cuda else 2) + 4,
            autocast=autocast,
            bf16=spread.bf16,
            cuda=cuda,
            dropout=config.dropout > 0,
            backend=backend,
            length=length,
            keys=length + getattr(config, "num_persistent", 0),
            labelled=labelled,
        )

    def masks(self, config: ModelConfig, branches: int) -> int:
        """Of dropout on the outputs of the branches of a block."""
        return branches * config.dim * (1 if self.cuda else self.c) if self.dropout else 0

    def swiglu(self, dim: int, hidden_dim: int) -> int:
        """Its input (autocast rounds it twice, for gate and up), then gate, silu, up and their product."""
        return self.c * dim * (2 if self.autocast else 1) + 4 * self.c * hidden_dim


def _original(config: Any, case: Case) -> dict[str, float]:
    """Bytes per position of a block: two norms, attention, a feed-forward."""
    return {
        "norms": 2 * case.norm,
        "attention": 2 * case.c * config.dim + _attention(config, case),
        "feed-forward": case.swiglu(config.dim, config.hidden_dim),
        "dropout": case.masks(config, 2),
    }


def _no_ffn(config: Any, case: Case) -> dict[str, float]:
    """One norm, attention, and a norm over the queries and keys of each head."""
    heads = config.num_heads + config.num_kv_heads
    normed = 0
    if config.qk_norm:
        normed = 4 * heads
        if case.bf16:
            normed += (
                4 * heads * config.head_dim
            )  # its float32 input; in float32 a view of what is kept anyway
        elif case.backend == "eager" or (case.dropout and not case.cuda):
            normed += case.c * (heads + config.num_kv_heads) * config.head_dim  # but not here
    return {
        "norms": case.norm + normed,
        "attention": 2 * case.c * config.dim + _attention(config, case),
        "dropout": case.masks(config, 1),
    }


def _persistent(config: Any, case: Case) -> dict[str, float]:
    """One norm, and attention with queries, keys and values of double width; keys and values repeated to all heads."""
    c, dim, heads = case.c, config.dim, config.num_heads
    stored = 2 * 2 * dim * case.keys / case.length  # values of keys and values, per position
    if case.backend == "eager" or (case.dropout and not case.cuda):
        width = c if case.backend == "eager" else 4
        attention = width * (2 * dim + stored) + _written_out(heads, case)
    else:
        # The output is as wide as the queries; the half that goes on is a copy.
        attention = c * (2 * dim + stored) + 2 * c * dim + 4 * heads + c * case.keys
    return {
        "norms": case.norm,
        "attention": 2 * c * dim + attention,
        "dropout": case.masks(config, 1),
    }


def _moe(config: Any, case: Case) -> dict[str, float]:
    """As `original`; a token's state is copied for each of its experts, and so is what comes out of them."""
    k, dim = config.top_k, config.dim
    router = (
        4 * dim + 8 * config.num_experts + (3 * 8 + 3 * 4) * k
    )  # input, two softmaxes; orders and weights
    experts = k * (case.swiglu(dim, config.hidden_dim) + case.c * dim)
    shared = 0
    if config.num_shared_experts:
        shared = case.swiglu(dim, config.num_shared_experts * config.hidden_dim)
        shared -= 0 if case.bf16 else 4 * dim  # the router's input is this one's
    return _original(config, case) | {"feed-forward": router + experts + shared}


# A variant whose activations were derived has its entry here: config, case -> bytes per position of one block, by part.
BLOCKS: dict[str, Callable[[Any, Case], dict[str, float]]] = {
    "original": _original,
    "no_ffn": _no_ffn,
    "no_ffn_matched": _no_ffn,
    "persistent": _persistent,
    "moe": _moe,
    "knowledge": _original,
    "no_ffn_knowledge": _no_ffn,
    "pkm": _original,
}


def _products(config: ModelConfig) -> int:
    """Parameters of the matrices in the blocks that autocast rounds."""
    rounded = ("attention", "feed-forward", "experts", "shared experts")
    return sum(count for name, count in config.parameter_groups().items() if name in rounded)


def _attention(config: ModelConfig, case: Case) -> float:
    """Bytes per position and layer of plain attention, without the inputs of its two products."""
    if case.backend == "eager":
        return 3 * case.c * config.dim + _written_out(config.num_heads, case)
    if case.backend == "sdpa" and case.dropout and not case.cuda:
        return 3 * 4 * config.dim + _written_out(config.num_heads, case)
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    rotated = case.c * (heads + kv_heads) * size
    mask = case.c * case.length if case.backend == "sdpa" else 0
    values = case.c * (heads + 2 * kv_heads) * size
    if case.backend == "sdpa" and case.cuda and heads != kv_heads:
        values = 2 * case.c * heads * size
    return values + rotated + 4 * heads + mask


def _written_out(heads: int, case: Case) -> int:
    """Scores as a matrix: softmax, its rounded copy, dropout's mask and product, and the mask of who sees whom."""
    if case.backend != "eager":  # torch's own for dropout on a CPU, in float32
        return 3 * 4 * heads * case.keys
    rounded = case.c if case.bf16 else 0
    weights = 4 + ((1 if case.cuda else case.c) + case.c if case.dropout else rounded)
    return weights * heads * case.keys + case.keys


def _logits(config: ModelConfig, spread: Spread, length: int) -> int:
    """What `score_hidden` holds while it works on a chunk, beside what it keeps.

    From the second chunk on the former chunk's probabilities and gradient are still there when the next logits and
    their logarithms are made: two float32 and two of the compute type. And one product as large as the output layer.
    """
    c = 2 if spread.bf16 else 4
    positions = spread.rows * length
    at_once = min(positions, 2 * CHUNK)  # of the former chunk and of this one
    table = c * config.vocab_size * config.dim
    return at_once * config.vocab_size * (4 + c) + table * (2 if spread.bf16 else 1)
