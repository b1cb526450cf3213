"""Two ways to one number, beside what rounding can do: the agreement report.

The same weights over the same rows give one loss. A training log, an evaluation, a generator's own count and bfloat16
are different ways there; each may differ from the others by roundings, and a difference beyond these is a bug in
one of the two. So every row has two numbers, their difference, and a limit that was measured for these very numbers
(minilm/evaluation/agreement_noise.py). Where two numbers have a right to differ, the row says NOT COMPARABLE and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minilm.evaluation.agreement_noise import Noise
from minilm.evaluation.markup import table

Verdict = Literal["AGREES", "DIFFERS", "NOT COMPARABLE"]
MEANING = (
    "Two ways to the loss of the same weights over the same rows, in nats per token. Limit: four times (bfloat16: "
    "eight) the largest change under drawn roundings of the type that is computed in, and 1e-6 of the number."
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row of the report.

    what      what is compared, ways: the names of the two numbers (nats per token)
    over      the tokens and rows that both are over
    noise     how far roundings may move them apart, and how that was measured; None where nothing is compared
    why_not   why the two have a right to differ; the numbers are then only shown (None: there is none)
    """

    what: str
    ways: tuple[str, str]
    numbers: tuple[float | None, float | None]
    over: str = ""
    noise: Noise | None = None
    why_not: str | None = None

    @property
    def difference(self) -> float | None:
        """|first - second|; 0 for two equal infinities; None where a number is missing, NaN where one is no number."""
        first, second = self.numbers
        if first is None or second is None:
            return None
        return 0.0 if first == second else abs(first - second)

    @property
    def verdict(self) -> Verdict:
        if self.why_not is not None or self.difference is None or self.noise is None:
            return "NOT COMPARABLE"
        return "AGREES" if self.difference <= self.noise.limit else "DIFFERS"  # NaN differs from everything

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a number that is not finite is null, and named in `nonfinite`."""
        values = dict(zip(self.ways, self.numbers, strict=True))
        nonfinite = {name: str(v) for name, v in values.items() if v is not None and not math.isfinite(v)}
        return {
            "what": self.what,
            "numbers": {name: None if name in nonfinite else value for name, value in values.items()},
            **({"nonfinite": nonfinite} if nonfinite else {}),
            "over": self.over,
            "difference": _finite(self.difference),
            "limit": None if self.noise is None else _finite(self.noise.limit),
            "noise_is": None if self.noise is None else self.noise.how,
            "verdict": self.verdict,
            **({"why_not": self.why_not} if self.why_not else {}),
        }

    def __str__(self) -> str:
        first, second = (_shown(number) for number in self.numbers)
        text = f"{self.what}: {self.ways[0]} {first}, {self.ways[1]} {second}"
        if self.verdict == "NOT COMPARABLE":
            return f"{self.what}: {self.why_not or 'nothing to compare'}"
        return f"{text}, {_small(self.difference)} apart, limit {_small(self.noise and self.noise.limit)} ({self.over})"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A `Section` (minilm/evaluation/section.py). strict: a row that differs fails the evaluation."""

    rows: Sequence[Comparison]
    strict: bool = False

    name = "agreement"
    title = "Agreement: two ways to one number"

    @property
    def failed(self) -> bool:
        return self.strict and bool(self.differing)

    @property
    def differing(self) -> list[Comparison]:
        """Rows whose numbers differ by more than their noise."""
        return [row for row in self.rows if row.verdict == "DIFFERS"]

    def as_dict(self) -> dict[str, Any]:
        counts = {verdict: sum(r.verdict == verdict for r in self.rows) for verdict in get_args(Verdict)}
        return {
            "verdict": "DIFFERS" if self.differing else "AGREES" if counts["AGREES"] else "NOT COMPARABLE",
            "strict": self.strict,
            "counts": counts,
            "definition": MEANING,
            "rows": [row.as_dict() for row in self.rows],
        }

    def print(self, console: Console) -> None:
        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("", "", "", "difference", "limit", ""):
            shown.add_column(column, justify="right" if column else "left", no_wrap=True)
        for row in self.rows:
            style = "bold red" if row.verdict == "DIFFERS" else ""
            shown.add_row(*(Text(cell, style=style) for cell in _cells(row)[:6]))
        # As wide as it is, whatever the terminal: a number that is cut off reads as another number.
        Console(file=console.file, width=1000).print(shown, crop=False)
        for row in self.rows:
            if row.verdict == "NOT COMPARABLE":
                console.print(Text(f"not comparable: {row}"), soft_wrap=True)
        console.print(MEANING, soft_wrap=True)
        for row in self.differing:
            console.print(Text(f"DIFFERS: {row}", style="bold red"), soft_wrap=True)

    def html(self) -> str:
        loud = "".join(
            f"<p class=bad><strong>DIFFERS: {escape(str(row))}</strong></p>" for row in self.differing
        )
        heads = [
            "what",
            "one way",
            "the other",
            "difference",
            "limit",
            "verdict",
            "over",
            "noise, or why not",
        ]
        rows = [_cells(row) for row in self.rows]
        for cells in rows:  # 5e-06 is not to be broken at its sign
            cells[3:5] = [cell.replace("-", "\u2011") for cell in cells[3:5]]
        return f"{loud}{table(heads, rows, words=8)}<p class=quiet>{escape(MEANING)}</p>"


def _cells(row: Comparison) -> list[str]:
    ways = [f"{way} {_shown(number)}" for way, number in zip(row.ways, row.numbers, strict=True)]
    limit = row.noise.limit if row.noise else None
    reason = row.why_not or (row.noise.how if row.noise else "")
    return [row.what, *ways, _small(row.difference), _small(limit), row.verdict, row.over, reason]


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.7g}"


def _small(number: float | None) -> str:
    return "-" if number is None else f"{number:.1e}"


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
