"""A small mixture of experts in place of a feed-forward, in plain torch (after Fedus et al., 2021, with top 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor.specimens.model import FeedForward, Model, Size
from minilm.doctor.specimens.subject import subject
from minilm.doctor.subject import Subject
from minilm.doctor.views import RouterView

EXPERTS, TOP = 4, 2


class Mixture(nn.Module):
    """x [..., D]: each token goes through its TOP best experts, weighted; nobody is dropped."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.router = nn.Linear(size.dim, EXPERTS, bias=False)
        self.experts = nn.ModuleList(FeedForward(size) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        experts, weights = self.route(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = self.taken(experts, number)
            out = out.index_add(
                0, token, expert(flat[token]) * weights[token, place].unsqueeze(1).to(x.dtype)
            )
        return out.view_as(x)

    def logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.router.weight.float())

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(experts [N, TOP], weights [N, TOP]) in float32."""
        weights, experts = self.logits(x).softmax(-1).topk(TOP)
        return experts, weights / weights.sum(-1, keepdim=True)

    def taken(self, experts: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Tokens that expert `number` works on, and at which place of their choice it stands."""
        token, place = (experts == number).nonzero(as_tuple=True)
        return token, place

    def dispatched(self, x: Tensor) -> tuple[Tensor, int]:
        experts, _ = self.route(x)
        return torch.tensor([len(self.taken(experts, n)[0]) for n in range(EXPERTS)]), 0


class Balance:
    """The auxiliary loss of Switch: E x sum over experts of (share of tokens) x (mean probability), layer by layer."""

    def __call__(self, layers: Sequence[Tensor], keep: Tensor) -> Tensor:
        return torch.stack([self.layer(logits, keep) for logits in layers]).mean()

    def layer(self, logits: Tensor, keep: Tensor) -> Tensor:
        kept = logits[self.counted(keep)].float()
        probabilities = kept.softmax(-1)
        chosen = kept.topk(TOP).indices
        share = nn.functional.one_hot(chosen, EXPERTS).float().sum(1).mean(0) / TOP
        return EXPERTS * (share * probabilities.mean(0)).sum()

    def counted(self, keep: Tensor) -> Tensor:
        return keep


def mixture_subject(
    mixture: type[Mixture] = Mixture, balance: type[Balance] = Balance, **parts: Any
) -> Subject:
    """The specimen with a mixture in each block; the router of the first block is handed over."""
    made = subject(ffn=mixture, **parts)
    module = made.module
    assert isinstance(module, Model)
    first: Mixture = module.layers[0].ffn
    view = RouterView(
        route=first.route,
        num_experts=EXPERTS,
        width=module.size.dim,
        balance=balance(),
        dispatched=first.dispatched,
        logits=first.logits,
    )
    return made.but(router=view)
