"""Data, tokenizer and model speak of the same vocabulary, in every split.

Why: validation data that another tokenizer made gives a loss that means nothing, and nothing fails: the ids
are within range. A tokenizer with more tokens than the model has rows is an error only when a rare token
comes.

How: sizes and special ids are compared; the tokenizer's fingerprint with that of each split, where they are
known; and the documents themselves: the ids of a text are what the tokenizer makes of it now. Where the texts
are not at hand, ids are decoded and encoded again: for their own tokenizer that gives the same ids, for
another one it hardly ever does.

Cannot see: two tokenizers that make the same ids of the documents looked at; without texts or fingerprints, a
tokenizer whose every sequence of ids is what it makes of their text (one id per character).

Sources: OLMo-core release 1.7.0 ("always getting dolma2 tokenized validation data").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.specimens.pipeline import LETTERS, BytePipeline, ByteTokenizer, Tokenizer
from minilm.doctor.subject import DataView, Subject

LOOKED_AT, MOST = 40, 15_000  # documents of each split, tokens in all
BYTES = {"vocab_size": ByteTokenizer.num_tokens}


@check(group="data", needs=("tokenizer", "vocab_size"), cost="some documents encoded again", quick=True)
def vocabulary(subject: Subject) -> Finding:
    """Sizes and fingerprints agree; documents are what the tokenizer makes of their text."""
    tokenizer, view = subject.tokenizer, subject.data
    size = subject.vocab_size or 0
    highest = max([tokenizer.num_tokens - 1, *_special(tokenizer)])
    if highest >= size:
        return failed(
            f"the tokenizer has ids up to {highest}, the model {size} rows: up to {size - 1}",
            highest,
            size - 1,
            unit="largest id",
            bugs=["tok-id-mod-vocab", "val-set-wrong-tokenizer"],
            component="vocabulary size of the model",
            advice="build the model with at least as many rows as the tokenizer has ids, special ones included",
        )
    looked = [f"the tokenizer's ids (up to {highest}) fit the model's {size} rows"]
    shares: dict[str, float] = {}
    for split in ("train", "validation") if view is not None else ():
        assert view is not None
        if found := _fingerprint(view, split, tokenizer):
            return found
        if (share := _own(view, split, tokenizer)) is not None:
            shares[split] = share
            looked.append(f"{share:.0%} of {split} documents are what the tokenizer makes of their text")
    known = view is not None and view.texts is not None
    for split, share in shares.items():
        if share < (1.0 if known else 0.5):
            return failed(
                f"{1 - share:.0%} of the {split} documents looked at are not what this tokenizer makes of their text",
                share,
                1.0 if known else 0.5,
                unit="share of documents",
                bugs=["val-set-wrong-tokenizer"],
                component=f"{split} data",
                advice=f"make the {split} data with the model's tokenizer, and keep its fingerprint with the ids",
            )
    measured = min(shares.values()) if shares else None
    return passed(
        "; ".join(looked), measured, None if measured is None else 1.0 if known else 0.5, unit="share"
    )


def _special(tokenizer: Any) -> list[int]:
    return [i for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if i is not None]


def _fingerprint(view: DataView, split: str, tokenizer: Any) -> Finding | None:
    made = view.fingerprint_of_tokenizer
    of_split = made.get(split) if isinstance(made, Mapping) else made
    own = getattr(tokenizer, "fingerprint", None)
    if of_split is None or own is None or of_split == own:
        return None
    return failed(
        f"the {split} data was made by tokenizer {str(of_split)[:16]}, this one is {str(own)[:16]}",
        1,
        0,
        unit="differing fingerprints",
        bugs=["val-set-wrong-tokenizer"],
        component=f"{split} data",
        advice=f"make the {split} data again with the tokenizer of the model",
    )


def plain(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Without the BOS in front, the EOS and padding behind."""
    special, ids = set(_special(tokenizer)), [int(i) for i in ids]
    while ids and ids[0] in special:
        ids = ids[1:]
    while ids and ids[-1] in special:
        ids = ids[:-1]
    return ids


def _own(view: DataView, split: str, tokenizer: Any) -> float | None:
    """The share of documents that the tokenizer would make like this; None where nothing can be asked."""
    part = view.stored or view.documents
    if part is None or not len(given := part(split)):
        return None
    if view.texts is not None and len(texts := view.texts(split)) == len(given):
        pairs = ledger.sample(list(zip(given, texts, strict=True)), LOOKED_AT)
        right = [plain(ids, tokenizer) == plain(tokenizer.encode(text), tokenizer) for ids, text in pairs]
        return sum(right) / len(right)
    if not hasattr(given[0], "__len__"):
        return None
    right = []
    for ids in ledger.sample(given, LOOKED_AT, MOST):
        text = tokenizer.decode(known := plain(ids, tokenizer))
        if len(known) >= 4:
            right.append(plain(tokenizer.encode(text), tokenizer) == known)
    return sum(right) / len(right) if right else None


class _Shifted(Tokenizer):
    """The same letters in another order."""

    fingerprint = "other letters"

    def encode(self, text: str) -> list[int]:
        return [3 + (i - 3 + 7) % len(LETTERS) for i in super().encode(text)]


@vocabulary.plant("val-set-wrong-tokenizer", component="validation", what="told by its fingerprint")
def _() -> Subject:
    subject = specimens.subject()
    assert subject.data is not None
    subject.data.fingerprint_of_tokenizer = {"train": "letters", "validation": "other letters"}
    return subject


@vocabulary.plant("val-set-wrong-tokenizer", component="validation", what="told by the texts")
def _() -> Subject:
    class Other(specimens.Pipeline):
        def stored(self, split: str) -> list[list[int]]:
            made = _Shifted() if split == "validation" else self.tokenizer
            return [[1, *made.encode(text), 2] for text in self.texts[split]]

    return specimens.subject(pipeline=Other)


@vocabulary.plant(
    "val-set-wrong-tokenizer",
    component="validation",
    what="special tokens and pieces first, bytes last; told by ids alone",
)
def _() -> Subject:
    class Other(BytePipeline):
        def stored(self, split: str) -> list[list[int]]:
            if split == "train":
                return self.documents(split)
            return [[1, *(15 + byte for byte in text.encode()), 2] for text in self.texts[split]]

        def handed_over(self) -> DataView:
            view = super().handed_over()
            view.texts, view.fingerprint_of_tokenizer = None, None
            return view

    return specimens.subject(pipeline=Other, size=BYTES)


@vocabulary.plant("tok-id-mod-vocab", component="vocabulary size", what="a tokenizer larger than the model")
def _() -> Subject:
    return specimens.subject(pipeline=BytePipeline, size={"vocab_size": 200})


@vocabulary.healthy("bytes in several scripts, told by ids alone")
def _() -> Subject:
    subject = specimens.subject(pipeline=BytePipeline, size={"vocab_size": 320})
    assert subject.data is not None
    subject.data.texts, subject.data.fingerprint_of_tokenizer = None, None
    return subject
