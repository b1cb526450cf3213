"""Labels for text that has none: which entry says what is about to be said?

Retrieval is learnt from labels (`Batch.entries`). Where nobody wrote them, a teacher makes them, once, from the text
itself. It may look at what follows a position, because a label is a target; the model that learns from it may not.

For each position the words around it, `BEHIND` tokens up to it and `AHEAD` after it, are held against the entries:
first by their codes, then the best of those exactly, by the share of the entry's rare words that stand there (of its
key part, where it has one). The next token is labelled with the best entry if that share is large enough and the entry
holds that token.

A store made from the very documents that it labels would teach a model to find its own text, which it will not find
when it is used. Make it from others: the labels cannot know.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minilm.data.labels import KnowledgeSource, write_entries
from minilm.data.store import Store
from minilm.errors import DataError
from minilm.knowledge.store import KnowledgeStore
from minilm.models.product_keys import best_cells

BEHIND, AHEAD = 16, 8
THRESHOLD = 0.5
CANDIDATES = 16  # that are looked at exactly
_ALL_UP_TO = 1 << 16  # entries that are all compared; beyond, those of the nearest cells of the grid
_CELLS = 1024
_POSITIONS = 2048  # at a time


def label(
    data: Store,
    knowledge: KnowledgeStore,
    *,
    split: str = "train",
    threshold: float = THRESHOLD,
    advance: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Give every source of a split its labels; returns the number of labelled tokens by source.

    advance  told how many tokens are done, now and then
    Raises DataError for a store of another tokenizer, or whose source is not known.
    """
    made, ours = knowledge.description["tokenizer"]["fingerprint"], data.manifest["tokenizer"]
    if ours is None or made != ours["fingerprint"]:
        raise DataError(
            f"{data.path} and {knowledge.path} were made with different tokenizers: a token of one means another word "
            "in the other. Build the knowledge store with the tokenizer of the data."
        )
    source = knowledge.description.get("source")
    if not source:
        raise DataError(
            f"{knowledge.path} does not say which file it was made from, so its rows have no names."
        )
    of = KnowledgeSource(str(source["path"]).rsplit("/", 1)[-1], source["sha256"], knowledge.num_entries)
    counts = {}
    for shard in data.shards(split):
        entries = labels_of(shard.tokens, shard.offsets, knowledge, threshold, advance)
        data = write_entries(data, split, shard.source, entries, entries_of=of)
        counts[shard.source] = int((entries >= 0).sum())
    return counts


def labels_of(
    tokens: np.ndarray,
    offsets: np.ndarray,
    knowledge: KnowledgeStore,
    threshold: float = THRESHOLD,
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Documents end to end [n] and where they begin [documents + 1] -> source row of each token [n] int32, or -1.

    The first token of a document is nobody's target and has no label.
    """
    entries = np.full(len(tokens), -1, dtype=np.int32)
    offsets = offsets.astype(np.int64)
    span = torch.arange(1 - BEHIND, AHEAD + 1)
    for begin in range(0, len(tokens) - 1, _POSITIONS):
        positions = torch.arange(begin, min(begin + _POSITIONS, len(tokens) - 1))
        document = np.searchsorted(offsets, positions.numpy(), side="right") - 1
        first, end = (torch.from_numpy(offsets[document + one])[:, None] for one in (0, 1))
        window = positions[:, None] + span
        there = (window >= first) & (window < end)
        around = torch.from_numpy(tokens[window.clamp(0, len(tokens) - 1).numpy()].astype(np.int64))
        following = torch.from_numpy(tokens[begin + 1 : begin + 1 + len(positions)].astype(np.int64))
        best = _best(torch.where(there, around, -1), following, knowledge, threshold)
        best[positions + 1 >= end[:, 0]] = -1  # what follows is another document
        entries[begin + 1 : begin + 1 + len(positions)] = best.numpy()
        if advance:
            advance(len(positions))
    return entries


def _best(around: Tensor, following: Tensor, knowledge: KnowledgeStore, threshold: float) -> Tensor:
    """Tokens around [P, K] (-1: none) and the next token [P] -> source row [P] int32, -1 where none fits."""
    table, classes = knowledge.token_codes(), knowledge.classes.long()
    there = (around >= 0).unsqueeze(-1)
    codes = F.normalize((table[around.clamp(min=0)] * there).sum(dim=1), dim=-1)  # [P, C]
    slots = _candidates(codes, knowledge)  # [P, k]
    ids = knowledge.ids[slots].long()  # [P, k, W]
    words = classes[ids]
    inside = torch.arange(ids.shape[-1]) < knowledge.lengths[slots].unsqueeze(-1)
    worth = knowledge.idf[ids] * inside  # [P, k, W]; a word twice in an entry counts twice
    known = torch.where(around >= 0, classes[around.clamp(min=0)], -1)
    said = (words.unsqueeze(-1) == known[:, None, None, :]).any(dim=-1)  # [P, k, W]
    share = (worth * said).sum(dim=-1) / worth.sum(dim=-1).clamp(min=1e-9)
    holds = ((words == classes[following][:, None, None]) & inside).any(dim=-1)
    share = torch.where(holds, share, -1.0)
    best, chosen = share.max(dim=1)
    rows = knowledge.rows[slots.gather(1, chosen[:, None])[:, 0]]
    return torch.where(best >= threshold, rows, -1).int()


def _candidates(codes: Tensor, knowledge: KnowledgeStore) -> Tensor:
    """Window codes [P, C] -> the slots whose codes are nearest [P, k], among all or those of the nearest cells."""
    if knowledge.num_slots <= _ALL_UP_TO:
        scores = codes @ knowledge.codes.float().T
        scores.masked_fill_(knowledge.lengths[None] == 0, -torch.inf)
        return scores.topk(min(CANDIDATES, knowledge.num_entries), dim=1).indices
    rows, columns = codes @ knowledge.row_means.T, codes @ knowledge.column_means.T
    _, slots = best_cells(rows, columns, _CELLS)
    scores = torch.einsum("pc,pkc->pk", codes, knowledge.codes[slots].float())
    scores.masked_fill_(knowledge.lengths[slots] == 0, -torch.inf)
    return slots.gather(1, scores.topk(CANDIDATES, dim=1).indices)
