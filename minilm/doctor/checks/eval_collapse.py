"""In eval mode one token wins everywhere, in train mode it does not.

Why: running statistics that never converged (a batch norm in a query network, with few or padded rows) leave training
healthy and make the saved model write one token for ever.

How: the weights and buffers as they are, no dropout: random rows through train mode and eval mode. The share of
positions that the most frequent prediction has must not jump from one mode to the other, and the two distributions
must be close: their mean divergence, in nats, is what a user loses by switching. Works on trained and loaded weights;
a fresh model passes only if the two modes agree.

Cannot see: a model that has collapsed in both modes (that is not a matter of modes).

Sources: product-key memory layers of XLM (batch norm and padding); pytorch issue 106630; K8 of the catalogue.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import culprit, difference, quiet, tokens_for
from minilm.doctor.subject import Subject

ROWS, LENGTH = 4, 48
DIVERGENCE = (
    0.05  # nats; healthy: 1e-11 in float32, batch norms with converged statistics of large batches 0.01
)
JUMP = 0.5  # of all positions


@check(group="model", needs=("forward", "module", "vocab_size"), cost="2 forwards of 4 rows", quick=True)
def eval_collapse(subject: Subject) -> Finding:
    """The most frequent prediction's share, and the divergence of the two modes."""
    assert subject.forward is not None and subject.module is not None
    forward, module = subject.forward, subject.module
    with quiet(subject, redraw=None), torch.no_grad():
        tokens = tokens_for(subject, ROWS, LENGTH, seed=3)
        quiet_logits = forward(tokens)
        module.train()
        train_logits = forward(tokens)
        module.eval()
        share, before = _share(quiet_logits), _share(train_logits)
        divergence = _divergence(train_logits, quiet_logits)

        def run(train: bool) -> None:
            module.train(train)
            forward(tokens)
            module.eval()

        def apart(a: Tensor, b: Tensor) -> bool:
            return difference(a, b) > 0.05

        seen = (
            f"eval mode predicts one token at {share:.0%} of the positions, train mode at {before:.0%}; "
            f"the two diverge by {divergence:.1e} nats"
        )
        if divergence <= DIVERGENCE:
            return passed(seen, divergence, DIVERGENCE, unit="nats")
        where = culprit(module, lambda: run(True), lambda: run(False), apart)
    likely = ["mem-bn-eval", "train-eval-diverge"]
    if share - before <= JUMP and "norm" not in where.lower():
        likely.reverse()
    return failed(
        seen, divergence, DIVERGENCE, unit="nats",
        bugs=likely, component=where or "eval mode",
        advice="replace the batch norm by a norm over features (or let its statistics converge before anything is "
        "evaluated), and compare train and eval mode at each validation",
    )  # fmt: skip


def _share(logits: Tensor) -> float:
    """Of the most frequent prediction, among all positions."""
    chosen = logits.argmax(-1).flatten()
    return float(chosen.bincount().max()) / chosen.numel()


def _divergence(one: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats; large where a result is not finite."""
    p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
    found = float((p.exp() * (p - q)).sum(-1).mean())
    return found if found == found else float("inf")


class _Stale(specimens.FeedForward):
    """A batch norm whose running statistics are far from what it is given."""

    def __init__(self, size: specimens.model.Size) -> None:
        super().__init__(size)
        self.query_norm = nn.BatchNorm1d(size.dim, momentum=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.query_norm(x.flatten(0, 1)).view_as(x))


def _trained(subject: Subject, scale: float) -> Subject:
    """As after training: weights of usual size, and a batch norm that was fed something large in the meantime."""
    from minilm.doctor.probes import redraw_weights

    assert subject.module is not None
    redraw_weights(subject.module, 0.15)
    for part in subject.module.modules():
        if isinstance(part, nn.BatchNorm1d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean += scale * torch.linspace(-1, 1, part.num_features)
            part.running_var /= scale**2
    return subject.but(fresh=False)


@eval_collapse.plant("mem-bn-eval", component="query_norm", what="one token wins everywhere")
def _() -> Subject:
    return _trained(specimens.subject(ffn=_Stale), 30.0)


@eval_collapse.plant("mem-bn-eval", component="query_norm", what="statistics that lag behind")
def _() -> Subject:
    return _trained(specimens.subject(ffn=_Stale), 2.0)


@eval_collapse.plant(
    "train-eval-diverge", component="layers.1", what="the last block is skipped in eval mode"
)
def _() -> Subject:
    class Early(specimens.model.Block):
        def forward(self, x: Tensor, *others: Tensor) -> Tensor:
            return super().forward(x, *others) if self.training or self.first else x

    subject = specimens.subject(block=Early)
    for number, layer in enumerate(subject.module.layers):  # type: ignore[union-attr]
        layer.first = number == 0
    return _trained(subject, 1.0)


@eval_collapse.healthy("trained weights that predict one token nearly everywhere, in both modes")
def _() -> Subject:
    subject = _trained(specimens.subject(), 1.0)
    with torch.no_grad():
        subject.module.head.weight[7] *= 20  # type: ignore[union-attr]
    return subject
