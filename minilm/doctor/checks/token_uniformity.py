"""Different tokens have different predictions: the states have not all become one direction.

Why: attention averages, and a vector that all tokens share grows through a deep stack until nothing else is left after
the last norm. Every token is then predicted alike, and the loss stays near the entropy of single tokens. It happens to
attention without skip connections or feed-forwards, and to a bias or an outlier that grew.

How: the weights as they are, random rows, no dropout. The logits of each position, less their mean over the vocabulary,
are compared pair by pair within a row: the mean cosine must stay below 0.99. A trained model may share much between its
predictions (the frequencies of tokens) and still tell them apart: above that it fails only if knowing the position
tells next to nothing of the prediction, less than 0.02 nats (mean divergence from the mean prediction). The first block
whose output is one direction is named.

Cannot see: states that are alike for some rows only; a model that tells tokens apart, but wrongly.

Sources: Dong, Cordonnier and Loukas, Attention is not all you need: pure attention loses rank doubly exponentially with
depth, 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.blocks import blocks, stream
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import described, quiet, record, tokens_for
from minilm.doctor.subject import Subject

ROWS, LENGTH = 4, 48
ALIKE = 0.99  # mean cosine; fresh models: 0.83 at 8 layers, 0.95 at 34, 0.98 at 100 (width 512)
TOLD = 0.02  # nats; fresh models of width 256 to 768: 0.04 to 0.12; trained ones: above 1


@check(group="model", needs=("forward", "vocab_size"), cost="1 forward of 4 rows", quick=True)
def token_uniformity(subject: Subject) -> Finding:
    """The mean cosine between the logits of two positions of a row."""
    assert subject.forward is not None
    with quiet(subject, redraw=None), torch.no_grad():
        tokens = tokens_for(subject, ROWS, LENGTH, seed=5)
        logits = subject.forward(tokens).double()
        if not bool(logits.isfinite().all()):
            raise NotApplicable("the logits are not finite")
        centred = logits - logits.mean(dim=-1, keepdim=True)
        if float(centred.abs().amax()) < 1e-9:
            raise NotApplicable("all logits are equal: the output layer is zero")
        cosine, told = _cosine(centred), _told(logits)
        seen = f"mean cosine between the logits of two tokens {cosine:.4f}; a position tells {told:.1e} nats"
        if cosine <= ALIKE or told >= TOLD:
            return passed(seen, cosine, ALIKE, unit="cosine")
        where = _first(subject, tokens)
    return failed(
        f"{seen} of the prediction: all tokens are predicted alike", cosine, ALIKE, unit="cosine",
        bugs=["token-uniformity"], component=where,
        advice="keep the skip connections (and what else tells tokens apart) around every block; look for a bias or a "
        "channel that has grown far beyond the others; lower the learning rate",
    )  # fmt: skip


def _cosine(states: Tensor) -> float:
    """Of two positions of a row, mean over all pairs: [B, T, D]."""
    directions = F.normalize(states.double(), dim=-1)
    pairs = directions @ directions.transpose(1, 2)
    length = states.shape[1]
    return float((pairs.sum() - pairs.diagonal(dim1=1, dim2=2).sum()) / (len(states) * length * (length - 1)))


def _told(logits: Tensor) -> float:
    """Mean divergence of a position's prediction from the mean of all, in nats."""
    log_p = logits.flatten(0, 1).log_softmax(-1)
    mean = log_p.logsumexp(dim=0) - torch.tensor(float(len(log_p))).log()
    return float((log_p.exp() * (log_p - mean)).sum(-1).mean())


def _first(subject: Subject, tokens: Tensor) -> str:
    """The first block whose output is one direction, else what follows the blocks."""
    if subject.module is None or subject.forward is None:
        return "the states"
    forward = subject.forward
    outputs = {name: out for name, _, out in record(subject.module, lambda: forward(tokens))}
    for name, _ in blocks(subject.module):
        found = stream(outputs.get(name))
        if found is not None and _cosine(found) > ALIKE:
            return described(subject.module, name)
    return "behind the blocks"


# ---------------------------------------------------------------- planted


class _NoSkips(specimens.model.Block):
    """Attention alone, without a residual."""

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.attention(self.attention_norm(x), *others)


class _Shared(specimens.FeedForward):
    """With a bias, as after a learning rate that was too high."""

    def __init__(self, size: specimens.model.Size) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(5 * torch.ones(size.dim))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class _Frequencies(specimens.Model):
    """Trained: some tokens are frequent, and each token has a successor of its own."""

    def initialise(self) -> None:
        super().initialise()
        with torch.no_grad():
            self.embedding.weight.normal_(std=1.0)
            self.head.weight.copy_(0.3 * self.embedding.weight.roll(1, 0))
            self.often = 100 * torch.randn(self.size.vocab_size, generator=torch.Generator().manual_seed(0))

    def forward(self, *given: Tensor, **more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(*given, **more) + self.often.clamp(max=3)


@token_uniformity.plant("token-uniformity", component="layers.", what="attention without skip connections")
def _() -> Subject:
    return specimens.subject(block=_NoSkips, size={"num_layers": 16})


@token_uniformity.plant("token-uniformity", component="layers.0", what="a bias beside which tokens vanish")
def _() -> Subject:
    return specimens.subject(ffn=_Shared)


@token_uniformity.healthy("a deep fresh model with its skip connections")
def _() -> Subject:
    return specimens.subject(size={"num_layers": 12})


@token_uniformity.healthy("predictions that share the frequencies of tokens, and differ")
def _() -> Subject:
    return specimens.subject(model=_Frequencies)
