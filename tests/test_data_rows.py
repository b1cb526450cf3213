"""Rows: the ledger of tokens, a slow second construction, and the order of an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_stores import random_documents, store_of
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.alignment import align
from minilm.data.permutation import Permutation
from minilm.data.rows import Rows
from minilm.errors import ConfigError, DataError

some_documents = st.lists(st.integers(1, 25), min_size=1, max_size=25).filter(lambda sizes: sum(sizes) > 1)


def slow_rows(documents: list[list[int]], length: int, kind: str) -> list[tuple[list[int], list[int]]]:
    """Rows as the documentation describes them, one token at a time. Padding token 0, segment 0."""
    if kind == "document":
        pieces = [
            [(t, 1) for t in d][a : a + length + 1] for d in documents for a in range(0, len(d) - 1, length)
        ]
        return [_padded(piece, length) for piece in pieces]
    stream = [(t, n) for n, d in enumerate(documents) for t in d]
    rows = []
    for start in range(0, len(stream) - 1, length):
        piece = stream[start : start + length + 1]
        numbers = list(dict.fromkeys(n for _, n in piece))
        rows.append(_padded([(t, numbers.index(n) + 1) for t, n in piece], length))
    return rows


def _padded(piece: list[tuple[int, int]], length: int) -> tuple[list[int], list[int]]:
    full = piece + [(0, 0)] * (length + 1 - len(piece))
    return [t for t, _ in full], [s for _, s in full]


@settings(max_examples=60, deadline=None)
@given(st.data(), some_documents, st.integers(1, 12), st.sampled_from(["packed", "document"]))
def test_rows_equal_a_slow_construction(tmp_path_factory, data, sizes, length, kind) -> None:
    split = data.draw(st.integers(0, len(sizes) - 1))
    documents, token = [], 1
    for size in sizes:  # every token is another one, so that a wrong place cannot look right
        documents.append(list(range(token, token + size)))
        token += size
    if sum(sizes[:split]) < 2 or sum(sizes[split:]) < 2:
        sources = {"a": documents}
    else:
        sources = {"a": documents[:split], "b": documents[split:]}
    store = store_of(tmp_path_factory.mktemp("store") / "s", sources, vocab_size=1000)
    expected = [row for of_source in sources.values() for row in slow_rows(of_source, length, kind)]
    if not expected:
        with pytest.raises(ConfigError, match="There are no rows"):
            Rows(store, "train", length, kind)
        return
    rows = Rows(store, "train", length, kind)
    assert len(rows) == len(expected)
    tokens, segments = rows.batch(np.arange(len(rows)))
    assert tokens.dtype == segments.dtype == np.int64
    assert list(zip(tokens.tolist(), segments.tolist(), strict=True)) == expected
    shuffled = np.random.default_rng(0).permutation(len(rows))
    assert rows.batch(shuffled)[0].tolist() == [expected[i][0] for i in shuffled]
    one_tokens, one_segments = rows[len(rows) - 1]
    assert (one_tokens.tolist(), one_segments.tolist()) == expected[-1]


@pytest.mark.parametrize("kind", ["packed", "document"])
@pytest.mark.parametrize("length", [1, 4, 7, 64])
def test_every_token_of_a_document_but_its_first_is_a_target_exactly_once_per_epoch(
    tmp_path: Path, kind: str, length: int
) -> None:
    """The ledger: the bugs truncation-silent, last-partial-dropped, pack-label-across-docs, eos-masked-pad-eq-eos."""
    documents, token = {"a": [], "b": []}, 1
    for n in range(60):
        size = 1 + (n * 7) % 23
        documents["ab"[n % 2]].append(list(range(token, token + size)))
        token += size
    rows = Rows(store_of(tmp_path / "s", documents, vocab_size=token), "train", length, kind)
    predicted: Counter[tuple[int, int]] = Counter()
    order = rows.order(0, seed=5)
    for start in range(0, len(order), 8):
        tokens, segments = rows.batch(order[start : start + 8])
        batch = align(torch.from_numpy(tokens), torch.from_numpy(segments))
        counted = batch.weights > 0
        predicted.update(zip(batch.inputs[counted].tolist(), batch.targets[counted].tolist(), strict=True))
    everything = [d for of_source in documents.values() for d in of_source]
    assert predicted == Counter((d[i - 1], d[i]) for d in everything for i in range(1, len(d)))
    assert predicted.total() == rows.num_targets


def test_segments_are_restarted_where_a_document_goes_on_in_the_next_row(tmp_path: Path) -> None:
    rows = Rows(store_of(tmp_path / "s", {"a": [[1, 2, 3, 4, 5, 6], [7, 8]]}), "train", 4)
    assert [part.tolist() for part in rows[0]] == [[1, 2, 3, 4, 5], [1, 1, 1, 1, 1]]
    assert [part.tolist() for part in rows[1]] == [[5, 6, 7, 8, 0], [1, 1, 2, 2, 0]]


def test_places_name_source_and_documents(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", {"a": [[1, 2, 3], [4, 5]], "b": [[6, 7, 8, 9]]})
    places = Rows(store, "train", 4).places(np.array([0, 1]))
    assert [(p.source, p.first_document, p.last_document) for p in places] == [("a", 0, 1), ("b", 0, 0)]
    assert str(places[0]) == "row 0: a documents 0 to 1"
    assert [str(p) for p in Rows(store, "train", 1, "document").places(np.array([2, 5]))] == [
        "row 2: a document 1",
        "row 5: b document 0",
    ]


# --- order


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 20))
def test_permutation_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    image = Permutation(n, seed, epoch)(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permutation_of_a_part_is_a_part_of_the_permutation() -> None:
    whole = Permutation(1001, 3)(np.arange(1001))
    assert np.array_equal(Permutation(1001, 3)(np.arange(500, 520)), whole[500:520])


@pytest.mark.parametrize("n", [1000, 4096, 100_003])
def test_permutation_has_no_local_order(n: int) -> None:
    """The bug poor-permutation: neighbours stay neighbours, and the loss shows waves."""
    for seed in range(5):
        image = Permutation(n, seed)(np.arange(n)).astype(float)
        assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 4 / np.sqrt(n)
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 4 / np.sqrt(n)
        steps = np.abs(np.diff(image)) / n
        assert abs(steps.mean() - 1 / 3) < 4 * np.sqrt(1 / 18 / n)
        assert len(np.unique(np.diff(image))) > 0.5 * n  # an affine map has two different ones


def test_the_largest_number_of_rows_does_not_overflow() -> None:
    n = 10**12
    image = Permutation(n, 0)(np.arange(n - 1000, n))
    assert len(np.unique(image)) == 1000 and image.min() >= 0 and image.max() < n


def test_each_epoch_and_each_seed_has_an_order_of_its_own(tmp_path: Path) -> None:
    """The bugs shuffle-same-every-epoch and data-seed-ignored."""
    rows = Rows(store_of(tmp_path / "s", {"a": random_documents(200)}), "train", 8)
    orders = {(seed, epoch): tuple(rows.order(epoch, seed)) for seed in range(3) for epoch in range(4)}
    assert len(set(orders.values())) == 12
    assert {tuple(sorted(order)) for order in orders.values()} == {tuple(range(len(rows)))}


def test_sources_are_mixed_anew_in_each_epoch_and_passes_are_walked_in_another_order(tmp_path: Path) -> None:
    sources = {"a": random_documents(100), "b": random_documents(100, seed=1)}
    rows = Rows(store_of(tmp_path / "s", sources, weights={"b": 0.25}), "train", 8)
    first_of_b = len(Rows(store_of(tmp_path / "t", {"a": sources["a"]}), "train", 8))
    mixed = [tuple(rows.order(epoch, 0) >= first_of_b) for epoch in range(4)]
    assert len(set(mixed)) == 4
    # The quarters of the second pass are not those of the first, nor are they those of another seed.
    quarters = [frozenset(r for r in rows.order(epoch, 0).tolist() if r >= first_of_b) for epoch in range(8)]
    others = [frozenset(r for r in rows.order(epoch, 1).tolist() if r >= first_of_b) for epoch in range(8)]
    assert len(set(quarters) | set(others)) == 16


def test_order_is_a_function_of_seed_and_epoch_alone(tmp_path: Path) -> None:
    rows = Rows(store_of(tmp_path / "s", {"a": random_documents(100)}), "train", 8)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = rows.order(3, 7)
    assert np.array_equal(first[20:30], rows.order(3, 7, 20, 30))
    # The bug rng-stolen-by-lib: nobody else's random numbers are touched.
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


# --- weights


def test_weights_are_passes_per_epoch_and_fractions_walk_on(tmp_path: Path) -> None:
    """The bug mixture-rounding: sources truncated, or rows repeated while others are never seen."""
    sources = {name: random_documents(200, seed=n) for n, name in enumerate("abc")}
    store = store_of(tmp_path / "s", sources, weights={"b": 2.0, "c": 0.25})
    rows = Rows(store, "train", 8)
    sizes = {name: -(-(sum(map(len, d)) - 1) // 8) for name, d in sources.items()}
    first = dict(zip("abc", np.cumsum([0, sizes["a"], sizes["b"]]), strict=True))
    taken = {"a": sizes["a"], "b": 2 * sizes["b"], "c": round(0.25 * sizes["c"])}
    assert rows.rows_per_epoch == sum(taken.values())
    total: Counter[int] = Counter()
    for epoch in range(4):
        order = Counter(rows.order(epoch, 1).tolist())
        for name in "abc":
            own = {r: c for r, c in order.items() if first[name] <= r < first[name] + sizes[name]}
            assert sum(own.values()) == taken[name]
            if name != "c":
                assert set(own.values()) == {1 if name == "a" else 2}
        total += order
    of_c = [total[r] for r in range(first["c"], first["c"] + sizes["c"])]
    # Four quarters: all of them once, up to the rounding of a quarter.
    assert sum(abs(count - 1) for count in of_c) <= 4


def test_weights_of_the_settings_replace_those_of_the_store(tmp_path: Path) -> None:
    sources = {"a": random_documents(50), "b": random_documents(50, seed=1)}
    store = store_of(tmp_path / "s", sources)
    only_b = Rows(store, "train", 8, weights={"a": 0})
    assert {p.source for p in only_b.places(only_b.order(0, 0))} == {"b"}
    with pytest.raises(ConfigError, match=r"(?s)names 'x'.*weight of a is -1"):
        Rows(store, "train", 8, weights={"x": 1, "a": -1})
    with pytest.raises(ConfigError, match="There are no rows"):
        Rows(store, "train", 8, weights={"a": 0, "b": 0})


def test_wrong_uses_are_explained(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", {"a": [[1, 2, 3]]})
    with pytest.raises(ConfigError, match="packed or document"):
        Rows(store, "train", 8, "stacked")
    with pytest.raises(ConfigError, match="sequence_length is 0"):
        Rows(store, "train", 0)
    with pytest.raises(DataError, match="no validation documents"):
        Rows(store, "validation", 8)
    with pytest.raises(DataError, match="no split 'test'"):
        Rows(store, "test", 8)
    with pytest.raises(IndexError):
        Rows(store, "train", 8)[1]
