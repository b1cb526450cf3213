"""Text at temperature 0 is the argmax of the whole forward pass, step by step.

Why: a generator that takes the logits of the wrong position, or feeds the prompt again at each step, writes plausible
nonsense from a good model. The loss knows nothing of it.

How: prompt and new tokens go through the whole forward pass once; each new token must have the largest logit at its
place, up to a near tie of 1e-3 of the logits' deviation (healthy noise is below 5e-6). A wrong one is compared with
the choices of other positions, of the prompt alone, of a part of it, and of the last token alone.

Cannot see: sampling (sampling does), and text far beyond the probe.

Sources: K7 of the catalogue; transformers pull request 48289 (greedy text with and without cache, ties handled).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet, tokens_for
from minilm.doctor.subject import Subject

TIE = 1e-3  # of the logits' deviation
NEW = 8
SPREAD = 0.2  # deviation of the weights: at 0.1 a step at the next position misses one text in ten
POSITION = "wrong-logit-position"
ADVICE = (
    "take the logits of the last real token of each row, append the choice, and feed it at the next position"
)


@check(
    group="evaluation",
    needs=("generate", "forward", "vocab_size"),
    cost="2 generations of 8 tokens, 3 forwards",
)
def greedy(subject: Subject) -> Finding:
    """Each new token at temperature 0 is the argmax of the whole forward pass there; whatever the seed."""
    with quiet(subject, redraw=SPREAD), torch.no_grad():
        prompts = tokens_for(subject, 3, room_for(subject, 5)).tolist()
        written = texts_of(subject, subject.generate(prompts, NEW, temperature=0.0, seed=0))
        again = texts_of(subject, subject.generate(prompts, NEW, temperature=0.0, seed=1))
        gaps = [gaps_below(subject, p, w) for p, w in zip(prompts, written, strict=True)]
        worst = max((g for gap in gaps for g in gap), default=None)
        if worst is None:
            raise NotApplicable("nothing was written")
        seen = f"{sum(map(len, gaps))} new tokens are at most {worst:.2g} std below the largest logit"
        if worst <= TIE and written == again:
            return passed(seen, worst, TIE, unit="logit std")
        if written != again:
            drawn = texts_of(subject, subject.generate(prompts, NEW, temperature=0.0, seed=0)) == written
            bugs = (
                ["temp-zero", "eval-state-not-reset"]
                if drawn
                else ["eval-state-not-reset", "kv-cache-mismatch"]
            )
            why = f"{'another seed' if drawn else 'the same call'} writes another text"
        else:
            wrong = [r for r, gap in enumerate(gaps) if max(gap, default=0) > TIE]
            bugs, why = _why(subject, *([some[r] for r in wrong] for some in (prompts, written, gaps)))
    return failed(
        f"{seen}: {why}", worst, TIE, unit="logit std", bugs=bugs,
        component="sampler" if bugs[0] == "temp-zero" else "generator", advice=ADVICE,
    )  # fmt: skip


def room_for(subject: Subject, wanted: int) -> int:
    """The longest prompt up to `wanted` beside which the new tokens have room."""
    length = wanted if subject.max_length is None else min(wanted, subject.max_length - NEW)
    if length < 2:
        raise NotApplicable(
            f"a context of {subject.max_length} tokens has no room for a prompt and {NEW} new ones"
        )
    return length


def texts_of(subject: Subject, output: Sequence[Any]) -> list[list[int]]:
    """What a generator returned, as lists of integers, up to the first special id: many stop there, and fill up."""
    texts = []
    for row in output:
        ids = [int(token) for token in row]
        ends = [i for i, token in enumerate(ids) if token in subject.special_ids]
        texts.append(ids[: ends[0] + 1] if ends else ids)
    return texts


def gaps_below(subject: Subject, prompt: Sequence[int], new: Sequence[int]) -> list[float]:
    """How far each new token's logit is below the largest at its place, in units of the logits' deviation."""
    assert subject.forward is not None and subject.vocab_size is not None
    if any(not 0 <= token < subject.vocab_size for token in new):
        return [float("inf")]
    if not new:
        return []
    logits = subject.forward(torch.tensor([[*prompt, *new[:-1]]]))[0, len(prompt) - 1 :].double()
    chosen = logits.gather(-1, torch.tensor(new).unsqueeze(-1)).squeeze(-1)
    gaps = ((logits.amax(-1) - chosen) / logits.std()).tolist()
    return gaps[:-1] if new[-1] in subject.special_ids else gaps  # an end may be forced by the settings


def choice(subject: Subject, ids: Sequence[int], place: int = -1) -> int:
    """The argmax of the whole forward pass at one place of it."""
    assert subject.forward is not None
    return int(subject.forward(torch.tensor([list(ids)]))[0, place].argmax())


def _why(
    subject: Subject, prompts: list[list[int]], news: list[list[int]], gaps: list[list[float]]
) -> tuple[list[str], str]:
    """What the wrong texts are instead, if it holds for all of them."""
    if all(new[: len(p)] == p[: len(new)] for p, new in zip(prompts, news, strict=True)):
        return ["generator-repeats-prompt"], "the prompt itself is returned"
    if any(gap[0] > TIE for gap in gaps):
        return _why_first(subject, prompts, news)
    if all(token == new[0] for new in news for token in new):
        return [
            "generator-repeats-prompt",
            "kv-cache-mismatch",
        ], "each step is fed the prompt alone: all are the same"
    parts = []
    for p, new, gap in zip(prompts, news, gaps, strict=True):
        first = next(i for i, g in enumerate(gap) if g > TIE)
        whole = [*p, *new]
        parts.append((p, new, first, whole, len(p) + first))
    if all(choice(subject, [w[here - 1]]) == new[first] for _, new, first, w, here in parts):
        return ["kv-cache-mismatch"], "each step sees its last token alone"
    if all(choice(subject, w[:here], here - 2) == new[first] for _, new, first, w, here in parts):
        return [POSITION, "kv-cache-mismatch"], "new tokens are the choice of the position before theirs"
    first = min(part[2] for part in parts)
    return ["kv-cache-mismatch", "pos-offset-generate"], f"they part at new token {first}, after the prefill"


def _why_first(subject: Subject, prompts: list[list[int]], news: list[list[int]]) -> tuple[list[str], str]:
    """What first new tokens are instead."""

    def all_are(chosen: Callable[[list[int]], int]) -> bool:
        return all(chosen(p) == new[0] for p, new in zip(prompts, news, strict=True))

    shortest = min(map(len, prompts))
    for special in subject.special_ids:
        if all_are(lambda p, special=special: choice(subject, [special, *p])):
            return ["bos-double", POSITION], f"id {special} is put in front of the prompt"
    if all_are(lambda p: choice(subject, [*p, p[-1]])):
        return ["kv-cache-mismatch", "generator-repeats-prompt"], "the prompt's last token is fed twice"
    for place in range(shortest - 1):
        if all_are(lambda p, place=place: choice(subject, p, place)):
            return [
                POSITION,
                "kv-cache-mismatch",
            ], f"the first is the choice of position {place} of the prompt"
    for cut in range(1, shortest):
        if all_are(lambda p, cut=cut: choice(subject, p[cut:])):
            return ["generator-repeats-prompt", POSITION], f"the first {cut} tokens of the prompt are not fed"
    return [
        "pos-offset-generate",
        POSITION,
        "kv-cache-mismatch",
    ], "already the first is no argmax of the prompt"


# ---------------------------------------------------------------- planted


@greedy.plant("generator-repeats-prompt", component="generator", what="returns prompt and new tokens")
def _() -> Subject:
    return specimens.subject(generator=specimens.writing.Repeating)


@greedy.plant("generator-repeats-prompt", component="generator", what="feeds the prompt alone at each step")
def _() -> Subject:
    class Stuck(specimens.Generator):
        def generate(self, prompts: Any, max_new_tokens: int, **how: Any) -> list[list[int]]:
            new = [super(Stuck, self).generate(prompts, 1, **how) for _ in range(max_new_tokens)]
            return [[step[row][0] for step in new] for row in range(len(prompts))]

    return specimens.subject(generator=Stuck)


@greedy.plant("wrong-logit-position", component="generator", what="logits[:, 0]")
def _() -> Subject:
    class First(specimens.Generator):
        def last(self, logits: Tensor, segments: Tensor) -> Tensor:
            return logits[:, 0]

    return specimens.subject(generator=First)


@greedy.plant("temp-zero", component="sampler", what="temperature or 1.0")
def _() -> Subject:
    class Drawing(specimens.Generator):
        def choose(self, logits: Tensor, temperature: float, *rest: Any) -> Tensor:
            return super().choose(logits, temperature or 1.0, *rest)

    return specimens.subject(generator=Drawing)


@greedy.plant("bos-double", component="generator", what="a start token before every prompt")
def _() -> Subject:
    class Started(specimens.Generator):
        def generate(self, prompts: Any, max_new_tokens: int, **how: Any) -> list[list[int]]:
            return super().generate([[1, *prompt] for prompt in prompts], max_new_tokens, **how)

    return specimens.subject(generator=Started)


@greedy.plant("kv-cache-mismatch", component="generator", what="the prompt's last token is fed again")
def _() -> Subject:
    class Twice(specimens.Generator):
        def padded(self, prompts: Any) -> tuple[Tensor, Tensor]:
            return super().padded([[*prompt, prompt[-1]] for prompt in prompts])

    return specimens.subject(generator=Twice)


@greedy.plant("eval-state-not-reset", component="generator", what="the cache of the call before is kept")
def _() -> Subject:
    class Keeping(specimens.Model):
        def new_caches(self) -> list[dict[str, Tensor]]:
            if not hasattr(self, "kept"):
                self.kept = super().new_caches()
            return self.kept

    return specimens.subject(model=Keeping)


@greedy.plant("pos-offset-generate", component="generator", what="a new token stands one place too far")
def _() -> Subject:
    class Late(specimens.Model):
        def step(self, tokens: Tensor, segments: Tensor, positions: Tensor, caches: Any) -> Tensor:
            return super().step(tokens, segments, positions + (tokens.shape[1] == 1), caches)

    return specimens.subject(model=Late)


@greedy.healthy("a context of 12 tokens")
def _() -> Subject:
    return specimens.subject(size={"max_length": 12})
