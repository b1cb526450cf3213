"""The ids that are trained on are the ids that were written, and all of them are in the vocabulary.

Why: an id that does not fit into the type of the file comes back as another token (65,537 as 1), an id beyond
the vocabulary that is folded back by a modulo is never an error. Rare tokens are replaced, and the loss still
falls.

How: ids of the documents, of what is read back from storage, and of the rows of an epoch are held against the
vocabulary and against each other, token by token. The type of the storage must hold the whole vocabulary,
also where the documents looked at have only small ids. All relations are exact.

Cannot see: what lies behind the documents looked at; a wrong id that was made before `documents` was asked.

Sources: transformers issue 2825 (45 % of a vocabulary wrapped); knnlm issue 6; datatrove issue 118; open_lm
pull request 77 (`x % vocab_size`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.specimens.pipeline import BytePipeline, ByteTokenizer
from minilm.doctor.subject import DataView, Rows, Subject

WRAPS = {"8 bits": 2**8, "16 bits": 2**16, "7 bits and a sign": 2**8, "15 bits and a sign": 2**16}
BYTES = {"vocab_size": ByteTokenizer.num_tokens}


@check(group="data", needs=("data",), cost="the first documents and rows", quick=True)
def token_ids(subject: Subject) -> Finding:
    """Ids are within the vocabulary, and what was written is what is read."""
    view = subject.data
    assert view is not None
    size = getattr(subject.tokenizer, "num_tokens", None) or subject.vocab_size
    if size is None:
        raise NotApplicable("needs the size of the vocabulary")
    seen = []
    for split in ("train", "validation"):
        truth = None
        if view.documents is not None and len(view.documents(split)):
            truth = ledger.documents(view, split)
            seen.append(f"{truth.said} of {split}")
            if found := _outside(truth.tokens, size, f"documents ({split})"):
                return found
        if view.stored is not None and len(view.stored(split)):
            stored = ledger.documents(view, split, "stored")
            if found := (
                _narrow(view.stored(split), size)
                or (truth is not None and _other(truth, stored, size, subject))
                or _outside(stored.tokens, size, f"storage ({split})")
            ):
                return found
    if view.batches is not None:
        if found := _in_rows(view, size, subject):
            return found
        seen.append("the rows of an epoch")
    if not seen:
        raise NotApplicable("needs documents, storage or batches of the data")
    return passed(
        f"every id of {', '.join(seen)} is below {size}, and was read as it was written", 0, 0, unit="tokens"
    )


def _outside(ids: np.ndarray, size: int, where: str) -> Finding | None:
    wrong = ids[(ids < 0) | (ids >= size)]
    if not len(wrong):
        return None
    return failed(
        f"{len(wrong)} of {len(ids)} ids are outside the vocabulary of {size}, for instance {int(wrong[0])}",
        len(wrong),
        0,
        unit="tokens",
        bugs=["tok-uint16-wrap"] if (wrong < 0).any() else ["tok-id-mod-vocab", "tok-uint16-wrap"],
        component=where,
        advice="refuse ids outside the vocabulary when data is made; the tokenizer and the vocabulary do not fit",
    )


def _narrow(stored: Any, size: int) -> Finding | None:
    """The type of the storage, where it can be seen."""
    part = stored if hasattr(stored, "dtype") else stored[0]
    name = str(getattr(part, "dtype", "")).removeprefix("torch.")
    if not name or not name.lstrip("u").startswith("int"):
        return None
    largest = int(np.iinfo(name).max)
    if largest >= size - 1:
        return None
    return failed(
        f"tokens are stored as {name}, up to {largest}, but the vocabulary has ids up to {size - 1}",
        largest,
        size - 1,
        unit="largest id",
        bugs=["tok-uint16-wrap"],
        component="storage (type of the file)",
        advice="store ids in the smallest unsigned type that holds vocabulary size - 1, and check it when writing",
    )


def _other(truth: ledger.Documents, stored: ledger.Documents, size: int, subject: Subject) -> Finding | None:
    """Token by token: what was written against what is read."""
    a, b = truth.tokens, stored.tokens
    length = min(len(a), len(b))
    if len(a) == len(b) or not (truth.whole and stored.whole):
        a, b = a[:length], b[:length]
        if not (a != b).any():
            return None
        bugs, how = _folded(a, b, size, subject)
        first = int(np.flatnonzero(a != b)[0])
        what = f"{int((a != b).sum())} of {length} tokens are read as others: {a[first]} as {b[first]} at place {first}"
        measured = int((a != b).sum())
    else:
        eos = getattr(subject.tokenizer, "eos_id", None)
        without = eos is not None and np.array_equal(a[a != eos], b[b != eos])
        bugs, how = (["eos-not-added"], ": the ends of documents") if without else (["truncation-silent"], "")
        measured, what = abs(len(a) - len(b)), f"{len(a)} tokens were written, {len(b)} are read"
    return failed(
        what + how,
        measured,
        0,
        unit="tokens",
        bugs=bugs,
        component="storage",
        advice="write ids in a type that holds them, read them with the same type, and change nothing between",
    )


def _folded(a: np.ndarray, b: np.ndarray, size: int, subject: Subject) -> tuple[list[str], str]:
    """How the ids were changed: by the width of a type, by the size of a vocabulary, or otherwise."""
    for name, modulus in WRAPS.items():
        if np.array_equal(a % modulus, b % modulus):
            return ["tok-uint16-wrap", "tok-id-mod-vocab"], f" (the same in {name})"
    for modulus in {size, subject.vocab_size or size}:
        if np.array_equal(a % modulus, b):
            return ["tok-id-mod-vocab", "tok-uint16-wrap"], f" (the rest of a division by {modulus})"
    return ["tok-id-mod-vocab", "tok-uint16-wrap"], ""


def _in_rows(view: DataView, size: int, subject: Subject) -> Finding | None:
    rows = ledger.epoch(view, 0, 0)
    ids = rows.tokens[rows.runs > 0]
    limit = min(size, subject.vocab_size or size)
    if found := _outside(ids, limit, "rows"):
        return found
    if view.documents is None or not (truth := ledger.documents(view, "train")).whole:
        return None
    strange = np.setdiff1d(ids, truth.tokens)
    if not len(strange):
        return None
    return failed(
        f"rows have {len(strange)} ids that stand in no document, for instance {int(strange[0])}",
        len(strange),
        0,
        unit="ids",
        bugs=["tok-id-mod-vocab", "tok-uint16-wrap"],
        component="rows (between storage and batch)",
        advice="no arithmetic on token ids: check their range instead of folding them into it",
    )


@token_ids.plant(
    "tok-uint16-wrap", component="storage", what="271 ids in 8 bits: EOS comes back as another token"
)
def _() -> Subject:
    class Narrow(BytePipeline):
        def stored(self, split: str) -> list[np.ndarray]:
            return [np.array(d).astype(np.uint8) for d in self.documents(split)]

    return specimens.subject(pipeline=Narrow, size=BYTES)


@token_ids.plant(
    "tok-uint16-wrap", component="storage", what="written narrow, read back wide: the type does not tell"
)
def _() -> Subject:
    class Narrow(BytePipeline):
        def stored(self, split: str) -> list[np.ndarray]:
            return [np.array(d).astype(np.int8).astype(np.int64) for d in self.documents(split)]

    return specimens.subject(pipeline=Narrow, size=BYTES)


@token_ids.plant("tok-id-mod-vocab", component="storage", what="x % vocab_size when the data is written")
def _() -> Subject:
    class Folded(BytePipeline):
        def stored(self, split: str) -> list[list[int]]:
            return [[t % 200 for t in d] for d in self.documents(split)]

    return specimens.subject(pipeline=Folded, size={"vocab_size": 200})


@token_ids.plant(
    "tok-id-mod-vocab", component="rows", what="x % vocab_size in the data set, the model's is smaller"
)
def _() -> Subject:
    class Folded(BytePipeline):
        def rows(self, split: str) -> list[Rows]:
            return [Rows(r.tokens % 200, r.segments, r.learn) for r in super().rows(split)]

    return specimens.subject(pipeline=Folded, size={"vocab_size": 200})


@token_ids.healthy("a vocabulary padded to a multiple of 64, one stored stream of 16 bits")
def _() -> Subject:
    class Stream(BytePipeline):
        def handed_over(self) -> DataView:
            view = super().handed_over()
            whole = {
                s: np.concatenate([np.array(d, np.uint16) for d in self.documents(s)]) for s in self.texts
            }
            view.stored = lambda split: whole[split]
            return view

    return specimens.subject(pipeline=Stream, size={"vocab_size": 320})


@token_ids.healthy("padding with an id of its own that no document has")
def _() -> Subject:
    class Far(BytePipeline):
        def rows(self, split: str) -> list[Rows]:
            rows = super().rows(split)
            return [Rows(torch.where(r.segments > 0, r.tokens, 319), r.segments, r.learn) for r in rows]

    return specimens.subject(pipeline=Far, size={"vocab_size": 320})
