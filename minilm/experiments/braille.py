"""Curves of characters: each holds 2 x 4 dots of Unicode's braille block, or one dot where there is no Unicode."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # row from above, column
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=*#"


def curve(
    points: Sequence[tuple[float, float]],
    width: int,
    height: int,
    *,
    limits: tuple[float, float],
    plain: bool,
) -> list[str]:
    """`height` lines of `width` characters, the highest values first.

    points  (x, y) with x rising; columns between two points are filled along the straight line
    limits  y at the lower and the upper border; what lies beyond is not drawn
    plain   ASCII alone
    """
    across, up = (1, 1) if plain else (2, 4)
    columns, rows = width * across, height * up
    cells = [[0] * width for _ in range(height)]
    low, high = limits
    scale = (rows - 1) / (high - low) if high > low else 0.0
    last: int | None = None
    for column, y in enumerate(sampled(points, columns)):
        if y is None:
            continue
        row = round((min(max(y, low), high) - low) * scale) if scale else rows // 2
        if not low <= y <= high:
            last = row
            continue
        # A steep line has no holes: dots from the neighbour's height to this one.
        for place in range(row, row + 1) if last is None else range(*_between(last, row)):
            above = rows - 1 - place
            dot = 1 if plain else _DOTS[above % up][column % across]
            cells[above // up][column // across] |= dot
        last = row
    if plain:
        return ["".join("*" if cell else " " for cell in line) for line in cells]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in line) for line in cells]


def sparkline(points: Sequence[tuple[float, float]], width: int, *, plain: bool) -> str:
    """One line of bars, from the lowest to the highest value of the points."""
    values = sampled(points, width)
    known = [y for y in values if y is not None]
    if not known:
        return ""
    bars = _PLAIN_BARS if plain else _BARS
    low, high = min(known), max(known)
    size = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if y is None else bars[round((y - low) * size)] for y in values)


def _between(last: int, row: int) -> tuple[int, int]:
    return (last + 1, row + 1) if row > last else (row, last) if row < last else (row, row + 1)


def sampled(points: Sequence[tuple[float, float]], columns: int) -> list[float | None]:
    """One y a column, None without points: the middle of the points in it, or on the line between those beside it."""
    if not points:
        return [None] * columns
    start, span = points[0][0], points[-1][0] - points[0][0]
    if span <= 0:
        return [points[-1][1], *[None] * (columns - 1)]
    held: list[list[float]] = [[] for _ in range(columns)]
    for x, y in points:
        held[min(int((x - start) / span * columns), columns - 1)].append(y)
    values: list[float | None] = [sum(ys) / len(ys) if ys else None for ys in held]
    known = [column for column, y in enumerate(values) if y is not None]
    for left, right in itertools.pairwise(known):
        a, b = values[left], values[right]
        assert a is not None and b is not None
        for column in range(left + 1, right):
            values[column] = a + (b - a) * (column - left) / (right - left)
    return values
