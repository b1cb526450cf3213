"""What a model writes after the beginnings of some documents, beside what stands there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from minilm.alignment import Sum
from minilm.data.tokenizer import Tokenizer
from minilm.evaluation.generate import generate
from minilm.evaluation.heldout import HeldOut
from minilm.evaluation.score import Row, measure
from minilm.evaluation.text import text_of


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A document's beginning, how the model goes on, how the document does, and the loss of that in nats per token."""

    document: int
    prompt: str
    prediction: str
    truth: str
    loss: float
    stopped: str


def make_samples(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    held_out: HeldOut,
    numbers: Sequence[int],
    *,
    prompt_tokens: int,
    continuation_tokens: int,
    count: int,
    precision: str | None,
) -> list[Sample]:
    """Greedy continuations of documents, spaced evenly over those that are long enough, by this process alone."""
    whole = prompt_tokens + continuation_tokens
    tokens = held_out.token_documents(numbers, whole)
    enough = [(n, t) for n, t in zip(numbers, tokens, strict=True) if len(t) == whole]
    count = min(count, len(enough))
    chosen = [enough[k * len(enough) // count] for k in range(count)]
    if not chosen:
        return []
    rows = [Row(number, t, prompt_tokens) for number, t in chosen]
    sums = measure(model, rows, precision=precision)
    results = generate(
        model,
        [t[:prompt_tokens] for _, t in chosen],
        max_new_tokens=continuation_tokens,
        temperature=0,
        eos_id=None if tokenizer is None else tokenizer.eos_id,
    )
    samples = []
    for (number, t), result in zip(chosen, results, strict=True):
        nats, counted, *_ = sums.totals[number]
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
