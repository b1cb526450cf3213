"""Each document ends with EOS, and EOS is learnt, also where PAD is the same id.

Why: a model that never had EOS as a target does not stop writing. It happens when nobody appends it, and when
padding is masked by its id while PAD is EOS: then every true end is masked with it. The loss looks the same.

How: ends of documents are counted in the documents, in storage, and as targets in the rows of an epoch. An
EOS inside a row, after a token of the same document, must be a target. How many may be missing follows from
what the rows lose anyway.

Cannot see: ends of documents that the owner's own `documents` leaves out on purpose; a generator that does
not stop.

Sources: transformers issues 22794 and 23530; trl issue 976; levanter issue 815.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.specimens.pipeline import BytePipeline, ByteTokenizer
from minilm.doctor.subject import DataView, Rows, Subject


@check(group="data", needs=("tokenizer", "data.documents"), cost="one epoch of the excerpt", quick=True)
def document_ends(subject: Subject) -> Finding:
    """EOS in documents, in storage, and as a target in rows."""
    view, eos = subject.data, subject.tokenizer.eos_id
    assert view is not None
    if eos is None:
        raise NotApplicable("the tokenizer has no EOS")
    truth = ledger.documents(view, "train")
    ended = sum(int(d[-1]) == eos for d in (truth[k] for k in range(len(truth))) if len(d))
    if ended < 0.5 * len(truth):  # fewer than all: documents that were cut on purpose have no end
        return _missing(ended, len(truth), "documents (made from text)")
    if view.stored is not None:
        stored = ledger.documents(view, "train", "stored")
        have, want = int((stored.tokens == eos).sum()), int((truth.tokens == eos).sum())
        if truth.whole and stored.whole and have < want:
            return _missing(have, want, "storage")
    if view.batches is None:
        return passed(f"{ended} of {len(truth)} documents end with EOS", ended, len(truth), unit="documents")
    return _in_rows(view, truth, ledger.epoch(view, 0, 0), eos)


def _missing(have: int, want: int, where: str) -> Finding:
    return failed(
        f"{have} of {want} documents end with EOS",
        have,
        want,
        unit="documents",
        bugs=["eos-not-added"],
        component=where,
        advice="append EOS to every document when it is encoded, in one place",
    )


def _in_rows(view: DataView, truth: ledger.Documents, rows: ledger.Epoch, eos: int) -> Finding:
    """Ends as targets: how many there are, and whether any that is seen is not learnt."""
    targets = rows.targets
    learnt = int(((rows.tokens == eos) & targets).sum())
    inside = (rows.tokens == eos) & (rows.runs > 0)
    first = int(inside[:, 0].sum())  # nobody's target in rows that do not overlap
    masked = int((inside & ~targets)[:, 1:].sum())
    starts = truth.offsets[:-1]
    want = int((truth.tokens == eos).sum()) - int((truth.tokens[starts] == eos).sum())
    known = max(1, len(truth.tokens) - len(truth))
    share = (
        1 - int(targets.sum()) / known if rows.whole and truth.whole else 0.0
    )  # of all targets that rows lose
    if not (rows.whole and truth.whole):
        want = learnt + masked  # the ends that were seen
    expected = want * max(0.0, share)  # rows that are left out take their ends with them: a Poisson bound
    allowed = max(first, math.floor(expected + 6 * math.sqrt(expected) + 3) if share > 0 else 0)
    missing = want - learnt
    if want <= allowed:
        raise NotApplicable(f"{want} documents end in the rows that were seen: too few to tell")
    if masked == 0 and missing <= allowed:
        return passed(
            f"{learnt} ends of documents are targets in an epoch ({truth.said}; {missing} are at borders of rows or in "
            "rows known to be left out)",
            missing,
            allowed,
            unit="ends",
        )
    present = int((rows.tokens == eos).sum()) > learnt
    return failed(
        f"{learnt} of {want} ends of documents are targets"
        + (f", {masked} stand in rows unlearnt" if masked else ""),
        missing,
        allowed,
        unit="ends",
        bugs=["eos-masked-pad-eq-eos", "eos-not-added"]
        if present
        else ["eos-not-added", "eos-masked-pad-eq-eos"],
        component="rows (collator: what is learnt)" if present else "rows (documents without their ends)",
        advice="mask padding by lengths or segments, never by the id of PAD; append EOS where documents are encoded",
    )


class _Padded(specimens.Pipeline):
    """One document a row, padded with EOS; lengths tell what is padding."""

    pad = 2

    def rows(self, split: str) -> list[Rows]:
        documents = self.stored(split)
        width = max(map(len, documents))
        found = [Rows.documents([d], self.pad, width) for d in documents]
        return [Rows(r.tokens, self.segments(r), self.learn(r.tokens, r.segments)) for r in found]

    def segments(self, row: Rows) -> torch.Tensor:
        return row.segments


@document_ends.plant("eos-masked-pad-eq-eos", component="collator", what="labels == pad -> not learnt")
def _() -> Subject:
    class ById(_Padded):
        def learn(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
            real: torch.Tensor = tokens != self.pad
            return real

    return specimens.subject(pipeline=ById)


@document_ends.plant("eos-masked-pad-eq-eos", component="collator", what="attention mask from the id of PAD")
def _() -> Subject:
    class ById(_Padded):
        def segments(self, row: Rows) -> torch.Tensor:
            return (row.tokens != self.pad).long()

    return specimens.subject(pipeline=ById)


@document_ends.plant("eos-masked-pad-eq-eos", component="collator", what="in packed rows of a byte tokenizer")
def _() -> Subject:
    class ById(BytePipeline):
        def learn(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
            real: torch.Tensor = tokens != self.tokenizer.eos_id
            return real

    return specimens.subject(pipeline=ById, size={"vocab_size": ByteTokenizer.num_tokens})


@document_ends.plant("eos-not-added", component="storage")
def _() -> Subject:
    class Without(specimens.Pipeline):
        def stored(self, split: str) -> list[list[int]]:
            return [d[:-1] for d in self.documents(split)]

    return specimens.subject(pipeline=Without)


@document_ends.plant(
    "eos-not-added", component="documents", what="by nobody: the owner's own documents have none"
)
def _() -> Subject:
    subject = specimens.subject()
    view = subject.data
    assert view is not None and view.documents is not None
    given = view.documents
    return subject.but(
        data=dataclasses.replace(view, documents=lambda split: [d[:-1] for d in given(split)], stored=None)
    )


@document_ends.plant("eos-not-added", component="rows", what="dropped where rows are made")
def _() -> Subject:
    class Without(_Padded):
        def rows(self, split: str) -> list[Rows]:
            documents = [d[:-1] for d in self.stored(split)]
            return [Rows.documents([d], 0, max(map(len, documents))) for d in documents]

    return specimens.subject(pipeline=Without)


@document_ends.healthy("PAD is EOS, padding known by lengths")
def _() -> Subject:
    return specimens.subject(pipeline=_Padded)


@document_ends.healthy("rows that do not overlap: some ends are first in their row")
def _() -> Subject:
    class Apart(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            flat = [t for d in self.stored(split) for t in d]
            numbers = [n for n, d in enumerate(self.stored(split), 1) for _ in d]
            width = self.length
            found = []
            for start in range(0, len(flat), width):
                part = torch.tensor([flat[start : start + width] + [0] * max(0, start + width - len(flat))])
                number = torch.tensor(
                    [numbers[start : start + width] + [0] * max(0, start + width - len(flat))]
                )
                found.append(Rows(part, number, number > 0))
            return found

    subject = specimens.subject(pipeline=Apart)
    assert subject.data is not None
    subject.data.lost_targets = None
    return subject
