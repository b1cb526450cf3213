"""Counting tokens: documents and rows as flat arrays, and the arithmetic that the checks of data share.

Rows cannot be told by their numbers in a loader that is not ours, and packing changes what a row is. What is exact for
any loader is counting: n-grams of tokens within documents against n-grams within the runs of rows, as 64-bit hashes
(two different n-grams share one with a probability below 1e-6 for a million of them).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilm.doctor.core import NotApplicable
from minilm.doctor.subject import DataView, Rows

MAX_TOKENS = 1_500_000  # that one look at a split or an epoch takes in, and
MAX_SECONDS = 5.0  # how long it may take
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Documents:
    """Documents end to end: `tokens` [N] int64; document k is tokens[offsets[k] : offsets[k + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray
    whole: bool  # False: only the first ones of those that were given
    excerpt: bool = False  # the owner gave only the first ones

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, k: int) -> np.ndarray:
        return self.tokens[self.offsets[k] : self.offsets[k + 1]]

    @property
    def numbers(self) -> np.ndarray:
        """[N]: 1, 2, ... the document that each token is of."""
        return np.repeat(np.arange(1, len(self) + 1), np.diff(self.offsets))

    @property
    def said(self) -> str:
        """What was looked at, for a finding."""
        return f"{'all' if self.whole and not self.excerpt else 'the first'} {len(self):,} documents"

    def grams(self, n: int) -> np.ndarray:
        """Hashes of all n-grams that lie within one document."""
        return grams(self.tokens[None], self.numbers[None], n)


@dataclass(frozen=True)
class Epoch:
    """Rows of an epoch, one after the other: [R, T] int64 each; `runs` is 0 at padding, else the number of the run
    within the row; `learn` is 1 where a token is to be learnt; batches: rows in each batch."""

    tokens: np.ndarray
    runs: np.ndarray
    learn: np.ndarray
    batches: tuple[int, ...]
    whole: bool

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> np.ndarray:
        """[R, T] bool: is this token a target of the one before it."""
        found = np.zeros(self.tokens.shape, dtype=bool)
        found[:, 1:] = (
            (self.runs[:, 1:] == self.runs[:, :-1]) & (self.runs[:, 1:] > 0) & (self.learn[:, 1:] > 0)
        )
        return found

    @property
    def hashes(self) -> np.ndarray:
        """[R] a hash of each row's tokens, in the order in which they came."""
        real = np.where(self.runs > 0, self.tokens.astype(np.uint64) + np.uint64(1), np.uint64(0))
        found: np.ndarray = (_mixed(real) * _powers(real.shape[1])).sum(axis=1, dtype=np.uint64)
        return found

    def pairs(self) -> np.ndarray:
        """Hashes of (token before, target) of all targets."""
        return grams(self.tokens, self.runs, 2, self.targets)


def documents(view: DataView, split: str, part: str = "documents") -> Documents:
    """The first documents of a split, as many as the limits allow. NotApplicable where there is none."""
    give = getattr(view, part)
    if give is None:
        raise NotApplicable(f"needs {part} of the data")
    given = give(split)
    if len(given) and np.ndim(given[0]) == 0:  # one stream
        given = [given]
    taken: list[np.ndarray] = []
    total, deadline = 0, time.monotonic() + MAX_SECONDS
    for document in given:
        if taken and (total + len(document) > MAX_TOKENS or time.monotonic() > deadline):
            break
        taken.append(np.asarray(document, dtype=np.int64))
        total += len(document)
    if not total:
        raise NotApplicable(f"there are no {split} documents")
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in taken])])
    return Documents(np.concatenate(taken), offsets, len(taken) == len(given), bool(view.excerpt))


def epoch(view: DataView, number: int, seed: int, rank: int = 0, world: int = 1) -> Epoch:
    """The rows that a rank is given, as many as the limits allow. NotApplicable where there is none."""
    if view.batches is None:
        raise NotApplicable("needs the batches of an epoch")
    return gathered(view.batches(number, seed, rank, world))


def gathered(batches: Iterable[Rows]) -> Epoch:
    """Batches of rows as one array."""
    taken: list[Rows] = []
    total, whole, deadline = 0, True, time.monotonic() + MAX_SECONDS
    for rows in batches:
        taken.append(rows)
        total += rows.tokens.numel()
        if total > MAX_TOKENS or time.monotonic() > deadline:
            whole = False
            break
    if not total:
        none = np.zeros((0, 1), dtype=np.int64)
        return Epoch(none, none, none, (), True)
    width = max(rows.tokens.shape[1] for rows in taken)

    def joined(parts: list[Any]) -> np.ndarray:
        arrays = [np.asarray(p.cpu(), dtype=np.int64) for p in parts]
        return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in arrays])

    segments = joined([r.segments for r in taken])
    changed = np.zeros_like(segments)
    changed[:, 1:] = segments[:, 1:] != segments[:, :-1]
    runs = np.where(segments > 0, changed.cumsum(axis=1) + 1, 0)
    return Epoch(
        joined([r.tokens for r in taken]),
        runs,
        joined([r.learn for r in taken]),
        tuple(map(len, taken)),
        whole,
    )


def grams(tokens: np.ndarray, runs: np.ndarray, n: int, counted: np.ndarray | None = None) -> np.ndarray:
    """Hashes of the n-grams of rows [R, T] that lie within one run; `counted` [R, T]: only those that end there."""
    return gram_table(tokens, runs, n, counted)[0]


def gram_table(
    tokens: np.ndarray, runs: np.ndarray, n: int, counted: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes as in `grams`, and the flat place [R T] of the LAST token of each."""
    width = tokens.shape[1]
    if width < n:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    mixed, stop = _mixed(tokens.astype(np.uint64) + np.uint64(1)), width - n + 1
    powers = _powers(n)
    total = np.zeros((len(tokens), stop), dtype=np.uint64)
    inside = runs[:, :stop] > 0
    for i in range(n):
        total += mixed[:, i : i + stop] * powers[i]
        inside &= runs[:, i : i + stop] == runs[:, :stop]
    if counted is not None:
        inside &= counted[:, n - 1 :]
    places = np.arange(tokens.size).reshape(tokens.shape)[:, n - 1 :]
    return total[inside], places[inside]


def surplus(have: np.ndarray, wanted: np.ndarray, times: float = 1.0) -> tuple[int, int]:
    """Multisets of hashes: how many of `have` are too many, how many of `wanted` (each `times`) are missing."""
    keys, inverse = np.unique(np.concatenate([have, wanted]), return_inverse=True)
    counts = np.bincount(inverse[: len(have)], minlength=len(keys)) - times * np.bincount(
        inverse[len(have) :], minlength=len(keys)
    )
    return round(float(counts[counts > 0].sum())), round(float(-counts[counts < 0].sum()))


def gram_length(vocab_size: int | None) -> int:
    """So many tokens that two texts do not share them by chance: 13 words of a large vocabulary (as is used to find
    contamination), or 50 characters."""
    bits = math.log2(max(2, min(vocab_size or 50_000, 50_000)))
    return 13 if bits >= 10 else round(250 / bits)


def coverage(part: Documents, grams_of_other: np.ndarray, n: int) -> np.ndarray:
    """[documents]: the share of the n-grams of each document that are among the others; NaN for shorter ones."""
    hashes, places = gram_table(part.tokens[None], part.numbers[None], n)
    owner = part.numbers[places] - 1
    found = np.isin(hashes, grams_of_other)
    counts = np.bincount(owner, minlength=len(part))
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, np.bincount(owner, weights=found, minlength=len(part)) / counts, np.nan)


def row_places(rows: Epoch, made_of: Documents) -> np.ndarray:
    """[R]: where in the documents, end to end, each row was taken from; -1 where it cannot be told."""
    best = np.full(len(rows), -1)
    for length in (8, 24, 48, 4):  # pieces long enough to stand in one place only, short enough for the rows
        known, ends = gram_table(made_of.tokens[None], made_of.numbers[None], length)
        order = np.argsort(known, kind="stable")
        known, ends = known[order], ends[order]
        hashes, at = gram_table(rows.tokens, rows.runs, length)
        left, right = np.searchsorted(known, hashes, "left"), np.searchsorted(known, hashes, "right")
        unique = np.flatnonzero(right - left == 1)  # this n-gram stands in one place only
        row, first = np.unique(at[unique] // rows.tokens.shape[1], return_index=True)
        chosen = unique[first]
        found = np.full(len(rows), -1)
        found[row] = ends[left[chosen]] - at[chosen] % rows.tokens.shape[1]
        if (found >= 0).sum() > (best >= 0).sum():
            best = found
        if (best >= 0).mean() > 0.8:
            break
    return best


def lost(view: DataView, number: int, seed: int) -> int | None:
    """How many targets of an epoch the owner knows to be left out; None: not said."""
    return view.lost_targets(number, seed) if callable(view.lost_targets) else view.lost_targets


def sample(items: Sequence[Any], count: int, most: int = 100_000) -> list[Any]:
    """At most `count` of them, evenly spaced, and no more once their lengths add up to `most`."""
    step = max(1, -(-len(items) // count))
    taken: list[Any] = []
    total = 0
    for item in itertools.islice(items, 0, None, step):
        taken.append(item)
        total += len(item)
        if total > most:
            break
    return taken


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finish: neighbouring ids get unrelated words."""
    z = x * _MULTIPLIER
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _powers(n: int) -> np.ndarray:
    powers = np.empty(n, dtype=np.uint64)
    value = 0xD1342543DE82EF95
    for i in range(n):
        powers[i] = value
        value = value * 0xD1342543DE82EF95 % 2**64
    return powers
