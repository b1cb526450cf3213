"""The generator draws its tokens as asked: anew for each sample and seed, and the argmax where there is no choice.

Why: one draw shared by all samples of a prompt, a seed that is not looked at, or a temperature that never reaches the
sampler make every number about generated text wrong. The text looks as good as ever.

How: 256 samples of one prompt, one token each, at a temperature at which no token has more than 0.3 of the
probability: they do not share it (by chance: 1e-130), a seed repeats it, another seed does not. Temperature 0, top-k 1
and a tiny top-p write one and the same token. How many draws are among the likeliest ids that make up half of the
mass is binomial, with a limit of 1e-9 on either tail.

Cannot see: the distribution in detail (sampling does, where the sampler is handed over), and repetition penalties.

Sources: nanochat's test of first-token diversity, and 2e17723; litgpt 729.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.sampling import ADVICE, OrOne, Problem, Seedless, Shared, WithoutCrossing
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet, tokens_for
from minilm.doctor.subject import Subject

SAMPLES = 256
UNLIKELY = 1e-9


@check(
    group="evaluation", needs=("generate", "forward", "vocab_size"), cost="7 generations of 256 single tokens"
)
def sampled_text(subject: Subject) -> Finding:
    """The generator as a whole: samples of one prompt, drawn with a temperature at which no token is likely."""
    with quiet(subject, redraw=0.3), torch.no_grad():  # spread logits: then a temperature matters
        prompt = tokens_for(subject, 1, 3)[0].tolist()
        logits = subject.forward(torch.tensor([prompt]))[0, -1].double()
        temperature = 2.0
        while float((logits / temperature).softmax(-1).max()) > 0.3 and temperature < 1e4:
            temperature *= 2
        p = (logits / temperature).softmax(-1)
        if float(p.max()) > 0.3:
            raise NotApplicable("one token stays likely at any temperature")

        def draw(**how: Any) -> list[int]:
            texts = subject.generate([prompt] * SAMPLES, 1, **{"temperature": temperature, "seed": 1, **how})
            return [int(text[0]) for text in texts]

        one, again, other = draw(), draw(), draw(seed=2)
        cold, narrow, tight = draw(temperature=0.0), draw(top_k=1), draw(top_p=1e-6)
    if {*one, *other, *cold} <= set(subject.special_ids):
        raise NotApplicable("every text is a special id: the settings force it")
    ties = set((logits >= logits.max() - 1e-3 * logits.std()).nonzero().flatten().tolist())
    problems, same = _drawn(one, again, other, cold, narrow, tight, ties)
    tail, says = (
        _likelier_half(p, one) if same else (1.0, "not compared: its argmax is not the forward pass's")
    )
    if tail < UNLIKELY and not problems:
        problems.append(("temp-zero", says))
    if not problems:
        return passed(f"{SAMPLES} samples of one prompt at temperature {temperature:g}: {says}", tail, UNLIKELY,
                      unit="probability")  # fmt: skip
    return failed(
        "; ".join(text for _, text in problems),
        tail if tail < UNLIKELY else float(len(problems)),
        UNLIKELY if tail < UNLIKELY else 1.0,
        unit="probability" if tail < UNLIKELY else "broken rules",
        bugs=list(dict.fromkeys(bug for bug, _ in problems)),
        component="sampler",
        advice=f"{ADVICE}; draw for each row by itself",
    )


def _drawn(
    one: list[int],
    again: list[int],
    other: list[int],
    cold: list[int],
    narrow: list[int],
    tight: list[int],
    ties: set[int],
) -> tuple[list[Problem], bool]:
    """What is wrong with the draws, and: is the token at temperature 0 that of the forward pass."""
    problems: list[Problem] = []
    if len(set(one)) == 1:
        problems.append(("batch-first-token-shared", f"{SAMPLES} samples share their first token"))
    if one != again:
        problems.append(("seed-not-applied", "the same seed writes another text"))
    if one == other:
        problems.append(("seed-not-applied", "another seed writes the same text"))
    best = set(cold)
    same = best <= ties
    if not same and len(best) > 1:
        problems.append(("temp-zero", f"temperature 0 writes {len(best)} different tokens"))
    for name, drawn in (("top-k 1", narrow), ("top-p 1e-6", tight)):
        if (same or len(best) == 1) and not set(drawn) <= best | (ties if same else set()):
            problems.append(("topk-collision", f"{name} writes other tokens than temperature 0 does"))
    return problems, same


def _likelier_half(p: Tensor, drawn: list[int]) -> tuple[float, str]:
    """The smaller binomial tail of how many draws are among the likeliest ids that make up half of the mass."""
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.5).sum()) + 1]
    share, hits = min(float(p[kept].sum()), 1 - 1e-12), sum(token in set(kept.tolist()) for token in drawn)
    n = len(drawn)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        + k * math.log(share) + (n - k) * math.log1p(-share)
        for k in range(n + 1)
    ]  # fmt: skip
    chances = [math.exp(x) for x in logs]
    tail = min(1.0, sum(chances[: hits + 1]), sum(chances[hits:]))
    return (
        tail,
        f"{hits} are of the {len(kept)} likeliest ids, {n * share:.0f} expected (a chance of {tail:.1e})",
    )


# ---------------------------------------------------------------- planted


@sampled_text.plant("temp-zero", component="sampler", what="temperature or 1.0")
def _() -> Subject:
    return specimens.subject(generator=OrOne)


@sampled_text.plant(
    "topk-collision", component="sampler", what="top-p without the token that crosses the border"
)
def _() -> Subject:
    return specimens.subject(generator=WithoutCrossing)


@sampled_text.plant("batch-first-token-shared", component="sampler", what="drawn once for all rows")
def _() -> Subject:
    return specimens.subject(generator=Shared)


@sampled_text.plant("seed-not-applied", component="sampler")
def _() -> Subject:
    return specimens.subject(generator=Seedless)


@sampled_text.plant("temp-zero", component="sampler", what="the temperature is not handed on, unless it is 0")
def _() -> Subject:
    class Lukewarm(specimens.Generator):
        def choose(self, logits: Tensor, temperature: float, *rest: Any) -> Tensor:
            return super().choose(logits, min(temperature, 1.0), *rest)

    return specimens.subject(generator=Lukewarm)


@sampled_text.healthy("a vocabulary of 600 ids")
def _() -> Subject:
    return specimens.subject(size={"vocab_size": 600})
