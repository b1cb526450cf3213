"""A task put to a model: what is right, how sure one can be of it, what was left out.

Questions are dealt to the processes one by one, and every process gets all results. What is shown is a mean over
questions with its standard error (as lm-evaluation-harness gives it) and a 95 % interval by bootstrap over questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from minilm.alignment import Sum
from minilm.errors import ConfigError, DataError, MinilmError
from minilm.evaluation.intervals import bootstrap, processes
from minilm.evaluation.tasks.arithmetic import Reader, Span, Written
from minilm.evaluation.tasks.questions import (
    Choice,
    Cloze,
    Completion,
    Question,
    Repetition,
    Task,
    chance_of,
    prompt_of,
)

NARROW_NATS = 1e-4  # a lead smaller than this could be another one on another machine


@dataclass(frozen=True)
class Outcome:
    """How one question went: its measures (1 right, 0 wrong), the tokens of the right answer, what was said."""

    number: int
    measures: dict[str, float]
    spans: dict[str, Span]
    said: str = ""
    narrow: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Measure:
    """A mean over questions. `error`: its standard error; `interval`: 95 %; None where there are too few questions."""

    value: float
    error: float | None = None
    interval: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "standard_error": self.error,
            "interval_95": None if self.interval is None else list(self.interval),
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a task.

    sums     loss of the right answers, token-weighted
    chance   accuracy without any knowledge, of the questions that were asked; None where nobody can say
    failure  in place of numbers
    """

    task: Task
    number: int = 0
    chance: float | None = None
    shots: int = 0
    measures: dict[str, Measure] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    sums: dict[str, Sum] = field(default_factory=dict)
    narrow: int = 0
    joined: int = 0
    cut: int = 0
    failure: str | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, null where there is none."""
        return {
            "task": self.task.name,
            "kind": self.task.kind,
            "about": self.task.about,
            "failure": self.failure,
            "chance": self.chance,
            "num_questions": self.number,
            "num_excluded": len(self.task.excluded),
            "excluded": list(self.task.excluded[:20]),
            "shots": self.shots,
            "measures": {name: measure.as_dict() for name, measure in self.measures.items()},
            "groups": self.groups,
            "losses": {name: _loss(total) for name, total in self.sums.items()},
            "num_narrow": self.narrow,
            "num_joined": self.joined,
            "num_cut": self.cut,
        }


def ask(task: Task, reader: Reader, *, shots: int = 0, limit: int | None = None) -> Result:
    """Put the questions (the first `limit` of them) to a model. Every process calls this and gets the same.

    What a user can set right is in `failure`, so that the results of other tasks are not lost with this one.
    """
    questions = task.questions[:limit]
    rank, world = processes()
    failure: str | None = None
    mine: list[Outcome] = []
    try:
        _check(task, questions, shots)
        numbers = range(rank, len(questions), world)
        mine = _asked([questions[n] for n in numbers], list(numbers), task, reader, shots)
    except MinilmError as error:
        failure = f"{type(error).__name__}: {error}"
    # Every process reaches this line, whatever happened to it: nobody waits for one that has failed.
    parts = _gathered((failure, mine))
    failures = [found for found, _ in parts if found]
    if failures:
        return Result(task=task, shots=shots, failure=failures[0])
    outcomes = sorted((o for _, part in parts for o in part), key=lambda o: o.number)
    return _summary(task, questions, outcomes, shots)


def _check(task: Task, questions: Sequence[Question], shots: int) -> None:
    if not questions:
        raise DataError(f"Task {task.name} has no question.")
    if shots and task.kind == "repetition":
        raise ConfigError(f"Task {task.name} takes no shots: its rows are tokens, not text.")


def _asked(
    questions: Sequence[Question], numbers: list[int], task: Task, reader: Reader, shots: int
) -> list[Outcome]:
    """The outcomes of this process's questions, in their order."""
    if task.kind == "repetition":
        copies = reader.repetitions([q.once for q in questions if isinstance(q, Repetition)])
        return [_repeated(n, *pair) for n, pair in zip(numbers, copies, strict=True)]
    prompts = [prompt_of(question, task.questions, shots) for question in questions]
    if task.kind == "completion":
        return _completed(questions, numbers, prompts, reader)
    pairs: list[tuple[str, str]] = []
    starts = []
    for question, prompt in zip(questions, prompts, strict=True):
        starts.append(len(pairs))
        said = question.choices if isinstance(question, Choice) else (question.answer,)  # type: ignore[attr-defined]
        pairs += [(prompt, question.delimiter + one) for one in said]  # type: ignore[attr-defined]
    spans = reader.likelihoods(pairs)
    made = []
    for number, question, start in zip(numbers, questions, starts, strict=True):
        if isinstance(question, Choice):
            made.append(_chosen(number, question, spans[start : start + len(question.choices)]))
        elif isinstance(question, Cloze):
            span = spans[start]
            made.append(Outcome(number, {"accuracy": float(span.greedy)}, {"answer": span}, cut=span.cut > 0))
    return made


def _chosen(number: int, question: Choice, spans: Sequence[Span]) -> Outcome:
    """Three readings of one choice; of equal ones the first counts as the highest."""
    likelihoods = np.array([-span.nats for span in spans])
    characters = np.array([len(choice) for choice in question.choices], dtype=float)
    num_bytes = np.array([len(choice.encode()) for choice in question.choices], dtype=float)
    chosen = int(np.argmax(likelihoods))
    best = np.sort(likelihoods)
    right = spans[question.answer]
    measures = {
        "accuracy": float(chosen == question.answer),
        "accuracy_norm": float(int(np.argmax(likelihoods / characters)) == question.answer),
        "accuracy_bytes": float(int(np.argmax(likelihoods / num_bytes)) == question.answer),
        "greedy": float(right.greedy),
    }
    said = question.choices[chosen]
    narrow = bool(best[-1] - best[-2] < NARROW_NATS)
    return Outcome(number, measures, {"answer": right}, said, narrow, any(span.cut for span in spans))


def _completed(
    questions: Sequence[Question], numbers: Sequence[int], prompts: Sequence[str], reader: Reader
) -> list[Outcome]:
    """Questions with the same stop texts and length are generated together."""
    asked: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for place, question in enumerate(questions):
        if isinstance(question, Completion):
            asked.setdefault((question.stop, question.max_new_tokens), []).append(place)
    texts: dict[int, Written] = {}
    for (stop, most), places in asked.items():
        written = reader.completions([prompts[place] for place in places], stop, most)
        texts.update(zip(places, written, strict=True))
    made = []
    for place, (number, question) in enumerate(zip(numbers, questions, strict=True)):
        said = texts[place].text.strip()
        right = isinstance(question, Completion) and said == question.answer
        made.append(Outcome(number, {"exact_match": float(right)}, {}, said, cut=texts[place].cut > 0))
    return made


def _repeated(number: int, first: Span, second: Span) -> Outcome:
    measures = {"accuracy": second.right / second.tokens, "accuracy_first_copy": first.right / first.tokens}
    return Outcome(number, measures, {"first_copy": first, "second_copy": second})


def _summary(task: Task, questions: Sequence[Question], outcomes: list[Outcome], shots: int) -> Result:
    names = list(outcomes[0].measures)
    measures = {name: _mean([o.measures[name] for o in outcomes]) for name in names}
    sums = {
        name: sum((_sum(o.spans[name]) for o in outcomes), start=Sum.zero()) for name in outcomes[0].spans
    }
    if task.kind == "cloze":
        measures["perplexity"] = _perplexity([o.spans["answer"].nats for o in outcomes])
    groups: dict[str, dict[str, float]] = {}
    for group in dict.fromkeys(q.group for q in questions if q.group):
        some = [o for o, q in zip(outcomes, questions, strict=True) if q.group == group]
        means = {name: _mean([o.measures[name] for o in some]).value for name in names}
        groups[group] = {"num_questions": len(some), **means}
    spans = [span for o in outcomes for span in o.spans.values()]
    return Result(
        task=task,
        number=len(outcomes),
        chance=chance_of(questions),
        shots=shots,
        measures=measures,
        groups=groups,
        sums=sums,
        narrow=sum(o.narrow for o in outcomes),
        joined=sum(span.joined for span in spans),
        cut=sum(o.cut for o in outcomes),
        outcomes=outcomes,
    )


def _mean(values: Sequence[float]) -> Measure:
    """The standard error is that of the harness: sample deviation over the root of the number."""
    pairs = np.array([[value, 1.0] for value in values])
    error = float(np.std(pairs[:, 0], ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measure(float(pairs[:, 0].mean()), error, bootstrap(pairs))


def _perplexity(nats: Sequence[float]) -> Measure:
    """exp of the nats per ANSWER, however many tokens it has: the harness's perplexity of LAMBADA."""
    pairs = np.array([[value, 1.0] for value in nats])
    total = Sum.of(float(pairs[:, 0].sum()), len(nats))
    interval = bootstrap(pairs)
    ends = None if interval is None else [Sum.of(end, 1).perplexity for end in interval]
    if ends is None or not math.isfinite(ends[1]):
        return Measure(total.perplexity)
    return Measure(total.perplexity, None, (ends[0], ends[1]))


def _sum(span: Span) -> Sum:
    return Sum.of(span.nats, span.tokens, span.num_bytes)


def _loss(total: Sum) -> dict[str, Any]:
    known = float(total.bytes) > 0
    return {
        "loss": total.mean,
        "bits_per_byte": total.bits_per_byte if known else None,
        "nats": float(total.nats),
        "num_tokens": round(float(total.tokens)),
        "num_bytes": round(float(total.bytes)) if known else None,
    }


def _gathered(mine: Any) -> list[Any]:
    """What every process has, in all of them, in the order of their ranks."""
    _, world = processes()
    if world == 1:
        return [mine]
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return parts
