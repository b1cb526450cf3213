"""What is not to be learnt has no say in the loss, and rows without any target have a loss of 0.

Why: padding and prompts that take part in the loss make it depend on how texts happen to be batched. A batch in
which nothing is to be learnt is divided by 0 and becomes NaN, which poisons every parameter at the next step.

How: padding is added, and tokens and logits at ignored positions are replaced by others: the loss must keep its value
up to float32 rounding (2e-7 on healthy code). A batch without targets must have a finite loss and a gradient of
exactly 0 everywhere; with one row that has targets, the loss of that row. Changes at positions that count must move
the loss, else the probe saw nothing.

Cannot see: padding inside a document, and what padding does inside of the model (the checks of the model do).

Sources: K2 and K6 of the catalogue; OLMo-core 1.3.2 (label mask of padded rows) and 2.4.0 (NaN with instance
masking); torch's cross_entropy, whose mean over nothing is NaN.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.examples import LENGTH, cases, marks, uneven
from minilm.doctor.checks.formulas import LOSS_NOISE, off_by
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import other_token, quiet
from minilm.doctor.specimens.loss import summed_nats, targets
from minilm.doctor.subject import Rows, Subject

REACH = 1e-3
MORE = 4  # columns of padding that are added


@check(group="loss", needs=("loss", "vocab_size"), cost="4 forwards of 5 x 12 tokens")
def ignored_positions(subject: Subject) -> Finding:
    """Added padding, other prompt tokens and other logits where nothing counts: the loss stays."""
    with quiet(subject), torch.no_grad():
        moved = {"padding was added": _added_padding(subject)}
        reach = math.inf
        if subject.criterion is not None:
            changes, reach = _changed_at_ignored(subject)
            moved |= changes
    if reach < REACH:
        raise NotApplicable("changing logits at targets did not move the loss")
    worst = max(moved, key=lambda name: moved[name])
    seen = f"the loss moved by {moved[worst]:.1e} of its size when {worst}"
    if moved[worst] <= LOSS_NOISE:
        return passed(f"{seen} ({', '.join(moved)})", moved[worst], LOSS_NOISE, unit="of the loss")
    bugs = ["pad-in-loss", "label-smoothing-on-ignore", "mask-from-attention", "denominator-unshifted"]
    if moved["padding was added"] <= LOSS_NOISE:
        bugs = ["mask-from-attention", "label-smoothing-on-ignore", "pad-in-loss"]
    return failed(
        seen,
        moved[worst],
        LOSS_NOISE,
        unit="of the loss",
        bugs=bugs,
        component="loss",
        advice="give ignored positions the label -100 (or weight 0) before the sum, and count only what is summed",
    )


def _added_padding(subject: Subject) -> float:
    rows = uneven(subject)
    if subject.max_length is not None and subject.max_length < LENGTH + MORE:
        rows = Rows(*(x[:2, : LENGTH - MORE] for x in (rows.tokens, rows.segments, rows.learn)))
    fill = marks(subject)[0]
    longer = Rows(F.pad(rows.tokens, (0, MORE), value=fill), F.pad(rows.segments, (0, MORE)),
                  F.pad(rows.learn, (0, MORE)))  # fmt: skip
    return off_by(float(subject.loss(longer)), float(subject.loss(rows)))


def _changed_at_ignored(subject: Subject) -> tuple[dict[str, float], float]:
    """What the loss function does for other tokens, and other logits, where nothing counts; and where it counts."""
    assert subject.criterion is not None and subject.vocab_size is not None
    rows = next(c.rows for c in cases(subject) if c.name.startswith("prompts"))
    counted = targets(rows)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((*rows.tokens.shape, subject.vocab_size), generator=generator)
    before = float(subject.criterion(logits, rows))

    tokens, ignored = rows.tokens.clone(), rows.segments > 0
    ignored[:, 1:] &= ~counted
    for b, i in ignored.nonzero().tolist():
        tokens[b, i] = other_token(subject, int(tokens[b, i]))
    prompt = float(subject.criterion(logits, Rows(tokens, rows.segments, rows.learn)))

    silent = torch.ones_like(rows.learn)
    silent[:, :-1] = ~counted
    noise = 5 * torch.randn(logits.shape, generator=generator)
    elsewhere = float(subject.criterion(logits + noise * silent.unsqueeze(-1), rows))
    there = float(subject.criterion(logits + noise * ~silent.unsqueeze(-1), rows))
    moved = {
        "tokens of prompts were replaced": off_by(prompt, before),
        "logits at ignored positions were replaced": off_by(elsewhere, before),
    }
    return moved, off_by(there, before)


@check(group="loss", needs=("loss", "vocab_size"), cost="3 forwards, 1 backward of 4 x 12 tokens")
def no_targets(subject: Subject) -> Finding:
    """A batch in which nothing is to be learnt: loss 0, gradient 0."""
    with quiet(subject):
        rows = uneven(subject, rows=3)
        nothing = Rows(rows.tokens, rows.segments, torch.zeros_like(rows.learn))
        loss = subject.loss(nothing)
        value, steepest = float(loss.detach()), _steepest(subject, loss)
        learn = torch.zeros_like(rows.learn)
        learn[2] = rows.learn[2]
        with torch.no_grad():
            mixed = float(subject.loss(Rows(rows.tokens, rows.segments, learn)))
            alone = float(subject.loss(rows.take([2])))
    seen = f"a batch without targets has a loss of {value:.3g} and a gradient of at most {steepest:.3g}"
    apart = off_by(mixed, alone)
    worst = max(abs(value) if math.isfinite(value) else math.inf, steepest, apart)
    if worst <= LOSS_NOISE:
        text = f"{seen}; two rows without targets move the loss of a third by {apart:.1e}"
        return passed(text, worst, LOSS_NOISE, unit="nats")
    if apart > LOSS_NOISE:
        seen += f"; two rows without targets move the loss of a third by {apart:.2g}"
    return failed(
        seen,
        worst,
        LOSS_NOISE,
        unit="nats",
        bugs=["all-ignored-nan", "pad-in-loss"]
        if not math.isfinite(worst)
        else ["pad-in-loss", "all-ignored-nan"],
        component="loss",
        advice="divide the summed nats by max(number of targets, 1)",
    )


def _steepest(subject: Subject, loss: Tensor) -> float:
    """The largest gradient of any parameter; inf where one is not finite."""
    if subject.module is None or not loss.requires_grad:
        return 0.0
    parameters = [p for p in subject.module.parameters() if p.requires_grad]
    gradients = [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        return math.inf
    return max((float(g.abs().max()) for g in gradients if g.numel()), default=0.0)


# ---------------------------------------------------------------- planted


@ignored_positions.plant("pad-in-loss", component="loss")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows.tokens[:, 1:].flatten())

    return specimens.subject(loss=loss)


@ignored_positions.plant("mask-from-attention", component="loss", what="prompts are learnt")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        nats, count = summed_nats(logits, Rows(rows.tokens, rows.segments, rows.segments > 0))
        return nats / max(count, 1)

    return specimens.subject(loss=loss)


@ignored_positions.plant("label-smoothing-on-ignore", component="loss")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        nats, count = summed_nats(logits, rows)
        return 0.9 * nats / max(count, 1) - 0.1 * logits[:, :-1].log_softmax(-1).mean()

    return specimens.subject(loss=loss)


@no_targets.plant("all-ignored-nan", component="loss")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        labels = torch.where(targets(rows), rows.tokens[:, 1:], -100).flatten()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100)

    return specimens.subject(loss=loss)


@no_targets.plant(
    "all-ignored-nan", component="loss", what="the value is 0, the gradient is 0 times infinity"
)
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        weights = targets(rows).float()
        log_p = logits[:, :-1].log_softmax(-1).gather(-1, rows.tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
        mean = -(log_p * weights).sum() / weights.sum()
        return torch.where(weights.sum() > 0, mean, 0.0)

    return specimens.subject(loss=loss)


@no_targets.healthy("weights in place of a mask")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        weights = targets(rows).float()
        log_p = logits[:, :-1].log_softmax(-1).gather(-1, rows.tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
        return -(log_p * weights).sum() / weights.sum().clamp(min=1)

    return specimens.subject(loss=loss)
