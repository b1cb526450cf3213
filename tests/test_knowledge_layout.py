"""Entries on the grid: an exact bijection, evenly filled, near codes in the same rows and columns."""

from __future__ import annotations

import numpy as np
import pytest

from minilm.knowledge.layout import occupied, place, principal_components


def clustered(num_entries: int, *, centres: int = 64, seed: int = 0) -> np.ndarray:
    """Codes [n, 16] around few centres, of length 1."""
    draw = np.random.default_rng(seed)
    codes = draw.normal(size=(centres, 16))[draw.integers(0, centres, num_entries)]
    codes = codes + 0.4 * draw.normal(size=codes.shape)
    return (codes / np.linalg.norm(codes, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("num_entries", "side"), [(0, 4), (1, 4), (1, 1), (7, 4), (16, 4), (300, 32), (1024, 32)]
)
def test_every_entry_has_a_cell_of_its_own_and_rows_and_columns_are_evenly_filled(
    num_entries: int, side: int
) -> None:
    slots = place(clustered(num_entries), side)
    assert slots.dtype == np.int32 and len(set(slots.tolist())) == num_entries
    grid = np.zeros((side, side), dtype=int)
    np.add.at(grid, (slots // side, slots % side), 1)
    assert grid.max(initial=0) <= 1
    for counts in (grid.sum(0), grid.sum(1)):
        assert counts.max() - counts.min() <= 1 and counts.sum() == num_entries
    assert np.array_equal(grid.astype(bool), occupied(num_entries, side))


def test_the_empty_cells_of_a_row_are_spread_over_it() -> None:
    cells = occupied(32 * 8, 32)
    for row in cells:
        gaps = np.diff(np.flatnonzero(np.concatenate([row, row])))  # around the end
        assert gaps.max() <= 2 * 32 // 8


def test_places_are_the_recursive_median_bisection_of_even_and_odd_components() -> None:
    codes, side = clustered(64 * 64), 64
    components = principal_components(codes)

    def cut(entries: list[int], depth: int, axis: np.ndarray) -> list[list[int]]:
        """Halves by the value of one component after another, down to `side` groups."""
        if depth == 6:
            return [entries]
        ordered = sorted(entries, key=lambda n: axis[n, depth % axis.shape[1]])
        half = len(ordered) // 2
        return cut(ordered[:half], depth + 1, axis) + cut(ordered[half:], depth + 1, axis)

    expected = np.empty(len(codes), dtype=int)
    for r, row in enumerate(cut(list(range(len(codes))), 0, components[:, 0::2])):
        for c, cell in enumerate(cut(row, 0, components[:, 1::2])):
            expected[cell] = r * side + c
    assert np.array_equal(place(codes, side), expected)


def test_principal_components_are_uncorrelated_and_fall_in_variance() -> None:
    codes = clustered(500)
    components = principal_components(codes).astype(np.float64)
    covariance = np.cov(components.T)
    variances = np.diag(covariance)
    assert np.abs(covariance - np.diag(variances)).max() < 1e-6
    assert (np.diff(variances) <= 1e-9).all()
    assert variances.sum() == pytest.approx(np.cov(codes.T.astype(np.float64)).trace(), rel=1e-5)


def found(codes: np.ndarray, slots: np.ndarray, side: int, k: int) -> float:
    """Share of entries among the k best cells by distance to the mean codes of rows and columns."""
    grid = np.zeros((side * side, codes.shape[1]))
    grid[slots] = codes
    grid = grid.reshape(side, side, -1)
    distances = [((codes[:, None] - m[None]) ** 2).sum(-1) for m in (grid.mean(1), grid.mean(0))]
    cells = (distances[0][:, :, None] + distances[1][:, None, :]).reshape(len(codes), -1)
    return float(((cells < cells[np.arange(len(codes)), slots][:, None]).sum(1) < k).mean())


def test_product_keys_find_entries_on_this_grid_and_not_on_a_random_one() -> None:
    side = 32
    codes = clustered(side * side)
    random = np.random.default_rng(0).permutation(side * side)
    assert found(codes, place(codes, side), side, 16) > 3 * found(codes, random, side, 16)


def test_the_same_codes_give_the_same_places_also_where_codes_are_equal() -> None:
    draw = np.random.default_rng(1)
    kinds = draw.integers(0, 8, 4096)
    codes = np.eye(8, dtype=np.float32)[kinds]
    slots = place(codes, 64)
    assert np.array_equal(slots, place(codes.copy(), 64))
    for kind in range(8):  # equal codes stand in the order of the entries
        assert (np.diff(slots[kinds == kind]) > 0).all()


@pytest.mark.parametrize(("num_entries", "side"), [(17, 4), (4, 3), (1, 0)])
def test_a_grid_that_cannot_be_is_refused(num_entries: int, side: int) -> None:
    with pytest.raises(ValueError, match="side"):
        place(clustered(num_entries), side)
