"""Stores to rows of tokens: where each row begins and ends, and in which order an epoch takes them.

A row has sequence_length + 1 tokens, because the last one is only predicted. Nothing is shifted here.

packed    The documents of a source are one stream, cut with stride L: row k is stream[k L : k L + L + 1]. The last
          token of a row is the first of the next: it is a target in one and an input in the other, and so every
          token of a document but its first is a target exactly once.

              stream   a1 a2 a3 a4 EOS b1 b2 EOS c1 c2 c3 EOS            L = 4
              row 0    a1 a2 a3 a4 EOS                                   segments 1 1 1 1 1
              row 1                EOS b1 b2 EOS c1                               1 2 2 2 3
              row 2                              c1 c2 c3 EOS PAD                 1 1 1 1 0

document  One document a row, padded; a longer one is cut with the same stride.

A document that goes on in the next row is a fresh segment there: it does not see its earlier part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minilm.data.permutation import Permutation
from minilm.data.store import Shard, Store
from minilm.errors import ConfigError, listed

KINDS = ("packed", "document")


@dataclass(frozen=True)
class RowPlace:
    """Where a row comes from. Documents are numbered within their source and split, as in `Shard.document`."""

    row: int
    source: str
    first_document: int
    last_document: int

    def __str__(self) -> str:
        if self.first_document == self.last_document:
            return f"row {self.row}: {self.source} document {self.first_document}"
        return f"row {self.row}: {self.source} documents {self.first_document} to {self.last_document}"


class Rows:
    """All rows of one split, numbered 0 .. len(rows) - 1 in the order of the disk, source after source.

    `order` gives the rows of an epoch: `rows_per_epoch` of them, which differs from len(rows) where a source has
    a weight other than 1. A weight of 2 takes each row of that source twice an epoch; 0.25 takes a quarter of
    them, and the next epoch goes on with the next quarter, so that all rows are used evenly.

    weights   per source, in place of those in the store
    Memory: nothing per row for "packed", 8 bytes per document for "document".
    """

    def __init__(
        self,
        store: Store,
        split: str,
        sequence_length: int,
        kind: str = "packed",
        *,
        weights: dict[str, float] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"rows is {kind!r}: choose {' or '.join(KINDS)}.")
        if sequence_length < 1:
            raise ConfigError(f"sequence_length is {sequence_length}: at least 1 token is needed.")
        self.store, self.split, self.sequence_length, self.kind = store, split, sequence_length, kind
        self.shards = store.shards(split)
        self.weights = self._checked_weights(weights or {})
        self._parts = [
            _packed(s, sequence_length) if kind == "packed" else _single(s, sequence_length)
            for s in self.shards
        ]
        per_source = [part.num_rows for part in self._parts]
        self._first = np.concatenate([[0], np.cumsum(per_source)])  # row number at which each source begins
        # At least one row of a source that is wanted at all; a rounded count keeps all epochs equally long.
        self._taken = np.array(
            [
                0 if w == 0 or n == 0 else max(1, round(w * n))
                for w, n in zip(self.weights.values(), per_source, strict=True)
            ]
        )
        self.rows_per_epoch = int(self._taken.sum())
        if self.rows_per_epoch == 0:
            raise ConfigError(
                f"There are no rows in the {split} split of {store.path} with these weights ({self.weights}): each "
                "source has the weight 0, or no document with two tokens."
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens [L+1] and segments [L+1], both int64. Padding has segment 0."""
        tokens, segments = self.batch(np.array([row]))
        return tokens[0], segments[0]

    @property
    def num_targets(self) -> int:
        """Predictions that count, over all rows once: every token of every document but the first."""
        return sum(shard.num_targets for shard in self.shards)

    @property
    def targets_per_row(self) -> float:
        """Predictions that count in a row, on average over the rows of many epochs, with the sources' weights."""
        per_row = [s.num_targets / max(1, p.num_rows) for s, p in zip(self.shards, self._parts, strict=True)]
        return float(np.dot(per_row, self._taken)) / self.rows_per_epoch

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number: tokens [B, L+1] and segments [B, L+1], int64. Raises IndexError."""
        rows = np.asarray(rows, dtype=np.int64)
        if ((rows < 0) | (rows >= len(self))).any():
            raise IndexError(f"row numbers must be 0 to {len(self) - 1}, not {rows.tolist()}")
        width = self.sequence_length + 1
        tokens = np.full((len(rows), width), self.store.pad_id, dtype=np.int64)
        segments = np.zeros((len(rows), width), dtype=np.int64)
        sources = np.searchsorted(self._first, rows, side="right") - 1
        for source in np.unique(sources):
            shard, part = self.shards[source], self._parts[source]
            shard.check()  # not cut off, or the next lines would end the process
            members = np.flatnonzero(sources == source)
            starts, stops = part.bounds(rows[members] - self._first[source])
            stream = shard.tokens
            for member, start, stop in zip(members.tolist(), starts.tolist(), stops.tolist(), strict=True):
                tokens[member, : stop - start] = stream[start:stop]
            segments[members] = _segments(shard.offsets, starts, stops, width)
            shard.check()  # not written over while it was read
        return tokens, segments

    def entries(self, rows: np.ndarray) -> np.ndarray | None:
        """Labels of the tokens of rows by number, [B, L+1] int64: a row of the knowledge source, or -1.

        None where no source of this split has labels; -1 throughout for a source without. Raises IndexError.
        """
        if all(shard.entries is None for shard in self.shards):
            return None
        rows = np.asarray(rows, dtype=np.int64)
        if ((rows < 0) | (rows >= len(self))).any():
            raise IndexError(f"row numbers must be 0 to {len(self) - 1}, not {rows.tolist()}")
        found = np.full((len(rows), self.sequence_length + 1), -1, dtype=np.int64)
        sources = np.searchsorted(self._first, rows, side="right") - 1
        for source in np.unique(sources):
            shard, part = self.shards[source], self._parts[source]
            if shard.entries is None:
                continue
            shard.check()
            members = np.flatnonzero(sources == source)
            starts, stops = part.bounds(rows[members] - self._first[source])
            for member, start, stop in zip(members.tolist(), starts.tolist(), stops.tolist(), strict=True):
                found[member, : stop - start] = shard.entries[start:stop]
            shard.check()
        return found

    def places(self, rows: np.ndarray) -> list[RowPlace]:
        """The documents of each row."""
        found = []
        for row in np.asarray(rows, dtype=np.int64).tolist():
            source = int(np.searchsorted(self._first, row, side="right")) - 1
            shard = self.shards[source]
            shard.check()
            starts, stops = self._parts[source].bounds(np.array([row - self._first[source]]))
            first, last = _documents(shard.offsets, np.array([starts[0], stops[0] - 1]))
            found.append(RowPlace(row, shard.source, int(first), int(last)))
        return found

    def order(self, epoch: int, seed: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Row numbers at places `start` to `stop` of an epoch: a function of (seed, epoch, place) alone."""
        stop = self.rows_per_epoch if stop is None else stop
        slots = Permutation(self.rows_per_epoch, seed, "epoch", epoch)(np.arange(start, stop))
        first_slot = np.concatenate([[0], np.cumsum(self._taken)])
        rows = np.empty(len(slots), dtype=np.int64)
        sources = np.searchsorted(first_slot, slots, side="right") - 1
        for source in np.unique(sources):
            members = sources == source
            size = self._parts[source].num_rows
            # The walk through a source: pass after pass over its rows, each in an order of its own.
            walked = epoch * int(self._taken[source]) + slots[members] - first_slot[source]
            chosen = np.empty(len(walked), dtype=np.int64)
            for number in np.unique(walked // size):
                of_pass = walked // size == number
                shuffled = Permutation(size, seed, "pass", int(number), self.shards[source].source)
                chosen[of_pass] = shuffled(walked[of_pass] % size)
            rows[members] = self._first[source] + chosen
        return rows

    def _checked_weights(self, given: dict[str, float]) -> dict[str, float]:
        names = [shard.source for shard in self.shards]
        known = set(self.store.manifest["sources"])
        problems = [
            f"weights names {name!r}, but the sources are {sorted(known)}"
            for name in given
            if name not in known
        ]
        problems += [
            f"the weight of {name} is {w}: it must be 0 or more"
            for name, w in given.items()
            if not 0 <= w < 1e6
        ]
        if problems:
            raise ConfigError(f"Store {self.store.path}: {listed(problems)}.")
        return {name: float(given.get(name, s.weight)) for name, s in zip(names, self.shards, strict=True)}


@dataclass(frozen=True)
class _Part:
    """The rows of one source: token ranges in its stream."""

    num_rows: int
    length: int  # L
    num_tokens: int
    offsets: np.ndarray
    first_row: np.ndarray | None  # [documents + 1]: first row of each document; None where packed

    def bounds(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers [B] -> first token [B] and end [B] (exclusive) in the stream; at most L + 1 apart."""
        if self.first_row is None:
            starts = rows * self.length
            stops = np.minimum(starts + self.length + 1, self.num_tokens)
        else:
            documents = np.searchsorted(self.first_row, rows, side="right") - 1
            cut = rows - self.first_row[documents]
            starts = self.offsets[documents].astype(np.int64) + cut * self.length
            stops = np.minimum(starts + self.length + 1, self.offsets[documents + 1].astype(np.int64))
        return starts, stops


def _packed(shard: Shard, length: int) -> _Part:
    # One token more than targets; a stream of one token predicts nothing.
    num_rows = -(-(shard.num_tokens - 1) // length)
    return _Part(num_rows, length, shard.num_tokens, shard.offsets, None)


def _single(shard: Shard, length: int) -> _Part:
    sizes = np.diff(shard.offsets).astype(np.int64)
    first_row = np.concatenate([[0], np.cumsum(-(-(sizes - 1) // length))])
    return _Part(int(first_row[-1]), length, shard.num_tokens, shard.offsets, first_row)


def _documents(offsets: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Places in the stream [k] -> the document each belongs to [k]."""
    return np.searchsorted(offsets, places.astype(np.uint64), side="right").astype(np.int64) - 1


def _segments(offsets: np.ndarray, starts: np.ndarray, stops: np.ndarray, width: int) -> np.ndarray:
    """Token ranges [B] -> [B, width]: 1, 2, ... for the documents in each range, 0 behind its end.

    A one at each place where a document begins, then a running sum: no search per token.
    """
    first, last = _documents(offsets, starts), _documents(offsets, stops - 1)
    counts = last - first
    row = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = offsets[np.repeat(first + 1, counts) + within].astype(np.int64)
    marks = np.zeros((len(starts), width), dtype=np.int64)
    marks[:, 0] = 1
    marks[row, begins - np.repeat(starts, counts)] = 1
    segments = marks.cumsum(axis=1)
    segments[np.arange(width) >= (stops - starts)[:, None]] = 0
    return segments
