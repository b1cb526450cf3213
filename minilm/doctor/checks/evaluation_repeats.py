"""Evaluation says the same twice, and is done in eval mode.

Why: a total that is not set to 0, or a stream that goes on, makes each evaluation that of another set of rows. A
model that is evaluated in train mode has a loss that is noise, and too high.

How: evaluated twice, with other random states and with another evaluation in between: equal bits. With dropout at 0.5
everywhere and the model left in train mode: equal to dropout at 0; where it is not, the model is put into eval mode by
hand, which tells the evaluation that forgot from the module that drops out regardless.

Cannot see: noise that is not named like a dropout, other than by two evaluations that differ.

Sources: K8 of the catalogue; OLMo-core's changelog (drift of the evaluator's order), torchtune 1049 (evaluation
without model.eval()), pytorch 124464 and nanoGPT 240 (attention dropout at evaluation).
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.checks.examples import logits_of, uneven
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import culprit, quiet
from minilm.doctor.subject import Rows, Subject

DROPOUT = re.compile(r"^(\w+_)?(dropout|pdrop|drop)(_p|_rate|_prob|_probs)?$", re.IGNORECASE)


@check(group="evaluation", needs=("evaluate", "vocab_size"), cost="8 forwards of 3 x 12 tokens")
def evaluation_repeats(subject: Subject) -> Finding:
    """evaluate(A), evaluate(B), evaluate(A): the first and the last are equal, bit by bit."""
    with quiet(subject), torch.no_grad():
        batches, others = uneven(subject, 6).split(3), uneven(subject, 4, seed=1).split(2)
        said = [float(subject.evaluate(batches)), float(subject.evaluate(batches))]
        between = float(subject.evaluate(others))
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        said.append(float(subject.evaluate(batches)))
    off = max(abs(x - said[0]) for x in said)
    seen = f"the same rows: {said[0]:.9g}, again {said[1]:.9g}, after others ({between:.4g}) {said[2]:.9g}"
    if between == said[0]:
        raise NotApplicable(f"other rows have the same loss ({between:.6g}): the rows are not read")
    if off == 0:
        return passed(seen, 0.0, 0.0, unit="nats")
    return failed(
        seen,
        off,
        0.0,
        unit="nats",
        bugs=["eval-state-not-reset", "dropout-in-eval"],
        component="evaluation",
        advice="start from 0 and from the first row at each call; draw no random numbers",
    )


@check(
    group="evaluation",
    needs=("evaluate", "module", "vocab_size"),
    cost="8 forwards of 3 x 12 tokens",
    quick=True,
)
def evaluation_in_eval_mode(subject: Subject) -> Finding:
    """With dropout at 0.5 and the model in train mode, evaluation says what it says with dropout at 0."""
    rows = uneven(subject, 3)
    with quiet(subject), torch.no_grad():
        calm = float(subject.evaluate([rows]))
        with _dropout(subject.module, 0.5):
            subject.module.train()
            if torch.equal(_seeded(subject, rows, 1), _seeded(subject, rows, 2)):
                raise NotApplicable(
                    "the model has no dropout that could be turned on: two forwards are equal"
                )
            loud = [_evaluated(subject, rows, seed) for seed in (1, 2)]
            if loud == [calm, calm]:
                return passed(
                    f"two evaluations with dropout 0.5 say {calm:.6g}, as without", 0.0, 0.0, unit="nats"
                )
            subject.module.eval()
            after = [_evaluated(subject, rows, seed) for seed in (1, 2)]
            subject.module.eval()
            where = _still_dropping(subject, rows) if after != [calm, calm] else ""
    seen = f"with dropout 0.5 evaluation says {loud[0]:.6g} and {loud[1]:.6g}, without {calm:.6g}"
    if where:
        return failed(
            f"{seen}; so it does in eval mode", max(abs(x - calm) for x in loud), 0.0, unit="nats",
            bugs=["dropout-in-eval", "moe-jitter-in-eval"], component=where,
            advice="drop out only where self.training is true (dropout_p=self.p if self.training else 0)",
        )  # fmt: skip
    return failed(
        f"{seen}: the model was in train mode",
        max(abs(x - calm) for x in loud),
        0.0,
        unit="nats",
        bugs=["eval-left-in-train-mode", "dropout-in-eval"],
        component="evaluation",
        advice="call model.eval() before evaluating, and give every module its mode back afterwards",
    )


@contextlib.contextmanager
def _dropout(module: nn.Module, p: float) -> Iterator[None]:
    """Every dropout at `p`: modules, and float attributes that are named so."""
    changed: list[tuple[Any, str, float]] = []
    for part in module.modules():
        names = [n for n, v in vars(part).items() if isinstance(v, float) and DROPOUT.match(n)]
        names += ["p"] if isinstance(part, nn.modules.dropout._DropoutNd) else []
        for name in dict.fromkeys(names):
            changed.append((part, name, getattr(part, name)))
            setattr(part, name, p)
    try:
        yield
    finally:
        for part, name, value in changed:
            setattr(part, name, value)


def _seeded(subject: Subject, rows: Rows, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return logits_of(subject, rows)


def _evaluated(subject: Subject, rows: Rows, seed: int) -> float:
    torch.manual_seed(seed)
    return float(subject.evaluate([rows]))


def _still_dropping(subject: Subject, rows: Rows) -> str:
    """The first module whose output differs between two forwards in eval mode."""
    found = culprit(
        subject.module,
        lambda: _seeded(subject, rows, 1),
        lambda: _seeded(subject, rows, 2),
        lambda a, b: not torch.equal(a, b),
    )
    return found or "evaluation"


# ---------------------------------------------------------------- planted


@evaluation_repeats.plant(
    "eval-state-not-reset", component="evaluation", what="totals are kept from call to call"
)
def _() -> Subject:
    class Adding(specimens.Evaluation):
        nats_so_far, count_so_far = 0.0, 0

        def mean(self, nats: list[float], counts: list[int]) -> float:
            self.nats_so_far += sum(nats)
            self.count_so_far += sum(counts)
            return self.nats_so_far / self.count_so_far

    return specimens.subject(evaluation=Adding)


@evaluation_repeats.plant("eval-state-not-reset", component="evaluation", what="the next batch, at each call")
def _() -> Subject:
    class Drifting(specimens.Evaluation):
        calls = 0

        def evaluate(self, batches: Any) -> float:
            self.calls += 1
            return super().evaluate([batches[self.calls % len(batches)]])

    return specimens.subject(evaluation=Drifting)


class _Forgetful(specimens.Evaluation):
    def enter(self) -> bool:
        return self.model.training


@evaluation_in_eval_mode.plant("eval-left-in-train-mode", component="evaluation", what="no model.eval()")
def _() -> Subject:
    return specimens.subject(evaluation=_Forgetful)


@evaluation_in_eval_mode.plant(
    "dropout-in-eval", component="attention", what="dropout_p=self.dropout, always"
)
def _() -> Subject:
    class Always(specimens.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            return nn.functional.dropout(super().attend(q, k, v, allowed), self.dropout, training=True)

    return specimens.subject(attention=Always)
