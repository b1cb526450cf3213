"""Where the target stands among all tokens by probability: what accuracies are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from minilm.alignment import Batch
from minilm.errors import DataError


def ranks(logits: Tensor, batch: Batch, most: int = 5) -> Tensor:
    """How many tokens stand before the target of each prediction, int64 [B, L]: 0 is the most probable one.

    Of equally probable tokens the lower id stands before the higher one, so rank 0 is what a first-of-the-largest
    argmax chooses, and a model that gives all tokens the same logit is not right everywhere. A rank of `most` says
    `most` or more. Positions that do not count have -1. A logit that is NaN makes a rank
    that says nothing: look at the loss first.

    logits [B, L, V], as for `minilm.alignment.nll`.
    """
    if logits.dim() != 3 or tuple(logits.shape[:2]) != batch.shape:
        raise DataError(f"logits have shape {list(logits.shape)}, the batch {list(batch.shape)}.")
    counts = batch.weights > 0
    found = torch.full(batch.shape, -1, dtype=torch.int64, device=logits.device)
    every = bool(counts.all())  # then no copy is needed
    flat = logits.flatten(0, 1) if every else logits[counts]  # [N, V]
    targets = batch.targets[counts].unsqueeze(1)  # [N, 1]
    own = flat.gather(1, targets)
    top = flat.topk(min(most, flat.shape[1]), dim=1).values  # sorted
    before = (top > own).sum(dim=1)
    # Equal ones are looked for only where there may be some: two in the top, or one at its end, where it is cut off.
    tied = ((top == own).sum(dim=1) > 1) | (top[:, -1:] == own).squeeze(1)
    if bool(tied.any()):
        lower = torch.arange(flat.shape[1], device=flat.device) < targets[tied]
        before[tied] += ((flat[tied] == own[tied]) & lower).sum(dim=1)
    return found.masked_scatter(counts, before.clamp(max=most))
