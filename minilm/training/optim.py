"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Section `optim`."""

    learning_rate: Annotated[float, Field(gt=0, description="highest learning rate")] = 1e-3
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


def build(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the module's parameters; fused on CUDA."""
    parts = groups(module.parameters(), config.weight_decay)
    fused = True if next(module.parameters()).device.type == "cuda" else None
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(parts, lr=config.learning_rate, betas=betas, eps=config.eps, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that the optimizer will really use: what the log shows is read here, not recomputed."""
    return float(optimizer.param_groups[0]["lr"])
