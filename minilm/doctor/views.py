"""What may be asked of a knowledge memory and of a mixture of experts: the parts of a subject with these names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass
class MemoryReads:
    """What a memory read for N tokens.

    entries  [N, k] int64
    weights  [N, k] share of each in what was read; 0 for a place that held nothing
    null     [N] share of "nothing here is of use"; None: the memory cannot say so
    gates    [N] how far what was read was let through, 0 to 1; None: it has no gate
    """

    entries: Tensor
    weights: Tensor
    null: Tensor | None = None
    gates: Tensor | None = None


@dataclass(kw_only=True)
class MemoryView:
    """A memory of E entries that is read by keys.

    states       tokens [B, T] -> states [N, D] as they arrive at the memory (N = B x T)
    queries      states [N, D] -> queries [N, Q], as they meet the keys
    keys         -> key of every entry [E, Q], such that score = query . key (a product key: the two halves joined)
    retrieve     states [N, D] -> (entries [N, k], scores [N, k]) that are read, or looked at again more closely
    scores       states [N, D] -> score of every entry [N, E], where keys [E, Q] would be too large; None: by keys
    num_entries  E; None: as many as keys
    columns      C of a grid of keys, whose entry r x C + c has the sub-keys r and c; None: it is no product of two
    occupied     -> [E] bool: which entries hold anything; None: all
    values       entries [M] -> what is read of each [M, C], before any weighting
    edit         (entry, token ids) -> replaces the content of an entry. Where that is no tensor of the module, it
                 returns a function that takes the edit back
    silenced     tokens [B, T] -> logits with every entry's content taken away
    reads        tokens [B, T], segments [B, T] (0: padding) -> what is read for the tokens that are no padding
    pad_id       fills entries up to their length; None: entries have no padding, or an ordinary token fills them
    """

    states: Callable[[Tensor], Tensor]
    queries: Callable[[Tensor], Tensor]
    keys: Callable[[], Tensor]
    retrieve: Callable[[Tensor], tuple[Tensor, Tensor]]
    scores: Callable[[Tensor], Tensor] | None = None
    num_entries: int | None = None
    columns: int | None = None
    occupied: Callable[[], Tensor] | None = None
    values: Callable[[Tensor], Tensor] | None = None
    edit: Callable[[int, Sequence[int]], object] | None = None
    silenced: Callable[[Tensor], Tensor] | None = None
    reads: Callable[[Tensor, Tensor], MemoryReads] | None = None
    pad_id: int | None = None  # of the entries' token ids

    def total(self) -> int:
        """E."""
        return self.keys().shape[0] if self.num_entries is None else self.num_entries

    def every_score(self, states: Tensor) -> Tensor:
        """states [N, D] -> the score of every entry [N, E], float32."""
        if self.scores is not None:
            return self.scores(states).float()
        return self.queries(states).float() @ self.keys().float().T


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
