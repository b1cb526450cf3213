"""The gradient is clipped once, as a whole, to the configured norm.

Why: clipping in the wrong place or of the wrong thing is invisible until the first large gradient, which then goes
through. Clipping each micro-batch changes the direction of the gradient in every step.

How: steps without a limit, then with limits of a half and of a twentieth of the gradient's norm, and with one of ten
times it, in one and in four micro-batches. At the optimizer the gradient must have the direction that it has without a
limit (within 0.02), and the smaller of the two norms. The norm that is logged must be the one before clipping or the
one after it. Whether the gradient is right to begin with is the check `golden_step`.

Cannot see: clipping by each rank on its own (the check `rank_clipping`), and limits that the owner cannot set.

Sources: K4 of the catalogue; accelerate issue 641; lingua commit 5455bbc; pytorch issue 148259; DeepSpeed pull requests
3166 and 3790.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import no_randomness
from minilm.doctor.stepping import (
    NO_LIMIT,
    Vector,
    dot,
    inner_optimizer,
    norm,
    reference_gradient,
    start,
    takes,
    uneven_rows,
    watched_step,
)
from minilm.doctor.subject import Rows, Subject

LIMIT = 0.02  # bfloat16 autocast moves norm and direction by 4e-3
CUTS = (1, 4)  # micro-batches per step
SHARES = (0.5, 0.05, 10.0)  # limits, of the gradient's norm


@dataclass(frozen=True)
class Clipped:
    """One step: what was asked and what came."""

    limit: float
    cut: int
    norm_before: float  # without a limit
    norm_after: float  # at the optimizer
    turned: float  # 1 - cosine to the gradient without a limit
    logged: float | None

    @property
    def wanted(self) -> float:
        return min(self.limit, self.norm_before)

    @property
    def error(self) -> float:
        """Of norm and direction, relative."""
        if not math.isfinite(self.norm_after):
            return math.inf
        return max(abs(self.norm_after / self.wanted - 1), math.sqrt(max(0.0, 2 * self.turned)))

    @property
    def misreported(self) -> float:
        if self.logged is None:
            return 0.0
        return min(abs(self.logged / known - 1) for known in (self.norm_before, self.wanted))

    def __str__(self) -> str:
        return f"limit {self.limit:.3g}, {self.cut} micro-batch{'es' * (self.cut > 1)}"


@check(group="training", needs=("training", "vocab_size"), cost="8 steps")
def clipping(subject: Subject) -> Finding:
    """Norm and direction at the optimizer, and the norm that is logged, for three limits."""
    rows = uneven_rows(subject).take([1, 4, 2, 6])
    seen: list[Clipped] = []
    settable = takes(subject, "clip_norm")
    free = {cut: _gradient(subject, rows, NO_LIMIT, cut, watched=settable) for cut in CUTS}
    if settable:
        limits = [norm(free[1][0]) * share for share in SHARES]
    else:
        limit = start(subject).clip_norm
        if limit is None or limit >= norm(free[1][0]):
            raise NotApplicable("no clipping is configured, or its limit cannot be set and is not reached")
        limits = [limit]
    for limit in limits:
        for cut in CUTS:
            used, logged = _gradient(subject, rows, limit, cut)
            expected = free[cut][0]
            size, before = norm(used), norm(expected)
            cosine = dot(used, expected) / max(size * before, 1e-30)
            seen.append(Clipped(limit, cut, before, size, 1 - cosine, logged))
    worst = max(seen, key=lambda c: c.error)
    misreported = max(seen, key=lambda c: c.misreported)
    if worst.error > LIMIT:
        bugs, why, advice = _diagnosis(seen, worst)
        return failed(f"{worst}: {why}", worst.error, LIMIT, unit="of norm and direction", bugs=bugs,
                      component="clipping of the gradient", advice=advice)  # fmt: skip
    if misreported.misreported > LIMIT:
        return failed(
            f"{misreported}: logged a norm of {misreported.logged:.4g}, the gradient has {misreported.norm_before:.4g}",
            misreported.misreported, LIMIT, unit="of the norm", bugs=["clip-exhausted-generator", "zero-clip-local"],
            component="clipping of the gradient: its reported norm", advice="log what clip_grad_norm_ returns",
        )  # fmt: skip
    return passed(f"limits of {len(limits)} sizes are kept within {worst.error:.1e}, and nothing below them is touched",
                  worst.error, LIMIT, unit="of norm and direction")  # fmt: skip


def _gradient(
    subject: Subject, rows: Rows, limit: float, cut: int, *, watched: bool = True
) -> tuple[Vector, float | None]:
    """The gradient of a first step at the optimizer, and the norm that was logged; the reference where not watched."""
    training = start(subject, clip_norm=limit, seed=0)
    if inner_optimizer(training) is None:
        raise NotApplicable("needs the torch optimizer inside, to see the gradient that enters it")
    with no_randomness(training.module):
        if not watched:
            return reference_gradient(training, rows), None
        taken = watched_step(training, rows.split(len(rows) // cut), weights=False)
    if len(taken.updates) != 1 or not taken.updates[0].gradients:
        calls = len(taken.updates)
        raise NotApplicable(
            f"a step calls the optimizer {calls} times, or without gradients (see golden_step)"
        )
    return taken.updates[0].gradients, taken.logged.get("gradient_norm")


def _diagnosis(seen: Sequence[Clipped], worst: Clipped) -> tuple[list[str], str, str]:
    """(bugs, what it is, advice)."""
    straight = all(c.turned < LIMIT for c in seen if c.cut == 1)
    norms = {c.limit: c.norm_after for c in seen if c.cut == 1}
    text = f"the gradient has a norm of {worst.norm_after:.4g} instead of {worst.wanted:.4g}"
    free = [c for c in seen if c.limit < c.norm_before and abs(c.norm_after / c.norm_before - 1) < LIMIT]
    clipped = [c for c in seen if c.limit < c.norm_before]
    if len(free) == len(clipped) or all(c in free for c in clipped if c.cut == 1):
        reported = [c.logged for c in clipped if c.cut == 1]
        if any(value == 0 for value in reported):
            kinds = ["clip-exhausted-generator", "clip-before-backward"]
            if any(c.logged for c in clipped):  # where gradients lay about from before
                kinds.reverse()
            return (kinds, f"{text}, and a norm of 0 is logged: it was clipped while there was no gradient to see",
                    "clip after the last backward, and give it a list of parameters, not a generator")  # fmt: skip
        return (["clip-disabled-bf16", "clip-before-backward", "clip-exhausted-generator"],
                f"{text}: nothing is clipped",
                "apply the configured limit to the gradient between the last backward and the update")  # fmt: skip
    if straight and any(c.turned > LIMIT for c in seen if c.cut > 1):
        return (["clip-per-micro"], f"{text}, turned by 1 - cos = {worst.turned:.2g}, in several micro-batches only",
                "clip once, after the last micro-batch")  # fmt: skip
    if not straight:
        return (["zero-clip-local", "clip-per-micro"], f"{text}, turned by 1 - cos = {worst.turned:.2g}",
                "clip by the norm of the whole gradient, not of its parts or values")  # fmt: skip
    factors = [c.norm_after / c.wanted for c in clipped]
    if max(factors) / min(factors) < 1 + LIMIT:
        return (["clip-scaled-grads"],
                f"{text}, {factors[0]:.4g} times the limit whatever that is: it is clipped while it carries a factor",
                 "take loss scales out before clipping")  # fmt: skip
    if len({f"{value:.3g}" for value in norms.values()}) == 1 and len(norms) > 1:
        return (["clip-disabled-bf16"], f"{text}, the same for every limit: the configured one is not used",
                "hand the configured limit on")  # fmt: skip
    return (
        ["clip-scaled-grads", "clip-before-backward", "clip-per-micro"],
        text,
        "clip once, the whole gradient",
    )


@clipping.plant("clip-per-micro", component="clipping")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def backward(self, nats: Tensor, count: int, *rest: Any) -> None:
            super().backward(nats, count, *rest)
            self.clip()

    return specimens.subject(trainer=Broken)


@clipping.plant("clip-before-backward", component="clipping")
def _() -> Subject:
    class Broken(specimens.Trainer):
        norm = 0.0

        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            if all(p.grad is None for p in self.model.parameters()):
                self.norm = super().clip()
            return super().nats(rows)

        def clip(self) -> float:
            return self.norm

    return specimens.subject(trainer=Broken)


@clipping.plant("clip-scaled-grads", component="clipping")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def backward(self, nats: Tensor, count: int, *rest: Any) -> None:
            super().backward(nats * 1024, count, *rest)

        def clip(self) -> float:
            norm = super().clip()
            for parameter in self.model.parameters():
                parameter.grad /= 1024
            return norm / 1024

    return specimens.subject(trainer=Broken)


@clipping.plant("clip-exhausted-generator", component="clipping")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def clip(self) -> float:
            parameters = (p for p in self.model.parameters() if p.grad is not None)
            self.num_tensors = len(list(parameters))  # for a log line
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer versions of torch say it
                return float(nn.utils.clip_grad_norm_(parameters, self.clip_norm or math.inf))

    return specimens.subject(trainer=Broken)


@clipping.plant("clip-disabled-bf16", component="clipping", what="not done at all, the norm is logged")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def clip(self) -> float:
            return float(
                nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            )

    return specimens.subject(trainer=Broken)


@clipping.plant(
    "clip-disabled-bf16", component="clipping", what="a limit of its own in place of the configured one"
)
def _() -> Subject:
    class Broken(specimens.Trainer):
        def clip(self) -> float:
            return float(nn.utils.clip_grad_norm_(self.model.parameters(), 0.01))

    return specimens.subject(trainer=Broken)


@clipping.plant("zero-clip-local", component="clipping", what="each tensor by its own norm")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def clip(self) -> float:
            return max(
                float(nn.utils.clip_grad_norm_([p], self.clip_norm or math.inf))
                for p in self.model.parameters()
            )

    return specimens.subject(trainer=Broken)


@clipping.healthy("bfloat16 autocast, the norm after clipping is logged")
def _() -> Subject:
    class After(specimens.AutocastTrainer):
        def clip(self) -> float:
            return min(super().clip(), self.clip_norm or math.inf)

    return specimens.subject(trainer=After)


@clipping.healthy("the owner takes no other limit than 0.01")
def _() -> Subject:
    subject = specimens.subject()
    assert subject.training is not None
    whole = subject.training
    return subject.but(training=lambda: whole(clip_norm=torch.tensor(0.01).item()))
