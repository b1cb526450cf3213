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

from minilm.alignment import Sum
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError
from minilm.evaluation.generate import generate
from minilm.evaluation.heldout import HeldOut, How
from minilm.evaluation.intervals import Scores, processes
from minilm.evaluation.mode import context_tokens
from minilm.evaluation.score import (
    Row,
    check_continuation,
    continuation_of_tokens,
    measure,
)
from minilm.evaluation.text import byte_lengths_of, text_of

PROMPT_LENGTHS = (16, 64, 128)
DEFINITIONS = {
    "loss": "nats per token, over every token but the first of each document (or part of one in a row)",
    "loss_95": "95 % interval of the loss by bootstrap over documents; null for fewer than 10 documents",
    "bits_per_byte": "all counted nats / ln 2 / bytes of the counted tokens; special tokens count nats but 0 bytes",
    "continuations": "loss of the tokens that follow the first p tokens of a document (BOS is one of them), "
    "given those tokens and the true continuation so far",
    "samples": "prediction: greedy, from the prompt alone; loss: of the truth, teacher-forced",
}


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


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A document's beginning, how the model goes on, how the document does, and the loss of that in nats per token."""

    document: int
    prompt: str
    prediction: str
    truth: str
    loss: float
    stopped: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that eval.py found. `about` says of what: checkpoint, data, split, lengths, precision, processes."""

    about: dict[str, Any]
    scores: Scores
    continuations: dict[int, Scores]
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.about,
            "scores": self.scores.as_dict(),
            "continuations": {str(p): scores.as_dict() for p, scores in self.continuations.items()},
            "samples": [dataclasses.asdict(sample) for sample in self.samples],
            "definitions": DEFINITIONS,
            "seconds": round(self.seconds, 3),
        }

    def write(self, path: Path) -> None:
        """JSON, whole or not at all."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        aside = path.with_name(f".{path.name}.part")
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(path)


def make_report(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    held_out: HeldOut,
    asked: Asked,
    how: How,
    about: dict[str, Any] | None = None,
) -> Report:
    """Score the model. Every process calls this; the numbers are the same in all, the samples are in rank 0's.

    Raises ConfigError for lengths that do not fit, before computing; CheckFailed if the loss is not finite.
    """
    start = time.monotonic()
    lengths = asked.checked_lengths(model)
    rank, world = processes()
    scores = held_out.scores(model, how)
    if scores.num_tokens and not math.isfinite(scores.loss):
        scores.as_dict()  # raises, and says what to do
    # Documents evenly spaced over all of them: the first ones of a corpus are often alike.
    wanted = min(asked.continuation_documents, held_out.num_documents)
    numbers = [k * held_out.num_documents // wanted for k in range(wanted)]
    most_tokens = max(lengths, default=0) + asked.continuation_tokens
    byte_lengths = None if tokenizer is None else byte_lengths_of(tokenizer)
    continuations = {}
    if lengths:
        continuations = continuation_of_tokens(
            model,
            held_out.token_documents(numbers[rank::world], most_tokens),
            lengths,
            asked.continuation_tokens,
            byte_lengths=byte_lengths,
            batch_rows=how.batch_rows,
            precision=how.precision,
        )
    samples = []
    if rank == 0 and asked.samples and lengths:
        samples = make_samples(model, tokenizer, held_out, numbers, lengths, asked, how)
    return Report(
        about={**(about or {}), **held_out.describe(), "precision": how.precision, "num_processes": world},
        scores=scores,
        continuations=continuations,
        samples=samples,
        seconds=time.monotonic() - start,
    )


def make_samples(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    held_out: HeldOut,
    numbers: Sequence[int],
    lengths: Sequence[int],
    asked: Asked,
    how: How,
) -> list[Sample]:
    """Greedy continuations of documents, spaced evenly over those that are long enough, by this process alone."""
    prompt_tokens = lengths[len(lengths) // 2]
    whole = prompt_tokens + asked.continuation_tokens
    tokens = held_out.token_documents(numbers, whole)
    enough = [(n, t) for n, t in zip(numbers, tokens, strict=True) if len(t) == whole]
    count = min(asked.samples, len(enough))
    chosen = [enough[k * len(enough) // count] for k in range(count)]
    if not chosen:
        return []
    rows = [Row(number, t, prompt_tokens) for number, t in chosen]
    sums = measure(model, rows, precision=how.precision)
    results = generate(
        model,
        [t[:prompt_tokens] for _, t in chosen],
        max_new_tokens=asked.continuation_tokens,
        temperature=0,
        eos_id=None if tokenizer is None else tokenizer.eos_id,
    )
    samples = []
    for (number, t), result in zip(chosen, results, strict=True):
        nats, counted, _ = sums.totals[number]
        samples.append(
            Sample(
                document=number,
                prompt=shown(tokenizer, t[:prompt_tokens]),
                prediction=shown(tokenizer, result.tokens),
                truth=shown(tokenizer, t[prompt_tokens:]),
                loss=Sum.of(nats, counted).mean,
                stopped=result.stopped,
            )
        )
    return samples


def shown(tokenizer: Tokenizer | None, tokens: list[int]) -> str:
    """The text of tokens; their numbers where there is no tokenizer."""
    return " ".join(map(str, tokens)) if tokenizer is None else text_of(tokenizer, tokens)


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
    for name in ("", "loss", "95 %", "perplexity", "bits/byte", "tokens", "documents", "left out"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    table.add_row("all", *_cells(scores))
    for p, continuation in report.continuations.items():
        table.add_row(f"after {p}", *_cells(continuation))
    # As wide as it is, whatever the terminal: a number that is cut off reads as another number.
    Console(file=console.file, width=1000).print(table, crop=False)
    said = f"Loss in nats per token. Context {scores.context_tokens} tokens"
    if about.get("kind") == "text":
        said += f", in longer documents at least {scores.least_context_tokens}"
    if report.continuations:
        said += ". after p: the continuation of a document's first p tokens; left out: too short for it"
    console.print(f"{said}. {report.seconds:.1f} s, {about['num_processes']} process(es).")
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


def printable(text: str) -> str:
    """Control characters as their pictures: text of a model must not command the terminal."""
    pictures = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421}
    return text.translate(pictures | dict.fromkeys(range(128, 160), 65533))


def _cells(scores: Scores) -> list[str]:
    counts = [f"{scores.num_tokens:,}", f"{scores.num_documents:,}", f"{scores.num_excluded:,}"]
    if not scores.num_tokens:
        return ["-", "-", "-", "-", *counts]
    interval = "-" if scores.interval is None else f"{scores.interval[0]:.3f}..{scores.interval[1]:.3f}"
    bits = "-" if scores.bits_per_byte is None else f"{scores.bits_per_byte:.4f}"
    return [f"{scores.loss:.4f}", interval, f"{scores.perplexity:,.2f}", bits, *counts]
