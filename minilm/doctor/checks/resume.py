"""A run that was stopped and continued is the run that was not.

Why: a continued run that lost its optimizer state, restarted its schedule, repeats data or draws other dropout goes on
with a bump that heals, and is another run from then on.

How: twelve steps straight; then three, a save, other random numbers, a new set-up with another seed, a load, and nine
more. Rows of each step, learning rates, weights, optimizer state, random states (all dropouts at 0.3) and the average
must be equal bit for bit (on a CPU; elsewhere within 1e-4). What differs first names the cause: other rows, and by how
many steps they are shifted; other rates, and of which step; else the state after the load.

Cannot see: a new process (what lives in globals survives here), prefetching workers, another number of ranks.

Sources: K9 of the catalogue; nanotron commit 4cc62ae; accelerate issues 1451 and 2823; OLMo-core v2.1.0.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.training_modes import with_dropout
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, random_states_kept
from minilm.doctor.stepping import (
    even_rows,
    fingerprint_of_rows,
    inner_optimizer,
    relative_error,
    start,
    watched_step,
    weights_of,
)
from minilm.doctor.subject import Rows, Subject, Training

TOTAL, STOP = 12, 3


@dataclass
class Walk:
    """Some steps, as they went."""

    rows: list[str] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    average: list[dict[str, Tensor]] = field(default_factory=list)

    def take(self, training: Training, micro_batches: list[Rows]) -> None:
        self.rows.append(fingerprint_of_rows(micro_batches))
        seen = watched_step(training, micro_batches, weights=False)
        self.rates.append(seen.updates[-1].rates if seen.updates else [])
        self.weights.append(weights_of(training.module))
        if training.average is not None:
            self.average.append({n: v.detach().clone() for n, v in training.average().items()})


@check(group="checkpoint", needs=("training", "vocab_size"), cost="24 steps, 1 save, 1 load")
def resume(subject: Subject) -> Finding:
    """Twelve steps straight against three and nine."""
    with random_states_kept(1):
        straight = start(subject, seed=0, num_steps=TOTAL)
        if straight.save is None or straight.load is None:
            raise NotApplicable(
                "needs functions that save and load a training set-up (Training.save, Training.load)"
            )
        dropout = with_dropout(straight.module)
        whole = _walk(subject, straight, 0, TOTAL)
    with random_states_kept(1), tempfile.TemporaryDirectory() as folder:
        stopped = start(subject, seed=0, num_steps=TOTAL)
        with_dropout(stopped.module)
        first = _walk(subject, stopped, 0, STOP)
        assert stopped.save is not None
        stopped.save(Path(folder))
        state, weights = _state(stopped), weights_of(stopped.module)
        torch.manual_seed(12345)
        continued = start(subject, seed=1, num_steps=TOTAL)
        with_dropout(continued.module)
        assert continued.load is not None
        continued.load(Path(folder))
        gaps = {
            "weights": _gap(weights_of(continued.module), weights),
            "optimizer state": _gap(_state(continued), state),
        }
        second = _walk(subject, continued, STOP, TOTAL)
    if first.rows != whole.rows[:STOP] or _gap(first.weights[-1], whole.weights[STOP - 1]) > FLOAT32_NOISE:
        raise NotApplicable(
            "two equal set-ups go different ways, so nothing can be said of a third (see determinism)"
        )
    return _verdict(whole, second, gaps, dropout, straight.module)


def _walk(subject: Subject, training: Training, begin: int, end: int) -> Walk:
    walk = Walk()
    for step in range(begin, end):
        given = (
            training.next_rows() if training.next_rows is not None else even_rows(subject, seed=step).split(2)
        )
        walk.take(training, given)
    return walk


def _state(training: Training) -> dict[str, Tensor]:
    """The optimizer's tensors, by place."""
    optimizer = inner_optimizer(training)
    if optimizer is None:
        return {}
    found: dict[str, Tensor] = {}
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, (Tensor, int, float)):
                found[f"{number}.{key}"] = copy.deepcopy(torch.as_tensor(value).detach().double())
    return found


def _gap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """0 where all bits are equal, inf where names differ."""
    if one.keys() != other.keys():
        return float("inf")
    if all(torch.equal(one[name], other[name]) for name in one):
        return 0.0
    return max(relative_error(one, other), 1e-12)


def _verdict(
    whole: Walk, second: Walk, gaps: Mapping[str, float], dropout: bool, module: torch.nn.Module
) -> Finding:
    limit = 0.0 if next(module.parameters()).device.type == "cpu" else FLOAT32_NOISE
    left = TOTAL - STOP
    shift = _shift(whole.rows, second.rows)
    if shift is not None:
        return shift
    rates = [a != b for a, b in zip(second.rates, whole.rates[STOP:], strict=True)]
    steps = [_gap(a, b) for a, b in zip(second.weights, whole.weights[STOP:], strict=True)]
    kept = f"in the {left} steps after the load"
    if gaps["weights"] > limit:
        return _failed(
            f"the weights are off by {gaps['weights']:.1e} after the load",
            gaps["weights"],
            ["strict-false", "init-overwrites-loaded", "ckpt-dtype-change"],
            "checkpoint: weights",
            "save and load every parameter in its type",
        )
    if any(rates):
        return _rates(whole, second)
    if gaps["optimizer state"] > limit:
        return _failed(
            "the optimizer's state after the load is not the one that was saved",
            gaps["optimizer state"],
            ["opt-state-lost", "ckpt-dtype-change"],
            "checkpoint: optimizer state",
            "save and load the optimizer's state_dict",
        )
    if max(steps) > limit:
        where = next(i for i, gap in enumerate(steps) if gap > limit)
        text = f"rows, rates, weights and optimizer are right, and step {STOP + where} goes {steps[where]:.1e} off"
        bugs = ["rng-lost", "opt-state-lost"] if dropout else ["opt-state-lost", "rng-lost"]
        return _failed(
            text,
            steps[where],
            bugs,
            "checkpoint: random states" if dropout else "checkpoint: other state",
            "save and load the states of the random generators",
        )
    average = [_gap(a, b) for a, b in zip(second.average, whole.average[STOP:], strict=True)]
    if average and max(average) > limit:
        return _failed(
            f"the average of the weights is off by {max(average):.1e}",
            max(average),
            ["opt-state-lost"],
            "checkpoint: average of the weights",
            "save and load the average",
        )
    return passed(
        f"rows, rates, weights, average are the same bits {kept}", max(steps), limit, unit="of the weights"
    )


def _failed(text: str, measured: float, bugs: list[str], component: str, advice: str) -> Finding:
    return failed(
        text, min(measured, 1.0), 0.0, unit="of the state", bugs=bugs, component=component, advice=advice
    )


def _shift(whole: Sequence[str], second: Sequence[str]) -> Finding | None:
    """The rows of the continued run, if they are not those of the straight one."""
    expected = list(whole[STOP:])
    if list(second) == expected:
        return None
    wrong = [i for i, (a, b) in enumerate(zip(second, expected, strict=True)) if a != b]
    text = f"{len(wrong)} of {len(expected)} steps after the load are given other rows, first step {STOP + wrong[0]}"
    component = "checkpoint: position in the data"
    at = whole.index(second[0]) if second[0] in whole else None
    if wrong[0] > 0:
        return _failed(
            f"{text}: the skip is repeated later",
            len(wrong),
            ["skip-forever", "data-pos-lost"],
            component,
            "skip in the first epoch after a load only",
        )
    if at is not None and abs(at - STOP) == 1:
        return _failed(
            f"{text}: it {'leaves out a step' if at > STOP else 'repeats a step'}",
            len(wrong),
            ["skip-off-by-one", "data-pos-lost"],
            component,
            "continue with the step after the last one",
        )
    where = "from the start again" if at == 0 else "elsewhere"
    return _failed(
        f"{text}: it goes on {where}",
        len(wrong),
        ["data-pos-lost", "skip-off-by-one"],
        component,
        "save and load the position, and the state of the shuffle",
    )


def _rates(whole: Walk, second: Walk) -> Finding:
    """Which steps' rates the continued run has."""
    got, plan = [r[:1] for r in second.rates], [r[:1] for r in whole.rates]
    off = next(i for i, (a, b) in enumerate(zip(second.rates, whole.rates[STOP:], strict=True)) if a != b)
    has, should = second.rates[off][0], whole.rates[STOP + off][0]
    text = f"step {STOP + off} has a learning rate of {has:.5g} instead of {should:.5g}"
    component = "checkpoint: schedule"
    if got == plan[: len(got)]:
        return _failed(
            f"{text}: the schedule begins again", 1.0, ["sched-lost"], component, "save and load its step"
        )
    shifted = [s for s in (-2, -1, 1, 2) if got[: len(got) - 2] == plan[STOP + s : STOP + s + len(got) - 2]]
    if shifted:
        return _failed(
            f"{text}: it is {shifted[0]:+d} steps off",
            1.0,
            ["resume-step-offset", "sched-lost"],
            component,
            "continue with the step after the last one",
        )
    if off > 0 or len(set(map(tuple, got))) > 2:
        return _failed(
            f"{text}: it is stretched",
            1.0,
            ["resume-step-offset", "sched-lost"],
            component,
            "count steps from the start of the run, not from the load",
        )
    return _failed(
        f"{text}: it stands still",
        1.0,
        ["sched-lost", "resume-step-offset"],
        component,
        "save and load its step",
    )


def _loading(change: Any) -> Subject:
    """change(self, state) -> the state that is loaded."""

    def set_state(self: specimens.Trainer, state: dict[str, Any]) -> None:
        specimens.Trainer.set_state(self, change(self, state))

    return specimens.subject(trainer=type("Broken", (specimens.Trainer,), {"set_state": set_state}))


@resume.plant("opt-state-lost", component="optimizer state")
def _() -> Subject:
    return _loading(lambda self, state: {**state, "optimizer": self.optimizer.state_dict()})


@resume.plant("sched-lost", component="schedule")
def _() -> Subject:
    return _loading(lambda self, state: {**state, "step": 0})


@resume.plant("rng-lost", component="random states")
def _() -> Subject:
    return _loading(lambda self, state: {**state, "random": torch.get_rng_state()})


@resume.plant("data-pos-lost", component="position in the data")
def _() -> Subject:
    return _loading(lambda self, state: {**state, "data": 0})


@resume.plant("skip-off-by-one", component="position in the data")
def _() -> Subject:
    return _loading(lambda self, state: {**state, "data": state["data"] + 1})


@resume.plant("skip-forever", component="position in the data")
def _() -> Subject:
    class Broken(specimens.Trainer):
        skip, epoch = 0, 5

        def next_rows(self) -> list[Rows]:
            if self.data_position % self.epoch == 0:
                self.data_position += self.skip
            return super().next_rows()

        def set_state(self, state: dict[str, Any]) -> None:
            super().set_state(state)
            self.skip = self.data_position

    return specimens.subject(trainer=Broken)


@resume.plant("resume-step-offset", component="schedule", what="the planned steps are counted from the load")
def _() -> Subject:
    def stretched(self: specimens.Trainer, state: dict[str, Any]) -> dict[str, Any]:
        self.num_steps += state["step"]
        return state

    return _loading(stretched)


@resume.plant("resume-step-offset", component="schedule", what="one step off")
def _() -> Subject:
    return _loading(lambda self, state: {**state, "step": state["step"] + 1})


@resume.plant("ckpt-dtype-change", component="checkpoint")
def _() -> Subject:
    return _loading(lambda self, state: {**state, "model": {n: t.half() for n, t in state["model"].items()}})


@resume.healthy("tied weights, dropout, no data of its own")
def _() -> Subject:
    class Given(specimens.Trainer):
        def handed_over(self) -> Training:
            training = super().handed_over()
            training.next_rows = None
            return training

    return specimens.subject(trainer=Given, size={"tied": True, "dropout": 0.2})
