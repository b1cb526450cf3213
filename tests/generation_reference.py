"""What the generator's tests compare with: plain loops in float64, one text at a time, the whole text at every step."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn


@torch.no_grad()
def next_logits(model: nn.Module, tokens: list[int]) -> list[float]:
    """Of one row alone, no padding, no cache: the logits after its last token."""
    return model(torch.tensor([tokens])).logits[0, -1].double().tolist()


def log_sum(values: list[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def slow_draw(
    logits: list[float],
    uniform: float,
    *,
    text: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> tuple[int, float]:
    """The token, and minus the log of the probability with which it was drawn."""
    scores = list(logits)
    for token in set(text):
        scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
    for token in banned:
        scores[token] = -math.inf
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if temperature == 0:
        return order[0], 0.0
    scaled = [scores[token] / temperature for token in order]
    whole = log_sum(scaled)
    pairs = [(token, math.exp(s - whole)) for token, s in zip(order, scaled, strict=True)]
    if top_k is not None:
        pairs = renormalised(pairs[:top_k])
    if top_p is not None:
        kept, mass = [], 0.0
        for pair in pairs:
            kept.append(pair)
            mass += pair[1]
            if mass >= top_p:
                break
        pairs = renormalised(kept)
    if min_p is not None:
        pairs = renormalised([pair for pair in pairs if pair[1] >= min_p * pairs[0][1]])
    mass = 0.0
    for token, p in pairs:
        mass += p
        if uniform < mass:
            return token, -math.log(p)
    return pairs[-1][0], -math.log(pairs[-1][1])


def renormalised(pairs: list[tuple[int, float]]) -> list[tuple[int, float]]:
    whole = math.fsum(p for _, p in pairs)
    return [(token, p / whole) for token, p in pairs]


def slow_text(
    model: nn.Module,
    prompt: list[int],
    max_new_tokens: int,
    *,
    seed: int = 0,
    eos: tuple[int, ...] = (),
    min_new_tokens: int = 0,
    **options: float | int | None,
) -> list[tuple[int, float, float]]:
    """Token, nats under the model, nats as drawn, of each new token."""
    tokens, random, found = list(prompt), np.random.default_rng(seed), []
    while len(found) < max_new_tokens:
        logits = next_logits(model, tokens)
        banned = eos if len(found) < min_new_tokens else ()
        token, drawn = slow_draw(logits, random.random(), text=tuple(tokens), banned=banned, **options)
        found.append((token, log_sum(logits) - logits[token], drawn))
        tokens.append(token)
        if token in eos:
            break
    return found


def slow_stop(text_after: list[str], stop: list[str]) -> tuple[str, int | None]:
    """Texts after 1, 2, ... tokens -> the text as it should be given, and after how many tokens it stops."""
    for number, text in enumerate(text_after, start=1):
        places = [text.find(s) for s in stop if s in text]
        if places:
            return text[: min(places)], number
    return (text_after[-1] if text_after else ""), None
