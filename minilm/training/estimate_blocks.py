"""What autograd keeps of one block of each variant, in bytes per position: part of `estimate.py`, with its letters.

A variant whose activations were derived has its entry in `BLOCKS`; what only some blocks keep: `estimate_extra.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minilm import onednn
from minilm.models.base import ModelConfig

if TYPE_CHECKING:
    from minilm.training.estimate import Spread

BACK = "on the way back"  # gradients inside of the block, made and gone in the backward pass; no part of what is kept


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the derivation of a block depends on, beside its config."""

    c: int  # bytes of the compute type
    residual: int  # of the stream between blocks: the embedding's own type
    norm: int  # bytes that a norm over the stream keeps per position
    autocast: bool
    bf16: bool
    cuda: bool
    fused: bool  # norm, rotation and feed-forward of `models.fused`: float32 on a CPU
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
        fused = not (cuda or spread.bf16)
        return cls(
            c=2 if spread.bf16 else 4,
            residual=2 if spread.bf16 and not autocast else 4,
            norm=4 * config.dim * (1 if cuda or fused else 2) + 4,
            autocast=autocast,
            bf16=spread.bf16,
            cuda=cuda,
            fused=fused,
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
        """Its input (autocast rounds it twice, for gate and up), gate and up; unless fused, silu and the product."""
        fused = self.fused and dim * hidden_dim >= onednn.SMALLEST_WEIGHT and onednn.works()
        return self.c * dim * (2 if self.autocast else 1) + (2 if fused else 4) * self.c * hidden_dim

    def gate_gradients(self, hidden_dim: int) -> int:
        """Of gate, up and their product, made from what `swiglu` keeps."""
        return 3 * self.c * hidden_dim


def _original(config: Any, case: Case) -> dict[str, float]:
    """Bytes per position of a block: two norms, attention, a feed-forward."""
    return {
        "norms": 2 * case.norm,
        "attention": 2 * case.c * config.dim + _attention(config, case),
        "feed-forward": case.swiglu(config.dim, config.hidden_dim),
        "dropout": case.masks(config, 2),
        BACK: case.gate_gradients(config.hidden_dim),
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
        BACK: case.c * (4 * config.dim + 4 * config.num_kv_heads * config.head_dim),
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
        BACK: c * (2 * dim + stored),
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
    back = k * (case.gate_gradients(config.hidden_dim) + 2 * case.c * dim)
    return _original(config, case) | {"feed-forward": router + experts + shared, BACK: back}


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
    if case.backend == "blockwise":  # makes its sums again, too
        return values + rotated
    return values + rotated + 4 * heads + mask


def _written_out(heads: int, case: Case) -> int:
    """Scores as a matrix: softmax, its rounded copy, dropout's mask and product, and the mask of who sees whom."""
    if case.backend != "eager":  # torch's own for dropout on a CPU, in float32
        return 3 * 4 * heads * case.keys
    rounded = case.c if case.bf16 else 0
    weights = 4 + ((1 if case.cuda else case.c) + case.c if case.dropout else rounded)
    return weights * heads * case.keys + case.keys
