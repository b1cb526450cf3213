"""The optimizer computes what its name says, on every parameter, in a precision that keeps small updates.

Why: an epsilon on the wrong side of the bias correction, a step count that stands still, moments in 16 bits, an
in-place kernel that writes to a copy: each makes training slower or worse, and none stops it.

How: five updates of the owner's optimizer with gradients from 1e-9 to 1 that the check writes itself, on the initial
weights, against the published formula of Adam in float64. Only for optimizers of the Adam family, whose settings are
read from the parameter groups; weight decay is off (see `decay_groups`). The limit of 1e-3 of the update is 300 times
above float32 rounding.

Cannot see: optimizers of other families, and those that keep their own copies of the weights elsewhere.

Sources: Kingma and Ba (2015); Loshchilov and Hutter (2019); nanochat commit 4ddc803; OLMo-core v2.2.0; pytorch
issue 115607.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.specimens.optimizers import PlainAdamW, trainer_with
from minilm.doctor.stepping import inner_optimizer, start, trainable
from minilm.doctor.subject import Subject

UPDATES, RATE = 5, 1e-2
LIMIT = 1e-3


@check(group="training", needs=("training",), cost="10 calls of the optimizer")
def optimizer_math(subject: Subject) -> Finding:
    """Five updates against AdamW in float64, for gradients of ordinary and of tiny size."""
    training = start(subject)
    optimizer = inner_optimizer(training)
    if optimizer is None or not is_adam(optimizer):
        raise NotApplicable("needs an optimizer of the Adam family (with betas and eps in its groups)")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = {
        n: p for n, p in trainable(training.module).items() if id(p) in groups and "betas" in groups[id(p)]
    }
    named = {n: p for n, p in named.items() if p.dtype == torch.float32}
    if not named:
        raise NotApplicable("its Adam works on no float32 parameter of the module")
    errors: dict[float, dict[str, float]] = {}
    for size in (1e-7, 1.0):  # so small that eps matters, and ordinary
        training = start(subject)
        optimizer = inner_optimizer(training)
        assert optimizer is not None
        errors[size] = _five_updates(optimizer, trainable(training.module), size)
    flat = {(size, name): e for size, per in errors.items() for name, e in per.items()}
    (size, name), worst = max(flat.items(), key=lambda item: item[1])
    text = f"after {UPDATES} updates with gradients of about {size:g}, {name} is off AdamW's formula by {worst:.1e}"
    if worst <= LIMIT:
        return passed(text, worst, LIMIT, unit="of the update")
    bugs, why = _diagnosis(errors, optimizer)
    return failed(f"{text}: {why}", worst, LIMIT, unit="of the update", bugs=bugs, component=f"optimizer: {why}",
                  advice="compare the update with torch.optim.AdamW, line by line")  # fmt: skip


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Is it Adam or AdamW, by name and settings?"""
    name = type(optimizer).__name__.lower()
    other = name.startswith(("radam", "nadam", "sparse", "adamax")) or "8bit" in name or "mini" in name
    plain = all(not g.get("amsgrad") and not g.get("maximize") for g in optimizer.param_groups)
    return "adam" in name and not other and plain


def _five_updates(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], size: float
) -> dict[str, float]:
    """By name: relative error of the whole movement."""
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = {
        name: p
        for name, p in named.items()
        if "betas" in settings.get(id(p), {}) and p.dtype == torch.float32
    }
    old = {name: p.detach().double() for name, p in own.items()}
    old = {name: p.clone() for name, p in old.items()}
    new = {name: p.clone() for name, p in old.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in old.items()}
    for group in optimizer.param_groups:
        group["lr"] = torch.full_like(group["lr"], RATE) if isinstance(group["lr"], Tensor) else RATE
        group["weight_decay"] = 0.0  # see `decay_groups`
    generator = torch.Generator().manual_seed(1)
    for step in range(1, UPDATES + 1):
        for name, p in own.items():
            gradient = (torch.randn(p.shape, generator=generator) * size).to(p.device)
            p.grad = torch.empty_like(p).copy_(gradient)
            _adam(new[name], moments[name], gradient.double(), settings[id(p)], step)
        optimizer.step()
    moved = {name: p.detach().double() - old[name] for name, p in own.items()}
    return {
        name: float((moved[name] - (new[name] - old[name])).norm() / (new[name] - old[name]).norm())
        for name in own
    }


def _adam(
    p: Tensor, moments: tuple[Tensor, Tensor], gradient: Tensor, group: Mapping[str, Any], step: int
) -> None:
    """One update without decay, in place."""
    first, second = moments
    beta1, beta2 = (float(b) for b in group["betas"])
    first.mul_(beta1).add_(gradient, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (second / (1 - beta2**step)).sqrt() + float(group["eps"])
    p.sub_(first / (1 - beta1**step) / root, alpha=RATE)


def _diagnosis(
    errors: Mapping[float, Mapping[str, float]], optimizer: torch.optim.Optimizer
) -> tuple[list[str], str]:
    usual = errors[1.0]
    kinds = {
        v.dtype
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, Tensor) and v.dim()
    }
    if kinds - {torch.float32, torch.float64}:
        return ["adam-eps-bf16", "adam-step-stuck"], "its moments are kept in 16 bits"
    wrong = [name for name, e in usual.items() if e > LIMIT]
    if not wrong:
        return [
            "adam-bias-eps"
        ], "right for ordinary gradients, wrong where eps matters: eps meets an uncorrected moment"
    still = [name for name in wrong if abs(usual[name] - 1) < 1e-6]
    if still and len(wrong) < len(usual):
        return ["noncontig-inplace-lost"], f"{len(still)} of {len(usual)} parameters do not move at all"
    if len(wrong) < len(usual):
        return [
            "noncontig-inplace-lost",
            "adam-step-stuck",
        ], f"only {len(wrong)} of {len(usual)} parameters are wrong"
    return [
        "adam-step-stuck",
        "adam-bias-eps",
    ], "all parameters are wrong: the bias correction does not advance"


@optimizer_math.plant("adam-bias-eps", component="eps")
def _() -> Subject:
    return specimens.subject(trainer=trainer_with(type("AdamW", (PlainAdamW,), {"late_eps": True})))


@optimizer_math.plant("adam-step-stuck", component="optimizer")
def _() -> Subject:
    return specimens.subject(trainer=trainer_with(type("AdamW", (PlainAdamW,), {"counting": False})))


@optimizer_math.plant("noncontig-inplace-lost", component="optimizer")
def _() -> Subject:
    class AdamW(PlainAdamW):
        def apply(self, p: Tensor, *rest: Any) -> None:
            super().apply(p.contiguous(), *rest)  # a copy where p is a transposed view

    class Transposed(specimens.Model):
        def initialise(self) -> None:
            super().initialise()
            self.head.weight = nn.Parameter(self.head.weight.detach().t().contiguous().t())

    return specimens.subject(trainer=trainer_with(AdamW), model=Transposed)


@optimizer_math.plant("adam-eps-bf16", component="16 bits", what="moments in bfloat16")
def _() -> Subject:
    return specimens.subject(trainer=trainer_with(type("AdamW", (PlainAdamW,), {"narrow": True})))


@optimizer_math.healthy("AdamW written out")
def _() -> Subject:
    return specimens.subject(trainer=trainer_with(type("AdamW", (PlainAdamW,), {})))
