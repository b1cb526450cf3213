"""Losses restated in float64, right ones and wrong ones: a wrong number is named by the mistake that makes it.

Not a check. `explained` says which mistake gives the measured numbers on all rows of `examples.cases`, in which the
known mistakes differ from each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minilm.doctor.checks.examples import cases, logits_of, marks
from minilm.doctor.core import NotApplicable
from minilm.doctor.probes import reference_nats
from minilm.doctor.subject import Rows, Subject

# A float32 loss over logits that come by another path (a mask, another length) agrees to 1e-6 of its size; one in
# bfloat16 is off by 1e-3 and more.
LOSS_NOISE = 2e-5


class Mistake(NamedTuple):
    """A wrong loss: (summed nats, divisor) of logits, rows and the id that ends documents."""

    bug: str
    says: str
    value: Callable[[Places], tuple[Tensor, float]]


def right(logits: Tensor, rows: Rows) -> float:
    """Mean nats per target by a float64 double loop."""
    nats, count = reference_nats(logits, rows)
    return nats / max(count, 1)


def measured_on(
    subject: Subject, ask: Callable[[Rows], float]
) -> tuple[list[float], list[Places], list[str]]:
    """What `ask` says of each kind of rows, the rows with their logits, the kinds. A kind that the subject does not
    take is left out; whole rows must be among them."""
    measured, places, names = [], [], []
    for number, case in enumerate(cases(subject)):
        try:
            value = ask(case.rows)
            logits = logits_of(subject, case.rows)
        except NotApplicable:
            if number == 0:
                raise
            continue
        measured.append(value)
        places.append(Places(logits, case.rows, marks(subject)[1]))
        names.append(case.name)
    return measured, places, names


class Places:
    """Rows with their logits, looked at from position i: what stands there, what follows."""

    def __init__(self, logits: Tensor, rows: Rows, end: int) -> None:
        logits = logits.detach().double().cpu()
        self.logits, self.rows, self.end = logits, rows, end
        self.log_p = logits.log_softmax(-1)
        self.real = rows.segments > 0
        self.own = self.real & rows.learn
        first = torch.zeros_like(self.own)
        first[:, 1:] = rows.segments[:, 1:] != rows.segments[:, :-1]
        self.labels = self.own & ~first  # what an unshifted loss is told to learn
        self.inner = torch.ones_like(self.own)
        self.inner[:, -1] = False  # has a token after it
        self.same = self.real & (rows.segments == self.ahead(rows.segments, 1))
        self.targets = self.same & self.ahead(rows.learn, 1)

    def ahead(self, x: Tensor, by: int) -> Tensor:
        """x[:, i + by] at i; 0 (false) beyond the row."""
        moved = torch.roll(x, -by, 1)
        if by > 0:
            moved[:, -by:] = 0
        elif by < 0:
            moved[:, :-by] = 0
        return moved

    def nats(self, by: int) -> Tensor:
        """[B, T] nats of the token `by` positions ahead."""
        return -self.log_p.gather(-1, self.ahead(self.rows.tokens, by).unsqueeze(-1)).squeeze(-1)

    def mean(self, by: int, counted: Tensor, divisor: float | None = None) -> tuple[Tensor, float]:
        """Sum over the counted places, and what it is divided by (default: how many they are)."""
        return self.nats(by)[counted].sum(), float(counted.sum()) if divisor is None else divisor


def _flat(p: Places) -> tuple[Tensor, float]:
    log_p, ids = p.log_p.flatten(0, 1), p.rows.tokens.flatten()
    keep = p.labels.flatten()[1:]
    nats = -log_p[:-1].gather(1, ids[1:].unsqueeze(1)).squeeze(1)
    return nats[keep].sum(), float(keep.sum())


def _row_means(p: Places) -> tuple[Tensor, float]:
    counted, nats = p.targets, p.nats(1)
    means = [n[c].sum() / c.sum() for n, c in zip(nats, counted, strict=True) if c.any()]
    return torch.stack(means).sum() if means else nats.sum() * 0, float(len(means))


def _without_last(p: Places) -> Tensor:
    return p.targets & p.ahead(p.targets, 1)


MISTAKES = [
    Mistake("no-shift", "each position is held against the token that it was given", lambda p: p.mean(0, p.own)),
    Mistake("no-shift", "each position is held against the token that it was given, the last position left out",
            lambda p: p.mean(0, p.own & p.inner)),
    Mistake("no-shift", "each position is held against the token that it was given, the first one left out",
            lambda p: p.mean(0, p.own & (p.ahead(p.rows.segments, -1) > 0))),
    Mistake("no-shift", "tokens are not shifted, only their mask", lambda p: p.mean(0, p.targets)),
    Mistake("no-shift", "targets are held against the logits of their own position (cut one off)",
            lambda p: p.mean(0, p.ahead(p.targets, -1))),
    Mistake("no-shift", "labels are not shifted", lambda p: p.mean(0, p.labels)),
    Mistake("no-shift", "each position is held against the token BEFORE it (shifted the wrong way)",
            lambda p: p.mean(-1, p.own & p.ahead(p.real, -1) & (p.rows.segments == p.ahead(p.rows.segments, -1)))),
    Mistake("double-shift", "each position is held against the token after the next",
            lambda p: p.mean(2, p.ahead(p.own, 2))),
    Mistake("double-shift", "each position is held against the token after the next (labels shifted beforehand)",
            lambda p: p.mean(2, p.ahead(p.targets, 1))),
    Mistake("double-shift", "each position is held against the token after the next, inside its document",
            lambda p: p.mean(2, p.ahead(p.own, 2) & (p.rows.segments == p.ahead(p.rows.segments, 2)))),
    Mistake("double-shift", "each position is held against the token after the next, both of them targets",
            lambda p: p.mean(2, p.targets & p.ahead(p.targets, 1))),
    Mistake("double-shift", "nats of the token after the next, divided by the number of targets",
            lambda p: p.mean(2, p.ahead(p.targets, 1), float(p.targets.sum()))),
    Mistake("flat-view-leak", "rows are joined before the shift: the end of a row predicts the start of the next",
            _flat),
    Mistake("denominator-unshifted", "the divisor counts labels before the shift",
            lambda p: p.mean(1, p.targets, float(p.own.sum()))),
    Mistake("denominator-unshifted", "the divisor counts labels before the shift",
            lambda p: p.mean(1, p.targets, float(p.labels.sum()))),
    Mistake("pack-label-across-docs", "the end of a document predicts the start of the next one in its row",
            lambda p: p.mean(1, p.real & p.ahead(p.own, 1))),
    Mistake("eos-masked-pad-eq-eos", "targets with the id that ends documents are left out",
            lambda p: p.mean(1, p.targets & (p.ahead(p.rows.tokens, 1) != p.end))),
    Mistake("pad-in-loss", "padding is a target", lambda p: p.mean(1, p.inner & p.ahead(p.rows.learn | ~p.real, 1))),
    Mistake("pad-in-loss", "every position is counted, padding and prompts included", lambda p: p.mean(1, p.inner)),
    Mistake("pad-in-loss", "the last token before padding is asked to predict padding",
            lambda p: p.mean(1, p.inner & p.real & p.ahead(p.rows.learn | ~p.real, 1))),
    Mistake("pad-in-loss", "the divisor counts padding, and all that is not learnt",
            lambda p: p.mean(1, p.targets, float(p.inner.sum()))),
    Mistake("pad-in-loss", "the divisor counts every token of the rows",
            lambda p: p.mean(1, p.targets, float(p.own.numel()))),
    Mistake("mask-from-attention", "prompts are counted: the mask knows of padding alone",
            lambda p: p.mean(1, p.same)),
    Mistake("mask-from-attention", "the mask is not shifted with the tokens",
            lambda p: p.mean(1, p.inner & p.own & p.same)),
    Mistake("mask-from-attention", "the mask is not shifted with the tokens", lambda p: p.mean(1, p.inner & p.own)),
    Mistake("mask-from-attention", "the divisor counts prompts",
            lambda p: p.mean(1, p.targets, float(p.same.sum()))),
    Mistake("mean-of-means-accum", "each row is averaged by itself, whatever its number of targets", _row_means),
    Mistake("logged-loss-scaled", "the nats are summed, not averaged", lambda p: p.mean(1, p.targets, 1.0)),
    Mistake("eval-slice-off-by-one", "the last target of each document is left out",
            lambda p: p.mean(1, _without_last(p))),
]  # fmt: skip


def close(a: float, b: float, limit: float = LOSS_NOISE) -> bool:
    """Are two losses equal, up to `limit` of their size (absolute below 1)?"""
    return abs(a - b) <= limit * max(1.0, abs(b))


def off_by(measured: float, expected: float) -> float:
    """The difference in units of the expected loss (absolute below 1); inf where it is not finite."""
    if not math.isfinite(measured):
        return math.inf
    return abs(measured - expected) / max(1.0, abs(expected))


def explained(measured: Sequence[float], places: Sequence[Places]) -> list[tuple[str, str]]:
    """(bug, what it does) of each mistake that gives the measured losses on all of these rows."""
    found = []
    for mistake in MISTAKES:
        values = [_quotient(*mistake.value(p)) for p in places]
        if all(close(m, v) for m, v in zip(measured, values, strict=True)):
            found.append((mistake.bug, mistake.says))
    return found or _added(measured, places) or _scaled(measured, places)


def smoothing(measured: Sequence[float], places: Sequence[Places]) -> float | None:
    """The label smoothing that makes the right loss the measured one on all rows; None if there is none."""
    return _fitted(measured, [_right(p) for p in places], [_uniform(p, p.targets) for p in places])


def _added(measured: Sequence[float], places: Sequence[Places]) -> list[tuple[str, str]]:
    """A z-loss inside, or label smoothing over the wrong places: one unknown factor, the same on all rows."""
    base = [_right(p) for p in places]
    squares = [
        _quotient(p.logits.logsumexp(-1).square()[p.targets].sum(), float(p.targets.sum())) for p in places
    ]
    everywhere = [_quotient(p.logits.logsumexp(-1).square().sum(), float(p.own.numel())) for p in places]
    for extra in (squares, everywhere):
        if (factor := _factor([m - b for m, b in zip(measured, base, strict=True)], extra)) is not None:
            return [("zloss-in-ce", f"{factor:.2g} times the squared log of the normaliser is part of it")]
    for counted, divisor in itertools.product((0, 1), repeat=2):
        spread = []
        for p in places:
            where = p.inner if counted else p.inner & p.ahead(p.real, 1)
            spread.append(_uniform(p, where, float(p.targets.sum()) if divisor else None))
        if (eps := _fitted(measured, base, spread)) is not None:
            return [("label-smoothing-on-ignore", f"label smoothing of {eps:.2g} also at ignored positions")]
    for number in range(6):
        shifted, spread = [], []
        for p in places:
            by, where = _misplaced(p)[number]
            shifted.append(_quotient(*p.mean(by, where)))
            spread.append(_uniform(p, where))
        if (eps := _fitted(measured, shifted, spread)) is not None:
            return [
                ("shift-lost-under-label-smoothing", f"label smoothing of {eps:.2g}, tokens shifted by {by}")
            ]
    return []


def _misplaced(p: Places) -> list[tuple[int, Tensor]]:
    """Shifts other than one, each with the places that would be counted."""
    twice = [p.ahead(p.own, 2), p.ahead(p.targets, 1)]
    return [(0, p.own), (0, p.labels), (0, p.own & p.inner), (0, p.targets), *((2, where) for where in twice)]


def _scaled(measured: Sequence[float], places: Sequence[Places]) -> list[tuple[str, str]]:
    base = [_right(p) for p in places]
    factor = _factor(measured, base)
    if factor is not None:
        return [("logged-loss-scaled", f"it is {factor:.6g} times the mean in nats per target")]
    off = max(off_by(m, b) for m, b in zip(measured, base, strict=True))
    if off >= 0.01:
        return []
    if all(map(_has_16_bits, measured)):
        return [("loss-in-bf16", f"it is rounded to 16 bits, and off by up to {off:.1e}")]
    says = f"it is off by at most {off:.1e}, like rounding to 16 bits on the way, or a small unknown term"
    return [("loss-in-bf16", says), ("zloss-in-ce", says)]


def _has_16_bits(value: float) -> bool:
    exact = torch.tensor(value, dtype=torch.float64)
    return bool((exact == exact.bfloat16()) | (exact == exact.half()))


def _right(p: Places) -> float:
    return _quotient(*p.mean(1, p.targets))


def _uniform(p: Places, counted: Tensor, divisor: float | None = None) -> float:
    """Nats of the uniform distribution, averaged over places."""
    return _quotient(-p.log_p.mean(-1)[counted].sum(), divisor or float(counted.sum()))


def _quotient(nats: Tensor, divisor: float) -> float:
    return float(nats) / max(divisor, 1.0)


def _fitted(measured: Sequence[float], base: Sequence[float], spread: Sequence[float]) -> float | None:
    """eps with measured = (1 - eps) base + eps spread on all rows."""
    eps = _factor(
        [m - b for m, b in zip(measured, base, strict=True)],
        [s - b for s, b in zip(spread, base, strict=True)],
    )
    return eps if eps is not None and 0 < eps < 1 else None


def _factor(measured: Sequence[float], base: Sequence[float]) -> float | None:
    """f with measured = f base on all rows (least squares, then held against each); None if there is none, or 0."""
    square = sum(b * b for b in base)
    if len(base) < 2 or not all(map(math.isfinite, measured)) or square == 0:
        return None
    factor = sum(m * b for m, b in zip(measured, base, strict=True)) / square
    fits = all(close(m, factor * b) for m, b in zip(measured, base, strict=True))
    return factor if fits and abs(factor) > LOSS_NOISE else None
