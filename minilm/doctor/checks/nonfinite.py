"""A gradient or a loss that is not finite stops the step, and is not hidden.

Why: one NaN in one gradient becomes NaN in all of them by clipping, and in all weights by the update. A log that
filters such values goes on as if nothing had happened.

How: the first gradient that comes by is made NaN; the step must raise, or leave the weights free of NaN. Then a weight
is NaN, so that the loss is: unless the step raises, the logged loss must not be finite.

Cannot see: values that are wrong and finite.

Sources: torchtitan pull request 3863; torch.nn.utils.clip_grad_norm_, the parameter error_if_nonfinite; transformers,
the setting logging_nan_inf_filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.stepping import (
    even_rows,
    start,
    trainable,
    weights_of,
)
from minilm.doctor.subject import Rows, Subject


@check(group="training", needs=("training", "vocab_size"), cost="3 steps")
def nonfinite(subject: Subject) -> Finding:
    """A NaN in one gradient, then in the loss."""
    rows = even_rows(subject).split(2)
    training = start(subject, seed=0)
    named = trainable(training.module)
    hit: list[str] = []

    def poison(name: str) -> Callable[[Tensor], Tensor | None]:
        """The first gradient that comes by."""

        def hook(gradient: Tensor) -> Tensor | None:
            if hit:
                return None
            hit.append(name)
            return gradient * math.nan

        return hook

    handles = [p.register_hook(poison(n)) for n, p in named.items()]
    before = weights_of(training.module)
    logged, raised = _tried(training, rows)
    for handle in handles:
        handle.remove()
    if not hit:
        raise NotApplicable("no gradient of its parameters is computed in a step")
    name = hit[0]
    after = weights_of(training.module)
    touched = [n for n in before if not torch.equal(before[n], after[n])]
    poisoned = [n for n in touched if not bool(torch.isfinite(after[n]).all())]
    if poisoned:
        return failed(
            f"a NaN in the gradient of {name} left {len(poisoned)} of {len(named)} parameters with NaN, and the step "
            f"ended as if all were well (logged: {_shown(logged)})", float(len(poisoned)), 0.0, unit="parameters",
            bugs=["nan-grad-poisons-clip", "nan-swallowed"], component="clipping and update of a gradient with NaN",
            advice="stop or skip the step if the norm is not finite (clip_grad_norm_, error_if_nonfinite=True)",
        )  # fmt: skip
    training = start(subject, seed=0)
    with torch.no_grad():
        next(iter(trainable(training.module).values())).fill_(math.nan)
    logged, raised_too = _tried(training, rows)
    if not raised_too and math.isfinite(logged.get("loss", math.nan)):
        return failed(
            f"a loss of NaN is logged as {logged['loss']:.4g}, and no error is raised", 1.0, 0.0, unit="steps",
            bugs=["nan-swallowed"], component="logged loss: values that are not finite are filtered",
            advice="log what was computed, and stop when it is not finite",
        )  # fmt: skip
    how = f"raises {raised}" if raised else f"changes {len(touched)} parameters, none to NaN"
    return passed(f"with a NaN in the gradient of {name} the step {how}", 0.0, 0.0, unit="parameters")


def _tried(training: Any, rows: list[Rows]) -> tuple[Mapping[str, float], str]:
    """What it logged, or which error it raised."""
    try:
        return training.step(rows) or {}, ""
    except Exception as error:  # noqa: BLE001  (an error, of whatever class, is the right answer)
        return {}, type(error).__name__


def _shown(logged: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in logged.items()) or "nothing"


@nonfinite.plant("nan-grad-poisons-clip", component="clipping")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def clip(self) -> float:
            return float(nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or math.inf))

    return specimens.subject(trainer=Broken)


class _Skips(specimens.Trainer):
    """Leaves out an update whose gradient is not finite."""

    def clip(self) -> float:
        self.norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm or math.inf))
        return self.norm

    def update(self) -> None:
        if math.isfinite(self.norm):
            super().update()


@nonfinite.plant("nan-swallowed", component="logged loss")
def _() -> Subject:
    class Broken(_Skips):
        def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
            return nats / total if math.isfinite(nats) else 0.0

    return specimens.subject(trainer=Broken)


@nonfinite.healthy("the step is skipped, and NaN is logged")
def _() -> Subject:
    return specimens.subject(trainer=_Skips)
