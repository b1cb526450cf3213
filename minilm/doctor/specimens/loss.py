"""The specimens' loss: nats summed over targets. Plants shift, mask or divide it wrongly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.doctor.subject import Rows


def targets(rows: Rows) -> Tensor:
    """[B, T-1]: does position i have token i + 1 as a target."""
    same = rows.segments[:, :-1] == rows.segments[:, 1:]
    return same & (rows.segments[:, 1:] > 0) & rows.learn[:, 1:]


def summed_nats(logits: Tensor | None, rows: Rows) -> tuple[Any, int]:
    """Summed nats (None without logits) and the number of targets."""
    counted = targets(rows)
    count = int(counted.sum())
    if logits is None:
        return None, count
    labels = torch.where(counted, rows.tokens[:, 1:], -100)
    flat = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(flat, labels.flatten(), ignore_index=-100, reduction="sum"), count


def mean_loss(logits: Tensor, rows: Rows) -> Tensor:
    """Nats per target; 0 where there is none."""
    nats, count = summed_nats(logits, rows)
    return nats / max(count, 1)
