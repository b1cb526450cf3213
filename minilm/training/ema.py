"""An exponential moving average of the weights: what the last steps agree on, without their noise.

    average <- d average + (1 - d) weights        after each update, in float32

with d = min(decay, (1 + t) / (10 + t)) after t updates, so that the average forgets the initial weights in a short
run too (it looks back over about a tenth of the steps until the decay's own horizon is shorter). Each process averages
the tensors that its optimizer updates: the parameters, or under ZeRO its part of the float32 master weights. So an
update needs no communication; whole weights are gathered only where they are evaluated or saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

if TYPE_CHECKING:
    from minilm.training.layout import Layout


class Average:
    """The average of `live`, tensors that are updated in place; begins as a copy of them."""

    def __init__(self, live: Sequence[Tensor], decay: float) -> None:
        self.live = [tensor.detach() for tensor in live]
        self.shadow = [tensor.clone() for tensor in self.live]
        self.decay, self.num_updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        get_ema_multi_avg_fn(decay)(self.shadow, self.live, None)

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Inside, `live` holds the average and `shadow` the weights; afterwards all is as before, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for live, shadow in zip(self.live, self.shadow, strict=True):
            kept = live.clone()  # one tensor at a time: no second copy of the whole model
            live.copy_(shadow)
            shadow.copy_(kept)


def average_of(layout: Layout, decay: float) -> Average:
    """The average for a prepared layout, beginning with its present weights."""
    if layout.engine is None:
        return Average(list(layout.model.parameters()), decay)
    return Average(layout.engine.optimizer.single_partition_of_fp32_groups, decay)


@contextlib.contextmanager
def averaged(layout: Layout) -> Iterator[None]:
    """Inside, the model of the layout computes with the averaged weights. Collective under ZeRO."""
    assert layout.average is not None
    with layout.average.exchanged():
        if layout.engine is None:
            yield
            return
        parameters = list(layout.model.parameters())
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.copy_(p.get_full_hp_param())
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(parameters, kept, strict=True):
                    p.copy_(value)
