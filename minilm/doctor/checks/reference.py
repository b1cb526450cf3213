"""The logits are those of an independent implementation with the same weights.

Why: some mistakes leave a consistent model: rotary pairs in another order, another base, heads that share other keys,
a missing scale, a norm that forgets its one. It trains; but converted weights give nonsense, and a claim to be "the
same architecture" is wrong.

How: logits against `reference`, which computes from the same weights (and is watched to follow when they are drawn
anew: at a usual initialisation such differences hide). The place is found by zeroing: the matrices of one role in
every block at a time. Where the difference goes away, the role takes part in it. If queries and keys do, it is the
scores (queries divided by a power of the square root of two tell whether it is only their scale); if only the
feed-forward's do, its activation; if the blocks together do and no single role does, the scale of the embedding;
otherwise a norm.

Cannot see: what the reference does wrong in the same way.

Sources: llm-foundry issue 756; litgpt issue 1193; rows 65, 66 and 80 to 85 of the catalogue; Unsloth's Gemma fixes.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.blocks import blocks
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, difference, quiet, redraw_weights, tokens_for
from minilm.doctor.subject import Subject

LENGTH = 32
STD, WIDTH = (
    0.2,
    32,
)  # of redrawn weights, and up to which width: wider, sums of as many terms would grow with it
QUERY = re.compile(r"(^|[._])(q|wq|q_proj|query|q_b_proj|to_q)\.weight$", re.IGNORECASE)

ADVICE = {
    "scores": "compare scale, rotary layout (halves or pairs), base and the assignment of key heads with the reference",
    "values": "each key/value head serves a run of query heads: repeat_interleave, not repeat",
    "feed-forward": "compare the activation: exact GELU and its tanh approximation are two functions",
    "embedding": "compare what the embedding is multiplied by before the first block",
    "norm": "compare the norm's weight: w or 1 + w, and its epsilon",
}


@check(
    group="model", needs=("forward", "reference", "vocab_size"), cost="2 forwards; on failure 2 for each role"
)
def reference_agrees(subject: Subject) -> Finding:
    """Golden logits, and the role in whose absence the two agree."""
    assert subject.forward is not None and subject.reference is not None
    std = _std(subject.module) if subject.module is not None and _follows(subject) else None
    with quiet(subject, redraw=std), torch.no_grad():
        tokens = tokens_for(subject, 2, LENGTH)
        mine, theirs = subject.forward(tokens), subject.reference(tokens)
        worst = difference(mine, theirs)
        own = "its own weights" if std is None else f"weights of {std:.2g}"
        if worst <= FLOAT32_NOISE:
            return passed(f"differs from the reference by {worst:.1e} std, with {own}",
                          worst, FLOAT32_NOISE, unit="logit std")  # fmt: skip
        place, roles = _place(subject, tokens) if std is not None else ("unknown", [])
        off = (mine.double() - theirs.double()).abs().amax((0, 2)) / mine.double().std()
        factor = _factor(subject, tokens, theirs) if place == "scores" else None
    said = f"differs from the reference by {worst:.1e} std, with {own}; at the first position by {float(off[0]):.1e}"
    if factor is not None:
        said += f"; its scores are {factor:.4g} times the reference's"
    rotary = ["rope-interleave", "rope-wrong-base"]
    likely = {
        "scores": [*rotary, "gqa-head-order", "scale-missing"]
        if factor is None
        else ["scale-missing", "gqa-head-order", *rotary],
        "values": ["gqa-head-order"],
        "feed-forward": ["gelu-variant"],
        "embedding": ["embed-scale"],
        "norm": ["norm-plus-one", "norm-eps-dtype", "embed-scale"],
    }.get(place, ["rope-interleave", "rope-wrong-base", "scale-missing", "gqa-head-order", "gelu-variant",
                  "norm-plus-one", "embed-scale"])  # fmt: skip
    return failed(
        said, worst, FLOAT32_NOISE, unit="logit std", bugs=likely,
        component=_common(roles) + f"({place})" if roles else place,
        advice=ADVICE.get(place, "compare the two module by module, from the embedding upwards"),
    )  # fmt: skip


def _std(module: nn.Module) -> float:
    """So that activations are about as large at any width: rounding is amplified by sharp attention."""
    widths = [p.shape[-1] for p in module.parameters() if p.dim() == 2]
    return STD * min(1.0, math.sqrt(WIDTH / statistics.median(widths))) if widths else STD


def _follows(subject: Subject) -> bool:
    """Does the reference compute from the subject's weights, whatever they are."""
    assert subject.reference is not None and subject.module is not None
    with quiet(subject, redraw=None), torch.no_grad():
        tokens = tokens_for(subject, 1, 8)
        before = subject.reference(tokens).clone()
        redraw_weights(subject.module, STD, seed=3)
        return not torch.equal(before, subject.reference(tokens))


def _place(subject: Subject, tokens: Tensor) -> tuple[str, list[str]]:
    """(scores, values, feed-forward, embedding or norm; the roles that take part)."""
    assert subject.module is not None
    inner = {name for name, _ in blocks(subject.module)}
    roles: dict[str, list[nn.Parameter]] = {}
    for name, parameter in subject.module.named_parameters():
        block = next((b for b in inner if name.startswith(f"{b}.")), None)
        if block is not None and parameter.dim() >= 2:
            role = re.sub(r"\.(weight|bias)$", "", name[len(block) + 1 :])
            roles.setdefault(role, []).append(parameter)
    healing = [
        role for role, weights in roles.items() if _apart_without(subject, tokens, weights) <= FLOAT32_NOISE
    ]
    if healing:
        attention = [r for r in healing if re.search(r"att|qkv|mixer", r, re.IGNORECASE)]
        if not attention:
            return "feed-forward", healing
        names = " ".join(r.rsplit(".", 1)[-1].lower() for r in attention)
        scores = re.search(r"\bq|query|wq|qkv|c_attn|\bk|key|wk", names)
        return ("scores" if scores else "values"), attention
    every = [p for weights in roles.values() for p in weights]
    if every and _apart_without(subject, tokens, every) <= FLOAT32_NOISE:
        return "embedding", []
    return "norm", []


def _common(roles: list[str]) -> str:
    """`attention ` of attention.q and attention.out; nothing where they have no part in common."""
    parts = [role.split(".")[:-1] or [role] for role in roles]
    shared = [one[0] for one in zip(*parts, strict=False) if len(set(one)) == 1]
    return ".".join(shared) + " " if shared else ""


def _factor(subject: Subject, tokens: Tensor, theirs: Tensor) -> float | None:
    """By what the scores are too large, if that is all that is wrong: queries divided by it agree."""
    assert subject.module is not None and subject.forward is not None
    queries = [p for n, p in subject.module.named_parameters() if p.dim() >= 2 and QUERY.search(n)]
    kept = [q.detach().clone() for q in queries]
    try:
        for power in (*range(-10, 0), *range(1, 11)):
            for query, value in zip(queries, kept, strict=True):
                query.copy_(value / 2 ** (power / 2))
            if difference(subject.forward(tokens), theirs) <= 10 * FLOAT32_NOISE:
                return 2 ** (power / 2)
    finally:
        for query, value in zip(queries, kept, strict=True):
            query.copy_(value)
    return None


def _apart_without(subject: Subject, tokens: Tensor, weights: list[nn.Parameter]) -> float:
    """The difference from the reference with these weights at zero."""
    assert subject.forward is not None and subject.reference is not None
    kept = [w.detach().clone() for w in weights]
    try:
        for weight in weights:
            weight.zero_()
        return difference(subject.forward(tokens), subject.reference(tokens))
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)


def _against_healthy(subject: Subject, **healthy: Any) -> Subject:
    """A subject whose reference is the healthy specimen, loaded with the subject's weights at each call."""
    module = subject.module
    assert isinstance(module, specimens.Model)
    plain = specimens.Model(module.size, **healthy)

    def reference(tokens: Tensor) -> Tensor:
        plain.load_state_dict(module.state_dict())
        return plain.eval()(tokens)

    return subject.but(reference=reference)


@reference_agrees.plant("rope-interleave", component="attention")
def _() -> Subject:
    class Pairs(specimens.Rotary):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            halves = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
            turned = super().forward(halves, positions).unflatten(-1, (2, -1))
            return turned.transpose(-1, -2).flatten(-2)

    return _against_healthy(specimens.subject(rotary=Pairs))


@reference_agrees.plant("rope-wrong-base", component="attention")
def _() -> Subject:
    class Base(specimens.Rotary):
        def angles(self, size: specimens.model.Size) -> Tensor:
            return torch.outer(torch.arange(size.max_length), 500_000.0 ** (-torch.arange(0, 8, 2) / 8))

    return _against_healthy(specimens.subject(rotary=Base))


@reference_agrees.plant("gqa-head-order", component="attention", what="of keys and values")
def _() -> Subject:
    class Repeated(specimens.Attention):
        def shared(self, x: Tensor) -> Tensor:
            return x.repeat(1, self.size.num_heads // self.size.num_kv_heads, 1, 1)

    return _against_healthy(specimens.subject(attention=Repeated))


@reference_agrees.plant("scale-missing", component="attention")
def _() -> Subject:
    class Unscaled(specimens.Attention):
        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            return q @ k.transpose(2, 3)

    return _against_healthy(specimens.subject(attention=Unscaled))


class _PlusOne(specimens.Norm):
    """Gemma's convention: the weight is what is added to one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x) / self.weight


@reference_agrees.plant("norm-plus-one", component="norm")
def _() -> Subject:
    return _against_healthy(specimens.subject(), norm=_PlusOne)


class _Gelu(specimens.FeedForward):
    way = "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.gate(x), approximate=self.way))


class _TanhGelu(_Gelu):
    way = "tanh"


@reference_agrees.plant("gelu-variant", component="ffn")
def _() -> Subject:
    return _against_healthy(specimens.subject(ffn=_TanhGelu), ffn=_Gelu)


@reference_agrees.plant("embed-scale", component="embedding")
def _() -> Subject:
    class Scaled(specimens.model.Model):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens) * math.sqrt(self.size.dim)

    return _against_healthy(specimens.subject(model=Scaled))


@reference_agrees.healthy("another way to write the same")
def _() -> Subject:
    class Kernel(specimens.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            attend: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention
            return attend(q, self.shared(k), self.shared(v), allowed.unsqueeze(1))

    return _against_healthy(specimens.subject(attention=Kernel))
