"""What may be asked of a knowledge memory and of a mixture of experts: the parts of a subject with these names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(kw_only=True)
class MemoryView:
    """A memory of E entries that is read by keys.

    states       tokens [B, T] -> states [N, D] as they arrive at the memory (N = B x T)
    queries      states [N, D] -> queries [N, Q], as they meet the keys
    keys         -> key of every entry [E, Q], such that score = query . key (of a product key: the two halves joined)
    retrieve     states [N, D] -> (entries [N, k], scores [N, k]) that are read
    values       entries [M] -> what is read of each [M, C], before any weighting
    edit         (entry, token ids) -> None: replaces the content of an entry
    silenced     tokens [B, T] -> logits with every entry's content taken away
    pad_id       fills entries up to their length; None: entries have no padding
    """

    states: Callable[[Tensor], Tensor]
    queries: Callable[[Tensor], Tensor]
    keys: Callable[[], Tensor]
    retrieve: Callable[[Tensor], tuple[Tensor, Tensor]]
    values: Callable[[Tensor], Tensor] | None = None
    edit: Callable[[int, Sequence[int]], object] | None = None
    silenced: Callable[[Tensor], Tensor] | None = None
    pad_id: int | None = None  # of the entries' token ids


@dataclass(kw_only=True)
class RouterView:
    """A router over E experts.

    route        states [N, D] -> (experts [N, k], weights [N, k])
    num_experts  E
    width        D
    normalised   the k weights of a token add up to 1, by the owner's policy
    balance      router logits of each layer [N, E], keep [N] bool -> the auxiliary loss over all layers, not weighted
    dispatched   states [N, D] -> (tokens that each expert worked on [E], how many assignments were reported dropped)
    logits       states [N, D] -> router logits [N, E]
    """

    route: Callable[[Tensor], tuple[Tensor, Tensor]]
    num_experts: int
    width: int
    normalised: bool = True
    balance: Callable[[Sequence[Tensor], Tensor], Tensor] | None = None
    dispatched: Callable[[Tensor], tuple[Tensor, int]] | None = None
    logits: Callable[[Tensor], Tensor] | None = None
