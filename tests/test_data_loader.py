"""The loader: the batch of a step is a function of (seed, step) alone, whatever computes it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_stores import random_documents, store_of

from minilm.alignment import Batch, align
from minilm.data.loader import DataConfig, Loader, open_data, validation_batches
from minilm.data.rows import Rows
from minilm.errors import CheckpointError, ConfigError, DataError


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    sources = {"a": random_documents(120), "b": random_documents(60, seed=1)}
    return Rows(
        store_of(tmp_path / "store", sources, validation={"a": random_documents(31, seed=2)}), "train", 8
    )


def joined(batches: list[Batch]) -> Batch:
    parts = [fields(batch) for batch in batches]
    return Batch(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def equal(one: Batch, other: Batch) -> bool:
    mine, theirs = fields(one), fields(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def fields(batch: Batch) -> dict[str, torch.Tensor]:
    """Those that there are: entries may be absent."""
    found = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
    return {name: field for name, field in found.items() if field is not None}


def test_a_step_is_the_same_on_any_number_of_ranks_at_any_micro_batch(rows: Rows) -> None:
    """The bug rank-shards-duplicated, and the promise of the design."""
    for step in (0, 3, 40):
        whole = joined(Loader(rows, batch_rows=16, micro_batch=16, seed=4).step(step))
        for world, micro in ((1, 1), (1, 4), (2, 8), (2, 1), (4, 2)):
            ranks = [
                Loader(rows, batch_rows=16, micro_batch=micro, rank=r, world=world, seed=4)
                for r in range(world)
            ]
            parts = [loader.step(step) for loader in ranks]
            assert {len(part) for part in parts} == {16 // world // micro}
            assert equal(joined([batch for part in parts for batch in part]), whole)


def test_a_step_is_its_rows_in_the_frame_of_align(rows: Rows) -> None:
    loader = Loader(rows, batch_rows=4, micro_batch=4, seed=1)
    tokens, segments = rows.batch(rows.order(1, 1)[8:12])
    expected = align(torch.from_numpy(tokens), torch.from_numpy(segments))
    assert equal(loader.step(loader.steps_per_epoch + 2)[0], expected)


def test_an_epoch_uses_each_row_once_except_the_reported_rest(rows: Rows) -> None:
    """The bug last-partial-dropped: what is left over is known, and is other rows each epoch."""
    loader = Loader(rows, batch_rows=16, micro_batch=16)
    assert loader.steps_per_epoch * 16 + loader.dropped_rows == len(rows)
    assert 0 < loader.dropped_rows < 16
    dropped = []
    for epoch in range(3):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        assert {loader.epoch_of(step) for step in steps} == {epoch}
        used = Counter(place.row for step in steps for place in loader.where(step).rows)
        assert set(used.values()) == {1}
        dropped.append(frozenset(set(range(len(rows))) - set(used)))
        assert len(dropped[-1]) == loader.dropped_rows
    assert len(set(dropped)) == 3


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_iterating_ahead_changes_nothing(rows: Rows, prefetch: int) -> None:
    with Loader(rows, batch_rows=8, micro_batch=4, seed=2, start_step=5, prefetch=prefetch) as loader:
        for step in range(5, 5 + 2 * loader.steps_per_epoch):
            assert loader.next_step == step
            assert equal(joined(next(loader)), joined(loader.step(step)))
    assert not [t for t in threading.enumerate() if t.name == "minilm-data"]


def test_resume_goes_on_with_the_next_step(rows: Rows) -> None:
    """The bugs shuffle-buffer-lost and skip-forever: also beyond the end of the epoch."""
    with Loader(rows, batch_rows=8, micro_batch=8) as first:
        taken = [joined(next(first)) for _ in range(first.steps_per_epoch + 3)]
        state = first.state_dict()
        following = [joined(next(first)) for _ in range(first.steps_per_epoch)]
    assert len(taken) == state["next_step"]
    with Loader(rows, batch_rows=8, micro_batch=2) as second:
        next(second)
        second.load_state_dict(state)
        again = []
        for _ in following:
            again.append(joined(next(second)))
    assert all(equal(a, b) for a, b in zip(following, again, strict=True))


def test_a_state_of_other_data_is_refused_naming_what_differs(rows: Rows, tmp_path: Path) -> None:
    state = Loader(rows, batch_rows=8, micro_batch=8, seed=1).state_dict()
    other_store = store_of(tmp_path / "other", {"a": random_documents(120, seed=9)})
    others = {
        "seed": Loader(rows, batch_rows=8, micro_batch=8, seed=2),
        "batch_rows": Loader(rows, batch_rows=4, micro_batch=4, seed=1),
        "sequence_length": Loader(Rows(rows.store, "train", 9), batch_rows=8, micro_batch=8, seed=1),
        "rows": Loader(Rows(rows.store, "train", 8, "document"), batch_rows=8, micro_batch=8, seed=1),
        "weights": Loader(
            Rows(rows.store, "train", 8, weights={"b": 2}), batch_rows=8, micro_batch=8, seed=1
        ),
        "store": Loader(Rows(other_store, "train", 8), batch_rows=8, micro_batch=8, seed=1),
    }
    for name, loader in others.items():
        with pytest.raises(CheckpointError, match=f"{name} was"):
            loader.load_state_dict(state)
        assert loader.next_step == 0
    with pytest.raises(CheckpointError, match="seed is missing"):
        others["seed"].load_state_dict({"next_step": 3})


def test_numbers_that_do_not_fit_are_refused_naming_the_settings(rows: Rows) -> None:
    with pytest.raises(ConfigError, match=r"10 rows \(train\.batch_size\).*2 x 4 = 8"):
        Loader(rows, batch_rows=10, micro_batch=4, world=2)
    with pytest.raises(
        ConfigError, match=r"more than the \d+ rows of an epoch.*choose a smaller train\.batch_size"
    ):
        Loader(rows, batch_rows=100_000, micro_batch=1)
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*rank 2.*at least 1 row"):
        Loader(rows, batch_rows=0, micro_batch=1, rank=2, world=2)


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(rows: Rows, monkeypatch) -> None:
    with Loader(rows, batch_rows=8, micro_batch=8) as loader:
        next(loader)
        loader.close()
        monkeypatch.setattr(Rows, "batch", lambda *_: (_ for _ in ()).throw(DataError("torn")))
        for _ in range(2):  # and again, instead of waiting for a dead thread
            with pytest.raises(DataError, match="torn"):
                next(loader)


def test_closing_does_not_wait_for_a_full_queue(rows: Rows) -> None:
    loader = Loader(rows, batch_rows=8, micro_batch=8, prefetch=1)
    next(loader)
    time.sleep(0.05)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2


def test_validation_takes_every_row_once_on_any_number_of_ranks(rows: Rows) -> None:
    """The bug uneven-ranks: no row is repeated to make ranks equal, none is left out."""
    held_out = Rows(rows.store, "validation", 8)
    whole = joined(list(validation_batches(held_out, 7)))
    assert whole.shape == (len(held_out), 8)
    tokens, _ = held_out.batch(torch.arange(len(held_out)).numpy())
    assert whole.inputs.tolist() == tokens[:, :8].tolist()
    for world in (2, 3, len(held_out) + 2):
        parts = [batch for r in range(world) for batch in validation_batches(held_out, 4, r, world)]
        assert equal(joined(parts), whole)
    assert sum(int(b.num_targets()) for b in validation_batches(held_out, 7)) == held_out.num_targets


def test_a_limited_validation_is_spread_evenly_and_fixed(rows: Rows) -> None:
    held_out = Rows(rows.store, "validation", 8)
    some = joined(list(validation_batches(held_out, 4, max_rows=10)))
    assert some.shape[0] == 10
    assert equal(some, joined(list(validation_batches(held_out, 3, max_rows=10))))
    whole = joined(list(validation_batches(held_out, 4)))
    chosen = [i * len(held_out) // 10 for i in range(10)]
    assert torch.equal(some.inputs, whole.inputs[chosen])
    assert equal(joined(list(validation_batches(held_out, 4, max_rows=10**6))), whole)


def test_where_names_epoch_source_and_documents(rows: Rows) -> None:
    loader = Loader(rows, batch_rows=4, micro_batch=4)
    found = loader.where(loader.steps_per_epoch)
    assert (found.step, found.epoch, len(found.rows)) == (loader.steps_per_epoch, 1, 4)
    place = found.rows[0]
    shard = next(s for s in rows.shards if s.source == place.source)
    stream = [t for n in range(place.first_document, place.last_document + 1) for t in shard.document(n)]
    first = loader.step(found.step)[0].inputs[0].tolist()
    assert any(stream[i : i + 8] == first[: len(stream[i : i + 8])] for i in range(len(stream)))
    assert f"row {place.row}: {place.source}" in str(found)


def test_open_data_gives_rows_of_both_splits(rows: Rows, tmp_path: Path) -> None:
    store = str(rows.store.path)
    data = open_data(DataConfig(store=store, sequence_length=8))
    assert data.tokenizer is None and len(data.train) == len(rows) and data.validation is not None
    store_of(tmp_path / "bare", {"a": random_documents(20)})
    bare = str(tmp_path / "bare")
    assert open_data(DataConfig(store=bare)).validation is None
    assert open_data(DataConfig(store=bare, validation_store=store)).validation is not None
    with pytest.raises(DataError, match="no validation documents"):
        open_data(DataConfig(store=store, validation_store=bare))
    store_of(tmp_path / "wide", {"a": [[1, 2]]}, validation={"a": [[1, 2]]}, vocab_size=60)
    with pytest.raises(ConfigError, match="vocabulary of 60"):
        open_data(DataConfig(store=store, validation_store=str(tmp_path / "wide")))
