"""The answers to all tasks as a part of the report of eval.py, and a line on disk for every task that is done."""

from __future__ import annotations

import argparse
import html
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from minilm.errors import ConfigError, MinilmError
from minilm.evaluation.markup import table
from minilm.evaluation.material import Material
from minilm.evaluation.tasks.arithmetic import TextModel
from minilm.evaluation.tasks.asking import Measure, Result, ask
from minilm.evaluation.tasks.prepare import expanded, fitting, open_task
from minilm.evaluation.tasks.questions import Task

COLUMNS = ("task", "measure", "value", "± error", "95 %", "chance", "questions", "left out", "shots")
COUNTED_BY_CHANCE = ("accuracy", "accuracy_norm", "accuracy_bytes")
DEFINITIONS = {
    "accuracy": "choice: the right one has the highest log-likelihood; cloze: greedy decoding gives the answer; "
    "induction: share of the second copy that is the most probable token",
    "accuracy_norm": "choice, log-likelihood divided by characters (acc_norm of lm-evaluation-harness)",
    "accuracy_bytes": "choice, log-likelihood divided by bytes (acc_bytes of lm-evaluation-harness)",
    "greedy": "choice: greedy decoding gives the right choice",
    "perplexity": "exp of nats per answer, not per token (perplexity of lm-evaluation-harness)",
    "exact_match": "the text written, without white space around it, is the answer",
    "losses": "nats per token of the right answers",
    "standard_error": "sample deviation over the root of the number of questions",
    "interval_95": "bootstrap over questions; null for fewer than 10",
    "num_excluded": "questions that were left out, with the reasons in excluded",
    "num_narrow": "choices decided by less than 0.0001 nats: another machine may decide otherwise",
    "num_joined": "answers whose first token joins with the context",
    "num_cut": "questions that lost tokens on the left, being longer than the context",
}


@dataclass
class TaskSection:
    """The results of all tasks so far; one that failed makes eval.py end with exit code 1."""

    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    def fill(self, arguments: argparse.Namespace, material: Material) -> None:
        """Put the tasks that the flags ask for to the model, one after the other. Every process calls it."""
        how = material.how
        reader = TextModel(
            material.model,
            material.tokenizer,
            batch_rows=how.batch_rows,
            precision=how.precision,
            progress=how.progress,
        )
        log = Log(arguments.task_log if material.is_main else None, material.is_main)
        start = time.monotonic()
        for name in expanded(arguments.tasks):
            self.results.append(_one(name, arguments, reader))
            self.seconds = time.monotonic() - start
            log.add(self.results[-1])

    @property
    def name(self) -> str:
        return "tasks"

    @property
    def title(self) -> str:
        return "Tasks"

    @property
    def failed(self) -> bool:
        return any(result.failure for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        return {
            "results": {result.task.name: result.as_dict() for result in self.results},
            "definitions": DEFINITIONS,
            "seconds": round(self.seconds, 3),
        }

    def print(self, console: Console) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in COLUMNS:
            shown.add_column(
                column, justify="left" if column in ("task", "measure") else "right", no_wrap=True
            )
        for row in self._rows():
            shown.add_row(*map(Text, row))
        # As wide as it is, whatever the terminal: a number that is cut off reads as another number.
        Console(file=console.file, width=1000).print(shown, crop=False)
        for note in self._notes():
            console.print(Text(note), soft_wrap=True)

    def html(self) -> str:
        notes = "".join(f"<p class=quiet>{html.escape(note)}</p>" for note in self._notes())
        return table(COLUMNS, self._rows(), words=2) + notes

    def _rows(self) -> list[tuple[str, ...]]:
        """As in COLUMNS; the task and its counts stand in the first row of each."""
        rows = []
        for result in self.results:
            task = result.task
            own: list[tuple[str, ...]] = [("failed", "-", "-", "-", "-")] if result.failure else []
            for name, measure in result.measures.items():
                chance = result.chance if name in COUNTED_BY_CHANCE else None
                own.append((name, *_cells(measure), "-" if chance is None else f"{chance:.4f}"))
            counts = [(f"{result.number:,}", f"{len(task.excluded):,}", str(result.shots))]
            for group, means in result.groups.items():
                name = next(iter(result.measures))
                own.append((f"  {group}: {name}", f"{means[name]:.4f}", "", "", ""))
                counts += [("", "", "")] * (len(own) - 1 - len(counts)) + [
                    (f"{means['num_questions']:,}", "", "")
                ]
            for name, total in result.sums.items():
                told = "loss of the answers" if name == "answer" else f"loss, {name.replace('_', ' ')}"
                own.append((told, f"{total.mean:.4f}", "", "", ""))
            counts += [("", "", "")] * (len(own) - len(counts))
            heads = [task.name] + [""] * (len(own) - 1)
            rows += [(head, *line, *count) for head, line, count in zip(heads, own, counts, strict=True)]
        return rows

    def _notes(self) -> list[str]:
        notes = [f"{result.task.name} failed: {result.failure}" for result in self.results if result.failure]
        for result in self.results:
            said = [
                f"{count} {what}"
                for count, what in (
                    (result.narrow, "decided by less than 0.0001 nats"),
                    (result.joined, "answers join with the text before them"),
                    (result.cut, "questions were cut on the left"),
                )
                if count
            ]
            if said:
                notes.append(f"{result.task.name}: {'; '.join(said)}.")
        notes.append(f"Losses in nats per token. {self.seconds:.1f} s.")
        return notes


def _one(name: str, arguments: argparse.Namespace, reader: TextModel) -> Result:
    """A task that cannot be asked is a result, too: those before and after it are kept."""
    shots = arguments.shots
    task = Task(name=name, questions=())
    try:
        task = open_task(name, reader)
        if shots and task.kind == "repetition":
            shots = 0  # rows of tokens have no worked examples
        task = fitting(
            task,
            reader,
            shots=shots,
            skip_bad=arguments.on_bad_line == "skip",
            cut=arguments.on_long_prompt == "cut",
        )
    except MinilmError as error:  # the same on every process: files and tokenizer are
        return Result(task=task, shots=shots, failure=f"{type(error).__name__}: {error}")
    return ask(task, reader, shots=shots, limit=arguments.task_limit)


class Log:
    """One line of JSON for each task, on disk before the next one begins."""

    def __init__(self, path: Path | None, told: bool) -> None:
        self.path, self.told = path, told
        if path is not None:
            try:
                path.write_text("", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--task-log {path} cannot be written: {error.strerror}.") from error

    def add(self, result: Result) -> None:
        if self.told:
            first = next(iter(result.measures.items()), None)
            said = result.failure if first is None else f"{first[0]} {first[1].value:.4f}"
            print(f"task {result.task.name}: {said}", file=sys.stderr, flush=True)
        if self.path is None:
            return
        answers = [
            {
                "where": result.task.questions[o.number].where,
                **o.measures,
                **{f"nats_{name}": span.nats for name, span in o.spans.items()},
                **({"said": o.said} if o.said else {}),
            }
            for o in result.outcomes
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**result.as_dict(), "answers": answers}, ensure_ascii=False) + "\n")


def _cells(measure: Measure) -> tuple[str, str, str]:
    ends = measure.interval
    return (
        _shown(measure.value, 4),
        "-" if measure.error is None else _shown(measure.error, 4),
        "-" if ends is None else f"{_shown(ends[0], 3)}..{_shown(ends[1], 3)}",
    )


def _shown(value: float, places: int) -> str:
    return f"{value:,.{places}f}" if value < 1e6 else f"{value:.3g}"
