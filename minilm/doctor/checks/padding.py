"""Padding changes nothing: on the right for everybody, on the left where the owner says that it is taken.

Why: evaluation and generation put rows of different lengths into one batch. A mask that is dropped, a position that
counts the padding, a token that is skipped without its neighbours being put back: each row is then scored by what it
happened to be batched with. A row without any key becomes NaN, and one NaN in a batch ruins every gradient.

How: three rows of different lengths in one batch against each alone, without padding. The padding is filled with two
different tokens in turn: what it contains must not matter. All logits must be finite, at the padding too, because a
NaN there turns every gradient into NaN even with weight zero; that is asked of left padding as well. Only the logits
of real tokens are compared: what stands at padding is nobody's business. Left padding is compared only if the subject
promises it (`left_padding`), because a quarter of the healthy classes of transformers count positions otherwise.

Cannot see: padding in the middle of a row.

Sources: transformers issues 22161, 18388 and 29739; llm-foundry pull request 775; pytorch issues 102333 and 118628;
MiniMind commit f5374dc; K6 of the catalogue.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, culprit, difference, other_token, quiet, tokens_for
from minilm.doctor.subject import Subject

LENGTHS = (24, 17, 9)


@check(group="model", needs=("masked_forward", "forward", "vocab_size"), cost="7 forwards", quick=True)
def right_padding(subject: Subject) -> Finding:
    """Rows padded on the right against each row alone; everything finite, on either side."""
    finding = _examine(subject, left=False)
    if finding.status == "FAIL":
        return finding
    with quiet(subject), torch.no_grad():
        tokens, keep = _padded(subject, left=True, seed=0)[:2]
        assert subject.masked_forward is not None
        try:
            logits = subject.masked_forward(tokens, keep)
        except (NotImplementedError, ValueError):  # says that it does not take left padding
            return finding
        return _not_finite(subject, logits, tokens, keep, "left") or finding


@check(group="model", needs=("masked_forward", "forward", "vocab_size", "left_padding"), cost="6 forwards")
def left_padding(subject: Subject) -> Finding:
    """Rows padded on the left against each row alone."""
    return _examine(subject, left=True)


def _padded(
    subject: Subject, *, left: bool, seed: int, filler: int | None = None
) -> tuple[Tensor, Tensor, list[slice]]:
    """tokens and keep [3, T], and where each row's own tokens are."""
    tokens = tokens_for(subject, len(LENGTHS), LENGTHS[0], seed)
    length = tokens.shape[1]
    if length < 4:
        raise NotApplicable(f"needs rows of at least 4 tokens, the subject takes {length}")
    if filler is None:
        filler = subject.special_ids[0] if subject.special_ids else int(tokens[0, 0])
    places = []
    for row, asked in enumerate(LENGTHS):
        own = max(2, asked * length // LENGTHS[0])
        places.append(slice(length - own, length) if left else slice(0, own))
        outside = torch.ones(length, dtype=torch.bool)
        outside[places[-1]] = False
        tokens[row, outside] = filler
    keep = torch.stack(
        [torch.zeros(length, dtype=torch.bool).index_fill(0, torch.arange(length)[p], True) for p in places]
    )
    return tokens, keep, places


def _examine(subject: Subject, *, left: bool) -> Finding:
    side = "left" if left else "right"
    first, filled = _differences(subject, left, 0)
    if isinstance(first, Finding):
        return first
    worst = max(first, filled)
    if worst <= FLOAT32_NOISE:
        return passed(f"padding on the {side} moved the logits by {first:.1e} std, its content by {filled:.1e} std",
                      worst, FLOAT32_NOISE, unit="logit std")  # fmt: skip
    again = _differences(subject, left, 1)
    assert not isinstance(again[0], Finding)
    if max(again[0], again[1]) <= FLOAT32_NOISE:  # once, not twice: a router's near-tie
        return passed(f"padding on the {side} moved nothing in a second draw (in the first: a near-tie)",
                      max(again[0], again[1]), FLOAT32_NOISE, unit="logit std")  # fmt: skip
    where = _where(subject, left)
    if filled > FLOAT32_NOISE:
        likely = ["padmask-ignored-fastpath", "ffn-skipped-on-pad-flag", "aux-counts-pads", "pos-ids-leftpad"]
        what = f"what stands at the padding moved the logits of real tokens by {filled:.1e} std"
        advice = "pass the mask on, on every path, also where one row of the batch needs none"
    else:
        likely = ["ffn-skipped-on-pad-flag", "pos-ids-leftpad", "padmask-ignored-fastpath"]
        if left and not any(word in where.lower() for word in ("ffn", "mlp", "feed")):
            likely = ["pos-ids-leftpad", "padding-side-mixed", "ffn-skipped-on-pad-flag"]
        what = f"padding moved the logits of real tokens by {first:.1e} std, whatever it contains"
        advice = (
            "count positions from the first real token (cumulative sum of the mask), and put tokens that were taken "
            "out of a batch back to their own places"
        )
    return failed(
        f"on the {side}: {what}", worst, FLOAT32_NOISE, unit="logit std", bugs=likely,
        component=where or "positions or mask", advice=advice,
    )  # fmt: skip


def _differences(subject: Subject, left: bool, seed: int) -> tuple[float | Finding, float]:
    """(rows in the batch against alone, one filler against another), in logit std."""
    assert subject.masked_forward is not None and subject.forward is not None
    side = "left" if left else "right"
    with quiet(subject, seed=seed), torch.no_grad():
        tokens, keep, places = _padded(subject, left=left, seed=seed)
        logits = subject.masked_forward(tokens, keep)
        if finding := _not_finite(subject, logits, tokens, keep, side):
            return finding, 0.0
        ordinary = other_token(subject, int(tokens[0, 0]))
        refilled = subject.masked_forward(_padded(subject, left=left, seed=seed, filler=ordinary)[0], keep)
        alone, filled, moved = 0.0, 0.0, 0.0
        for row, place in enumerate(places):
            own = tokens[row : row + 1, place]
            here = logits[row : row + 1, place]
            alone = max(alone, difference(here, subject.forward(own), scale=logits))
            filled = max(filled, difference(here, refilled[row : row + 1, place], scale=logits))
            moved = max(moved, difference(here[:, :1], here[:, -1:], scale=logits))
    if moved < 1e-3:
        raise NotApplicable("the logits do not depend on the tokens: the probe saw nothing")
    return alone, filled


def _not_finite(subject: Subject, logits: Tensor, tokens: Tensor, keep: Tensor, side: str) -> Finding | None:
    bad = ~torch.isfinite(logits).all(-1)
    if not bool(bad.any()):
        return None
    real = int((bad & keep).sum())
    assert subject.masked_forward is not None
    masked = subject.masked_forward
    every = torch.ones_like(keep)

    def broken(a: Tensor, b: Tensor) -> bool:
        return not bool(torch.isfinite(a).all())

    where = culprit(subject.module, lambda: masked(tokens, keep), lambda: masked(tokens, every), broken)
    likely = ["fully-masked-row", "alibi/attn-bias-nan", "mask-zero-times-inf"]
    if real and side == "right":
        likely = ["mask-zero-times-inf", "alibi/attn-bias-nan", "fully-masked-row"]
    return failed(
        f"padding on the {side}: {int(bad.sum())} positions have logits that are not finite, {real} of them real",
        float(bad.sum()), 0.0, unit="positions", bugs=likely, component=where or "attention mask",
        advice="write masks with torch.where or masked_fill, never as 0 times infinity, and let a query without "
        "any key see itself",
    )  # fmt: skip


def _where(subject: Subject, left: bool) -> str:
    """The first module whose output at real tokens depends on what stands at the padding, or on there being any."""
    assert subject.masked_forward is not None
    module, masked = subject.module, subject.masked_forward
    with quiet(subject), torch.no_grad():
        tokens, keep, places = _padded(subject, left=left, seed=0)
        other = other_token(subject, int(tokens[0, 0]))
        refilled = _padded(subject, left=left, seed=0, filler=other)[0]
        row, place = len(places) - 1, places[-1]
        start = slice(0, place.stop - place.start)

        def moved_to(there: slice) -> Callable[[Tensor, Tensor], bool]:
            def broken(a: Tensor, b: Tensor) -> bool:
                rows = a.dim() >= 3 and a.shape[:2] == tokens.shape
                return rows and difference(a[row, place], b[row, there], scale=a) > FLOAT32_NOISE

            return broken

        def padded() -> Tensor:
            return masked(tokens, keep)

        if found := culprit(module, padded, lambda: masked(refilled, keep), moved_to(place)):
            return found
        if not left:
            return culprit(module, padded, lambda: masked(tokens, torch.ones_like(keep)), moved_to(place))
        alone, kept = tokens.clone(), torch.zeros_like(keep)  # the same row at the start, nothing before it
        alone[row, start], kept[row, start], kept[0] = tokens[row, place], True, True
        return culprit(module, padded, lambda: masked(alone, kept), moved_to(start))


class _FastPath(specimens.Attention):
    def allowed(self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor) -> Tensor:
        if bool((segments[0] > 0).all()):  # the first row has no padding, so "there is none"
            key_segments = segments = torch.ones_like(segments)
        return super().allowed(places, key_places, segments, key_segments)


@left_padding.plant(
    "padmask-ignored-fastpath", component="attention", what="one row without padding is enough"
)
def _() -> Subject:
    return specimens.subject(attention=_FastPath)


@left_padding.plant("padmask-ignored-fastpath", component="attention", what="the mask never arrives")
def _() -> Subject:
    class Deaf(specimens.Attention):
        def allowed(self, places: Tensor, key_places: Tensor, *others: Tensor) -> Tensor:
            return places.unsqueeze(2) >= key_places.unsqueeze(1)

    return specimens.subject(attention=Deaf)


@left_padding.plant(
    "pos-ids-leftpad", component="layers.0", what="learnt positions counted from the edge of the row"
)
def _() -> Subject:
    class Learnt(specimens.Attention):
        def forward(self, x: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
            places = torch.arange(x.shape[1]).unsqueeze(-1) / 10
            return super().forward(x + places.sin(), positions, segments, cache)

        def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
            return x

    return specimens.subject(attention=Learnt)


@left_padding.healthy("positions counted from the edge, but relative")
def _() -> Subject:
    class Edge(specimens.model.Model):
        def positions(self, segments: Tensor) -> Tensor:
            return torch.arange(segments.shape[1]).expand_as(segments)

    return specimens.subject(model=Edge)


@right_padding.plant("mask-zero-times-inf", component="attention")
def _() -> Subject:
    class ZeroTimesInfinity(specimens.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            if bool(allowed[:, -1].all()):  # without padding the kernel makes the mask itself
                return super().attend(q, k, v, allowed)
            mask = (1.0 - allowed.unsqueeze(1).float()) * -math.inf
            return (self.scores(q, self.shared(k)) + mask).softmax(-1) @ self.shared(v)

    return specimens.subject(attention=ZeroTimesInfinity)


class _NoKey(specimens.Attention):
    """A row of padding on the left sees no key."""

    def allowed(self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor) -> Tensor:
        causal = places.unsqueeze(2) >= key_places.unsqueeze(1)
        return causal & (key_segments > 0).unsqueeze(1)


@right_padding.plant("fully-masked-row", component="attention")
def _() -> Subject:
    return specimens.subject(attention=_NoKey)


@right_padding.plant(
    "alibi/attn-bias-nan", component="attention", what="a bias that subtracts the row's largest score"
)
def _() -> Subject:
    class Biased(_NoKey):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            k, v = self.shared(k), self.shared(v)
            back = torch.arange(k.shape[2]) - torch.arange(q.shape[2]).unsqueeze(1)
            bias = (0.1 * back).expand(allowed.shape).masked_fill(~allowed, -math.inf).unsqueeze(1)
            weights = (self.scores(q, k) + bias - bias.amax(-1, keepdim=True)).exp()
            return weights / weights.sum(-1, keepdim=True) @ v

    return specimens.subject(attention=Biased)


@right_padding.plant(
    "ffn-skipped-on-pad-flag", component="layers.0", what="taken out by the mask, put back in a row"
)
def _() -> Subject:
    class Skipping(specimens.model.Block):
        def forward(self, x: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
            x = x + self.attention(self.attention_norm(x), positions, segments, cache)
            real = (segments > 0).flatten()
            made = torch.zeros_like(x).flatten(0, 1)
            made[: int(real.sum())] = self.ffn(self.ffn_norm(x).flatten(0, 1)[real])
            return x + made.view_as(x)

    return specimens.subject(block=Skipping)


@right_padding.healthy("zeros at the padding")
def _() -> Subject:
    subject = specimens.subject()
    masked = subject.masked_forward
    assert masked is not None
    return subject.but(masked_forward=lambda tokens, keep: masked(tokens, keep) * keep.unsqueeze(-1))
