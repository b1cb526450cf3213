"""A call leaves nothing behind for the next one.

Why: tables that are made on demand and kept (rotary frequencies of the longest row so far, a cache shared by layers
with other settings) make a result depend on what was asked before: evaluation after a long document differs from
evaluation before it.

How: f(a), then f of something longer, then f(a) again: the same bits, or nearly. The same with more rows. Then modules
without parameters (tables, rotary positions) are called on their own, with a length that nobody has asked for yet: the
result must be the beginning of what they returned within the model. A table that is kept by length alone, and that
another layer has filled, is found by that.

Cannot see: state that only a much longer row than the probe's changes.

Sources: transformers issue 25104 (dynamic NTK); OLMo-core 2.2.0 (one cache for all rotary settings).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, described, difference, quiet, tokens_for
from minilm.doctor.subject import Subject

SHORT, LONG = 20, 4096
UNASKED = 13  # a length that no other probe uses


@check(group="model", needs=("forward", "vocab_size"), cost="5 forwards, one of them long")
def statelessness(subject: Subject) -> Finding:
    """f(a), f(longer), f(a); tables alone against tables within the model."""
    assert subject.forward is not None
    forward = subject.forward
    with quiet(subject), torch.no_grad():
        tokens = tokens_for(subject, 1, SHORT)
        longer = tokens_for(subject, 1, min(LONG, 4 * (subject.max_length or 64)), seed=1)
        if longer.shape[1] <= tokens.shape[1]:
            raise NotApplicable("rows cannot be long enough to leave something behind")
        alone = _tables_alone(subject, tokens)
        before = forward(tokens)
        forward(longer)
        after = forward(tokens)
        forward(tokens_for(subject, 3, tokens.shape[1] + 3, seed=2))
        last = forward(tokens)
        worst = max(difference(before, after), difference(before, last))
        if worst > FLOAT32_NOISE:
            where = _where(subject, tokens, before, last)
            return failed(
                f"the same tokens give logits that differ by {worst:.1e} std after other calls",
                worst, FLOAT32_NOISE, unit="logit std", bugs=["rope-state-leak", "rope-cache-shared"], component=where,
                advice="compute tables from the call's own arguments, or keep them by everything that they depend on",
            )  # fmt: skip
    name, off = alone
    if off > 1e-4:
        assert subject.module is not None
        return failed(
            f"{described(subject.module, name)} returns something else on its own than within the model ({off:.1e})",
            off, 1e-4, unit="largest difference", bugs=["rope-cache-shared", "rope-state-leak"],
            component=described(subject.module, name),
            advice="a cache that several modules share must be kept by all of their settings, not by length alone",
        )  # fmt: skip
    return passed(f"the same tokens give logits within {worst:.1e} std after longer and wider calls",
                  worst, FLOAT32_NOISE, unit="logit std")  # fmt: skip


def _where(subject: Subject, tokens: Tensor, before: Tensor, last: Tensor) -> str:
    """The first module that answers otherwise after a longer call, if the model can be set back by drawing it anew."""
    if subject.build is None or subject.module is None:
        return "rotary tables, or another state that is kept between calls"
    fresh = subject.build(0)
    if fresh.module is None or fresh.forward is None:
        return "rotary tables, or another state that is kept between calls"
    again = fresh.forward

    def long_then_short() -> None:
        again(tokens_for(subject, 1, min(LONG, 4 * (subject.max_length or 64)), seed=1))

    def differ(a: Tensor, b: Tensor) -> bool:
        return difference(a, b) > FLOAT32_NOISE

    with quiet(fresh), torch.no_grad():
        from minilm.doctor.probes import record

        first = record(fresh.module, lambda: again(tokens))
        long_then_short()
        second = record(fresh.module, lambda: again(tokens))
    for (name, given, made), (_, given_again, made_again) in zip(first, second, strict=False):
        same = (
            given is None
            or given_again is None
            or given.shape != given_again.shape
            or not differ(given, given_again)
        )
        if made.shape == made_again.shape and made.is_floating_point() and same and differ(made, made_again):
            return described(fresh.module, name)
    return "rotary tables, or another state that is kept between calls"


def _tables_alone(subject: Subject, tokens: Tensor) -> tuple[str, float]:
    """(module without parameters, largest difference between it alone on a shorter row and within the model)."""
    if subject.module is None or subject.forward is None or tokens.shape[1] <= UNASKED:
        return "", 0.0
    calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any], Tensor]] = []
    length = tokens.shape[1]

    def keep(name: str) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [*args, *kwargs.values()]
            made = output[0] if isinstance(output, tuple) else output
            if given and all(_has_one(value, length) for value in [*given, made]):
                calls.append((name, part, args, kwargs, made.clone()))

        return hook

    bare = [(n, m) for n, m in subject.module.named_modules() if n and not list(m.parameters())]
    handles = [
        m.register_forward_hook(keep(n), with_kwargs=True)
        for n, m in bare
        if not isinstance(m, nn.ModuleList)
    ]
    try:
        subject.forward(tokens)
    finally:
        for handle in handles:
            handle.remove()
    worst = ("", 0.0)
    for name, part, args, kwargs, made in calls[
        ::-1
    ]:  # the last layer first: the first one filled what is shared
        again = part(
            *(_shortened(a, length) for a in args), **{k: _shortened(v, length) for k, v in kwargs.items()}
        )
        again = again[0] if isinstance(again, tuple) else again
        expected = _shortened(made, length)
        if again.shape == expected.shape and again.is_floating_point():
            off = float((again.double() - expected.double()).abs().max())
            worst = max(worst, (name, off), key=lambda one: one[1])
    return worst


def _has_one(value: Any, length: int) -> bool:
    """Is it a tensor with exactly one axis of that length."""
    return isinstance(value, Tensor) and list(value.shape).count(length) == 1


def _shortened(x: Tensor, length: int) -> Tensor:
    return x.narrow(list(x.shape).index(length), 0, UNASKED)


class _Dynamic(specimens.Rotary):
    """The base grows with the longest row so far."""

    def __init__(self, size: specimens.model.Size) -> None:
        super().__init__(size)
        self.longest = 32

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        self.longest = self.stretched_to(x.shape[2])
        kept, self.table = self.table, self.table * 32 / self.longest
        try:
            return super().forward(x, positions)
        finally:
            self.table = kept

    def stretched_to(self, length: int) -> int:
        return max(self.longest, length)


@statelessness.plant("rope-state-leak", component="rotary")
def _() -> Subject:
    return specimens.subject(rotary=_Dynamic)


def _two_bases(shared: bool) -> Subject:
    """Layers with bases of their own, and tables that are kept."""
    kept: dict[Any, Tensor] = {}

    class Cached(nn.Module):
        def __init__(self, theta: float) -> None:
            super().__init__()
            self.theta = theta

        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            half, key = x.shape[-1] // 2, positions.shape[1] if shared else (positions.shape[1], self.theta)
            if key not in kept:
                kept[key] = positions[0, :, None] * self.theta ** (-torch.arange(half) / half)
            sine, cosine = kept[key].sin(), kept[key].cos()
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    subject = specimens.subject()
    for theta, layer in zip((10_000.0, 100.0), subject.module.layers, strict=True):  # type: ignore[union-attr]
        layer.attention.rotary = Cached(theta)
    return subject


@statelessness.plant("rope-cache-shared", component="layers.1.attention.rotary", what="kept by length alone")
def _() -> Subject:
    return _two_bases(shared=True)


@statelessness.healthy("tables kept by length and base")
def _() -> Subject:
    return _two_bases(shared=False)


@statelessness.healthy("a base that depends on the length of the call alone")
def _() -> Subject:
    class Own(_Dynamic):
        def stretched_to(self, length: int) -> int:
            return max(32, length)

    return specimens.subject(rotary=Own)
