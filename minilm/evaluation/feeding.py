"""What the model says comes next, for a batch of texts that grow by a token at each step.

Cached    keys and values are kept: after the prompt each step costs one token a row
Repeated  the whole text again at each step: for models that keep nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minilm.alignment import last, positions_within
from minilm.evaluation import single
from minilm.evaluation.decoding import Decoder, Decodes, plain
from minilm.evaluation.mode import device_of, eval_mode, head_of
from minilm.evaluation.products import Products


class Feed(Protocol):
    """Texts and the model that continues them."""

    def logits(self) -> Tensor:
        """[B, V] float32 (or better) for the token after those fed last. To be called within `computing`."""

    def append(self, chosen: Tensor) -> None:
        """The next token of each row, [B]."""

    def computing(self) -> Any:
        """Context in which the model may be asked: eval mode, no gradients. Afterwards it is as it was before."""


def feed_of(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> Feed:
    """The fastest way that is right for this model and these rows."""
    padded = len({len(prompt) for prompt in prompts}) > 1
    # Models from elsewhere: some keep no keys and values, some count positions from the start of the row, padding
    # included, and cannot be told otherwise.
    caches = hasattr(model, "new_cache") and getattr(model, "takes_cache", True)
    if not caches or (padded and not getattr(model, "takes_positions", True)):
        return Repeated(model, prompts)
    return Cached(model, prompts, max_new_tokens)


class Cached:
    """Rows padded on the left. The cache is made once, with room for all new tokens."""

    def __init__(self, model: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
        device, width = device_of(model), max(map(len, prompts))
        self.model = model
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
        segments = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            segments[row, width - len(prompt) :] = 1
        self.tokens = tokens.to(device)
        # Rows of equal length need no mask; the model is told by not being told of segments.
        self.segments = segments.to(device) if min(map(len, prompts)) < width else None
        self.modules = list(model.modules())
        self.lengths, self.room = [len(prompt) for prompt in prompts], width + max_new_tokens - 1
        known = plain(model)
        # A row alone is multiplied by the weights as they are, after its prompt.
        self.alone = known and len(prompts) == 1 and single.available()
        steps = 0 if self.alone else max_new_tokens
        self.products = Products(model, head_of(model), rows=len(prompts), steps=steps)
        # What continues in a way of its own takes keys and values of the prompts along.
        self.hands_over = self.alone or (known and self.products.taken)
        self.cache: Any = model.new_cache(len(prompts), width if self.hands_over else self.room)
        self.decoder: Decodes | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        # Walking through all modules at each step of a stream would cost more than a norm does.
        changed = any(module.training for module in self.modules)
        with eval_mode(self.model) if changed else torch.no_grad(), self.products.within():
            yield

    def logits(self) -> Tensor:
        if self.decoder is None and self.hands_over and self.cache.length:
            self.decoder, self.cache = self._handed_over(), None
        if self.decoder is not None:
            return self.decoder.logits(self.tokens.squeeze(1))
        # The cache counts positions and knows the document of each row.
        output = self.model(self.tokens, segments=self.segments, cache=self.cache)
        head = self.products.head
        # Only the last position meets the output layer: for a long prompt that is most of its cost.
        return precise(self._ends(output.logits) if head is None else head(self._ends(output.hidden)))

    def _handed_over(self) -> Decodes:
        if self.alone:
            return single.Single(self.model, self.cache, self.room)
        return Decoder(self.model, self.cache, self.products, self.lengths, self.room)

    def _ends(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [B, ...], the last position: padding is on the left, all rows end there."""
        if x.shape[1] == 1:
            return x.squeeze(1)
        return last(x, torch.full(x.shape[:1], x.shape[1], device=x.device))

    def append(self, chosen: Tensor) -> None:
        self.tokens, self.segments = chosen.unsqueeze(1), None


class Repeated:
    """Rows padded on the right, because many models from elsewhere count positions from the start of the row."""

    def __init__(self, model: nn.Module, prompts: list[list[int]]) -> None:
        self.model = model
        self.device = device_of(model)
        self.rows = [list(prompt) for prompt in prompts]

    @contextmanager
    def computing(self) -> Iterator[None]:
        with eval_mode(self.model):
            yield

    def logits(self) -> Tensor:
        width = max(map(len, self.rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in self.rows])
        lengths = torch.tensor([len(row) for row in self.rows])
        segments = (torch.arange(width) < lengths.unsqueeze(1)).long()
        positions = positions_within(segments)
        tokens, segments, positions = (x.to(self.device) for x in (tokens, segments, positions))
        output = self.model(tokens, segments=segments, positions=positions)
        return precise(last(output.logits, lengths.to(self.device)))

    def append(self, chosen: Tensor) -> None:
        for row, token in zip(self.rows, chosen.tolist(), strict=True):
            row.append(token)


def precise(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
