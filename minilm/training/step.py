"""One optimizer step over its micro-batches: the only backward, the only clip, the only update.

The mean that is minimised and logged is over all targets of the global batch, so their number (`total`) is
agreed by all ranks before the first backward. Every micro-batch then contributes nats / total: the size of the
micro-batches, their number and the number of ranks do not show, however unevenly the targets are spread.

The same holds for the auxiliary losses of a model. Each is a mean over the tokens that count for it, and the model
tells their number before the forward (`counted`). A micro-batch contributes its mean x its share of the step's tokens.

Nothing here waits for the device but one reading of all that was measured (`Unread.read`). It comes before the update,
or, where the caller allows it, after the next step is under way (`minilm.training.pending`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm.alignment import Batch, Sum
from minilm.errors import CheckFailed, DataError
from minilm.training.clock import Stopwatch
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


class Unread:
    """What a step measured, on its way to the host. Making it waits for nothing.

    loss       of the whole global batch
    auxiliary  means over the tokens of the global batch, by name
    norm       of the whole gradient before clipping, on any device
    """

    def __init__(
        self, loss: Sum, auxiliary: Mapping[str, Tensor], norm: Tensor, *, stop: bool, watch: Stopwatch
    ) -> None:
        self.norm, self._names, self._stop, self._watch = norm, sorted(auxiliary), stop, watch
        device = loss.nats.device
        measured = [*loss.detach(), norm.detach().to(device), *(auxiliary[name] for name in self._names)]
        # A float32 [] on the device, as torch's fused optimizers take it: 1 if the step must not be taken.
        finite = torch.isfinite(loss.nats.detach() / loss.tokens) & torch.isfinite(measured[3])
        self.wrong = (~finite).float()
        # To pinned memory, which is what lets a copy go beside the kernels.
        self._numbers = torch.stack([number.double() for number in measured]).to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(device))

    def read(self) -> StepResult:
        """The numbers; waits until the device has computed them, and no further. Without `seconds`."""
        if self._arrived is not None:
            self._arrived.synchronize()
        nats, tokens, num_bytes, norm, *means = self._numbers.tolist()
        shown = norm if norm >= 0 else math.nan  # DeepSpeed reports a norm that is not finite as -1
        auxiliary = dict(zip(self._names, means, strict=True))
        return StepResult(Sum.of(nats, tokens, num_bytes), auxiliary, shown, self._stop, {})

    def timed(self, result: StepResult) -> StepResult:
        """`result` with the seconds of the step's parts; waits for the end of the step."""
        return dataclasses.replace(result, seconds=self._watch.seconds())


def optimizer_step(
    layout: Layout,
    micro_batches: Sequence[Batch],
    *,
    stop: bool = False,
    inspect: Callable[[StepResult], None] | None = None,
    before_update: Callable[[], None] | None = None,
    forwards: contextlib.AbstractContextManager[Any] | None = None,
    may_wait: Callable[[], bool] | None = None,
) -> StepResult | Unread:
    """Forward and backward over this rank's micro-batches, one clip, one update. Collective.

    inspect is called with what was measured, finite or not, when the whole gradient is there and the weights are
    those before the step; before_update after it, for a step that will be taken. Neither sees a clipped gradient.
    forwards is entered before the first forward and left after the last backward: what is recorded inside is of this
    step alone.
    may_wait is called between backward and update. Where it says so, and nobody wants to stop, nobody waits for what
    was measured: the device decides by it whether the update is made, and `Unread` is returned. Then inspect is not
    called, a step that is not finite changes neither weights nor moments, and a moving average is the caller's to
    update. Only for a layout that `can_wait`.
    Raises DataError for a global batch without a single target and, unless it may wait, NonFinite before the update for
    a loss or gradient that is not finite (the gradient is still there then: `discard` forgets it).
    """
    watch = Stopwatch(layout.device)
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
    if auxiliary:
        means = layout.summed(torch.stack([auxiliary[name].double() for name in sorted(auxiliary)]))
        auxiliary = dict(zip(sorted(auxiliary), means.unbind(), strict=True))
    unread = Unread(loss.all_reduce(), auxiliary, layout.gradient_norm(), stop=wants_stop > 0, watch=watch)
    watch.lap("backward")
    if may_wait is not None and may_wait() and not wants_stop:
        if before_update is not None:
            before_update()
        layout.step(unread.norm, unless=unread.wrong)
        watch.lap("optimizer")
        return unread
    result = unread.read()
    if inspect is not None:
        inspect(result)
    if not result.is_finite:
        raise NonFinite(result)
    if before_update is not None:
        before_update()
    layout.step(unread.norm)
    watch.lap("optimizer")
    return unread.timed(result)


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


def refuse_unknown_tokens(
    micro_batches: Sequence[Batch], model: nn.Module, where: Callable[[], object]
) -> None:
    """Ids outside of the vocabulary would end a CUDA device with an assertion that names nothing.

    where() -> the rows that the step is made of, for people. Raises DataError. Looks at batches on the CPU.
    """
    highest = max(int(torch.maximum(b.inputs.max(), b.targets.max())) for b in micro_batches)
    num_tokens = model.config.vocab_size
    if highest >= num_tokens:
        raise DataError(
            f"Token id {highest} is outside the model's vocabulary 0 .. {num_tokens - 1}: the store was altered "
            "while this run reads it. `minilm data info STORE --verify` names the file; restore it, then continue "
            f"with --resume. What the step is made of:\n{where()}"
        )


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
