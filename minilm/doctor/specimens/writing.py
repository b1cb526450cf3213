"""The specimens' generator and evaluation, in the plainest form that is right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minilm.doctor.specimens.loss import summed_nats
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
        was_training = self.model.training
        self.model.eval()
        generator = torch.Generator().manual_seed(seed)
        tokens, segments = self.padded(prompts)
        positions = self.model.positions(segments)
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
        self.model.train(was_training)
        return new

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


class Evaluation:
    """Token-weighted losses, in eval mode, leaving mode and random states as they were."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Rows]) -> float:
        was_training = self.model.training
        self.model.eval()
        parts = [summed_nats(self.model(rows.tokens, rows.segments), rows) for rows in batches]
        self.model.train(was_training)
        return self.mean([float(nats) for nats, _ in parts], [count for _, count in parts])

    def mean(self, nats: list[float], counts: list[int]) -> float:
        return sum(nats) / max(1, sum(counts))

    def perplexity(self, batches: Sequence[Rows]) -> float:
        return math.exp(self.evaluate(batches))

    def continuation(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
        tokens = torch.tensor([[*prompt, *continuation]])
        learn = torch.zeros_like(tokens, dtype=torch.bool)
        learn[:, len(prompt) :] = True
        return self.evaluate([Rows(tokens, torch.ones_like(tokens), learn)])
