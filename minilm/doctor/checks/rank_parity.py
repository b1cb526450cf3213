"""Several ranks are one trainer: they begin alike, step alike, and their gradient is that of the whole batch.

Why: each rank's loss looks healthy when the ranks do not exchange gradients at all, when the last micro-batch is not
exchanged, when each divides by its own number of tokens, or clips by its own norm. The models drift apart, or a rank
with few tokens counts as much as one with many.

How: two ranks, eight rows of 2 to 24 tokens, the short ones on one rank, in two micro-batches. On each rank the
gradient is read at the optimizer and taken apart into the shares of all eight rows, whose gradients are computed in
plain torch: each must have a share of 1. The weights must be the same bits on all ranks before the first step and
after each. Then the same with 5 and 3 rows, and with a limit on the norm of a twentieth of it.

Cannot see: sharded optimizers whose gradients the module does not hold (then only weights are compared).

Sources: K10 of the catalogue; transformers issue 34373; nanochat commit 061f83c; llm.c commit d05e848; BLOOM and
DeepSpeed issue 1801; TrainCheck (OSDI 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from minilm.doctor import specimens
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import no_randomness, num_targets
from minilm.doctor.specimens import broken_ranks
from minilm.doctor.stepping import (
    NO_LIMIT,
    dot,
    fingerprint,
    mixture,
    norm,
    reference_gradients,
    refuse_further_terms,
    shares,
    uneven_rows,
    watched_step,
    weights_of,
)
from minilm.doctor.subject import Rows, Subject

WORLD = 2
LIMIT = 0.01  # of a share; float32 has 1e-5


def steps_on_rank(
    training: Callable[..., Any],
    rank: int,
    world: int,
    rows: Rows,
    owned: Sequence[Sequence[int]],
    limit: float,
    steps: int,
) -> dict[str, Any]:
    """Some steps on one rank; `owned` says which of the rows each rank has. Numbers only, to be sent back."""
    setup = training(clip_norm=limit, seed=0, num_steps=4)
    total = num_targets(rows)
    mine = rows.take(list(owned[rank]))
    found: dict[str, Any] = {"weights": [fingerprint(*weights_of(setup.module).values())], "rates": []}
    found |= {"shares": [], "rest": [], "norm": [], "whole": [], "turned": [], "logged_norm": []}
    with no_randomness(setup.module):
        for _ in range(steps):
            parts = [mixture([1 / total], [part]) for part in reference_gradients(setup, rows)]
            seen = watched_step(setup, mine.split(math.ceil(len(mine) / 2)), weights=False)
            found["weights"].append(fingerprint(*weights_of(setup.module).values()))
            used = seen.updates[-1].gradients if seen.updates else {}
            if used:
                weights, rest = shares(used, parts)
                whole = mixture([1.0] * len(parts), parts)
                found["shares"].append(weights)
                found["rest"].append(rest)
                found["norm"].append(norm(used))
                found["whole"].append(norm(whole))
                found["turned"].append(1 - dot(used, whole) / (norm(used) * norm(whole)))
                found["logged_norm"].append(seen.logged.get("gradient_norm"))
    return found


class Steps:
    """`steps_on_rank` with its arguments, as plain numbers that can be sent to another process."""

    def __init__(self, rows: Rows, owned: Sequence[Sequence[int]], limit: float, steps: int = 1) -> None:
        self.rows = rows.tokens.tolist(), rows.segments.tolist(), rows.learn.tolist()
        self.owned, self.limit, self.steps = owned, limit, steps

    def __call__(self, training: Callable[..., Any], rank: int, world: int) -> dict[str, Any]:
        rows = Rows(*map(torch.tensor, self.rows))
        return steps_on_rank(training, rank, world, rows, self.owned, self.limit, self.steps)


@check(group="distributed", needs=("ranks", "training", "vocab_size"), cost="4 steps on each of 2 ranks")
def rank_parity(subject: Subject) -> Finding:
    """Weights of all ranks, and what each row of the batch contributes to the gradient of each."""
    assert subject.ranks is not None
    rows = uneven_rows(subject)
    refuse_further_terms(subject, rows)
    owned = [[0, 1, 2, 3], [4, 5, 6, 7]]
    found = subject.ranks(Steps(rows, owned, NO_LIMIT, steps=2), WORLD)
    if (
        wrong := _begin(found)
        or _rows(found, owned)
        or _apart(found, bugs=["no-grad-sync", "tp-replicated-diverge"])
    ):
        return wrong
    uneven = [[0, 4, 2, 3, 5], [1, 6, 7]]
    if wrong := _rows(subject.ranks(Steps(rows, uneven, NO_LIMIT), WORLD), uneven):
        return wrong
    whole = found[0]["whole"][0] if found[0]["whole"] else 1.0
    limit = whole / 20
    clipped = subject.ranks(Steps(rows, owned, limit), WORLD)
    if wrong := _clipping(clipped, limit):
        return wrong
    error = max((abs(s - 1) for one in found for step in one["shares"] for s in step), default=0.0)
    text = f"each of {len(rows)} rows has its share in the gradient of both ranks, whose weights stay the same bits"
    if not found[0]["shares"]:
        text = "the weights of both ranks stay the same bits (their gradients cannot be seen)"
    return passed(text, error, LIMIT, unit="of a share")


def _begin(found: Sequence[Mapping[str, Any]]) -> Finding | None:
    if len({one["weights"][0] for one in found}) == 1:
        return None
    return failed(
        "the ranks begin with different weights",
        1.0,
        0.0,
        unit="of the weights",
        bugs=["unsynced-init"],
        component="ranks: initial weights",
        advice="draw them from one seed, or broadcast those of rank 0",
    )


def _apart(found: Sequence[Mapping[str, Any]], bugs: list[str]) -> Finding | None:
    for step in range(1, len(found[0]["weights"])):
        if len({one["weights"][step] for one in found}) > 1:
            return failed(
                f"after step {step} the ranks differ in weights",
                float(step),
                0.0,
                unit="steps",
                bugs=bugs,
                component="ranks: weights after the update",
                advice="every rank must make the same update of the same gradient",
            )
    return None


def _rows(found: Sequence[Mapping[str, Any]], owned: Sequence[Sequence[int]]) -> Finding | None:
    """The share of each row in the gradient of each rank; 1 everywhere is right."""
    for rank, one in enumerate(found):
        for step, (weights, rest) in enumerate(zip(one["shares"], one["rest"], strict=True), 1):
            error = max(max(abs(w - 1) for w in weights), rest)
            if not error <= LIMIT:
                bugs, component, why, advice = _diagnosis(rank, weights, rest, owned)
                return failed(
                    f"on rank {rank}, step {step}: {why}",
                    error,
                    LIMIT,
                    unit="of a share",
                    bugs=bugs,
                    component=component,
                    advice=advice,
                )
    return None


def _diagnosis(
    rank: int, weights: Sequence[float], rest: float, owned: Sequence[Sequence[int]]
) -> tuple[list[str], str, str, str]:
    """(bugs, component, what it is, advice)."""
    if rest > LIMIT:
        return (
            ["zero1-last-micro-leak", "no-grad-sync"],
            "ranks: exchange of gradients",
            f"{rest:.2g} of the gradient comes from no row",
            "clear and exchange gradients once a step",
        )
    own, foreign = owned[rank], [row for other, rows in enumerate(owned) if other != rank for row in rows]
    shown = (
        f"its rows weigh {_list(weights, own)}, those of the other {_list(weights, foreign)}, instead of 1"
    )
    lost = [row for row in foreign if abs(weights[row]) < LIMIT]
    if len(lost) == len(foreign):
        return (
            ["no-grad-sync"],
            "ranks: exchange of gradients",
            f"{shown}: nothing of the other rank arrives",
            "call the wrapped module, or reduce the gradients before the update",
        )
    if lost:
        return (
            ["no-sync-last", "zero1-last-micro-leak"],
            "ranks: exchange of gradients",
            f"{shown}: a part of the other rank's micro-batches does not arrive",
            "exchange after (not before) the last micro-batch",
        )
    per_rank = [[weights[row] for row in rows] for rows in owned]
    level = all(max(part) - min(part) < LIMIT * max(map(abs, part)) for part in per_rank)
    if level and math.isclose(per_rank[0][0], per_rank[1][0], rel_tol=LIMIT):
        return (
            ["ddp-mean-of-rank-means", "dp-loss-over-ngpu"],
            "ranks: scale of the gradient",
            f"{shown}: it is {weights[0]:.4g} times the right one on {len(owned)} ranks",
            "divide by the targets of all ranks, once",
        )
    if level:
        return (
            ["ddp-mean-of-rank-means"],
            "ranks: weights of the ranks",
            f"{shown}: each rank contributes its own mean",
            "divide by the number of targets of all ranks",
        )
    twice = [row for row, w in enumerate(weights) if w > 1.5 and abs(w - round(w)) < LIMIT]
    if twice and all(abs(w - 1) < LIMIT for row, w in enumerate(weights) if row not in twice):
        return (
            ["uneven-ranks", "rank-shards-duplicated"],
            "ranks: rows that fill up a rank",
            f"{shown}: row {twice[0]} counts {weights[twice[0]]:.0f} times",
            "give filled-up rows a weight of 0",
        )
    return (
        ["ddp-mean-of-rank-means", "mean-of-means-accum", "uneven-ranks"],
        "ranks: weights of rows",
        shown,
        "give every target of the global batch the same weight",
    )


def _list(weights: Sequence[float], rows: Sequence[int]) -> str:
    return ", ".join(f"{weights[row]:.3g}" for row in rows)


def _clipping(found: Sequence[Mapping[str, Any]], limit: float) -> Finding | None:
    """With a limit far below the norm."""
    norms = [one["norm"][0] for one in found if one["norm"]]
    turned = max((one["turned"][0] for one in found if one["turned"]), default=0.0)
    shown = ", ".join(f"{value / limit:.4g}" for value in norms)
    text = f"with clipping the gradients of the ranks have {shown} times the limit, 1 - cos {turned:.1e}"
    advice = "clip on every rank by the norm of the whole, exchanged gradient"
    more = {"unit": "of the limit", "component": "ranks: clipping", "advice": advice}
    error = max((abs(value / limit - 1) for value in norms), default=0.0)
    if len(norms) > 1 and max(norms) > 1.01 * min(norms):
        bugs = ["tp-replicated-diverge", "zero-clip-local"]
        return failed(f"{text}: the ranks clip differently", error, LIMIT, bugs=bugs, **more)
    if error > LIMIT or turned > 1e-3:
        bugs = ["clip-before-sync", "zero-clip-local"]
        return failed(
            f"{text}: it was clipped before the exchange", max(error, turned), LIMIT, bugs=bugs, **more
        )
    if apart := _apart(found, bugs=["zero-clip-local", "tp-replicated-diverge"]):
        return apart
    logged = [n for one in found for n in one["logged_norm"][:1] if n is not None]
    whole = found[0]["whole"][0] if found[0]["whole"] else None
    if whole and any(min(abs(n / whole - 1), abs(n / limit - 1)) > LIMIT for n in logged):
        values = ", ".join(f"{n:.4g}" for n in logged)
        return failed(
            f"the ranks log gradient norms of {values}, the whole gradient has {whole:.4g}",
            1.0,
            LIMIT,
            bugs=["zero-clip-local", "clip-before-sync"],
            **more,
        )
    return None


@rank_parity.plant("no-grad-sync", component="exchange of gradients")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.OwnWay)


@rank_parity.plant("ddp-mean-of-rank-means", component="ranks")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.OwnMean)


@rank_parity.plant("no-sync-last", component="exchange of gradients")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.OneEach)


@rank_parity.plant("unsynced-init", component="initial weights")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.Apart, rank_seeds=True)


@rank_parity.plant("clip-before-sync", component="clipping")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.ClipsFirst)


@rank_parity.plant("tp-replicated-diverge", component="clipping")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.ClipsOnOne)


@rank_parity.plant("zero-clip-local", component="clipping")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.ClipsShard)


@rank_parity.plant("uneven-ranks", component="rows that fill up")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.FillsUp)


@rank_parity.healthy("every rank draws other weights and is then given those of rank 0; tied, dropout")
def _() -> Subject:
    return specimens.subject(rank_seeds=True, size={"tied": True, "dropout": 0.2})
