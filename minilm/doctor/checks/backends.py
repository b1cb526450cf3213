"""Another attention backend computes the same.

Why: eager, sdpa, flash and compiled code are written apart. One of them drops the mask, the logit cap, the window or
the bias, and which one runs depends on the machine.

How: the same tokens through each backend. With weights as large as differences show in (0.1), larger ones (0.3: exact
and approximated activations part there) and very large ones (1.0: a logit cap works only on large scores). Rounding is
amplified by saturated attention, so that the limit grows with the weights: 1e-4, 3e-4 and 3e-2 of the logits'
deviation; a quarter of the positions must be beyond it, since one near-tie of a router is no defect.

Cannot see: what two backends do wrong alike.

Sources: K8 of the catalogue (moshi and Doge, 3 to 4 deviations apart); transformers 4.42, logit cap of Gemma 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, culprit, quiet, tokens_for
from minilm.doctor.subject import Subject

LENGTH = 48
LIMITS = {0.1: FLOAT32_NOISE, 0.3: 3 * FLOAT32_NOISE, 1.0: 300 * FLOAT32_NOISE}  # std of the weights -> limit


@check(group="model", needs=("forward", "backends", "vocab_size"), cost="3 forwards for each backend")
def backends_agree(subject: Subject) -> Finding:
    """Each backend against the forward, at three sizes of weights."""
    assert subject.forward is not None
    found: dict[tuple[str, float], float] = {}
    for std, _limit in LIMITS.items() if subject.module is not None else [(0.1, FLOAT32_NOISE)]:
        with quiet(subject, redraw=std), torch.no_grad():
            tokens = tokens_for(subject, 2, LENGTH)
            plain = subject.forward(tokens)
            if not bool(torch.isfinite(plain).all()):
                if std == min(LIMITS):
                    raise NotApplicable("the logits are not finite")
                continue
            for name, forward in subject.backends.items():
                found[name, std] = _apart(plain, forward(tokens))
    worst, std = max(found, key=lambda key: found[key] / LIMITS[key[1]])
    measured, limit = found[worst, std], LIMITS[std]
    if measured <= limit:
        return passed(
            f"{', '.join(subject.backends)} agree: at most {measured:.1e} std, with weights of {std}",
            measured, limit, unit="logit std",
        )  # fmt: skip
    where = _where(subject, worst, std, limit)
    small = found.get((worst, 0.1), 0.0)
    likely = ["eager-sdpa-differ", "softcap-skipped", "gelu-variant"]
    if small <= FLOAT32_NOISE:
        likely = ["softcap-skipped", "gelu-variant", "eager-sdpa-differ"]
    if not any(word in where.lower() for word in ("att", "backend")):
        likely = ["gelu-variant", "eager-sdpa-differ", "softcap-skipped"]
    return failed(
        f"{worst} differs by {measured:.1e} std with weights of {std} (with weights of 0.1 by {small:.1e})",
        measured, limit, unit="logit std", bugs=likely, component=where,
        advice=f"compare what {worst} is given with what the other path uses: mask, window, scale, logit cap, bias, "
        "and the exact activation",
    )  # fmt: skip


def _apart(one: Tensor, other: Tensor) -> float:
    """The difference that a quarter of the positions reach, in std of the logits; inf where one is not finite."""
    if one.shape != other.shape or not bool(torch.isfinite(other).all()):
        return float("inf")
    per_position = (one.double() - other.double()).abs().amax(-1).flatten()
    return float(per_position.quantile(0.75)) / max(float(one.double().std()), 1e-12)


def _where(subject: Subject, name: str, std: float, limit: float) -> str:
    assert subject.forward is not None
    forward, other = subject.forward, subject.backends[name]
    with quiet(subject, redraw=std), torch.no_grad():
        tokens = tokens_for(subject, 2, LENGTH)

        def differ(a: Tensor, b: Tensor) -> bool:
            return a.dim() >= 2 and _apart(a, b) > limit

        found = culprit(subject.module, lambda: forward(tokens), lambda: other(tokens), differ)
    return found or f"attention backend {name}"


class _Fused(specimens.Attention):
    """With a second path through torch's kernel, chosen by a flag."""

    fused = False
    cap: float | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        if not self.fused:
            return super().attend(q, k, v, allowed)
        return self.kernel(q, self.shared(k), self.shared(v), allowed.unsqueeze(1))

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, allowed)


class _Capped(_Fused):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return 30 * torch.tanh(super().scores(q, k) / 30)


class _Gelu(specimens.FeedForward):
    fused = False

    def forward(self, x: Tensor) -> Tensor:
        way = "tanh" if self.fused else "none"
        return self.down(nn.functional.gelu(self.gate(x), approximate=way))


def _with_backend(subject: Subject) -> Subject:
    """The subject with a backend `fused`: the same with the flag of its parts set."""
    module, forward = subject.module, subject.forward
    assert module is not None and forward is not None
    parts = [part for part in module.modules() if hasattr(type(part), "fused")]

    def fused(tokens: Tensor) -> Tensor:
        for part in parts:
            part.fused = True
        try:
            return forward(tokens)
        finally:
            for part in parts:
                part.fused = False

    return subject.but(backends={"fused": fused})


@backends_agree.plant("eager-sdpa-differ", component="attention", what="the mask is dropped")
def _() -> Subject:
    class Dropped(_Fused):
        def kernel(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    return _with_backend(specimens.subject(attention=Dropped))


@backends_agree.plant("eager-sdpa-differ", component="attention", what="the window is dropped")
def _() -> Subject:
    class Wide(_Fused):
        def kernel(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _with_backend(specimens.subject(attention=Wide, size={"window": 8}))


@backends_agree.plant("softcap-skipped", component="attention")
def _() -> Subject:
    return _with_backend(specimens.subject(attention=_Capped))


@backends_agree.plant("gelu-variant", component="ffn", what="tanh approximation in the fused path")
def _() -> Subject:
    return _with_backend(specimens.subject(ffn=_Gelu))


@backends_agree.healthy("torch's fused kernel")
def _() -> Subject:
    return _with_backend(specimens.subject(attention=_Fused))
