"""Mixture of experts: each token passes through the `top_k` best of `num_experts` feed-forwards.

The router is a linear layer in float32, also under autocast and in 16-bit models: rounded, near-equal experts change
places. The chosen probabilities are divided by their sum. There is no capacity: no token is dropped, and a token's
output does not depend on who else is in the batch. At the sizes here two experts of half the width of the original
feed-forward work on each token, so that parameters are about three times as many at equal arithmetic (+ the router).

The experts of a layer are three stacked parameters [experts, rows, columns], of which an optimizer sees stacks of
matrices; an expert that no token chose has a gradient of zeros, on every rank alike. Tokens are sorted by expert,
and each expert works on one contiguous group: one after another, or all in one call of `torch.nn.functional.grouped_mm`
where that has a kernel that reads the borders of the groups on the device (bfloat16 on CUDA from Hopper on). Elsewhere
torch itself goes from group to group: measured on a CPU, in the same time, and a token would come out different by its
company.

Losses of its own, in `Output.auxiliary`, weighted, the mean over layers of what each layer has by itself:
    balance     experts x sum of (share of choices) x (mean probability) within a row; 1 when even
    router_z    ST-MoE's (arXiv 2202.08906): mean of logsumexp(logits)^2, which keeps logits small; off by default
Both are means over the tokens that predict something. Balance is Switch's formula (arXiv 2101.03961) row by row, as
DeepSeek-V3 has it (arXiv 2412.19437, complementary sequence-wise loss): a product of two means over all tokens of a
step would need the choices of every micro-batch and rank before the first backward, while a mean over rows is the same
however the step is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from minilm.models import register
from minilm.models.attention import Plan
from minilm.models.original import Original, OriginalConfig
from minilm.models.parts import Block, SwiGLU, compute_dtype, gated_product
from minilm.onednn import product

USAGE = "usage/blocks."


def _size(fields: dict[str, Any], num_experts: int) -> dict[str, Any]:
    """A size of `original` whose experts are half as wide: two of them are one feed-forward."""
    return {**fields, "hidden_dim": fields["hidden_dim"] // 2, "num_experts": num_experts}


@register("moe")
@dataclass(frozen=True, kw_only=True)
class MoEConfig(OriginalConfig):
    """Settings of the mixture of experts; the defaults are the reference size, 25,862,656 active parameters."""

    name: Literal["moe"] = "moe"  # type: ignore[assignment]
    hidden_dim: Annotated[int, Field(gt=0, description="inner width of one expert")] = 704
    num_experts: Annotated[int, Field(gt=1, description="routed experts of a layer")] = 8
    top_k: Annotated[int, Field(gt=0, description="experts that work on a token")] = 2
    num_shared_experts: Annotated[
        int, Field(ge=0, description="experts that work on every token, beside the routed ones, not weighted")
    ] = 0
    balance_weight: Annotated[float, Field(ge=0, description="of the balance loss")] = 0.01
    router_z_weight: Annotated[float, Field(ge=0, description="of the loss on large router logits")] = 0.0

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        size: _size(fields, 4 if size == "tiny" else 8) for size, fields in OriginalConfig.sizes.items()
    }

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.top_k > self.num_experts:
            found.append(("top_k", f"{self.top_k} experts a token, but there are only {self.num_experts}"))
        elif self.top_k == self.num_experts:
            wide = self.num_experts * self.hidden_dim
            instead = f"Choose fewer, or model original with hidden_dim {wide}."
            found.append(("top_k", f"all {self.num_experts} experts work on every token. {instead}"))
        return found

    def parameter_groups(self) -> dict[str, int]:
        groups = super().parameter_groups()
        expert = self.num_layers * 3 * self.dim * self.hidden_dim
        del groups["feed-forward"]
        groups["experts"] = self.num_experts * expert
        if self.num_shared_experts:
            groups["shared experts"] = self.num_shared_experts * expert
        groups["router"] = self.num_layers * self.num_experts * self.dim
        return groups

    def active_parameters(self) -> int:
        idle = self.num_experts - self.top_k
        return self.num_parameters() - idle * self.num_layers * 3 * self.dim * self.hidden_dim

    def flops_per_token(self, sequence_length: int) -> int:
        """Of the experts, those that work on a token."""
        groups = self.parameter_groups()
        table = self.vocab_size * self.dim  # one product, tied or not
        untied = 0 if self.tie_embeddings else table
        products = self.active_parameters() - groups["norms"] - untied
        return 2 * products + 2 * self.num_layers * self.dim * (sequence_length + 1)

    def module(self) -> MoE:
        return MoE(self)


class MoE(Original):
    """model(inputs [B, L], segments, positions, cache) -> Output, with the routers' losses in `auxiliary`."""

    config: MoEConfig

    def block(self, layer: int) -> nn.Module:
        return MoEBlock(self.config, layer, Experts(self.config))

    @torch.no_grad()
    def initialise(self) -> None:
        """As `original`; experts from the same normal(0, init_std), and so the routers: near-even at the start."""
        super().initialise()
        for module in self.modules():
            if isinstance(module, Experts):
                for stack in (module.gate, module.up, module.down):
                    stack.normal_(0.0, self.config.init_std)

    def stack(self, x: Tensor, plan: Plan, segments: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        layers = []
        for block in self.blocks:
            x, logits = self.passed(block, x, plan)
            layers.append(logits)
        if plan.cache is not None:  # generation: nobody learns
            return x, {}
        keep = x.new_ones(x.shape[:2], dtype=torch.bool) if segments is None else predicting(segments)
        if self.collector is not None:
            for layer, logits in enumerate(layers):
                self.collect(f"{USAGE}{layer}", choices(logits, keep, self.config.top_k)[1].sum(dim=(0, 1)))
        config, auxiliary = self.config, {}
        if config.balance_weight:
            auxiliary["balance"] = config.balance_weight * balance(layers, keep, config.top_k)
        if config.router_z_weight:
            auxiliary["router_z"] = config.router_z_weight * router_z(layers, keep)
        return x, auxiliary

    def counted(self, segments: Tensor, entries: Tensor | None = None) -> dict[str, Tensor]:
        weights = {"balance": self.config.balance_weight, "router_z": self.config.router_z_weight}
        count = predicting(segments).sum(dtype=torch.float64)
        return {name: count for name, weight in weights.items() if weight}

    def columns(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """For each layer the share of the choices that each expert has, the evenness of the shares, idle experts."""
        found = super().columns(sums)
        for name, chosen in sums.items():
            if name.startswith(USAGE) and bool(chosen.any()):
                found |= {f"{name}/{column}": value for column, value in shares(chosen).items()}
        return found


class MoEBlock(Block):
    """A block that returns its router's logits [B, L, experts] beside the stream."""

    def forward(self, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = x + self.dropout(self.attention(self.attention_norm(x), plan))
        mixed, logits = self.ffn(self.ffn_norm(x))
        return x + self.dropout(mixed), logits


class Experts(nn.Module):
    """x [B, L, D] -> (the weighted sum of each token's experts [B, L, D], router logits [B, L, experts])."""

    # With fewer rows a matrix product is made by other kernels, whose sums are rounded otherwise: a token would
    # come out different by its company.
    FEWEST_ROWS = 4

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        dim, hidden = config.dim, config.hidden_dim
        self.router = nn.Linear(dim, config.num_experts, bias=False)
        self.gate = nn.Parameter(torch.empty(config.num_experts, hidden, dim))
        self.up = nn.Parameter(torch.empty(config.num_experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(config.num_experts, dim, hidden))
        self.shared = None
        if config.num_shared_experts:
            self.shared = SwiGLU(dim, config.num_shared_experts * hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(0, 1)  # [N, D]
        logits = self.logits(flat)
        experts, weights = self.route(logits)
        out = self.worked(flat, experts)  # [N, k, D]
        mixed = (out * weights.to(out.dtype).unsqueeze(-1)).sum(dim=1).view_as(x)
        if self.shared is not None:
            mixed = mixed + self.shared(x)
        return mixed, logits.unflatten(0, x.shape[:2])

    def logits(self, flat: Tensor) -> Tensor:
        """States [N, D] -> router logits [N, experts], float32 (float64 for a model in double precision)."""
        precise = torch.float64 if flat.dtype == torch.float64 else torch.float32
        with torch.autocast(flat.device.type, enabled=False):
            return F.linear(flat.to(precise), self.router.weight.to(precise))

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, experts] -> the best experts [N, k] and their weights [N, k], which add up to 1."""
        weights, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return experts, weights / weights.sum(dim=-1, keepdim=True)

    def groups(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Choices [N, k] -> the order [N k] that sorts them by expert, and where each expert's group ends, int32 [E].

        Nothing here waits for an accelerator, as counting (`bincount`) would.
        """
        by_expert, order = experts.flatten().sort(stable=True)
        every = torch.arange(self.num_experts, device=experts.device)
        return order, torch.searchsorted(by_expert, every, right=True, out_int32=True)

    def worked(self, flat: Tensor, experts: Tensor) -> Tensor:
        """States [N, D] through the experts [N, k] -> [N, k, D], not weighted."""
        order, ends = self.groups(experts)
        # Each choice has its own copy of the state, so that both indexings are permutations: no sum whose order
        # could change from run to run, forward or backward.
        copies = flat.unsqueeze(1).expand(-1, self.top_k, -1).flatten(0, 1)
        stacks = self.gate, self.up, self.down
        through = at_once if _runs_at_once(flat, self.gate) else one_by_one
        return through(copies[order], ends, *stacks)[order.argsort()].unflatten(0, experts.shape)


def one_by_one(x: Tensor, ends: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sorted states [n, D] through the SwiGLU of their expert, [experts, rows, columns] -> [n, D].

    The sizes of the groups are needed here: one synchronisation with an accelerator.
    """
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    stacks = zip(gate.unbind(), up.unbind(), down.unbind(), strict=True)
    return torch.cat([_expert(own, *s) for own, s in zip(x.split(sizes), stacks, strict=True) if len(own)])


def _expert(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One SwiGLU: x [n, D] -> [n, D]."""
    rows = len(x)
    x = F.pad(x, (0, 0, 0, max(0, Experts.FEWEST_ROWS - rows)))
    return gated_product(product(x, gate), product(x, up), down)[:rows]


def at_once(x: Tensor, ends: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same in three products, without a loop and without a synchronisation."""
    dtype = compute_dtype(gate)  # grouped_mm knows nothing of autocast

    def product(x: Tensor, stack: Tensor) -> Tensor:
        return F.grouped_mm(x, stack.to(dtype).transpose(1, 2), offs=ends)

    x = x.to(dtype)
    return product(F.silu(product(x, gate)) * product(x, up), down)


def _runs_at_once(x: Tensor, stack: Tensor) -> bool:
    """Is there a kernel of grouped_mm for this: its rows must begin at multiples of 16 bytes.

    Read off the sources of torch 2.11 to 2.13; everywhere else its own fallback is a loop with a synchronisation.
    """
    return (
        x.is_cuda
        and torch.version.hip is None
        and compute_dtype(stack) == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        and stack.shape[1] % 8 == 0
        and stack.shape[2] % 8 == 0
    )


def predicting(segments: Tensor) -> Tensor:
    """[B, L] bool: which tokens count for the losses here. Not padding, nor the last token of a document.

    Nothing is predicted there. Were it counted, a row cut off behind its last target and the same row with padding
    after it, where that token is an input too, would differ. (What follows the last input of a row is not known
    here: it counts.)
    """
    going_on = torch.ones_like(segments, dtype=torch.bool)
    going_on[:, :-1] = segments[:, 1:] == segments[:, :-1]
    return going_on & (segments > 0)


def balance(layers: Sequence[Tensor], keep: Tensor, top_k: int) -> Tensor:
    """Mean over layers and kept tokens of how unevenly the token's row uses the experts.

    layers  router logits [B, L, experts] of each layer
    keep    [B, L] bool, which tokens count; 0 where none does

    For a row with n kept tokens: experts x sum over experts of (share of its n x top_k choices) x (mean probability).
    """
    num_tokens = keep.sum(dim=1).clamp(min=1)  # [B]
    unevenness = []  # of each layer, 1 when even
    for logits in layers:
        probabilities, chosen = choices(logits, keep, top_k)
        share = chosen.sum(dim=1) / (num_tokens * top_k).unsqueeze(
            -1
        )  # [B, experts]: a count has no gradient
        # A row's mean probability times its n tokens is this sum.
        of_rows = logits.shape[-1] * (share * probabilities.sum(dim=1)).sum(dim=-1)  # [B]
        unevenness.append(of_rows.sum() / keep.sum().clamp(min=1))
    return torch.stack(unevenness).mean(dim=0)


def choices(logits: Tensor, keep: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Logits [B, L, experts] -> probabilities, and 1 where an expert is chosen; both 0 where keep [B, L] is not."""
    probabilities, kept = logits.softmax(dim=-1), keep.unsqueeze(-1)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(top_k).indices, 1.0)
    return probabilities * kept, chosen * kept


def shares(chosen: Tensor) -> dict[str, float]:
    """How often each expert was chosen [experts] -> columns of the log; `evenness` is the entropy over its largest."""
    share = chosen / chosen.sum()
    evenness = float(torch.special.entr(share).sum()) / math.log(len(share))
    each = {f"expert_{number}": float(value) for number, value in enumerate(share)}
    return each | {"evenness": evenness, "idle_experts": float((chosen == 0).sum())}


def router_z(layers: Sequence[Tensor], keep: Tensor) -> Tensor:
    """Mean over layers and kept tokens of logsumexp(logits)^2; shapes as in `balance`."""
    squares = torch.stack([logits.logsumexp(dim=-1).square() * keep for logits in layers])  # [layers, B, L]
    return squares.sum() / (keep.sum().clamp(min=1) * len(layers))
