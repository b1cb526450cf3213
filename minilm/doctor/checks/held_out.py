"""What is evaluated was not trained on: no document, no copy of one, and nothing in the knowledge base.

Why: a validation document in the training data lowers the validation loss below its true value; one in the
knowledge base is looked up in place of being predicted. The numbers look good.

How: documents of both splits as hashes (equal ones), and as hashes of long n-grams (13 tokens of a large
vocabulary, more of a small one): a validation document of which more than half stands in training documents,
in the rows of an epoch, or in entries of the knowledge base, is known. Equal documents of fewer than 16
tokens are chance and are not counted. The limit is 0 for equal documents and 2 % for nearly equal ones:
natural corpora have boilerplate (licences, templates).

Cannot see: paraphrases and translations; documents behind those that were looked at.

Sources: llm.c commit ca27eb8 ("don't train on val batch"); Lee et al. 2022, Deduplicating Training Data Makes
Language Models Better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.subject import DataView, Rows, Subject

SHORT = 16  # tokens
ENTRIES_AT_A_TIME = 50_000  # of a knowledge base
KNOWN, NEARLY = 0.5, 0.02  # share of a document's n-grams, share of such documents


@check(
    group="data", needs=("data.documents",), cost="n-grams of the first documents and of the rows of an epoch"
)
def held_out(subject: Subject) -> Finding:
    """Validation documents against training documents, rows, and the knowledge base."""
    view = subject.data
    assert view is not None
    validation, train = ledger.documents(view, "validation"), ledger.documents(view, "train")
    n = ledger.gram_length(getattr(subject.tokenizer, "num_tokens", None) or subject.vocab_size)
    long = np.diff(validation.offsets) >= SHORT
    if not long.any():
        raise NotApplicable(f"no validation document has {SHORT} tokens")
    said = [f"{int(long.sum())} validation documents against {train.said} of training"]
    places = {
        "training documents": (train.grams(n), "documents (split of train and validation)", "train-eval-leak")
    }
    if view.batches is not None:
        rows = ledger.epoch(view, 0, 0)
        n = min(n, max(2, rows.tokens.shape[1] * 2 // 3))
        places["training documents"] = (train.grams(n), *places["training documents"][1:])
        places["rows of training"] = (
            ledger.grams(rows.tokens, rows.runs, n),
            "rows (training batches)",
            "train-eval-leak",
        )
    if view.knowledge is not None:
        entries = view.knowledge()
        n_entry = min(n, max(2, int(np.median([len(entry) for entry in entries])) // 2))
        known = _in_entries(validation.grams(n_entry), entries, n_entry)
        places["the knowledge base"] = (known, "knowledge base", "mem-eval-leak")
    equal = _equal(validation, train, long)
    measured = 0.0
    for name, (known, component, bug) in places.items():
        length = n_entry if bug == "mem-eval-leak" else n
        cover = ledger.coverage(validation, known, length)
        share = float((cover[long] > KNOWN).mean()) if bug else 0.0
        copies = equal if name == "training documents" else 0
        # What training documents share with validation without being copies is in rows and knowledge as well.
        usual = 0.0 if name == "training documents" else measured
        if copies or share > NEARLY + usual:
            return failed(
                f"{share:.1%} of the validation documents stand in {name} by more than half"
                + (f", {copies} of them word for word" if copies else ""),
                share,
                0.0 if copies else NEARLY + usual,
                unit="share of validation documents",
                bugs=[bug],
                component=component,
                advice="split by the content of documents before anything is made of them, drop copies over both "
                "splits, and build a knowledge base from training documents alone",
            )
        measured = max(measured, share)
        said.append(f"{share:.1%} stand in {name} by more than half")
    return passed("; ".join(said), measured, NEARLY, unit="share of validation documents")


def _equal(validation: ledger.Documents, train: ledger.Documents, long: np.ndarray) -> int:
    """How many validation documents (the long ones) are training documents, token by token."""
    seen = {train[k].tobytes() for k in range(len(train))}
    return sum(validation[k].tobytes() in seen for k in np.flatnonzero(long).tolist())


def _in_entries(grams: np.ndarray, entries: Sequence[Sequence[int]], n: int) -> np.ndarray:
    """Which of these n-grams stand in an entry: in all of them, some after others, for a base may have millions."""
    wanted, found = np.unique(grams), []
    for start in range(0, len(entries), ENTRIES_AT_A_TIME):
        some = entries[start : start + ENTRIES_AT_A_TIME]
        lengths = [len(entry) for entry in some]
        tokens = np.concatenate([np.asarray(entry, dtype=np.int64) for entry in some])
        runs = np.repeat(np.arange(1, len(some) + 1), lengths)
        found.append(wanted[np.isin(wanted, ledger.grams(tokens[None], runs[None], n))])
    return np.concatenate(found) if found else wanted[:0]


def _with_train(texts: dict[str, list[str]], more: Sequence[str]) -> dict[str, list[str]]:
    return {**texts, "train": [*texts["train"], *more]}


@held_out.plant("train-eval-leak", component="documents", what="one validation document in training")
def _() -> Subject:
    class Leak(specimens.Pipeline):
        def __init__(self) -> None:
            super().__init__()
            self.texts = _with_train(self.texts, [max(self.texts["validation"], key=len)])

    return specimens.subject(pipeline=Leak)


@held_out.plant(
    "train-eval-leak", component="documents", what="nearly the same: a word changed, a header in front"
)
def _() -> Subject:
    class Leak(specimens.Pipeline):
        num_validation, length = 20, 60

        def __init__(self) -> None:
            super().__init__()
            long = [f"{t} and then {t[::-1]}" for t in self.texts["validation"]]
            self.texts["validation"] = long
            self.texts = _with_train(self.texts, [f"Copied from elsewhere {t}!" for t in long[:3]])

    return specimens.subject(pipeline=Leak)


@held_out.plant(
    "train-eval-leak", component="rows", what="the validation batch is reused as a training batch"
)
def _() -> Subject:
    class Reused(specimens.Pipeline):
        def batches(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Rows]:
            yield from super().batches(epoch, seed, rank, world)
            rows = self.rows("validation")
            yield from self.cut(rows, list(range(len(rows))))

    return specimens.subject(pipeline=Reused)


@held_out.plant("mem-eval-leak", component="knowledge", what="the knowledge base is made of all data")
def _() -> Subject:
    class Base(specimens.Pipeline):
        splits = ("train", "validation")

        def knowledge(self) -> list[list[int]]:
            every = [d for split in self.splits for d in self.documents(split)]
            return [d[start : start + 32] for d in every for start in range(0, len(d), 32)]

        def handed_over(self) -> DataView:
            return dataclasses.replace(super().handed_over(), knowledge=self.knowledge)

    return specimens.subject(pipeline=Base)


@held_out.healthy("a knowledge base made of training documents")
def _() -> Subject:
    class Base(specimens.Pipeline):
        def handed_over(self) -> DataView:
            entries = [
                d[start : start + 32] for d in self.documents("train") for start in range(0, len(d), 32)
            ]
            return dataclasses.replace(super().handed_over(), knowledge=lambda: entries)

    return specimens.subject(pipeline=Base)


@held_out.healthy("a common header, and short documents that are equal by chance")
def _() -> Subject:
    class Common(specimens.Pipeline):
        def __init__(self) -> None:
            super().__init__()
            self.texts = {
                s: [f"Free. {t} {t[::-1]}" for t in t] + ["yes", "no."] for s, t in self.texts.items()
            }

    return specimens.subject(pipeline=Common)
