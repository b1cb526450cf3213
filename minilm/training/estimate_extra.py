"""What single blocks of a model keep beside what all of its blocks keep: a knowledge memory, a table of values.

Part of `estimate.py`, whose letters these are. Bytes per position of a memory layer, with k = num_candidates, m =
num_read, W = store_width, C = store_code_dim, R = router_dim, K = key_dim, S = store_side, h = memory_heads of size e:

    norm and states   a norm; 4 D in float32, and where c is 2, 2 D more (autocast rounds twice: 4 D)
    queries           4 (C + D) and 8 R inside of the router, 16 K + 16 for the norm of the queries, 4 C for the reread
    scores            8 S for rows and columns before they are scaled
    candidates        4 k C: their codes, gathered and widened; 24 min(k, S) and about 24 k for places and gates
    index loss        at every fourth position, for the entry drawn: 8 R + 16 K + 16 S
    retrieval losses  at positions whose entry is known, all of the above up to candidates once more, and 8 S + 5 k
    reading           2 c e m W: keys and values, gathered (none where `models.reading` runs: float32 on a CPU); 9 m W
                      for ids and lengths; 4 h (m W + 1) for the softmax, 2 h (m W + 1) for its rounded copy where c is
                      2, and c h W for its sums over the entries; 3 c h e for queries, what was read, and what was gated

Once, not per position: the normed embedding, or where `models.reading` runs its product with all keys and values; the
sub-keys of each layer, and weights that were rounded or widened.

A table of values (h = value_heads, K = value_key_dim, t = top_values): queries are normed in float32, so 16 h K before
and after it; 32 h t for places and 4 h t for weights; and four vectors of D around the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minilm.models.memory_rows import DRAW_EVERY

if TYPE_CHECKING:
    from minilm.training.estimate_blocks import Case

_WIDE = 4  # bytes of float32, in which retrieval runs under any precision
_PLACE = 8  # of int64


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What some blocks of a model keep beyond what all do (below zero: less), and what these share. Bytes."""

    layers: tuple[int, ...] = ()  # numbers of those that are such
    inside: dict[str, float] = field(default_factory=dict)  # of one of them, per position, by part
    backward: float = 0.0  # a gradient of its backward pass that is large beside it, per position
    per_position: float = 0.0  # however many they are
    once: float = 0.0  # whatever the number of positions


def nothing(config: Any, case: Case) -> Extra:
    """Of a model whose blocks are all alike."""
    return Extra()


def _knowledge(config: Any, case: Case) -> Extra:
    """Memory layers: a norm, a retriever, the reading."""
    if not config.layers:
        return Extra()
    draws = 1 / DRAW_EVERY if config.index_weight else 0.0
    return Extra(
        layers=tuple(config.layers),
        inside={"memory": case.norm + _retrieval(config, case, draws) + _reading(config, case)},
        backward=_gathered(config, case),
        per_position=_WIDE * config.store_code_dim * (1 + draws),  # codes of windows and of entries drawn
        once=_of_embedding(config, case) + len(config.layers) * _of_weights(config, case),
    )


def _retrieval(config: Any, case: Case, draws: float) -> float:
    """Bytes per position of one retriever. draws: share of positions that draw an entry."""
    code, side, found, read = config.store_code_dim, config.store_side, config.num_candidates, config.num_read
    scores = 2 * _WIDE * side
    # Hidden before and after its nonlinearity; the queries before their norm and after it, with mean and deviation.
    query = 2 * _WIDE * config.router_dim + 2 * _WIDE * 2 * config.key_dim + 4 * _WIDE + scores
    asked = _WIDE * (code + config.dim) + query + _WIDE * code
    codes = _WIDE * found * code
    places = 2 * _PLACE * min(found + 1, side) + _PLACE * (found + 1) + _PLACE * (read + 1)
    # Of both choices: what was left out, three steps of a logarithm, two masks; and the softmax over the candidates.
    gates = _WIDE * (found + read + 2) + (3 * _WIDE + 2) * (found + read) + _WIDE * (found + 1) + 1
    copied = _WIDE * (code + config.dim) + asked  # window code, state, and what they ask
    entries = codes + _WIDE * code + found + _WIDE * (found + 1)  # candidates, the right one, mask, softmax
    known = _known(config, case) * (copied + entries + scores + 4 * _PLACE)
    drawn = draws * (query + scores + 2 * _PLACE + 1)
    return float(asked + places + codes + gates + known + drawn)


def _known(config: Any, case: Case) -> float:
    """Share of the positions that pay for the retrieval losses."""
    return case.labelled if config.retrieval_weight else 0.0


def _reading(config: Any, case: Case) -> float:
    """Bytes per position of the attention over the tokens of the entries that are read."""
    c, heads, size = case.c, config.memory_heads, config.memory_head_dim
    tokens = config.num_read * config.store_width
    states = _WIDE * config.dim + (c * config.dim * (2 if case.autocast else 1) if case.bf16 else 0)
    weights = (_WIDE + (c if case.bf16 else 0)) * heads * (tokens + 1)
    of_heads = c * heads * (3 * size + 1 + config.store_width)  # the last: of positions, over all entries
    return float(states + _gathered(config, case) + (_PLACE + 1) * tokens + weights + of_heads)


def _gathered(config: Any, case: Case) -> float:
    """Keys and values of the tokens that one position reads. Their gradient is as large, and made in two halves."""
    if case.fused:
        return 0.0  # both are there for some positions at a time
    return float(2 * case.c * config.memory_head_dim * config.num_read * config.store_width)


def _of_embedding(config: Any, case: Case) -> float:
    """The normed table that keys and values come from; where it is not made, the keys and values of all tokens."""
    cells, scales = config.vocab_size * config.dim, _WIDE * config.vocab_size
    if case.fused:
        return float(len(config.layers) * _WIDE * 2 * config.memory_head_dim * config.vocab_size + scales)
    if case.autocast:
        return float(len(config.layers) * case.c * cells + scales)  # rounded anew for each layer
    return float(
        case.c * cells + scales + (_WIDE * cells if case.bf16 else 0)
    )  # the norm's own input is float32


def _of_weights(config: Any, case: Case) -> float:
    """Of one layer: keys and values in one matrix, the normed sub-keys, and copies in another precision."""
    dim, heads, size = config.dim, config.memory_heads, config.memory_head_dim
    labelled = 1 if _known(config, case) else 0
    calls = 1 + labelled + (1 if config.index_weight else 0)
    keys = _WIDE * 2 * config.store_side * (config.key_dim + 2)
    copies = 0
    if case.autocast:
        copies = case.c * (heads * (2 * size + 1) * dim + 2 * size * config.store_width)
    elif case.bf16:
        keys += _WIDE * 2 * config.store_side * config.key_dim
        code, hidden = config.store_code_dim, config.router_dim
        asked = hidden * (code + dim) + 2 * config.key_dim * dim + code * (hidden + dim)
        copies = _WIDE * ((1 + labelled) * asked + calls * 2 * config.key_dim * hidden)
    return float(case.c * 2 * size * dim + calls * keys + copies)


def _pkm(config: Any, case: Case) -> Extra:
    """One block with a table of values in place of its feed-forward, or beside it."""
    c, dim, heads, top = case.c, config.dim, config.value_heads, config.top_values
    keys = heads * 2 * config.value_key_dim
    replaces = config.value_place == "replace"
    # Beside a feed-forward its input is there already, but that autocast rounds it for each product.
    states = c * dim * (2 if case.autocast else 1) if replaces or case.autocast else 0
    queries = 2 * _WIDE * keys + 2 * _WIDE * 2 * heads
    chosen = 3 * _PLACE * heads * min(top, config.value_side) + _PLACE * heads * top + 3 * _PLACE
    weights = (_WIDE + (c if c != _WIDE and not case.autocast else 0)) * heads * top
    inside = {"values": states + queries + chosen + weights + (case.residual + 3 * c) * dim}
    if replaces:
        inside["feed-forward"] = -case.swiglu(dim, config.hidden_dim)
    copies = _WIDE * keys * config.value_side
    once = copies
    if case.autocast:
        once += c * (keys * dim + 2 * dim * dim)
    elif case.bf16:
        once += copies  # the norm's own input is float32
    return Extra(layers=(config.layer,), inside=inside, once=once)


# A variant of which some blocks are unlike the others has its entry here, beside the one in `BLOCKS` for all of them.
EXTRAS: dict[str, Callable[[Any, Case], Extra]] = {
    "knowledge": _knowledge,
    "no_ffn_knowledge": _knowledge,
    "pkm": _pkm,
}
