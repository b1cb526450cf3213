"""Documents as sources give them, good or bad, and the set of those already seen.

A bad document is a value, not an exception: whether a job stops at it or counts it is decided in one place
(build.py), with its file and line at hand.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from minilm.errors import DataError

MAX_DOCUMENT_BYTES = 16 * 2**20  # encoding needs some 100 bytes of memory per token


@dataclass(slots=True)
class Document:
    """A text, or token ids where the source has no text. `key` is a hash of the content alone."""

    text: str
    where: str  # file and line, for messages
    num_bytes: int
    key: int
    tokens: np.ndarray | None = None
    entries: tuple[tuple[int, int, int], ...] | None = (
        None  # labelled spans (see labels.py); None: it has none
    )


@dataclass(slots=True)
class BadDocument:
    """Something that should have been a document. `reason` is one of few phrases, so that it can be counted."""

    where: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


class ReadInterrupted(DataError):
    """A source stopped answering (a network): what was built so far is kept, and the same build goes on."""


@dataclass(slots=True)
class Position:
    """How far sources have been read, in bytes of their files: for a progress bar."""

    done_bytes: int = 0


def document_of(text: object, where: str, limit: int = MAX_DOCUMENT_BYTES) -> Document | BadDocument:
    """A document if `text` is one: a string, not blank, writable as UTF-8, of at most `limit` bytes."""
    if not isinstance(text, str):
        return BadDocument(where, "text is not a string", type(text).__name__)
    if not text or text.isspace():
        return BadDocument(where, "text is empty")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        return BadDocument(where, "text has a lone surrogate", f"character {error.start}")
    if len(data) > limit:
        return BadDocument(where, "document is too long", f"{len(data)} bytes, the limit is {limit}")
    return Document(text, where, len(data), content_key(data))


def content_key(data: bytes) -> int:
    """64 bits of blake2b: decides the split, finds duplicates. Never 0 (see `Seen`)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") or 1


def in_validation(key: int, fraction: float) -> bool:
    """Is a document with this key held out? A function of its content: no order, no other source matters."""
    return key < fraction * 2**64


def in_sample(key: int, fraction: float) -> bool:
    """As `in_validation`, but independent of it: other bits of the key decide."""
    return key & 0xFFFFFFFF < fraction * 2**32


class Seen:
    """The keys of all documents so far: 16 to 32 bytes per document, where a Python set needs about 100.

    Open addressing in one array. Two different documents share a key with probability n^2 / 2^65 among n:
    3e-4 for 100 million. Then one of them would be dropped as a duplicate.
    """

    def __init__(self) -> None:
        self._slots = np.zeros(1 << 12, dtype=np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def memory_bytes(self) -> int:
        return self._slots.nbytes

    def add(self, keys: np.ndarray) -> np.ndarray:
        """uint64 [n] -> bool [n]: was this key new, at this place of this array? All are in the set afterwards."""
        _, first = np.unique(keys, return_index=True)
        new = np.zeros(len(keys), dtype=bool)
        while 2 * (self._count + len(first)) > len(self._slots):
            self._grow()
        new[first[self._insert(keys[first])]] = True
        self._count += int(new.sum())
        return new

    def _grow(self) -> None:
        old = self._slots[self._slots != 0]
        self._slots = np.zeros(2 * len(self._slots), dtype=np.uint64)
        self._insert(old)

    def _insert(self, keys: np.ndarray) -> np.ndarray:
        """Distinct keys -> which were not in the table."""
        mask = np.uint64(len(self._slots) - 1)
        slots = keys & mask
        new = np.zeros(len(keys), dtype=bool)
        left = np.arange(len(keys))
        while len(left):
            at = slots[left]
            free = self._slots[at] == 0
            self._slots[at[free]] = keys[left[free]]  # of several that want a slot, one gets it
            mine = self._slots[at] == keys[left]
            new[left[free & mine]] = True
            left = left[~mine]
            slots[left] = (slots[left] + np.uint64(1)) & mask
        return new
