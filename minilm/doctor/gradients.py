"""What a wrong gradient says of the step that made it: a factor, a weighting of micro-batches, or something else.

Where no optimizer is handed over, the movement of the weights is all there is to be seen: `by_movement`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minilm.doctor.core import Finding, NotApplicable, failed, passed
from minilm.doctor.probes import no_randomness, num_targets
from minilm.doctor.stepping import (
    NO_LIMIT,
    Vector,
    dot,
    mixture,
    norm,
    relative_error,
    shares,
    start,
    watched_step,
)  # fmt: skip
from minilm.doctor.subject import Rows, Subject

CUTS = (1, 2, 8)  # micro-batches per step


@dataclass(frozen=True)
class Trial:
    """One step: the gradient that was used beside the one that should have been."""

    step: int
    micro_batches: list[Rows]
    parts: list[Vector]  # of the reference: what each micro-batch contributes
    gradient: Vector
    former: Vector | None  # the reference of the step before
    error: float

    @property
    def cut(self) -> int:
        return len(self.micro_batches)

    def __str__(self) -> str:
        return f"step {self.step} of {self.cut} micro-batch{'es' * (self.cut > 1)}"


def diagnosis(trials: Sequence[Trial], limit: float) -> tuple[list[str], str, str, str]:
    """(bugs, component, what it is, advice), by the first trial that is wrong and what the others say to it."""
    every = [t for t in trials if t.error > limit]
    # The first wrong step, cut most finely: there weights can be told from a factor.
    wrong = max((t for t in every if t.step == min(t.step for t in every)), key=lambda t: t.cut)
    if wrong.step == 2 and wrong.former is not None:
        weights, rest = shares(wrong.gradient, [*wrong.parts, wrong.former])
        if rest < max(limit, 0.1 * wrong.error) and abs(weights[-1] - 1) < 0.05:
            return (["zero-grad-missing"], "zero_grad", "the gradient of the step before is still in it",
                    "clear the gradients after each update")  # fmt: skip
    weights, rest = shares(wrong.gradient, wrong.parts)
    if rest > max(limit, 0.1 * wrong.error):
        return _unexplained(wrong, rest)
    if max(weights) - min(weights) < 0.01 * max(abs(w) for w in weights):
        factors = {t.cut: sum(shares(t.gradient, t.parts)[0]) / t.cut for t in trials if t.step == wrong.step}
        return _factor(factors, wrong)
    return _weighting(weights, wrong)


def _factor(factors: dict[int, float], trial: Trial) -> tuple[list[str], str, str, str]:
    """The gradient is right but for a factor."""
    first, last = factors[CUTS[0]], factors[CUTS[-1]]
    shown = ", ".join(f"{factor:.4g} with {cut}" for cut, factor in factors.items())
    text = f"it is the right one times {shown} micro-batches"
    rows = [row for part in trial.micro_batches for row in part.segments]
    targets = sum(num_targets(part) for part in trial.micro_batches)
    tokens = sum(int((row > 0).sum()) for row in rows)
    slots = sum(row.numel() for row in rows)

    def close(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=2e-3)

    if all(close(factors[c], c) for c in factors):
        return (["accum-not-divided"], "gradient accumulation", f"{text}: the sum over micro-batches is never divided",
                "divide once, by the number of targets of the whole step")  # fmt: skip
    if all(close(factors[c], 1 / c) for c in factors):
        return (["last-accum-group-underscaled"], "gradient accumulation",
                f"{text}: it is divided by the number of micro-batches once more",
                "divide once, by the number of targets of the whole step")  # fmt: skip
    if close(last / first, CUTS[-1] / CUTS[0]):
        return (["last-accum-group-underscaled", "accum-not-divided"], "gradient accumulation",
                f"{text}: it is divided by {1 / first:.4g} however many there are, so a shorter group is underscaled",
                "divide by what the group holds, not by the configured number of micro-batches")  # fmt: skip
    for name, count in {"tokens before the shift": tokens, "positions, padding included": slots,
                        "shifted positions, padding included": slots - len(rows)}.items():  # fmt: skip
        if close(first, targets / count) and close(last, first):
            return (["denominator-unshifted", "pad-in-loss"], "loss denominator",
                    f"{text} = {targets}/{count}: it is divided by the number of {name}",
                    "divide by the number of targets: labels after the shift that are not ignored")  # fmt: skip
    if close(norm(trial.gradient), NO_LIMIT):
        return (["clip-scaled-grads", "clip-per-micro"], "clipping of the gradient",
                f"{text}, which gives it the norm of the limit: it is scaled up to the limit instead of down",
                "multiply by limit / norm only where the norm is larger than the limit")  # fmt: skip
    if close(first, 1) and not close(last, first):
        return (["mean-of-means-accum", "accum-not-divided", "last-accum-group-underscaled"],
                "denominator of gradient accumulation", f"{text}: {_guessed(factors, trial)}",
                "count the targets of all micro-batches of the step before the first backward")  # fmt: skip
    if close(last, first) and close(2 ** round(math.log2(max(abs(first), 1e-30))), first):
        return (["zero0-bf16-unscaled", "clip-scaled-grads"], "loss scale",
                f"{text} = 2^{round(math.log2(first))} in all cuts: a loss scale is on one side only",
                "scale the loss and unscale the gradient, or do neither")  # fmt: skip
    return (["zero0-bf16-unscaled", "accum-not-divided", "denominator-unshifted"], "gradient scale", text,
            "look for a division or a factor between the loss and the optimizer")  # fmt: skip


def _guessed(factors: dict[int, float], trial: Trial) -> str:
    """From which micro-batch the denominator of the whole step was taken."""
    counts = [num_targets(part) for part in trial.micro_batches]
    for place, name in ((0, "first"), (-1, "last")):
        parts = {c: [sum(counts[i : i + len(counts) // c]) for i in range(0, len(counts), len(counts) // c)]
                 for c in factors}  # fmt: skip
        if all(
            math.isclose(f, sum(counts) / (c * max(1, parts[c][place])), rel_tol=5e-3)
            for c, f in factors.items()
        ):
            return f"it is divided by the targets of the {name} micro-batch times their number"
    return "one micro-batch is right, so the denominator of a step is guessed, or taken from a part of it"


def _weighting(weights: Sequence[float], trial: Trial) -> tuple[list[str], str, str, str]:
    """Micro-batches count differently."""
    counts = [num_targets(part) for part in trial.micro_batches]
    shown = (
        f"its micro-batches of {counts} targets weigh {', '.join(f'{w:.3g}' for w in weights)} instead of 1"
    )
    levelled = [w * c / sum(counts) for w, c in zip(weights, counts, strict=True)]
    where = "gradient accumulation"
    if max(levelled) - min(levelled) < 0.02 * max(map(abs, levelled)):
        sums = math.isclose(levelled[0], 1, rel_tol=0.02)
        bugs = ["accum-not-divided", "mean-of-means-accum"] if sums else ["mean-of-means-accum"]
        share = levelled[0] * trial.cut
        if not sums and not math.isclose(share, 1, rel_tol=0.02):
            bugs = ["last-accum-group-underscaled", *bugs]
        return (bugs, where, f"{shown}: each micro-batch contributes its own mean",
                "divide the summed loss of each micro-batch by the number of targets of the whole step")  # fmt: skip
    lost = [i for i, w in enumerate(weights, 1) if abs(w) < 0.01]
    if lost and lost == list(range(1, trial.cut)):
        return (["zero-grad-each-micro"], f"zero_grad within {where}", f"{shown}: only the last one is left",
                "clear the gradients once per step, not per micro-batch")  # fmt: skip
    if lost:
        bugs = ["last-partial-dropped", "zero1-last-micro-leak"] if lost[-1] == trial.cut else ["accum-phase"]
        return (bugs, where, f"{shown}: number {', '.join(map(str, lost))} is lost",
                "let every micro-batch of the step into its gradient")  # fmt: skip
    return (["mean-of-means-accum", "denominator-unshifted", "clip-per-micro"], where, shown,
            "give every target of the step the same weight")  # fmt: skip


def _unexplained(trial: Trial, rest: float) -> tuple[list[str], str, str, str]:
    """No weighting of the micro-batches gives this gradient."""
    expected = mixture([1.0] * trial.cut, trial.parts)
    errors = {
        n: relative_error({n: trial.gradient[n]} if n in trial.gradient else {}, {n: expected[n]})
        for n in expected
    }
    worst = max(errors, key=lambda n: errors[n])
    text = f"no weighting of its micro-batches explains {rest:.1e} of it; it is furthest off in {worst}"
    rounded = all(
        torch.equal(g.bfloat16().float(), g) or torch.equal(g.half().float(), g)
        for g in trial.gradient.values()
    )
    if rounded and rest < 0.05:
        return (["zero2-ga-worse", "bf16-reduction"], "precision of gradient accumulation",
                f"{text}: all its values are those of a 16-bit type", "accumulate gradients in float32")  # fmt: skip
    return (["zero-grad-missing", "frozen-by-accident", "params-missing"], f"gradient of {worst}", text,
            "look for what else is added to, taken from or done to the gradient")  # fmt: skip


TURNED = 0.05  # 1 - cosine; an adaptive optimizer turns gradients near zero into whole steps of either sign


def by_movement(subject: Subject, rows: Rows) -> Finding:
    """The weights must move alike however the step is cut, three steps long (the first may have a rate of 0)."""
    moved: dict[int, dict[str, torch.Tensor]] = {}
    for cut in CUTS:
        training = start(subject, clip_norm=NO_LIMIT, seed=0)
        with no_randomness(training.module):
            taken = [watched_step(training, rows.split(len(rows) // cut)) for _ in range(3)]
        before, after = taken[0].before, taken[-1].after
        moved[cut] = {name: (after[name] - before[name]).float() for name in before}
    whole = moved[1]
    if norm(whole) == 0:
        raise NotApplicable("the weights do not move in three steps")
    sizes = {cut: norm(part) / norm(whole) for cut, part in moved.items()}
    turned = {cut: 1 - dot(part, whole) / max(norm(part) * norm(whole), 1e-30) for cut, part in moved.items()}
    worst = max(CUTS, key=lambda cut: max(turned[cut], abs(sizes[cut] - 1)))
    error = max(turned[worst], abs(sizes[worst] - 1))
    text = f"{worst} micro-batches move the weights {sizes[worst]:.4g} times as far as one, 1 - cos {turned[worst]:.2g}"
    if error <= TURNED:
        return passed(
            f"{text} (no optimizer: only movements were seen)", error, TURNED, unit="of the movement"
        )
    straight = turned[worst] <= TURNED
    bugs = ["accum-not-divided", "last-accum-group-underscaled"] if straight else ["mean-of-means-accum"]
    if not straight:
        bugs += ["zero-grad-each-micro", "last-partial-dropped", "accum-phase", "steps-vs-microsteps"]
    return failed(text, error, TURNED, unit="of the movement", bugs=bugs, component="gradient accumulation",
                  advice="divide the summed loss of each micro-batch by the targets of the whole step")  # fmt: skip
