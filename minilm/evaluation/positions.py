"""The loss by the number of tokens that a token was predicted from: does the model use its context?

Windows and rows begin anew, so the number is that of the tokens which the model really saw, not the place in the
document. It also states with how much context a document longer than the window was scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from minilm.evaluation.intervals import Scores
from minilm.evaluation.markup import curve, table
from minilm.evaluation.tally import Tally

HEADS = ("tokens seen", "loss", "95 %", "top-1", "tokens", "share")


@dataclass(frozen=True)
class Bucket:
    """Tokens that were predicted from `least` to `most` tokens, and their scores."""

    least: int
    most: int
    scores: Scores


@dataclass(frozen=True)
class ByContext:
    """A `Section` (minilm/evaluation/section.py)."""

    buckets: list[Bucket]
    least: int
    mean: float
    most: int

    name = "by_context"
    title = "Loss by the number of tokens seen before"
    failed = False

    @classmethod
    def of(cls, tally: Tally) -> ByContext:
        buckets, before = [], 0
        for edge, sums in sorted(tally.contexts.items()):
            buckets.append(Bucket(before + 1, edge, Scores.of(sums)))
            before = edge
        most = len(tally.by_context) - 1
        if buckets:
            last = buckets[-1]
            buckets[-1] = Bucket(last.least, min(last.most, most), last.scores)
        return cls(buckets, tally.least_context, tally.mean_context, most)

    @property
    def num_tokens(self) -> int:
        return sum(bucket.scores.num_tokens for bucket in self.buckets)

    def as_dict(self) -> dict[str, Any]:
        keep = ("loss", "loss_95", "bits_per_byte", "accuracy", "accuracy_top5", "nats", "num_tokens")
        found = []
        for bucket in self.buckets:
            scores = bucket.scores.as_dict()
            found.append(
                {"least": bucket.least, "most": bucket.most, **{name: scores[name] for name in keep}}
            )
        return {
            "context_tokens": {"least": self.least, "mean": self.mean, "most": self.most},
            "buckets": found,
        }

    def print(self, console: Console) -> None:
        console.print(self.said())
        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in HEADS:
            shown.add_column(name, justify="right", no_wrap=True)
        for row in self._rows():
            shown.add_row(*row)
        Console(file=console.file, width=1000).print(shown, crop=False)

    def html(self) -> str:
        places = [(b.least * b.most) ** 0.5 for b in self.buckets]
        picture = curve(
            places,
            [b.scores.loss for b in self.buckets],
            [b.scores.interval for b in self.buckets],
            x_label="tokens seen before",
            y_label="loss (nats per token)",
            alt="Loss against the number of tokens seen before",
        )
        note = f"<p class=quiet>{self.said()} The band is the 95 % interval by document bootstrap.</p>"
        return f"{picture}{note}{table(HEADS, self._rows())}"

    def said(self) -> str:
        return (
            f"Tokens were predicted from {self.least:,} to {self.most:,} tokens of their document, "
            f"{self.mean:,.1f} on average."
        )

    def _rows(self) -> list[list[str]]:
        rows = []
        for bucket in self.buckets:
            scores, name = bucket.scores, f"{bucket.least:,} to {bucket.most:,}"
            ends = scores.interval
            rows.append(
                [
                    f"{bucket.least:,}" if bucket.least == bucket.most else name,
                    f"{scores.loss:.4f}",
                    "-" if ends is None else f"{ends[0]:.3f}..{ends[1]:.3f}",
                    "-" if scores.accuracy is None else f"{scores.accuracy:.1%}",
                    f"{scores.num_tokens:,}",
                    f"{scores.num_tokens / self.num_tokens:.1%}",
                ]
            )
        return rows
