"""What ranks must share, and what they must not: the logged loss and the schedule; dropout and data.

Why: ranks that read the same rows make n copies of one gradient, at n times the price; equal dropout masks do the same
in part. A loss that each rank logs for itself, or a mean that is divided by the ranks once more, is compared with other
runs. A schedule that is advanced by every process ends early.

How: two ranks with rows of very different lengths take steps with a dropout of 0.3. The logged losses must be one
number on all ranks, that of a float64 mean over the rows of both (without dropout); the rates must follow the plan; the
outputs of the same rows in train mode must differ; and the ranks' own data may have no half of its rows in common.

Cannot see: what the ranks' data is beyond four steps (see the data group).

Sources: K10 and K11 of the catalogue; transformers issue 37474; accelerate issue 2926; datasets issue 5360.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from minilm.doctor import specimens
from minilm.doctor.checks.training_modes import with_dropout
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import no_randomness, num_targets, redraw_weights
from minilm.doctor.specimens import broken_ranks
from minilm.doctor.stepping import fingerprint, logits_of, reference_mean, uneven_rows, watched_step
from minilm.doctor.subject import Rows, Subject

WORLD, STEPS = 2, 4
LIMIT = 5e-3  # of the loss
MOST_COMMON = (
    0.5  # of the rows: data has equal rows in it, and may be so small that four steps are two epochs
)


class States:
    """What one rank logs, draws and reads; its rows as plain numbers that can be sent to another process."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows.tokens.tolist(), rows.segments.tolist(), rows.learn.tolist()

    def __call__(self, training: Callable[..., Any], rank: int, world: int) -> dict[str, Any]:
        rows = Rows(*map(torch.tensor, self.rows))
        share = len(rows) // world
        mine = rows.take(slice(rank * share, (rank + 1) * share))
        found: dict[str, Any] = {"rates": [], "plan": [], "dropout": None, "data": []}
        setup = training(clip_norm=1.0, seed=0, num_steps=STEPS)
        if setup.next_rows is not None:
            for _ in range(STEPS):
                given = setup.next_rows()
                tokens = [row for part in given for row in part.tokens]
                segments = [row for part in given for row in part.segments]
                found["data"] += [fingerprint(t[s > 0]) for t, s in zip(tokens, segments, strict=True)]
        if with_dropout(setup.module) and setup.forward is not None:
            setup.module.train()
            with torch.no_grad():
                found["dropout"] = fingerprint(logits_of(setup, rows.take(slice(0, 1))))
        setup = training(clip_norm=1.0, seed=0, num_steps=STEPS)
        redraw_weights(setup.module, 0.3)
        with no_randomness(setup.module):
            found["mean"] = reference_mean(setup, rows)
            found["own"], found["targets"] = reference_mean(setup, mine), num_targets(mine)
            for step in range(STEPS):
                seen = watched_step(setup, mine.split(share // 2), weights=False)
                if step == 0:
                    found["loss"] = seen.logged.get("loss")
                if seen.updates and setup.planned_rate is not None:
                    found["rates"].append(seen.updates[-1].rates[0])
                    found["plan"].append(setup.planned_rate(step))
            found["ahead"] = (
                [setup.planned_rate(s) for s in range(STEPS * world)] if setup.planned_rate else []
            )
        return found


@check(group="distributed", needs=("ranks", "training", "vocab_size"), cost="4 steps on each of 2 ranks")
def rank_state(subject: Subject) -> Finding:
    """Logged losses, rates, dropout and rows of two ranks."""
    assert subject.ranks is not None
    found = subject.ranks(States(uneven_rows(subject)), WORLD)
    wrong = _loss(found) or _rates(found) or _rows(found)
    if wrong:
        return wrong
    masks = [one["dropout"] for one in found if one["dropout"] is not None]
    if len(masks) > 1 and len(set(masks)) == 1:
        return failed(
            "both ranks draw the same dropout",
            1.0,
            0.0,
            unit="of the masks",
            bugs=["dropout-same-on-ranks"],
            component="ranks: random states",
            advice="add the rank to the seed once the weights are drawn",
        )
    seen = ["the logged loss is that of all ranks"] * (found[0]["loss"] is not None)
    seen += ["rates follow the plan"] * bool(found[0]["rates"]) + ["rows are disjoint"] * bool(
        found[0]["data"]
    )
    seen += ["dropout differs"] * bool(masks)
    error = abs((found[0]["loss"] or found[0]["mean"]) / found[0]["mean"] - 1)
    return passed("; ".join(seen), error, LIMIT, unit="of the loss")


def _loss(found: Sequence[Mapping[str, Any]]) -> Finding | None:
    logged = [one["loss"] for one in found if one["loss"] is not None]
    mean = found[0]["mean"]
    error = max((abs(value / mean - 1) for value in logged), default=0.0)
    if error <= LIMIT:
        return None
    own = [one["own"] for one in found]
    values = ", ".join(f"{value:.5g}" for value in logged)
    if all(math.isclose(a, b, rel_tol=LIMIT / 5) for a, b in zip(logged, own, strict=False)):
        bugs, why = ["ddp-mean-of-rank-means", "dp-loss-over-ngpu"], "each logs its own rows"
    elif math.isclose(logged[0], sum(own) / len(own), rel_tol=LIMIT / 5):
        bugs, why = ["ddp-mean-of-rank-means", "dp-loss-over-ngpu"], "it is the mean of the ranks' means"
    else:
        bugs, why = (
            ["dp-loss-over-ngpu", "logged-loss-scaled"],
            f"it is {logged[0] / mean:.4g} times the right one",
        )
    return failed(
        f"the ranks log {values}, the mean is {mean:.5g}: {why}",
        error,
        LIMIT,
        unit="of the loss",
        bugs=bugs,
        component="ranks: logged loss",
        advice="sum nats and targets over the ranks, then divide",
    )


def _rates(found: Sequence[Mapping[str, Any]]) -> Finding | None:
    for rank, one in enumerate(found):
        peak = max(map(abs, one["plan"]), default=0.0) or 1.0
        error = max((abs(a - b) for a, b in zip(one["rates"], one["plan"], strict=True)), default=0.0) / peak
        if error > 1e-6:
            ahead = one["ahead"]
            strides = [[ahead[s * WORLD + first] for s in range(STEPS)] for first in range(WORLD)]
            same = any(
                all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one["rates"], s, strict=True))
                for s in strides
            )
            why = f"it is advanced {WORLD} times a step, once per rank" if same else "it leaves the plan"
            return failed(
                f"learning rates on rank {rank}: {why}",
                error,
                1e-6,
                unit="of the peak",
                bugs=["sched-x-nproc"],
                component="ranks: learning rate schedule",
                advice="advance the schedule once per update, whatever the number of ranks",
            )
    return None


def _rows(found: Sequence[Mapping[str, Any]]) -> Finding | None:
    common = set(found[0]["data"]) & set(found[1]["data"])
    own = [len(set(one["data"])) for one in found]
    share = len(common) / max(1, min(own))
    if share <= MOST_COMMON:
        return None
    return failed(
        f"{len(common)} of {own[0]} rows in {STEPS} steps are on both ranks",
        share,
        MOST_COMMON,
        unit="of the rows",
        bugs=["rank-shards-duplicated"],
        component="ranks: rows of the data",
        advice="give each rank its own part of every global batch",
    )


@rank_state.plant("dropout-same-on-ranks", component="random states")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.SameDropout)


@rank_state.plant("dp-loss-over-ngpu", component="logged loss")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.LossOverRanks)


@rank_state.plant("ddp-mean-of-rank-means", component="logged loss", what="each rank logs its own mean")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.OwnLoss)


@rank_state.plant("rank-shards-duplicated", component="rows of the data")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.SameShard)


@rank_state.plant("sched-x-nproc", component="schedule")
def _() -> Subject:
    return specimens.subject(rank_trainer=broken_ranks.ScheduleOfAll)


@rank_state.healthy("tied, dropout 0.2")
def _() -> Subject:
    return specimens.subject(size={"tied": True, "dropout": 0.2})
