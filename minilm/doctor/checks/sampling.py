"""Tokens are drawn from the distribution that temperature, top-k and top-p describe, anew for each row and seed.

Why: a temperature that is ignored or applied twice, a top-k that keeps every tie, a top-p that loses the token that
crosses the border, or one draw shared by all samples change what a model seems to be able to write.

How: the sampler alone, where it is handed over, on logits with known probabilities, 4,000 draws at once: temperature 0
and a tiny one give the argmax; top-k of equal logits keeps exactly k; top-p keeps exactly the fewest tokens that
reach p; frequencies at three temperatures lie within 8 standard deviations of theirs (a false alarm in less than
1e-9: the rarest token is expected 27 times); seeds repeat, and differ.

Cannot see: repetition penalties and other processors; subtle errors far down in the tail; what the generator hands to
the sampler (sampled_text does).

Sources: nanochat 2e17723 and its test of first-token diversity; litgpt 729 (more than k tokens kept on ties).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.subject import Subject

DRAWS = 4000
SIGMAS = 8.0
P = (0.5, 0.3, 0.15, 0.05)  # top-p 0.7 keeps two of them, wherever the border is drawn
ADVICE = "divide by the temperature (argmax where it is 0), keep k tokens by rank, then the fewest that reach top-p"

Problem = tuple[str, str]  # bug, what was seen


@check(group="evaluation", needs=("choose",), cost="12 calls of the sampler, no forward")
def sampling(subject: Subject) -> Finding:
    """The sampler alone, on logits with known probabilities."""
    generator = torch.Generator().manual_seed(0)
    mixed = 3 * torch.randn(64, 8, generator=generator)
    known = torch.tensor(P).log()[torch.tensor([2, 0, 3, 1])]  # not in the order of size
    problems: list[Problem] = [*_argmaxes(subject, mixed), *_kept(subject, known)]
    worst = 0.0
    for temperature in (1.0, 2.0, 0.5):
        off, problem = _frequencies(subject, known, temperature)
        worst = max(worst, off)
        problems += [problem] if problem is not None else []
    problems += _seeds(subject, known)
    text = f"argmaxes, kept sets and seeds are right; frequencies are at most {worst:.1f} standard deviations off"
    if not problems:
        return passed(text, worst, SIGMAS, unit="standard deviations")
    often = worst > SIGMAS
    return failed(
        "; ".join(says for _, says in problems[:3]),
        worst if often else float(len(problems)),
        SIGMAS if often else 1.0,
        unit="standard deviations" if often else "broken rules",
        bugs=list(dict.fromkeys(bug for bug, _ in problems)),
        component="sampler",
        advice=ADVICE,
    )


def _draw(subject: Subject, row: Tensor, **how: Any) -> Tensor:
    """Ids of many draws from one distribution."""
    chosen = subject.choose(row.expand(DRAWS, -1).clone(), **{"temperature": 1.0, "seed": 0, **how})
    return torch.as_tensor(chosen).flatten()


def _argmaxes(subject: Subject, logits: Tensor) -> list[Problem]:
    best = logits.argmax(-1)
    ways: list[tuple[str, str, Tensor, dict[str, Any]]] = [
        ("temp-zero", "temperature 0", logits, {"temperature": 0.0}),
        ("temp-zero", "temperature 0 with logits of 10,000", logits * 1e4, {"temperature": 0.0}),
        ("temp-zero", "temperature 1e-4", logits * 10, {"temperature": 1e-4}),
        ("topk-collision", "top-k 1", logits, {"temperature": 1.0, "top_k": 1}),
        ("topk-collision", "top-p 1e-6", logits, {"temperature": 1.0, "top_p": 1e-6}),
    ]
    found = []
    for bug, name, some, how in ways:
        wrong = int(
            (torch.as_tensor(subject.choose(some.clone(), **{"seed": 0, **how})).flatten() != best).sum()
        )
        if wrong:
            found.append((bug, f"with {name} {wrong} of {len(best)} choices are not the argmax"))
    return found


def _kept(subject: Subject, known: Tensor) -> list[Problem]:
    """Which ids are ever drawn."""
    order = known.argsort(descending=True).tolist()
    ways: list[tuple[str, Tensor, dict[str, Any], int | set[int]]] = [
        ("top-k 3 of 8 equal logits", torch.zeros(8), {"top_k": 3}, 3),
        ("top-k 2", known, {"top_k": 2}, set(order[:2])),
        ("top-p 0.7", known, {"top_p": 0.7}, set(order[:2])),
        ("top-p 0.9", known, {"top_p": 0.9}, set(order[:3])),
        ("top-p 1", known, {"top_p": 1.0}, set(order)),
        ("no limit", known, {}, set(order)),
    ]
    found = []
    for name, row, how, expected in ways:
        drawn = set(_draw(subject, row, **how).tolist())
        if isinstance(expected, int):
            if len(drawn) != expected:
                found.append(("topk-collision", f"{name}: {len(drawn)} different ids are drawn"))
        elif drawn != expected:
            found.append(
                ("topk-collision", f"{name}: ids {sorted(drawn)} are drawn, {sorted(expected)} expected")
            )
    return found


def _frequencies(subject: Subject, known: Tensor, temperature: float) -> tuple[float, Problem | None]:
    counts = torch.bincount(_draw(subject, known, temperature=temperature), minlength=len(known)).double()
    if float(counts.max()) == DRAWS:
        return math.inf, ("batch-first-token-shared", f"all {DRAWS} rows drew the same token")

    def sigmas(p: Tensor) -> float:
        p = p.double()
        return float(((counts - DRAWS * p) / (DRAWS * p * (1 - p)).sqrt()).abs().max())

    off = sigmas((known / temperature).softmax(-1))
    if off <= SIGMAS:
        return off, None
    others = {"1, whatever is asked": 1.0, f"{1 / temperature:g}, its inverse": 1 / temperature,
              f"{temperature**2:g}, its square": temperature**2}  # fmt: skip
    like = [name for name, t in others.items() if sigmas((known / t).softmax(-1)) <= SIGMAS]
    says = f"frequencies at temperature {temperature:g} are {off:.0f} standard deviations off"
    return off, ("temp-zero", says + (f": they are those of temperature {like[0]}" if like else ""))


def _seeds(subject: Subject, known: Tensor) -> list[Problem]:
    one, again, other = (_draw(subject, known, seed=seed) for seed in (5, 5, 6))
    found = []
    if not torch.equal(one, again):
        found.append(("seed-not-applied", "the same seed draws other tokens"))
    if torch.equal(one, other):
        found.append(("seed-not-applied", "another seed draws the same tokens"))
    return found


# ---------------------------------------------------------------- planted


class OrOne(specimens.Generator):
    """A temperature of 0 is taken for one that is not given."""

    def choose(self, logits: Tensor, temperature: float, *rest: Any) -> Tensor:
        return super().choose(logits, temperature or 1.0, *rest)


class WithoutCrossing(specimens.Generator):
    """Top-p without the token that crosses the border, so that none may be left."""

    def probabilities(
        self, logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
    ) -> Tensor:
        p = super().probabilities(logits, temperature, top_k, None)
        if top_p is not None and top_p < 1:
            ordered, index = p.sort(descending=True)
            keep = torch.zeros_like(p, dtype=torch.bool).scatter(-1, index, ordered.cumsum(-1) <= top_p)
            p = torch.where(keep, p, 1e-9)
        return p / p.sum(-1, keepdim=True)


class Shared(specimens.Generator):
    """Drawn once for all rows."""

    def choose(self, logits: Tensor, *how: Any) -> Tensor:
        return (
            super().choose(logits[:1], *how).expand(len(logits)) if how[0] else super().choose(logits, *how)
        )


class Seedless(specimens.Generator):
    """The seed is not looked at."""

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(0)


@sampling.plant("temp-zero", component="sampler", what="temperature or 1.0")
def _() -> Subject:
    return specimens.subject(generator=OrOne)


@sampling.plant("topk-collision", component="sampler", what="top-p without the token that crosses the border")
def _() -> Subject:
    return specimens.subject(generator=WithoutCrossing)


@sampling.plant("batch-first-token-shared", component="sampler", what="drawn once for all rows")
def _() -> Subject:
    return specimens.subject(generator=Shared)


@sampling.plant("seed-not-applied", component="sampler")
def _() -> Subject:
    return specimens.subject(generator=Seedless)


@sampling.plant("topk-collision", component="sampler", what="a threshold by value keeps every tie")
def _() -> Subject:
    class Threshold(specimens.Generator):
        def probabilities(
            self, logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
        ) -> Tensor:
            if top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
            return super().probabilities(logits, temperature, None, top_p)

    return specimens.subject(generator=Threshold)


@sampling.plant("temp-zero", component="sampler", what="a temperature is never below 0.5")
def _() -> Subject:
    class Floor(specimens.Generator):
        def choose(self, logits: Tensor, temperature: float, *rest: Any) -> Tensor:
            return super().choose(logits, max(temperature, 0.5), *rest)

    return specimens.subject(generator=Floor)
