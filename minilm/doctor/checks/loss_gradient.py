"""The loss pulls at the logits of targets, toward their tokens, and at no others.

Why: the value of a loss can be right, or right by chance, while its gradient teaches something else: prompts that
should be given, padding, or a uniform distribution where nothing is to be learnt.

How: the gradient of the loss with respect to the logits, of the loss function itself where it is handed over, else
of the logits found inside the model. The places with a gradient must be those whose next token is a target; at each,
the one logit that is pushed up most must be that token's. The comparison is of sets and ids: there is no tolerance.

Cannot see: wrong weights of places that are rightly chosen (loss_identity sees those).

Sources: K2 of the catalogue, in its form for gradients; llm-foundry pull request 818 (loss mask taken from the
attention mask); Karpathy, A Recipe for Training Neural Networks (use backprop to chart dependencies).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.examples import cases
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet
from minilm.doctor.specimens.loss import summed_nats, targets
from minilm.doctor.subject import Rows, Subject

TINY = 1e-7  # of the largest gradient: what is smaller counts as none
ADVICE = "count position i when token i + 1 belongs to the same document and is to be learnt; mask labels, not logits"


@check(
    group="loss", needs=("loss", "vocab_size"), cost="5 forwards and backwards of 4 x 12 tokens", quick=True
)
def loss_gradient(subject: Subject) -> Finding:
    """{places with a gradient} == {places whose next token is a target}, each pushed toward that token."""
    right, total, problems = 0, 0, []
    with quiet(subject):
        for number, case in enumerate(cases(subject)):
            try:
                gradient = _gradient(subject, case.rows)
            except NotApplicable:
                if number == 0:
                    raise
                continue
            wanted = _wanted(case.rows)
            size = gradient.abs().amax(-1)
            pulled = {tuple(x) for x in (size > TINY * float(size.max())).nonzero().tolist()}
            least = gradient.argmin(-1)
            for place in sorted(pulled | set(wanted)):
                total += 1
                problem = _problem(case.rows, place, wanted.get(place), place in pulled, int(least[place]))
                right += problem is None
                if problem is not None:
                    problems.append((case.name, place, *problem))
    if not total:
        raise NotApplicable("no place of any of the rows has a gradient or a target")
    wrong = total - right
    if not wrong:
        return passed(f"{total} places with a gradient are the {total} targets, each pushed to its token", 0.0, 1.0,
                      unit="wrong places")  # fmt: skip
    counts: dict[str, int] = {}
    for _, _, bug, _ in problems:
        counts[bug] = counts.get(bug, 0) + 1
    name, place, _, says = problems[0]
    return failed(
        f"{wrong} of {total} places are wrong, first on {name}, row {place[0]}, position {place[1]}: {says}",
        float(wrong),
        1.0,
        unit="wrong places",
        bugs=sorted(counts, key=lambda bug: -counts[bug]),
        component="loss",
        advice=ADVICE,
    )


def _wanted(rows: Rows) -> dict[tuple[int, ...], int]:
    """Place -> the token that it must predict."""
    found = {}
    for b in range(len(rows)):
        for i in range(rows.tokens.shape[1] - 1):
            if int(rows.segments[b, i]) == int(rows.segments[b, i + 1]) > 0 and bool(rows.learn[b, i + 1]):
                found[(b, i)] = int(rows.tokens[b, i + 1])
    return found


def _problem(
    rows: Rows, place: tuple[int, ...], wanted: int | None, pulled: bool, least: int
) -> tuple[str, str] | None:
    """(bug, what it is), or None where all is right. `least` is the id whose logit is pushed up most."""
    b, i = place
    row = rows.tokens[b].tolist()
    after = row[i + 1] if i + 1 < len(row) else None
    if wanted is not None and not pulled:
        return "mask-from-attention", "a target has no gradient"
    if wanted is not None:
        if least == wanted:
            return None
        if least == row[i]:
            return "no-shift", "it is pushed toward the token that it was given"
        if i + 2 < len(row) and least == row[i + 2]:
            return "double-shift", "it is pushed toward the token after the next"
        return "label-smoothing-on-ignore", f"it is pushed toward id {least}, which does not follow"
    if least == row[i] and least != after:
        return "no-shift", "it is no target, and is pushed toward the token that it was given"
    if after is None:
        return "flat-view-leak", "the last position of a row has a gradient"
    if least != after:
        return "label-smoothing-on-ignore", "it is no target, and is pushed toward no token of the row"
    if int(rows.segments[b, i + 1]) == 0:
        return "pad-in-loss", "it is pushed toward padding"
    if int(rows.segments[b, i]) != int(rows.segments[b, i + 1]):
        return "pack-label-across-docs", "it is pushed toward the first token of the next document"
    return "mask-from-attention", "it is pushed toward a token that is not to be learnt"


def _gradient(subject: Subject, rows: Rows) -> Tensor:
    """d loss / d logits [B, T, V]."""
    if subject.criterion is not None:
        assert subject.vocab_size is not None
        generator = torch.Generator().manual_seed(1)
        shape = (*rows.tokens.shape, subject.vocab_size)
        logits = torch.randn(shape, generator=generator).requires_grad_()
        loss = subject.criterion(logits, rows)
        return torch.autograd.grad(loss, logits)[0]
    loss, found = _with_logits(subject, rows)
    gradient = torch.autograd.grad(loss, found, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise NotApplicable("the loss has no gradient with respect to the model's logits")
    return gradient


def _with_logits(subject: Subject, rows: Rows) -> tuple[Tensor, Tensor]:
    """The loss, and the logits that some part of the module made on the way."""
    if subject.module is None:
        raise NotApplicable("needs the loss as a function of logits, or the torch module")
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        whole = isinstance(output, Tensor) and output.dim() == 3 and output.requires_grad
        if whole and output.shape[:2] == rows.tokens.shape and output.shape[2] >= (subject.vocab_size or 0):
            seen.append(output)

    handles = [part.register_forward_hook(keep) for part in subject.module.modules()]
    try:
        loss = subject.loss(rows)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise NotApplicable("no part of the module makes logits of the whole rows")
    return loss, seen[-1]


# ---------------------------------------------------------------- planted


def _without_criterion(loss: Any) -> Subject:
    return specimens.subject(loss=loss).but(criterion=None)


@loss_gradient.plant("mask-from-attention", component="loss", what="prompts are learnt")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        nats, count = summed_nats(logits, Rows(rows.tokens, rows.segments, rows.segments > 0))
        return nats / max(count, 1)

    return specimens.subject(loss=loss)


@loss_gradient.plant(
    "mask-from-attention", component="loss", what="the mask is one position late; logits found inside"
)
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        counted = ((rows.segments > 0) & rows.learn)[:, :-1]
        labels = torch.where(counted, rows.tokens[:, 1:], -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)

    return _without_criterion(loss)


@loss_gradient.plant("label-smoothing-on-ignore", component="loss")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        nats, count = summed_nats(logits, rows)
        return 0.9 * nats / max(count, 1) - 0.1 * logits[:, :-1].log_softmax(-1).mean()

    return specimens.subject(loss=loss)


@loss_gradient.plant("no-shift", component="loss", what="logits found inside")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        labels = torch.where((rows.segments > 0) & rows.learn, rows.tokens, -100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    return _without_criterion(loss)


@loss_gradient.plant("double-shift", component="loss")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        labels = torch.where(targets(rows), rows.tokens[:, 1:], -100)[:, 1:]
        return F.cross_entropy(logits[:, :-2].flatten(0, 1), labels.flatten(), ignore_index=-100)

    return specimens.subject(loss=loss)


@loss_gradient.healthy("label smoothing of 0.1 at the targets")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        labels = torch.where(targets(rows), rows.tokens[:, 1:], -100).flatten()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, label_smoothing=0.1)

    return specimens.subject(loss=loss)


@loss_gradient.healthy("logits found inside the module")
def _() -> Subject:
    return specimens.subject().but(criterion=None)
