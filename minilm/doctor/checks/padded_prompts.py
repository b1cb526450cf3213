"""A prompt is continued the same way alone and in a batch with longer ones.

Why: prompts of unequal length must be padded to stand in one batch. Padding on the wrong side, padding that attention
sees, or positions that count it make the text of every prompt but the longest worse, and only in batches.

How: prompts of 2, 7 and 4 tokens in one batch, at temperature 0; every new token must have the largest logit in the
whole forward pass over its own prompt and text, without padding, up to a near tie of 1e-3 of the logits' deviation.
Where it has not, it is compared with what padding on the right, and padding on the left that is attended to, would
give. The longest prompt, which has no padding, tells a fault of the padding from one of the generator.

Cannot see: a generator that is only ever given one prompt; sampling.

Sources: K6 and K7 of the catalogue; transformers issues 18388 (side of the padding), 22161 and 29583 (positions beside
left padding).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.examples import marks
from minilm.doctor.checks.greedy import NEW, POSITION, SPREAD, TIE, choice, gaps_below, room_for, texts_of
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet, tokens_for
from minilm.doctor.subject import Subject


@check(
    group="evaluation",
    needs=("generate", "forward", "vocab_size"),
    cost="1 generation of 8 tokens, 3 forwards",
)
def padded_prompts(subject: Subject) -> Finding:
    """Prompts of 2, 7 and 4 tokens in one batch: each is continued as the whole forward pass of it alone says."""
    with quiet(subject, redraw=SPREAD), torch.no_grad():
        tokens = tokens_for(subject, 3, room_for(subject, 7)).tolist()
        prompts = [tokens[0][:2], tokens[1], tokens[2][:4]]
        if len(prompts[1]) <= 4:
            raise NotApplicable("the subject's context is too short for uneven prompts")
        written = texts_of(subject, subject.generate(prompts, NEW, temperature=0.0, seed=0))
        gaps = [gaps_below(subject, p, w) for p, w in zip(prompts, written, strict=True)]
        worst = max((g for gap in gaps for g in gap), default=None)
        if worst is None:
            raise NotApplicable("nothing was written")
        seen = f"in a batch of uneven prompts new tokens are at most {worst:.2g} std below the largest logit"
        if worst <= TIE:
            return passed(seen, worst, TIE, unit="logit std")
        wrong = [row for row, gap in enumerate(gaps) if max(gap, default=0) > TIE]
        bugs, why = _why(subject, prompts, written, gaps, wrong)
    return failed(
        f"{seen}; wrong are prompts {', '.join(map(str, wrong))} of {len(prompts)}: {why}",
        worst,
        TIE,
        unit="logit std",
        bugs=list(dict.fromkeys(bugs)),
        component="padding of the generator",
        advice="pad prompts on the left, hide the padding from attention, count positions from the first real token",
    )


def _why(
    subject: Subject,
    prompts: list[list[int]],
    written: list[list[int]],
    gaps: list[list[float]],
    wrong: list[int],
) -> tuple[list[str], str]:
    """(bugs, what the first new tokens are instead)."""
    longest = max(map(len, prompts))
    rest = ["padding-side-mixed", "pos-ids-leftpad", "padmask-ignored-fastpath", POSITION]
    short = [row for row in wrong if len(prompts[row]) < longest]
    if len(short) < len(wrong):
        return [POSITION, "kv-cache-mismatch", *rest], "the longest prompt, which has no padding, as well"
    if all(gaps[row][0] <= TIE for row in short):
        bugs = ["pos-offset-generate", "kv-cache-mismatch", *rest]
        return bugs, "the first new token is right, later ones are not"
    fill = marks(subject)[0]

    def all_are(chosen: Any) -> bool:
        return all(
            chosen(prompts[row], [fill] * (longest - len(prompts[row]))) == written[row][0] for row in short
        )

    if all_are(lambda p, pads: choice(subject, p + pads)):
        return [
            "padding-side-mixed",
            POSITION,
        ], "the first is the choice of the padding on the RIGHT of the prompt"
    if all_are(lambda p, pads: choice(subject, pads + p)):
        return ["padmask-ignored-fastpath", "padding-side-mixed"], "padding on the left is attended to"
    if all_are(lambda p, pads: choice(subject, p, max(0, len(p) - 2))):
        return [
            POSITION,
            "padding-side-mixed",
        ], "the first is the choice of the position before the prompt's last"
    return ["pos-ids-leftpad", *rest], "only rows with padding are wrong (positions, or the mask)"


# ---------------------------------------------------------------- planted


@padded_prompts.plant(
    "padding-side-mixed", component="padding", what="padded on the right, last logits taken"
)
def _() -> Subject:
    class RightPadded(specimens.Generator):
        def padded(self, prompts: Any) -> tuple[Tensor, Tensor]:
            tokens, segments = super().padded(prompts)
            order = segments.argsort(dim=1, descending=True, stable=True)
            return tokens.gather(1, order), torch.ones_like(segments)

    return specimens.subject(generator=RightPadded)


@padded_prompts.plant(
    "padmask-ignored-fastpath", component="padding", what="padding on the left is attended to"
)
def _() -> Subject:
    class Unmasked(specimens.Generator):
        def padded(self, prompts: Any) -> tuple[Tensor, Tensor]:
            tokens, segments = super().padded(prompts)
            return tokens, torch.ones_like(segments)

    return specimens.subject(generator=Unmasked)


@padded_prompts.plant(
    "wrong-logit-position", component="padding", what="the position before the last real token"
)
def _() -> Subject:
    class Before(specimens.Generator):
        def last(self, logits: Tensor, segments: Tensor) -> Tensor:
            full = segments.all(dim=1)
            return torch.where(full.unsqueeze(1), logits[:, -1], logits[:, -2])

    return specimens.subject(generator=Before)


class _Absolute(specimens.Attention):
    """Positions are added to queries and keys: unlike turned ones they are no matter of distance alone."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = self.rotary.table[positions].unsqueeze(1)
        return x + torch.cat([angles.sin(), angles.cos()], dim=-1)


class _FromPadding(specimens.Generator):
    def positions(self, segments: Tensor) -> Tensor:
        return torch.arange(segments.shape[1]).expand_as(segments)


@padded_prompts.plant(
    "pos-ids-leftpad", component="padding", what="positions counted from the start of the padding"
)
def _() -> Subject:
    return specimens.subject(generator=_FromPadding, attention=_Absolute)


@padded_prompts.healthy("absolute positions, counted from the first real token")
def _() -> Subject:
    return specimens.subject(attention=_Absolute)


@padded_prompts.healthy("turned positions may be counted from the start of the padding")
def _() -> Subject:
    return specimens.subject(generator=_FromPadding)
