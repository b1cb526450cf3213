"""Codes: a short vector for the words of an entry, and one of the same kind for the words before a position.

Nothing here is trained. Each token has a fixed random vector, scaled by how rare the token is in the key parts of
the entries (idf); an entry's code is the normed sum over its key part, a position's code the normed sum over the
last tokens up to it, in its own document only. Two texts that share rare words have a large scalar product.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW_TOKENS = 16
# A token 16 places back still counts 0.46: the words of a key stand at varying distance from where they are needed.
DECAY = 0.95
_CHUNK = 1 << 16  # entries at a time: a million entries have 30 million tokens, 240 MB as int64


def random_table(vocab_size: int, code_dim: int, seed: int) -> Tensor:
    """[vocab_size, code_dim] float32, N(0, 1): the fixed vectors of the tokens, the same on every machine.

    NumPy promises never to change the stream of `RandomState`; it promises it for no newer generator, torch for none.
    """
    values = np.random.RandomState(seed).standard_normal((vocab_size, code_dim))
    return torch.from_numpy(values.astype(np.float32))


def token_table(classes: Tensor, idf: Tensor, code_dim: int, seed: int) -> Tensor:
    """[vocab_size, code_dim] float32: the code vector of each token, idf included.

    classes  [V] int32: tokens of one class (" Paris", "paris", "Paris") have one vector
    idf      [V] float32; 0 for tokens whose class is in no entry's key part
    """
    table = random_table(classes.numel(), code_dim, seed)
    return table[classes.long()] * idf[:, None]


def inverse_frequencies(classes: Tensor, flat: Tensor, starts: Tensor) -> Tensor:
    """[V] float32: ln((n + 1) / number of key parts with the token's class), 0 for a class that is in none.

    flat, starts  the key parts of n entries: all their tokens one after another, and where each one begins, [n]

    Positive for every token that occurs, even one that is in all entries: its code is never lost altogether.
    """
    num_entries, vocab_size = starts.numel(), classes.numel()
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for tokens, begins in _parts(flat, starts):
        lengths = torch.diff(begins, append=begins.new_tensor([tokens.numel()]))
        owner = torch.repeat_interleave(torch.arange(len(begins)), lengths)
        pairs = torch.unique(owner * vocab_size + classes.long()[tokens])  # twice in one key part counts once
        counts += torch.bincount(pairs % vocab_size, minlength=vocab_size)
    counts = counts[classes.long()]
    idf = torch.log((num_entries + 1) / counts.clamp(min=1).double())
    return torch.where(counts > 0, idf, torch.zeros(())).float()


def entry_codes(table: Tensor, flat: Tensor, starts: Tensor) -> Tensor:
    """[n, C] float32, each of length 1, or all zeros where the key part holds no token with a code.

    table [V, C]; flat, starts as for `inverse_frequencies`.
    """
    codes = [
        F.normalize(F.embedding_bag(tokens, table, begins, mode="sum"), dim=-1)
        for tokens, begins in _parts(flat, starts)
    ]
    return torch.cat(codes) if codes else torch.empty(0, table.shape[1])


def _parts(flat: Tensor, starts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some entries after others: their tokens, int64, and where each begins among these."""
    for begin in range(0, starts.numel(), _CHUNK):
        some = starts[begin : begin + _CHUNK]
        end = int(starts[begin + _CHUNK]) if begin + _CHUNK < starts.numel() else flat.numel()
        yield flat[int(some[0]) : end].long(), some - some[0]


def window_codes(
    table: Tensor,
    tokens: Tensor,
    segments: Tensor | None = None,
    window: int = WINDOW_TOKENS,
    decay: float = DECAY,
) -> Tensor:
    """[B, L, C] float32: for position t the normed sum of decay^j * table[tokens[t - j]] over j = 0 .. window - 1.

    table     [V, C] float32, from `KnowledgeStore.token_codes`
    tokens    [B, L] int64
    segments  [B, L], 0 = padding: only tokens of the position's own segment count; None: each row is one segment

    A position sees itself and what is before it, nothing later. Padding, and positions whose window holds no token
    with a code, get zeros. Under autocast, too, the sums are float32.
    """
    length = tokens.shape[1]
    vectors = table[tokens]  # [B, L, C]
    sums = vectors.clone()
    for j in range(1, min(window, length)):
        shifted = vectors[:, : length - j] * decay**j
        if segments is not None:
            same = segments[:, j:] == segments[:, : length - j]
            shifted = shifted * same[..., None]
        sums[:, j:] += shifted
    if segments is not None:
        sums = sums * (segments != 0)[..., None]
    return F.normalize(sums, dim=-1)
