"""Model and loss as one module: what DDP and DeepSpeed wrap, so that they see one forward per micro-batch."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from minilm.alignment import Batch, Sum, score_hidden


class Objective(nn.Module):
    """forward(batch) -> (Sum over the batch, named auxiliary losses of the model, already weighted).

    The logits are never held as a whole (`score_hidden`). The segments are handed to the model so that a
    position sees its own document only.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A model of somebody else, or a variant with a forward of its own, need not know of it.
        self._tells_documents = "documents" in inspect.signature(type(model).forward).parameters

    def forward(self, batch: Batch) -> tuple[Sum, dict[str, Tensor]]:
        """batch [B, L] on the model's device; raises what the model raises for rows that do not fit it."""
        known: dict[str, Any] = {"segments": batch.segments, "positions": batch.positions}
        if getattr(self.model, "takes_entries", False):
            known["entries"] = batch.entries
        if self._tells_documents:
            known["documents"] = batch.documents
        output = self.model(batch.inputs, **known)
        return score_hidden(output.hidden, self.model.head_weight, batch), dict(output.auxiliary)
