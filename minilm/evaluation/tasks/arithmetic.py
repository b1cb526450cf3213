"""What a model says of texts: log-likelihoods, greedy agreement, greedy continuations. The only place that computes.

Local tasks and lm-evaluation-harness get their numbers from here, so they cannot differ. The rules are the harness's:

* A context and its continuation are encoded together and cut at the length of the context encoded alone; spaces at
  the end of the context belong to the continuation. Tokens may join across the border.
* Every text begins with the token that begins a document (BOS, or EOS where there is no BOS and no text before).
* What is too long for the model loses tokens on the left, and is counted in `cut`.
* An answer is greedy when each of its tokens is the most probable one; of equal logits the lower id counts as higher.

A row says which of its tokens are asked for. `alignment.align` puts that into the frame of the logits; here no tensor
is shifted. Results are those of this process's texts, in their order, whatever is computed together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from minilm.alignment import Batch, align
from minilm.errors import CheckFailed, ConfigError, DataError
from minilm.evaluation.generate import generate
from minilm.evaluation.mode import autocast, context_tokens, device_of, eval_mode, random_states_kept
from minilm.evaluation.progress import tracked
from minilm.evaluation.score import POSITIONS_PER_BATCH, predictions, windows
from minilm.evaluation.text import byte_lengths_of


@dataclass(frozen=True)
class Span:
    """Some tokens of a text: their nats, how many, how many of them are the most probable one, and their bytes.

    num_bytes  NaN where the tokens do not stand for fixed bytes
    joined     the context alone has other tokens than at the beginning of the whole
    cut        tokens that were left out on the left, because the model's context is shorter
    """

    nats: float
    tokens: int
    right: int
    num_bytes: float = math.nan
    joined: bool = False
    cut: int = 0

    @property
    def greedy(self) -> bool:
        """Would greedy decoding have given exactly these tokens?"""
        return self.right == self.tokens


class Written(NamedTuple):
    """A continuation, and how many tokens of its prompt were left out on the left."""

    text: str
    cut: int = 0


class Reader(Protocol):
    """Who answers the questions of a task: a model, or in tests somebody who knows the answers."""

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Span]:
        """For each (context, continuation) the continuation."""

    def completions(self, prompts: Sequence[str], stop: Sequence[str], max_new_tokens: int) -> list[Written]:
        """The greedy continuation of each prompt, up to the first stop text."""

    def repetitions(self, once: Sequence[Sequence[int]]) -> list[tuple[Span, Span]]:
        """For the same tokens twice: each copy, without its first token."""


@dataclass(frozen=True)
class _Row:
    """Tokens, and for each of them the span that it belongs to, or -1 where it is not asked for."""

    tokens: list[int]
    spans: list[int]
    joined: bool = False
    cut: int = 0


class TextModel:
    """A model with its tokenizer as somebody who answers. It must be the bare module, as for `score.evaluate`.

    batch_rows  rows computed together; changes speed, not numbers
    begin       give each text the token that begins a document (as in training); without it only an empty context
                gets one
    max_length  a shorter context than the model's own
    Raises ConfigError for a model that does not say how long its context is.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_rows: int | None = None,
        precision: str | None = None,
        max_length: int | None = None,
        begin: bool = True,
        progress: bool = False,
    ) -> None:
        own = context_tokens(model)
        if own is None and max_length is None:
            raise ConfigError("This model does not say how long its context is: give a length.")
        if max_length is not None and (max_length < 2 or (own is not None and max_length > own)):
            raise ConfigError(f"The context is to be {max_length} tokens; it must be 2 to the model's {own}.")
        self.model, self.tokenizer, self.begin = model, tokenizer, begin
        self.max_length: int = max_length or own  # type: ignore[assignment]
        self.batch_rows, self.precision, self.progress = batch_rows, precision, progress
        self.byte_lengths: Tensor | None = None if tokenizer is None else byte_lengths_of(tokenizer)
        if self.byte_lengths is not None:
            self.byte_lengths = self.byte_lengths.to(device_of(model), torch.float64)

    @property
    def first_token(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_id
        return int(self.tokenizer.eos_id if bos is None else bos)

    def encode(self, text: str) -> list[int]:
        """As a document begins: with BOS, where the tokenizer has one and it is wanted."""
        return list(self.tokenizer.prompt(text) if self.begin else self.tokenizer.encode(text))

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Span]:
        """For each (context, continuation) the continuation. Raises DataError for one without a token of its own."""
        return [spans[0] for spans in self.read([self.row(*pair) for pair in pairs], 1)]

    def rolling(self, texts: Sequence[str]) -> list[Span]:
        """All tokens of each text, each once, in windows as `score.documents` makes them."""
        rows, owners = [], []
        for number, text in enumerate(texts):
            ids = [self.first_token, *self.tokenizer.encode(text)]
            for window in windows(number, ids, self.max_length, max(1, self.max_length // 2)):
                # The first token of the first window is nobody's target.
                start = max(1, window.learn_from)
                spans = [0 if place >= start else -1 for place in range(len(window.tokens))]
                rows.append(_Row(list(window.tokens), spans))
                owners.append(number)
        found = [Span(0.0, 0, 0, 0.0) for _ in texts]
        for number, (span,) in zip(owners, self.read(rows, 1), strict=True):
            found[number] = _added(found[number], span)
        return found

    def repetitions(self, once: Sequence[Sequence[int]]) -> list[tuple[Span, Span]]:
        """For the same tokens twice: each copy, without its first token, which nothing announces."""
        before = [] if self.tokenizer is None else [self.first_token]
        rows = []
        for ids in once:
            asked = [-1] * (len(before) + 1) + [0] * (len(ids) - 1) + [-1] + [1] * (len(ids) - 1)
            rows.append(_Row([*before, *ids, *ids], asked))
        return [(first, second) for first, second in self.read(rows, 2)]

    def completions(self, prompts: Sequence[str], stop: Sequence[str], max_new_tokens: int) -> list[Written]:
        """The greedy continuation of each prompt, up to the first stop text or the end of the document."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"{max_new_tokens} new tokens leave no room for a prompt: the model's context is {self.max_length}."
            )
        whole = [self.encode(prompt) or [self.first_token] for prompt in prompts]
        rows = [ids[max(0, len(ids) - room) :] for ids in whole]
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        size = self.batch_rows or max(1, POSITIONS_PER_BATCH // self.max_length)
        texts = [""] * len(rows)
        groups = [order[first : first + size] for first in range(0, len(order), size)]
        for group in tracked(groups, len(groups), "batches of prompts", shown=self.progress):
            with random_states_kept(), autocast(device_of(self.model), self.precision):
                written = generate(
                    self.model,
                    [rows[n] for n in group],
                    max_new_tokens=max_new_tokens,
                    temperature=0,
                    eos_id=self.tokenizer.eos_id,
                    tokenizer=self.tokenizer,
                    stop=[text for text in stop if text],
                )
            for n, one in zip(group, written, strict=True):
                texts[n] = one.text or ""
        cut = [len(ids) - len(row) for ids, row in zip(whole, rows, strict=True)]
        return [Written(*one) for one in zip(texts, cut, strict=True)]

    def prompt_tokens(self, prompt: str) -> int:
        """How long a prompt is, in tokens."""
        return len(self.encode(prompt))

    def row(self, context: str, continuation: str) -> _Row:
        """The row that asks for a continuation. Raises DataError where it has no token, or too many for the model."""
        joined = False
        if context:
            spaces = len(context) - len(context.rstrip())
            context, moved = context[: len(context) - spaces], context[len(context) - spaces :]
            head, tokens = self.encode(context), self.encode(context + moved + continuation)
            joined = tokens[: len(head)] != head
        else:
            head, tokens = [self.first_token], [self.first_token, *self.tokenizer.encode(continuation)]
        if not head:  # a context of spaces, and no token that begins a text
            head, tokens = [self.first_token], [self.first_token, *tokens]
        asked = len(tokens) - len(head)
        if not 1 <= asked <= self.max_length:
            raise DataError(
                f"{shown(continuation)} after {shown(context[-40:])} has {max(0, asked)} tokens of its own; it must "
                f"have 1 to the model's context, {self.max_length}."
            )
        cut = max(0, len(tokens) - (self.max_length + 1))
        spans = [-1] * len(head) + [0] * asked
        return _Row(tokens[cut:], spans[cut:], joined, cut)

    def read(self, rows: Sequence[_Row], num_spans: int) -> list[list[Span]]:
        """The spans of every row, in the order of the rows. Raises CheckFailed for nats that are not finite."""
        order = sorted(range(len(rows)), key=lambda n: len(rows[n].tokens))
        longest = max((len(row.tokens) for row in rows), default=1)
        size = self.batch_rows or max(1, POSITIONS_PER_BATCH // longest)
        groups = [order[first : first + size] for first in range(0, len(order), size)]
        place, found = device_of(self.model), dict[int, list[Span]]()
        with random_states_kept(), eval_mode(self.model), autocast(place, self.precision):
            for group in tracked(groups, len(groups), "batches of texts", shown=self.progress):
                some = [rows[n] for n in group]
                batch = _batch(some).to(place)
                found.update(zip(group, self._spans(some, batch, num_spans), strict=True))
        return [found[n] for n in range(len(rows))]

    def _spans(self, rows: Sequence[_Row], batch: Batch, num_spans: int) -> Iterator[list[Span]]:
        assert batch.entries is not None
        label = (
            batch.entries[batch.weights > 0].cpu().numpy()
        )  # of each prediction that counts, row after row
        # The labels are no entries of a knowledge source: the model must not see them.
        found = predictions(self.model, dataclasses.replace(batch, entries=None), self.byte_lengths)
        columns = np.stack([found.nats, np.ones(len(label)), found.rank == 0, found.bytes], axis=1)  # [N, 4]
        sums = np.zeros((len(rows), num_spans, 4))
        np.add.at(sums, (found.row, label), columns)
        if not np.isfinite(sums[:, :, 0]).all():
            raise CheckFailed(
                "The log-likelihood of a text is not finite: the model's weights may have diverged or be damaged. "
                "Look at the loss of the run, and at another checkpoint."
            )
        for row, spans in zip(rows, sums.tolist(), strict=True):
            yield [Span(n, int(t), int(r), b, row.joined, row.cut) for n, t, r, b in spans]


def shown(text: str) -> str:
    """A text for a message: not long, and on one line."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _added(one: Span, other: Span) -> Span:
    return Span(
        one.nats + other.nats,
        one.tokens + other.tokens,
        one.right + other.right,
        one.num_bytes + other.num_bytes,
        one.joined or other.joined,
        one.cut + other.cut,
    )


def _batch(rows: Sequence[_Row]) -> Batch:
    """Rows padded on the right. The span of a token travels with it as its entry of a knowledge source would."""
    width = max(2, *(len(row.tokens) for row in rows))
    shape = len(rows), width
    tokens, segments = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    spans = torch.full(shape, -1)
    for number, row in enumerate(rows):
        size = len(row.tokens)
        tokens[number, :size] = torch.tensor(row.tokens)
        segments[number, :size] = 1
        spans[number, :size] = torch.tensor(row.spans)
    return align(tokens, segments, spans >= 0, spans)
