"""The checks that can be afforded while a run trains, on the very objects that train.

At every step: the learning rates against the plan, the mode of every module. At intervals, as often as `share` of the
time allows (a first time when a look has been paid for): the loss of the step computed again by another way, the frame
of its targets, random tokens against ln V, train mode against eval mode, parameters without a gradient, rows that come
twice in an epoch.

A `training.watch.Watcher`: every rank calls it, and what one rank finds all ranks know.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm.alignment import Batch
from minilm.doctor.core import Finding, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, difference, random_states_kept
from minilm.errors import CheckFailed
from minilm.training.watch import StepView

# Steps: what a look costs (0.5 measured: the forward passes of the step again, row by row), and a reserve. The first
# look comes when so many steps are `share` of those done: a number that every rank knows, whatever its clock says.
FIRST_LOOK_COST = 0.75
LEAST_ROOM = 0.1  # of `share`, that is left for looks however much the work at every step takes
# Positions that are computed again at once. On CUDA a row alone is over before its kernels are launched, and a look at
# 128 rows would cost 20 steps; on a CPU a row alone stays in the cache.
REPLAYED_POSITIONS = {"cpu": 1, "cuda": 4096}
MOST_ROWS_REMEMBERED = 1_000_000  # hashes of 8 bytes: of an epoch, for rows that come twice
# Relative. float32: the same sums in another order, 1e-6 measured. bfloat16: another rounding of each logit, 1e-3.
REPLAY_ERROR = {"fp32": 1e-4, "bf16": 1e-2}
MODE_ERROR = {
    "fp32": FLOAT32_NOISE,
    "bf16": 0.25,
}  # std of the logits; healthy bfloat16 noise is 0.07 to 0.10
LEAST_ROWS = 64  # of an epoch, before anything is said about repetitions
DEAD_LOOKS = 3  # looks in a row without any gradient
STANDARD_ERRORS = 6  # one-sided, below 1e-9


class Watch:
    """Looks at steps; `report(step, finding)` is called for each new failure, `note(step, values)` after each look.

    planned_rates  step from 0 -> the rates that the log must show (column -> value)
    share          of the time that looking may take; a process that does less than 0.75 / share steps takes no look
    stop           raise CheckFailed at a failure, instead of going on
    """

    def __init__(
        self,
        *,
        planned_rates: Callable[[int], Mapping[str, float]],
        precision: str,
        has_dropout: bool,
        steps_per_epoch: int,
        report: Callable[[int, Finding], None],
        note: Callable[[int, Mapping[str, float]], None],
        share: float = 0.005,
        stop: bool = False,
    ) -> None:
        self.planned_rates, self.precision, self.has_dropout = planned_rates, precision, has_dropout
        self.steps_per_epoch, self.report, self.share, self.stop = steps_per_epoch, report, share, stop
        self.note = note
        self.findings: dict[str, Finding] = {}  # the latest of each kind
        self.seconds = 0.0  # of this process, in all
        self._look_seconds = 0.0  # of the latest look
        self._standing_seconds = 0.0  # of all steps without a look
        self._begun: tuple[int, float] | None = None  # the first step of this process, and when it began
        self._next_look = 0
        self._looking = False
        self._replayed: tuple[float, float] | None = None
        self._new: list[Finding] = []
        self._without_gradient: dict[str, int] = {}
        self._rows: set[int] = set()
        self._epoch, self._seen, self._again = -1, 0, 0

    # ---- the watcher

    def wants(self, step: int) -> bool:
        if self._begun is None:
            self._begun = step, time.perf_counter()
            self._next_look = step - 1 + math.ceil(FIRST_LOOK_COST / self.share)
        self._looking = step >= self._next_look
        if self._looking:
            self._look_seconds = 0.0
        return True

    def can_wait(self, step: int) -> bool:
        """Between two looks nothing of what the device computes is read (`training.watch.CanWait`)."""
        return not self._looking

    def before_update(self, view: StepView) -> None:
        """The weights are those of the step, the gradient is whole and not yet clipped."""
        start = time.perf_counter()
        self._new = [_modes(view.model), *self._rows_once(view)]
        if self._looking:
            self._new += [_frame(view.micro_batches), self._gradients(view)]
            with torch.no_grad(), random_states_kept(), view.layout.autocast():
                self._replayed = None if self.has_dropout else _replay(view)
                self._new += [_random_floor(view), *self._two_modes(view)]
        self._spend(time.perf_counter() - start)

    def after_step(self, view: StepView, values: Mapping[str, Any]) -> Mapping[str, Any]:
        start = time.perf_counter()
        columns: dict[str, float] = {}
        found = [*self._new, self._rates(view.step, values)]
        if self._looking and self._replayed is not None:
            again = self._compared(values["loss"], *self._replayed, len(view.micro_batches), view)
            found.append(again)
            columns["replay_error"] = again.measured or 0.0
        self._settle(view, found)
        self._spend(time.perf_counter() - start)
        if self._looking:
            columns["failures"] = sum(f.status == "FAIL" for f in self.findings.values())
            columns["share_of_time"] = self.seconds / self._elapsed()
            self.note(view.step, columns)  # a line of its own: when a look comes depends on the clock
            self._next_look = view.step + self._interval(view)
        return {}

    # ---- how often

    def _spend(self, seconds: float) -> None:
        self.seconds += seconds
        if self._looking:
            self._look_seconds += seconds
        else:
            self._standing_seconds += seconds

    def _elapsed(self) -> float:
        assert self._begun is not None
        return max(time.perf_counter() - self._begun[1], 1e-9)

    def _interval(self, view: StepView) -> int:
        """Steps until the next look, so that `share` is kept when that look is over. The same on every rank."""
        assert self._begun is not None
        elapsed, done = self._elapsed(), view.step - self._begun[0] + 1
        # n steps on: seconds + n standing + look = share (elapsed + n per_step), the look costing what the latest did
        per_step, standing = elapsed / done, self._standing_seconds / done
        each = max(self.share * per_step - standing, LEAST_ROOM * self.share * per_step)
        wanted = (self.seconds + self._look_seconds - self.share * elapsed) / each
        total = view.layout.all_reduce([min(max(wanted, 1.0), 1e9)])[0]
        return max(1, math.ceil(total / view.layout.world_size))

    # ---- what is known after a step

    def _settle(self, view: StepView, found: Sequence[Finding]) -> None:
        """Tell each new failure once. Ranks agree on whether there is one before anybody raises."""
        fresh = []
        for finding in found:
            before = self.findings.get(finding.check)
            self.findings[finding.check] = finding
            if finding.status == "FAIL" and (before is None or before.status != "FAIL"):
                fresh.append(finding)
        for finding in fresh:
            self.report(view.step, finding)
        if not self.stop or not self._looking:
            return
        if view.layout.all_reduce([float(bool(fresh))])[0] > 0:
            what = (
                "; ".join(f"{f.check}: {f.message}. {f.advice}" for f in fresh)
                or "another rank found a failure"
            )
            raise CheckFailed(f"The watch stopped the run after step {view.step}: {what}")

    def _rates(self, step: int, values: Mapping[str, Any]) -> Finding:
        planned = self.planned_rates(step - 1)
        worst = max((abs(values[n] - rate) / max(abs(rate), 1e-12) for n, rate in planned.items() if n in values),
                    default=0.0)  # fmt: skip
        if worst <= 1e-6:
            return passed("the learning rates are as planned", worst, 1e-6, check="watch_schedule")
        shown = ", ".join(f"{n} {values.get(n)} instead of {rate}" for n, rate in planned.items())
        return failed(
            f"step {step}: {shown}", worst, 1e-6, bugs=["sched-per-micro", "sched-x-nproc", "lr-tensor-alias"],
            component="schedule", advice="set the rate once per optimizer step from the step's number",
            check="watch_schedule",
        )  # fmt: skip

    def _compared(self, logged: float, nats: float, tokens: float, num_micro: int, view: StepView) -> Finding:
        mean, limit = nats / max(tokens, 1.0), REPLAY_ERROR[self.precision]
        error = abs(logged - mean) / max(abs(mean), 1e-12)
        if error <= limit:
            return passed(f"logged {logged:.6g}, computed again {mean:.6g}", error, limit, check="watch_loss")
        factors = {"the number of micro-batches": num_micro, "the number of ranks": view.layout.world_size}
        named = [
            name for name, f in factors.items() if f > 1 and math.isclose(logged / mean, f, rel_tol=limit)
        ]
        cause = f": {named[0]} too large" if named else ""
        return failed(
            f"the logged loss is {logged:.6g}, the step computed again gives {mean:.6g}{cause}", error, limit,
            bugs=["logged-loss-scaled", "dp-loss-over-ngpu"], component="logged loss",
            advice="log summed nats / number of targets of the whole global batch", check="watch_loss",
        )  # fmt: skip

    def _gradients(self, view: StepView) -> Finding:
        present = {name for name, gradient in view.gradients() if bool(gradient.any())}
        names = [name for name, p in view.model.named_parameters() if p.requires_grad]
        for name in names:
            self._without_gradient[name] = 0 if name in present else self._without_gradient.get(name, 0) + 1
        dead = [name for name in names if self._without_gradient[name] >= DEAD_LOOKS]
        if not dead:
            return passed("every parameter gets a gradient", 0, 0, check="watch_gradients")
        return failed(
            f"{len(dead)} parameters had no gradient at {DEAD_LOOKS} looks: {', '.join(dead[:5])}", len(dead), 0,
            bugs=["frozen-by-accident", "params-missing", "moe-load-collapse"], component=dead[0],
            advice="use them in the forward pass, or freeze them on purpose", check="watch_gradients",
        )  # fmt: skip

    def _rows_once(self, view: StepView) -> Iterator[Finding]:
        """Rows of an epoch whose tokens were seen before in it: a loader that repeats, or duplicates in the data."""
        epoch = (view.step - 1) // self.steps_per_epoch
        if epoch != self._epoch:
            self._epoch, self._rows, self._seen, self._again = epoch, set(), 0, 0
        if len(self._rows) > MOST_ROWS_REMEMBERED:
            return
        for batch in view.micro_batches:
            for key in _keys(batch.inputs):
                self._seen += 1
                self._again += key in self._rows
                self._rows.add(key)
        if self._seen < LEAST_ROWS or not self._looking:
            return
        share = self._again / self._seen
        if share <= 0.5:
            yield passed(f"{share:.1%} of this epoch's rows came before", share, 0.5, check="watch_rows")
        else:
            yield failed(
                f"{self._again} of {self._seen} rows of this epoch came before in it", share, 0.5,
                bugs=["rank-shards-duplicated", "skip-off-by-one", "shuffle-same-every-epoch"], component="data order",
                advice="give every row once per epoch; look for duplicates with `minilm data show`",
                check="watch_rows",
            )  # fmt: skip

    def _two_modes(self, view: StepView) -> Iterator[Finding]:
        if self.has_dropout:
            return
        batch = view.micro_batches[0].rows(0, 1).to(view.layout.device)
        trained = _logits(view.model, batch)
        with _mode(view.model, train=False):
            evaluated = _logits(view.model, batch)
        gap, limit = difference(trained.float(), evaluated.float()), MODE_ERROR[self.precision]
        winners = [len(x.argmax(-1).unique()) for x in (trained, evaluated)]
        if gap <= limit:
            yield passed(f"train and eval mode agree within {gap:.1e} std", gap, limit, check="watch_modes")
            return
        yield failed(
            f"train and eval mode differ by {gap:.2g} std; tokens that win somewhere: {winners[0]} and {winners[1]}",
            gap, limit, bugs=["train-eval-diverge", "mem-bn-eval"], component="a module that depends on the mode",
            advice="look for batch statistics, or a fast path in eval mode", check="watch_modes",
        )  # fmt: skip


def _keys(inputs: Tensor) -> list[int]:
    """Token ids [B, L] of the CPU -> a number of 64 bits for each row, the same for the same row.

    A sum of ids times fixed odd numbers, modulo 2^64: two rows of ids below 2^17 share one with a probability of 2^-46,
    and rows are counted by the thousand. 0.06 ms for 128 rows of 512: a cryptographic hash of each took 0.46, more than
    the watch has of a step of 30.
    """
    rows = inputs.numpy().astype(np.uint64)
    factors = np.random.default_rng(0).integers(2**63, size=rows.shape[1], dtype=np.uint64) * 2 + 1
    keys: list[int] = (rows * factors).sum(axis=1, dtype=np.uint64).tolist()
    return keys


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    # An oracle reads what the labels name: without them it would be another model than the one that is trained.
    known = {"entries": batch.entries} if getattr(model, "takes_entries", False) else {}
    return model(batch.inputs, segments=batch.segments, positions=batch.positions, **known).logits


def _replay(view: StepView) -> tuple[float, float]:
    """(nats, targets) of the whole step, from logits and log-softmax: not the way the trainer does it.

    Row by row, or few rows at a time, and never as many as in training: what leaks from row to row is seen.
    """
    nats, tokens = 0.0, 0.0
    for whole in view.micro_batches:
        rows, length = whole.shape
        at_once = max(1, min(rows // 2, REPLAYED_POSITIONS[view.layout.device.type] // length))
        for i in range(0, rows, at_once):
            batch = whole.rows(i, min(i + at_once, rows)).to(view.layout.device)
            counted = batch.weights > 0
            log_p = _logits(view.model, batch).float().log_softmax(-1)[counted]
            nats -= float(log_p.gather(1, batch.targets[counted].unsqueeze(1)).sum(dtype=torch.float64))
            tokens += float(counted.sum())
    nats, tokens = view.layout.all_reduce([nats, tokens])
    return nats, tokens


def _frame(micro_batches: Sequence[Batch]) -> Finding:
    """Where a position counts, its target is the token that stands next in the row."""
    wrong = 0
    for batch in micro_batches:
        length = batch.shape[1] - 1
        here, there = batch.targets.narrow(1, 0, length), batch.inputs.narrow(1, 1, length)
        wrong += int(((here != there) & (batch.weights.narrow(1, 0, length) > 0)).sum())
    if not wrong:
        return passed("every target is the next token of its row", 0, 0, check="watch_targets")
    return failed(
        f"{wrong} targets are not the next token of their row", wrong, 0,
        bugs=["no-shift", "double-shift"], component="alignment of targets",
        advice="make batches with minilm.alignment.align and nothing else", check="watch_targets",
    )  # fmt: skip


def _modes(model: nn.Module) -> Finding:
    wrong = [name or "the model" for name, part in model.named_modules() if not part.training]
    if not wrong:
        return passed("every module is in training mode", 0, 0, check="watch_mode")
    return failed(
        f"{len(wrong)} modules are in eval mode in a training step: {', '.join(wrong[:3])}", len(wrong), 0,
        bugs=["eval-left-in-train-mode"], component=wrong[0],
        advice="restore each module's mode after evaluation", check="watch_mode",
    )  # fmt: skip


def _random_floor(view: StepView) -> Finding:
    """On uniformly random tokens no honest model has less than ln V in expectation."""
    num_tokens, device = view.model.config.vocab_size, view.layout.device
    length = min(128, view.micro_batches[0].shape[1] + 1)
    generator = torch.Generator().manual_seed(view.step)
    rows = torch.randint(num_tokens, (2, length), generator=generator).to(device)
    with _mode(view.model, train=False):
        log_p = view.model(rows).logits.float().log_softmax(-1)
    nats = (
        -log_p[:, torch.arange(length - 1)].gather(2, rows[:, torch.arange(1, length)].unsqueeze(2)).flatten()
    )
    mean, error = float(nats.mean()), float(nats.std()) / math.sqrt(len(nats))
    floor = math.log(num_tokens) - STANDARD_ERRORS * error
    if mean >= floor:
        text = f"random tokens cost {mean:.3f} nats, ln V is {math.log(num_tokens):.3f}"
        return passed(text, mean, floor, check="watch_random")
    return failed(
        f"random tokens cost {mean:.3f} nats, less than anybody can know: ln V is {math.log(num_tokens):.3f}", mean,
        floor, bugs=["mask-missing", "no-shift"], component="model: it sees its target",
        advice="run `minilm doctor` on a checkpoint of this run: causality names the module", check="watch_random",
    )  # fmt: skip


@contextlib.contextmanager
def _mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    before = [(part, part.training) for part in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
