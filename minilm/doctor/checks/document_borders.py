"""Documents that share a row stay apart: no target comes from another document, and no run of tokens spans two.

Why: a packed row without borders trains the model to predict the first word of an unrelated document from the
last one of this, and lets it look there. Nothing fails.

How: each run of a row (one segment) must be a piece of one document: all its pairs of token and target, and
all its runs of five tokens, must stand in a document. Pieces are compared by content, so it does not matter
how rows were packed.

Cannot see: two documents joined where the joint looks like the inside of a third one, five tokens long.

Sources: axolotl pull request 3796; transformers pull request 46634 (documents of a packed row see each
other).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.subject import Rows, Subject

PIECES = (2, 5)


@check(group="data", needs=("data.documents", "data.batches"), cost="one epoch of the excerpt", quick=True)
def document_borders(subject: Subject) -> Finding:
    """Every run of a row is a piece of one document."""
    view = subject.data
    assert view is not None
    if not view.isolated:
        raise NotApplicable("rows are one stream by design: documents are not kept apart")
    truth = ledger.documents(view, "train")
    if not truth.whole:
        raise NotApplicable(f"only {truth.said} were looked at, rows may come from others")
    rows = ledger.epoch(view, 0, 0)
    targets = rows.targets
    wrong = np.zeros(rows.tokens.shape, dtype=bool)
    looked = 0
    for n in PIECES:
        hashes, ends = ledger.gram_table(rows.tokens, rows.runs, n, targets)
        looked = max(looked, len(hashes))
        wrong.flat[ends[~np.isin(hashes, truth.grams(n))]] = True
    if not looked:
        raise NotApplicable("rows have no targets")
    count = int(wrong.sum())
    if not count:
        return passed(
            f"all {looked} targets continue a piece of one document ({truth.said})", 0, 0, unit="targets"
        )
    across = _across(rows, truth, wrong)
    at = tuple(np.argwhere(wrong)[0])
    piece = rows.tokens[at[0], max(0, at[1] - 4) : at[1] + 1].tolist()
    bugs = ["pack-label-across-docs", "tok-id-mod-vocab", "tok-uint16-wrap"]
    return failed(
        f"{count} of {looked} targets continue something that stands in no document, {across} of them after the first "
        f"token of another one; first in row {at[0]}: {piece}",
        count,
        0,
        unit="targets",
        bugs=bugs if across else bugs[1:] + bugs[:1],
        component="rows (segments of packed documents)" if across else "rows (tokens)",
        advice="give each document of a row a segment of its own, and let no target cross from one to the next",
    )


def _across(rows: ledger.Epoch, truth: ledger.Documents, wrong: np.ndarray) -> int:
    """How many wrong targets stand within four tokens behind the end of one document and the start of another."""
    starts = truth.offsets[:-1]
    firsts, lasts = np.unique(truth.tokens[starts]), np.unique(truth.tokens[truth.offsets[1:] - 1])
    joint = np.zeros(rows.tokens.shape, dtype=bool)
    joint[:, 1:] = np.isin(rows.tokens[:, 1:], firsts) & np.isin(rows.tokens[:, :-1], lasts)
    near = joint.copy()
    for back in range(1, PIECES[-1] - 1):
        near[:, back:] |= joint[:, :-back]
    return int((wrong & near).sum())


@document_borders.plant("pack-label-across-docs", component="segments", what="one segment a row")
def _() -> Subject:
    class Whole(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            return [Rows(r.tokens, (r.segments > 0).long(), r.learn) for r in super().rows(split)]

    return specimens.subject(pipeline=Whole)


@document_borders.plant("pack-label-across-docs", component="segments", what="each border one token late")
def _() -> Subject:
    class Late(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            found = []
            for r in super().rows(split):
                late = torch.cat([r.segments[:, :1], r.segments[:, :-1]], dim=1)
                found.append(Rows(r.tokens, torch.where(r.segments > 0, late, 0), r.learn))
            return found

    return specimens.subject(pipeline=Late)


@document_borders.plant(
    "pack-label-across-docs", component="segments", what="no EOS and no BOS to tell them apart"
)
def _() -> Subject:
    class Bare(specimens.Pipeline):
        def stored(self, split: str) -> list[list[int]]:
            return [d[1:-1] for d in self.documents(split)]

        def rows(self, split: str) -> list[Rows]:
            return [Rows(r.tokens, (r.segments > 0).long(), r.learn) for r in super().rows(split)]

    subject = specimens.subject(pipeline=Bare)
    assert subject.data is not None
    return subject.but(data=dataclasses.replace(subject.data, documents=subject.data.stored))


@document_borders.healthy("one document a row, cut where it is too long")
def _() -> Subject:
    class Single(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            pieces = [
                d[start : start + self.length + 1]
                for d in self.stored(split)
                for start in range(0, len(d) - 1, self.length)
            ]
            return [Rows.documents([p], 0, self.length + 1) for p in pieces]

    return specimens.subject(pipeline=Single)


@document_borders.healthy("numbers of segments that do not begin with 1")
def _() -> Subject:
    class Far(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            return [Rows(r.tokens, r.segments * 7, r.learn) for r in super().rows(split)]

    return specimens.subject(pipeline=Far)
