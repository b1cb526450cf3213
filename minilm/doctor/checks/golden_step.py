"""The gradient that enters the optimizer is the gradient of the mean over all targets of the step.

Why: most trainers scale, weight or lose a part of the gradient somewhere between the loss and the optimizer, above all
when a step is cut into micro-batches. Training goes on; adaptive optimizers hide even a constant factor.

How: eight rows of 2 to 24 tokens, given as one, two and eight micro-batches, for two steps each. The gradient is read
where the optimizer is called, and held against one computed row by row in plain torch. It is then taken apart into the
shares of the micro-batches: equal shares are a factor, which is named when it is the number of micro-batches, its
inverse, another denominator or a loss scale; unequal ones are a weighting, a lost or a remembered micro-batch. The
limit is 1e-3, or five times what rounding does to the reference itself (float32: 5e-7).

Without an optimizer to look into, the weights must move alike however the step is cut.

Cannot see: what depends on the number of processes, and what the optimizer does with the gradient.

Sources: K4 of the catalogue; transformers 34191, 37766, 38837, pull request 46204; DeepSpeed pull request 7839.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.gradients import CUTS, Trial, by_movement, diagnosis
from minilm.doctor.probes import no_randomness, num_targets
from minilm.doctor.stepping import (
    NO_LIMIT,
    Vector,
    inner_optimizer,
    mixture,
    norm,
    reference_gradient,
    reference_gradients,
    refuse_further_terms,
    relative_error,
    start,
    uneven_rows,
    watched_step,
)  # fmt: skip
from minilm.doctor.subject import Rows, Subject, Training

LIMIT = 1e-3


@check(group="training", needs=("training", "vocab_size"), cost="6 steps, 104 rows forward and backward")
def golden_step(subject: Subject) -> Finding:
    """Gradients at the optimizer against the token mean, however the step is cut."""
    rows = uneven_rows(subject)
    refuse_further_terms(subject, rows)
    trials: list[Trial] = []
    noise = 0.0
    for cut in CUTS:
        training = start(subject, clip_norm=NO_LIMIT, seed=0)
        if inner_optimizer(training) is None:
            return by_movement(subject, rows)
        if cut == 1:
            noise = _noise(training, rows)
            if noise > 0.02:
                raise NotApplicable(
                    f"its rows influence each other: their gradients do not add up ({noise:.1e})"
                )
        for step in (1, 2):
            with no_randomness(training.module):
                trial = _trial(training, rows, cut, step, trials)
            if isinstance(trial, Finding):
                return trial
            trials.append(trial)
    limit = max(LIMIT, 5 * noise)
    worst = max(trials, key=lambda t: t.error)
    seen = (
        f"the gradient at the optimizer differs from the mean over all targets by {worst.error:.1e} ({worst})"
    )
    if worst.error <= limit:
        return passed(seen, worst.error, limit, unit="of the gradient")
    bugs, component, why, advice = diagnosis(trials, limit)
    return failed(
        f"{seen}: {why}", worst.error, limit, unit="of the gradient", bugs=bugs, component=component, advice=advice
    )  # fmt: skip


def _trial(training: Training, rows: Rows, cut: int, step: int, before: Sequence[Trial]) -> Trial | Finding:
    micro_batches = rows.split(len(rows) // cut)
    total = num_targets(rows)
    by_row = reference_gradients(training, rows)
    size = len(rows) // cut
    parts: list[Vector] = [
        mixture([1 / total] * size, by_row[i : i + size]) for i in range(0, len(rows), size)
    ]
    seen = watched_step(training, micro_batches)
    if len(seen.updates) != 1:
        return _calls(len(seen.updates), cut)
    used = seen.updates[0].gradients
    if not used and any(not torch.equal(seen.before[n], seen.after[n]) for n in seen.before):
        raise NotApplicable(
            "the optimizer works on other tensors than the module's parameters: no gradient to be seen"
        )
    expected = mixture([1.0] * cut, parts)
    limit = training.clip_norm
    if limit is not None and norm(expected) > limit:  # an owner who does not take another limit
        parts = [mixture([limit / norm(expected)], [part]) for part in parts]
        expected = mixture([1.0] * cut, parts)
    former = mixture([1.0] * cut, before[-1].parts) if step == 2 else None
    return Trial(step, micro_batches, parts, used, former, relative_error(used, expected))


def _noise(training: Training, rows: Rows) -> float:
    """What rounding does to the reference: the sum over rows against all rows at once."""
    at_once = reference_gradient(training, rows)
    if norm(at_once) == 0:
        raise NotApplicable("the gradient of its training path is zero")
    return relative_error(
        mixture([1 / num_targets(rows)] * len(rows), reference_gradients(training, rows)), at_once
    )


def _calls(calls: int, cut: int) -> Finding:
    bug = "steps-vs-microsteps" if calls == cut else "accum-phase"
    other = "accum-phase" if bug == "steps-vs-microsteps" else "steps-vs-microsteps"
    return failed(
        f"one step of {cut} micro-batches called the optimizer {calls} times", float(calls), 1.0, unit="calls",
        bugs=[bug, other], component="optimizer calls: when an accumulated step ends",
        advice="update once per step, after its last micro-batch; count steps in updates, not in micro-batches",
    )  # fmt: skip


class _OwnMean(specimens.Trainer):
    """Each micro-batch's mean, divided by their number."""

    def backward(self, nats: Tensor, count: int, *rest: Any) -> None:
        (nats / count / len(rest[-1])).backward()


@golden_step.plant("mean-of-means-accum", component="accumulation")
def _() -> Subject:
    return specimens.subject(trainer=_OwnMean)


@golden_step.plant(
    "mean-of-means-accum", component="denominator", what="all are taken to be as long as the first"
)
def _() -> Subject:
    class Broken(specimens.Trainer):
        def count(self, micro_batches: list[Rows]) -> float:
            return super().count(micro_batches[:1]) * len(micro_batches)

    return specimens.subject(trainer=Broken)


@golden_step.plant("accum-not-divided", component="accumulation", what="sum of the means")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def backward(self, nats: Tensor, count: int, *rest: Any) -> None:
            (nats / count).backward()

    return specimens.subject(trainer=Broken)


@golden_step.plant("accum-not-divided", component="accumulation", what="right weights, times the number")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def count(self, micro_batches: list[Rows]) -> float:
            return super().count(micro_batches) / len(micro_batches)

    return specimens.subject(trainer=Broken)


@golden_step.plant("last-accum-group-underscaled", component="accumulation", what="a fixed divisor of 4")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def backward(self, nats: Tensor, count: int, *rest: Any) -> None:
            (nats / count / 4).backward()

    return specimens.subject(trainer=Broken)


@golden_step.plant(
    "last-accum-group-underscaled", component="accumulation", what="divided once more at the end"
)
def _() -> Subject:
    class Broken(specimens.Trainer):
        def count(self, micro_batches: list[Rows]) -> float:
            return super().count(micro_batches) / len(micro_batches) * 4

    return specimens.subject(trainer=Broken)


@golden_step.plant("denominator-unshifted", component="denominator")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def count(self, micro_batches: list[Rows]) -> float:
            return float(sum(int((rows.segments > 0).sum()) for rows in micro_batches))

    return specimens.subject(trainer=Broken)


@golden_step.plant("zero-grad-missing", component="zero_grad")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def zero_grad(self) -> None:
            pass

    return specimens.subject(trainer=Broken)


@golden_step.plant("zero-grad-each-micro", component="zero_grad")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            self.zero_grad()
            return super().nats(rows)

    return specimens.subject(trainer=Broken)


class _PerMicro(specimens.Trainer):
    """An update after each micro-batch."""

    def backward(self, nats: Tensor, count: int, *rest: Any) -> None:
        super().backward(nats, count, *rest)
        if self.ends(rest[1] + 1, len(rest[-1])):
            self.update()
            self.zero_grad()

    def ends(self, number: int, of: int) -> bool:
        return number < of


@golden_step.plant("steps-vs-microsteps", component="optimizer calls")
def _() -> Subject:
    return specimens.subject(trainer=_PerMicro)


@golden_step.plant(
    "accum-phase", component="optimizer calls", what="one-based count against a zero-based one"
)
def _() -> Subject:
    class Broken(_PerMicro):
        def ends(self, number: int, of: int) -> bool:
            return (number + 1) % of == 0 and of > 2

    return specimens.subject(trainer=Broken)


@golden_step.plant("zero0-bf16-unscaled", component="loss scale")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def clip(self) -> float:
            for parameter in self.model.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad / 65536
            return super().clip()

    return specimens.subject(trainer=Broken)


@golden_step.plant("zero2-ga-worse", component="accumulation")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def backward(self, nats: Tensor, count: int, *rest: Any) -> None:
            super().backward(nats, count, *rest)
            for parameter in self.model.parameters():
                parameter.grad = parameter.grad.bfloat16().float()

    return specimens.subject(trainer=Broken)


@golden_step.plant("last-partial-dropped", component="accumulation")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def backward(self, nats: Tensor, count: int, *rest: Any) -> None:
            if rest[1] == 0 or rest[1] + 1 < len(rest[-1]):
                super().backward(nats, count, *rest)

    return specimens.subject(trainer=Broken)


@golden_step.healthy("gradients cleared before the step instead of after it, tied weights, dropout")
def _() -> Subject:
    class Before(specimens.Trainer):
        def zero_grad(self) -> None:
            pass

        def step(self, micro_batches: list[Rows]) -> dict[str, float]:
            self.optimizer.zero_grad()
            return super().step(micro_batches)

    return specimens.subject(trainer=Before, size={"tied": True, "dropout": 0.2})


@golden_step.healthy("bfloat16 autocast")
def _() -> Subject:
    return specimens.subject(trainer=specimens.AutocastTrainer)


@golden_step.healthy("SGD, a frozen part, and an owner who takes no clip_norm")
def _() -> Subject:
    class Plain(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            self.model.embedding.weight.requires_grad_(False)
            return torch.optim.SGD(
                [p for p in self.model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
            )

    subject = specimens.subject(trainer=Plain)
    assert subject.training is not None
    whole = subject.training
    return subject.but(training=lambda: whole(clip_norm=0.01))


def _blind(subject: Subject) -> Subject:
    """Without its optimizer."""
    whole = subject.training
    assert whole is not None
    return subject.but(training=lambda **more: dataclasses.replace(whole(**more), optimizer=None))


@golden_step.plant("mean-of-means-accum", component="accumulation", what="no optimizer is handed over")
def _() -> Subject:
    return _blind(specimens.subject(trainer=_OwnMean))


@golden_step.healthy("no optimizer is handed over")
def _() -> Subject:
    return _blind(specimens.subject())
