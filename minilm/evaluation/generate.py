"""Text from a model: one generator for every model, batched or streamed.

    results = generate(model, [tokenizer.prompt("def ")], max_new_tokens=64, eos_id=tokenizer.eos_id)
    for piece in stream(model, tokenizer, "def ", max_new_tokens=64):
        print(piece, end="", flush=True)

What can be relied on, each held by a test against a generator without cache (docs/generation.md):
* Only new tokens are returned; the prompt goes into the model as it is. Exactly `max_new_tokens` of them, or
  fewer with an end-of-sequence token, or the token that completes a stop string, as the last.
* Sample i of a call is drawn with `seed + i`, by one uniform number per token from a generator of its own. What
  else stands in the batch, the padding, the global random state and the device do not change these numbers. The
  logits they meet are the same up to the rounding of the model's type.
* The order is repetition penalty, temperature, top-k, top-p, min-p, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minilm.errors import CheckFailed, ConfigError
from minilm.evaluation.feeding import feed_of
from minilm.evaluation.prompts import checked_prompts, checked_stop, ending
from minilm.evaluation.sampling import Sampling, choose, draw, is_integer, penalised, told
from minilm.evaluation.text import StoppedText

__all__ = ["Generated", "Sampling", "TextStream", "choose", "generate", "stream"]

Stopped = Literal["eos", "stop", "length", "cancelled"]
Cancel = Callable[[], bool]


@dataclass(frozen=True)
class Generated:
    """A continuation.

    prompt      the tokens that were continued
    tokens      the new tokens, with the end-of-sequence token, or those of the stop string, that it stopped at
    nats        of each new token, under the model as it is (temperature 1, nothing cut off): what a teacher-forced
                loss of the same tokens would say
    drawn_nats  of each new token, minus the log of the probability with which it was drawn: after penalty,
                temperature and all cuts; 0 where greedy
    stopped     "eos", "stop" (a stop string), "length" (max_new_tokens) or "cancelled"
    text        of the new tokens, cut before the stop string; None where no tokenizer was given
    """

    prompt: list[int]
    tokens: list[int]
    nats: list[float]
    drawn_nats: list[float]
    stopped: Stopped
    text: str | None = None


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    eos_id: int | Sequence[int] | None = None,
    bos_id: int | None = None,
    tokenizer: Any = None,
    stop: str | Sequence[str] = (),
    cancel: Cancel | None = None,
) -> list[Generated]:
    """Continue every prompt; all go through the model together. Results in the order of the prompts.

    eos_id     one or several tokens that end a sample (None: nothing does); bos_id is what an empty prompt becomes
    seeds      one for each prompt, in place of seed, seed + 1, ...
    tokenizer  gives the results their text; needed for stop strings
    stop       strings that end a sample (`StoppedText`); min_new_tokens does not hold them off
    cancel     asked before each step: True ends all samples, which keep what they have

    Raises, before anything is computed, ConfigError (settings; prompt and new tokens longer than the context)
    and DataError (an empty prompt without bos_id, ids outside the vocabulary). Raises CheckFailed if the model
    gives logits that are no numbers.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    stop = checked_stop(stop, tokenizer)
    rows = checked_prompts(model, prompts, max_new_tokens, bos_id)
    own = _seeds(seeds, seed, len(rows))
    if not rows:
        return []
    texts = None if tokenizer is None else [StoppedText(tokenizer, stop) for _ in rows]
    writer = _Writer(model, rows, sampling, own, ending(eos_id), texts)
    with writer.feed.computing():
        while not writer.ended:
            if cancel is not None and cancel():
                writer.cancel()
            else:
                writer.step()
    return [writer.result(row) for row in range(len(rows))]


def stream(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    cancel: Cancel | None = None,
) -> TextStream:
    """The continuation of a text in pieces, as they come; put together they are the text that `generate` gives.

    A piece never has a part of a character, nor of a stop string. Settings and prompt are checked at the call, before
    the first piece. The model may be used for other things between two pieces: its mode is changed within a step only.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    decoder = StoppedText(tokenizer, checked_stop(stop, tokenizer))
    rows = checked_prompts(model, [tokenizer.prompt(text)], max_new_tokens, tokenizer.bos_id)
    return TextStream(_Writer(model, rows, sampling, [seed], ending(tokenizer.eos_id), [decoder]), cancel)


class TextStream(Iterator[str]):
    """The pieces of a text. It may be left at any time: `close`, or the end of a `with`, frees the cache."""

    def __init__(self, writer: _Writer, cancel: Cancel | None) -> None:
        self._writer: _Writer | None = writer
        self._cancel = cancel
        self._result = writer.result(0)

    @property
    def result(self) -> Generated:
        """What has come so far; `stopped` is "cancelled" until it has ended by itself; `text` is the pieces so far."""
        return self._result if self._writer is None else self._writer.result(0)

    def __next__(self) -> str:
        while (writer := self._writer) is not None:
            if self._cancel is not None and self._cancel():
                writer.cancel()
            else:
                self._step(writer)
            piece = writer.pieces[0]
            if writer.ended:
                self.close()
            if piece:
                return piece
        raise StopIteration

    def _step(self, writer: _Writer) -> None:
        try:
            with writer.feed.computing():
                writer.step()
        except BaseException:  # an iterator that failed has ended: the cache is freed
            self.close()
            raise

    def close(self) -> None:
        """No more pieces; the cache is freed."""
        self._result, self._writer = self.result, None

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _New(NamedTuple):
    """A new token of one row."""

    token: int
    nats: float
    drawn_nats: float


class _Writer:
    """A batch of texts being written: one token of each row at each step."""

    def __init__(
        self,
        model: nn.Module,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: list[int],
        eos: frozenset[int],
        texts: list[StoppedText] | None,
    ) -> None:
        self.prompts, self.sampling, self.eos, self.texts = prompts, sampling, eos, texts
        self.feed = feed_of(model, prompts, sampling.max_new_tokens)
        self.news: list[list[_New]] = [[] for _ in prompts]
        self.whole = [""] * len(prompts)
        self.pieces = [""] * len(prompts)  # of the last step
        self.stopped: list[Stopped | None] = [None] * len(prompts)  # None: goes on
        self.number = 0  # of the step
        # A generator of its own per row: a row ends without moving the numbers of the others.
        drawn = [np.random.default_rng(s).random(sampling.max_new_tokens) for s in seeds]
        self._uniform = torch.from_numpy(np.stack(drawn, axis=1))  # [steps, B]
        self._seen: Tensor | None = None  # [B, V] bool, which tokens a row has; for the penalty

    @property
    def ended(self) -> bool:
        return None not in self.stopped

    def step(self) -> None:
        """One token more for every row that goes on. To be called within `feed.computing()`."""
        logits = self.feed.logits()  # [B, V]
        if self.number == 0:
            self._prepare(logits)
        drawn = draw(self._ruled(logits), self.sampling, self._uniform[self.number])
        self._take(told(logits, drawn))
        if not self.ended:
            if self._seen is not None:
                self._seen.scatter_(1, drawn.tokens.unsqueeze(1), True)
            self.feed.append(drawn.tokens)

    def cancel(self) -> None:
        """Every row that goes on ends here."""
        self.pieces = [""] * len(self.prompts)
        for row, reason in enumerate(self.stopped):
            if reason is None:
                self._end(row, "cancelled")

    def result(self, row: int) -> Generated:
        news = self.news[row]
        return Generated(
            prompt=self.prompts[row],
            tokens=[new.token for new in news],
            nats=[new.nats for new in news],
            drawn_nats=[new.drawn_nats for new in news],
            stopped=self.stopped[row] or "cancelled",
            text=None if self.texts is None else self.whole[row],
        )

    def _prepare(self, logits: Tensor) -> None:
        """What needs to know how wide the logits are, and where."""
        self._uniform = self._uniform.to(logits.device)
        self._eos = torch.tensor(sorted(self.eos), dtype=torch.int64, device=logits.device)
        if self.sampling.repetition_penalty != 1:
            seen = torch.zeros(logits.shape, dtype=torch.bool)
            for row, prompt in enumerate(self.prompts):
                seen[row, prompt] = True
            self._seen = seen.to(logits.device)

    def _ruled(self, logits: Tensor) -> Tensor:
        """Logits after the rules that look at what was written."""
        if self._seen is not None:
            logits = penalised(logits, self._seen, self.sampling.repetition_penalty)
        if self.number < self.sampling.min_new_tokens and self.eos:
            logits = logits.index_fill(1, self._eos, -math.inf)
        return logits

    def _take(self, rows: list[list[float]]) -> None:
        """Token, nats, nats drawn with and highest logit of each row."""
        self.pieces = [""] * len(rows)
        for row, (token, nats, drawn_nats, highest) in enumerate(rows):
            if self.stopped[row] is not None:
                continue
            if not math.isfinite(highest):
                raise _not_finite(self.number, row)
            self.news[row].append(_New(int(token), nats, drawn_nats))
            text = None if self.texts is None else self.texts[row]
            if text is not None:
                self.pieces[row] = text.push(int(token))
            if int(token) in self.eos:
                self._end(row, "eos")
            elif text is not None and text.stopped is not None:
                self._end(row, "stop")
            elif self.number + 1 == self.sampling.max_new_tokens:
                self._end(row, "length")
            else:
                self.whole[row] += self.pieces[row]
        self.number += 1

    def _end(self, row: int, reason: Stopped) -> None:
        if self.texts is not None:
            self.pieces[row] += self.texts[row].finish()  # may complete a stop string, too
            reason = reason if self.texts[row].stopped is None else "stop"
            self.whole[row] += self.pieces[row]
        self.stopped[row] = reason


def _not_finite(step: int, row: int) -> CheckFailed:
    """-inf is a token that the model rules out; NaN, +inf and a row of -inf alone are defects, not token 0."""
    return CheckFailed(
        f"The model's logits for new token {step + 1} of prompt {row} are not finite (NaN or infinite), so "
        "there is no next token. Its weights may have diverged or be damaged: look at the loss of the run, or "
        "load the model in float32 if it was loaded in a smaller type."
    )


def _seeds(seeds: Sequence[int] | None, seed: int, count: int) -> list[int]:
    if seeds is None:
        return [seed + i for i in range(count)]
    if len(seeds) != count or any(not is_integer(s) or s < 0 for s in seeds):
        raise ConfigError(
            f"seeds must be {count} integers of at least 0, one for each prompt, not {list(seeds)!r}."
        )
    return list(seeds)
