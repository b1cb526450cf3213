"""Which of several ways of equal result each part of the step takes here: chosen by device and precision, and shown.

The choice depends on nothing that is measured, so the same run on the same machine takes the same sums every time. That
the ways are equal is what their tests say; how fast each is, `benchmarks/parts.py`.
"""

from __future__ import annotations

import torch

from minilm import onednn
from minilm.models import attention
from minilm.models.base import ModelConfig
from minilm.training.host_memory import keep_freed_memory
from minilm.training.layout import Layout


def kernel_of(model: ModelConfig, device: torch.device, *, bf16: bool) -> str:
    """The attention kernel that training takes. Raises ConfigError where the one that was asked for cannot run."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    return attention.resolve(model.kernel, device, dtype, model.head_dim, model.dropout)


def take(model: ModelConfig, layout: Layout, *, compiled: bool) -> dict[str, str]:
    """Prepare this process, and tell for each part which way it goes. Raises ConfigError as `kernel_of`."""
    plain = layout.device_type == "cpu" and not layout.bf16
    paths = {
        "attention": kernel_of(model, layout.device, bf16=layout.bf16),
        "products": "oneDNN" if plain and onednn.works() else "torch",
        "norm, rotation, SwiGLU": "compiled" if compiled else "fused" if plain else "torch",
    }
    if getattr(model, "memory", "none") != "none":
        paths["reading of entries"] = "in parts" if plain and not compiled else "at once"
    if layout.device_type == "cpu":
        paths["freed memory"] = "kept" if keep_freed_memory() else "given back"
    return paths
