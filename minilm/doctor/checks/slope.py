"""What autograd says of a parameter is the slope of the function that the model computes.

Why: a detach that is left in one branch, a mean taken under no_grad, a backward written by hand: the forward pass is
exact, every parameter gets a gradient, and it is not the derivative. Parameters before the cut learn from a part of
the model alone.

How: the logits, weighted at random, in float64 and train mode without dropout. For each tensor of parameters and three
random directions, autograd's slope against central differences with two step sizes; what the two disagree by is the
noise, and an error counts if it is ten times that and 2% of the slope (healthy models: below 2e-3, as parts of them
stay in float32), or 5% where a model cannot be run in float64. A failure is measured again in other directions. Then
each module on its own: the innermost whose slope is wrong, in its input or its own parameters, is named.

Cannot see: what is rounded or chosen (top-k) with a gradient of its own: straight-through estimators are not accused
where the function stands still, and are to be declared (exceptions) where they are mixed with the rest; errors below
2% of a slope; dropout; a wrong gradient of the loss itself (loss_gradient sees that).

Sources: Karpathy, A Recipe for Training Neural Networks; torch.autograd.gradcheck; rows 96 and 171 of the catalogue.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.blocks import blocks
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import described, quiet, tokens_for
from minilm.doctor.slopes import ITS_INPUT, Slope, fixed_rows, slopes, slopes_alone
from minilm.doctor.subject import Subject

LENGTH = 12
LEAST = {torch.float64: 0.02, torch.float32: 0.05}
MOST_SECONDS = 10.0  # for the differences, or one tensor; the first of each role come first
SCORES = re.compile(r"quer|key|router|score|select", re.IGNORECASE)
BLOCK_NUMBER = re.compile(r"\.\d+\.")


@check(
    group="model",
    needs=("module", "forward", "vocab_size"),
    cost="12 to 24 forwards per tensor, for 10 s at most",
)
def slope(subject: Subject) -> Finding:
    """Autograd against differences, tensor by tensor."""
    module = subject.module
    assert module is not None
    if not any(p.requires_grad and p.is_floating_point() for p in module.parameters()):
        raise NotApplicable("nothing in it is trainable")
    with quiet(subject, train=True):
        dtype, value = _function(subject, module)
        chosen = _chosen(module)
        least = LEAST[dtype]
        rest = {"over": list(module.parameters()), "fixed": fixed_rows(module)}
        found = slopes(value, chosen, seconds=MOST_SECONDS, **rest)
        wrong = [s for s in found if s.is_wrong(least)]
        if wrong:  # chance is ruled out by other directions
            again = slopes(
                value, {s.name: chosen[s.name] for s in wrong}, seed=1, seconds=MOST_SECONDS / 2, **rest
            )
            sure = {s.name for s in again if s.is_wrong(least)}
            wrong = [s for s in wrong if s.name in sure]
        if wrong:
            return _failed(subject, wrong, len(found), least)
    judged = [s for s in found if s.is_judged(least)]
    if not judged:
        raise NotApplicable(
            "differences of its logits are too noisy: they jump, or are rounded, or stand still"
        )
    worst = max(judged, key=lambda s: s.error / s.limit(least))
    untold = len(found) - len(judged)
    return passed(
        f"slopes of {len(judged)} of {len(chosen)} tensors are those of autograd within {worst.error:.1e} "
        f"({worst.name}, {str(dtype).removeprefix('torch.')})" + (f"; {untold} are too noisy to say" if untold else ""),
        worst.error, worst.limit(least), unit="of the slope",
    )  # fmt: skip


def _function(subject: Subject, module: nn.Module) -> tuple[torch.dtype, Callable[[], Tensor]]:
    """(its dtype, the scalar): logits weighted at random, in float64 where the model can."""
    assert subject.forward is not None
    forward, tokens = subject.forward, tokens_for(subject, 2, LENGTH, seed=6)

    def value() -> Tensor:
        logits = forward(tokens)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return (logits.double().log_softmax(-1) * weights.to(logits.device)).mean()

    module.double()
    try:
        with torch.enable_grad():
            value().backward()
        return torch.float64, value
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # parts that insist on float32
        module.float()
        return torch.float32, value


def _chosen(module: nn.Module) -> dict[str, Tensor]:
    """Trainable tensors in the order in which to look: one of each role of the first blocks, then all others."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad and p.is_floating_point()}
    roles: dict[str, str] = {}
    for name in named:
        roles.setdefault(BLOCK_NUMBER.sub(".*.", name), name)
    return {name: named[name] for name in dict.fromkeys([*roles.values(), *named])}


def _failed(subject: Subject, wrong: list[Slope], count: int, least: float) -> Finding:
    assert subject.module is not None
    worst = max(wrong, key=lambda s: s.error)
    place, inside, right = _innermost(subject, least)
    names = ", ".join(s.name for s in wrong[:4])
    component = place or f"after {described(subject.module, wrong[-1].name.rpartition('.')[0])}"
    bugs = ["frozen-by-accident", "mem-topk-detached"]
    # What is chosen from learns rightly, and what chooses does not.
    if right and any(SCORES.search(name) for name in inside) and "attention" not in place.lower():
        bugs.reverse()
    return failed(
        f"the gradient of {len(wrong)} of {count} tensors is not the derivative: {names}; {worst.name} is off by "
        f"{worst.error:.2g} of its slope", worst.error, worst.limit(least), unit="of the slope", bugs=bugs,
        component=component, advice="look there for detach(), .data, .item() or no_grad() in one branch of several, "
        "and for a backward that is written by hand; a gradient that is meant to be another one is to be declared",
        details={"wrong": [s.name for s in wrong]},
    )  # fmt: skip


def _innermost(subject: Subject, least: float) -> tuple[str, list[str], list[str]]:
    """(where, parameters in it that are wrong, that are right): the first module, in the order in which they end, whose
    output has another slope than autograd says."""
    module = subject.module
    assert module is not None and subject.forward is not None
    calls: dict[str, tuple[nn.Module, Any, Any]] = {}

    def keep(name: str) -> Any:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if name and name not in calls:
                calls[name] = (part, args, kwargs)

        return hook

    handles = [m.register_forward_hook(keep(n), with_kwargs=True) for n, m in module.named_modules()]
    try:
        with torch.no_grad():
            subject.forward(tokens_for(subject, 2, LENGTH, seed=6))
    finally:
        for handle in handles:
            handle.remove()
    deadline = time.monotonic() + MOST_SECONDS
    for block, _ in blocks(module):  # first which block, by its input alone; then what in it
        if block in calls and any(
            s.is_wrong(least) for s in slopes_alone(*calls[block], seconds=MOST_SECONDS / 5, parameters=False)
        ):
            calls = {n: call for n, call in calls.items() if n == block or n.startswith(f"{block}.")}
            break
    for name, (part, args, kwargs) in calls.items():
        if time.monotonic() > deadline:
            break
        found = slopes_alone(part, args, kwargs, seconds=MOST_SECONDS / 5)
        if wrong := [s.name for s in found if s.is_wrong(least)]:
            right = [s.name for s in found if s.name not in wrong and s.name != ITS_INPUT]
            return described(module, name), wrong, right
    return "", [], []


# ---------------------------------------------------------------- planted


@slope.plant(
    "frozen-by-accident", component="layers.1 (", what="the input of the last attention branch is detached"
)
def _() -> Subject:
    class Cut(specimens.model.Block):
        is_last = False

        def forward(self, x: Tensor, *how: Any) -> Tensor:
            seen = x.detach() if self.is_last else x
            x = x + self.dropout(self.attention(self.attention_norm(seen), *how))
            return x + self.dropout(self.ffn(self.ffn_norm(x)))

    subject = specimens.subject(block=Cut)
    subject.module.layers[-1].is_last = True  # type: ignore[union-attr, index]
    return subject


@slope.plant(
    "frozen-by-accident", component="attention", what="attention's scores are detached in part: by the keys"
)
def _() -> Subject:
    class Cut(specimens.Attention):
        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            half = k.shape[2] // 2
            return super().scores(q, torch.cat([k[:, :, :half].detach(), k[:, :, half:]], dim=2))

    return specimens.subject(attention=Cut)


@slope.plant("frozen-by-accident", component="norm", what="a norm's divisor is taken under no_grad")
def _() -> Subject:
    class Cut(specimens.Norm):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                divisor = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            return x * divisor * self.weight

    return specimens.subject(norm=Cut)


class _Silu(torch.autograd.Function):
    """With a backward by hand that forgets a term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return nn.functional.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.sigmoid()


@slope.plant("frozen-by-accident", component="ffn", what="a backward by hand forgets a term")
def _() -> Subject:
    class Cut(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(_Silu.apply(self.gate(x)) * self.up(x))

    return specimens.subject(ffn=Cut)


class _Memory(nn.Module):
    """Sixteen entries, the best four by a query's scores, weighted by them and by a gate of the query."""

    def __init__(self, size: specimens.model.Size) -> None:
        super().__init__()
        self.query = nn.Linear(size.dim, size.dim, bias=False)
        self.keys = nn.Parameter(torch.randn(16, size.dim) * 0.02)
        self.values = nn.Parameter(torch.randn(16, size.dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        scores, chosen = (query @ self.keys.T).topk(4)
        weights = self.weighted(scores).unsqueeze(-1)
        return (weights * self.values[chosen]).sum(-2) * query.mean(-1, keepdim=True).sigmoid()

    def weighted(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


@slope.plant("mem-topk-detached", component="ffn", what="scores detached; the query is also a gate")
def _() -> Subject:
    class Cut(_Memory):
        def weighted(self, scores: Tensor) -> Tensor:
            return scores.detach().softmax(-1)

    return specimens.subject(ffn=Cut)


# ---------------------------------------------------------------- healthy


@slope.healthy("a memory that chooses by top-k")
def _() -> Subject:
    return specimens.subject(ffn=_Memory)


@slope.healthy("an embedding whose padding row is used, and learns nothing")
def _() -> Subject:
    class Padded(specimens.model.Model):
        def initialise(self) -> None:
            self.shapes = nn.Embedding(4, self.size.dim, padding_idx=0)
            super().initialise()

        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens) + self.shapes(tokens % 4)

    return specimens.subject(model=Padded)


@slope.healthy("a mixture of experts, tied, with dropout")
def _() -> Subject:
    from minilm.doctor.specimens.mixture import Mixture

    return specimens.subject(ffn=Mixture, size={"tied": True, "dropout": 0.2})


@slope.healthy("blocks that are computed again in backward")
def _() -> Subject:
    class Again(specimens.model.Block):
        def forward(self, x: Tensor, *how: Any) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, *how, use_reentrant=False)

    return specimens.subject(block=Again)


@slope.healthy("ReLU, and a scale that stands in float32")
def _() -> Subject:
    class Kinked(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return self.down((self.gate(x).relu().square().float() * self.up(x).float()).to(x.dtype))

    return specimens.subject(ffn=Kinked)


@slope.healthy("weights rounded to three values, with a gradient straight through")
def _() -> Subject:
    class Ternary(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.down.weight
            scale = weight.detach().abs().mean()
            rounded = (weight / scale).round().clamp(-1, 1) * scale
            hidden = nn.functional.silu(self.gate(x)) * self.up(x)
            return nn.functional.linear(hidden, weight + (rounded - weight).detach())

    return specimens.subject(ffn=Ternary)


@slope.healthy("a model that insists on float32")
def _() -> Subject:
    class Strict(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("expected scalar type Float but found Double")
            return super().forward(x)

    return specimens.subject(ffn=Strict)
