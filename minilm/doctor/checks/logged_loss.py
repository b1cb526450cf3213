"""The loss that is logged is the mean over all targets of the step, in nats, before the update.

Why: a logged loss that is multiplied by the number of micro-batches, or divided by that of the devices, is compared
with other runs for weeks before somebody notices; a gradient can be right or wrong behind it.

How: eight rows of 2 to 24 tokens in one, two and eight micro-batches, on weights drawn wide; the value is held against
the mean computed row by row at the weights before the step, in absolute terms. What it is instead is named where it is
known: the same times the number of micro-batches, a mean of means, the last micro-batch alone, the loss after the
update.

Cannot see: what is logged as a smoothed value on purpose (leave `loss` out of what the step returns), and logs that a
step does not return.

Sources: K2 of the catalogue; transformers issues 37766, 37474 and pull request 42150.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.gradients import CUTS
from minilm.doctor.probes import no_randomness, num_targets, redraw_weights
from minilm.doctor.stepping import reference_mean, start, uneven_rows
from minilm.doctor.subject import Rows, Subject

STD = 0.3
LIMIT = 5e-3  # bfloat16 autocast moves it by 5e-4; the smallest known defect by 0.05


@dataclass(frozen=True)
class Logged:
    """What one step said, and what it could have meant."""

    cut: int
    value: float
    true: float
    after: float  # at the weights after the update
    parts: list[float]  # mean of each micro-batch
    counts: list[int]

    @property
    def factor(self) -> float:
        return self.value / self.true


@check(group="training", needs=("training", "vocab_size"), cost="3 steps, 72 rows forward")
def logged_loss(subject: Subject) -> Finding:
    """Logged losses against recomputed ones."""
    rows = uneven_rows(subject)
    seen = []
    for cut in CUTS:
        training = start(subject, seed=0)
        redraw_weights(training.module, STD)  # fresh, all micro-batches would have about the same loss
        micro_batches = rows.split(len(rows) // cut)
        with no_randomness(training.module):
            parts = [reference_mean(training, part) for part in micro_batches]
            counts = [num_targets(part) for part in micro_batches]
            true = sum(mean * count for mean, count in zip(parts, counts, strict=True)) / sum(counts)
            logged = training.step(micro_batches) or {}
            if "loss" not in logged:
                raise NotApplicable("its step returns no loss")
            seen.append(
                Logged(cut, float(logged["loss"]), true, reference_mean(training, rows), parts, counts)
            )
    worst = max(seen, key=lambda one: math.inf if math.isnan(one.factor) else abs(one.factor - 1))
    text = f"logged {worst.value:.5g} in a step of {worst.cut} micro-batches whose mean is {worst.true:.5g}"
    error = abs(worst.factor - 1)
    if error <= LIMIT:
        return passed(text, error, LIMIT, unit="of the loss")
    bugs, why = _diagnosis(seen, rows)
    return failed(f"{text}: {why}", error, LIMIT, unit="of the loss", bugs=bugs, component=f"logged loss: {why}",
                  advice="log the summed nats of the whole step over its number of targets")  # fmt: skip


def _diagnosis(seen: Sequence[Logged], rows: Rows) -> tuple[list[str], str]:
    def all_close(expected: Sequence[float]) -> bool:
        return all(math.isclose(s.value, e, rel_tol=2e-3) for s, e in zip(seen, expected, strict=True))

    if all_close([s.true * s.cut for s in seen]):
        return ["logged-loss-scaled"], "times the number of micro-batches"
    if all_close([s.true / s.cut for s in seen]):
        return ["logged-loss-scaled", "dp-loss-over-ngpu"], "divided by the number of micro-batches"
    if all_close([sum(s.parts) / s.cut for s in seen]):
        return ["mean-of-means-accum", "logged-loss-scaled"], "the mean of the micro-batches' means"
    if all_close([sum(s.parts) for s in seen]):
        return ["logged-loss-scaled", "mean-of-means-accum"], "the sum of the micro-batches' means"
    if all_close([s.parts[-1] for s in seen]):
        return ["logged-loss-scaled"], "the last micro-batch alone"
    if all_close([s.parts[-1] / s.cut for s in seen]):
        return ["logged-loss-scaled"], "the last micro-batch alone, divided by their number"
    if all_close([s.after for s in seen]):
        return ["logged-loss-scaled"], "the loss after the update"
    if all_close([s.true * sum(s.counts) for s in seen]):
        return ["logged-loss-scaled"], "a sum over targets"
    if all_close([math.exp(s.true) for s in seen]):
        return ["logged-loss-scaled"], "its exponential (perplexity)"
    if all_close([s.true / math.log(2) for s in seen]):
        return ["logged-loss-scaled"], "bits in place of nats"
    tokens = int((rows.segments > 0).sum())
    if all_close([s.true * sum(s.counts) / tokens for s in seen]):
        return ["denominator-unshifted"], f"divided by the {tokens} tokens before the shift"
    if all_close([s.true * sum(s.counts) / rows.segments.numel() for s in seen]):
        return ["pad-in-loss", "denominator-unshifted"], "divided by all positions, padding included"
    factors = [s.factor for s in seen]
    if max(factors) - min(factors) < 2e-3 * max(map(abs, factors)):
        whole = math.isclose(1 / factors[0], round(1 / factors[0]), rel_tol=2e-3)
        bugs = ["dp-loss-over-ngpu", "logged-loss-scaled"]
        return bugs if whole else bugs[::-1], f"times {factors[0]:.4g} whatever the number of micro-batches"
    return [
        "logged-loss-scaled",
        "mean-of-means-accum",
        "no-shift",
        "double-shift",
    ], "no known multiple of it"


@logged_loss.plant("logged-loss-scaled", component="times the number of micro-batches")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
            return nats / total * len(micro_batches)

    return specimens.subject(trainer=Broken)


@logged_loss.plant("logged-loss-scaled", component="last micro-batch", what="the last micro-batch only")
def _() -> Subject:
    class Broken(specimens.Trainer):
        last = 0.0

        def nats(self, rows: Rows):  # type: ignore[no-untyped-def]
            part, count = super().nats(rows)
            self.last = float(part.detach()) / count
            return part, count

        def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
            return self.last

    return specimens.subject(trainer=Broken)


@logged_loss.plant("dp-loss-over-ngpu", component="logged loss")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
            return nats / total / 4

    return specimens.subject(trainer=Broken)


@logged_loss.plant("mean-of-means-accum", component="mean of the micro-batches' means")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def step(self, micro_batches: list[Rows]) -> dict[str, float]:
            means = [float(part.detach()) / count for part, count in map(self.nats, micro_batches)]
            return {**super().step(micro_batches), "loss": sum(means) / len(means)}

    return specimens.subject(trainer=Broken)


@logged_loss.plant("denominator-unshifted", component="before the shift")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
            return nats / sum(int((rows.segments > 0).sum()) for rows in micro_batches)

    return specimens.subject(trainer=Broken)


@logged_loss.healthy("bfloat16 autocast")
def _() -> Subject:
    return specimens.subject(trainer=specimens.AutocastTrainer)


@logged_loss.healthy("a large model loss at first: weights of deviation 1, dropout")
def _() -> Subject:
    return specimens.subject(size={"init_std": 1.0, "dropout": 0.3})
