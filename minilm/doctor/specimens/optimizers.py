"""An optimizer written out, with its places for mistakes, and the trainer that uses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minilm.doctor.specimens.training import Trainer


class PlainAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, 2019). `late_eps`, `counting`, `narrow`: what a plant may get wrong."""

    late_eps, counting, narrow = False, True, False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                kind = torch.bfloat16 if self.narrow else p.dtype
                if not state:
                    state.update(
                        step=0,
                        exp_avg=torch.zeros_like(p, dtype=kind),
                        exp_avg_sq=torch.zeros_like(p, dtype=kind),
                    )
                state["step"] += 1 if self.counting else state["step"] == 0
                state["exp_avg"].lerp_(p.grad.to(kind), 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad.to(kind), p.grad.to(kind), value=1 - beta2)
                self.apply(p, state, group, 1 - beta1 ** state["step"], 1 - beta2 ** state["step"])

    def apply(
        self, p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], one: float, two: float
    ) -> None:
        first, second = state["exp_avg"].to(p.dtype), state["exp_avg_sq"].to(p.dtype)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        below = (
            second.sqrt().add(group["eps"]) / math.sqrt(two)
            if self.late_eps
            else (second / two).sqrt() + group["eps"]
        )
        p.addcdiv_(first, below, value=-group["lr"] / one)


def trainer_with(kind: type[torch.optim.Optimizer]) -> type[Trainer]:
    """A trainer with this optimizer over the same groups."""

    def make_optimizer(self: Trainer) -> torch.optim.Optimizer:
        groups = Trainer.make_optimizer(self).param_groups
        kept = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
        return kind(kept, lr=self.learning_rate)

    return type("WithOptimizer", (Trainer,), {"make_optimizer": make_optimizer})
