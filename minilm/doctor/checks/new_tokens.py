"""A generator returns new tokens only, as many as asked for, and ends a row at the end-of-text token.

Why: a generator that returns its prompt, writes one token more than allowed, or never stops spoils every score that
is computed from its text, without any error.

How: prompts of one token, of a few, and so long that the new tokens just fit; 1, 2 and 4 new tokens: the numbers
must be exact, and the prompts unchanged. For stopping, text is written at temperature 0 with no end; then one of its
tokens is declared to be the end: the same text must come back up to that token, each row of a batch by itself.

Cannot see: a stop condition on strings.

Sources: transformers issue 23723 (more tokens than allowed), trl issue 976 (a model that never stops).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from minilm.doctor import specimens
from minilm.doctor.checks.examples import marks
from minilm.doctor.checks.greedy import texts_of
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet, tokens_for
from minilm.doctor.subject import Subject

LONG = 512  # the longest context that is filled
NEW = 8


@check(group="evaluation", needs=("generate", "vocab_size"), cost="9 generations of up to 4 tokens")
def new_tokens_only(subject: Subject) -> Finding:
    """len(new) == max_new_tokens, for short prompts and for one that fills the context; the prompt stays as it is."""
    wrong: list[tuple[str, str]] = []
    tried = 0
    with quiet(subject), torch.no_grad():
        for asked in (1, 2, 4):
            for length in _lengths(subject, asked):
                prompts = tokens_for(subject, 2, length).tolist()
                given = copy.deepcopy(prompts)
                written = [list(map(int, row)) for row in subject.generate(given, asked, temperature=0.0)]
                tried += 1
                if given != prompts:
                    wrong.append(
                        ("generator-repeats-prompt", f"the prompt of {length} tokens was changed in place")
                    )
                if len(written) != len(prompts):
                    wrong.append(
                        ("generator-repeats-prompt", f"{len(written)} texts for {len(prompts)} prompts")
                    )
                for prompt, new in zip(prompts, written, strict=False):
                    if (problem := _problem(subject, prompt, new, asked)) is not None:
                        wrong.append(problem)
    if not tried:
        raise NotApplicable("no prompt fits")
    if not wrong:
        return passed(
            f"{tried} pairs of prompt length and max_new_tokens are kept exactly", 0.0, 1.0, unit="texts"
        )
    return failed(
        wrong[0][1],
        float(len(wrong)),
        1.0,
        unit="texts",
        bugs=list(dict.fromkeys(bug for bug, _ in wrong)),
        component="generator",
        advice="return tokens[len(prompt):], and stop after max_new_tokens choices whatever the prompt's length",
    )


def _lengths(subject: Subject, asked: int) -> list[int]:
    if subject.max_length is None:
        return [1, 5]
    full = subject.max_length - asked
    lengths = [n for n in (1, 5) if n <= full]
    return [*lengths, full] if 5 < full <= LONG else lengths


def _problem(subject: Subject, prompt: list[int], new: list[int], asked: int) -> tuple[str, str] | None:
    said = f"{len(new)} tokens for max_new_tokens {asked} after a prompt of {len(prompt)}"
    if len(new) == asked:
        return None
    if len(new) >= len(prompt) and new[: len(prompt)] == prompt:
        return "generator-repeats-prompt", f"{said}: the prompt is returned with them"
    if new and new[-1] in subject.special_ids and len(new) < asked:
        return None  # it may have stopped at an end-of-text token of its own
    return "max-new-tokens-exceeded", said


@check(group="evaluation", needs=("generate", "vocab_size"), cost="4 generations of up to 8 tokens")
def stops(subject: Subject) -> Finding:
    """A token of the text, declared to be the end, ends it there; rows end each by itself."""
    with quiet(subject), torch.no_grad():
        if subject.max_length is not None and subject.max_length < 4 + NEW:
            raise NotApplicable(f"needs a context of {4 + NEW} tokens, the subject has {subject.max_length}")
        prompts = tokens_for(subject, 6, 4).tolist()
        free = _texts(subject, prompts, None)
        row = max(range(len(free)), key=lambda r: len(set(free[r])))
        if len(free[row]) < 2:
            raise NotApplicable("the texts end after one token by themselves")
        middle = _first_seen(free[row])
        said: list[tuple[str, list[int], list[int]]] = []
        for place in sorted({0, middle}):
            end = free[row][place]
            alone = _texts(subject, [prompts[row]], end)[0]
            said.append(("alone", alone, _until(free[row], end)))
            together = _texts(subject, prompts, end)
            said += [("in a batch", a, _until(b, end)) for a, b in zip(together, free, strict=True)]
    fill = marks(subject)[0]
    wrong = [(how, a, b) for how, a, b in said if not _ended(a, b, fill)]
    if not wrong:
        ends = sum(len(b) < NEW for _, _, b in said)
        return passed(f"{len(said)} texts, {ends} with an end before the limit, stop where they should", 0.0, 1.0,
                      unit="texts")  # fmt: skip
    how, text, expected = wrong[0]
    late = len(text) > len(expected)
    return failed(
        f"{len(wrong)} of {len(said)} texts do not stop rightly; {how}, {len(text)} tokens where the end is token "
        f"{len(expected)}: it {'runs on' if late else 'stops early, or is another text'}",
        float(len(wrong)),
        1.0,
        unit="texts",
        bugs=["stop-not-at-eos", "max-new-tokens-exceeded"] if late else ["stop-not-at-eos"],
        component="stop condition",
        advice="compare each row's newest token with eos_id, and drop what the row is fed after it",
    )


def _texts(subject: Subject, prompts: list[list[int]], end: int | None) -> list[list[int]]:
    return texts_of(subject, subject.generate(prompts, NEW, temperature=0.0, eos_id=end))


def _first_seen(text: Sequence[int]) -> int:
    """The last place whose token was not there before, but not the very last one."""
    new = [i for i, token in enumerate(text) if token not in text[:i]]
    return max((i for i in new if i < len(text) - 1), default=0)


def _until(text: Sequence[int], end: int) -> list[int]:
    return list(text[: text.index(end) + 1]) if end in text else list(text)


def _ended(text: list[int], expected: list[int], fill: int) -> bool:
    """As expected, with or without the end token, or filled up with padding."""
    rest = text[len(expected) :]
    return text in (expected, expected[:-1]) or (
        text[: len(expected)] == expected and fill not in expected and all(token == fill for token in rest)
    )


# ---------------------------------------------------------------- planted


@new_tokens_only.plant("generator-repeats-prompt", component="generator")
def _() -> Subject:
    return specimens.subject(generator=specimens.writing.Repeating)


@new_tokens_only.plant("max-new-tokens-exceeded", component="generator", what="one more")
def _() -> Subject:
    class OneMore(specimens.Generator):
        def generate(self, prompts: Any, max_new_tokens: int, **how: Any) -> list[list[int]]:
            return super().generate(prompts, max_new_tokens + 1, **how)

    return specimens.subject(generator=OneMore)


@new_tokens_only.plant("max-new-tokens-exceeded", component="generator", what="counts the prompt: max_length")
def _() -> Subject:
    class WholeLength(specimens.Generator):
        def generate(self, prompts: Any, max_new_tokens: int, **how: Any) -> list[list[int]]:
            return super().generate(prompts, max(1, max_new_tokens - len(prompts[0]) + 1), **how)

    return specimens.subject(generator=WholeLength)


@new_tokens_only.plant(
    "generator-repeats-prompt", component="generator", what="appends to the caller's prompt"
)
def _() -> Subject:
    class Appending(specimens.Generator):
        def generate(self, prompts: Any, max_new_tokens: int, **how: Any) -> list[list[int]]:
            new = super().generate(prompts, max_new_tokens, **how)
            for prompt, row in zip(prompts, new, strict=True):
                prompt += row
            return new

    return specimens.subject(generator=Appending)


@stops.plant("stop-not-at-eos", component="stop", what="compares with another id")
def _() -> Subject:
    class Deaf(specimens.Generator):
        def ends(self, token: int, eos_id: int | None) -> bool:
            return token == 2

    return specimens.subject(generator=Deaf)


@stops.plant("stop-not-at-eos", component="stop", what="all rows stop with the first")
def _() -> Subject:
    class Together(specimens.Generator):
        def generate(self, prompts: Any, max_new_tokens: int, **how: Any) -> list[list[int]]:
            new = super().generate(prompts, max_new_tokens, **how)
            return [row[: min(map(len, new))] for row in new]

    return specimens.subject(generator=Together)


@stops.plant("stop-not-at-eos", component="stop", what="only when all rows end in the same step")
def _() -> Subject:
    class AllAtOnce(specimens.Generator):
        def generate(self, prompts: Any, max_new_tokens: int, **how: Any) -> list[list[int]]:
            end = how.pop("eos_id", None)
            new = super().generate(prompts, max_new_tokens, **how)
            steps = [n for n in range(max_new_tokens) if all(row[n] == end for row in new)]
            return [row[: steps[0] + 1] if steps else row for row in new]

    return specimens.subject(generator=AllAtOnce)


@stops.healthy("the end token is left out of the text")
def _() -> Subject:
    class Without(specimens.Generator):
        def generate(self, prompts: Any, max_new_tokens: int, **how: Any) -> list[list[int]]:
            new = super().generate(prompts, max_new_tokens, **how)
            return [row[:-1] if row[-1] == how.get("eos_id") else row for row in new]

    return specimens.subject(generator=Without)
