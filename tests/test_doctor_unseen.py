"""Bugs by another hand: the doctor against `tests/unseen`, whose author had read none of the checks.

What was found before any check was changed (2026-11-22): 20 of 24. Added afterwards, in a general form:

- `branch-input-detached`: `slope` (autograd against differences);
- `same-dropout-in-step`: `dropout_masks` (results on the same tokens within a step and over two);
- `stale-prefill`: `follows_weights` (everything is asked again after a change of the weights);
- `rank-in-seed`: `rank_shares` existed; a tail that is dropped excused rows that were given twice, and does no more.

From now on this is a regression test like any other: it says nothing of bugs that nobody has written yet.

The plain set-up itself has two defects, and keeps them: its clipping lets a NaN through to every weight (`nonfinite`),
and its top-k keeps all tokens of a tie (`sampling`). They are found in every variant and are not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the folder is a package of its own
from unseen.adapter import handed
from unseen.bugs import BUGS
from unseen.healthy import HEALTHY

from minilm.doctor.core import Finding, checks, run_checks
from minilm.doctor.report import Examination
from minilm.doctor.roots import FOLLOWS

OF_THE_PLAIN_SET_UP = {"nonfinite", "sampling"}
SLOW = {"entropy_floor", "overfit", "random_floor"}  # they train; every bug here is found without them
FOUND_BY = {  # of the checks that find it, the one that is run here
    "stride-plus-one": "epoch_ledger",
    "split-two-orders": "held_out",
    "seed-times-epoch": "epoch_order",
    "rank-in-seed": "rank_shares",
    "counted-by-input": "loss_identity",
    "capped-token-loss": "logged_loss",
    "tokens-of-first-micro": "golden_step",
    "same-dropout-in-step": "dropout_masks",
    "clip-always-rescales": "clipping",
    "step-counted-per-tensor": "optimizer_math",
    "lr-first-group-only": "schedule",
    "schedule-restarts": "schedule",
    "resume-forgets-epoch": "resumed_order",
    "moments-saved-in-half": "resume",
    "mask-corner": "causality",
    "document-mask-late": "packing",
    "restart-once": "packing",
    "cache-counts-calls": "cache_parity",
    "branch-input-detached": "slope",
    "tie-by-data": "optimizer_covers",
    "continuation-skips-first": "continuation",
    "temperature-no-op": "sampling",
    "stale-prefill": "follows_weights",
    "average-aliases-model": "average",
}


VARIANTS = {None: None} | {v.id: v for v in [*BUGS, *HEALTHY]}


def findings(name: str | None, *only: str) -> list[Finding]:
    chosen = [c for c in checks() if c.name in only or (not only and c.name not in SLOW)]
    assert chosen
    return list(run_checks(handed(VARIANTS[name]).subject(), chosen))


def failed(found: Sequence[Finding]) -> set[str]:
    return {f.check for f in found if f.status == "FAIL"}


def test_the_plain_set_up_has_two_known_defects_and_no_other() -> None:
    found = findings(None)
    assert failed(found) == OF_THE_PLAIN_SET_UP
    assert sum(f.status == "PASS" for f in found) >= 70


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.id)
def test_a_bug_by_another_hand_is_found(bug: Any) -> None:
    (found,) = findings(bug.id, FOUND_BY[bug.id])
    assert found.status == "FAIL"
    if found.check == "sampling":  # which fails without the bug as well
        assert found.bugs[0] == "temp-zero"
    else:
        assert found.check not in OF_THE_PLAIN_SET_UP


@pytest.mark.parametrize("variant", HEALTHY, ids=lambda v: v.id)
def test_an_unusual_variant_that_is_right_is_not_accused(variant: Any) -> None:
    assert failed(findings(variant.id)) <= OF_THE_PLAIN_SET_UP


def test_of_many_failures_the_root_is_read_first() -> None:
    names = "loss_identity", "causality", "nonfinite", "cache_parity", "greedy", "continuation"
    examination = Examination(
        "a mask that is cut at the wrong corner", "full", findings("mask-corner", *names)
    )
    order = [f.check for f in examination.failures]
    assert order[0] == "causality"
    assert order.index("nonfinite") < min(order.index(name) for name in ("greedy", "continuation"))
    roots = {f.check: examination.roots(f) for f in examination.failures}
    assert roots["causality"] == roots["nonfinite"] == []
    assert roots["greedy"] == ["causality", "cache_parity"]
    entry = next(f for f in examination.as_dict()["findings"] if f["check"] == "loss_identity")
    assert entry["may_follow_from"] == ["causality"]


def test_roots_and_what_follows_from_them_are_checks() -> None:
    known = {c.name for c in checks()}
    assert set(FOLLOWS) <= known
    assert {name for names in FOLLOWS.values() for name in names} <= known


def test_a_denominator_of_the_first_micro_batch_is_named_as_such() -> None:
    (found,) = findings("tokens-of-first-micro", "golden_step")
    assert found.bugs[0] == "mean-of-means-accum"
    assert "first micro-batch" in found.message
