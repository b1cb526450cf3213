"""Another order in each epoch and for each seed, well mixed, made without touching anybody's random numbers.

Why: with one order for all epochs the model learns the order; a seed that is ignored makes repeated runs one
run; rows in step with the disk make waves in the loss; a library that reseeds the global generators changes
dropout and everything else.

How: rows are known by a hash of their tokens. Orders of two epochs and two seeds are compared; the same epoch
is asked for again under other global random states and must come back the same; the state of each global
generator afterwards must depend on its state before (drawing from it is noted, reseeding it fails). The order
is held against the disk, and epochs against each other, by rank correlation, by the steps between neighbours,
and by the commonest step. Each has a probability below 1e-7 for a true shuffle: 5.5 and 7 standard
deviations, and a Poisson bound on the commonest step.

Cannot see: an order that is poor in a way that these three do not measure; less than 40 rows.

Sources: pytorch issue 31771 (no set_epoch); litgpt issue 1425 (seed ignored); OLMo-core release 2.4.0 (random
reseeded); levanter commit fe7ee6f (a linear congruential permutation replaced).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import random_states_kept
from minilm.doctor.subject import DataView, Rows, Subject

MIN_ROWS = 40
CORRELATION, LOCALITY = 5.5, 7.0  # standard deviations


@check(group="data", needs=("data.batches",), cost="four epochs of the excerpt")
def epoch_order(subject: Subject) -> Finding:
    """Orders compared over epochs, seeds, random states, and with the disk."""
    view = subject.data
    assert view is not None

    def hashes(epoch: int, seed: int) -> np.ndarray:
        return ledger.epoch(view, epoch, seed).hashes

    with random_states_kept(1):
        first = hashes(0, 0)
    if len(np.unique(first)) < 4:
        raise NotApplicable(f"needs some different rows in an epoch, there are {len(np.unique(first))}")
    if found := _generators(lambda: hashes(0, 0), first):
        return found
    next_epoch, other_seed = hashes(1, 0), hashes(0, 1)
    for other, what, bug, advice in (
        (
            next_epoch,
            "epochs 0 and 1",
            "shuffle-same-every-epoch",
            "give the epoch to the sampler (set_epoch)",
        ),
        (
            other_seed,
            "seeds 0 and 1",
            "data-seed-ignored",
            "let the data seed, and it alone, decide the order",
        ),
    ):
        share = _alike(first, other)
        if share > 0.5:
            return failed(
                f"{share:.0%} of the places of {what} hold the same row",
                share,
                0.5,
                unit="share of places",
                bugs=[bug, "data-seed-ignored" if bug.startswith("shuffle") else "shuffle-same-every-epoch"],
                component="sampler",
                advice=advice,
            )
    return _mixed(view, first, next_epoch)


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    length = min(len(a), len(b))
    return float((a[:length] == b[:length]).mean()) if length else 0.0


def _generators(order: Callable[[], np.ndarray], first: np.ndarray) -> Finding | None:
    """The same order under other global states, and global states that are not overwritten."""
    after: list[dict[str, Any]] = []
    for seed in (2, 3):
        with random_states_kept(seed):
            again = order()
            after.append(
                {
                    "random": random.getstate(),
                    "numpy": str(np.random.get_state(legacy=False)["state"]["key"].tolist()),
                    "torch": torch.get_rng_state().tolist(),
                }
            )
        if not np.array_equal(first, again):
            return failed(
                f"the same epoch and seed gave another order ({_alike(first, again):.0%} of the places alike) when the "
                "global random generators stood elsewhere",
                1 - _alike(first, again),
                0,
                unit="share of places",
                bugs=["data-seed-ignored", "rng-stolen-by-lib"],
                component="sampler (global random generator)",
                advice="shuffle with a generator of its own, seeded with (data seed, epoch)",
            )
    stolen = [name for name in after[0] if after[0][name] == after[1][name]]
    if not stolen:
        return None
    return failed(
        f"whatever the state of {', '.join(stolen)} was before an epoch, afterwards it is the same: it is reseeded",
        len(stolen),
        0,
        unit="generators",
        bugs=["rng-stolen-by-lib"],
        component=f"data set or sampler (global {', '.join(stolen)})",
        advice="use a generator object of its own instead of seeding the global one",
    )


def _mixed(view: DataView, first: np.ndarray, second: np.ndarray) -> Finding:
    """Is the order unrelated to the disk, and the next epoch's to this one's."""
    orders = {}
    once, index = np.unique(first, return_index=True)
    if len(once) == len(first) and np.array_equal(once, np.unique(second)) and len(first) == len(second):
        orders["the epoch before"] = index[np.searchsorted(once, second)]
    if view.documents is not None:
        truth = ledger.documents(view, "train")
        places = ledger.row_places(ledger.epoch(view, 0, 0), truth)
        if (places >= 0).mean() > 0.8:
            orders["the disk"] = places[places >= 0]
    worst = ("", 0.0, "")
    for name, places in orders.items():
        if len(places) >= MIN_ROWS:
            worst = max(worst, *((name, z, what) for what, z in _pattern(places).items()), key=lambda w: w[1])
    if not worst[0]:
        return passed(
            f"{len(first)} rows: another order in each epoch and for each seed (too few to say how well mixed)",
            _alike(first, second),
            0.5,
            unit="share of places alike",
        )
    said = f"the order of {len(first)} rows against {' and '.join(orders)}: {worst[2]} is {worst[1]:.2f} of its limit"
    if worst[1] <= 1:
        return passed(said, worst[1], 1.0, unit="of the limit")
    return failed(
        f"{said} (against {worst[0]})",
        worst[1],
        1.0,
        unit="of the limit",
        bugs=["poor-permutation"],
        component="sampler (permutation)",
        advice="shuffle all rows, not a buffer of them, with a true permutation (a shuffled list, a Feistel network)",
    )


def _pattern(places: np.ndarray) -> dict[str, float]:
    """Three measures of order in places [n], each as a multiple of its limit."""
    n = len(places)
    ranks = places.argsort(kind="stable").argsort(kind="stable").astype(float)
    rho = float(np.corrcoef(ranks, np.arange(n))[0, 1])
    steps = np.diff(ranks)
    # For a true shuffle |step| has mean (n + 1) / 3 and a standard deviation of about n / sqrt(18).
    near = abs(np.abs(steps).mean() - (n + 1) / 3) / (n / math.sqrt(18) / math.sqrt(n - 1))
    common = int(np.unique(steps % n, return_counts=True)[1].max())
    limit = next(k for k in range(2, 200) if n / math.factorial(k) < 1e-7)
    return {
        "rank correlation": abs(rho) * math.sqrt(n - 1) / CORRELATION,
        "nearness of neighbours": near / LOCALITY,
        "the commonest step": common / limit,
    }


def _with_order(order: Callable[[Any, int, int, int], list[int]]) -> Subject:
    return specimens.subject(pipeline=type("Ordered", (specimens.Pipeline,), {"order": order}))


@epoch_order.plant("shuffle-same-every-epoch", component="sampler")
def _() -> Subject:
    return _with_order(lambda self, count, epoch, seed: specimens.Pipeline.order(self, count, 0, seed))


@epoch_order.plant("shuffle-same-every-epoch", component="sampler", what="no shuffle at all")
def _() -> Subject:
    return _with_order(lambda self, count, epoch, seed: list(range(count)))


@epoch_order.plant("data-seed-ignored", component="sampler")
def _() -> Subject:
    return _with_order(lambda self, count, epoch, seed: specimens.Pipeline.order(self, count, epoch, 42))


@epoch_order.plant("data-seed-ignored", component="global", what="the order comes from the global generator")
def _() -> Subject:
    return _with_order(lambda self, count, epoch, seed: torch.randperm(count).tolist())


@epoch_order.plant("rng-stolen-by-lib", component="random", what="random.seed in the data set")
def _() -> Subject:
    class Reseeds(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            random.seed(0)
            return super().rows(split)

    return specimens.subject(pipeline=Reseeds)


@epoch_order.plant(
    "rng-stolen-by-lib", component="torch", what="torch.manual_seed(seed + epoch) for a permutation"
)
def _() -> Subject:
    def order(self: Any, count: int, epoch: int, seed: int) -> list[int]:
        torch.manual_seed(1000 * seed + epoch)
        return torch.randperm(count).tolist()

    return _with_order(order)


@epoch_order.plant("poor-permutation", component="permutation", what="i -> (a i + c) mod n")
def _() -> Subject:
    def order(self: Any, count: int, epoch: int, seed: int) -> list[int]:
        offset = random.Random(f"{seed}/{epoch}").randrange(count)
        return [(i * 3 + offset) % count for i in range(count)] if count % 3 else list(range(count))

    return _with_order(order)


@epoch_order.plant("poor-permutation", component="permutation", what="a buffer of 16 rows, shuffled")
def _() -> Subject:
    def order(self: Any, count: int, epoch: int, seed: int) -> list[int]:
        draw, buffer, out = random.Random(f"{seed}/{epoch}"), [], []
        for i in range(count):
            buffer.append(i)
            if len(buffer) == 16:
                out.append(buffer.pop(draw.randrange(16)))
        draw.shuffle(buffer)
        return out + buffer

    return _with_order(order)


@epoch_order.healthy("a loader that draws its seeds from the global generator, as torch's does")
def _() -> Subject:
    class Draws(specimens.Pipeline):
        def batches(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Rows]:
            torch.empty((), dtype=torch.int64).random_()
            return super().batches(epoch, seed, rank, world)

    return specimens.subject(pipeline=Draws)
