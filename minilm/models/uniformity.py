"""Have the states of all tokens become the same? What a model tells the training log about that.

Attention averages. Without enough of what tells tokens apart (skip connections, feed-forwards), their states run into
one direction with depth, and every token is then predicted alike (arXiv 2103.03404). The loss shows it as a plateau
near the entropy of single tokens, which has many causes. The mean cosine of two tokens of a row names this one: it is
1 when all states are one direction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

COSINE = "uniformity/cosine"
_PAIRS = "uniformity/pairs"


@torch.no_grad()
def pairwise(hidden: Tensor, segments: Tensor | None) -> dict[str, Tensor]:
    """hidden [B, L, D] -> the cosines of all pairs of real tokens of a row, summed, and how many pairs there are.

    No pair is looked at: the squared length of a sum of n unit vectors is n + the sum over ordered pairs of their
    cosines. Float32, row sums in float64.
    """
    directions = F.normalize(hidden.float(), dim=-1)
    if segments is not None:
        directions = directions * (segments > 0).unsqueeze(-1)
    alone = directions.square().sum(dim=(1, 2), dtype=torch.float64)  # [B]: n, but for states of zeros
    together = directions.sum(dim=1, dtype=torch.float64).square().sum(dim=-1)  # [B]
    lengths = hidden.new_full(hidden.shape[:1], hidden.shape[1], dtype=torch.float64)
    if segments is not None:
        lengths = (segments > 0).sum(dim=1, dtype=torch.float64)
    return {COSINE: (together - alone).sum(), _PAIRS: (lengths * (lengths - 1)).sum()}


def columns_of(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean cosine, from sums over any number of forwards; nothing where there is no pair."""
    pairs = float(sums.get(_PAIRS, 0.0))
    return {COSINE: float(sums[COSINE]) / pairs} if pairs else {}
