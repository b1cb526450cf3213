"""A fresh model knows nothing, and its loss says so.

Why: weights drawn too large make a first loss of ten and more and cost the first thousand steps; and with tied
embeddings a loss that compares a position with its own input is BELOW that of a blind guess before anything was
learnt, which no honest model can be.

How: uniformly random tokens. Whatever a causal model says at a position, the next token is independent of it, so that
its expected loss is known exactly from its own logits: their log-sum-exp less their mean. The measured loss must agree
within what chance allows (6 standard deviations of that mean, a probability below 1e-8; each token's deviation is the
logits' own). And that expectation must be near ln V: it exceeds it by half the variance of the logits. A head drawn
with 0.02 in 8192 dimensions, the largest in use, gives 1.7 nats; 2.5 is the limit. Only for fresh weights.

Cannot see: a wrong shift with untied embeddings, which is as good as the right one here (see successor); scales of
single layers that a norm takes away again.

Sources: Karpathy, A Recipe for Training Neural Networks (verify loss at init); K3 of the catalogue.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet, tokens_for
from minilm.doctor.subject import Rows, Subject

ROWS, LENGTH = 4, 64
SIGMAS = 6.0
EXCESS = 2.5  # nats above a blind guess
ROUNDING = 1e-3  # nats: a loss in bfloat16 logits, a different order of summation


@check(group="model", needs=("forward", "vocab_size"), cost="2 forwards", quick=True)
def initial_loss(subject: Subject) -> Finding:
    """The loss on random tokens against what the logits themselves say that it must be."""
    if not subject.fresh:
        raise NotApplicable("its weights are not freshly drawn")
    assert subject.forward is not None and subject.vocab_size is not None
    with quiet(subject, redraw=None), torch.no_grad():
        tokens = tokens_for(subject, ROWS, LENGTH, seed=5)
        rows = Rows.whole(tokens)
        logits = subject.forward(tokens).double()
        if not bool(torch.isfinite(logits).all()):
            raise NotApplicable("the logits are not finite")
        expected, deviation = _expected(subject, logits)
        measured = float(subject.loss(rows)) if subject.loss is not None else _own(logits, tokens)
    excess = expected - math.log(subject.vocab_size)
    spread = logits.std(-1).mean()
    blind = math.log(subject.vocab_size)
    said = f"{measured:.3f} nats where {expected:.3f} are expected and a blind guess has {blind:.3f}"
    if excess > EXCESS:
        return failed(
            f"a fresh model is {excess:.1f} nats worse than a blind guess: its logits have a deviation of {spread:.1f}",
            excess, EXCESS, unit="nats above ln V", bugs=["init-wrong-scale", "embed-scale"],
            component="initialisation",
            advice="draw the output layer (with tied embeddings: the embedding) with a deviation near 0.02, or "
            "1 / sqrt(dim)",
        )  # fmt: skip
    limit = SIGMAS * deviation + ROUNDING
    off = measured - expected
    if abs(off) <= limit:
        return passed(said, abs(off), limit, unit="nats", details={"excess over ln V": excess})
    below = "below what is possible without seeing the target" if off < 0 else "above what its logits say"
    return failed(
        f"{said}: {below}", abs(off), limit, unit="nats",
        bugs=["no-shift", "mask-missing"] if off < 0 else ["logged-loss-scaled", "no-shift", "loss-in-bf16"],
        component="loss",
        advice="compare position i with token i + 1; shift once, in one place",
    )  # fmt: skip


def _expected(subject: Subject, logits: Tensor) -> tuple[float, float]:
    """(expected loss of independent uniform targets, its standard deviation over the mean), in nats."""
    special = set(subject.special_ids)
    ordinary = [i for i in range(logits.shape[-1]) if i not in special and i < (subject.vocab_size or 0)]
    asked = logits[:, :-1]
    choices = asked[..., ordinary]
    count = asked.shape[0] * asked.shape[1]
    expected = float((asked.logsumexp(-1) - choices.mean(-1)).mean())
    return expected, float(choices.var(-1).mean().sqrt()) / math.sqrt(count)


def _own(logits: Tensor, tokens: Tensor) -> float:
    """The loss by our own rule, where the subject brings none."""
    picked = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1))
    return -float(picked.mean())


def _unshifted(logits: Tensor, rows: Rows) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.tokens.flatten())


@initial_loss.plant("init-wrong-scale", component="init", what="deviation 1")
def _() -> Subject:
    return specimens.subject(size={"init_std": 1.0})


@initial_loss.plant("init-wrong-scale", component="init", what="tied to an embedding as torch draws it")
def _() -> Subject:
    class Untouched(specimens.model.Model):
        def initialise(self) -> None:
            torch.nn.init.normal_(self.embedding.weight)

    return specimens.subject(model=Untouched, size={"tied": True})


@initial_loss.plant("no-shift", component="loss", what="tied embeddings: below a blind guess")
def _() -> Subject:
    return specimens.subject(loss=_unshifted, size={"tied": True, "dim": 64, "init_std": 0.05})


@initial_loss.healthy("tied embeddings")
def _() -> Subject:
    return specimens.subject(size={"tied": True, "dim": 64, "init_std": 0.05})


@initial_loss.healthy("an output layer of zeros")
def _() -> Subject:
    subject = specimens.subject()
    with torch.no_grad():
        subject.module.head.weight.zero_()  # type: ignore[union-attr]
    return subject


@initial_loss.healthy("logits with a deviation of one")
def _() -> Subject:
    return specimens.subject(size={"init_std": 0.18})
