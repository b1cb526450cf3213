"""Documents that are packed into one row do not know of each other.

Why: packed rows are how pretraining batches are made. Where the border is lost, a document is predicted from the text
of strangers; where positions go on counting, or a recurrent state is carried over, it is not what evaluation and
generation will ask. The loss hardly shows it.

How: three documents in a row. Change a token of the first: the logits of the others must not move. Then each document
alone, in a row of its own: its logits must be the same as in the packed row. Where nothing leaks and yet the two
differ, it is the positions. Whether it is attention or a state that leaks is told by the module that it starts in.

Cannot see: a row whose segments are already wrong when they arrive (the data checks look at those).

Sources: transformers pull request 46634; torchtune pull request 875; trl pull request 6843; torchtitan pull
request 3984.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, culprit, difference, other_token, quiet, tokens_for
from minilm.doctor.subject import Subject

LENGTHS = (11, 16, 9)
MIXERS = ("scan", "mixer", "ssm", "mamba", "linear", "recurrent", "conv", "delta", "state", "rnn", "lru")


@check(
    group="model", needs=("packed_forward", "forward", "vocab_size"), cost="5 forwards", quick=True
)  # fmt: skip
def packing(subject: Subject) -> Finding:
    """Perturb document 1, documents 2 and 3 stay; each alone equals itself packed."""
    leak, apart, reach = _measure(subject, 0)
    if reach < 1e-3:
        raise NotApplicable("changing a token changed nothing in its own document: the probe saw nothing")
    if max(leak, apart) > FLOAT32_NOISE:  # a near-tie of a router may flip once, not twice
        again = _measure(subject, 1)
        if max(again[:2]) <= FLOAT32_NOISE:
            leak, apart = again[:2]
    if max(leak, apart) <= FLOAT32_NOISE:
        return passed(
            f"a change in document 1 moved the others by {leak:.1e} std; packed and alone differ by {apart:.1e} std",
            max(leak, apart), FLOAT32_NOISE, unit="logit std",
        )  # fmt: skip
    where = _where(subject, leak > FLOAT32_NOISE)
    state = any(word in where.lower() for word in MIXERS)
    if leak > FLOAT32_NOISE:
        likely = ["pack-cross-contam", "state-not-reset-at-doc"]
        return failed(
            f"a change in the first document moved the logits of the next ones by {leak:.1e} std",
            leak, FLOAT32_NOISE, unit="logit std", bugs=likely[::-1] if state else likely,
            component=where or "attention mask",
            advice="mask attention by document (block-diagonal, or cumulative lengths), and set recurrent and "
            "convolution states back at each border",
        )  # fmt: skip
    return failed(
        f"documents do not see each other, but packed and alone differ by {apart:.1e} std",
        apart, FLOAT32_NOISE, unit="logit std", bugs=["pack-pos-not-reset", "state-not-reset-at-doc"],
        component=where or "positions", advice="count positions from the start of each document",
    )  # fmt: skip


def _rows(subject: Subject, seed: int) -> tuple[Tensor, Tensor, list[slice], Tensor]:
    """tokens, segments [1, T], the documents' places, and tokens with another one in document 1."""
    tokens = tokens_for(subject, 1, sum(LENGTHS), seed)
    if tokens.shape[1] < sum(LENGTHS):
        raise NotApplicable(f"needs rows of {sum(LENGTHS)} tokens, the subject takes {tokens.shape[1]}")
    segments = torch.repeat_interleave(torch.arange(1, len(LENGTHS) + 1), torch.tensor(LENGTHS))[None]
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    changed = tokens.clone()
    place = LENGTHS[0] - 2
    changed[0, place] = other_token(subject, int(tokens[0, place]))
    return tokens, segments, [slice(e - n, e) for e, n in zip(ends, LENGTHS, strict=True)], changed


def _measure(subject: Subject, seed: int) -> tuple[float, float, float]:
    """(influence of document 1 on the others, packed against alone, influence within document 1), in logit std."""
    assert subject.packed_forward is not None and subject.forward is not None
    with quiet(subject, seed=seed), torch.no_grad():
        tokens, segments, places, changed = _rows(subject, seed)
        packed = subject.packed_forward(tokens, segments)
        after = subject.packed_forward(changed, segments)
        border = LENGTHS[0]
        leak = difference(packed[:, border:], after[:, border:], scale=packed)
        reach = difference(packed[:, :border], after[:, :border], scale=packed)
        alone = [subject.forward(tokens[:, place]) for place in places]
        apart = max(
            difference(packed[:, place], one, scale=packed) for place, one in zip(places, alone, strict=True)
        )
    return leak, apart, reach


def _where(subject: Subject, leaks: bool) -> str:
    assert subject.packed_forward is not None
    packed = subject.packed_forward
    border = LENGTHS[0]
    with quiet(subject), torch.no_grad():
        tokens, segments, places, changed = _rows(subject, 0)

        def document(x: Tensor, place: slice) -> Tensor | None:
            axis = next((i for i, n in enumerate(x.shape) if n == tokens.shape[1] and i > 0), None)
            return None if axis is None else x.narrow(axis, place.start, place.stop - place.start)

        def moved(a: Tensor, b: Tensor) -> bool:
            rest = slice(border, tokens.shape[1])
            one, two = document(a, rest), document(b, rest)
            return one is not None and two is not None and difference(one, two, scale=a) > FLOAT32_NOISE

        if leaks:
            return culprit(
                subject.module, lambda: packed(tokens, segments), lambda: packed(changed, segments), moved
            )
        place = places[1]
        own = place.stop - place.start
        first = torch.cat([tokens[:, place], tokens[:, :border], tokens[:, place.stop :]], dim=1)
        order = torch.cat([segments[:, place], segments[:, :border], segments[:, place.stop :]], dim=1)

        def elsewhere(a: Tensor, b: Tensor) -> bool:
            one, two = document(a, place), document(b, slice(0, own))
            return one is not None and two is not None and difference(one, two, scale=a) > FLOAT32_NOISE

        return culprit(
            subject.module, lambda: packed(tokens, segments), lambda: packed(first, order), elsewhere
        )


class _OneDocument(specimens.Attention):
    def allowed(self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor) -> Tensor:
        real = (key_segments > 0).unsqueeze(1)
        return (places.unsqueeze(2) >= key_places.unsqueeze(1)) & real | (
            places.unsqueeze(2) == key_places.unsqueeze(1)
        )


@packing.plant("pack-cross-contam", component="attention")
def _() -> Subject:
    return specimens.subject(attention=_OneDocument)


@packing.plant("pack-cross-contam", component="attention", what="only from one document to the next")
def _() -> Subject:
    class Neighbours(specimens.Attention):
        def allowed(
            self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor
        ) -> Tensor:
            near = (segments.unsqueeze(2) - key_segments.unsqueeze(1)).abs() <= 1
            return near & (places.unsqueeze(2) >= key_places.unsqueeze(1))

    return specimens.subject(attention=Neighbours)


class _Learnt(specimens.Attention):
    """Positions that are added instead of rotated: with rotated ones, only differences count."""

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
        return super().forward(x + (positions.unsqueeze(-1) / 10).sin(), positions, segments, cache)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x


@packing.plant("pack-pos-not-reset", component="layers.0.attention", what="learnt positions")
def _() -> Subject:
    class Running(specimens.model.Model):
        def positions(self, segments: Tensor) -> Tensor:
            return torch.arange(segments.shape[1]).expand_as(segments)

    return specimens.subject(model=Running, attention=_Learnt)


class _Smoothed(specimens.FeedForward):
    """A recurrent mixer: h' = h / 2 + x, along the row."""

    def forward(self, x: Tensor) -> Tensor:
        state, made = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1):
            state = state / 2 + step
            made.append(state)
        return super().forward(torch.stack(made, 1))


@packing.plant("state-not-reset-at-doc", component="ffn", what="a recurrent mixer")
def _() -> Subject:
    return specimens.subject(ffn=_Smoothed)


@packing.plant("state-not-reset-at-doc", component="ffn", what="a short convolution over the border")
def _() -> Subject:
    class Convolution(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])

    return specimens.subject(ffn=Convolution)


@packing.healthy("rotary positions that run on: only differences count")
def _() -> Subject:
    class Running(specimens.model.Model):
        def positions(self, segments: Tensor) -> Tensor:
            return torch.arange(segments.shape[1]).expand_as(segments)

    return specimens.subject(model=Running)


@packing.healthy("learnt positions, set back")
def _() -> Subject:
    return specimens.subject(attention=_Learnt)
