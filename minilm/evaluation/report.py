"""The report of eval.py: losses, continuations by prompt length, samples; as tables and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from minilm.errors import ConfigError
from minilm.evaluation.heldout import HeldOut
from minilm.evaluation.intervals import Scores, processes
from minilm.evaluation.material import Material
from minilm.evaluation.mode import context_tokens
from minilm.evaluation.samples import Sample, make_samples
from minilm.evaluation.score import check_continuation, continuation_of_tokens
from minilm.evaluation.scored import Scored, score_held_out
from minilm.evaluation.section import Section
from minilm.evaluation.text import byte_lengths_of

PROMPT_LENGTHS = (16, 64, 128)
DEFINITIONS = {
    "loss": "nats per token, over every token but the first of each document",
    "perplexity": "exp of the loss",
    "bits_per_byte": "all counted nats / ln 2 / bytes of the counted tokens; special tokens count nats but 0 bytes",
    "accuracy": "share of the counted tokens that were the most probable one, or among the five most probable "
    "(accuracy_top5); of equally probable tokens the lower id stands first",
    "_95": "95 % percentile interval of the ratio of sums by bootstrap over documents (1,000 draws); null for fewer "
    "than 10 documents",
    "by_context": "the same by the number of tokens of its document that a token was predicted from",
    "overlap": "documents that share 13 words in a row with the training data, documents that do not, and documents of "
    "fewer words",
    "continuations": "loss of the tokens that follow the first p tokens of a document (BOS is one of them), "
    "given those tokens and the true continuation so far",
    "samples": "prediction: greedy, from the prompt alone; loss: of the truth, teacher-forced",
}
HEADS = (
    "", "loss", "95 %", "perplexity", "bits/byte", "95 %", "top-1", "95 %", "top-5", "tokens", "documents", "left out",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the report shall hold. `prompt_lengths` None takes those of 16, 64, 128 that fit the context."""

    prompt_lengths: Sequence[int] | None = None
    continuation_tokens: int = 64
    continuation_documents: int = 512
    samples: int = 3

    def checked_lengths(self, model: nn.Module) -> list[int]:
        """The prompt lengths, each once; raises ConfigError for those asked for that do not fit."""
        if self.samples < 0 or self.continuation_documents < 1:
            raise ConfigError(
                f"samples is {self.samples} and continuation documents {self.continuation_documents}; they must be at "
                "least 0 and 1."
            )
        if self.prompt_lengths is None:
            context = context_tokens(model) or math.inf
            fitting = [p for p in PROMPT_LENGTHS if p + self.continuation_tokens - 1 <= context]
            check_continuation(model, fitting, self.continuation_tokens)
            return fitting
        check_continuation(model, self.prompt_lengths, self.continuation_tokens)
        return sorted(set(self.prompt_lengths))

    def documents(self, held_out: HeldOut) -> list[int]:
        """Their numbers, evenly spaced over all: the first ones of a corpus are often alike."""
        wanted = min(self.continuation_documents, held_out.num_documents)
        return [k * held_out.num_documents // wanted for k in range(wanted)]


@dataclass(kw_only=True)
class Report:
    """All that eval.py found. `about` says of what: checkpoint, data, split, lengths, precision, processes.

    by_source  scores of each source, where there are several
    excluded   what was not scored
    documents  a record for each document, where they were asked for
    sections   what the other parts found, in their order; each stands in the JSON file under its own name
    missing    {part: why it is not there}, where an evaluation was stopped or a part failed
    """

    about: dict[str, Any]
    scores: Scores
    by_source: dict[str, Scores] = field(default_factory=dict)
    continuations: dict[int, Scores] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    excluded: dict[str, Any] = field(default_factory=dict)
    documents: list[dict[str, Any]] | None = None
    sections: list[Section] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def failed(self) -> bool:
        """Did a section find something wrong?"""
        return any(section.failed for section in self.sections)

    @property
    def seconds(self) -> float:
        """Since the report was begun."""
        return time.monotonic() - self.started

    def as_dict(self) -> dict[str, Any]:
        own = {
            **self.about,
            "scores": self.scores.as_dict(),
            "by_source": {name: scores.as_dict() for name, scores in self.by_source.items()},
            "continuations": {str(p): scores.as_dict() for p, scores in self.continuations.items()},
            "samples": [dataclasses.asdict(sample) for sample in self.samples],
            "excluded": self.excluded,
            **({} if self.documents is None else {"documents": self.documents}),
            "definitions": DEFINITIONS,
            "missing": self.missing,
            "seconds": round(self.seconds, 3),
        }
        for section in self.sections:
            if section.name in own:
                raise ValueError(f"two parts of the report are called {section.name!r}")
            own[section.name] = section.as_dict()
        return own

    def write(self, path: Path) -> None:
        """JSON, whole or not at all."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        aside = path.with_name(f".{path.name}.part")
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(path)


def begin_report(material: Material, about: dict[str, Any] | None = None) -> tuple[Report, Scored]:
    """Score the data. Every process calls this; the numbers are the same in all.

    Raises CheckFailed if the loss is not finite.
    """
    started = time.monotonic()
    scored = score_held_out(material.model, material.held_out, material.how)
    stated = {
        **(about or {}),
        **material.held_out.describe(),
        "precision": material.how.precision,
        "num_processes": processes()[1],
    }
    report = Report(
        about=stated,
        scores=scored.scores,
        by_source=scored.by_source,
        excluded=scored.excluded,
        sections=[scored.by_context],
        started=started,
    )
    return report, scored


def add_continuations(report: Report, material: Material, asked: Asked) -> None:
    """Losses of what follows the beginnings of documents. Every process calls this.

    Raises ConfigError for lengths that do not fit, before computing.
    """
    model, tokenizer, how = material.model, material.tokenizer, material.how
    lengths = asked.checked_lengths(model)
    if not lengths:
        return
    rank, world = processes()
    report.continuations = continuation_of_tokens(
        model,
        material.held_out.token_documents(
            asked.documents(material.held_out)[rank::world], max(lengths) + asked.continuation_tokens
        ),
        lengths,
        asked.continuation_tokens,
        byte_lengths=None if tokenizer is None else byte_lengths_of(tokenizer),
        batch_rows=how.batch_rows,
        precision=how.precision,
    )


def add_samples(report: Report, material: Material, asked: Asked) -> None:
    """Texts that the model writes, in the report of rank 0."""
    lengths = asked.checked_lengths(material.model)
    if processes()[0] == 0 and asked.samples and lengths:
        report.samples = make_samples(
            material.model,
            material.tokenizer,
            material.held_out,
            asked.documents(material.held_out),
            prompt_tokens=lengths[len(lengths) // 2],
            continuation_tokens=asked.continuation_tokens,
            count=asked.samples,
            precision=material.how.precision,
        )


def print_report(report: Report, console: Any = None) -> None:
    """Tables on stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    about, scores = report.about, report.scores
    for name in ("checkpoint", "checks", "data", "split"):
        if about.get(name):
            console.print(Text(f"{name:<11} {about[name]}"), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in HEADS:
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    table.add_row("all", *cells(scores))
    for source, of_source in report.by_source.items():
        table.add_row(Text(printable(source)), *cells(of_source))
    for p, continuation in report.continuations.items():
        table.add_row(f"after {p}", *cells(continuation))
    # As wide as it is, whatever the terminal: a number that is cut off reads as another number.
    Console(file=console.file, width=1000).print(table, crop=False)
    said = f"Loss in nats per token. Context {scores.context_tokens} tokens"
    if about.get("kind") == "text":
        said += f", in longer documents at least {scores.least_context_tokens}"
    if report.continuations:
        said += ". after p: the continuation of a document's first p tokens; left out: too short for it"
    console.print(f"{said}. {report.seconds:.1f} s, {about['num_processes']} process(es).")
    for line in excluded_lines(report):
        console.print(Text(line), soft_wrap=True)
    if "entropy_rate_nats" in about:
        console.print(f"Entropy rate of the source, the lowest true loss: {about['entropy_rate_nats']:.4f}")
    for sample in report.samples:
        console.print(f"document {sample.document}, loss of the truth {sample.loss:.4f}")
        one = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
        one.add_column(style="bold")
        one.add_column(overflow="fold")
        for name in ("prompt", "prediction", "truth"):
            one.add_row(name, Text(printable(getattr(sample, name))))
        console.print(one)
    for section in report.sections:
        console.print(Text(f"\n{section.title}", style="bold"))
        section.print(console)
    for part, why in report.missing.items():
        console.print(Text(f"not there: {part} ({why})", style="bold"))


def printable(text: str) -> str:
    """Control characters as their pictures: text of a model must not command the terminal."""
    pictures = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421}
    return text.translate(pictures | dict.fromkeys(range(128, 160), 65533))


def excluded_lines(report: Report) -> list[str]:
    """What was not scored, in sentences."""
    found = report.excluded
    if not found:
        return []
    first, empty, bad = (
        found["num_first_tokens"],
        found["num_documents_without_counted_token"],
        found["bad_documents"],
    )
    lines = [f"Not counted: the first token of each of {first:,} documents, which nothing predicts."]
    if empty:
        lines.append(f"{empty:,} documents have no token that could be predicted.")
    if bad:
        lines.append(f"{found['num_bad_documents']:,} bad documents were left out, such as {bad[0]}.")
    return lines


def cells(scores: Scores) -> list[str]:
    """What stands behind the first of `HEADS`."""
    counts = [f"{scores.num_tokens:,}", f"{scores.num_documents:,}", f"{scores.num_excluded:,}"]
    if not scores.num_tokens:
        return ["-"] * (len(HEADS) - 4) + counts
    ends = {
        name: "-"
        if name not in scores.intervals
        else f"{scores.intervals[name][0]:.3f}..{scores.intervals[name][1]:.3f}"
        for name in ("loss", "bits_per_byte", "accuracy")
    }
    bits = "-" if scores.bits_per_byte is None else f"{scores.bits_per_byte:.4f}"
    shares = ["-" if x is None else f"{x:.1%}" for x in (scores.accuracy, scores.accuracy_top5)]
    return [
        f"{scores.loss:.4f}", ends["loss"], f"{scores.perplexity:,.2f}", bits, ends["bits_per_byte"],
        shares[0], ends["accuracy"], shares[1], *counts,
    ]  # fmt: skip
