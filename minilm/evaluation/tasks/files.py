"""Questions from JSON Lines files. A file is read as a whole before anything is computed, and every problem is told.

The fields decide the kind; a file has questions of one kind. docs/tasks.md describes them for users.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilm.errors import DataError, listed
from minilm.evaluation.tasks.questions import (
    DELIMITER,
    MAX_NEW_TOKENS,
    STOP,
    Choice,
    Cloze,
    Completion,
    Question,
    Task,
)

LONGEST_LINE_BYTES = 2**20
MOST_PROBLEMS_SHOWN = 20
COMMON = {"answer", "delimiter", "group", "id"}
FIELDS = {
    "choice": COMMON | {"question", "context", "choices"},
    "cloze": COMMON | {"text"},
    "completion": COMMON | {"prompt", "stop", "max_new_tokens"},
}
KIND_BY = {"choices": "choice", "text": "cloze", "prompt": "completion"}


@dataclass
class Reading:
    """The good questions of a file, and all problems, one string each with file and line."""

    path: Path
    questions: list[Question] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def task(self) -> Task:
        """What there is of it as a task; the problems are what was left out."""
        return Task(
            name=self.path.stem,
            questions=tuple(self.questions),
            excluded=tuple(self.problems),
            about=str(self.path),
        )


def read(path: Path | str) -> Reading:
    """All lines of a file. Raises DataError if it cannot be opened or has no line that is a question."""
    path = Path(path)
    reading = Reading(path)
    try:
        for number, line in _lines(path):
            where = f"{path}:{number}"
            problems, made = ([line], None) if isinstance(line, str) else _question(line, where, number == 1)
            if made is not None and reading.questions and made.kind != reading.questions[0].kind:
                problems = [
                    f"is a {made.kind}, but the lines before are of kind {reading.questions[0].kind}: give each kind "
                    "a file of its own"
                ]
            reading.problems += [f"{where}: {problem}." for problem in problems]
            if made is not None and not problems:
                reading.questions.append(made)
    except OSError as error:
        raise DataError(f"The task file {path} cannot be read: {error.strerror or error}.") from error
    if not reading.questions and not reading.problems:
        raise DataError(f"The task file {path} is empty.")
    return reading


def shortened(problems: list[str]) -> list[str]:
    """As many as a person reads, and how many more there are."""
    if len(problems) <= MOST_PROBLEMS_SHOWN:
        return problems
    return [*problems[:MOST_PROBLEMS_SHOWN], f"and {len(problems) - MOST_PROBLEMS_SHOWN} more."]


def told(problems: list[str]) -> str:
    """Problems as a paragraph: `listed`, but not longer than a person reads."""
    if len(problems) <= MOST_PROBLEMS_SHOWN:
        return listed(problems)
    lines = [f"  {n}. {text}" for n, text in enumerate(problems[:MOST_PROBLEMS_SHOWN], 1)]
    return "\n".join([f"{len(problems)} problems, of which the first {MOST_PROBLEMS_SHOWN} are:", *lines])


def _lines(path: Path) -> Iterator[tuple[int, bytes | str]]:
    """(number, line) of all lines that are not blank; a problem (str) in place of one that is too long."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > LONGEST_LINE_BYTES:
                size = len(line)
                while not line.endswith(b"\n") and (line := file.readline(LONGEST_LINE_BYTES)):
                    size += len(line)
                yield number, f"the line has {size} bytes, the limit is {LONGEST_LINE_BYTES}"
            elif line.strip():
                yield number, line


def _question(line: bytes, where: str, first: bool) -> tuple[list[str], Question | None]:
    try:
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return [f"not UTF-8 at byte {error.start} of the line"], None
    except (ValueError, RecursionError) as error:
        return [f"not JSON: {str(error)[:100]}"], None
    if not isinstance(record, dict):
        return [f"not a JSON object, but of type {type(record).__name__}"], None
    kinds = {kind for name, kind in KIND_BY.items() if name in record}
    if len(kinds) != 1:
        has = ", ".join(map(repr, list(record)[:8])) or "none"
        return [
            "exactly one of the fields 'choices' (multiple choice), 'text' (cloze) and 'prompt' (completion) is "
            f"needed; it has {has}"
        ], None
    kind = kinds.pop()
    problems = [
        f"unknown field {name!r}; a {kind} has {', '.join(sorted(FIELDS[kind]))}"
        for name in record
        if name not in FIELDS[kind]
    ]
    problems += _common_problems(record)
    makers: dict[str, Callable[..., Question]] = {
        "choice": _choice,
        "cloze": _cloze,
        "completion": _completion,
    }
    made = makers[kind](record, where, problems)
    return problems, None if problems else made


def _common_problems(record: dict[str, Any]) -> list[str]:
    problems = []
    for name, value in record.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                problems.append(f"{name} has a lone surrogate, which is half of a character")
    for name in ("delimiter", "group"):
        if not isinstance(record.get(name, ""), str):
            problems.append(f"{name} is {record[name]!r}; it must be a text")
    if "answer" not in record:
        problems.append("there is no field 'answer'")
    return problems


def _text(record: dict[str, Any], name: str, problems: list[str]) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        problems.append(f"{name} is of type {type(value).__name__}; it must be a text")
        return ""
    if not value.strip():
        problems.append(f"{name} is empty")
    return value


def _shared(record: dict[str, Any], where: str) -> dict[str, Any]:
    return {"group": record.get("group", ""), "delimiter": record.get("delimiter", DELIMITER), "where": where}


def _choice(record: dict[str, Any], where: str, problems: list[str]) -> Choice:
    asked = [name for name in ("question", "context") if name in record]
    question = ""
    if len(asked) == 2:
        problems.append("question and context are two names of the same field: give one")
    elif asked:
        before = len(problems)
        question = _text(record, asked[0], problems)
        if len(problems) > before and problems[-1].endswith("is empty"):
            problems[-1] += ": leave it out to compare the choices as whole texts"
    choices, answer = record["choices"], record.get("answer")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        problems.append("choices must be a list of texts that are not empty")
        choices = []
    elif len(choices) < 2:
        problems.append(f"there are {len(choices)} choices; at least 2 are needed")
    elif len(set(choices)) < len(choices):
        problems.append("two choices are the same text, so neither can be told from the other")
    if "answer" in record and (
        not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < max(1, len(choices))
    ):
        problems.append(
            f"answer is {answer!r}; it must be the number of the right choice, 0 to {max(0, len(choices) - 1)}"
        )
    shared = _shared(record, where)
    if not asked:
        shared["delimiter"] = record.get("delimiter", "")  # a text of its own does not begin with a space
    return Choice(question=question, choices=tuple(choices), answer=answer, **shared)  # type: ignore[arg-type]


def _cloze(record: dict[str, Any], where: str, problems: list[str]) -> Cloze:
    text = _text(record, "text", problems)
    answer = _text(record, "answer", problems) if "answer" in record else ""
    return Cloze(text=text, answer=answer, **_shared(record, where))


def _completion(record: dict[str, Any], where: str, problems: list[str]) -> Completion:
    prompt = _text(record, "prompt", problems)
    answer = _text(record, "answer", problems) if "answer" in record else ""
    if answer != answer.strip():
        problems.append("answer begins or ends with white space, which is taken off what the model writes")
    stop, most = record.get("stop", list(STOP)), record.get("max_new_tokens", MAX_NEW_TOKENS)
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        problems.append("stop must be a list of texts that are not empty")
        stop = []
    if any(s in answer for s in stop):
        problems.append("the answer contains a stop text, so it can never be written")
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        problems.append(f"max_new_tokens is {most!r}; it must be an integer of at least 1")
        most = 1
    shared = _shared(record, where)
    return Completion(prompt=prompt, answer=answer, stop=tuple(stop), max_new_tokens=most, **shared)
