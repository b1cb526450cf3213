"""The best cells of a grid, held against all cells."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.models.product_keys import _pairs, best_cells


def brute(rows, columns, k):
    """Scores of all cells, sorted; cell r x side + c."""
    cells = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2)
    return cells.sort(dim=-1, descending=True, stable=True).values[..., :k], cells


@pytest.mark.parametrize("k", [1, 8, 16, 64, "side", "all"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 16), (7, 64)])
def test_the_best_cells_are_those_of_all_cells(shape, k):
    """pk-topk-not-exact, mem-index-off-by-one, pk-einsum-drops-n: in float64 there are no chance ties."""
    side = shape[-1]
    k = {"side": side, "all": side * side}.get(k, k)
    generator = torch.Generator().manual_seed(side)
    rows, columns = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if k > side * side:
        pytest.skip("more than there are")
    scores, slots = best_cells(rows, columns, k)
    wanted, cells = brute(rows, columns, k)
    assert torch.equal(scores, wanted)
    assert torch.equal(cells.gather(-1, slots), wanted)  # each score stands under its own number
    ordered = slots.sort(dim=-1).values
    assert bool((ordered.diff(dim=-1) > 0).all())  # nobody twice
    gaps = cells.sort(dim=-1, descending=True).values
    assert k == side * side or float((gaps[..., k - 1] - gaps[..., k]).min()) > 1e-12
    assert torch.equal(ordered, cells.topk(k, dim=-1).indices.sort(dim=-1).values)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_the_best_cells_are_exact_with_ties_and_any_numbers(data):
    """Few different values: most scores tie, and the choice among equals is free, but never twice the same cell."""
    side = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, side * side))
    values = st.lists(st.integers(-3, 3), min_size=side, max_size=side)
    rows, columns = (torch.tensor([data.draw(values)], dtype=torch.float64) for _ in range(2))
    scores, slots = best_cells(rows, columns, k)
    wanted, cells = brute(rows, columns, k)
    assert torch.equal(scores, wanted)
    assert torch.equal(cells.gather(-1, slots), wanted)
    assert len(set(slots[0].tolist())) == k


def test_minus_infinity_comes_last_and_only_when_nothing_else_is_left():
    rows, columns = torch.tensor([0.0, -torch.inf, 1.0]), torch.tensor([0.5, 0.0, -torch.inf])
    scores, slots = best_cells(rows, columns, 5)
    assert slots[:4].tolist() == [6, 7, 0, 1] and scores[4] == -torch.inf


def test_few_pairs_are_looked_at():
    assert {k: _pairs(k, k, torch.device("cpu"))[0].numel() for k in (16, 32, 64)} == {
        16: 50,
        32: 119,
        64: 280,
    }


def test_scores_hand_their_gradient_to_the_chosen_rows_and_columns():
    rows, columns = (torch.randn(1, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: best_cells(a, b, 5)[0], (rows, columns))
    scores, slots = best_cells(rows, columns, 5)
    scores.sum().backward()
    wanted = torch.bincount(slots[0] // 6, minlength=6), torch.bincount(slots[0] % 6, minlength=6)
    assert rows.grad[0].tolist() == wanted[0].tolist()
    assert columns.grad[0].tolist() == wanted[1].tolist()


@pytest.mark.parametrize("k", [0, 10])
def test_more_than_all_cells_or_none_is_refused(k):
    with pytest.raises(ValueError, match=rf"k is {k}, but a grid of 3 x 3 has 1 to 9"):
        best_cells(torch.zeros(3), torch.zeros(3), k)
