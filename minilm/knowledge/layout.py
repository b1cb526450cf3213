"""Where entries stand on the grid: near codes share a row and a column, and every cell holds at most one entry.

Product keys find an entry as the best sum of a row score and a column score. That works only if a row, and a column,
is about something: a grid filled at random averages to noise, and no training repairs it. So the grid is cut like a
map: the even principal components of the codes address rows, the odd ones columns, by halving at the median again and
again. Halving makes an exact bijection, with no overfull cell and no empty one beyond those that are missing.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def place(codes: Array, side: int) -> Array:
    """int32 [n]: the slot (row * side + column) of each entry, all different.

    codes  [n, C] float32, n <= side * side, C >= 2
    side   a power of two

    Deterministic: equal codes are placed in the order of the entries. Rows hold n / side entries, rounded down or up.
    """
    num_entries = len(codes)
    levels = side.bit_length() - 1
    if side < 1 or side != 1 << levels or num_entries > side * side:
        raise ValueError(f"{num_entries} entries on a grid of side {side}")
    components = principal_components(codes)
    rows, columns = components[:, 0::2], components[:, 1::2]
    cells = occupied(num_entries, side)
    bounds = np.concatenate([[0], np.cumsum(cells.reshape(-1))])  # entries before each cell
    order = np.arange(num_entries)
    for level in range(2 * levels):
        axis, depth = (rows, level) if level < levels else (columns, level - levels)
        step = side * side >> level
        order = _sort_within(order, bounds[::step], axis[:, depth % axis.shape[1]])
    slots = np.empty(num_entries, dtype=np.int32)
    slots[order] = np.flatnonzero(cells.reshape(-1)).astype(np.int32)
    return slots


def principal_components(codes: Array) -> Array:
    """float32 [n, C]: the codes in the axes of their variance, largest first; signs fixed, so that it is repeatable."""
    if len(codes) == 0:
        return codes
    mean = codes.mean(axis=0, dtype=np.float64)
    second = np.zeros((codes.shape[1],) * 2)
    for begin in range(0, len(codes), 1 << 16):
        part = codes[begin : begin + (1 << 16)] - mean
        second += part.T @ part
    _, axes = np.linalg.eigh(second)
    axes = axes[:, ::-1]
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    axes = axes * np.where(largest < 0, -1.0, 1.0)
    return codes @ axes.astype(np.float32)


def occupied(num_entries: int, side: int) -> Array:
    """bool [side, side]: which cells hold an entry. Counts of rows differ by at most one, and counts of columns too.

    The columns are dealt out like cards, round after round, in the order of their reversed binary digits: that puts
    the cells of a row at even distances, and no column is empty in every row, where its key would stand for nothing.
    """
    levels = side.bit_length() - 1
    index = np.arange(side)
    dealt = sum(((index >> bit) & 1) << (levels - 1 - bit) for bit in range(levels)) + 0 * index
    number = np.arange(num_entries, dtype=np.int64)
    cells = np.zeros((side, side), dtype=bool)
    cells[number * side // max(1, num_entries), dealt[number % side]] = True
    return cells


def _sort_within(order: Array, bounds: Array, values: Array) -> Array:
    """`order`, sorted by `values` inside each group order[bounds[g] : bounds[g + 1]]."""
    sizes = np.diff(bounds)
    widest = int(sizes.max())
    if widest < 2:
        return order
    inside = np.arange(widest) < sizes[:, None]
    table = np.full(inside.shape, np.inf, dtype=np.float32)
    table[inside] = values[order]
    ranks = np.argsort(table, axis=1, kind="stable") + bounds[:-1, None]
    sorted_order: Array = order[ranks[inside]]
    return sorted_order
