"""The balance loss of a mixture must be low when experts share the work, high when one takes all, layer by layer.

Why: it is a number that nobody looks at. A mean over the wrong axis makes it constant; a mean over layers hides that
each layer has collapsed; padding steers it; without a gradient to the router it is decoration.

How: logits are made up for which the truth is known. The definition: for each layer the number of experts times the sum
over experts of (share of the choices) x (mean probability), over the kept tokens of a row, up to a factor. Whether a
loss is taken row by row or over everything does not matter here, as all tokens are one row. Collapsed must cost more
than balanced; layers that each collapse onto another expert must cost as much as layers that collapse onto the same;
tokens that are not kept must not matter; twice the same tokens must cost the same; a step down its gradient must lower
the largest share.

Cannot see: whether its weight is large enough to keep a real router balanced.

Sources: transformers issues 28255, 28505, 31464 (concatenated layers) and 44242; Fedus et al., Switch Transformers,
2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.specimens.mixture import EXPERTS, TOP, Balance, mixture_subject
from minilm.doctor.subject import Subject
from minilm.doctor.views import RouterView

TOKENS, LAYERS = 64, 2
LEAST_CONTRAST = 1.2  # collapsed over balanced; Switch's form with top 2 of 4 gives 2
SAME = 1e-4  # relative; float32 rounding of these sums is below 1e-6


@check(group="memory", needs=("router", "router.balance"), cost="8 small losses", quick=True)
def balance(subject: Subject) -> Finding:
    """Known cases of the auxiliary loss."""
    view: RouterView = subject.router
    assert view.balance is not None
    keep = torch.ones(TOKENS, dtype=torch.bool)
    even, one = _even(view), _onto(view, 0)
    low, high = float(view.balance([even] * LAYERS, keep)), float(view.balance([one] * LAYERS, keep))
    contrast = high / low if low else 0.0
    if contrast < LEAST_CONTRAST:
        return failed(
            f"experts that share the work cost {low:.4g}, one expert for all {high:.4g}",
            contrast, LEAST_CONTRAST, unit="collapsed / balanced", bugs=["aux-loss-constant"],
            component="balance loss", advice="mean over tokens of probabilities and of choices, for each expert, then "
            "the sum over experts of their product",
        )  # fmt: skip
    apart = float(view.balance([_onto(view, n % view.num_experts) for n in range(LAYERS)], keep))
    for measured, wanted, what, bug, where, advice in (
        (apart, high, "layers that collapse onto different experts", "aux-loss-across-layers",
         "balance loss over layers", "compute it layer by layer, then add up"),
        (*_with_padding(view, even), "the same tokens with others that are not kept", "aux-counts-pads",
         "balance loss over tokens", "leave tokens out that are not kept"),
        (*_twice(view, even), "the same tokens twice", "aux-loss-constant",
         "balance loss over tokens", "divide by the number of tokens"),
    ):  # fmt: skip
        error = abs(measured - wanted) / abs(wanted)
        if error > SAME:
            return failed(f"{what} cost {measured:.4g} instead of {wanted:.4g}", error, SAME, unit="relative",
                          bugs=[bug], component=where, advice=advice)  # fmt: skip
    if finding := _descends(view, keep):
        return finding
    return passed(
        f"balanced {low:.4g}, collapsed {high:.4g}", contrast, LEAST_CONTRAST, unit="collapsed / balanced"
    )


def _even(view: RouterView) -> Tensor:
    """Logits by which tokens go to all experts alike."""
    logits = torch.zeros(TOKENS, view.num_experts)
    for token in range(TOKENS):
        logits[token, token % view.num_experts] = 4.0
        logits[token, (token + 1) % view.num_experts] = 3.0
    return logits


def _onto(view: RouterView, expert: int) -> Tensor:
    """Logits by which all tokens go to one expert, and to the one after it."""
    logits = torch.zeros(TOKENS, view.num_experts)
    logits[:, expert], logits[:, (expert + 1) % view.num_experts] = 8.0, 4.0
    return logits


def _with_padding(view: RouterView, even: Tensor) -> tuple[float, float]:
    assert view.balance is not None
    more = torch.cat([even, _onto(view, 0)])
    keep = torch.arange(len(more)) < TOKENS
    return float(view.balance([more] * LAYERS, keep)), float(view.balance([even] * LAYERS, keep[:TOKENS]))


def _twice(view: RouterView, even: Tensor) -> tuple[float, float]:
    assert view.balance is not None
    keep = torch.ones(2 * TOKENS, dtype=torch.bool)
    double = view.balance([torch.cat([even, even])] * LAYERS, keep)
    return float(double), float(view.balance([even] * LAYERS, keep[:TOKENS]))


def _descends(view: RouterView, keep: Tensor) -> Finding | None:
    assert view.balance is not None
    with torch.enable_grad():
        logits = torch.zeros(TOKENS, view.num_experts)
        logits[:, 0], logits[:, 1] = 1.0, 0.5
        logits.requires_grad_()
        loss = view.balance([logits], keep)
        found = torch.autograd.grad(loss, logits, allow_unused=True)[0] if loss.requires_grad else None
    before = logits.detach().softmax(-1).mean(0).max()
    after = before if found is None else (logits.detach() - 50 * found).softmax(-1).mean(0).max()
    if after < before:
        return None
    return failed(
        f"a step down its gradient moves the largest share from {before:.3f} to {after:.3f}",
        float(after - before), 0.0, unit="share", bugs=["aux-loss-constant"], component="balance loss: gradient",
        advice="keep the graph of the probabilities; only the counts of choices have none",
    )  # fmt: skip


@balance.plant("aux-loss-constant", component="balance loss", what="mean over the experts' axis")
def _() -> Subject:
    class WrongAxis(Balance):
        def layer(self, logits: Tensor, keep: Tensor) -> Tensor:
            return EXPERTS * logits[keep].softmax(-1).mean(-1).mean()

    return mixture_subject(balance=WrongAxis)


@balance.plant("aux-loss-constant", component="gradient", what="counts of choices only")
def _() -> Subject:
    class Counts(Balance):
        def layer(self, logits: Tensor, keep: Tensor) -> Tensor:
            return super().layer(logits.detach(), keep) + 0 * logits.sum()

    return mixture_subject(balance=Counts)


@balance.plant("aux-loss-across-layers", component="layers")
def _() -> Subject:
    class Together(Balance):
        def __call__(self, layers: list[Tensor], keep: Tensor) -> Tensor:  # type: ignore[override]
            return self.layer(torch.cat(layers), keep.repeat(len(layers)))

    return mixture_subject(balance=Together)


@balance.plant("aux-counts-pads", component="tokens")
def _() -> Subject:
    class PadsToo(Balance):
        def counted(self, keep: Tensor) -> Tensor:
            return torch.ones_like(keep)

    return mixture_subject(balance=PadsToo)


@balance.healthy("Switch's form, two experts a token")
def _() -> Subject:
    return mixture_subject()


@balance.healthy("a sum over layers and choices, as Mixtral has it")
def _() -> Subject:
    class Summed(Balance):
        def __call__(self, layers: list[Tensor], keep: Tensor) -> Tensor:  # type: ignore[override]
            return torch.stack([TOP * self.layer(logits, keep) for logits in layers]).sum()

    return mixture_subject(balance=Summed)
