"""How much memory a step takes on one device, from the shapes alone, before anything is built.

Held against measurements on a CPU: the activations agree with the tensors that autograd really keeps to within 1 %
(tests/test_training_estimate.py). The rules for CUDA and for ZeRO are read off the sources of torch and DeepSpeed:
computed, not measured. Not counted: the CUDA context, the allocator's fragmentation, communication libraries.

What autograd keeps for the backward pass of `original`, in bytes per position and layer (for the variants that are
derived, `estimate_blocks.py` has what differs). c is the width of the compute type (float32 4, bfloat16 2), D = dim,
F = hidden_dim, H and K query and key/value heads of size d, L the length of a row.

    each of the two norms   4 D + 4      its float32 input and the factor 1 / rms; in bf16 on a CPU 4 D more, the normed
                                         input
    inputs of qkv and out   2 c D        out's input is also the output of the attention kernel, and one tensor
    attention, fused        c (H + 2 K) d for qkv (values are a view of it), c (H + K) d for the rotated queries and
                            keys, 4 H for the log-sum-exp, and c L for the mask where the kernel is torch's. On CUDA
                            torch's kernel gets keys and values repeated to all heads: 2 c H d in place of qkv. The
                            blockwise kernel keeps neither log-sum-exp nor mask
    attention, eager        3 c D for queries, keys and values head by head, 4 H L for the softmax (and c H L for its
                            rounded copy in bfloat16), L for the mask; with dropout 2 c H L for its mask and product
    feed-forward            c D for its input (autocast rounds it twice, for gate and up: 2 c D), 4 c F for gate, silu,
                            up and their product; 2 c F, gate and up, where it is fused (float32 on a CPU)

Once per position: the last norm, 4 d for rotary factors, 8 for the ids, c D for the gradient of the hidden states,
which `score_hidden` makes in the forward pass; and once in all 4 V D for the gradient of the output layer, made there
too, and under autocast the bfloat16 copies of the matrices of the blocks. Dropout keeps a mask: as wide as the values
on a CPU, one byte on CUDA. Torch's fused kernels for the CPU know no dropout: attention there is written out in
float32 and keeps 12 D for queries, keys and values and 12 H L for softmax, mask and product.

Recomputed blocks keep their input, 4 D (2 D in bfloat16 weights), and one of them at a time is there as above, beside
the blocks before it that are kept: the largest such sum counts (`_at_once`).

In the backward pass there are besides, for one block at a time, the gradients of gate, up and their product, 3 c F, or
those of attention where there is no feed-forward. They come when the logits are gone: the larger of the two counts.

What single blocks of a model keep beside the others, a knowledge memory or a table of values: `estimate_extra.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from minilm.models.attention import BY_DOCUMENT
from minilm.models.base import ModelConfig
from minilm.training.estimate_blocks import BACK, BLOCKS, Case
from minilm.training.estimate_extra import EXTRAS, nothing
from minilm.training.layout import BUCKET, Kind
from minilm.training.passing import Recompute, recomputed_blocks

_PARTS = ("weights", "tables", "gradients", "optimizer", "average", "buckets", "activations", "logits")
_INSIDE = ("norms", "attention", "feed-forward", "dropout", "memory", "values")  # the parts of blocks
_AGAIN = "made again"
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
    recompute: Recompute = "none"  # of which blocks activations are kept at the borders only


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
    passing: int = 0  # gradients inside of one block, made and gone in the backward pass

    def parts(self) -> dict[str, int | None]:
        """Bytes by part; not all of them are there at once."""
        return {name: getattr(self, name) for name in _PARTS}

    @property
    def peak(self) -> int | None:
        """The most that is there at once.

        Gradients are forgotten after the update and activations shrink while gradients grow, so with one
        micro-batch the two do not meet in full.
        """
        if self.activations is None:
            return None
        # The logits are gone when the backward pass begins.
        both = max(self.activations + self.passing, self.activations - self.recomputed + self.logits)
        moving = both + self.gradients if self.accumulates else max(both, self.gradients)
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
    parts = _activations(config, spread, length=length, backend=backend, labelled=labelled)
    again, passing = (parts.pop(_AGAIN), parts.pop(BACK)) if parts else (0, 0)
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
        recomputed=again,
        passing=passing,
    )


def activations(
    config: ModelConfig, spread: Spread, *, length: int, backend: str, labelled: float = 0.0
) -> dict[str, int] | None:
    """Bytes that autograd keeps of one micro-batch, by part; None for models that nobody has derived.

    Where blocks are recomputed, what is there at most in the backward pass. See the module's text for the derivation.
    """
    parts = _activations(config, spread, length=length, backend=backend, labelled=labelled)
    return None if parts is None else {name: parts[name] for name in parts.keys() - {_AGAIN, BACK}}


def _activations(
    config: ModelConfig, spread: Spread, *, length: int, backend: str, labelled: float
) -> dict[str, int] | None:
    """By part; beside them what of this is there in the backward pass only, and what else is there then."""
    of_block = BLOCKS.get(config.name)
    if of_block is None:
        return None
    case = Case.of(config, spread, length=length, backend=backend, labelled=labelled)
    c, dim = case.c, config.dim
    extra = EXTRAS.get(config.name, nothing)(config, case)
    usual = of_block(config, case)
    special = {name: usual.get(name, 0) + extra.inside.get(name, 0) for name in _INSIDE}
    special[BACK] = max(usual[BACK], extra.backward)
    positions, layers = spread.rows * length, config.num_layers
    again = recomputed_blocks(spread.recompute, layers)
    blocks = [special if number in extra.layers else usual for number in range(layers)]
    # On the way back the gradient of the stream stands where the last norm's input and the gradient of the hidden
    # states were; what a recomputed block began with is counted as its border.
    gone = [c * dim + (case.residual * dim if is_again else 0) for is_again in again]
    inside, passing, later = _at_once(blocks, again, gone)
    mask = dim * (1 if case.cuda else case.residual) if case.dropout else 0
    once = case.norm + 4 * config.head_dim + 8 + mask
    # The mask [rows, 1, L, keys] of bool, for the second run.
    handed = case.keys if any(again) and backend not in BY_DOCUMENT else 0
    return {
        "borders of blocks": positions * (sum(again) * case.residual * dim + handed),
        **{name: round(positions * inside.get(name, 0)) for name in _INSIDE},
        "embedding and last norm": positions * once,
        "output layer": positions * c * dim + 4 * config.vocab_size * dim,
        "bf16 copies of weights": 2 * _products(config) if case.autocast else 0,
        "shared by blocks": round(positions * extra.per_position + extra.once),
        _AGAIN: round(positions * later),
        BACK: round(positions * passing),
    }


def _at_once(
    blocks: Sequence[Mapping[str, float]], again: Sequence[bool], gone: Sequence[float]
) -> tuple[dict[str, float], float, float]:
    """The moment of the backward pass that has most, per position: what blocks keep then, by part; the gradients inside
    of the block that it has come to, less what is `gone`; what of the first was not there before."""
    kept: dict[str, float] = {}
    most, found, passing = -1.0, dict(kept), 0.0
    for block, is_again, less in zip(blocks, again, gone, strict=True):
        now = {name: kept.get(name, 0) + block.get(name, 0) for name in _INSIDE}
        if not is_again:
            kept = now
        if sum(now.values()) + block[BACK] - less > most:
            most, found, passing = sum(now.values()) + block[BACK] - less, now, block[BACK] - less
    return found, passing, sum(found.values()) - sum(kept.values())


def _products(config: ModelConfig) -> int:
    """Parameters of the matrices in the blocks that autocast rounds."""
    rounded = ("attention", "feed-forward", "experts", "shared experts")
    return sum(count for name, count in config.parameter_groups().items() if name in rounded)


def _logits(config: ModelConfig, spread: Spread, length: int) -> int:
    """What `score_hidden` holds while it works on a chunk, beside what it keeps.

    From the second chunk on the former chunk's gradient is still there when the next logits and their logarithms are
    made, one float32 and one of the compute type; in bf16, where the gradient is a copy, so are the probabilities that
    it is a copy of. And one product as large as the output layer.
    """
    c = 2 if spread.bf16 else 4
    positions = spread.rows * length
    first, second = min(positions, CHUNK), min(max(positions - CHUNK, 0), CHUNK)
    chunks = max(first * (4 + c), first * (4 + c if spread.bf16 else 4) + second * (4 + c))
    table = c * config.vocab_size * config.dim
    return chunks * config.vocab_size + table * (2 if spread.bf16 else 1)
