"""The training loss is the mean over targets of the negative log-probability of the next token, and nothing else.

Why: a loss that is shifted wrongly, masks the wrong tokens or divides by the wrong number trains the wrong model with
a curve that looks usual. At random weights right and wrong alignment have equal losses, so its level says nothing.

How: the loss of small rows (whole, padded, with prompts, with a single target, packed) is held against a slow double
loop in float64 over the subject's own logits, with weights drawn so large that every token has its own probability.
A loss that differs is compared with some thirty wrong formulas; one that gives the measured numbers on all rows names
the mistake. A model whose parameters are in 16 bits is also asked in its own type. Label smoothing in its right form
is a choice and passes, named.

Cannot see: what the data pipeline did to the tokens before, and a mistake that depends on lengths beyond the probe.

Sources: K2 of the catalogue; transformers issues 47394 and 44642 (shifted twice), pull requests 46204 (labels counted
before the shift) and 29285 (loss in half precision), OLMo-core 2.2.0 (z-loss inside the reported cross entropy).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.examples import Case, cases, logits_of
from minilm.doctor.checks.formulas import LOSS_NOISE, Places, explained, measured_on, off_by, right, smoothing
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import quiet, untouched
from minilm.doctor.specimens.loss import summed_nats, targets
from minilm.doctor.subject import Rows, Subject

Loss = Callable[[Tensor, Rows], Tensor]
BY_CASE = {
    "whole rows": ["no-shift", "double-shift", "loss-in-bf16", "logged-loss-scaled"],
    "padded rows": ["pad-in-loss", "eos-masked-pad-eq-eos", "denominator-unshifted"],
    "prompts that are not learnt": ["mask-from-attention", "denominator-unshifted"],
    "a single target": ["denominator-unshifted", "mask-from-attention"],
    "packed rows": ["pack-label-across-docs", "pack-cross-contam"],
}


@check(group="loss", needs=("loss", "vocab_size"), cost="10 forwards of at most 4 x 12 tokens", quick=True)
def loss_identity(subject: Subject) -> Finding:
    """loss(rows) == the double loop over the subject's logits, for each kind of rows."""
    with quiet(subject), torch.no_grad():
        measured, places, names = measured_on(subject, lambda rows: float(subject.loss(rows)))
    worst, case = _worst(measured, places)
    seen = f"on {names[case]} the loss is {measured[case]:.6g}, the double loop gives {right(*_of(places[case])):.6g}"
    smooth = None
    if worst > LOSS_NOISE and (smooth := smoothing(measured, places)) is not None:
        worst, seen = (
            0.0,
            f"the loss is the cross entropy with label smoothing of {smooth:.3g} on {len(names)} kinds",
        )
    if worst <= LOSS_NOISE:
        own = _in_own_type(subject) if smooth is None else None
        text = f"{seen}; {', '.join(names)} agree to {worst:.1e}"
        return own or passed(text, worst, LOSS_NOISE, unit="of the loss")
    mistakes = explained(measured, places)
    off = [off_by(m, right(*_of(p))) for m, p in zip(measured, places, strict=True)]
    simplest = next(name for name, o in zip(names, off, strict=True) if o > LOSS_NOISE)
    says = f": {mistakes[0][1]}" if mistakes else "; no known mistake gives these numbers"
    return failed(
        seen + says,
        worst,
        LOSS_NOISE,
        unit="of the loss",
        bugs=list(dict.fromkeys(bug for bug, _ in mistakes)) or BY_CASE[simplest],
        component="loss",
        advice="let position i predict token i + 1 of the same document, count the targets after the shift, divide "
        "their summed nats by their number, in float32",
    )


def _of(p: Places) -> tuple[Tensor, Rows]:
    return p.logits, p.rows


def _worst(measured: list[float], places: list[Places]) -> tuple[float, int]:
    off = [off_by(m, right(p.logits, p.rows)) for m, p in zip(measured, places, strict=True)]
    return max(off), off.index(max(off))


def _in_own_type(subject: Subject) -> Finding | None:
    """A model in 16 bits: its loss must not be rounded to 16 bits as well."""
    module = subject.module
    narrow = {torch.bfloat16, torch.float16}
    if module is None or not any(p.dtype in narrow for p in module.parameters()):
        return None
    with untouched(subject), torch.no_grad():
        module.eval()
        case: Case = cases(subject)[0]
        logits, value = logits_of(subject, case.rows), float(subject.loss(case.rows))
        expected = right(logits, case.rows)
    off = off_by(value, expected)
    if off <= LOSS_NOISE:
        return None
    return failed(
        f"in its own type the loss is {value:.6g}, the double loop over the same logits gives {expected:.6g}",
        off, LOSS_NOISE, unit="of the loss", bugs=["loss-in-bf16"], component="loss",
        advice="turn logits into float32 before the cross entropy",
    )  # fmt: skip


# ---------------------------------------------------------------- planted


def _plant(bug: str, what: str = "") -> Callable[[Loss], Loss]:
    """A wrong function of logits and rows as the subject's loss."""

    def add(loss: Loss) -> Loss:
        loss_identity.plant(bug, component="loss", what=what)(lambda: specimens.subject(loss=loss))
        return loss

    return add


def _mean(flat: Tensor, labels: Tensor, **more: float) -> Tensor:
    return F.cross_entropy(flat.flatten(0, -2), labels.flatten(), ignore_index=-100, **more)


def _labels(rows: Rows) -> Tensor:
    """Unshifted labels, -100 where nothing is learnt."""
    first = torch.zeros_like(rows.learn)
    first[:, 1:] = rows.segments[:, 1:] != rows.segments[:, :-1]
    return torch.where((rows.segments > 0) & rows.learn & ~first, rows.tokens, -100)


@_plant("no-shift")
def _(logits: Tensor, rows: Rows) -> Tensor:
    return _mean(logits, _labels(rows))


@_plant("no-shift", "logits[:, 1:] against labels[:, :-1]")
def _(logits: Tensor, rows: Rows) -> Tensor:
    same = (rows.segments[:, 1:] == rows.segments[:, :-1]) & (rows.segments[:, 1:] > 0) & rows.learn[:, 1:]
    return _mean(logits[:, 1:], torch.where(same, rows.tokens[:, :-1], -100))


@_plant("double-shift")
def _(logits: Tensor, rows: Rows) -> Tensor:
    labels = torch.where(targets(rows), rows.tokens[:, 1:], -100)  # shifted by the collator
    return _mean(logits[:, :-2], labels[:, 1:])  # and by the model


@_plant("flat-view-leak")
def _(logits: Tensor, rows: Rows) -> Tensor:
    return _mean(logits.flatten(0, 1)[:-1], _labels(rows).flatten()[1:])


@_plant("denominator-unshifted")
def _(logits: Tensor, rows: Rows) -> Tensor:
    nats, _ = summed_nats(logits, rows)
    return nats / ((rows.segments > 0) & rows.learn).sum().clamp(min=1)


@_plant("pad-in-loss")
def _(logits: Tensor, rows: Rows) -> Tensor:
    learn = (rows.learn | (rows.segments == 0))[:, 1:]
    return _mean(logits[:, :-1], torch.where(learn, rows.tokens[:, 1:], -100))


@_plant("pad-in-loss", "in the divisor only")
def _(logits: Tensor, rows: Rows) -> Tensor:
    return summed_nats(logits, rows)[0] / rows.tokens[:, 1:].numel()


@_plant("pack-label-across-docs")
def _(logits: Tensor, rows: Rows) -> Tensor:
    return _mean(logits[:, :-1], torch.where((rows.segments > 0) & rows.learn, rows.tokens, -100)[:, 1:])


@_plant("mask-from-attention", "prompts are learnt as well")
def _(logits: Tensor, rows: Rows) -> Tensor:
    return _mean(logits[:, :-1], _labels(Rows(rows.tokens, rows.segments, rows.segments > 0))[:, 1:])


@_plant("loss-in-bf16")
def _(logits: Tensor, rows: Rows) -> Tensor:
    return _mean(logits[:, :-1].bfloat16(), torch.where(targets(rows), rows.tokens[:, 1:], -100)).float()


@_plant("zloss-in-ce")
def _(logits: Tensor, rows: Rows) -> Tensor:
    nats, count = summed_nats(logits, rows)
    return (nats + 1e-3 * logits[:, :-1].logsumexp(-1).square()[targets(rows)].sum()) / max(count, 1)


@_plant("shift-lost-under-label-smoothing")
def _(logits: Tensor, rows: Rows) -> Tensor:
    return _mean(logits, _labels(rows), label_smoothing=0.1)


@_plant("label-smoothing-on-ignore")
def _(logits: Tensor, rows: Rows) -> Tensor:
    nats, count = summed_nats(logits, rows)
    return 0.9 * nats / max(count, 1) - 0.1 * logits[:, :-1].log_softmax(-1).mean()


@loss_identity.plant("eos-masked-pad-eq-eos", component="loss", what="mask by id, PAD has the id of EOS")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        labels = torch.where(targets(rows), rows.tokens[:, 1:], -100)
        return _mean(logits[:, :-1], labels.masked_fill(labels == 2, -100))

    subject = specimens.subject(loss=loss)
    subject.tokenizer.pad_id = subject.tokenizer.eos_id
    return subject


@loss_identity.plant(
    "loss-in-bf16", component="loss", what="a model in bfloat16 whose logits are not widened"
)
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        return _mean(logits[:, :-1], torch.where(targets(rows), rows.tokens[:, 1:], -100))

    subject = specimens.subject(loss=loss)
    subject.module.bfloat16()
    return subject


@loss_identity.healthy("label smoothing of 0.1, rightly shifted and masked")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        labels = torch.where(targets(rows), rows.tokens[:, 1:], -100)
        return _mean(logits[:, :-1], labels, label_smoothing=0.1)

    return specimens.subject(loss=loss)


@loss_identity.healthy("a model in bfloat16 with its loss in float32")
def _() -> Subject:
    subject = specimens.subject()
    subject.module.bfloat16()
    return subject


@loss_identity.healthy("PAD has the id of EOS, the mask comes from lengths")
def _() -> Subject:
    subject = specimens.subject()
    subject.tokenizer.pad_id = subject.tokenizer.eos_id
    return subject


@loss_identity.healthy("a mask by id where PAD is an id of its own")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        labels = torch.where(targets(rows), rows.tokens[:, 1:], -100)
        return _mean(logits[:, :-1], labels.masked_fill(labels == 0, -100))

    return specimens.subject(loss=loss)
