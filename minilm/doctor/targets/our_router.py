"""The router of our mixture of experts, as the doctor's checks of routers ask for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilm.doctor.views import RouterView
from minilm.models.moe import Experts, MoE


def router_view(model: nn.Module) -> RouterView | None:
    """The first layer's router with the balance loss of all layers; None for a model without one.

    States come and results go on the CPU, wherever the model is.
    """
    if not isinstance(model, MoE):
        return None
    layer: Experts = model.blocks[0].ffn

    def logits(states: Tensor) -> Tensor:
        return layer.logits(states.to(layer.gate.device)).cpu()

    def route(states: Tensor) -> tuple[Tensor, Tensor]:
        experts, weights = layer.route(layer.logits(states.to(layer.gate.device)))
        return experts.cpu(), weights.cpu()

    def dispatched(states: Tensor) -> tuple[Tensor, int]:
        """As many as the groups that experts work on hold; none is ever reported as dropped."""
        _, sizes = layer.groups(route(states)[0])
        return torch.tensor(sizes), 0

    return RouterView(
        route=route,
        num_experts=layer.num_experts,
        width=model.config.dim,
        balance=model.balance,
        dispatched=dispatched,
        logits=logits,
    )
