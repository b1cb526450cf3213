"""Text from a model: one sampler, one generator, batched or streamed.

    results = generate(model, [tokenizer.prompt("def ")], max_new_tokens=64, eos_id=tokenizer.eos_id)
    for piece in stream(model, tokenizer, "def ", max_new_tokens=64):
        print(piece, end="", flush=True)

What can be relied on, each held by a test against a generator without cache:
* Only new tokens are returned; the prompt goes into the model as it is. Exactly `max_new_tokens` of them, or
  fewer with EOS as the last.
* Sample i of a call is drawn with `seed + i`, by one uniform number per token from a generator of its own. What
  else stands in the batch, the global random state and the device do not change it.
* The order is temperature, top-k, top-p, as in transformers. Of equal logits the lower id counts as the higher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.alignment import last, positions_within
from minilm.errors import CheckFailed, ConfigError, DataError, listed
from minilm.evaluation.mode import context_tokens, device_of, eval_mode, head_of
from minilm.evaluation.text import TextPieces


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Raises ConfigError listing every value that means nothing.

    max_new_tokens  how many tokens to generate, EOS included
    temperature     logits are divided by it; 0 takes the most probable token always
    top_k           keep the k most probable tokens, exactly k also among equals; None keeps all
    top_p           of these keep the fewest whose probabilities reach top_p; 1 (or None) keeps all
    seed            sample i of a call uses seed + i
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not _is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            problems.append(
                f"max_new_tokens is {self.max_new_tokens!r}; it must be an integer of at least 1."
            )
        if not 0 <= self.temperature < float("inf"):
            problems.append(
                f"temperature is {self.temperature!r}; it must be 0 (greedy) or a positive number."
            )
        if self.top_k is not None and (not _is_integer(self.top_k) or self.top_k < 1):
            problems.append(
                f"top_k is {self.top_k!r}; it must be an integer of at least 1 (leave it out to keep all)."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p!r}; it must be above 0 and at most 1 (1 keeps all).")
        if not _is_integer(self.seed) or self.seed < 0:
            problems.append(f"seed is {self.seed!r}; it must be an integer of at least 0.")
        if problems:
            raise ConfigError(listed(problems))


@dataclass(frozen=True)
class Generated:
    """A continuation.

    prompt   the tokens that were continued
    tokens   the new tokens, EOS included where it stopped there
    stopped  "eos" or "length" (max_new_tokens)
    nats     of each new token, under the model as it is (temperature 1, nothing cut off): what a teacher-forced
             loss of the same tokens would say
    """

    prompt: list[int]
    tokens: list[int]
    nats: list[float]
    stopped: Literal["eos", "length"]


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
    bos_id: int | None = None,
) -> list[Generated]:
    """Continue every prompt; all go through the model together. Results in the order of the prompts.

    eos_id  stops a sample (None: never); bos_id is what an empty prompt becomes.

    Raises, before anything is computed, ConfigError (settings; prompt and new tokens longer than the context)
    and DataError (an empty prompt without bos_id, ids outside the vocabulary). Raises CheckFailed if the model
    gives logits that are no numbers.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    rows = checked_prompts(model, prompts, max_new_tokens, bos_id)
    news: list[list[New]] = [[] for _ in rows]
    for step in _steps(model, rows, sampling, eos_id) if rows else ():
        for mine, new in zip(news, step, strict=True):
            if new is not None:
                mine.append(new)
    return [
        Generated(
            prompt=row,
            tokens=[new.token for new in mine],
            nats=[new.nats for new in mine],
            stopped="eos" if mine[-1].token == eos_id else "length",
        )
        for row, mine in zip(rows, news, strict=True)
    ]


def stream(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """The continuation of a text in pieces, as they come; put together they are `tokenizer.decode` of all new tokens.

    A piece never has a part of a character. Settings and prompt are checked at the call, before the first piece.
    The model may be used for other things between two pieces: its mode is changed within a step only.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    rows = checked_prompts(model, [tokenizer.prompt(text)], max_new_tokens, tokenizer.bos_id)
    return _pieces(_steps(model, rows, sampling, tokenizer.eos_id), TextPieces(tokenizer))


def _pieces(steps: Iterator[list[New | None]], decoder: TextPieces) -> Iterator[str]:
    for (new,) in steps:
        if new is not None and (piece := decoder.push(new.token)):
            yield piece
    if piece := decoder.finish():
        yield piece


def checked_prompts(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, bos_id: int | None
) -> list[list[int]]:
    """The prompts as lists of Python integers, an empty one as [bos_id]; raises for those that cannot be continued."""
    rows = [[int(token) for token in prompt] for prompt in prompts]
    rows = [row if row or bos_id is None else [bos_id] for row in rows]
    empty = [i for i, row in enumerate(rows) if not row]
    if empty:
        raise DataError(
            f"Prompt {empty[0]} is empty, and there is no begin-of-sequence token to start from: give a prompt."
        )
    config = getattr(model, "config", None)
    num_tokens = getattr(config, "vocab_size", None)
    if num_tokens is not None:
        wrong = [(i, t) for i, row in enumerate(rows) for t in row if not 0 <= t < num_tokens]
        if wrong:
            raise DataError(
                f"Prompt {wrong[0][0]} has token {wrong[0][1]}, but the model knows 0 to {num_tokens - 1}: "
                "the tokenizer is not the one that the model was trained with."
            )
    context = context_tokens(model)
    # The last new token is not fed back, so it needs no place in the context.
    needed = [len(row) + max_new_tokens - 1 for row in rows]
    if context is not None and rows and max(needed) > context:
        i = max(range(len(rows)), key=lambda k: needed[k])
        raise ConfigError(
            f"Prompt {i} has {len(rows[i])} tokens; with max_new_tokens {max_new_tokens} it needs a context of "
            f"{needed[i]} tokens, but the model has {context}. Shorten the prompt, or ask for at most "
            f"{max(0, context - len(rows[i]) + 1)} new tokens."
        )
    return rows


@dataclass(frozen=True)
class New:
    """A new token of one row, and its nats under the model."""

    token: int
    nats: float


def _steps(
    model: nn.Module, prompts: list[list[int]], sampling: Sampling, eos_id: int | None
) -> Iterator[list[New | None]]:
    """One list per step: the new token of each row, None for rows that have ended."""
    feed: _Cached | _Repeated
    if hasattr(model, "new_cache"):
        feed = _Cached(model, prompts, sampling.max_new_tokens)
    else:
        feed = _Repeated(model, prompts)
    # A generator of its own per row: a row ends without moving the numbers of the others.
    random = [np.random.default_rng(sampling.seed + i) for i in range(len(prompts))]
    running = [True] * len(prompts)
    for number in range(sampling.max_new_tokens):
        with eval_mode(model):
            logits = feed.logits()  # [B, V]
            _check_finite(logits, running, number)
            uniform = torch.tensor([r.random() for r in random], dtype=torch.float64)
            chosen = choose(logits, sampling, uniform)
            nats = -F.log_softmax(logits, dim=-1).gather(1, chosen.unsqueeze(1)).squeeze(1)
        tokens = chosen.tolist()
        yield [
            New(token, value) if active else None
            for token, value, active in zip(tokens, nats.tolist(), running, strict=True)
        ]
        running = [active and token != eos_id for active, token in zip(running, tokens, strict=True)]
        if not any(running):
            return
        feed.append(chosen)


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The next token of each row, [B] int64: the only sampler.

    logits [B, V]; uniform [B] float64 in [0, 1), the row's random number: the tokens that are kept, from the most
    probable down, share the unit interval in proportion to their probabilities, and the number falls into one.
    Computed in float64: with a vocabulary of 100,000 a float32 running sum loses the rare tokens.
    """
    if sampling.temperature == 0:
        return _first_maximum(logits)
    # The maximum is taken off before dividing, so that no temperature, however small, overflows.
    scaled = (logits.double() - logits.double().amax(dim=-1, keepdim=True)) / sampling.temperature
    probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    # [B] how many of the first may be drawn; 1 where an ended row has run into NaN, whose token nobody reads
    kept = (probabilities > 0).sum(dim=-1).clamp(min=1)
    if sampling.top_k is not None:
        kept = kept.clamp(max=sampling.top_k)
    reached = probabilities.cumsum(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        whole = reached.gather(1, kept.unsqueeze(1) - 1)  # what is left after top-k counts as 1
        kept = torch.minimum(kept, (reached < sampling.top_p * whole).sum(dim=-1) + 1)
    whole = reached.gather(1, kept.unsqueeze(1) - 1)  # [B, 1]
    place = torch.searchsorted(reached, uniform.to(logits.device).unsqueeze(1) * whole, right=True)
    place = torch.minimum(place, kept.unsqueeze(1) - 1)  # u * whole may round up to whole
    return order.gather(1, place).squeeze(1)


class _Cached:
    """Rows padded on the left, keys and values kept: after the prompt each step feeds one token a row."""

    def __init__(self, model: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
        device, width = device_of(model), max(map(len, prompts))
        self.model = model
        self.tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
        self.segments = torch.zeros_like(self.tokens)
        for row, prompt in enumerate(prompts):
            self.tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            self.segments[row, width - len(prompt) :] = 1
        self.tokens, self.segments = self.tokens.to(device), self.segments.to(device)
        self.cache = model.new_cache(len(prompts), width + max_new_tokens - 1)

    def logits(self) -> Tensor:
        """[B, V] float32 (or better) for the token after those fed last."""
        output = self.model(
            self.tokens, segments=self.segments, cache=self.cache
        )  # the cache counts positions
        rows, width = self.tokens.shape
        ends = torch.full((rows,), width, device=self.tokens.device)  # padding is on the left: all end there
        head = head_of(self.model)
        # Only the last position meets the output layer: for a long prompt that is most of its cost.
        if head is None:
            return _precise(last(output.logits, ends))
        return _precise(F.linear(last(output.hidden, ends), head))

    def append(self, chosen: Tensor) -> None:
        self.tokens = chosen.unsqueeze(1)
        self.segments = torch.ones_like(self.tokens)


class _Repeated:
    """For models without a cache: the whole text again at each step, padded on the right.

    On the right, because many models from elsewhere count positions from the start of the row.
    """

    def __init__(self, model: nn.Module, prompts: list[list[int]]) -> None:
        self.model = model
        self.device = device_of(model)
        self.rows = [list(prompt) for prompt in prompts]

    def logits(self) -> Tensor:
        width = max(map(len, self.rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in self.rows])
        lengths = torch.tensor([len(row) for row in self.rows])
        segments = (torch.arange(width) < lengths.unsqueeze(1)).long()
        positions = positions_within(segments)
        tokens, segments, positions = (x.to(self.device) for x in (tokens, segments, positions))
        output = self.model(tokens, segments=segments, positions=positions)
        return _precise(last(output.logits, lengths.to(self.device)))

    def append(self, chosen: Tensor) -> None:
        for row, token in zip(self.rows, chosen.tolist(), strict=True):
            row.append(token)


def _first_maximum(logits: Tensor) -> Tensor:
    """argmax with the lowest id among equals, on every device."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    highest = logits == logits.amax(dim=-1, keepdim=True)
    return torch.where(highest, ids, logits.shape[-1]).amin(dim=-1)


def _check_finite(logits: Tensor, running: list[bool], step: int) -> None:
    """-inf is a token that the model rules out; NaN, +inf and a row of -inf alone are defects, not token 0."""
    bad = (logits.isnan() | logits.isposinf()).any(dim=-1) | logits.isneginf().all(dim=-1)
    rows = [
        i for i, (wrong, active) in enumerate(zip(bad.tolist(), running, strict=True)) if wrong and active
    ]
    if rows:
        raise CheckFailed(
            f"The model's logits for new token {step + 1} of prompt {rows[0]} are not finite (NaN or infinite), so "
            "there is no next token. Its weights may have diverged or be damaged: look at the loss of the run, or "
            "load the model in float32 if it was loaded in a smaller type."
        )


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
