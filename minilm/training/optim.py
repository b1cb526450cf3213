"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from minilm.training.muon import MuonAdamW, matrices_of, stacked_in


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Section `optim`."""

    name: Annotated[
        Literal["adamw", "muon"],
        Field(
            description="adamw, or muon: Muon for the matrices of the blocks, AdamW for embedding, head and vectors"
        ),
    ] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, description="highest learning rate (of AdamW)")] = 1e-3
    final_rate: Annotated[
        float, Field(ge=0, le=1, description="learning rate of the last step, as a share of it")
    ] = 0.1
    schedule: Annotated[
        Literal["cosine", "wsd", "linear", "constant"],
        Field(
            description="shape after the warm-up; wsd: stable, then falling over the last decay_share of all steps"
        ),
    ] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, description="steps in which the rate rises linearly from 0")] = (
        100
    )
    decay_share: Annotated[
        float, Field(gt=0, le=1, description="wsd: share of all steps that the fall takes")
    ] = 0.2
    weight_decay: Annotated[float, Field(ge=0, description="decoupled weight decay, on matrices only")] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1, description="AdamW's first moment decay")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="AdamW's second moment decay")] = 0.95
    eps: Annotated[float, Field(gt=0, description="AdamW's epsilon")] = 1e-8
    muon_learning_rate: Annotated[
        float, Field(gt=0, description="highest learning rate of Muon; it follows the same schedule")
    ] = 0.02
    muon_momentum: Annotated[float, Field(ge=0, lt=1, description="Muon's Nesterov momentum")] = 0.95
    clip_norm: Annotated[
        float | None, Field(gt=0, description="largest norm of the whole gradient; none: no clipping")
    ] = 1.0


def rate_at(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `num_steps`.

    Step s of a warm-up of w steps has (s + 1) / w of the full rate, so that the first step moves the weights;
    the last step, num_steps - 1, has exactly final_rate * learning_rate (schedule "constant": the full rate).
    """
    peak, low = config.learning_rate, config.learning_rate * config.final_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "wsd":
        start = max(config.warmup_steps, num_steps - math.ceil(config.decay_share * num_steps))
    else:
        start = config.warmup_steps
    if step < start:
        return peak
    # Progress is 0 at the last step with the full rate (start - 1) and 1 at the last step of all.
    progress = min(1.0, (step - start + 1) / max(1, num_steps - start))
    if config.schedule == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak + (low - peak) * progress


def groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices (two dimensions or more) decay; norms and biases do not.

    Each trainable parameter is in exactly one group, once: `parameters()` lists a tied matrix once.
    """
    trainable = [p for p in parameters if p.requires_grad]
    matrices, vectors = [p for p in trainable if p.dim() >= 2], [p for p in trainable if p.dim() < 2]
    parts = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def tables_of(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Parameters that are looked up, not multiplied with: modules name them in `tables`, name -> multiple of the rate.

    A row that is seldom read would mostly be decayed, and has few steps to learn in: no decay, a rate of its own.
    """
    found = []
    for module in model.modules():
        for name, scale in getattr(module, "tables", {}).items():
            parameter = module.get_parameter(name)
            if parameter.requires_grad:
                found.append((parameter, float(scale)))
    return found


def build(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the module's parameters, in one kernel (fused).

    With the name muon the matrices are Muon's (`minilm.training.muon`), the rest AdamW's; module is the bare model.
    """
    matrices = matrices_of(module) if config.name == "muon" else []
    taken = {id(p) for p in matrices}
    tables = tables_of(module)
    rest = [p for p in module.parameters() if id(p) not in taken and id(p) not in {id(t) for t, _ in tables}]
    parts = groups(rest, config.weight_decay)
    for scale in sorted({scale for _, scale in tables}):
        same = [t for t, own in tables if own == scale]
        parts.append(
            {"params": same, "weight_decay": 0.0, "lr": scale * config.learning_rate, "rate_scale": scale}
        )
    # A model of shapes alone (meta) has no kernel.
    fused = True if next(module.parameters()).device.type in ("cuda", "cpu") else None
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW(parts, lr=config.learning_rate, betas=betas, eps=config.eps, fused=fused)
    if config.name == "adamw":
        return adamw
    optimizer = MuonAdamW(
        adamw,
        matrices,
        learning_rate=config.muon_learning_rate,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        stacked=dict(stacked_in(module)),
    )
    for group in optimizer.param_groups:
        if group["muon"]:
            group["rate_scale"] = config.muon_learning_rate / config.learning_rate
    return optimizer


def can_refuse(optimizer: torch.optim.Optimizer) -> bool:
    """Can a step be `refusing`? torch's fused AdamW can, once it has a state: a refused first step would make one."""
    fused = isinstance(optimizer, torch.optim.AdamW) and all(g["fused"] for g in optimizer.param_groups)
    return fused and any(optimizer.state.values())


@contextlib.contextmanager
def refusing(optimizer: torch.optim.Optimizer, unless: Tensor | None) -> Iterator[None]:
    """Inside, a step changes neither weights nor moments where `unless`, a float32 [] on their device, is 1.

    The device decides, nobody waits. It is what torch.amp.GradScaler does: the kernel looks at `found_inf`. None: every
    step is taken, by any optimizer.
    """
    if unless is None:
        yield
        return
    optimizer.found_inf = unless  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate of AdamW, Muon's in proportion to its own highest rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rates that the optimizer will really use: what the log shows is read here, not recomputed."""
    rates = {}
    for group in optimizer.param_groups:
        name = "muon_learning_rate" if group.get("muon") else "learning_rate"
        if not group.get("muon") and group.get("rate_scale", 1.0) != 1.0:
            name = "table_learning_rate"
        rates[name] = float(group["lr"])
    return rates
