"""The section of free-running text: tables in the terminal, JSON, and a piece of the page."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minilm.evaluation.free_writing import Continued, Line, Measures, Writing
from minilm.evaluation.markup import table
from minilm.evaluation.report import printable
from minilm.evaluation.text_metrics import DEFINITIONS, Measured

EVERY_TEXT = 50  # lines of the table on the page


@dataclass(frozen=True, kw_only=True)
class FreeRunning:
    """A `Section` (minilm/evaluation/section.py): one table of numbers and one of texts for each prompt length."""

    writing: Writing
    results: list[Continued]
    num_shown: int = 5

    name = "free_running"
    title = "Free-running text"
    failed = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": dataclasses.asdict(self.writing),
            "definitions": DEFINITIONS,
            "prompts": {str(result.prompt_tokens): _result(result) for result in self.results},
        }

    def print(self, console: Console) -> None:
        if not self.results:
            console.print("No prompt length fits the context: nothing was written.")
        for result in self.results:
            console.print(self._said(result))
            # As wide as it is: a number that is cut off reads as another number.
            Console(file=console.file, width=1000).print(_numbers(result), crop=False)
            if result.greedy is not None:
                console.print(f"accuracy at token {_by_position(result.greedy)}")
            for warning in result.warnings:
                console.print(Text(f"WARNING: {warning}", style="bold red"), soft_wrap=True)
            if result.lines and self.num_shown:
                console.print(self._texts(result))

    def html(self) -> str:
        if not self.results:
            return "<p>No prompt length fits the context: nothing was written.</p>"
        meanings = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS.items())
        pieces = "".join(self._piece(result) for result in self.results)
        return f"{pieces}<details><summary>What the numbers mean</summary><dl>{meanings}</dl></details>"

    def _said(self, result: Continued) -> str:
        said = (
            f"{result.continuation_tokens} tokens after prompts of {result.prompt_tokens}, {result.num_documents} "
            f"documents ({result.num_excluded} too short)"
        )
        if result.sampled is not None:
            drawn = f"{self.writing.samples} per prompt at temperature {self.writing.temperature:g}"
            limits = [
                f"{name} {value:g}"
                for name, value in (("top-k", self.writing.top_k), ("top-p", self.writing.top_p))
                if value is not None
            ]
            said += f"; sampled: {', '.join([drawn, *limits, f'seed {self.writing.seed}'])}"
        return said

    def _texts(self, result: Continued) -> Table:
        """Texts below each other: beside each other they would be a few words wide."""
        shown = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
        shown.add_column(style="bold", no_wrap=True)
        shown.add_column(overflow="fold")
        for line in result.lines[: self.num_shown]:
            shown.add_section()
            shown.add_row("document", f"{line.document}, loss of the truth {line.loss:.4f}")
            drawn = [(f"sample {number}", text) for number, text in enumerate(line.samples, 1)]
            texts = [("prompt", line.prompt), ("prediction", line.greedy), *drawn, ("truth", line.truth)]
            for name, text in texts:
                shown.add_row(name, Text(printable(text)))
        return shown

    def _piece(self, result: Continued) -> str:
        said = f"<h3>After {result.prompt_tokens} tokens</h3><p>{escape(self._said(result))}</p>" + "".join(
            f"<p class=bad><strong>WARNING: {escape(text)}</strong></p>" for text in result.warnings
        )
        if result.greedy is None:
            return said
        names, rows = _rows(result)
        numbers = table(["", *names], [[name, *cells] for name, cells in rows])
        lines = result.lines[:EVERY_TEXT]
        texts = "".join(_html_line(line) for line in lines)
        titles = "".join(f"<th>{name}</th>" for name in ("document", "prompt", "prediction", "truth", "loss"))
        return (
            f"{said}{numbers}<p>Accuracy at token {escape(_by_position(result.greedy))}.</p>"
            f"<details><summary>{len(lines)} texts: the prediction is greedy, the loss is that of the truth, "
            f"teacher-forced, in nats per token</summary><div class=wide><table><tr>{titles}</tr>{texts}</table></div>"
            "</details>"
        )


def _html_line(line: Line) -> str:
    texts = (line.prompt, line.greedy, line.truth)
    cells = "".join(f"<td><pre>{escape(printable(text))}</pre></td>" for text in texts)
    return f"<tr><td class=n>{line.document}</td>{cells}<td class=n>{line.loss:.4f}</td></tr>"


def _result(result: Continued) -> dict[str, Any]:
    return {
        "continuation_tokens": result.continuation_tokens,
        "num_documents": result.num_documents,
        "num_excluded": result.num_excluded,
        "greedy": _way(result.greedy),
        "sampled": _way(result.sampled),
        "truth": {name: measured.as_dict() for name, measured in result.truth.items()},
        "warnings": result.warnings,
        "texts": [line.as_dict() for line in result.lines],
    }


def _way(measures: Measures | None) -> dict[str, Any] | None:
    if measures is None:
        return None
    return {
        **{name: measured.as_dict() for name, measured in measures.values.items()},
        "accuracy_by_position": measures.by_position,
        "across_samples": {name: measured.as_dict() for name, measured in measures.across.items()},
    }


def _rows(result: Continued) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names of the columns, and (name of the number, its cell in each column)."""
    ways = [way for way in (result.greedy, result.sampled) if way is not None]
    names = ["greedy", "sampled"][: len(ways)]
    rows = []
    for name in ways[0].values if ways else ():
        cells = [_cell(way.values[name]) for way in ways]
        rows.append((name, [*cells, _cell(result.truth[name]) if name in result.truth else ""]))
    if len(ways) > 1:
        for name, measured in ways[1].across.items():
            rows.append((f"{name} across samples", ["", _cell(measured), ""]))
    return [*names, "truth"], rows


def _numbers(result: Continued) -> Table:
    names, rows = _rows(result)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("")
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    for name, cells in rows:
        shown.add_row(name, *cells)
    return shown


def _cell(measured: Measured) -> str:
    """`0.250 (0.120..0.380) of 64`: value, 95 % interval, over how many."""
    if measured.value is None:
        return "-"
    interval = (
        "" if measured.interval is None else f" ({measured.interval[0]:.3f}..{measured.interval[1]:.3f})"
    )
    return f"{measured.value:.3f}{interval} of {measured.count:,}"


def _by_position(measures: Measures) -> str:
    """At tokens 1, 2, 4, 8, ...: `1: 0.50, 2: 0.31, 4: 0.12`."""
    places = [2**k for k in range(20) if 2**k <= len(measures.by_position)]
    return ", ".join(f"{place}: {measures.by_position[place - 1]:.2f}" for place in places)
