"""What a question is. Four kinds, each with the rule by which lm-evaluation-harness scores it.

A text and its answer are joined with a delimiter, one space unless the question says otherwise, as the harness joins
them (`target_delimiter`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from minilm.errors import ConfigError

DELIMITER = " "
BETWEEN_SHOTS = "\n\n"  # after each worked example (`fewshot_delimiter` of the harness)
STOP = ("\n\n",)
MAX_NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Question:
    """What all kinds have in common.

    group   results are told apart by it
    where   file and line, or what made it
    by_lot  how probable it is to be right without any knowledge; None where nobody can say
    """

    group: str = ""
    where: str = field(default="", compare=False)
    by_lot: float | None = field(default=None, compare=False)
    kind: ClassVar[str] = ""

    @property
    def context(self) -> str:
        """The text before the answer; it may be empty."""
        raise NotImplementedError

    def solved(self) -> str:
        """The text with its right answer: a worked example."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Choice(Question):
    """Which of several continuations has the highest log-likelihood. Without a question: which of several texts."""

    question: str = ""
    choices: tuple[str, ...]
    answer: int
    delimiter: str = DELIMITER
    kind: ClassVar[str] = "choice"

    @property
    def context(self) -> str:
        return self.question

    def solved(self) -> str:
        return self.question + self.delimiter + self.choices[self.answer]


@dataclass(frozen=True, kw_only=True)
class Cloze(Question):
    """The log-likelihood of the answer, and whether greedy decoding gives it (as for LAMBADA)."""

    text: str
    answer: str
    delimiter: str = DELIMITER
    kind: ClassVar[str] = "cloze"

    @property
    def context(self) -> str:
        return self.text

    def solved(self) -> str:
        return self.text + self.delimiter + self.answer


@dataclass(frozen=True, kw_only=True)
class Completion(Question):
    """Text is generated greedily up to a stop string; without the white space around it, it must be the answer."""

    prompt: str
    answer: str
    delimiter: str = DELIMITER  # in worked examples only: the model may write the space or not
    stop: tuple[str, ...] = STOP
    max_new_tokens: int = MAX_NEW_TOKENS
    kind: ClassVar[str] = "completion"

    @property
    def context(self) -> str:
        return self.prompt

    def solved(self) -> str:
        return self.prompt + self.delimiter + self.answer


@dataclass(frozen=True, kw_only=True)
class Repetition(Question):
    """The same tokens twice. What is asked for: each token but the first of either copy."""

    once: tuple[int, ...]
    kind: ClassVar[str] = "repetition"

    @property
    def context(self) -> str:
        return ""

    def solved(self) -> str:
        raise ValueError("A repetition of tokens has no text.")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions of one kind.

    excluded   what was left out and why (file and line), counted in every result
    generated  nobody can repair a question of it
    """

    name: str
    questions: tuple[Question, ...]
    excluded: tuple[str, ...] = ()
    generated: bool = False
    about: str = ""

    @property
    def kind(self) -> str:
        return self.questions[0].kind if self.questions else "empty"


def chance_of(questions: Sequence[Question]) -> float | None:
    """The expected share of right answers without any knowledge; None where nobody can say it of one of them."""
    known = [1 / len(q.choices) if isinstance(q, Choice) else q.by_lot for q in questions]
    if not known or None in known:
        return None
    return sum(one for one in known if one is not None) / len(known)


def prompt_of(question: Question, pool: Sequence[Question], shots: int) -> str:
    """The first `shots` other questions of the pool, worked, and then this one's context.

    The text that the harness makes with `num_fewshot` and the sampler `first_n`. Raises ConfigError where there are
    too few others.
    """
    if not shots:
        return question.context
    others = list(itertools.islice((other for other in pool if other != question), shots))
    if len(others) < shots:
        raise ConfigError(f"{shots} shots need as many other questions; there are {len(others)}.")
    return "".join(other.solved() + BETWEEN_SHOTS for other in others) + question.context
