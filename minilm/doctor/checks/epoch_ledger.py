"""Every token of every document is learnt exactly once per epoch.

Why: documents cut to the row's length, a last batch or a last accumulation group that is dropped, a rest that
is filled up with samples already seen: the loss curve shows none of it.

How: a ledger. The pairs of (token, its target) of all rows of an epoch are counted against those of all
documents, as multisets, in two epochs. Rows that do not overlap lose the pairs at their borders by nature:
then tokens are counted in place of pairs. What may be missing is what the owner declares (`lost_targets`),
else nothing: a loss must be declared, it is not guessed. Whether the same tokens are missing in both epochs
tells a cut document from a dropped batch.

Cannot see: two errors that give the same multiset (tokens swapped between documents); an epoch too long to be
counted.

Sources: nanochat commit 348fbb3 ("never crop data"); transformers 4.45 (5 samples, accumulation 4: one is
never used); OLMo-core release 2.3.0 (samples repeated at the end).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.subject import DataView, Rows, Subject


@check(group="data", needs=("data.documents", "data.batches"), cost="two epochs of the excerpt")
def epoch_ledger(subject: Subject) -> Finding:
    """Pairs (or tokens) of the rows against those of the documents: none too many, none missing."""
    view = subject.data
    assert view is not None
    if any(w != 1 for w in view.weights.values()):
        raise NotApplicable("sources have weights: see mixture_shares")
    truth = ledger.documents(view, "train")
    epochs = [ledger.epoch(view, number, 0) for number in (0, 1)]
    if not truth.whole or not all(e.whole for e in epochs):
        raise NotApplicable(f"an epoch is longer than what one look takes in ({truth.said} were seen)")
    if not len(epochs[0]):
        raise NotApplicable("an epoch has no rows")
    width = epochs[0].tokens.shape[1]
    balances = [_balance(view, truth, rows) for rows in epochs]
    number = max((0, 1), key=lambda k: balances[k].wrong)
    worst = balances[number]
    declared = ledger.lost(view, number, 0)
    allowed = declared or 0
    total = f"of {worst.total} {worst.unit} in {truth.said}"
    if worst.extra <= view.repeated_rows * width and worst.missing <= allowed:
        return passed(
            f"{worst.missing} {total} are missing in an epoch ({allowed} declared), {worst.extra} are there twice",
            worst.missing,
            allowed,
            unit=worst.unit,
        )
    said = "none declared" if declared is None else f"{declared} declared"
    more = {"details": {"rows": len(epochs[0]), "missing": worst.missing, "twice": worst.extra}}
    if worst.extra > max(worst.missing, view.repeated_rows * width):
        return failed(
            f"{worst.extra} {total} are there more often than once, {worst.missing} are missing ({said})",
            worst.extra,
            view.repeated_rows * width,
            unit=worst.unit,
            bugs=["pack-label-across-docs", "mixture-rounding"]
            if worst.strange > worst.extra / 2
            else ["mixture-rounding", "uneven-ranks", "rank-shards-duplicated"],
            component="rows (targets that stand in no document)"
            if worst.strange > worst.extra / 2
            else "sampler (rows given twice)",
            advice="give each row once per epoch; let the last batch be smaller, or carry its rows into the next epoch",
            **more,
        )
    same = _same(balances)
    return failed(
        f"{worst.missing} {total} are never learnt in an epoch ({said}), {worst.extra} too often; "
        + ("the same ones in both epochs" if same else "other ones in the next epoch"),
        worst.missing,
        allowed,
        unit=worst.unit,
        bugs=["truncation-silent", "last-partial-dropped"]
        if same
        else ["last-partial-dropped", "truncation-silent"],
        component="packer (documents cut to the row)" if same else "sampler (the last rows of an epoch)",
        advice="carry the rest of a long document into the next row; keep the last partial batch, or declare what is "
        "dropped (lost_targets)",
        **more,
    )


@dataclasses.dataclass(frozen=True)
class _Balance:
    unit: str
    total: int
    extra: int
    missing: int
    strange: int  # of the extra ones: pairs that stand in no document at all
    lost: np.ndarray  # which ones are missing, sorted

    @property
    def wrong(self) -> int:
        return self.extra + self.missing


def _balance(view: DataView, truth: ledger.Documents, rows: ledger.Epoch) -> _Balance:
    """By pairs, or by tokens where rows do not overlap or are one stream."""
    tokens = truth.grams(1)
    if view.isolated and not apart(truth, rows):
        unit, have, want = "targets", rows.pairs(), truth.grams(2)
    elif view.isolated or apart(truth, rows):
        unit, have, want = "tokens", ledger.grams(rows.tokens, rows.runs, 1), tokens
    else:  # one stream: each token is a target but the first
        unit, have, want = "tokens", ledger.grams(rows.tokens, rows.runs, 1, rows.targets), tokens[1:]
    extra, missing = ledger.surplus(have, want)
    strange = int((~np.isin(have, want)).sum())
    return _Balance(unit, len(want), extra, missing, strange, _missing(have, want))


def apart(truth: ledger.Documents, rows: ledger.Epoch) -> bool:
    """Does a row that begins inside of a document begin after the last token of another row, rather than with it."""
    starts = ledger.row_places(rows, truth)
    known = starts >= 0
    ends = starts[known] + (rows.runs[known] > 0).sum(axis=1)
    starts = np.setdiff1d(starts[known], truth.offsets)
    return bool(np.isin(starts, ends).sum() > np.isin(starts, ends - 1).sum())


def _missing(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    keys, inverse = np.unique(np.concatenate([have, want]), return_inverse=True)
    counts = np.bincount(inverse[len(have) :], minlength=len(keys)) - np.bincount(
        inverse[: len(have)], minlength=len(keys)
    )
    return np.repeat(keys, np.maximum(counts, 0))


def _same(balances: list[_Balance]) -> bool:
    """Do both epochs miss (nearly) the same ones."""
    differ = sum(ledger.surplus(balances[0].lost, balances[1].lost))
    return differ < 0.2 * (len(balances[0].lost) + len(balances[1].lost))


class _Single(specimens.Pipeline):
    """One document a row."""

    def pieces(self, split: str) -> Iterator[list[int]]:
        for d in self.stored(split):
            yield from (
                list(d[start : start + self.length + 1]) for start in range(0, len(d) - 1, self.length)
            )

    def rows(self, split: str) -> list[Rows]:
        return [Rows.documents([p], 0, self.length + 1) for p in self.pieces(split)]


@epoch_ledger.plant("truncation-silent", component="packer", what="each document cut to one row")
def _() -> Subject:
    class Cut(_Single):
        def pieces(self, split: str) -> Iterator[list[int]]:
            return (list(d[: self.length + 1]) for d in self.stored(split))

    return specimens.subject(pipeline=Cut)


@epoch_ledger.plant("truncation-silent", component="packer", what="the rest of the stream that fills no row")
def _() -> Subject:
    class Cut(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            return [r for r in super().rows(split) if bool((r.segments > 0).all())][:-2]

    return specimens.subject(pipeline=Cut)


@epoch_ledger.plant("last-partial-dropped", component="sampler")
def _() -> Subject:
    class Dropped(specimens.Pipeline):
        def cut(self, rows: list[Rows], own: list[int]) -> Iterator[Rows]:
            return super().cut(rows, own[: len(own) // self.batch_rows * self.batch_rows])

    return specimens.subject(pipeline=Dropped)


@epoch_ledger.plant(
    "last-partial-dropped", component="sampler", what="the last accumulation group, undeclared"
)
def _() -> Subject:
    class Dropped(specimens.Pipeline):
        def batches(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Rows]:
            every = list(super().batches(epoch, seed, rank, world))
            yield from every[: len(every) // 4 * 4]

        def handed_over(self) -> DataView:
            return dataclasses.replace(super().handed_over(), lost_targets=None)

    return specimens.subject(pipeline=Dropped)


@epoch_ledger.plant(
    "mixture-rounding", component="sampler", what="the last batch filled up with rows already seen"
)
def _() -> Subject:
    class Filled(specimens.Pipeline):
        def cut(self, rows: list[Rows], own: list[int]) -> Iterator[Rows]:
            return super().cut(rows, own + own[: -len(own) % self.batch_rows])

    return specimens.subject(pipeline=Filled)


@epoch_ledger.healthy("a last batch that is dropped and declared")
def _() -> Subject:
    class Declared(specimens.Pipeline):
        def kept(self, epoch: int, seed: int) -> list[int]:
            count = len(self.rows("train"))
            return self.order(count, epoch, seed)[: count // self.batch_rows * self.batch_rows]

        def lost(self, epoch: int, seed: int) -> int:
            rows, kept = self.rows("train"), set(self.kept(epoch, seed))
            left = [r for i, r in enumerate(rows) if i not in kept]
            return sum(
                int(((r.segments[:, 1:] == r.segments[:, :-1]) & (r.segments[:, 1:] > 0)).sum()) for r in left
            )

        def batches(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Rows]:
            return self.cut(self.rows("train"), self.shard(self.kept(epoch, seed), rank, world))

        def handed_over(self) -> DataView:
            return dataclasses.replace(super().handed_over(), lost_targets=self.lost)

    return specimens.subject(pipeline=Declared)


@epoch_ledger.healthy("rows that do not overlap, and a last short one")
def _() -> Subject:
    class Apart(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            flat = torch.tensor([t for d in self.stored(split) for t in d])
            numbers = torch.tensor([n for n, d in enumerate(self.stored(split), 1) for _ in d])
            found = []
            for start in range(0, len(flat), self.length):
                part, number = flat[start : start + self.length], numbers[start : start + self.length]
                row = torch.zeros(2, self.length, dtype=torch.long)
                row[0, : len(part)], row[1, : len(part)] = part, number
                found.append(Rows(row[:1], row[1:], row[1:] > 0))
            return found

    return specimens.subject(pipeline=Apart)


@epoch_ledger.healthy("one document a row, long ones go on in the next")
def _() -> Subject:
    return specimens.subject(pipeline=_Single)
