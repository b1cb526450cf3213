"""On uniformly random tokens nobody can be better than chance: a loss below ln V is a leak.

Why: a model that sees its targets, or a loss that is asked for the wrong ones, looks like a success. On text
nobody knows how good is too good; on tokens that were just drawn it is known exactly, for any model, trained
or not, at any time.

How: V ordinary ids, drawn freshly and uniformly. Whatever a model says before it sees a token, its
probability for the true one is 1 / V on average, so the product of V p(true) over all tokens has an
expectation of at most 1: it exceeds e^20.7 with a probability below 1e-9 (Ville's inequality). So the summed
gain, N ln V minus the summed nats, may not exceed 20.7 nats. There is no approximation, and no noise to be
measured. Asked are the logits (a loss of our own), the training loss and the evaluation, so that a leak is
placed: in the model if its logits gain, else in the loss that does.

Cannot see: a leak that the weights do not use (a fresh model without a mask has not yet learnt to look); see
causality.

Sources: Ville 1939; K12 of the catalogue; transformers issue 48745 (a loss near 0 on random tokens).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import culprit, difference, num_targets, quiet, tokens_for
from minilm.doctor.specimens.loss import mean_loss
from minilm.doctor.subject import Rows, Subject

BATCHES, ROWS, LENGTH = 2, 4, 64
SEED = 913_507  # of tokens that nobody else draws, so that no model has been trained on them
GAIN = math.log(1e9)  # nats: exceeded by chance once in 1e9 times


@check(group="oracle", needs=("vocab_size",), cost="6 forwards of [4, 64]", quick=True)
def random_floor(subject: Subject) -> Finding:
    """The summed gain over chance, of the logits, of the loss and of the evaluation."""
    ordinary = (subject.vocab_size or 0) - len(set(subject.special_ids))
    batches = [Rows.whole(tokens_for(subject, ROWS, LENGTH, SEED + k)) for k in range(BATCHES)]
    if batches[0].tokens.shape[1] < 2:
        raise NotApplicable("the subject takes rows of one token only")
    floor, count = math.log(ordinary), sum(num_targets(rows) for rows in batches)
    gains: dict[str, float] = {}
    with quiet(subject, redraw=None), torch.no_grad():
        if subject.forward is not None:
            nats = sum(_nats(subject.forward(rows.tokens), rows) for rows in batches)
            gains["the logits"] = count * floor - nats
        if subject.loss is not None:
            gains["the training loss"] = sum(
                num_targets(rows) * (floor - float(subject.loss(rows))) for rows in batches
            )
        if subject.evaluate is not None:
            gains["the evaluation"] = count * (floor - subject.evaluate(batches))
    if not gains:
        raise NotApplicable("needs a forward pass, a loss or an evaluation")
    if any(math.isnan(gain) for gain in gains.values()):
        raise NotApplicable("the loss is not a number")
    said = f"on {count} random tokens chance is {floor:.3f} nats; " + ", ".join(
        f"{name} {floor - gain / count:.3f}" for name, gain in gains.items()
    )
    worst = max(gains.values())
    if worst <= GAIN:
        return passed(said, worst, GAIN, unit="nats gained")
    above = [name for name, gain in gains.items() if gain > GAIN]
    return failed(
        f"{said}: {' and '.join(above)} cannot know what they know",
        worst,
        GAIN,
        unit="nats gained",
        **_placed(subject, above, batches[0], gains, count),
    )


def _nats(logits: Tensor, rows: Rows) -> float:
    """Summed nats of whole rows, in float64."""
    log_p = logits.double().log_softmax(-1)[:, :-1]
    return -float(log_p.gather(-1, rows.tokens[:, 1:].to(log_p.device).unsqueeze(-1)).sum())


def _placed(
    subject: Subject, above: list[str], rows: Rows, gains: dict[str, float], count: int
) -> dict[str, Any]:
    if "the logits" in above:
        return {
            "bugs": ["mask-missing", "scan-axis-leak", "mem-future-retrieval", "norm-over-time"],
            "component": _looks_ahead(subject, rows) or "model",
            "advice": "no position may see the tokens after it: mask attention, shift and pool over the past",
        }
    # The logits are honest: a loss that asks for a token which is at hand, or that counts too much.
    name = above[0]
    bugs = ["no-shift", "flat-view-leak"]
    if subject.forward is not None:
        with quiet(subject, redraw=None), torch.no_grad():
            log_p = subject.forward(rows.tokens).double().log_softmax(-1)
            own = -float(log_p.gather(-1, rows.tokens.unsqueeze(-1)).mean())
        reported = math.log((subject.vocab_size or 1) - len(set(subject.special_ids))) - gains[name] / count
        if abs(own - reported) > 0.1 * abs(own) + 0.05:
            bugs = ["pad-in-loss", "no-shift"]
    return {
        "bugs": bugs,
        "component": "loss" if "loss" in name else "evaluation",
        "advice": "score position i against token i + 1, and divide by the number of targets",
    }


def _looks_ahead(subject: Subject, rows: Rows) -> str:
    """The first module whose output at the earlier positions changes with the last tokens."""
    if subject.module is None or subject.forward is None:
        return ""
    forward, half = subject.forward, rows.tokens.shape[1] // 2
    changed = rows.tokens.clone()
    changed[:, half:] = changed[:, half:].flip(1).roll(1, 0)

    def moved(a: Tensor, b: Tensor) -> bool:
        axis = next((i for i, n in enumerate(a.shape) if n == rows.tokens.shape[1] and i > 0), None)
        return (
            axis is not None and difference(a.narrow(axis, 0, half), b.narrow(axis, 0, half), scale=a) > 1e-4
        )

    with quiet(subject, redraw=None), torch.no_grad():
        return culprit(subject.module, lambda: forward(rows.tokens), lambda: forward(changed), moved)


class _Unmasked(specimens.Attention):
    def allowed(self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor) -> Tensor:
        return segments.unsqueeze(2) == key_segments.unsqueeze(1)


def learnt(subject: Subject, steps: int, length: int = 12, rate: float = 1e-2) -> Subject:
    """The subject's module after some steps on random tokens, by a plain loop: what training makes of a leak."""
    assert subject.module is not None and subject.loss is not None
    optimizer = torch.optim.AdamW(subject.module.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        subject.loss(Rows.whole(tokens_for(subject, 32, length, 10_000 + step))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return subject.but(fresh=False)


@random_floor.plant(
    "mask-missing", component="attention", what="after 120 steps of training on random tokens"
)
def _() -> Subject:
    return learnt(specimens.subject(attention=_Unmasked), 120)


@random_floor.plant(
    "scan-axis-leak", component="model", what="a token shift towards the future, as it is learnt"
)
def _() -> Subject:
    class Shifted(specimens.Model):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x + F.pad(x[:, 1:], (0, 0, 0, 1))

    return learnt(specimens.subject(model=Shifted), 60)


@random_floor.plant("no-shift", component="loss", what="tied embeddings, at the first step")
def _() -> Subject:
    def same(logits: Tensor, rows: Rows) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), rows.tokens.flatten())

    return specimens.subject(loss=same, size={"tied": True})


@random_floor.plant("no-shift", component="loss", what="as it is learnt")
def _() -> Subject:
    def same(logits: Tensor, rows: Rows) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), rows.tokens.flatten())

    return learnt(specimens.subject(loss=same), 40)


@random_floor.plant("pad-in-loss", component="loss", what="divided by every position of a longer, padded row")
def _() -> Subject:
    def diluted(logits: Tensor, rows: Rows) -> Tensor:
        padded = math.ceil(rows.tokens.shape[1] * 1.25)
        return mean_loss(logits, rows) * (rows.tokens.shape[1] - 1) / padded

    return specimens.subject(loss=diluted)


@random_floor.healthy("trained for 40 steps, honestly")
def _() -> Subject:
    return learnt(specimens.subject(), 40)


@random_floor.healthy("large logits: far worse than chance")
def _() -> Subject:
    return specimens.subject(size={"init_std": 0.5})
