"""A handful of rows can be learnt by heart.

Why: a model that cannot is cut off somewhere: a graph that ends at a detach, weights that are frozen by
accident, a scale at which nothing can move. On a large corpus this shows only as a loss that is a little too
high.

How: some rows of random tokens, so that nothing but memory helps, and a plain AdamW loop on the subject's own
loss, at up to three learning rates, the first that succeeds being enough. The loss must come below 0.1 nats
(measured: healthy tiny models get below 0.02 within 60 steps; with only norm and head learning 0.5 to 2.4).
Where it fails, weights without a gradient are named.

Cannot see: a frozen part that the others can do without (see the audit of parameters); the trainer's own
optimizer.

Sources: Karpathy, A Recipe for Training Neural Networks ("overfit one batch"); mmpretrain issue 702.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import num_targets, quiet, tokens_for
from minilm.doctor.subject import Rows, Subject

ROWS, LENGTH, STEPS = 10, 24, 80
RATES = (1e-2, 3e-3, 1e-3)
LIMIT = 0.1  # nats per token


@check(group="oracle", needs=("module", "loss", "vocab_size"), cost="up to 240 training steps of [10, 24]")
def overfit(subject: Subject) -> Finding:
    """AdamW on a few random rows, until they are known by heart."""
    rows = Rows.whole(tokens_for(subject, ROWS, LENGTH, 5))
    if num_targets(rows) < ROWS:
        raise NotApplicable("the subject takes rows of one token only")
    tried: dict[float, float] = {}
    start = math.nan
    idle: list[str] = []
    for rate in RATES:
        with quiet(subject, redraw=None, train=True):
            start, tried[rate], without = _learnt(subject, rows, rate)
            idle = idle or without
        if tried[rate] < LIMIT:
            break
    best = min(tried.values())
    said = f"{num_targets(rows)} random targets, {start:.2f} nats at first, {best:.3f} after at most {STEPS} steps"
    if best < LIMIT:
        return passed(
            f"{said} at a learning rate of {min(tried, key=lambda r: tried[r]):g}", best, LIMIT, unit="nats"
        )
    if not math.isfinite(best):
        raise NotApplicable(f"{said}: the loss is not a number")
    total = sum(1 for _ in subject.module.parameters()) if subject.module is not None else 0
    if len(idle) < 0.25 * total and best < 0.5 * start:
        raise NotApplicable(
            f"{said}: it goes on down, nearly every weight has a gradient; too slow to say more"
        )
    return failed(
        said + (f"; {len(idle)} of {total} weights have no gradient, first {idle[0]}" if idle else ""),
        best,
        LIMIT,
        unit="nats",
        bugs=["frozen-by-accident", "init-wrong-scale"]
        if idle
        else ["init-wrong-scale", "frozen-by-accident"],
        component=", ".join(_modules(idle)) if idle else "model",
        advice="look for detach(), no_grad(), .data and requires_grad = False on the way from the loss to these weights"
        if idle
        else "every weight has a gradient and yet nothing is learnt: look at the scale of the initialisation",
    )


def _learnt(subject: Subject, rows: Rows, rate: float) -> tuple[float, float, list[str]]:
    """Loss before, the least loss after, and which weights had no gradient in the first step."""
    module, loss = subject.module, subject.loss
    assert module is not None and loss is not None
    named = dict(module.named_parameters())
    moving = [p for p in named.values() if p.requires_grad]
    if not moving:
        return float(loss(rows)), math.inf, list(named)
    optimizer = torch.optim.AdamW(moving, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    first, now, without = math.nan, math.inf, []
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(rows)
        now = float(value.detach())
        if step == 0:
            first = now
        if now < 0.5 * LIMIT or not math.isfinite(now):
            break
        value.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            without = [n for n, p in named.items() if p.grad is None or not bool(p.grad.any())]
        nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
    return first, min(now, _own_nats(subject, rows)) if math.isfinite(now) else math.inf, without


@torch.no_grad()
def _own_nats(subject: Subject, rows: Rows) -> float:
    """Nats per token from the logits: what label smoothing or a penalty in the loss does not raise."""
    if subject.forward is None:
        return math.inf
    log_p = subject.forward(rows.tokens).double().log_softmax(-1)[:, :-1]
    wanted = rows.tokens[:, 1:].to(log_p.device).unsqueeze(-1)
    value = -float(log_p.gather(-1, wanted).mean())
    return value if math.isfinite(value) else math.inf


def _modules(names: list[str]) -> list[str]:
    """The first few places of these parameters, without the name of the parameter itself."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))[:6]


@overfit.plant("frozen-by-accident", component="layers", what="a detach before the head")
def _() -> Subject:
    class Detached(specimens.Model):
        def forward(self, *given: Any, **named: Any) -> Tensor:
            norm = self.norm.register_forward_hook(lambda _, __, output: output.detach())
            try:
                return super().forward(*given, **named)
            finally:
                norm.remove()

    return specimens.subject(model=Detached)


@overfit.plant("frozen-by-accident", component="layers", what="each block ends in .data")
def _() -> Subject:
    class Cut(specimens.Block):
        def forward(self, *given: Any, **named: Any) -> Tensor:
            return super().forward(*given, **named).data

    return specimens.subject(block=Cut)


@overfit.plant("frozen-by-accident", component="layers", what="all matrices of the model are frozen")
def _() -> Subject:
    class Frozen(specimens.Model):
        def initialise(self) -> None:
            super().initialise()
            for parameter in self.parameters():
                parameter.requires_grad_(parameter.dim() < 2)

    return specimens.subject(model=Frozen)


@overfit.healthy("label smoothing: its loss cannot come near 0")
def _() -> Subject:
    def smoothed(logits: Tensor, rows: Rows) -> Tensor:
        same = rows.segments[:, :-1] == rows.segments[:, 1:]
        labels = torch.where(same & (rows.segments[:, 1:] > 0), rows.tokens[:, 1:], -100)
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=0.02
        )

    return specimens.subject(loss=smoothed)


@overfit.healthy("tied embeddings, dropout of 0.3")
def _() -> Subject:
    return specimens.subject(size={"tied": True, "dropout": 0.3})
