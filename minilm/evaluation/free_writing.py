"""Free-running continuations: the model writes on from its own words, and the text is held against the truth.

Teacher-forced loss says how well each next token is foreseen with the truth before it. It does not say what the
model writes: a model with a good loss can repeat its prompt for ever. Here every document gives a prompt (its first
p tokens) and a truth (the n tokens after them); the model writes n tokens, or fewer with EOS as the last, once
greedily and, where asked for, several times by drawing.

Documents are spread over the processes; sample s of the d-th document is drawn with the seed `seed + d * samples + s`,
so texts and numbers do not depend on the number of processes or on the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm.alignment import Sum
from minilm.errors import ConfigError, listed
from minilm.evaluation.generate import Sampling, generate
from minilm.evaluation.heldout import HeldOut, How
from minilm.evaluation.intervals import device_of_messages, processes
from minilm.evaluation.mode import autocast, device_of
from minilm.evaluation.samples import shown
from minilm.evaluation.score import Row, check_continuation, measure
from minilm.evaluation.text_metrics import (
    Measured,
    Written,
    accuracy_by_position,
    across_samples,
    against_truth,
    of_one_text,
    require_packages,
)

ROWS_TOGETHER = 32  # texts that are written together, unless a batch size is given
SUSPICIOUS = 0.5  # share of texts that copy their prompt, or are of one token, at which it is said


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What is to be written. Raises ConfigError listing every value that means nothing.

    documents      how many, evenly spaced over those of the data
    samples        texts drawn per prompt, beside the greedy one; 0: none
    temperature, top_k, top_p, seed   of the drawing
    bleu_tokenize  how sacrebleu finds words
    """

    documents: int = 64
    samples: int = 0
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    bleu_tokenize: str = "13a"

    def __post_init__(self) -> None:
        problems = []
        if self.documents < 1:
            problems.append(f"free-running documents are {self.documents}; at least 1 is needed.")
        if self.samples < 0:
            problems.append(f"samples per prompt is {self.samples}; it must be at least 0.")
        if self.samples and self.temperature == 0:
            problems.append(
                "a temperature of 0 draws the greedy text every time: ask for 0 samples per prompt."
            )
        try:
            self.sampling(1)
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError(listed(problems))

    def sampling(self, max_new_tokens: int) -> Sampling:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table: a document's beginning, what was written, the truth and its loss in nats per token."""

    document: int
    prompt: str
    greedy: str
    samples: list[str]
    truth: str
    loss: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "document": self.document,
            "prompt": self.prompt,
            "prediction": self.greedy,
            "samples": self.samples,
            "truth": self.truth,
            "loss": self.loss,
        }


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The numbers of one way of writing. `by_position`: accuracy at each place of the continuation."""

    values: dict[str, Measured]
    by_position: list[float]
    across: dict[str, Measured]


@dataclass(frozen=True, kw_only=True)
class Continued:
    """All about one prompt length. `sampled` is None where nothing was drawn, `truth` what real text measures."""

    prompt_tokens: int
    continuation_tokens: int
    num_documents: int
    num_excluded: int  # documents with fewer than prompt and continuation tokens
    greedy: Measures | None
    sampled: Measures | None
    truth: dict[str, Measured]
    lines: list[Line]
    warnings: list[str]


def continue_freely(
    model: nn.Module,
    tokenizer: Any,
    held_out: HeldOut,
    prompt_tokens: int,
    continuation_tokens: int,
    writing: Writing,
    how: How | None = None,
) -> Continued:
    """Write and measure. Every process calls this; all get the same.

    Raises ConfigError for lengths that mean nothing or do not fit the context and for missing packages, before
    anything is computed.
    """
    require_packages()
    check_continuation(model, [prompt_tokens], continuation_tokens)
    how = how or How()
    whole = prompt_tokens + continuation_tokens
    wanted = min(writing.documents, held_out.num_documents)
    numbers = [k * held_out.num_documents // wanted for k in range(wanted)]
    found = zip(numbers, held_out.token_documents(numbers, whole), strict=True)
    documents = [(number, tokens) for number, tokens in found if len(tokens) == whole]
    if not documents:
        return Continued(
            prompt_tokens=prompt_tokens,
            continuation_tokens=continuation_tokens,
            num_documents=0,
            num_excluded=wanted,
            greedy=None,
            sampled=None,
            truth={},
            lines=[],
            warnings=[f"none of {wanted} documents has {whole} tokens: nothing was written"],
        )
    eos_id = None if tokenizer is None else tokenizer.eos_id
    writer = _Writer(model, [t[:prompt_tokens] for _, t in documents], continuation_tokens, eos_id, how)
    ways = [writer.write(Writing(temperature=0), 1)]
    if writing.samples:
        ways.append(writer.write(writing, writing.samples))
    written = [_written(tokenizer, documents, prompt_tokens, texts, eos_id) for texts in ways]
    measures = [_measures(some, writing) for some in written]
    truth = of_one_text([one.of_truth() for one in written[0]])
    return Continued(
        prompt_tokens=prompt_tokens,
        continuation_tokens=continuation_tokens,
        num_documents=len(documents),
        num_excluded=wanted - len(documents),
        greedy=measures[0],
        sampled=measures[1] if writing.samples else None,
        truth=truth,
        lines=_lines(
            tokenizer, documents, prompt_tokens, written, _losses(model, documents, prompt_tokens, how)
        ),
        warnings=_warnings(written[0], measures, truth),
    )


class _Writer:
    """Writes on from prompts, each process from its own run of them; the texts of all are then in every process."""

    def __init__(
        self, model: nn.Module, prompts: list[list[int]], num_tokens: int, eos_id: int | None, how: How
    ) -> None:
        self.model, self.prompts, self.num_tokens, self.eos_id, self.how = (
            model,
            prompts,
            num_tokens,
            eos_id,
            how,
        )

    def write(self, writing: Writing, samples: int) -> list[list[list[int]]]:
        """For each prompt `samples` texts as tokens, EOS included."""
        rank, world = processes()
        first, stop = (r * len(self.prompts) // world for r in (rank, rank + 1))
        together = max(1, (self.how.batch_rows or ROWS_TOGETHER) // samples)
        # [documents, samples, tokens], one more than the token, so that 0 says that there is none
        table = torch.zeros(len(self.prompts), samples, self.num_tokens, dtype=torch.int64)
        with autocast(device_of(self.model), self.how.precision):
            for start in range(first, stop, together):
                self._fill(table, start, min(start + together, stop), writing, samples)
        if world > 1:
            shared = table.to(device_of_messages())
            torch.distributed.all_reduce(shared)
            table = shared.cpu()
        return [[[t - 1 for t in text if t] for text in texts] for texts in table.tolist()]

    def _fill(self, table: Tensor, start: int, stop: int, writing: Writing, samples: int) -> None:
        results = generate(
            self.model,
            [prompt for prompt in self.prompts[start:stop] for _ in range(samples)],
            max_new_tokens=self.num_tokens,
            temperature=writing.temperature,
            top_k=writing.top_k,
            top_p=writing.top_p,
            seed=writing.seed + start * samples,  # the i-th text of a call is drawn with its seed + i
            eos_id=self.eos_id,
        )
        for number, result in enumerate(results):
            document, sample = divmod(number, samples)
            table[start + document, sample, : len(result.tokens)] = torch.tensor(result.tokens) + 1


def _written(
    tokenizer: Any,
    documents: Sequence[tuple[int, list[int]]],
    prompt_tokens: int,
    texts: list[list[list[int]]],
    eos_id: int | None,
) -> list[Written]:
    def ended(tokens: Sequence[int]) -> bool:
        return eos_id is not None and bool(tokens) and tokens[-1] == eos_id

    return [
        Written(
            document=number,
            prompt=tokens[:prompt_tokens],
            tokens=text,
            truth=tokens[prompt_tokens:],
            text=shown(tokenizer, text),
            true_text=shown(tokenizer, tokens[prompt_tokens:]),
            ended=ended(text),
            truth_ended=ended(tokens[prompt_tokens:]),
        )
        for (number, tokens), some in zip(documents, texts, strict=True)
        for text in some
    ]


def _measures(written: list[Written], writing: Writing) -> Measures:
    against = against_truth(written, bleu_tokenize=writing.bleu_tokenize)
    return Measures(
        values={**against, **of_one_text(written)},
        by_position=accuracy_by_position(written),
        across=across_samples(written, bleu_tokenize=writing.bleu_tokenize),
    )


def _losses(
    model: nn.Module, documents: Sequence[tuple[int, list[int]]], prompt_tokens: int, how: How
) -> dict[int, float]:
    """Of each document's truth, teacher-forced, in nats per token."""
    rank, world = processes()
    rows = [Row(number, tokens, prompt_tokens) for number, tokens in documents[rank::world]]
    sums = measure(
        model, rows, batch_rows=how.batch_rows or ROWS_TOGETHER, precision=how.precision
    ).gathered()
    return {number: Sum.of(*values[:2]).mean for number, values in sums.totals.items()}


def _lines(
    tokenizer: Any,
    documents: Sequence[tuple[int, list[int]]],
    prompt_tokens: int,
    written: list[list[Written]],
    losses: dict[int, float],
) -> list[Line]:
    drawn: dict[int, list[str]] = {}
    for one in written[1] if len(written) > 1 else ():
        drawn.setdefault(one.document, []).append(one.text)
    return [
        Line(
            document=number,
            prompt=shown(tokenizer, tokens[:prompt_tokens]),
            greedy=greedy.text,
            samples=drawn.get(number, []),
            truth=greedy.true_text,
            loss=losses[number],
        )
        for (number, tokens), greedy in zip(documents, written[0], strict=True)
    ]


def _warnings(greedy: list[Written], measures: list[Measures], truth: dict[str, Measured]) -> list[str]:
    """What looks like a broken generator or a collapsed model; text that is like that itself is no reason."""
    found = []
    kinds = {"copies_prompt": "only repeat their prompt", "one_token": "are one token again and again"}
    for way, measured in zip(("greedy", "sampled"), measures, strict=False):
        for name, what in kinds.items():
            share, of_truth = measured.values[name].value or 0.0, truth[name].value or 0.0
            if share >= SUSPICIOUS and of_truth <= share / 2:
                texts = f"{measured.values[name].count} {way} texts"
                found.append(f"{share:.0%} of the {texts} {what} (of the true texts {of_truth:.0%})")
    prompts, truths = {tuple(w.prompt) for w in greedy}, {tuple(w.truth) for w in greedy}
    if len({tuple(w.tokens) for w in greedy}) == 1 and len(prompts) > 1 and len(truths) > 1:
        found.append(f"the same greedy text follows all {len(prompts)} prompts")
    return found
