"""The learning rate in the optimizer at each step is the one that was planned.

Why: schedules are stepped per micro-batch, or once per process, or begin one step late; a final rate is never reached,
a peak is overshot. The logged rate often comes from the same wrong object, so the curve looks as planned.

How: a whole short schedule, three micro-batches a step. The rates are read out of the parameter groups when the
optimizer is called. One group must follow the plan to 1e-6, every other one a constant multiple of it.

Cannot see: a plan that is itself not what was wanted, and groups whose rates are meant to move against each other.

Sources: the ledger of learning rates of the catalogue; accelerate issues 1096, 1382 and 2926; pytorch issues 72874,
162359 and 196243; TinyLlama issue 27.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.stepping import even_rows, inner_optimizer, start, watched_step
from minilm.doctor.subject import Rows, Subject

STEPS, MICRO_BATCHES = 14, 3  # three: told apart from 2, 4 or 8 processes
LIMIT = 1e-6  # of the highest planned rate


@check(group="training", needs=("training", "vocab_size"), cost="14 steps")
def schedule(subject: Subject) -> Finding:
    """Rates at the optimizer against the plan, step by step."""
    training = start(subject, num_steps=STEPS, seed=0)
    optimizer = inner_optimizer(training)
    if optimizer is None or training.planned_rate is None:
        raise NotApplicable(
            "needs the torch optimizer and the planned rate of each step (Training.planned_rate)"
        )
    steps = min(training.num_steps or STEPS, 4 * STEPS)
    rows = even_rows(subject, rows=MICRO_BATCHES, length=4)
    seen: list[list[float]] = []
    for _ in range(steps):
        updates = watched_step(training, rows.split(1), weights=False).updates
        if not updates:
            raise NotApplicable("a step does not call the optimizer (see golden_step)")
        seen.append(updates[-1].rates)
    plan = [training.planned_rate(step) for step in range(steps)]
    # A plan may go on beyond the run, for whoever runs ahead of it.
    ahead = [training.planned_rate(step) for step in range(steps * 8)]
    peak = max(map(abs, plan)) or 1.0
    groups = [list(column) for column in zip(*seen, strict=True)]
    errors = [max(abs(r - p) for r, p in zip(group, plan, strict=True)) / peak for group in groups]
    main = min(range(len(groups)), key=lambda g: errors[g])
    crooked = [_bend(group, plan, peak) for group in groups]
    worst = max(range(len(groups)), key=lambda g: crooked[g])
    complete = training.num_steps is not None and steps == training.num_steps
    if errors[main] > LIMIT:
        return _wrong(groups[main], plan, ahead, errors[main], _aliased(optimizer), complete)
    if crooked[worst] > LIMIT:
        return failed(
            f"group {worst} leaves the plan by {crooked[worst]:.2g} of its peak while group {main} follows it",
            crooked[worst], LIMIT, unit="of the peak", bugs=["lr-tensor-alias", "seq-lr-init"],
            component=f"learning rate of parameter group {worst}", advice="set the rate of every group at every step",
        )  # fmt: skip
    zero = " (the first step has a rate of 0, as planned)" if plan[0] == 0 else ""
    return passed(f"{steps} steps follow the plan within {errors[main]:.1e} of its peak{zero}", errors[main], LIMIT,
                  unit="of the peak")  # fmt: skip


def _bend(rates: Sequence[float], plan: Sequence[float], peak: float) -> float:
    """How far from a constant multiple of the plan, relative."""
    scale = sum(r * p for r, p in zip(rates, plan, strict=True)) / (sum(p * p for p in plan) or 1.0)
    top = max(map(abs, rates)) or 1.0
    return max(abs(r - scale * p) for r, p in zip(rates, plan, strict=True)) / max(top, abs(scale) * peak)


def _aliased(optimizer: torch.optim.Optimizer) -> bool:
    rates = [value for g in optimizer.param_groups for key, value in g.items() if key in ("lr", "initial_lr")]
    tensors = [id(rate) for rate in rates if isinstance(rate, torch.Tensor)]
    return len(set(tensors)) < len(tensors)


def _wrong(
    rates: Sequence[float],
    plan: Sequence[float],
    ahead: Sequence[float],
    error: float,
    aliased: bool,
    complete: bool,
) -> Finding:
    off = next(i for i in range(len(plan)) if abs(rates[i] - plan[i]) > LIMIT * max(plan))
    bugs, why = _diagnosis(rates, plan, ahead, off, complete)
    if aliased:
        bugs, why = (
            ["lr-tensor-alias"],
            "its tensor is shared with another group or with its own initial value",
        )
    return failed(
        f"step {off} has a learning rate of {rates[off]:.5g} instead of {plan[off]:.5g}: {why}",
        error, LIMIT, unit="of the peak", bugs=bugs, component=f"learning rate schedule: {why}",
        advice="advance the schedule once per update, and write its value into every group before the update",
    )  # fmt: skip


def _diagnosis(
    rates: Sequence[float], plan: Sequence[float], ahead: Sequence[float], off: int, complete: bool
) -> tuple[list[str], str]:
    """(bugs, what it is); `off` is the first step that is wrong."""
    count, peak = len(plan), max(plan)

    def close(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6 * peak)

    def follows(expected: Sequence[float]) -> bool:
        return all(close(a, b) for a, b in zip(rates, expected, strict=True))

    for k in range(2, 9):
        if any(follows([ahead[s * k + first] for s in range(count)]) for first in (0, k - 1)):
            if k == MICRO_BATCHES:
                return [
                    "sched-per-micro",
                    "sched-x-nproc",
                ], f"it is advanced {k} times a step: once per micro-batch"
            return ["sched-x-nproc", "sched-per-micro"], f"it is advanced {k} times a step: once per process"
    if off == 0 and rates[0] == 0 and plan[0] > 0:
        return ["lr-zero-first-step", "seq-lr-init"], "the first step has a rate of 0 and moves nothing"
    if follows([plan[min(s + 1, count - 1)] for s in range(count)]) or follows([*plan[:1], *plan[:-1]]):
        return ["seq-lr-init", "lr-zero-first-step"], "it is one step off the plan"
    if max(rates) > peak * (1 + 1e-4):
        return [
            "lr-peak-overshoot",
            "lr-tensor-alias",
        ], f"its peak is {max(rates) / peak:.4g} x the planned one"
    if off < 3 and rates[off] < plan[off] and close(rates[-1], plan[-1]):
        return ["seq-lr-init", "lr-zero-first-step"], "it begins with the rate of another step"
    if complete and not close(rates[-1], plan[-1]):
        return [
            "lr-final-not-reached",
            "seq-lr-init",
        ], f"it ends at {rates[-1]:.4g} instead of {plan[-1]:.4g}"
    return ["seq-lr-init", "lr-peak-overshoot", "lr-final-not-reached"], "it leaves the plan in between"


def _with_rate(rate) -> Subject:  # type: ignore[no-untyped-def]
    """A trainer that does rate(self, step)."""
    return specimens.subject(trainer=type("Broken", (specimens.Trainer,), {"rate": rate}))


@schedule.plant("sched-per-micro", component="once per micro-batch")
def _() -> Subject:
    class Broken(specimens.Trainer):
        advanced = 0

        def nats(self, rows: Rows):  # type: ignore[no-untyped-def]
            self.advanced += 1
            return super().nats(rows)

        def rate(self, step: int) -> float:
            return self.planned_rate(self.advanced)

    return specimens.subject(trainer=Broken)


@schedule.plant("sched-x-nproc", component="once per process")
def _() -> Subject:
    return _with_rate(lambda self, step: self.planned_rate(4 * step))


@schedule.plant(
    "lr-final-not-reached", component="schedule", what="the decay is planned for twice as many steps"
)
def _() -> Subject:
    def rate(self: specimens.Trainer, step: int) -> float:
        share = max(0, step - self.warmup_steps) / (2 * self.num_steps)
        high = self.learning_rate
        return min(self.planned_rate(step), high) if step < 3 else high * (1 - share)

    return _with_rate(rate)


@schedule.plant("lr-peak-overshoot", component="peak")
def _() -> Subject:
    return _with_rate(lambda self, step: self.planned_rate(step) + 0.1 * self.learning_rate)


@schedule.plant("lr-zero-first-step", component="first step")
def _() -> Subject:
    return _with_rate(
        lambda self, step: self.planned_rate(step) if step >= 3 else self.learning_rate * step / 3
    )


@schedule.plant("seq-lr-init", component="schedule", what="the first step has the rate of the last phase")
def _() -> Subject:
    return _with_rate(lambda self, step: self.planned_rate(step or self.num_steps - 1))


@schedule.plant("lr-tensor-alias", component="schedule")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            made = super().make_optimizer()
            for group in made.param_groups:
                group["lr"] = group["initial_lr"] = torch.tensor(self.learning_rate)
            return made

        def set_rate(self) -> float:
            for group in self.optimizer.param_groups:
                share = self.planned_rate(self.step_number) / self.learning_rate
                group["lr"].copy_(group["initial_lr"] * share)
            return float(group["lr"])

    return specimens.subject(trainer=Broken)


@schedule.healthy("a plan that begins with 0, and a group of twice the rate")
def _() -> Subject:
    class Doubled(specimens.Trainer):
        def planned_rate(self, step: int) -> float:
            return self.learning_rate * min(step, 5) / 5

        def set_rate(self) -> float:
            rate = super().set_rate()
            self.optimizer.param_groups[1]["lr"] = 2 * rate
            return rate

    return specimens.subject(trainer=Doubled)


@schedule.healthy("rates in tensors of their own")
def _() -> Subject:
    class Tensors(specimens.Trainer):
        def set_rate(self) -> float:
            rate = self.planned_rate(self.step_number)
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(rate)
            return rate

    return specimens.subject(trainer=Tensors)
