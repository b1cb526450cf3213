"""A position must not see the tokens after it.

Why: a model that sees its target has a loss that is too good to be true and writes garbage. No error is raised, and
the curve looks like success.

How: change one token; the logits before it must not move. In one row on a CPU in float32 healthy models give the
same bits, in eval mode and, with dropout off, in train mode (statistics over a batch or over time leak in train mode
only), with ordinary weights and with weights so large that a finite mask value would be overrun. The probe
is two-sided: the change must move the logits after it, else the probe itself saw nothing.

Cannot see: a leak beyond the length of the probe, or one that needs a second row.

Sources: K1 of the catalogue; transformers issues 48745 and 48748 (five classes that were not causal).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, culprit, difference, other_token, quiet, tokens_for
from minilm.doctor.subject import Subject

LENGTH = 48  # more than a usual chunk of a scan in tiny configurations
REACH = 1e-3  # the least effect on later positions for the probe to count


@check(group="model", needs=("forward", "vocab_size"), cost="16 forwards", quick=True)
def causality(subject: Subject) -> Finding:
    """Change token p: logits before p stay, logits from p on move."""
    worst, reach, where = 0.0, 0.0, ""
    setups = [("eval mode", False, 0.1), ("train mode", True, 0.1), ("eval mode, large weights", False, 1.0)]
    for name, train, std in setups if subject.module is not None else setups[:1]:
        with quiet(subject, redraw=std, train=train), torch.no_grad():
            tokens = tokens_for(subject, 1, LENGTH)
            length = tokens.shape[1]
            if length < 3:
                raise NotApplicable(f"needs rows of at least 3 tokens, the subject takes {length}")
            before = subject.forward(tokens)
            for p in sorted({1, length // 2, length - 1}):
                changed = tokens.clone()
                changed[0, p] = other_token(subject, int(tokens[0, p]))
                after = subject.forward(changed)
                leak = difference(before[:, :p], after[:, :p], scale=before)
                reach = max(reach, difference(before[:, p:], after[:, p:], scale=before))
                if leak > FLOAT32_NOISE and not where:
                    where = _first_leak(subject, tokens, changed, p) or name
                worst = max(worst, leak)
    if reach < REACH:
        raise NotApplicable(
            f"changing a token changed nothing after it ({reach:.1e} of the logits' deviation)"
        )
    seen = (
        f"changing a token moved the logits before it by {worst:.1e} std, those after it by {reach:.2g} std"
    )
    if worst <= FLOAT32_NOISE:
        return passed(seen, worst, FLOAT32_NOISE, unit="logit std")
    return failed(
        seen,
        worst,
        FLOAT32_NOISE,
        unit="logit std",
        bugs=["mask-missing", "decoder-flag-ignored", "mask-bool-inverted", "norm-over-time", "scan-axis-leak",
              "mem-future-retrieval", "mask-additive-finite"],
        component=where,
        advice="give attention a causal mask (is_causal=True, or a lower triangle), and take no statistics over "
        "positions",
    )  # fmt: skip


def _first_leak(subject: Subject, tokens: Tensor, changed: Tensor, p: int) -> str:
    """The first module whose output moves before p."""

    def moved(a: Tensor, b: Tensor) -> bool:
        axis = next((i for i, n in enumerate(a.shape) if n == tokens.shape[1] and i > 0), None)
        return (
            axis is not None
            and difference(a.narrow(axis, 0, p), b.narrow(axis, 0, p), scale=a) > FLOAT32_NOISE
        )

    return culprit(
        subject.module, lambda: subject.forward(tokens), lambda: subject.forward(changed), moved
    )  # fmt: skip


class _Unmasked(specimens.Attention):
    def allowed(self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor) -> Tensor:
        return segments.unsqueeze(2) == key_segments.unsqueeze(1)


@causality.plant("mask-missing", component="attention")
def _() -> Subject:
    return specimens.subject(attention=_Unmasked)


@causality.plant("mask-additive-finite", component="attention", what="-20 in place of minus infinity")
def _() -> Subject:
    class Finite(specimens.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            k, v = self.shared(k), self.shared(v)
            return (self.scores(q, k) + torch.where(allowed.unsqueeze(1), 0.0, -20.0)).softmax(-1) @ v

    return specimens.subject(attention=Finite)


@causality.plant("norm-over-time", component="norm", what="statistics over positions, in train mode only")
def _() -> Subject:
    class OverTime(specimens.Norm):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.shape[1] > 1:
                x = x - x.mean(1, keepdim=True)
            return super().forward(x)

    return specimens.subject(norm=OverTime)


@causality.healthy("sliding window of 8")
def _() -> Subject:
    return specimens.subject(size={"window": 8})


@causality.healthy("ALiBi-like bias, no rotary positions")
def _() -> Subject:
    class Biased(specimens.Attention):
        def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
            return x

        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            back: Any = torch.arange(k.shape[2]) - torch.arange(
                k.shape[2] - q.shape[2], k.shape[2]
            ).unsqueeze(1)
            return super().scores(q, k) + 0.1 * back / math.sqrt(2)

    return specimens.subject(attention=Biased)
