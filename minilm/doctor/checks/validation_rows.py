"""An evaluation sees every validation token once, on any number of ranks, and the same ones each time.

Why: a last batch that is dropped, or filled up with repeated samples to make ranks even, gives a loss of
another text than the one that is named, and another one on 8 ranks than on 1. A loader that goes on where it
stood evaluates other rows each time, and the difference looks like progress.

How: pairs of (token, its target) of the rows of 1, 2 and 3 ranks, put together, against those of the
validation documents, as multisets (tokens, where rows do not overlap; where more than a fifth is left out, a
part is meant, and it must be the same part on all ranks); and the rows of a second pass against those of the
first. Exact.

Cannot see: how the evaluation averages them (see the checks of evaluation).

Sources: transformers issue 18436 and the `even_batches` of accelerate; OLMo-core ("evaluator data-order
drift").
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minilm.doctor import ledger, specimens
from minilm.doctor.checks.epoch_ledger import apart
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.subject import Rows, Subject

WORLDS = (1, 2, 3)
PART = 0.2  # where more than this is left out, a part is evaluated by design


@check(
    group="data",
    needs=("data.validation_batches", "data.documents"),
    cost="4 passes over the validation rows",
)
def validation_rows(subject: Subject) -> Finding:
    """Rows of all ranks against the documents, and a second pass against the first."""
    view = subject.data
    assert view is not None and view.validation_batches is not None
    truth = ledger.documents(view, "validation")
    first: ledger.Epoch | None = None
    total, part, kept = 0, False, np.zeros(0, dtype=np.uint64)
    for world in WORLDS:
        shares = [ledger.gathered(view.validation_batches(rank, world)) for rank in range(world)]
        if not truth.whole or not all(s.whole for s in shares):
            raise NotApplicable("an evaluation is longer than what one look takes in")
        if world == 1:
            first = shares[0]
            if not len(first):
                raise NotApplicable("there are no validation rows")
            again = ledger.gathered(view.validation_batches(0, 1))
            if sum(ledger.surplus(again.hashes, first.hashes)):
                return _drift(first, again)
        assert first is not None
        whole = not view.isolated or apart(truth, first)
        want = truth.grams(1 if whole else 2)
        have = np.concatenate([ledger.grams(s.tokens, s.runs, 1) if whole else s.pairs() for s in shares])
        twice, missing = ledger.surplus(have, want)
        if world == 1 and twice == 0 and missing > PART * len(want):
            part, want, missing = (
                True,
                have,
                0,
            )  # a part, by design: then it is to be the same part on all ranks
            kept = have
        elif part:
            twice, missing = ledger.surplus(have, kept)
            want = kept
        total = len(want)
        if twice or missing:
            return _uneven(world, twice, missing, total, "tokens" if whole else "targets", len(first), shares)
    return passed(
        f"each of {total} targets of {'a part of ' if part else ''}{truth.said} is evaluated once on 1, 2 and 3 "
        "ranks, and in a second pass",
        0,
        0,
        unit="targets",
    )


def _drift(first: ledger.Epoch, again: ledger.Epoch) -> Finding:
    twice, missing = ledger.surplus(again.hashes, first.hashes)
    return failed(
        f"a second evaluation takes other rows than the first: {twice} new, {missing} no more, "
        f"{len(first)} and {len(again)} in all",
        max(1, twice + missing),
        0,
        unit="rows",
        bugs=["eval-state-not-reset"],
        component="validation loader (its position)",
        advice="begin each evaluation with a fresh iterator, in the order of the disk",
    )


def _uneven(
    world: int, twice: int, missing: int, total: int, unit: str, rows: int, shares: list[ledger.Epoch]
) -> Finding:
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    return failed(
        f"on {ranks}, {twice} of {total} {unit} are evaluated more than once and {missing} not at all "
        f"({rows} rows in all; shares of {', '.join(str(len(s)) for s in shares)})",
        twice + missing,
        0,
        unit=unit,
        bugs=["uneven-ranks", "rank-shards-duplicated"]
        if twice >= missing
        else ["last-partial-dropped", "truncation-silent", "uneven-ranks"],
        component="validation loader (shares of ranks)" if world > 1 else "validation loader",
        advice="evaluate each row on one rank, let the last batch be smaller, and add nats and tokens over all ranks",
    )


@validation_rows.plant("uneven-ranks", component="ranks", what="filled up with the first rows")
def _() -> Subject:
    class Filled(specimens.Pipeline):
        num_validation = 9

        def validation_shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return (order + order[: -len(order) % world])[rank::world]

    return specimens.subject(pipeline=Filled)


@validation_rows.plant("last-partial-dropped", component="validation", what="drop_last in evaluation")
def _() -> Subject:
    class Dropped(specimens.Pipeline):
        def validation_batches(self, rank: int, world: int) -> Iterator[Rows]:
            return (r for r in super().validation_batches(rank, world) if len(r) == self.batch_rows)

    return specimens.subject(pipeline=Dropped)


@validation_rows.plant(
    "eval-state-not-reset", component="validation", what="three batches at a time, from where it stood"
)
def _() -> Subject:
    class GoesOn(specimens.Pipeline):
        place = 0

        def validation_batches(self, rank: int, world: int) -> Iterator[Rows]:
            every = list(super().validation_batches(rank, world))
            self.place += 3
            yield from (every + every)[self.place % len(every) :][:3]

    return specimens.subject(pipeline=GoesOn)


@validation_rows.healthy("one document a row, cut where it is too long, in batches of one row")
def _() -> Subject:
    class Single(specimens.Pipeline):
        batch_rows = 1

        def rows(self, split: str) -> list[Rows]:
            pieces = [
                list(d[start : start + self.length + 1])
                for d in self.stored(split)
                for start in range(0, len(d) - 1, self.length)
            ]
            return [Rows.documents([p], 0, self.length + 1) for p in pieces]

    return specimens.subject(pipeline=Single)


@validation_rows.healthy("a part of the validation rows, the same for all ranks; shuffled")
def _() -> Subject:
    class Part(specimens.Pipeline):
        turn = 0

        def validation_shard(self, order: list[int], rank: int, world: int) -> list[int]:
            self.turn += 1
            kept = order[: len(order) // 2]
            return [kept[i] for i in self.order(len(kept), 0 if world > 1 else self.turn, 0)][rank::world]

    return specimens.subject(pipeline=Part)
