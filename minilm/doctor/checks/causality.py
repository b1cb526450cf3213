"""A position must not see the tokens after it.

Why: a model that sees its target has a loss that is too good to be true and writes garbage. No error is raised, and
the curve looks like success.

How: change one token; the logits before it must not move. In one row on a CPU in float32 healthy models give the
same bits, in eval mode and, with dropout off, in train mode (statistics over a batch or over time leak in train mode
only), with ordinary weights and with weights so large that a finite mask value would be overrun, without a mask, with
a padding mask and with segments: each is a code path of its own. The probe is two-sided: the change must move the
logits after it, else the probe itself saw nothing.

Cannot see: a leak beyond the length of the probe, or one that needs a second row.

Sources: K1 of the catalogue; transformers issues 48745 and 48748 (five classes that were not causal).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
    """Change token p: logits before p stay, logits from p on move; also through the paths with a mask or segments."""
    worst, reach, where, how = 0.0, 0.0, "", ""
    setups = _setups(subject)
    for std in dict.fromkeys(setup.std for setup in setups):
        with quiet(subject, redraw=std), torch.no_grad():
            tokens = tokens_for(subject, 1, LENGTH)
            if tokens.shape[1] < 3:
                raise NotApplicable(f"needs rows of at least 3 tokens, the subject takes {tokens.shape[1]}")
            for setup in (one for one in setups if one.std == std):
                if subject.module is not None:
                    subject.module.train(setup.train)
                leak, effect, place = _leak(subject, setup, tokens)
                worst, reach = max(worst, leak), max(reach, effect)
                if place and not how:
                    where, how = place, setup.name
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
        f"{seen} ({how})", worst, FLOAT32_NOISE, unit="logit std",
        bugs=_likely(where, how), component=where,
        advice="give attention a causal mask (is_causal=True, or a lower triangle; torch's sdpa wants True where a key "
        "is seen, nn.MultiheadAttention True where it is not) and take no statistics, pools or sums over positions",
    )  # fmt: skip


def _leak(subject: Subject, setup: _Setup, tokens: Tensor) -> tuple[float, float, str]:
    """(largest movement before the changed token, from it on, where it starts if it is one)."""
    worst, reach, where = 0.0, 0.0, ""
    length = tokens.shape[1]
    before = setup.run(tokens)
    for p in sorted({1, length // 2, length - 1} if setup.every else {length // 2}):
        changed = tokens.clone()
        changed[0, p] = other_token(subject, int(tokens[0, p]))
        after = setup.run(changed)
        leak = difference(before[:, :p], after[:, :p], scale=before)
        reach = max(reach, difference(before[:, p:], after[:, p:], scale=before))
        if leak > FLOAT32_NOISE and not where:
            where = _first_leak(subject, setup.run, tokens, changed, p) or setup.name
        worst = max(worst, leak)
    return worst, reach, where


@dataclass(frozen=True)
class _Setup:
    name: str
    train: bool
    std: float
    run: Callable[[Tensor], Tensor]
    every: bool = True  # each place of change, or only the middle


def _setups(subject: Subject) -> list[_Setup]:
    forward, masked, packed = subject.forward, subject.masked_forward, subject.packed_forward
    assert forward is not None
    setups = [_Setup("eval mode", False, 0.1, forward)]
    if subject.module is not None:
        setups += [
            _Setup("train mode", True, 0.1, forward),
            _Setup("eval mode, large weights", False, 1.0, forward, every=False),
        ]
    if masked is not None:
        setups.append(
            _Setup("with a padding mask", False, 0.1, lambda t: masked(t, _most_kept(t)), every=False)
        )
    if packed is not None:
        setups.append(
            _Setup("with segments", False, 0.1, lambda t: packed(t, torch.ones_like(t)), every=False)
        )
    return setups


def _most_kept(tokens: Tensor) -> Tensor:
    """[B, T]: the last quarter is padding, so that the mask is not one that a shortcut takes away."""
    length = tokens.shape[1]
    return (torch.arange(length, device=tokens.device) < length - length // 4).expand_as(tokens)


def _likely(where: str, how: str) -> list[str]:
    """The catalogue's causes, ordered by where it leaks and on which path."""
    masks = ["mask-missing", "mask-bool-inverted", "decoder-flag-ignored", "mask-additive-finite"]
    mixers = ["scan-axis-leak", "mem-future-retrieval", "norm-over-time", "pk-einsum-drops-n"]
    if how == "eval mode, large weights":
        masks.insert(0, "mask-additive-finite")
    if how.startswith("with "):
        masks.insert(0, "decoder-flag-ignored")
    name = where.lower()
    if "norm" in name or how == "train mode":
        mixers.insert(0, "norm-over-time")
    elif any(word in name for word in ("ffn", "mlp", "feed", "memory", "expert", "moe")):
        mixers.insert(0, "mem-future-retrieval")
    elif "att" in name and not any(word in name for word in ("linear", "scan", "chunk")):
        return list(dict.fromkeys(masks + mixers))
    return list(dict.fromkeys(mixers + masks))


def _first_leak(
    subject: Subject, run: Callable[[Tensor], Tensor], tokens: Tensor, changed: Tensor, p: int
) -> str:
    """The first module whose output moves before p."""

    def moved(a: Tensor, b: Tensor) -> bool:
        axis = next((i for i, n in enumerate(a.shape) if n == tokens.shape[1] and i > 0), None)
        return (
            axis is not None
            and difference(a.narrow(axis, 0, p), b.narrow(axis, 0, p), scale=a) > FLOAT32_NOISE
        )

    return culprit(subject.module, lambda: run(tokens), lambda: run(changed), moved)


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


@causality.plant("mask-bool-inverted", component="attention")
def _() -> Subject:
    class Inverted(specimens.Attention):
        def allowed(
            self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor
        ) -> Tensor:
            return ~super().allowed(places, key_places, segments, key_segments)

    return specimens.subject(attention=Inverted)


@causality.plant(
    "decoder-flag-ignored", component="attention", what="the mask of padding replaces the causal one"
)
def _() -> Subject:
    class Encoder(specimens.Attention):
        def allowed(
            self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor
        ) -> Tensor:
            if bool((key_segments > 0).all()):
                return super().allowed(places, key_places, segments, key_segments)
            return (key_segments > 0).unsqueeze(1).expand(-1, places.shape[1], -1)

    return specimens.subject(attention=Encoder)


class _Chunked(specimens.Attention):
    """Linear attention in chunks of 16: states of the chunks before, and a causal product within the chunk."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        length, size = q.shape[2], 16
        q, k, v = (self.in_chunks(x, length, size) for x in (q, self.shared(k), self.shared(v)))
        states = k.transpose(-1, -2) @ v  # [B, H, chunks, head_dim, head_dim]
        within = (q @ k.transpose(-1, -2)).tril() @ v
        return (q @ self.before(states) + within).flatten(2, 3)[:, :, :length] / 10

    def in_chunks(self, x: Tensor, length: int, size: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, -length % size)).unflatten(2, (-1, size))

    def before(self, states: Tensor) -> Tensor:
        return states.cumsum(2) - states


@causality.plant("scan-axis-leak", component="attention", what="a chunk's state includes the chunk itself")
def _() -> Subject:
    class Inclusive(_Chunked):
        def before(self, states: Tensor) -> Tensor:
            return states.cumsum(2)

    return specimens.subject(attention=Inclusive)


@causality.plant("scan-axis-leak", component="attention", what="summed along the wrong axis")
def _() -> Subject:
    class Axis(_Chunked):
        def before(self, states: Tensor) -> Tensor:
            return states.sum(2, keepdim=True) - states

    return specimens.subject(attention=Axis)


@causality.plant("mem-future-retrieval", component="ffn", what="one query for the whole sequence")
def _() -> Subject:
    class Memory(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x.mean(1, keepdim=True))

    return specimens.subject(ffn=Memory)


@causality.healthy("linear attention in chunks")
def _() -> Subject:
    return specimens.subject(attention=_Chunked)


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
