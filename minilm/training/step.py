"""One optimizer step over its micro-batches: the only backward, the only clip, the only update.

The mean that is minimised and logged is over all targets of the global batch, so their number (`total`) is
agreed by all ranks before the first backward. Every micro-batch then contributes nats / total: the size of the
micro-batches, their number and the number of ranks do not show, however unevenly the targets are spread.

The same holds for the auxiliary losses of a model. Each is a mean over the tokens that count for it, and the model
tells their number before the forward (`counted`). A micro-batch contributes its mean x its share of the step's tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm.alignment import Batch, Sum
from minilm.errors import CheckFailed, DataError
from minilm.training.layout import Layout


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, the same on every rank except `seconds`."""

    loss: Sum  # over the whole global batch, no graph
    auxiliary: dict[str, float]  # mean over the tokens of the global batch that count for each
    gradient_norm: float  # before clipping
    stop: bool  # some rank wants to stop after this step
    seconds: dict[str, float]  # forward, backward, optimizer

    @property
    def is_finite(self) -> bool:
        """Loss and gradient are numbers that can be trained on."""
        return math.isfinite(self.loss.mean) and math.isfinite(self.gradient_norm)


class NonFinite(CheckFailed):
    """Loss or gradient is NaN or infinite; the weights are those before the step."""

    def __init__(self, result: StepResult, more: str = "") -> None:
        found = [f"the loss is {result.loss.mean}"] if not math.isfinite(result.loss.mean) else []
        if not math.isfinite(result.gradient_norm):
            found.append("the gradient is not finite")
        super().__init__(
            f"{' and '.join(found).capitalize()}. The step was not taken: weights and optimizer are as before it. "
            "Usual causes: optim.learning_rate too high, no warm-up (optim.warmup_steps), damaged weights."
            + (f"\n{more}" if more else "")
        )
        self.result = result


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
    inspect: Callable[[StepResult], None] | None = None,
    before_update: Callable[[], None] | None = None,
    forwards: contextlib.AbstractContextManager[Any] | None = None,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, one clip, one update. Collective.

    inspect is called with what was measured, finite or not, when the whole gradient is there and the weights are
    those before the step; before_update after it, for a step that will be taken. Neither sees a clipped gradient.
    forwards is entered before the first forward and left after the last backward: what is recorded inside is of this
    step alone.
    Raises DataError for a global batch without a single target and NonFinite, before the update, for a loss
    or gradient that is not finite (the gradient is still there then: `discard` forgets it).
    """
    watch = Stopwatch(layout.device.type == "cuda")
    targets = sum(float(batch.num_targets()) for batch in micro_batches)
    here = counts_of(layout.model, micro_batches)
    total, wants_stop, *counted = layout.all_reduce([targets, float(stop), *here.values()])
    if total == 0:
        raise DataError(
            "No position of this global batch is a target: there is nothing to learn in its rows."
        )

    counts = dict(zip(here, counted, strict=True))
    with forwards or contextlib.nullcontext():
        loss, auxiliary = accumulate(layout, micro_batches, total, watch, counts=counts)
    loss = loss.all_reduce()
    names = sorted(auxiliary)
    means = layout.all_reduce([float(auxiliary[name]) for name in names])
    norm = layout.gradient_norm()
    watch.lap("backward")
    # DeepSpeed reports a norm that is not finite as -1.
    shown = float(norm) if float(norm) >= 0 else math.nan
    result = StepResult(loss, dict(zip(names, means, strict=True)), shown, wants_stop > 0, {})
    if inspect is not None:
        inspect(result)
    if not result.is_finite:
        raise NonFinite(result)
    if before_update is not None:
        before_update()
    layout.step(norm)
    watch.lap("optimizer")
    return dataclasses.replace(result, seconds=watch.seconds())


def accumulate(
    layout: Layout,
    micro_batches: Sequence[Batch],
    total: float,
    watch: Stopwatch | None = None,
    *,
    counts: Mapping[str, float],
) -> tuple[Sum, dict[str, Tensor]]:
    """Forward and backward only: this rank's part of the loss and of the auxiliary losses, no graph.

    total   targets of the whole global batch
    counts  tokens of the whole global batch that count for each auxiliary loss (`counts_of` of all micro-batches)

    All parts add up to the loss and the auxiliary losses of the global batch, whoever computes them: a replay computes
    those of several ranks one after another. Raises RuntimeError for an auxiliary loss whose tokens were not counted.
    """
    loss, auxiliary = Sum.zero(layout.device), {}
    for number, batch in enumerate(micro_batches, 1):
        last = number == len(micro_batches)
        with layout.accumulating(last=last):
            part, extra = layout.objective(batch.to(layout.device, non_blocking=True))
            contribution = part.share(total)
            for name, share in _shares(extra, counts_of(layout.model, [batch]), counts).items():
                contribution = contribution + share
                auxiliary[name] = auxiliary.get(name, 0.0) + share.detach()
            contribution = contribution * layout.world_size  # DDP and ZeRO average over the ranks
            if watch is not None:
                watch.lap("forward")
            layout.backward(contribution, last=last)
            if watch is not None:
                watch.lap("backward")
        loss = loss + part.detach()
    return loss, auxiliary


def counts_of(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """How many tokens of these batches count for each auxiliary loss of `model`, by name in sorted order."""
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in model.counted(batch.segments, batch.entries).items():
            counts[name] = counts.get(name, 0.0) + float(count)
    return dict(sorted(counts.items()))


def _shares(
    values: Mapping[str, Tensor], here: Mapping[str, float], counts: Mapping[str, float]
) -> dict[str, Tensor]:
    """What means over `here` tokens contribute to the means over `counts` tokens; 0 where nothing counts at all."""
    if missing := values.keys() - counts.keys():
        raise RuntimeError(
            f"The model returned auxiliary losses {sorted(missing)} but counted no tokens for them: its method "
            "`counted` must name every loss in Output.auxiliary."
        )
    return {name: value * (here[name] / (counts[name] or 1.0)) for name, value in values.items()}


def discard(layout: Layout) -> None:
    """Forget the gradient of a step that is not taken: weights, optimizer and counts stay as they are. Collective."""
    if layout.engine is None:
        layout.optimizer.zero_grad(set_to_none=True)
        return
    # DeepSpeed knows one way to forget a gradient, and it clears every place that holds a part of it: a step whose
    # gradient is not finite. A loss can be infinite over a finite gradient, and one rank alone can hold the NaN.
    for parts in layout.engine.optimizer.averaged_gradients.values():
        for part in parts or ():
            part.fill_(math.nan)
    skipped = layout.engine.skipped_steps
    layout.engine.step()
    if layout.engine.skipped_steps != skipped + 1:
        raise RuntimeError("DeepSpeed took a step over a gradient that is not finite.")
