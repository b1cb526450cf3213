"""The watcher that lets a model speak in the training log: how its parts were used, and whether its states collapse.

In the steps that it wants, the forwards of the step add sums to `model.collector`; these are added up over the ranks,
and the model makes columns of them (`usage/...`, `uniformity/cosine`) for the step's line of metrics.jsonl. A column is
a function of that step alone: a run that is resumed has the same. Nothing that is trained is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minilm.models.uniformity import COSINE
from minilm.training.layout import Layout
from minilm.training.watch import StepView

# Mean cosine of two tokens of a row. Small models of this zoo begin at 0.04 to 0.9, may stand at 0.94 while they learn
# the frequencies of tokens, and are below 0.3 after 100 steps; without skip connections they stay at 1.
COLLAPSED = 0.95
LOOKS = 3  # in a row, before anything is said


class Usage:
    """Columns of the model itself, every `every` steps, from the first step on.

    warmup_steps  states may be alike while the learning rate rises: nothing is said before
    event         (step, text): told once when the states of all tokens have become one direction and stay it
    """

    def __init__(
        self, every: int, *, warmup_steps: int = 0, event: Callable[[int, str], None] | None = None
    ) -> None:
        self.every, self.warmup_steps, self.event = every, warmup_steps, event
        self._sums: dict[str, Tensor] = {}
        self._alike = 0  # looks in a row

    def wants(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    @contextlib.contextmanager
    def around_forwards(self, view: StepView) -> Iterator[None]:
        """Only the forwards of the step itself are collected: not those of a check that looks at its gradient."""
        view.model.collector = self._sums = {}
        try:
            yield
        finally:
            view.model.collector = None

    def before_update(self, view: StepView) -> None:
        """Nothing is needed of the gradient."""

    def after_step(self, view: StepView, values: Mapping[str, Any]) -> Mapping[str, Any]:
        columns: dict[str, float] = view.model.columns(over_ranks(view.layout, self._sums))
        self._sums = {}
        self._judge(view.step, columns.get(COSINE, 0.0))
        return columns

    def _judge(self, step: int, cosine: float) -> None:
        self._alike = self._alike + 1 if step > self.warmup_steps and cosine > COLLAPSED else 0
        if self.event is not None and self._alike == LOOKS:
            self.event(
                step,
                f"step {step}: the states of different tokens are nearly one direction ({COSINE} {cosine:.3f}): "
                "the model predicts every token alike. Usual causes: blocks without their skip connections, a "
                "learning rate too high, data in which all tokens are the same.",
            )
            self.event = None


def over_ranks(layout: Layout, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor summed over the ranks, float64, on the CPU. All ranks must have the same names and shapes."""
    names = sorted(sums)
    if not names:
        return {}
    whole = torch.cat([sums[name].flatten() for name in names])
    if layout.world_size > 1:
        torch.distributed.all_reduce(whole)
    parts = whole.cpu().split([sums[name].numel() for name in names])
    return {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}
