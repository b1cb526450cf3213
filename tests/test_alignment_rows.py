"""What `align` and `from_labels` take, and what they refuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from alignment_oracle import random_rows
from torch import Tensor

from minilm.alignment import Batch, align, from_labels, nll, positions_within, score, score_hidden
from minilm.errors import DataError
from minilm.models import cache


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_rows_of_any_integer_type_become_int64(dtype: str) -> None:
    """The store keeps ids in the smallest unsigned type; torch itself can do little with some of them."""
    tokens = np.array([[3, 4, 5, 6, 0]]).astype(dtype)
    segments = np.array([[1, 1, 2, 2, 0]]).astype(dtype)
    batch = align(torch.from_numpy(tokens), torch.from_numpy(segments))
    assert batch.inputs.tolist() == [[3, 4, 5, 6]] and batch.targets.tolist() == [[4, 5, 6, 0]]
    assert batch.weights.tolist() == [[1, 0, 1, 0]] and batch.positions.tolist() == [[0, 1, 0, 1]]
    assert {x.dtype for x in (batch.inputs, batch.targets, batch.segments, batch.positions)} == {torch.int64}
    assert batch.weights.dtype == torch.float32


def test_ids_above_the_signed_range_of_their_bits_survive() -> None:
    tokens = torch.from_numpy(np.array([[40_000, 65_535]], dtype=np.uint16))
    batch = align(tokens, torch.ones(1, 2, dtype=torch.long))
    assert (batch.inputs.item(), batch.targets.item()) == (40_000, 65_535)


def test_writing_to_one_field_leaves_the_others_and_the_rows_alone() -> None:
    """Inputs and targets cut from one row overlap: as views, a changed input would be a changed target."""
    tokens, segments = torch.tensor([[3, 1, 4, 1, 5]]), torch.ones(1, 5, dtype=torch.long)
    batch = align(tokens, segments)
    batch.inputs[:] = 9
    batch.segments[:] = 9
    assert batch.targets.tolist() == [[1, 4, 1, 5]] and batch.weights.sum() == 4
    assert tokens.tolist() == [[3, 1, 4, 1, 5]] and segments.tolist() == [[1] * 5]


@pytest.mark.parametrize(
    ("tokens", "segments", "learn", "message"),
    [
        (torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long), None, "at least 2 tokens"),
        (torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.long), None, "at least 2 tokens"),
        (torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.long), None, "segments has shape"),
        (torch.zeros(2, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long), None, "segments has shape"),
        (torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.long), None, "tokens must be integers"),
        (
            torch.zeros(2, 4, dtype=torch.complex64),
            torch.ones(2, 4, dtype=torch.long),
            None,
            "must be integers",
        ),
        (
            torch.zeros(2, 4, dtype=torch.long),
            torch.ones(2, 4, dtype=torch.bool),
            None,
            "segments must be integers",
        ),
        (
            torch.zeros(2, 4, dtype=torch.long),
            torch.ones(2, 4).long(),
            torch.ones(2, 3).bool(),
            "learn has shape",
        ),
        (
            torch.zeros(2, 4, dtype=torch.long),
            torch.ones(2, 4).long(),
            torch.full((2, 4), -100),
            "learn must be bool",
        ),
        (
            torch.zeros(2, 4, dtype=torch.long),
            torch.ones(2, 4).long(),
            torch.ones(2, 4),
            "learn must be bool",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    tokens: Tensor, segments: Tensor, learn: Tensor | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        align(tokens, segments, learn)


@pytest.mark.parametrize(
    ("segments", "fits"),
    [
        ([1, 1, 2, 2], True),
        ([0, 1, 0, 2], True),
        ([3, 3, 0, 7], True),
        ([0, 0, 0, 0], True),
        ([1, 0, 1, 1], False),  # one document with a hole: a mask would join it, a border finder would not
        ([1, 2, 1, 1], False),
        ([2, 2, 1, 1], False),
        ([2, 0, 1, 1], False),
        ([1, 1, -1, 2], False),
        ([-1, -1, -1, -1], False),
    ],
)
def test_documents_are_unbroken_runs_numbered_upward(segments: list[int], fits: bool) -> None:
    rows = torch.tensor([[1, 1, 1, 1], segments])
    if fits:
        assert align(torch.zeros(2, 4, dtype=torch.long), rows).segments[1].tolist() == segments[:-1]
    else:
        with pytest.raises(DataError, match="segments of row 1"):
            align(torch.zeros(2, 4, dtype=torch.long), rows)


def test_fields_of_a_batch_have_one_shape() -> None:
    """weights [B, 1] would broadcast: a loss over all positions divided by a count of rows."""
    batch = align(*random_rows(2, 5, 7))
    with pytest.raises(DataError, match="one shape"):
        Batch(batch.inputs, batch.segments, batch.positions, batch.targets, batch.weights[:, :1])


def test_entries_stand_where_their_token_is_predicted() -> None:
    """By hand: the entry of a first token, of padding and of an unlearnt token belongs to no prediction."""
    tokens = torch.tensor([[1, 5, 6, 2, 1, 7, 0]])
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 0]])
    entries = torch.tensor([[9, -1, 4, 4, 8, 0, 3]], dtype=torch.int32)
    batch = align(tokens, segments, None, entries)
    assert batch.entries is not None and batch.entries.dtype == torch.int64
    #                                 5   6  2  |    7  pad
    assert batch.entries.tolist() == [[-1, 4, 4, -1, 0, -1]]
    learn = torch.tensor([[True, True, False, True, True, True, True]])
    learnt = align(tokens, segments, learn, entries).entries
    assert learnt is not None and learnt.tolist() == [[-1, -1, 4, -1, 0, -1]]
    assert align(tokens, segments).entries is None


def test_parts_and_copies_of_a_batch_keep_its_entries() -> None:
    tokens, segments = random_rows(3, 5, 7)
    batch = align(tokens, segments, None, torch.arange(18).view(3, 6))
    assert batch.entries is not None
    part, copy = batch.rows(1, 3), batch.to("cpu")
    assert part.entries is not None and torch.equal(part.entries, batch.entries[1:3])
    assert copy.entries is not None and torch.equal(copy.entries, batch.entries)
    plain = align(tokens, segments)
    assert plain.rows(0, 1).entries is None and plain.to("cpu").entries is None
    batch.entries[0] = 5  # a batch owns its fields
    assert part.entries is not None and torch.equal(part.entries, batch.rows(1, 3).entries)


def test_documents_are_counted_as_a_batch_leaves_the_host() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 0, 0, 3], [0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]])
    batch = align(torch.arange(21).view(3, 7), segments)
    assert batch.documents is None and batch.to("cpu").documents is None
    gone = batch.to("meta")  # any device that is not the host's
    assert gone.documents == 3 + 1 + 6  # the last token of a row is no input
    assert gone.to("meta").documents == 10
    # Of other rows the number would be wrong.
    assert gone.rows(0, 1).documents is None
    assert dataclasses.replace(gone, segments=gone.segments).documents is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.long), "entries has shape"),
        (torch.zeros(2, 6), "entries must be integers"),
        (torch.zeros(2, 6, dtype=torch.bool), "entries must be integers"),
        (torch.full((2, 6), -100), "entries has the value -100"),
    ],
)
def test_entries_that_do_not_fit_are_refused(entries: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        align(*random_rows(2, 5, 7), None, entries)
    batch = align(*random_rows(2, 5, 7))
    with pytest.raises(DataError, match="one shape"):
        dataclasses.replace(batch, entries=torch.zeros(2, 1, dtype=torch.long))


def test_logits_and_hidden_states_of_another_shape_are_refused() -> None:
    """Born from `eval-slice-off-by-one`: logits that were cut before the loss."""
    batch = align(*random_rows(2, 5, 7))
    for shape in ((2, 4, 7), (1, 5, 7), (10, 7), (2, 5)):
        with pytest.raises(DataError, match=r"logits are .* nothing may be cut off"):
            nll(torch.zeros(shape), batch)
        with pytest.raises(DataError, match="have shape"):
            score_hidden(torch.zeros(shape), torch.zeros(9, 7), batch)
    for chunk in (0, -1):
        with pytest.raises(ValueError, match="at least 1 position"):
            score_hidden(torch.zeros(2, 5, 3), torch.zeros(7, 3), batch, chunk=chunk)


@pytest.mark.parametrize("wrong", [-100, -1, 7])
def test_a_target_outside_the_vocabulary_is_never_counted_as_zero_nats(wrong: int) -> None:
    """-100 is what `cross_entropy` skips by itself: counted in the tokens, it would make the mean too low."""
    batch = align(torch.tensor([[1, 2, wrong]]), torch.ones(1, 3, dtype=torch.long))
    for compute in (
        lambda: score(torch.zeros(1, 2, 7), batch),
        lambda: score_hidden(torch.zeros(1, 2, 3), torch.zeros(7, 3), batch),
    ):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            compute()


def test_labels_of_another_shape_are_refused() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(DataError, match="labels has shape"):
        from_labels(ids, ids[:, 1:])
    with pytest.raises(DataError, match="attention_mask has shape"):
        from_labels(ids, ids, ids[None])


def test_the_positions_that_models_make_are_those_of_the_alignment_layer() -> None:
    """Models import no alignment and have a function of their own: a batch and a bare forward must agree."""
    _, segments = random_rows(50, 12, 7)
    segments[::3, :4] = 0  # padding on the left
    assert torch.equal(positions_within(segments), cache.positions_within(segments))
