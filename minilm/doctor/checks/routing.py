"""A router must send each token to its best experts, with weights that mean what they say, and lose no token.

Why: weights that are not renormalised shrink the layer; a router in bfloat16 sends near-equal tokens elsewhere from
one precision to the next; an expert over its capacity drops tokens without a word; a router that sends everything to
one expert makes the others dead weight.

How: on random states the experts are compared with the best of the router's own logits, the weights are added up,
the router's arithmetic is compared with float64, and the tokens that experts worked on are counted against tokens x k.

Cannot see: whether experts specialise; a collapse that comes during training (balance looks at what should prevent it).

Sources: Mixtral's norm_topk_prob; ST-MoE (Zoph et al., 2022) on float32 routers; transformers issue 28255.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet
from minilm.doctor.specimens.mixture import TOP, Mixture, mixture_subject
from minilm.doctor.subject import Subject
from minilm.doctor.views import RouterView

TOKENS = 256
WEIGHT_ERROR = 1e-3  # healthy float32 weights add up to 1 within 2e-7, bfloat16 ones within 4e-3
LOGIT_ERROR = 1e-4  # of the logits' deviation; float32: 1e-6, bfloat16: 4e-3
MOST_SHARE = 0.95  # of all tokens to one expert's first place; random states on random routers: 0.2 to 0.5


@check(group="memory", needs=("router",), cost="1 routing of 256 states", quick=True)
def routing(subject: Subject) -> Finding:
    """Best experts, weights, precision, dropped tokens, collapse."""
    view: RouterView = subject.router
    with quiet(subject), torch.no_grad():
        states = torch.randn(TOKENS, view.width, generator=torch.Generator().manual_seed(0))
        experts, weights = view.route(states)
        if experts.shape != weights.shape or len(experts) != TOKENS:
            raise NotApplicable(f"route returned {list(experts.shape)} and {list(weights.shape)}")
        findings = [
            _weights(view, weights),
            _precision(subject, view, states),
            _best(view, states, experts),
            _dropped(view, states, experts.shape[1]),
            _collapse(view, experts),
        ]
    found = next((f for f in findings if f is not None), None)
    if found is not None:
        return found
    share = float(torch.bincount(experts[:, 0], minlength=view.num_experts).max()) / TOKENS
    return passed(f"{TOKENS} tokens to their best {experts.shape[1]} of {view.num_experts} experts, none lost; the "
                  f"busiest is first choice of {share:.0%}", share, MOST_SHARE, unit="of the tokens")  # fmt: skip


def _weights(view: RouterView, weights: Tensor) -> Finding | None:
    if not view.normalised:
        return None
    error = float((weights.double().sum(-1) - 1).abs().max())
    if error <= WEIGHT_ERROR:
        return None
    return failed(
        f"the weights of a token's experts add up to {float(weights.sum(-1).mean()):.3f} on average, not to 1",
        error, WEIGHT_ERROR, unit="of 1", bugs=["moe-norm-topk", "moe-bf16-router"], component="router weights",
        advice="divide the chosen probabilities by their sum (norm_topk_prob), in float32",
    )  # fmt: skip


def _precision(subject: Subject, view: RouterView, states: Tensor) -> Finding | None:
    """The router's logits against the same product in float64, where it is a linear layer."""
    linear = [
        part
        for part in (subject.module.modules() if subject.module is not None else ())
        if isinstance(part, nn.Linear)
        and part.out_features == view.num_experts
        and part.in_features == view.width
    ]
    if view.logits is None or not linear:
        return None
    made = view.logits(states)
    errors = [
        float(
            (made.double() - nn.functional.linear(states.double(), p.weight.double(), _wide(p.bias)))
            .abs()
            .max()
        )
        for p in linear
    ]
    error = min(errors) / float(made.double().std())
    if error <= LOGIT_ERROR or error > 0.1:  # beyond it: not this layer's product, something else is computed
        return None
    return failed(
        f"the router's logits differ from the same product in float64 by {error:.1e} std",
        error, LOGIT_ERROR, unit="logit std", bugs=["moe-bf16-router"], component="router logits",
        advice="compute the router in float32, also under autocast",
    )  # fmt: skip


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()


def _best(view: RouterView, states: Tensor, experts: Tensor) -> Finding | None:
    if view.logits is None:
        return None
    logits = view.logits(states)
    best = logits.topk(experts.shape[1]).values
    gap = float((best - logits.gather(1, experts).sort(1, descending=True).values).abs().max() / logits.std())
    if gap <= LOGIT_ERROR:
        return None
    return failed(
        f"a token went to an expert whose logit is {gap:.2g} std below its best {experts.shape[1]}",
        gap, LOGIT_ERROR, unit="logit std", bugs=["moe-jitter-in-eval"], component="router choice",
        advice="no noise in eval mode; choose by the logits that weigh",
    )  # fmt: skip


def _dropped(view: RouterView, states: Tensor, top: int) -> Finding | None:
    if view.dispatched is None:
        return None
    counts, reported = view.dispatched(states)
    missing = TOKENS * top - int(counts.sum()) - reported
    if missing == 0:
        return None
    return failed(
        f"{TOKENS} tokens x {top} experts: {int(counts.sum())} were worked on, {reported} reported as dropped, "
        f"{missing} vanished",
        abs(missing), 0, unit="assignments", bugs=["moe-token-drop"], component="dispatch to experts",
        advice="raise the capacity or drop nobody; count and log what is dropped",
    )  # fmt: skip


def _collapse(view: RouterView, experts: Tensor) -> Finding | None:
    counts = torch.bincount(experts[:, 0], minlength=view.num_experts)
    share = float(counts.max()) / len(experts)
    if share <= MOST_SHARE:
        return None
    return failed(
        f"expert {int(counts.argmax())} is the first choice of {share:.0%} of random states",
        share, MOST_SHARE, unit="of the tokens", bugs=["moe-load-collapse"], component="router choice",
        advice="add the balance loss to the training loss, and start from a router without a bias",
    )  # fmt: skip


@routing.plant("moe-norm-topk", component="weights")
def _() -> Subject:
    class Raw(Mixture):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights, experts = self.logits(x).softmax(-1).topk(TOP)
            return experts, weights

    return mixture_subject(Raw)


@routing.plant("moe-bf16-router", component="logits")
def _() -> Subject:
    class Rounded(Mixture):
        def logits(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.bfloat16(), self.router.weight.bfloat16()).float()

    return mixture_subject(Rounded)


@routing.plant("moe-token-drop", component="dispatch", what="a capacity that is full, and silence")
def _() -> Subject:
    class Full(Mixture):
        def taken(self, experts: Tensor, number: int) -> tuple[Tensor, Tensor]:
            token, place = super().taken(experts, number)
            capacity = experts.numel() // 4
            return token[:capacity], place[:capacity]

    return mixture_subject(Full)


@routing.plant("moe-load-collapse", component="choice")
def _() -> Subject:
    class Collapsed(Mixture):
        def logits(self, x: Tensor) -> Tensor:
            return super().logits(x) + torch.tensor([40.0, 0.0, 0.0, 0.0])

    return mixture_subject(Collapsed)


@routing.plant("moe-jitter-in-eval", component="choice")
def _() -> Subject:
    class Noisy(Mixture):
        def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
            gumbel = -torch.empty(len(x), 4).exponential_().log()
            weights, experts = (self.logits(x) + gumbel).softmax(-1).topk(TOP)
            return experts, weights / weights.sum(-1, keepdim=True)

    return mixture_subject(Noisy)


@routing.healthy("a mixture of four experts")
def _() -> Subject:
    return mixture_subject()
