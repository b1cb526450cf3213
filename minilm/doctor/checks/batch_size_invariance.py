"""Evaluation does not depend on how its rows are cut into batches, and perplexity is exp of the mean over tokens.

Why: a mean of the means of batches weights the tokens of short texts more; evaluating with another batch size, or on
another number of GPUs, then gives another loss for the same model. A mean of exponentials is larger than the
exponential of the mean, for the same model and data.

How: seven rows of very unequal length are evaluated in batches of 1, 2, 3 and 7, in another order, and with a batch
in which nothing counts among them. The number must stay, up to float32 rounding, and be the double loop's. Perplexity
must be exp of it; wrong ones are compared with means of exponentials over batches, rows and tokens, and other bases.

Cannot see: what happens between several processes (the distributed checks do).

Sources: K2 of the catalogue; the evaluation loop of transformers' Trainer, whose loss depends on the batch size;
the perplexity metric of the evaluate library, a mean over texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.examples import logits_of, uneven
from minilm.doctor.checks.formulas import LOSS_NOISE, Places, close, off_by, right
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import num_targets, quiet
from minilm.doctor.subject import Rows, Subject

ROWS = 7


@check(group="evaluation", needs=("evaluate", "vocab_size"), cost="16 forwards of at most 7 x 12 tokens")
def batch_size_invariance(subject: Subject) -> Finding:
    """evaluate(rows in batches of n) is the same for every n, in any order, with an empty batch among them."""
    with quiet(subject), torch.no_grad():
        rows = uneven(subject, ROWS)
        losses = [right(logits_of(subject, part), part) for part in rows.split(1)]
        ways = {f"batches of {n}": rows.split(n) for n in (ROWS, 1, 2, 3)}
        ways["batches of 2 in another order"] = rows.take([6, 1, 4, 0, 5, 2, 3]).split(2)
        nothing = Rows(rows.tokens, rows.segments, torch.zeros_like(rows.learn)).take([0, 1])
        ways["a batch without targets among them"] = [rows.take([0, 1, 2]), nothing, rows.take([3, 4, 5, 6])]
        said = {name: float(subject.evaluate(batches)) for name, batches in ways.items()}
    counts = [num_targets(part) for part in rows.split(1)]
    expected = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    worst = max(said, key=lambda name: off_by(said[name], expected))
    off = off_by(said[worst], expected)
    seen = f"in {worst} evaluation says {said[worst]:.6g}, over all tokens the mean is {expected:.6g}"
    if off <= LOSS_NOISE:
        return passed(f"{seen}; {len(said)} ways agree to {off:.1e}", off, LOSS_NOISE, unit="of the loss")
    bug, why = _why(said, losses, counts)
    return failed(
        f"{seen}{': ' if why else ''}{why}",
        off,
        LOSS_NOISE,
        unit="of the loss",
        bugs=list(
            dict.fromkeys([bug, "ppl-mean-of-batches", "eval-state-not-reset", "last-partial-dropped"])
        ),
        component="evaluation",
        advice="add up nats and targets over all batches (and processes), and divide once at the end",
    )


def _why(said: dict[str, float], losses: Sequence[float], counts: Sequence[int]) -> tuple[str, str]:
    """Which mistake gives all the numbers of the batches of 1, 2, 3."""

    def mean(which: Sequence[int]) -> float:
        return sum(losses[i] * counts[i] for i in which) / max(1, sum(counts[i] for i in which))

    def batches(size: int) -> list[list[int]]:
        return [list(range(i, min(i + size, ROWS))) for i in range(0, ROWS, size)]

    sizes = (1, 2, 3, ROWS)
    whole = {n: [b for b in batches(n) if len(b) == n] for n in sizes}
    tried = {
        ("ppl-mean-of-batches", "it is the mean of the means of the batches"): {
            n: sum(map(mean, batches(n))) / len(batches(n)) for n in sizes
        },
        ("ppl-mean-of-batches", "it is the mean of the means of the batches, weighted by rows"): {
            n: sum(mean(b) * len(b) for b in batches(n)) / ROWS for n in sizes
        },
        ("last-partial-dropped", "the last batch, which is not full, is left out"): {
            n: mean([i for b in whole[n] for i in b]) for n in sizes
        },
        ("eval-state-not-reset", "only the first batch is evaluated"): {
            n: mean(batches(n)[0]) for n in sizes
        },
        ("eval-state-not-reset", "only the last batch is evaluated"): {
            n: mean(batches(n)[-1]) for n in sizes
        },
    }
    for (bug, why), values in tried.items():
        if all(close(said[f"batches of {n}"], values[n]) for n in sizes):
            return bug, why
    empty = "a batch without targets among them"
    if not math.isfinite(said[empty]):
        return "all-ignored-nan", "a batch without targets makes it no number"
    return "ppl-mean-of-batches", ""


@check(group="evaluation", needs=("perplexity", "vocab_size"), cost="8 forwards of at most 7 x 12 tokens")
def perplexity(subject: Subject) -> Finding:
    """perplexity(batches) == exp(nats of all targets / their number)."""
    with quiet(subject), torch.no_grad():
        batches = uneven(subject, ROWS).split(3)
        measured = float(subject.perplexity(batches))
        places = [Places(logits_of(subject, rows), rows, 0) for rows in batches]
    nats = torch.cat([p.nats(1)[p.targets] for p in places])
    expected = float(nats.mean().exp())
    off = abs(measured - expected) / expected if math.isfinite(measured) else math.inf
    limit = LOSS_NOISE * max(1.0, float(nats.mean()))
    seen = f"perplexity {measured:.6g}, exp of the mean over {len(nats)} tokens {expected:.6g}"
    if off <= limit:
        return passed(seen, off, limit, unit="of the perplexity")
    why = [
        (bug, says)
        for bug, says, value in _other_perplexities(places, nats)
        if abs(measured / value - 1) < limit
    ]
    return failed(
        seen + (f": it is {why[0][1]}" if why else ""),
        off,
        limit,
        unit="of the perplexity",
        bugs=list(dict.fromkeys([*(bug for bug, _ in why), "ppl-mean-of-exp", "ppl-mean-of-batches"])),
        component="perplexity",
        advice="exponentiate once, the mean over all tokens",
    )


def _other_perplexities(places: Sequence[Places], nats: Tensor) -> list[tuple[str, str, float]]:
    by_batch = torch.stack([p.nats(1)[p.targets].mean() for p in places])
    by_row = torch.stack([p.nats(1)[b][p.targets[b]].mean() for p in places for b in range(len(p.rows))])
    return [
        ("ppl-mean-of-exp", "the mean of the perplexities of the batches", float(by_batch.exp().mean())),
        ("ppl-mean-of-exp", "the mean of the perplexities of the rows", float(by_row.exp().mean())),
        ("ppl-mean-of-exp", "the mean of the perplexities of the tokens", float(nats.exp().mean())),
        ("ppl-mean-of-batches", "exp of the mean of the means of the batches", float(by_batch.mean().exp())),
        ("ppl-mean-of-batches", "exp of the mean of the means of the rows", float(by_row.mean().exp())),
        ("ppl-mean-of-exp", "2 to the power of the mean in nats", 2 ** float(nats.mean())),
    ]


# ---------------------------------------------------------------- planted


class _MeanOfMeans(specimens.Evaluation):
    def mean(self, nats: list[float], counts: list[int]) -> float:
        means = [n / max(1, c) for n, c in zip(nats, counts, strict=True)]
        return sum(means) / len(means)


@batch_size_invariance.plant("ppl-mean-of-batches", component="evaluation")
def _() -> Subject:
    return specimens.subject(evaluation=_MeanOfMeans)


@batch_size_invariance.plant("last-partial-dropped", component="evaluation")
def _() -> Subject:
    class FullOnly(specimens.Evaluation):
        def evaluate(self, batches: Sequence[Rows]) -> float:
            return super().evaluate([rows for rows in batches if len(rows) == len(batches[0])])

    return specimens.subject(evaluation=FullOnly)


@batch_size_invariance.plant("all-ignored-nan", component="evaluation", what="a batch without targets")
def _() -> Subject:
    class Dividing(specimens.Evaluation):
        def mean(self, nats: list[float], counts: list[int]) -> float:
            means = [n / c if c else math.nan for n, c in zip(nats, counts, strict=True)]
            return sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts)

    return specimens.subject(evaluation=Dividing)


@perplexity.plant("ppl-mean-of-exp", component="perplexity", what="over batches")
def _() -> Subject:
    class MeanOfExp(specimens.Evaluation):
        def perplexity(self, batches: Sequence[Rows]) -> float:
            return sum(math.exp(self.evaluate([rows])) for rows in batches) / len(batches)

    return specimens.subject(evaluation=MeanOfExp)


@perplexity.plant("ppl-mean-of-exp", component="perplexity", what="over texts")
def _() -> Subject:
    class MeanOfExp(specimens.Evaluation):
        def perplexity(self, batches: Sequence[Rows]) -> float:
            texts = [row for rows in batches for row in rows.split(1)]
            return sum(math.exp(self.evaluate([row])) for row in texts) / len(texts)

    return specimens.subject(evaluation=MeanOfExp)


@perplexity.plant("ppl-mean-of-batches", component="perplexity")
def _() -> Subject:
    return specimens.subject(evaluation=_MeanOfMeans)
