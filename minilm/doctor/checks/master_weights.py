"""The weights can take the updates that they are given.

Why: a weight in bfloat16 has eight significant bits: an update below 0.2 % of it changes nothing. A model that is cast
as a whole trains at first and stalls when the rate falls. Moments in 16 bits do not decay.

How: a real step; counted are the weights that have a gradient and did not change, or that in their type could not be
changed by a hundredth of the present rate (the end of a usual schedule), unless float32 masters are found among what
the optimizer updates or keeps. The limit is 5 % (float32: none; bfloat16 without masters: 85 %). Then the types of the
optimizer's state.

Cannot see: masters that are kept outside of the optimizer; stochastic rounding is taken for the defect that it mends.

Sources: Micikevicius et al. (2018), Mixed Precision Training; DeepSpeed issue 1800; trl issue 2175.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.specimens.optimizers import PlainAdamW, trainer_with
from minilm.doctor.stepping import even_rows, inner_optimizer, start, watched_step
from minilm.doctor.subject import Subject

LOST = 0.05


@check(group="training", needs=("training", "vocab_size"), cost="1 step")
def master_weights(subject: Subject) -> Finding:
    """Updates that are lost to rounding, and optimizer state in 16 bits."""
    training = start(subject, seed=0)
    seen = watched_step(training, even_rows(subject).split(2))
    optimizer = inner_optimizer(training)
    rates = [rate for update in seen.updates for rate in update.rates if rate > 0]
    unchanged = total = unmoved = 0
    for name, before in seen.before.items():
        gradient = seen.updates[0].gradients.get(name) if seen.updates else None
        if gradient is None:
            continue
        live = gradient.abs() > 1e-2 * gradient.abs().mean()
        unchanged += int((live & (before == seen.after[name])).sum())
        # A late step has a rate that is smaller than this one; what it would do is known without taking it.
        small = min(rates, default=0.0) * 0.01
        unmoved += (
            int((live & (before + small == before)).sum()) if before.element_size() < 4 and small else 0
        )
        total += int(live.sum())
    if not total:
        raise NotApplicable("no gradient to be seen at the optimizer")
    masters = _has_masters(optimizer, training.module) if optimizer is not None else False
    lost = max(unchanged, 0 if masters else unmoved) / total
    narrow = sorted(
        f"{key} in {value.dtype}"
        for state in (optimizer.state.values() if optimizer is not None else ())
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() and value.dtype in (torch.bfloat16, torch.float16)
    )
    types = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in seen.before.values()}))
    text = f"{lost:.1%} of {total} weights ({types}) cannot take the updates that they are given"
    if lost > LOST and not masters:
        return failed(text, lost, LOST, unit="of the weights", bugs=["bf16-no-master", "adam-eps-bf16"],
                      component=f"optimizer: weights in {types} without float32 masters",
                      advice="keep weights in float32 and compute under autocast, or keep float32 masters")  # fmt: skip
    if narrow:
        return failed(
            f"the optimizer keeps {', '.join(sorted(set(narrow)))}", float(len(narrow)), 0.0, unit="tensors",
            bugs=["adam-eps-bf16"], component="optimizer: state in 16 bits",
            advice="keep the moments in float32: 1 - beta2 is below the resolution of 16 bits",
        )  # fmt: skip
    return passed(f"{text}; state in full precision", lost, LOST, unit="of the weights")


def _has_masters(optimizer: torch.optim.Optimizer, module: nn.Module) -> bool:
    """Does the optimizer update float32 tensors that the module's narrow weights are copies of?"""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    own = {id(p) for p in module.parameters()}
    if held and all(p.dtype == torch.float32 and id(p) not in own for p in held):
        return True
    return any(
        value.dtype == torch.float32 and value.shape == p.shape and torch.equal(value.to(p.dtype), p)
        for p in held
        for value in kept
    )


class _Narrow(specimens.Trainer):
    """All weights in bfloat16."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        self.model.bfloat16()
        return super().make_optimizer()


@master_weights.plant("bf16-no-master", component="without float32 masters")
def _() -> Subject:
    return specimens.subject(trainer=_Narrow)


@master_weights.plant("adam-eps-bf16", component="16 bits")
def _() -> Subject:
    return specimens.subject(trainer=trainer_with(type("AdamW", (PlainAdamW,), {"narrow": True})))


@master_weights.healthy("bfloat16 autocast over float32 weights")
def _() -> Subject:
    return specimens.subject(trainer=specimens.AutocastTrainer)


@master_weights.healthy("bfloat16 weights with float32 masters")
def _() -> Subject:
    class Masters(_Narrow):
        def make_optimizer(self) -> torch.optim.Optimizer:
            self.model.bfloat16()
            self.pairs = [(p, p.detach().float().requires_grad_()) for p in self.model.parameters()]
            return torch.optim.AdamW([master for _, master in self.pairs], lr=self.learning_rate)

        def update(self) -> None:
            for p, master in self.pairs:
                master.grad = None if p.grad is None else p.grad.float()
            self.optimizer.step()
            with torch.no_grad():
                for p, master in self.pairs:
                    p.copy_(master)

    return specimens.subject(trainer=Masters)
