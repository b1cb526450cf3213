"""Evaluation reports the mean of the model's own losses, the same number that training gives the same rows.

Why: an evaluation whose logits are cut one position off reports 12.34 for a model whose loss is 2.26; one that reads
rows in another way than training (documents not kept apart, another start, cut short) reports a loss that cannot be
compared with the training loss. Both look like a property of the model.

How: small rows of every kind (whole, padded, with prompts, with a single target, packed) are given to the evaluation,
and the number is held against a float64 double loop over the model's own logits; a wrong one is compared with some
thirty wrong formulas. The same rows go through the training loss, which must agree. Exact up to float32 rounding.

Cannot see: how the owner's evaluation reads its own files; it is given rows.

Sources: K2 of the catalogue; llm.c 8d55c4a (mask one off in an evaluation); nanochat 3b50b77 (evaluation with another
loader than training).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.formulas import LOSS_NOISE, explained, measured_on, off_by, right
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet
from minilm.doctor.specimens.loss import mean_loss, summed_nats
from minilm.doctor.subject import Rows, Subject

RENAMED = {"no-shift": "eval-slice-off-by-one", "double-shift": "eval-slice-off-by-one",
           "flat-view-leak": "eval-slice-off-by-one"}  # fmt: skip


@check(
    group="evaluation",
    needs=("evaluate", "vocab_size"),
    cost="10 forwards of at most 4 x 12 tokens",
    quick=True,
)
def evaluation_identity(subject: Subject) -> Finding:
    """evaluate([rows]) == the double loop over the subject's logits, for each kind of rows."""
    with quiet(subject), torch.no_grad():
        measured, places, names = measured_on(subject, lambda rows: float(subject.evaluate([rows])))
    expected = [right(p.logits, p.rows) for p in places]
    off = [off_by(m, e) for m, e in zip(measured, expected, strict=True)]
    worst = max(off)
    at = off.index(worst)
    seen = f"on {names[at]} evaluation says {measured[at]:.6g}, the double loop {expected[at]:.6g}"
    if worst <= LOSS_NOISE:
        return passed(
            f"{seen}; {', '.join(names)} agree to {worst:.1e}", worst, LOSS_NOISE, unit="of the loss"
        )
    mistakes = explained(measured, places) or _other_weights(subject, measured[0], places[0].rows)
    bugs = [name for bug, _ in mistakes for name in (RENAMED.get(bug, bug), bug)]
    says = f": {mistakes[0][1]}" if mistakes else "; no known mistake gives these numbers"
    return failed(
        seen + says,
        worst,
        LOSS_NOISE,
        unit="of the loss",
        bugs=list(dict.fromkeys(bugs)) or ["eval-slice-off-by-one", "train-eval-other-loader"],
        component="evaluation",
        advice="score position i against token i + 1 (logits[:, :-1] against tokens[:, 1:]), count the targets alone",
    )


def _other_weights(subject: Subject, said: float, rows: Rows) -> list[tuple[str, str]]:
    """Does the number stay when the weights are drawn anew?"""
    if subject.module is None:
        return []
    with quiet(subject, seed=1), torch.no_grad():
        stays = float(subject.evaluate([rows])) == said
    return (
        [("best-vs-last", "it stays when the weights change: other weights are evaluated")] if stays else []
    )


@check(group="evaluation", needs=("evaluate", "loss", "vocab_size"), cost="10 forwards of 4 x 12 tokens")
def train_eval_same(subject: Subject) -> Finding:
    """evaluate([rows]) == loss(rows), on the same weights and rows."""
    found: list[tuple[float, float, float, str]] = []
    with quiet(subject), torch.no_grad():

        def both(rows: Rows) -> float:
            trained, evaluated = float(subject.loss(rows)), float(subject.evaluate([rows]))
            found.append((off_by(evaluated, trained), trained, evaluated, ""))
            return evaluated

        _, places, names = measured_on(subject, both)
    if len(found) != len(names):  # a kind of rows that one of the two does not take
        raise NotApplicable("training and evaluation do not take the same kinds of rows")
    off, trained, evaluated, _ = max(found)
    at = next(i for i, f in enumerate(found) if f[0] == off)
    seen = f"on {names[at]} the training loss is {trained:.6g}, evaluation says {evaluated:.6g}"
    if off <= LOSS_NOISE:
        text = f"{seen}; {', '.join(names)} agree to {off:.1e}"
        return passed(text, off, LOSS_NOISE, unit="of the loss")
    expected = right(places[at].logits, places[at].rows)
    training_right = off_by(trained, expected) <= LOSS_NOISE
    return failed(
        f"{seen}; the double loop gives {expected:.6g}",
        off,
        LOSS_NOISE,
        unit="of the loss",
        bugs=["train-eval-other-loader", *(["eval-slice-off-by-one"] if training_right else [])],
        component="evaluation" if training_right else "loss",
        advice="let training and evaluation share one function from rows to nats and targets",
    )


# ---------------------------------------------------------------- planted


@evaluation_identity.plant(
    "eval-slice-off-by-one", component="evaluation", what="logits[:, 1:] against tokens[:, 1:]"
)
def _() -> Subject:
    class OneOff(specimens.Evaluation):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            logits = self.model(rows.tokens, rows.segments)
            return summed_nats(torch.cat([logits[:, 1:], logits[:, -1:]], dim=1), rows)

    return specimens.subject(evaluation=OneOff)


@evaluation_identity.plant("pad-in-loss", component="evaluation")
def _() -> Subject:
    class Padded(specimens.Evaluation):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            logits, whole = self.model(rows.tokens, rows.segments), torch.ones_like(rows.segments)
            return summed_nats(logits, Rows(rows.tokens, whole, rows.learn | (rows.segments == 0)))

    return specimens.subject(evaluation=Padded)


@evaluation_identity.plant("denominator-unshifted", component="evaluation")
def _() -> Subject:
    class Counting(specimens.Evaluation):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            nats, _ = super().nats(rows)
            return nats, int(((rows.segments > 0) & rows.learn).sum())

    return specimens.subject(evaluation=Counting)


@evaluation_identity.plant("loss-in-bf16", component="evaluation")
def _() -> Subject:
    class Rounded(specimens.Evaluation):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            nats, count = summed_nats(self.model(rows.tokens, rows.segments).bfloat16().float(), rows)
            return nats.bfloat16(), count

    return specimens.subject(evaluation=Rounded)


@evaluation_identity.plant(
    "best-vs-last", component="evaluation", what="a copy of the weights, made before training"
)
def _() -> Subject:
    class Stale(specimens.Evaluation):
        def __init__(self, model: specimens.Model) -> None:
            super().__init__(copy.deepcopy(model))

    return specimens.subject(evaluation=Stale)


@train_eval_same.plant(
    "train-eval-other-loader", component="evaluation", what="documents of a row see each other"
)
def _() -> Subject:
    class Joined(specimens.Evaluation):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            return summed_nats(self.model(rows.tokens, (rows.segments > 0).long()), rows)

    return specimens.subject(evaluation=Joined)


@train_eval_same.plant("train-eval-other-loader", component="evaluation", what="a BOS in front of each row")
def _() -> Subject:
    class Started(specimens.Evaluation):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            def front(x: Tensor, value: int) -> Tensor:
                return torch.nn.functional.pad(x, (1, 0), value=value)

            longer = Rows(front(rows.tokens, 1), front(rows.segments, 1), front(rows.learn, 0))
            return summed_nats(self.model(longer.tokens, longer.segments), longer)

    return specimens.subject(evaluation=Started)


@train_eval_same.plant(
    "train-eval-other-loader", component="loss", what="training learns prompts, evaluation does not"
)
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        return mean_loss(logits, Rows(rows.tokens, rows.segments, rows.segments > 0))

    return specimens.subject(loss=loss)


@evaluation_identity.healthy("a model with dropout, in train mode")
def _() -> Subject:
    return specimens.subject(size={"dropout": 0.3})
