"""Ranks, and worker processes of a loader, get different rows which together are all of them.

Why: n ranks that read the same rows are one rank at n times the cost; workers without data leave the others
to do the work; a random generator that every worker inherits makes their draws equal; a rank with a batch
less hangs the others.

How: rows, by a hash of their tokens, that 2 and 3 ranks are given in an epoch, against those of one rank: as
multisets they must be equal, save for the repetitions and losses that the owner declares. Every rank has
rows, and as many batches as the others. The same for worker processes where the owner shows them; and where
rows hold random draws (tokens hidden from the loss), these must differ between workers and between epochs.

Cannot see: a loader that finds its rank by itself and ignores the one given here; draws that leave no trace
in the rows.

Sources: datasets issues 5360, 3423, 8669; espnet issue 2081; pytorch issue 5059; transformers issue 18436.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.specimens.loss import targets
from minilm.doctor.subject import DataView, Subject

WORLDS = (2, 3)


@check(group="data", needs=("data.batches",), cost="six shares of an epoch of the excerpt")
def rank_shares(subject: Subject) -> Finding:
    """Two and three ranks against one."""
    view = subject.data
    assert view is not None
    whole = ledger.epoch(view, 0, 0)
    done = []
    for world in WORLDS:
        try:
            shares = [ledger.epoch(view, 0, 0, rank, world) for rank in range(world)]
        except Exception as error:  # noqa: BLE001  (a loader may refuse a number of ranks that does not divide its batch)
            done.append(f"{world} ranks refused ({type(error).__name__})")
            continue
        if not whole.whole or not all(s.whole for s in shares):
            raise NotApplicable("an epoch is longer than what one look takes in")
        if found := _judged(view, whole, shares, "rank"):
            return found
        counts = sorted({len(s.batches) for s in shares})
        if len(counts) > 1:
            return failed(
                f"{world} ranks get {' and '.join(map(str, counts))} batches: the longer ones wait for ever, or pad",
                counts[-1] - counts[0],
                0,
                unit="batches",
                bugs=["uneven-ranks"],
                component="sampler (shares of ranks)",
                advice="give all ranks as many batches, and declare rows that are dropped or repeated for it",
            )
        more = sum(map(len, shares)) - len(whole)
        done.append(
            f"{world} ranks share {len(whole)} rows"
            + (f", {more} of them twice to be even" if more > 0 else "")
        )
    if all("refused" in text for text in done):
        raise NotApplicable("; ".join(done))
    return passed("; ".join(done), 0, view.repeated_rows, unit="rows twice")


@check(group="data", needs=("data.worker_rows",), cost="three shares of an epoch of the excerpt")
def worker_shares(subject: Subject) -> Finding:
    """Two and four workers against one, and their random draws against each other."""
    view = subject.data
    assert view is not None and view.worker_rows is not None

    def rows(epoch: int, worker: int, workers: int) -> ledger.Epoch:
        assert view is not None and view.worker_rows is not None
        return ledger.gathered(view.worker_rows(epoch, 0, worker, workers))

    whole = rows(0, 0, 1)
    shares = {count: [rows(0, w, count) for w in range(count)] for count in (2, 4)}
    for parts in shares.values():
        if not whole.whole or not all(p.whole for p in parts):
            raise NotApplicable("an epoch is longer than what one look takes in")
        if found := _judged(view, whole, parts, "worker"):
            return found
    return _draws(shares[2], rows(1, 0, 2))


def _judged(view: DataView, whole: ledger.Epoch, shares: list[ledger.Epoch], who: str) -> Finding | None:
    count = len(shares)
    sizes = [len(s) for s in shares]
    given = np.concatenate([s.hashes for s in shares if len(s)])
    extra, missing = ledger.surplus(given, whole.hashes)
    twice = _twice(given, whole.hashes)
    if missing or extra:  # packed anew on each rank: rows differ, but their targets are the same
        by_pair = ledger.surplus(np.concatenate([s.pairs() for s in shares if len(s)]), whole.pairs())
        extra, missing, twice = (0, 0, 0) if sum(by_pair) == 0 else (extra, missing, twice)
    starved = [k for k, size in enumerate(sizes) if size == 0]
    if starved and sum(sizes) >= count:
        return failed(
            f"{len(starved)} of {count} {who}s get no rows ({who} {starved[0]} for one); the others {max(sizes)}",
            len(starved),
            0,
            unit=f"{who}s",
            bugs=["workers-starved", "uneven-ranks"],
            component=f"sampler (shares of {who}s)",
            advice="split rows, not files, or have at least as many files as there are processes to read them",
        )
    width = whole.tokens.shape[1]
    # To make ranks even, samplers repeat fewer rows than there are ranks. Where something is declared to be dropped,
    # another number of ranks drops other rows.
    even = max(sizes) == min(sizes)
    lost = (ledger.lost(view, 0, 0) or 0) / max(1, width - 1)
    lost = max(lost, count * max([1, *whole.batches])) if lost else 0.0
    repeated = max(view.repeated_rows, count - 1 if even and (lost or not missing) else 0)
    # Dropping some excuses other rows and missing rows, as many as are dropped; it excuses no row given twice.
    if twice <= repeated and extra <= repeated + lost and missing <= lost:
        return None
    few = extra + missing <= 2 * count * max([1, *whole.batches])
    same = all(np.array_equal(shares[0].hashes, s.hashes) for s in shares)
    copies = ["rank-shards-duplicated", "uneven-ranks"]
    return failed(
        f"{count} {who}s get {sum(sizes)} rows, one gets {len(whole)}: {twice} are given twice, {missing} to nobody"
        + (f"; all {who}s get the same" if same else ""),
        extra + missing,
        view.repeated_rows,
        unit="rows",
        bugs=copies[::-1] if few and not same else copies,
        component=f"sampler (shares of {who}s)",
        advice=f"deal rows out by {who} number; declare what is repeated (repeated_rows) or dropped (lost_targets)",
    )


def _twice(given: np.ndarray, whole: np.ndarray) -> int:
    """How many rows are given more often than one process alone is given them (once, if it drops them)."""
    kinds, counts = np.unique(given, return_counts=True)
    known, often = np.unique(whole, return_counts=True)
    allowed = np.ones_like(counts)
    here = np.searchsorted(known, kinds).clip(max=max(0, len(known) - 1))
    found = known[here] == kinds if len(known) else np.zeros(len(kinds), dtype=bool)
    allowed[found] = often[here[found]]
    return int((counts - allowed).clip(min=0).sum())


def _draws(shares: list[ledger.Epoch], later: ledger.Epoch) -> Finding:
    """What of the rows looks drawn: which tokens are to be learnt."""
    one, other = shares
    length = min(len(one), len(other), len(later))
    if not length or bool((one.learn[one.runs > 0] == 1).all()):
        return passed(f"{len(shares)} workers share all rows; rows hold no draws", 0, 0, unit="rows twice")

    def alike(a: ledger.Epoch, b: ledger.Epoch) -> float:
        both = (a.runs[:length] > 0) & (b.runs[:length] > 0)
        same = (a.learn[:length] == b.learn[:length]) | ~both
        return float(same.all(axis=1).mean())

    by_worker, by_epoch = alike(one, other), alike(one, later)
    if max(by_worker, by_epoch) < 0.5:
        return passed(
            f"workers share all rows; draws are alike in {by_worker:.0%} of two workers, {by_epoch:.0%} of two epochs",
            max(by_worker, by_epoch),
            0.5,
            unit="share of rows",
        )
    who = "two workers" if by_worker >= 0.5 else "two epochs"
    return failed(
        f"{max(by_worker, by_epoch):.0%} of the random draws of {who} are the same",
        max(by_worker, by_epoch),
        0.5,
        unit="share of rows",
        bugs=["numpy-worker-seed"],
        component="data set (random generator of a worker)",
        advice="seed a generator with (seed, epoch, worker), not the global one that workers inherit",
    )


@rank_shares.plant("rank-shards-duplicated", component="ranks", what="each rank reads everything")
def _() -> Subject:
    class Copies(specimens.Pipeline):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return order

    return specimens.subject(pipeline=Copies)


@rank_shares.plant(
    "rank-shards-duplicated", component="ranks", what="another shuffle on each rank before the split"
)
def _() -> Subject:
    class Apart(specimens.Pipeline):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return self.order(len(order), rank, world)[rank::world] if world > 1 else order

    return specimens.subject(pipeline=Apart)


class _Dropping(specimens.Pipeline):
    """Whole batches of eight rows over all ranks; the tail waits for another epoch, and its owner says so."""

    def shard(self, order: list[int], rank: int, world: int) -> list[int]:
        return order[: len(order) // 8 * 8][rank::world]

    def handed_over(self) -> DataView:
        def lost(epoch: int, seed: int) -> int:
            given = self.batches(epoch, seed, 0, 1)
            return sum(int(targets(r).sum()) for r in self.rows("train")) - sum(
                int(targets(r).sum()) for r in given
            )

        return dataclasses.replace(super().handed_over(), lost_targets=lost)


@rank_shares.plant(
    "rank-shards-duplicated",
    component="ranks",
    what="another shuffle on each rank, and a tail that is dropped",
)
def _() -> Subject:
    class Apart(_Dropping):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return super().shard(self.order(len(order), rank, world) if rank else order, rank, world)

    return specimens.subject(pipeline=Apart)


@rank_shares.healthy("a tail that is dropped")
def _() -> Subject:
    return specimens.subject(pipeline=_Dropping)


@rank_shares.healthy("each number of ranks drops a tail of its own")
def _() -> Subject:
    class Own(_Dropping):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return order[: len(order) // (8 * world) * (8 * world)][rank::world]

    return specimens.subject(pipeline=Own)


@rank_shares.plant(
    "uneven-ranks", component="ranks", what="filled up to whole batches with the first rows, undeclared"
)
def _() -> Subject:
    class Filled(specimens.Pipeline):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return (order + order[: -len(order) % (8 * world)])[rank::world] if world > 1 else order

    return specimens.subject(pipeline=Filled)


@rank_shares.plant("uneven-ranks", component="ranks", what="a rank with fewer batches")
def _() -> Subject:
    class Runs(specimens.Pipeline):
        batch_rows = 1

    return specimens.subject(pipeline=Runs)


@rank_shares.plant("workers-starved", component="ranks", what="one file, so one rank reads")
def _() -> Subject:
    class One(specimens.Pipeline):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return order if rank == 0 else []

    return specimens.subject(pipeline=One)


@worker_shares.plant(
    "rank-shards-duplicated", component="workers", what="an iterable data set without worker split"
)
def _() -> Subject:
    class Copies(specimens.Pipeline):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return order

    return specimens.subject(pipeline=Copies)


@worker_shares.plant("workers-starved", component="workers")
def _() -> Subject:
    class Few(specimens.Pipeline):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return order[rank :: min(world, 2)] if rank < 2 else []

    return specimens.subject(pipeline=Few)


@worker_shares.plant("numpy-worker-seed", component="worker", what="all workers inherit one state")
def _() -> Subject:
    class Inherits(specimens.Pipeline):
        def worker_seed(self, epoch: int, seed: int, worker: int) -> list[int]:
            return [seed, epoch]

    return specimens.subject(pipeline=Inherits)


@worker_shares.plant("numpy-worker-seed", component="worker", what="the same draws in every epoch")
def _() -> Subject:
    class Inherits(specimens.Pipeline):
        def worker_seed(self, epoch: int, seed: int, worker: int) -> list[int]:
            return [seed, worker]

    return specimens.subject(pipeline=Inherits)


@rank_shares.healthy("filled up to be even, as torch's DistributedSampler does")
def _() -> Subject:
    class Filled(specimens.Pipeline):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return (order + order[: -len(order) % world])[rank::world]

    return specimens.subject(pipeline=Filled)


@rank_shares.healthy("filled up to whole batches, and declared")
def _() -> Subject:
    class Filled(specimens.Pipeline):
        def shard(self, order: list[int], rank: int, world: int) -> list[int]:
            return (order + order[: -len(order) % (8 * world)])[rank::world] if world > 1 else order

        def handed_over(self) -> DataView:
            return dataclasses.replace(super().handed_over(), repeated_rows=23)

    return specimens.subject(pipeline=Filled)


@worker_shares.healthy("workers without any random draw")
def _() -> Subject:
    subject = specimens.subject()
    view = subject.data
    assert view is not None and view.batches is not None
    shares = view.batches
    return subject.but(data=dataclasses.replace(view, worker_rows=shares))
