"""The average of the weights follows them with its configured decay.

Why: with the decay on the wrong side the average is the live model, or never moves; nobody notices until it is used.

How: four steps; the decay is solved for from the average before, the average after and the weights, and held against
the configured one (within 5 % of the smaller of decay and 1 - decay). A decay that rises towards it is a warm-up.

Cannot see: an average that is right and then not the one that is saved or evaluated.

Sources: levanter issue 883; Polyak and Juditsky (1992).
"""

from __future__ import annotations

import itertools

import torch

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.stepping import (
    even_rows,
    start,
    watched_step,
)
from minilm.doctor.subject import Subject

STEPS = 4


@check(group="training", needs=("training", "vocab_size"), cost="4 steps")
def average(subject: Subject) -> Finding:
    """The decay of the weights' average, solved for from what it does."""
    training = start(subject, seed=0)
    if training.average is None or training.average_decay is None:
        raise NotApplicable("needs the average of the weights and its decay")
    decay, found, bend = training.average_decay, [], 0.0
    former = {name: value.detach().double().clone() for name, value in training.average().items()}
    for step in range(STEPS):
        live = watched_step(training, even_rows(subject, seed=step).split(2)).after
        present = {name: value.detach().double().clone() for name, value in training.average().items()}
        names = [name for name in present if name in live]
        if not names:
            raise NotApplicable("the average's names are not those of the module's parameters")
        back = torch.cat([(former[n] - live[n].double()).flatten() for n in names])
        now = torch.cat([(present[n] - live[n].double()).flatten() for n in names])
        if float(back.norm()) > 0:
            found.append(float(now @ back / (back @ back)))
            bend = max(bend, float((now - found[-1] * back).norm() / back.norm()))
        former = present
    if not found:
        raise NotApplicable("the weights did not move")
    text = f"the average keeps {', '.join(f'{d:.4g}' for d in found)} of itself per step, configured is {decay:g}"
    # From the float32 rounding of weights whose updates are a thousandth of them.
    error, limit = max(abs(d - decay) for d in found), max(0.05 * min(decay, 1 - decay), 1e-4)
    rising = all(b > a - 1e-4 for a, b in itertools.pairwise(found)) and found[-1] > found[0] + 1e-3
    warming = rising and max(found) <= decay + limit and min(found) >= -1e-3
    if bend < 0.05 and (error <= limit or warming):
        return passed(
            text + (", rising to it" if error > limit else ""), min(error, limit), limit, unit="of decay"
        )
    return failed(text, error, limit, unit="of decay", bugs=["ema-beta-swapped"], component="average of the weights",
                  advice="average <- decay * average + (1 - decay) * weights, after each update")  # fmt: skip


@average.plant("ema-beta-swapped", component="average")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def follow_average(self) -> None:
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter.detach(), self.average_decay)

    return specimens.subject(trainer=Broken)


@average.plant("ema-beta-swapped", component="average", what="it never moves")
def _() -> Subject:
    return specimens.subject(
        trainer=type("Broken", (specimens.Trainer,), {"follow_average": lambda self: None})
    )


@average.healthy("a decay that rises with the number of updates")
def _() -> Subject:
    class Warming(specimens.Trainer):
        def follow_average(self) -> None:
            decay = min(self.average_decay, (1 + self.step_number) / (10 + self.step_number))
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter.detach(), 1 - decay)

    return specimens.subject(trainer=Warming)
