"""In a real step the weights move by the optimizer's formula, and by nothing else.

Why: an optimizer whose state is cleared at each step, an update that is made twice, weights that are changed behind
the optimizer's back: the gradient is right, the formula is right, and the training is another one.

How: four real steps. From the gradients that enter the optimizer, its rates and settings, the movement of each weight
is computed in float64 (Adam, AdamW, SGD) and held against the movement that took place, less float32 rounding. The
limit is 2 % of the movement.

Cannot see: other optimizers, and those that work on copies of the weights.

Sources: K4 and K13 of the catalogue; Kingma and Ba (2015); Loshchilov and Hutter (2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.optimizer_math import is_adam
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.stepping import even_rows, inner_optimizer, start, trainable, watched_step
from minilm.doctor.subject import Rows, Subject

STEPS = 4
LIMIT = 0.02
ROUNDING = 4 * 2**-24  # of the weights: float32, a few operations


@check(group="training", needs=("training", "vocab_size"), cost="4 steps")
def real_updates(subject: Subject) -> Finding:
    """Movements of the weights against the formula, with kept moments and with forgotten ones."""
    training = start(subject, seed=0)
    optimizer = inner_optimizer(training)
    if optimizer is None or not (is_adam(optimizer) or type(optimizer) is torch.optim.SGD):
        raise NotApplicable("needs an optimizer of the Adam family, or torch.optim.SGD")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    number = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    named = {
        n: p for n, p in trainable(training.module).items() if p.dtype == torch.float32 and id(p) in groups
    }
    named = {n: p for n, p in named.items() if "betas" in groups[id(p)] or "dampening" in groups[id(p)]}
    states: dict[str, dict[str, Any]] = {name: {} for name in named}
    errors: list[dict[str, float]] = []
    forgotten: list[float] = []  # the same for an optimizer that begins anew at each step
    factors: list[float] = []
    decoupled = "adamw" in type(optimizer).__name__.lower()
    for step in range(STEPS):
        seen = watched_step(training, even_rows(subject, seed=step).split(2))
        if len(seen.updates) != 1 or not seen.updates[0].gradients or not named:
            raise NotApplicable(
                "a step does not call the optimizer once, or without gradients (see golden_step)"
            )
        per, fresh, done, meant = {}, 0.0, 0.0, 0.0
        for name, p in named.items():
            before, after = seen.before[name].double(), seen.after[name].double()
            gradient = seen.updates[0].gradients.get(name)
            if gradient is None:
                continue
            # The rate at the time of the update: a schedule may have been advanced since.
            group = {**groups[id(p)], "lr": seen.updates[0].rates[number[id(p)]]}
            expected = _movement(before, gradient.double(), group, states[name], decoupled)
            again = _movement(before, gradient.double(), group, {}, decoupled)
            if not bool(expected.any()):
                continue
            per[name] = _error(after - before, expected, before)
            fresh = max(fresh, _error(after - before, again, before))
            done, meant = (
                done + float(((after - before) * expected).sum()),
                meant + float(expected.square().sum()),
            )
        errors.append(per)
        forgotten.append(fresh)
        factors.append(done / meant if meant else 1.0)
    if not any(errors):
        raise NotApplicable("no weight is meant to move in four steps")
    worst, step, name = max((e, s, n) for s, per in enumerate(errors, 1) for n, e in per.items())
    text = f"in step {step} {name} moves {worst:.1e} off the formula of {type(optimizer).__name__}"
    if worst <= LIMIT:
        return passed(text, worst, LIMIT, unit="of the movement")
    bugs, why = _diagnosis(errors, forgotten, factors)
    return failed(f"{text}: {why}", worst, LIMIT, unit="of the movement", bugs=bugs,
                  component=f"update of {name}: {why}",
                  advice="let the optimizer alone change the weights, once a step, with its state kept")  # fmt: skip


def _error(moved: Tensor, expected: Tensor, weights: Tensor) -> float:
    excess = float((moved - expected).norm()) - ROUNDING * float(weights.norm())
    return max(excess, 0.0) / float(expected.norm())


def _movement(
    p: Tensor, gradient: Tensor, group: Mapping[str, Any], state: dict[str, Any], decoupled: bool
) -> Tensor:
    """What one update adds to the weights; `state` is brought up to date."""
    rate, decay = float(group["lr"]), float(group.get("weight_decay") or 0.0)
    state["step"] = step = state.get("step", 0) + 1
    own = decoupled or bool(group.get("decoupled_weight_decay"))
    if decay and not own:
        gradient = gradient + decay * p
    if "betas" not in group:
        momentum, damping = float(group["momentum"]), float(group["dampening"])
        if momentum:
            former = state.get("momentum")
            state["momentum"] = gradient if former is None else momentum * former + (1 - damping) * gradient
            gradient = gradient + momentum * state["momentum"] if group["nesterov"] else state["momentum"]
        return -rate * gradient
    beta1, beta2 = (float(b) for b in group["betas"])
    state["first"] = beta1 * state.get("first", torch.zeros_like(p)) + (1 - beta1) * gradient
    state["second"] = beta2 * state.get("second", torch.zeros_like(p)) + (1 - beta2) * gradient.square()
    root = (state["second"] / (1 - beta2**step)).sqrt() + float(group["eps"])
    return -rate * (decay * own * p + state["first"] / (1 - beta1**step) / root)


def _diagnosis(
    errors: list[dict[str, float]], forgotten: list[float], factors: list[float]
) -> tuple[list[str], str]:
    wrong = {name for per in errors for name, e in per.items() if e > LIMIT}
    if max(forgotten) <= LIMIT:
        return ["opt-state-lost", "adam-step-stuck"], "its state is forgotten from step to step"
    if all(abs(f - 2) < 0.1 for f in factors):
        return ["tie-double-step"], "each update is made twice"
    if len(wrong) < max(len(per) for per in errors):
        return ["tie-double-step", "noncontig-inplace-lost"], f"{len(wrong)} parameters do not follow it"
    if max(errors[0].values()) <= LIMIT:
        return ["adam-step-stuck", "opt-state-lost"], "right in the first step, then not"
    return ["adam-bias-eps", "adam-step-stuck", "tie-double-step"], "none of them follows it"


@real_updates.plant("opt-state-lost", component="update of")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def zero_grad(self) -> None:
            super().zero_grad()
            self.optimizer.state.clear()

    return specimens.subject(trainer=Broken)


@real_updates.plant("adam-step-stuck", component="update of")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def update(self) -> None:
            super().update()
            for state in self.optimizer.state.values():
                state["step"].fill_(1)

    return specimens.subject(trainer=Broken)


@real_updates.plant(
    "tie-double-step", component="head", what="the tied matrix is stepped again by a second optimizer"
)
def _() -> Subject:
    class Broken(specimens.Trainer):
        def update(self) -> None:
            before = self.model.head.weight.detach().clone()
            super().update()
            with torch.no_grad():
                self.model.head.weight.add_(self.model.head.weight - before)

    return specimens.subject(trainer=Broken)


@real_updates.healthy("a schedule that is advanced right after the update")
def _() -> Subject:
    class After(specimens.Trainer):
        def set_rate(self) -> float:
            return self.rate(self.step_number)

        def update(self) -> None:
            super().update()
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(self.step_number + 1)

    return specimens.subject(trainer=After)


@real_updates.healthy("SGD with Nesterov momentum and decay")
def _() -> Subject:
    class Plain(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            parameters = self.model.parameters()
            return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)

    return specimens.subject(trainer=Plain)


@real_updates.healthy("coupled Adam, a rate of 1e-7 at first, a frozen embedding")
def _() -> Subject:
    class Plain(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            self.model.embedding.weight.requires_grad_(False)
            return torch.optim.Adam(self.model.parameters(), weight_decay=0.1)

        def rate(self, step: int) -> float:
            return 1e-7 * 10**step

        def step(self, micro_batches: list[Rows]) -> dict[str, float]:
            return super().step(micro_batches)

    return specimens.subject(trainer=Plain)
