"""The benchmark of the data: it runs, it notices other ids, and the order of an epoch is never a list."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from benchmark_modules import imported
from data_stores import random_documents, small_tokenizer, store_of, texts, write_jsonl

from minilm.data.build import build
from minilm.data.rows import Rows

# What is measured once serves many tests: they stay on one worker.
pytestmark = pytest.mark.xdist_group("benchmark_data")


@pytest.fixture(scope="module")
def data():
    """benchmarks/data.py with the modules beside it, as when it is run; forgotten afterwards."""
    with imported("data") as module:
        yield module


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    """The quick way through on documents of which one occurs twice; exit code and record."""
    folder = tmp_path_factory.mktemp("benchmark")
    documents = write_jsonl(folder / "corpus.jsonl", [*texts(28), texts(1)[0]])
    file = folder / "result.json"
    code = data.main(["--quick", "--source", str(documents), "--json", str(file)])
    return code, json.loads(file.read_text())


def test_the_quick_way_measures_all_that_the_page_tells(data, written):
    code, record = written
    results = record["results"]
    assert code == 0 and record["benchmark"] == "data"
    assert results["text"]["documents"] == 29
    assert results["text"]["bytes"] == sum(len(text.encode()) for text in [*texts(28), texts(1)[0]])
    assert set(results["loader"]["tokens_per_second"]) == {"packed, 4 rows", "document, 4 rows"}
    (one,) = results["tokenizing"]
    assert one["cores"] == 1 and one["same_ids"]
    assert set(one["megabytes_per_second"]) == {*data.LIBRARY, "Tokenizer.encode_batch", "minilm data build"}
    assert all(found["lowest"] > 0 for found in one["megabytes_per_second"].values())


def test_the_section_tells_the_medians_and_the_command(data, written):
    record = written[1]
    text = data.section(record)
    (one,) = record["results"]["tokenizing"]
    assert text.startswith("## Data\n\n") and record["command"] in text
    assert (
        f"| minilm data build | {one['megabytes_per_second']['minilm data build']['median']:,.2f} (" in text
    )
    assert "id by id, those of the library alone" in text
    one["same_ids"] = False
    assert "The ids in the store differ from the library's (1 cores)" in data.section(record)


def test_a_store_whose_ids_are_not_the_librarys_is_noticed(data, tmp_path, monkeypatch):
    lines = write_jsonl(tmp_path / data.DOCUMENTS, texts(12))
    small_tokenizer().save(tmp_path / data.TOKENIZER)
    honest = build(tmp_path / data.STORE, [str(lines)], small_tokenizer(), validation_fraction=0.0)
    assert data.tokenizing(tmp_path, 1)["same_ids"]

    def lossy(out, sources, tokenizer, **options):
        cut = write_jsonl(tmp_path / "cut.jsonl", [text[:-1] for text in texts(12)])
        return build(out, [str(cut)], tokenizer, **options)

    assert len(data.stored(honest.store)) == 12
    monkeypatch.setattr(data, "build", lossy)
    assert not data.tokenizing(tmp_path, 1)["same_ids"]


def test_batches_are_those_of_a_build(data):
    """Runs of documents of about a megabyte: none lost, none twice."""

    class Sized:
        def __init__(self, num_bytes):
            self.num_bytes = num_bytes

    documents = [Sized(n) for n in (400_000, 400_000, 400_000, 2_000_000, 1, 1)]
    assert list(data.batches(documents)) == [(0, 3), (3, 4), (4, 6)]
    assert list(data.batches([])) == []


def test_the_place_of_a_row_in_a_large_epoch_is_computed_without_a_list_of_its_rows(data, tmp_path):
    """An epoch of some hundred million rows: a list of them would take a gigabyte."""
    store = store_of(tmp_path / "s", {"a": random_documents(200)}, weights={"a": 500_000.0})
    rows = Rows(store, "train", 8)
    assert rows.rows_per_epoch > 10**8
    middle = rows.rows_per_epoch // 2
    tracemalloc.start()
    chosen = rows.order(3, 0, middle, middle + 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6 and len(chosen) == 128 and chosen.min() >= 0 and chosen.max() < len(rows)
    assert data.ordering()["peak_bytes"] < 10**5
