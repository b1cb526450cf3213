"""What the memory layers of a forward pass need to know of its rows: content codes, labels, entries drawn by lot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.errors import DataError
from minilm.knowledge.codes import window_codes
from minilm.knowledge.store import KnowledgeStore
from minilm.models.cache import CachedRows, positions_within
from minilm.models.moe import predicting

DRAW_EVERY = 4  # tokens of a document for one entry drawn
MIXED = 0.3  # share of another entry's code in a drawn query
# Odd multipliers of 64 bits that mix well (Knuth's MMIX, and two of splitmix64), as signed numbers.
_POWER, _MIX, _MORE = 6364136223846793005, -4658895280553007687, -7723592293110705685


def codes_of(table: Tensor, tokens: Tensor, segments: Tensor | None, window: int, decay: float) -> Tensor:
    """`window_codes` of rows [B, L], whose padding, also where it stands inside of a document, counts as nothing."""
    if segments is None:
        return window_codes(table, tokens, None, window, decay)
    order = (
        (segments == 0).long().argsort(dim=1, stable=True)
    )  # what is no padding, in its order; then the padding
    codes = window_codes(table, tokens.gather(1, order), segments.gather(1, order), window, decay)
    return codes.gather(1, order.argsort(dim=1).unsqueeze(-1).expand_as(codes))


def cached_codes(table: Tensor, cache: CachedRows, length: int, window: int, decay: float) -> Tensor:
    """`window_codes` of the last `length` tokens of a cache, [B, length, code_dim].

    By position, not by place: padding may stand between a row's tokens there.
    """
    segments, positions = cache.all_segments, cache.all_positions  # [B, S]
    back = positions[:, -length:, None] - positions[:, None, :]  # [B, length, S]
    seen = segments[:, -length:, None] == segments[:, None, :]
    seen &= (segments[:, -length:, None] > 0) & (back >= 0) & (back < window)
    weights = torch.where(seen, decay ** back.clamp(min=0).to(table.dtype), 0.0)
    with torch.autocast(table.device.type, enabled=False):
        return F.normalize(weights @ table[cache.all_tokens], dim=-1)


def slots_of(entries: Tensor, store: KnowledgeStore) -> Tensor:
    """Source rows [B, L] -> slots [B, L], -1 where unknown. Raises DataError for a row that the store has not."""
    if entries.device.type == "cpu" and entries.numel() and int(entries.max()) >= store.num_entries:
        raise DataError(
            f"The data name entry {int(entries.max())} of the knowledge store, which has {store.num_entries} entries: "
            "its labels were made for another store."
        )
    return torch.where(entries >= 0, store.slots[entries.clamp(min=0)].long(), -1)


def draws(segments: Tensor) -> Tensor:
    """[B, L] bool: the tokens that draw an entry, every fourth of a document that predicts something."""
    return predicting(segments) & (positions_within(segments) % DRAW_EVERY == DRAW_EVERY - 1)


def drawn(tokens: Tensor, segments: Tensor, store: KnowledgeStore) -> tuple[Tensor, Tensor]:
    """Queries that ask for entries drawn by lot: codes [M, code_dim] and the slots that are right [M].

    A query is the code of its entry with some of another's, as a window holds other words, too. What is drawn is a
    function of the document's own tokens up to there, not of a generator: the same however a batch is cut, on every
    rank layout, and after a resume.
    """
    chosen = draws(segments)
    hashed = _mixed(_prefix_hashes(tokens, segments)[chosen])
    first, second = (
        store.slots[(value & (2**62 - 1)) % store.num_entries].long() for value in (hashed, _mixed(hashed))
    )
    codes = F.normalize(store.codes[first].float() + MIXED * store.codes[second].float(), dim=-1)
    # An entry without any word that codes know has no code, and nobody can ask for it.
    return codes, torch.where((store.codes[first] != 0).any(dim=-1), first, -1)


def _prefix_hashes(tokens: Tensor, segments: Tensor) -> Tensor:
    """[B, L] int64 hash of each token's document up to it; integers of 64 bits that run over, on purpose."""
    positions = positions_within(segments)
    powers = torch.full((tokens.shape[1],), _POWER, dtype=torch.long, device=tokens.device).cumprod(dim=0)
    terms = (tokens + 1) * powers[positions]
    sums = terms.cumsum(dim=1)
    start = torch.arange(tokens.shape[1], device=tokens.device) - positions  # of the document
    before = sums.gather(1, start.clamp(min=0)) - terms.gather(1, start.clamp(min=0))
    return sums - before


def _mixed(values: Tensor) -> Tensor:
    values = (values ^ (values >> 30)) * _MIX
    values = (values ^ (values >> 27)) * _MORE
    return values ^ (values >> 31)


def uneven(scores: Tensor, keep: Tensor) -> Tensor:
    """Switch's balance loss (arXiv 2101.03961) of sub-key scores [B, L, side], by row, times the row's tokens, summed.

    By row, because only so it is the same however a batch is cut. keep [B, L]: tokens that count.
    """
    kept = keep.to(scores.dtype).unsqueeze(-1)
    count = kept.sum(dim=1).clamp(min=1)  # [B, 1]
    chosen = torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    share = (chosen * kept).sum(dim=1) / count  # [B, side]; counts, without a gradient
    probability = (scores.softmax(dim=-1) * kept).sum(dim=1) / count
    return (scores.shape[-1] * (share * probability).sum(dim=-1) * kept.sum(dim=(1, 2))).sum()
