"""A loader that is stopped and continued gives what it would have given, through the next epoch too.

Why: a continued run that begins its epoch again sees some rows twice and others never; one that remembers to
skip, and never forgets it, skips at the beginning of each later epoch; a shuffle buffer that is not saved
loses what was in it.

How: in epoch 0 and in epoch 1, after some batches, the rows of the continued loader are held, row by row and
up to the end of the following epoch, against those of the loader that was never stopped. Exact. Where they
part tells the bugs apart.

Cannot see: a stop in the middle of a batch; a change of the number of ranks.

Sources: accelerate issues 1451, 2823, 2016, 4071; MiniMind commit fea69cf; the documented limits of datasets'
streaming.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.subject import Rows, Subject


@check(group="data", needs=("data.batches", "data.resumed"), cost="two epochs of the excerpt, twice")
def resumed_order(subject: Subject) -> Finding:
    """After a stop in epoch 0 and in epoch 1: the same rows, in the same order."""
    view = subject.data
    assert view is not None and view.resumed is not None
    epochs = [ledger.epoch(view, number, 0) for number in range(3)]
    if not all(e.whole for e in epochs):
        raise NotApplicable("an epoch is longer than what one look takes in")
    if min(len(e.batches) for e in epochs) < 4:
        raise NotApplicable("needs epochs of at least 4 batches")
    compared = 0
    for number in (0, 1):
        now, following = epochs[number], epochs[number + 1]
        done = max(2, len(now.batches) // 3)
        start = sum(now.batches[:done])
        expected = np.concatenate([now.hashes[start:], following.hashes])
        resumed = ledger.gathered(view.resumed(number, 0, 0, 1, done))
        if not resumed.whole:
            raise NotApplicable("an epoch is longer than what one look takes in")
        given = resumed.hashes
        if not np.array_equal(given, expected):
            return _told_apart(given, now, following, done, number)
        compared += len(given)
    return passed(
        f"stopped in epochs 0 and 1: {compared} rows to the end of the next epoch are those of a loader never stopped",
        0,
        0,
        unit="rows",
    )


def _told_apart(
    given: np.ndarray, now: ledger.Epoch, following: ledger.Epoch, done: int, number: int
) -> Finding:
    """By how the continued loader goes on: from the beginning, a batch off, skipping again, or with rows missing."""

    def from_batch(k: int) -> np.ndarray:
        return now.hashes[sum(now.batches[:k]) :]

    def begins(what: np.ndarray) -> bool:
        return len(given) >= len(what) > 0 and np.array_equal(given[: len(what)], what)

    skipped = sum(following.batches[:done])
    expected = np.concatenate([from_batch(done), following.hashes])
    twice, missing = ledger.surplus(given, expected)
    bugs, how = ["data-pos-lost", "shuffle-buffer-lost"], "in another order"
    if begins(from_batch(done)) and np.array_equal(
        given[len(from_batch(done)) :], following.hashes[skipped:]
    ):
        bugs, how = ["skip-forever", "data-pos-lost"], f"and skips {done} batches of the next epoch again"
    elif begins(from_batch(done)):
        bugs, how = ["data-pos-lost", "skip-forever"], "and the next epoch is another one"
    elif begins(from_batch(0)):
        bugs, how = ["data-pos-lost"], "from the beginning of the epoch"
    elif begins(from_batch(done + 1)) or begins(from_batch(done - 1)):
        bugs, how = (
            ["skip-off-by-one", "data-pos-lost"],
            "one batch " + ("too far" if begins(from_batch(done + 1)) else "too early"),
        )
    elif missing and not twice:
        bugs, how = ["shuffle-buffer-lost", "data-pos-lost"], "without some rows"
    return failed(
        f"stopped after {done} batches of epoch {number}, the loader goes on {how}: {twice} rows come twice, {missing} "
        "never",
        max(1, twice + missing),
        0,
        unit="rows",
        bugs=bugs,
        component="loader (saved position)",
        advice="save epoch and position, make the order a function of (seed, epoch), and skip once, in the "
        "interrupted epoch",
    )


@resumed_order.plant("data-pos-lost", component="position", what="begins the epoch again")
def _() -> Subject:
    class Again(specimens.Pipeline):
        def resumed(self, epoch: int, seed: int, rank: int, world: int, done: int) -> Iterator[Rows]:
            return super().resumed(epoch, seed, rank, world, 0)

    return specimens.subject(pipeline=Again)


@resumed_order.plant(
    "data-pos-lost", component="position", what="skips in another shuffle: the epoch is forgotten"
)
def _() -> Subject:
    class Forgets(specimens.Pipeline):
        def resumed(self, epoch: int, seed: int, rank: int, world: int, done: int) -> Iterator[Rows]:
            return super().resumed(0, seed, rank, world, done)

    return specimens.subject(pipeline=Forgets)


@resumed_order.plant("skip-off-by-one", component="position")
def _() -> Subject:
    class Further(specimens.Pipeline):
        def resumed(self, epoch: int, seed: int, rank: int, world: int, done: int) -> Iterator[Rows]:
            return super().resumed(epoch, seed, rank, world, done + 1)

    return specimens.subject(pipeline=Further)


@resumed_order.plant("skip-forever", component="position")
def _() -> Subject:
    class Always(specimens.Pipeline):
        def resumed(self, epoch: int, seed: int, rank: int, world: int, done: int) -> Iterator[Rows]:
            for number in (epoch, epoch + 1):
                yield from itertools.islice(self.batches(number, seed, rank, world), done, None)

    return specimens.subject(pipeline=Always)


@resumed_order.plant(
    "shuffle-buffer-lost", component="position", what="12 rows that were read, not yet given"
)
def _() -> Subject:
    class Buffer(specimens.Pipeline):
        def resumed(self, epoch: int, seed: int, rank: int, world: int, done: int) -> Iterator[Rows]:
            rows, order = self.rows("train"), self.order(len(self.rows("train")), epoch, seed)
            inside = set(order[self.batch_rows * done :][::9][:12])
            yield from self.cut(rows, [i for i in order[self.batch_rows * done :] if i not in inside])
            yield from self.batches(epoch + 1, seed, rank, world)

    return specimens.subject(pipeline=Buffer)


@resumed_order.healthy("batches of another size after the stop")
def _() -> Subject:
    class Other(specimens.Pipeline):
        def resumed(self, epoch: int, seed: int, rank: int, world: int, done: int) -> Iterator[Rows]:
            for rows in super().resumed(epoch, seed, rank, world, done):
                yield from rows.split(1)

    return specimens.subject(pipeline=Other)
