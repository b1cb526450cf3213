"""From the names on a command line to tasks that can be asked: every problem of all files is told before one is.

What does not fit a model's context is a problem of its line, like any other, unless it is asked to be cut as
lm-evaluation-harness cuts it: on the left, silently there, counted here.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from minilm.errors import ConfigError, DataError
from minilm.evaluation.tasks import built_in, files
from minilm.evaluation.tasks.arithmetic import TextModel
from minilm.evaluation.tasks.questions import Choice, Completion, Question, Task, prompt_of

ALL_BUILT_IN = "built-in"
FILE_ENDING = ".jsonl"


def expanded(text: str) -> list[str]:
    """The names of a comma-separated list, `built-in` replaced by what it stands for."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        names += built_in.names() if name == ALL_BUILT_IN else [name] if name else []
    return names


def problems_of(names: Sequence[str], *, skip_bad: bool) -> list[str]:
    """What is wrong with these names and with the lines of the files among them; needs no model."""
    problems = [] if names else ["--tasks names no task."]
    known = {*built_in.names()}
    labels = [Path(name).stem if name.endswith(FILE_ENDING) else name for name in names]
    problems += [
        f"--tasks names {label} twice: results are told apart by it."
        for label, n in Counter(labels).items()
        if n > 1
    ]
    bad_lines: list[str] = []
    for name in names:
        try:
            if name.endswith(FILE_ENDING):
                found = files.read(name)
                if not skip_bad or not found.questions:
                    bad_lines += found.problems
            elif name.startswith(built_in.FACTS):
                built_in.make(name)
            elif name not in known:
                built_in.make(name)  # says what there is
        except (ConfigError, DataError) as error:
            problems.append(str(error))
    if bad_lines:
        *others, last = files.shortened(bad_lines)
        problems += [*others, f"{last} Repair such lines, or leave them out with --on-bad-line skip."]
    return problems


def open_task(name: str, reader: TextModel) -> Task:
    """The task of a name. Raises ConfigError or DataError."""
    if name.endswith(FILE_ENDING):
        return files.read(name).task()
    config = getattr(reader.model, "config", None)
    num_tokens = int(getattr(config, "vocab_size", 0) or 0)
    return built_in.make(name, tokenizer=reader.tokenizer, num_tokens=num_tokens, context=reader.max_length)


def fitting(task: Task, reader: TextModel, *, shots: int, skip_bad: bool, cut: bool) -> Task:
    """The task with the questions that the model can be asked.

    cut       too long ones stay, and lose text on the left
    skip_bad  the others are left out and counted; without it DataError lists them. Those of generated tasks, which
              nobody can repair, are always left out
    """
    if task.kind == "repetition" or not task.questions:
        return task
    if reader.tokenizer is None:
        raise ConfigError(f"Task {task.name} is text, but the checkpoint has no tokenizer.")
    problems, good = [], []
    for question in task.questions:
        problem = _problem(question, prompt_of(question, task.questions, shots), reader, cut)
        if problem is None:
            good.append(question)
        else:
            problems.append(f"{question.where}: {problem}")
    if problems and not good:
        raise DataError(f"No question of task {task.name} can be asked. {files.told(problems)}")
    if problems and not skip_bad and not task.generated:
        raise DataError(
            files.told(problems)
            + "\nShorten them, cut them on the left with --on-long-prompt cut, or leave them out with "
            "--on-bad-line skip."
        )
    return dataclasses.replace(task, questions=tuple(good), excluded=(*task.excluded, *problems))


def _problem(question: Question, prompt: str, reader: TextModel, cut: bool) -> str | None:
    if isinstance(question, Completion):
        needed, room = reader.prompt_tokens(prompt) + question.max_new_tokens, reader.max_length
        if question.max_new_tokens >= room:
            return f"{question.max_new_tokens} new tokens leave no room for a prompt in a context of {room} tokens."
        if needed > room and not cut:
            return f"prompt and new tokens need a context of {needed} tokens; the model has {room}."
        return None
    said = question.choices if isinstance(question, Choice) else (question.answer,)  # type: ignore[attr-defined]
    for one in said:
        try:
            row = reader.row(prompt, question.delimiter + one)  # type: ignore[attr-defined]
        except DataError as error:
            return str(error)
        if row.cut and not cut:
            return (
                f"prompt and answer need a context of {reader.max_length + row.cut} tokens; the model has "
                f"{reader.max_length}."
            )
    return None
