"""The router of our mixture of experts, as the doctor's checks of routers ask for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from minilm.doctor.views import RouterView
from minilm.models.moe import Experts, MoE, balance


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
        _, ends = layer.groups(route(states)[0])
        return ends.diff(prepend=ends.new_zeros(1)), 0

    def balance_of(layers: Sequence[Tensor], keep: Tensor) -> Tensor:
        """The loss is a mean over rows of what each row has by itself: these tokens are one row."""
        return balance([logits.unsqueeze(0) for logits in layers], keep.unsqueeze(0), layer.top_k)

    return RouterView(
        route=route,
        num_experts=layer.num_experts,
        width=model.config.dim,
        balance=balance_of,
        dispatched=dispatched,
        logits=logits,
    )
