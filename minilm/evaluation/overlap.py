"""Which documents of the data stand in the training data, too? By 13-grams of words.

A loss on text that was trained on says nothing about other text. Documents that share at least one run of 13 words with
the training data are scored apart from those that share none.

Words, not token ids: the same text then overlaps whatever tokenizer cut it, and a 13-gram is as long for a vocabulary
of 6,400 as for one of 150,000. A word is a run of letters and digits, in lower case; marks and spaces are dropped.
Characters of scripts that are written without spaces (Han, kana) are words of their own. Where there is no text, the
token ids are the words. 13 words, and lower case without marks: Brown et al., Language Models are Few-Shot Learners
(2020), appendix C. There a document is cut where it overlaps; here all its tokens are counted on one side.

Memory: 8 bytes for each different 13-gram of the DATA, whatever the size of the training data, which streams past.
13-grams are compared by 64-bit hashes: with 10^7 of them held against 10^10, one wrong match is expected in 200 times.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from minilm.data.store import Store
from minilm.errors import DataError
from minilm.evaluation.heldout import HeldOut, texts_of
from minilm.evaluation.intervals import DocumentSums, Scores, device_of_messages, processes
from minilm.evaluation.markup import table
from minilm.evaluation.progress import tracked

WORDS = 13
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_ALONE}]|[^\\W_{_ALONE}]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word is lost
_MOST_KNOWN = 1 << 20  # words whose hashes are kept: 100 MiB
_HASHES_AT_ONCE = 1 << 20
HEADS = ("documents", "loss", "95 %", "bits/byte", "tokens", "number")


def words(text: str) -> list[str]:
    """The words of a text, as this file's text defines them."""
    return _WORD.findall(text.lower())


class Hasher:
    """Texts to the 64-bit hashes of their runs of 13 words, one for each word from the 13th on."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        found = words(text)
        if len(found) < WORDS:
            return np.zeros(0, dtype=np.uint64)
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        hashes = np.fromiter((self._hash(word) for word in found), dtype=np.uint64, count=len(found))
        runs = np.zeros(len(found) - WORDS + 1, dtype=np.uint64)
        for offset in range(WORDS):  # h = ((w0 m + w1) m + w2) m ..., modulo 2^64
            runs = runs * _MULTIPLIER + hashes[offset : offset + len(runs)]
        return runs

    def _hash(self, word: str) -> int:
        found = self._known.get(word)
        if found is None:
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            found = self._known[word] = int.from_bytes(digest, "little")
        return found


@dataclass(frozen=True)
class Shared:
    """What each document shares with the training data; all fields [documents].

    words    its words
    covered  those of them that lie in a shared run of 13
    """

    words: np.ndarray
    covered: np.ndarray

    @property
    def long_enough(self) -> np.ndarray:
        return self.words >= WORDS


def shared_with(texts: Iterable[str], training: Iterable[str]) -> Shared:
    """Hold texts against the training texts. `texts` the same on every process, `training` each one's own part."""
    hasher = Hasher()
    each = []
    lengths = []
    for text in texts:
        runs = hasher(text)
        each.append(runs)
        lengths.append(len(runs) + WORDS - 1 if len(runs) else len(words(text)))
    wanted = np.unique(np.concatenate([*each, np.zeros(0, dtype=np.uint64)]))
    found = np.zeros(len(wanted), dtype=bool)
    for block in _blocks(hasher(text) for text in training):
        found[np.searchsorted(wanted, np.intersect1d(wanted, block))] = True
    found = _on_any_process(found)
    covered = [_covered(found[np.searchsorted(wanted, runs)]) for runs in each]
    return Shared(np.array(lengths, dtype=np.int64), np.array(covered, dtype=np.int64))


def overlap_with(held_out: HeldOut, store: Store, *, progress: bool = False) -> Shared:
    """The documents of the data against the training documents of a store. Every process calls this."""
    rank, world = processes()
    tokenizer = store.tokenizer()
    if tokenizer is None and held_out.tokenizer is not None:
        raise DataError(
            f"The store {store.path} has token ids without text, the data are text: there is nothing to compare."
        )
    if tokenizer is not None and held_out.tokenizer is None:
        raise DataError(
            f"The store {store.path} holds text, the data are token ids: there is nothing to compare."
        )
    shards = store.shards("train")
    training = (text for shard in shards for text in texts_of(shard, tokenizer, rank, world))
    count = sum(len(range(rank, shard.num_documents, world)) for shard in shards)
    return shared_with(
        held_out.texts(), tracked(training, count, "training documents", shown=progress and rank == 0)
    )


@dataclass(frozen=True)
class Overlapping:
    """A `Section` (minilm/evaluation/section.py): scores of documents that overlap with the training data or do not."""

    store: str
    split: dict[str, Scores]
    num_words: int
    num_covered: int

    name = "overlap"
    title = f"By overlap with the training data ({WORDS}-grams of words)"
    failed = False

    @classmethod
    def of(cls, documents: DocumentSums, shared: Shared, held_out: HeldOut, store: str) -> Overlapping:
        numbers = documents.keys()
        short = ~shared.long_enough[numbers]
        meets = (shared.covered[numbers] > 0) & ~short
        split = {
            "overlapping": documents.only(meets),
            "clean": documents.only(~meets & ~short),
            "too short": documents.only(short),
        }
        return cls(
            store,
            {name: held_out.scores_of(sums) for name, sums in split.items()},
            int(shared.words.sum()),
            int(shared.covered.sum()),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "store": self.store,
            "words_in_a_run": WORDS,
            "num_words": self.num_words,
            "num_words_in_shared_runs": self.num_covered,
            **{name.replace(" ", "_"): scores.as_dict() for name, scores in self.split.items()},
        }

    def print(self, console: Console) -> None:
        console.print(self.said(), soft_wrap=True)
        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in HEADS:
            shown.add_column(name, justify="left" if name == HEADS[0] else "right", no_wrap=True)
        for row in self._rows():
            shown.add_row(*row)
        Console(file=console.file, width=1000).print(shown, crop=False)

    def html(self) -> str:
        return f"<p class=quiet>{escape(self.said())}</p>{table(HEADS, self._rows())}"

    def said(self) -> str:
        share = self.num_covered / max(1, self.num_words)
        return (
            f"Overlapping: shares {WORDS} words in a row with the training documents of {self.store}; too short: fewer "
            f"words than that. {share:.2%} of all words lie in shared runs."
        )

    def _rows(self) -> list[list[str]]:
        rows = []
        for name, scores in self.split.items():
            ends, bits = scores.interval, scores.bits_per_byte
            some = scores.num_tokens > 0
            rows.append(
                [
                    name,
                    f"{scores.loss:.4f}" if some else "-",
                    "-" if ends is None else f"{ends[0]:.3f}..{ends[1]:.3f}",
                    "-" if not some or bits is None else f"{bits:.4f}",
                    f"{scores.num_tokens:,}",
                    f"{scores.num_documents:,}",
                ]
            )
        return rows


def _blocks(each: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The hashes of many texts together, about a million at a time."""
    waiting, count = [], 0
    for runs in each:
        waiting.append(runs)
        count += len(runs)
        if count > _HASHES_AT_ONCE:
            yield np.concatenate(waiting)
            waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _covered(found: np.ndarray) -> int:
    """Words that lie in a run of 13 which was found; `found` [runs], run i is of words i to i + 12."""
    if not found.any():
        return 0
    ends = np.zeros(len(found) + WORDS, dtype=np.int64)
    ends[np.flatnonzero(found)] += 1
    ends[np.flatnonzero(found) + WORDS] -= 1
    return int((ends.cumsum() > 0).sum())


def _on_any_process(found: np.ndarray) -> np.ndarray:
    if processes()[1] == 1:
        return found
    flags = torch.from_numpy(found.astype(np.uint8)).to(device_of_messages())
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return flags.cpu().numpy().astype(bool)
