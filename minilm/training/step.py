"""One optimizer step over its micro-batches: the only backward, the only clip, the only update.

The mean that is minimised and logged is over all targets of the global batch, so their number (`total`) is
agreed by all ranks before the first backward. Every micro-batch then contributes nats / total: the size of the
micro-batches, their number and the number of ranks do not show, however unevenly the targets are spread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minilm.alignment import Batch, Sum
from minilm.errors import CheckFailed, DataError
from minilm.training.layout import Layout


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, the same on every rank except `seconds`."""

    loss: Sum  # over the whole global batch, no graph
    auxiliary: dict[str, float]  # mean over micro-batches and ranks
    gradient_norm: float  # before clipping
    stop: bool  # some rank wants to stop after this step
    seconds: dict[str, float]  # forward, backward, optimizer


class NonFinite(CheckFailed):
    """Loss or gradient is NaN or infinite; the weights are those before the step."""

    def __init__(self, loss: Sum, gradient_norm: float) -> None:
        found = [f"the loss is {loss.mean}"] if not math.isfinite(loss.mean) else []
        if not _is_norm(gradient_norm):
            found.append("the gradient is not finite")
        super().__init__(
            f"{' and '.join(found).capitalize()}. The step was not taken: weights and optimizer are as before it. "
            "Usual causes: optim.learning_rate too high, no warm-up (optim.warmup_steps), damaged weights."
        )
        self.loss, self.gradient_norm = loss, gradient_norm


class Stopwatch:
    """Seconds per named part. On CUDA by events, read once at the end: a step is not interrupted to be timed."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks = [("", self._now())]

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, part: str) -> None:
        """The time since the last mark belongs to `part`."""
        self._marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
        parts: dict[str, float] = {}
        for (_, start), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            took = start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start
            parts[part] = parts.get(part, 0.0) + took
        return parts


def optimizer_step(
    layout: Layout,
    micro_batches: Sequence[Batch],
    *,
    stop: bool = False,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, one clip, one update. Collective.

    before_update is called when the whole gradient is there, before it is clipped.
    Raises DataError for a global batch without a single target and NonFinite, before the update, for a loss
    or gradient that is not finite.
    """
    watch = Stopwatch(layout.device.type == "cuda")
    targets = sum(float(batch.num_targets()) for batch in micro_batches)
    total, wants_stop = layout.all_reduce([targets, float(stop)])
    if total == 0:
        raise DataError(
            "No position of this global batch is a target: there is nothing to learn in its rows."
        )

    loss, auxiliary = Sum.zero(layout.device), {}
    for number, batch in enumerate(micro_batches, 1):
        last = number == len(micro_batches)
        with layout.accumulating(last=last):
            part, extra = layout.objective(batch.to(layout.device, non_blocking=True))
            contribution = part.share(total) * layout.world_size
            for name, value in extra.items():
                contribution = contribution + value / len(micro_batches)
                auxiliary[name] = auxiliary.get(name, 0.0) + value.detach() / len(micro_batches)
            watch.lap("forward")
            layout.backward(contribution, last=last)
            watch.lap("backward")
        loss = loss + part.detach()

    loss = loss.all_reduce()
    names = sorted(auxiliary)
    means = layout.all_reduce([float(auxiliary[name]) / layout.world_size for name in names])
    norm = layout.gradient_norm()
    if not (math.isfinite(loss.mean) and _is_norm(float(norm))):
        raise NonFinite(loss, float(norm))
    if before_update is not None:
        before_update()
    layout.step(norm)
    watch.lap("optimizer")
    return StepResult(
        loss, dict(zip(names, means, strict=True)), float(norm), wants_stop > 0, watch.seconds()
    )


def _is_norm(value: float) -> bool:
    return math.isfinite(value) and value >= 0  # DeepSpeed reports a norm that is not finite as -1
