"""Unusual and correct variants of the plain set-up: `variant.plant(Kit())`. Nobody should accuse them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from unseen.plain import IGNORED, Kit
from unseen.plain_model import Attention, Block

WINDOW = 16
Z_SHARE = 1e-3
SMOOTHING = 0.1


@dataclass(frozen=True)
class Healthy:
    """A correct variant, and why somebody could take it for a bug."""

    id: str
    part: str
    looks_like: str
    plant: Callable[[Kit], Kit]


def with_block(kit: Kit, block: type[Block]) -> Kit:
    class Model(kit.model):
        def block(self, layer):
            return block(self.settings, layer)

    return replace(kit, model=Model)


def sliding_window(kit: Kit) -> Kit:
    """A token sees itself and the 15 before it, in training, scoring and with the cache."""

    class Model(kit.model):
        def causal(self, total, new):
            seen = super().causal(total, new)
            return seen & ~seen.new_ones(total, total).tril(-WINDOW)[total - new :]

    return replace(kit, model=Model)


def alibi(kit: Kit) -> Kit:
    """No positions at all: scores fall with the distance, with another slope in each head."""

    class Sloped(Attention):
        def weights(self, q, k, causal, same):
            total, new, heads = k.shape[2], q.shape[2], q.shape[1]
            index = torch.arange(total)
            distance = index[total - new :, None] - index
            slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) - slopes[:, None, None] * distance
            return scores.masked_fill(~(causal & same), -math.inf).softmax(-1)

    class SlopedBlock(Block):
        attention = Sloped

    class Model(kit.model):
        def __init__(self, settings):
            super().__init__(replace(settings, rotary=False))
            self.position = None

        def block(self, layer):
            return SlopedBlock(self.settings, layer)

    return replace(kit, model=Model)


class MultiQuery(Attention):
    """All heads share one head of keys and values."""

    def __init__(self, settings, layer):
        super().__init__(settings, layer)
        one = settings.dim // settings.heads
        self.k, self.v = (nn.Linear(settings.dim, one, bias=False) for _ in range(2))


class ParallelBlock(Block):
    """Attention and feed-forward read the same normalised input; there is no second norm."""

    attention = MultiQuery

    def __init__(self, settings, layer):
        super().__init__(settings, layer)
        del self.norm2

    def forward(self, x, *how):
        read = self.norm1(x)
        return x + self.drop(self.attn(read, *how)) + self.drop(self.ffn(read))


def parallel_multi_query(kit: Kit) -> Kit:
    return with_block(kit, ParallelBlock)


class Renormalised(Attention):
    """The mask is multiplied in after the exponential, and the weights are normalised after that."""

    def weights(self, q, k, causal, same):
        seen = causal & same
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        top = scores.masked_fill(~seen, -math.inf).amax(-1, keepdim=True)
        raised = (scores - top).clamp(max=0).exp() * seen
        return raised / raised.sum(-1, keepdim=True)


class RenormalisedBlock(Block):
    attention = Renormalised


def mask_renormalised(kit: Kit) -> Kit:
    return with_block(kit, RenormalisedBlock)


def z_loss(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def losses(self, logits, targets):
            size = logits.logsumexp(-1)[targets != IGNORED]
            return {**super().losses(logits, targets), "z_loss": Z_SHARE * (size**2).sum()}

    return replace(kit, trainer=Trainer)


def label_smoothing(kit: Kit) -> Kit:
    """`loss` stays the plain cross-entropy; `smoothing` is what the smoothed one has more."""

    class Trainer(kit.trainer):
        def losses(self, logits, targets):
            plain = super().losses(logits, targets)
            smooth = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=SMOOTHING
            )
            return {**plain, "smoothing": smooth - plain["loss"]}

    return replace(kit, trainer=Trainer)


def clear_before(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def accumulate(self, batches, tokens):
            self.optimizer.zero_grad(set_to_none=False)
            return super().accumulate(batches, tokens)

        def update(self):
            self.optimizer.step()

    return replace(kit, trainer=Trainer)


HEALTHY: tuple[Healthy, ...] = (
    Healthy("sliding-window", "attention", "distant tokens have no effect", sliding_window),
    Healthy("alibi", "positions", "no parameter and no rotation holds positions", alibi),
    Healthy(
        "parallel-multi-query", "block", "a norm is missing, k and v are smaller than q", parallel_multi_query
    ),
    Healthy("mask-renormalised", "attention", "the mask comes after the exponential", mask_renormalised),
    Healthy("z-loss", "loss", "what is optimised is not the loss that is logged", z_loss),
    Healthy("label-smoothing", "loss", "the gradient is not that of the cross-entropy", label_smoothing),
    Healthy("clear-before", "accumulation", "gradients are left over after a step", clear_before),
)
