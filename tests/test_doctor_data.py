"""Our own data passes the checks of data, and fails them when a store, the rows or the loader is broken."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_stores import random_documents, small_tokenizer, store_of, texts, write_jsonl

from minilm.alignment import Batch, align
from minilm.data import loader as loaders
from minilm.data import rows as row_module
from minilm.data.build import build
from minilm.data.loader import Data, DataConfig, Loader, open_data
from minilm.data.rows import Rows
from minilm.data.store import Shard, Store
from minilm.data.tokenizer import Tokenizer
from minilm.doctor.core import Finding, run_checks, select
from minilm.doctor.targets import our_data
from minilm.doctor.targets.our_data import data_subject, rows_of
from minilm.errors import DataError

# What a store with one source, without worker processes, cannot be asked for.
NOT_RUN = {"mixture_shares", "worker_shares"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "texts.jsonl", texts(300, longest=80))
    build(folder / "store", [str(source)], small_tokenizer(), validation_fraction=0.08)
    return folder / "store"


@pytest.fixture(params=["packed", "document"])
def data(store: Path, request: pytest.FixtureRequest) -> Data:
    return opened(store, request.param)


def opened(store: Path, kind: str = "packed") -> Data:
    return open_data(DataConfig(store=str(store), sequence_length=32, rows=kind))  # type: ignore[arg-type]


def found(data: Data, *names: str, **settings: Any) -> dict[str, Finding]:
    subject = data_subject(data, **{"batch_rows": 16, **settings})
    return {f.check: f for f in run_checks(subject, select(only=names or ["data"]))}


def failed(data: Data, name: str, bug: str, **settings: Any) -> Finding:
    finding = found(data, name, **settings)[name]
    assert finding.status == "FAIL", finding.message
    assert bug in finding.bugs
    return finding


def test_our_data_passes_every_check_that_it_can_be_asked_for(data: Data) -> None:
    for name, finding in found(data).items():
        wanted = "NOT RUN" if name in NOT_RUN else "PASS"
        assert finding.status == wanted, f"{name}: {finding.message}\n{finding.details.get('traceback', '')}"


def test_an_excerpt_of_a_large_store_passes_and_says_what_it_is(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(our_data, "MAX_TOKENS", 4000)
    findings = found(data)
    assert {f.status for n, f in findings.items() if n not in NOT_RUN} == {"PASS"}, findings
    assert "the first " in findings["document_borders"].message
    view = data_subject(data).data
    assert view is not None and view.documents is not None
    assert sum(map(len, view.documents("train"))) <= 4000


def test_synthetic_data_without_tokenizer_and_two_weighted_sources_pass(tmp_path: Path) -> None:
    sources = {"a": random_documents(150, longest=60), "b": random_documents(120, longest=60, seed=1)}
    held = {"a": random_documents(20, longest=60, seed=2)}
    weights = {"a": 1.5, "b": 0.5}
    data = Data(
        Rows(store_of(tmp_path / "s", sources, validation=held, weights=weights), "train", 16), None, None
    )
    findings = found(data)
    for name in (
        "mixture_shares",
        "token_ids",
        "document_borders",
        "rank_shares",
        "resumed_order",
        "epoch_order",
    ):
        assert findings[name].status == "PASS", f"{name}: {findings[name].message}"
    assert findings["epoch_ledger"].status == "NOT RUN" and "weights" in findings["epoch_ledger"].message
    assert findings["vocabulary"].status == "NOT RUN"


def test_weights_rounded_down_are_found(tmp_path: Path) -> None:
    sources = {"a": random_documents(150, longest=60), "b": random_documents(120, longest=60, seed=1)}
    store = store_of(tmp_path / "s", sources, weights={"a": 1.5, "b": 1.0})
    rows = Rows(store, "train", 16)
    rows._taken = np.array([p.num_rows for p in rows._parts])
    rows.rows_per_epoch = int(rows._taken.sum())
    failed(Data(rows, None, None), "mixture_shares", "mixture-rounding")


def test_ids_folded_in_the_store_are_found(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Store.shards
    monkeypatch.setattr(
        Store, "shards", lambda self, split: [_with_tokens(s, s.tokens % 256) for s in shards(self, split)]
    )
    assert "tok-uint16-wrap" in failed(data, "token_ids", "tok-id-mod-vocab").bugs


def test_a_store_that_was_altered_on_disk_is_found(store: Path, tmp_path: Path) -> None:
    """Held against the documents that were meant."""
    tokenizer, held = small_tokenizer(), texts(40, seed=9)
    source = write_jsonl(tmp_path / "t.jsonl", held)
    build(tmp_path / "s", [str(source)], tokenizer, validation_fraction=0.0)
    truth = [tokenizer.document(t) for t in held]
    file = next((tmp_path / "s" / "train").glob("*.tokens.bin"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    store_read = Store.open(tmp_path / "s", verify=False)
    data = Data(Rows(store_read, "train", 32), None, tokenizer)
    failed(data, "token_ids", "tok-id-mod-vocab", documents=lambda split: truth if split == "train" else [])


def test_rows_with_one_segment_are_found(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = row_module._segments
    monkeypatch.setattr(row_module, "_segments", lambda *given: (segments(*given) > 0).astype(np.int64))
    failed(opened(store), "document_borders", "pack-label-across-docs")


def test_a_stride_that_skips_a_token_is_found(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = row_module._Part.bounds

    def skipping(self: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts, stops = bounds(self, rows)
        return starts, np.maximum(starts + 1, stops - 1)

    monkeypatch.setattr(row_module._Part, "bounds", skipping)
    failed(opened(store, "document"), "epoch_ledger", "truncation-silent")


def test_an_order_that_ignores_epoch_or_seed_is_found(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Rows.order
    monkeypatch.setattr(Rows, "order", lambda self, epoch, seed, *place: order(self, 0, seed, *place))
    failed(data, "epoch_order", "shuffle-same-every-epoch")
    monkeypatch.setattr(Rows, "order", lambda self, epoch, seed, *place: order(self, epoch, 0, *place))
    failed(data, "epoch_order", "data-seed-ignored")


def test_an_affine_permutation_is_found(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    class Affine:
        def __init__(self, n: int, *key: int | str) -> None:
            self.n, self.offset = n, len(repr(key)) * 31

        def __call__(self, places: np.ndarray) -> np.ndarray:
            return (places + self.offset) % self.n

    monkeypatch.setattr(row_module, "Permutation", Affine)
    finding = found(data, "epoch_order")["epoch_order"]
    assert finding.status == "FAIL", finding.message


def test_ranks_that_get_the_same_rows_are_found(data: Data) -> None:
    failed(data, "rank_shares", "rank-shards-duplicated", loader=_Alone)


def test_a_position_that_is_one_off_or_lost_is_found(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Loader.load_state_dict
    monkeypatch.setattr(
        Loader,
        "load_state_dict",
        lambda self, state: load(self, {**state, "next_step": state["next_step"] + 1}),
    )
    failed(data, "resumed_order", "skip-off-by-one")
    monkeypatch.setattr(Loader, "load_state_dict", lambda self, state: None)
    failed(data, "resumed_order", "data-pos-lost")


def test_a_loss_mask_by_the_id_of_eos_is_found(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    eos = small_tokenizer().eos_id
    masked = lambda tokens, segments, entries=None: align(tokens, segments, tokens != eos, entries)  # noqa: E731
    monkeypatch.setattr(loaders, "align", masked)
    failed(data, "document_ends", "eos-masked-pad-eq-eos")


def test_a_prompt_without_bos_is_found(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "prompt", lambda self, text: self.encode(text))
    monkeypatch.setattr(
        Tokenizer, "document", lambda self, text: [self.bos_id, *self.encode(text), self.eos_id]
    )
    assert failed(data, "encoding", "bos-missing-eval").component == "generation"


def test_validation_documents_in_training_are_found(tmp_path: Path) -> None:
    documents = random_documents(60, longest=60)
    store = store_of(tmp_path / "s", {"a": documents}, validation={"a": documents[50:]})
    data = Data(Rows(store, "train", 16), Rows(store, "validation", 16), None)
    failed(data, "held_out", "train-eval-leak")


def test_a_batch_whose_targets_are_not_the_next_tokens_is_refused() -> None:
    tokens = torch.arange(12).reshape(2, 6)
    batch = align(tokens, torch.ones_like(tokens))
    assert torch.equal(rows_of(batch).tokens, tokens)
    moved = dataclasses.replace(batch, targets=batch.targets + 1)
    with pytest.raises(DataError, match="not the next tokens"):
        rows_of(moved)


def _with_tokens(shard: Shard, tokens: np.ndarray) -> Shard:
    return dataclasses.replace(shard, tokens=tokens)


class _Alone(Loader):
    """Every rank believes to be the first."""

    def _step(self, step: int) -> tuple[list[Batch], int]:
        self.rank = 0
        return super()._step(step)


def test_the_checks_of_data_need_no_more_than_the_view() -> None:
    """None of them asks for a model."""
    known: list[Callable[..., Any]] = [c.function for c in select(only=["data"])]
    assert all(list(inspect.signature(f).parameters) == ["subject"] for f in known)
    assert not any("module" in c.needs or "forward" in c.needs for c in select(only=["data"]))
