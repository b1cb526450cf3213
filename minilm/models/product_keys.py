"""The best of side x side slots, found by looking at 2 x side scores: product keys (Lample et al., arXiv 1907.05242).

A slot is a cell of a square grid, and its score is a sum: score of its row + score of its column. So the k best
cells lie among the k best rows and the k best columns, and of those k x k pairs only few can be meant: the cell of
the i-th best row and the j-th best column is beaten by all (i' <= i, j' <= j), that is by i x j - 1 others (i and j
from 1), so it is among the k best only if i x j <= k. At k = 64 these are 280 pairs of 4,096, and the result is
exact: the tests hold it against all cells.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_cells(rows: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores of rows and columns [..., side] -> the k best sums and their slots, [..., k] each, best first.

    slot = row x side + column, int64. Scores keep their gradient. k is at most side^2. The scores should be float32
    or better: in bfloat16 some 3 % of the chosen are others.
    """
    side = rows.shape[-1]
    if not 1 <= k <= side * side:
        raise ValueError(
            f"k is {k}, but a grid of {side} x {side} has 1 to {side * side} cells to choose from"
        )
    top = min(k, side)
    row_scores, row_index = rows.topk(top, dim=-1)  # sorted: the pruning below needs it
    column_scores, column_index = columns.topk(top, dim=-1)
    first, second = _pairs(k, top, rows.device)
    sums = row_scores[..., first] + column_scores[..., second]  # [..., pairs]
    scores, chosen = sums.topk(k, dim=-1)
    cells = row_index[..., first] * side + column_index[..., second]
    return scores, cells.gather(-1, chosen)


def _pairs(k: int, top: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) of rows and columns that can make one of the k best cells."""
    pairs = [(i, j) for i in range(top) for j in range(min(top, k // (i + 1)))]
    first, second = torch.tensor(pairs, device=device).T
    return first, second
