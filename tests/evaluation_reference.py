"""What the evaluation tests compare with: slow, plain, and sharing no code with `minilm.evaluation`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from minilm.models import build, preset


def tiny_model(vocab_size: int = 300, seed: int = 0, **changes) -> nn.Module:
    """A model whose logits are spread enough that choices differ (freshly drawn ones are nearly uniform)."""
    torch.manual_seed(seed)
    return build(preset("original", "tiny", vocab_size=vocab_size, **{"init_std": 0.25, **changes})).eval()


@torch.no_grad()
def row_logits(model: nn.Module, tokens: list[int]) -> np.ndarray:
    """[T, V] float64 of one row alone: no padding, no cache, no segments."""
    return model(torch.tensor([tokens])).logits[0].double().numpy()


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_losses(model: nn.Module, tokens: list[int]) -> list[float]:
    """Nats of tokens 1, 2, ...: token i under the logits at i - 1, written as a loop."""
    logs = log_probabilities(row_logits(model, tokens))
    return [-float(logs[i - 1][tokens[i]]) for i in range(1, len(tokens))]


def slow_choice(
    logits: np.ndarray, uniform: float, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """Sampling by sorting a list of pairs: temperature, then top-k, then top-p, then the inverse of the sum."""
    if temperature == 0:
        return int(np.argmax(logits))
    weights = np.exp(log_probabilities(logits / temperature))
    pairs = sorted(enumerate(weights.tolist()), key=lambda pair: (-pair[1], pair[0]))
    if top_k is not None:
        pairs = pairs[:top_k]
    if top_p is not None:
        whole = math.fsum(p for _, p in pairs)
        kept, mass = [], 0.0
        for pair in pairs:
            kept.append(pair)
            mass += pair[1] / whole
            if mass >= top_p:
                break
        pairs = kept
    whole = math.fsum(p for _, p in pairs)
    mass = 0.0
    for token, p in pairs:
        mass += p / whole
        if uniform < mass:
            return token
    return pairs[-1][0]


def slow_generate(
    model: nn.Module,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[int]:
    """One prompt, the whole text through the model at every step."""
    tokens, random = list(prompt), np.random.default_rng(seed)
    while len(tokens) < len(prompt) + max_new_tokens:
        logits = row_logits(model, tokens)[len(tokens) - 1]
        tokens.append(slow_choice(logits, random.random(), temperature, top_k, top_p))
        if tokens[-1] == eos_id:
            break
    return tokens[len(prompt) :]


@dataclass
class Answer:
    logits: torch.Tensor


class Scripted(nn.Module):
    """A model from elsewhere (no cache, no head) that says `script[number of tokens so far - offset]` next."""

    def __init__(
        self, script: list[int], vocab_size: int, prompt_tokens: int = 1, max_length: int = 10_000
    ) -> None:
        super().__init__()
        self.script, self.prompt_tokens = script, prompt_tokens
        self.config = SimpleNamespace(vocab_size=vocab_size, max_length=max_length)
        self.modes_seen: list[bool] = []

    def forward(self, inputs, segments=None, positions=None):
        self.modes_seen.append(self.training)
        logits = torch.zeros(*inputs.shape, self.config.vocab_size)
        for column in range(inputs.shape[1]):
            at = column + 1 - self.prompt_tokens
            if 0 <= at < len(self.script):
                logits[:, column, self.script[at]] = 100.0
        return Answer(logits)


class Fixed(nn.Module):
    """A model from elsewhere that gives the same logits [V] everywhere."""

    def __init__(self, logits: list[float], max_length: int = 64) -> None:
        super().__init__()
        self.row = torch.tensor(logits)
        self.config = SimpleNamespace(vocab_size=len(logits), max_length=max_length)

    def forward(self, inputs, segments=None, positions=None):
        return Answer(self.row.expand(*inputs.shape, -1).clone())
