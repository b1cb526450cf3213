"""The specimens' generator and evaluation, in the plainest form that is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minilm.doctor.specimens.loss import summed_nats, targets
from minilm.doctor.specimens.model import Model
from minilm.doctor.subject import Rows


class Generator:
    """Continues prompts with a cache; rows of different lengths are padded on the left."""

    def __init__(self, model: Model, pad_id: int = 0) -> None:
        self.model, self.pad_id = model, pad_id

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_id: int | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, at most `max_new_tokens`, the EOS included where one was written."""
        was_training = self.enter()
        generator = self.generator(seed)
        tokens, segments = self.padded(prompts)
        positions = self.positions(segments)
        caches = self.model.new_caches()
        logits = self.last(self.model.step(tokens, segments, positions, caches), segments)
        new: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        place = positions.max(dim=1).values
        for written in range(max_new_tokens):
            chosen = self.choose(logits, temperature, top_k, top_p, generator)
            for row, token in enumerate(chosen.tolist()):
                if running[row]:
                    new[row].append(token)
                    running[row] = not self.ends(token, eos_id)
            if not any(running) or written + 1 == max_new_tokens:
                break
            place = place + 1
            step = chosen.unsqueeze(1), torch.ones_like(chosen).unsqueeze(1), place.unsqueeze(1)
            logits = self.model.step(*step, caches)[:, -1]
        self.leave(was_training)
        return new

    def enter(self) -> bool:
        was_training = self.model.training
        self.model.eval()
        return was_training

    def leave(self, was_training: bool) -> None:
        self.model.train(was_training)

    def generator(self, seed: int) -> torch.Generator:
        """The random numbers of one call, apart from all others."""
        return torch.Generator().manual_seed(seed)

    def positions(self, segments: Tensor) -> Tensor:
        return self.model.positions(segments)

    def sample(
        self,
        logits: Tensor,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Chosen ids [B] of logits [B, V]: the sampler alone."""
        return self.choose(logits, temperature, top_k, top_p, self.generator(seed))

    def padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        length = max(len(p) for p in prompts)
        tokens = torch.full((len(prompts), length), self.pad_id)
        segments = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :] = torch.as_tensor(list(prompt))
            segments[row, length - len(prompt) :] = 1
        return tokens, segments

    def last(self, logits: Tensor, segments: Tensor) -> Tensor:
        """[B, V] of the position that predicts the first new token."""
        return logits[:, -1]

    def choose(
        self,
        logits: Tensor,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator,
    ) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        p = self.probabilities(logits, temperature, top_k, top_p)
        return torch.multinomial(p, 1, generator=generator).squeeze(1)

    def probabilities(
        self, logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
    ) -> Tensor:
        logits = logits.float() / temperature
        if top_k is not None:
            kept = logits.topk(min(top_k, logits.shape[-1])).indices
            logits = torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))
        if top_p is not None:
            ordered, index = logits.softmax(-1).sort(descending=True, stable=True)
            keep = ordered.cumsum(-1) - ordered < top_p
            keep[..., 0] = True
            logits = logits.masked_fill(~torch.zeros_like(keep).scatter(-1, index, keep), -math.inf)
        return logits.softmax(-1)

    def ends(self, token: int, eos_id: int | None) -> bool:
        return token == eos_id


class Repeating(Generator):
    """Planted: returns the prompt before what it has written, as `generate` of Hugging Face does."""

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **how: Any) -> list[list[int]]:
        new = super().generate(prompts, max_new_tokens, **how)
        return [[*prompt, *row] for prompt, row in zip(prompts, new, strict=True)]


class Evaluation:
    """Token-weighted losses, in eval mode, leaving mode and random states as they were."""

    stride = 5  # tokens that a further window of a long document adds

    def __init__(self, model: Model) -> None:
        self.model = model

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Rows]) -> float:
        was_training = self.enter()
        parts = [self.nats(rows) for rows in batches]
        self.leave(was_training)
        return self.mean([float(nats) for nats, _ in parts], [count for _, count in parts])

    def enter(self) -> bool:
        was_training = self.model.training
        self.model.eval()
        return was_training

    def leave(self, was_training: bool) -> None:
        self.model.train(was_training)

    def nats(self, rows: Rows) -> tuple[Tensor, int]:
        """Summed nats of a batch and its number of targets."""
        return summed_nats(self.model(rows.tokens, rows.segments), rows)

    def mean(self, nats: list[float], counts: list[int]) -> float:
        return sum(nats) / max(1, sum(counts))

    def perplexity(self, batches: Sequence[Rows]) -> float:
        return math.exp(self.evaluate(batches))

    def bits_per_byte(self, batches: Sequence[Rows], token_bytes: Callable[[int], bytes]) -> float:
        """Bits per byte of the predicted text; special tokens stand for no bytes, their nats count."""
        counts = [targets(rows).sum() for rows in batches]
        predicted = [rows.tokens[:, 1:][targets(rows)].tolist() for rows in batches]
        num_bytes = sum(self.count_bytes(token_bytes(i)) for ids in predicted for i in ids)
        return self.evaluate(batches) * float(sum(counts)) / math.log(2) / max(1, num_bytes)

    def count_bytes(self, spelt: bytes) -> int:
        return len(spelt)

    def continuation(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
        tokens = torch.tensor([[*prompt, *continuation]])
        learn = torch.zeros_like(tokens, dtype=torch.bool)
        learn[:, len(prompt) :] = True
        return self.evaluate([Rows(tokens, torch.ones_like(tokens), learn)])

    @torch.no_grad()
    def document(self, tokens: Sequence[int]) -> tuple[float, int]:
        """Nats and number of scored tokens of a document of any length, in windows of the model's length."""
        nats, count, done = 0.0, 0, 0
        for start, stop in self.windows(len(tokens)):
            part = torch.tensor([list(tokens[start:stop])])
            learn = torch.arange(start, stop).unsqueeze(0) >= done
            some, number = self.nats(Rows(part, torch.ones_like(part), learn))
            nats, count, done = nats + float(some), count + number, self.scored(stop)
        return nats, count

    def windows(self, length: int) -> list[tuple[int, int]]:
        """[start, stop) of each; the last one ends with the document."""
        size = min(length, self.model.size.max_length)
        stride = max(1, min(self.stride, size - 1))
        starts = [*range(0, length - size, stride), length - size]
        return [(start, start + size) for start in starts]

    def scored(self, stop: int) -> int:
        """Tokens before this one are not counted again."""
        return stop
