"""Labels in the data: from spans of characters to the place where their token is predicted.

Everything is compared with a slow definition that looks at single characters, through the finished store, its rows
and the batches of the loader.
"""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from data_stores import random_documents, small_tokenizer, store_of, texts, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from minilm.__main__ import main
from minilm.data import labels
from minilm.data.build import build
from minilm.data.labels import KnowledgeSource, spans_of, token_entries, write_entries
from minilm.data.loader import Loader, aligned, validation_batches
from minilm.data.rows import Rows
from minilm.data.show import row_table, row_text
from minilm.data.store import Store
from minilm.errors import DataError


def random_spans(text: str, draw: random.Random) -> list[list[int]]:
    """Disjoint spans of a text in any order, some of which touch, some within words."""
    places = sorted(draw.sample(range(len(text) + 1), min(len(text) + 1, 2 * draw.randint(0, 3))))
    spans = [[start, end, draw.randrange(50)] for start, end in zip(places[::2], places[1::2], strict=True)]
    if spans and spans[0][1] - spans[0][0] > 1:  # two that touch, perhaps in the middle of a token
        start, end, row = spans[0]
        spans[0:1] = [[start, start + 1, row], [start + 1, end, row + 50]]
    draw.shuffle(spans)
    return spans


def slow_labels(text: str, ids: list[int], spans: list[list[int]]) -> list[int]:
    """Each byte of a text has a character, each token the bytes it stands for: count, take the most, else the first."""
    tokenizer = small_tokenizer()
    character = [n for n, c in enumerate(text) for _ in c.encode()]
    found, place = [], 0
    for token in ids:
        size = len(tokenizer.token_bytes(token))
        mine = sorted(set(character[place : place + size]))
        place += size
        counts = [(sum(start <= c < end for c in mine), -start, row) for start, end, row in spans]
        most = max(counts, default=(0, 0, -1))
        found.append(most[2] if most[0] else -1)
    return found


def annotated(path: Path, number: int, seed: int = 0) -> tuple[Path, dict[str, list[list[int]]]]:
    """Documents of which two in three have labels."""
    draw = random.Random(seed)
    spans: dict[str, list[list[int]]] = {}
    with path.open("w", encoding="utf-8") as file:
        for n, text in enumerate(texts(number, seed=seed)):
            record: dict[str, object] = {"text": text}
            spans[text] = [] if n % 3 == 0 else random_spans(text, draw)
            if n % 3:
                record["entries"] = spans[text]
            file.write(json.dumps(record) + "\n")
    return path, spans


def expected(store: Store, split: str, spans: dict[str, list[list[int]]]) -> list[list[int]]:
    """The labels of each document of the store, by the slow definition."""
    tokenizer, found = small_tokenizer(), []
    for shard in store.shards(split):
        for n in range(shard.num_documents):
            ids = shard.document(n).tolist()
            text = tokenizer.decode(ids)
            found.append([-1, *slow_labels(text, ids[1:-1], spans[text]), -1])
    return found


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Store, dict[str, list[list[int]]]]:
    path, spans = annotated(tmp_path / "a.jsonl", 90)
    return build(tmp_path / "store", [str(path)], small_tokenizer(), validation_fraction=0.2).store, spans


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 10**6))
def test_labels_of_tokens_equal_the_count_of_single_characters(seed: int) -> None:
    draw = random.Random(seed)
    [text] = texts(1, seed=seed, longest=12)
    given_spans = random_spans(text, draw)
    spans, problems = spans_of(given_spans, text)
    assert problems == [] and list(spans) == sorted(tuple(s) for s in given_spans)
    [(ids, offsets)] = small_tokenizer().encode_offsets([text])
    assert token_entries(offsets, spans).tolist() == slow_labels(text, ids, given_spans)


def test_a_token_between_two_spans_belongs_to_the_one_with_more_of_it() -> None:
    offsets = [(0, 3), (3, 7), (7, 9)]
    assert token_entries(offsets, [(2, 4, 5), (4, 8, 6)]).tolist() == [5, 6, 6]
    assert token_entries(offsets, [(3, 5, 8), (5, 7, 9)]).tolist() == [-1, 8, -1]  # as many: the first
    assert token_entries(offsets, []).tolist() == [-1, -1, -1]
    with pytest.raises(DataError, match="no token stands for the characters 4 to 6"):
        token_entries([(0, 4), (6, 9)], [(4, 6, 1)])


def test_a_store_keeps_the_labels_of_every_token(labelled: tuple[Store, dict[str, list[list[int]]]]) -> None:
    store, spans = labelled
    for split in ("train", "validation"):
        [shard] = store.shards(split)
        wanted = [x for document in expected(store, split, spans) for x in document]
        assert shard.entries is not None and shard.entries.tolist() == wanted
        assert store.manifest["splits"][split]["sources"]["a"]["labelled"] == sum(x >= 0 for x in wanted) > 20


@pytest.mark.parametrize("kind", ["packed", "document"])
def test_batches_have_each_label_where_its_token_is_predicted(
    labelled: tuple[Store, dict[str, list[list[int]]]], kind: str
) -> None:
    """Over all rows, every labelled token that is a target comes exactly once, with its own id."""
    store, spans = labelled
    rows = Rows(store, "train", 16, kind)
    wanted = sorted(
        (int(token), entry)
        for n, document in enumerate(expected(store, "train", spans))
        for token, entry in list(zip(store.shards("train")[0].document(n), document, strict=True))[1:]
        if entry >= 0
    )
    found = []
    for start in range(0, len(rows), 7):
        batch = aligned(rows, np.arange(start, min(start + 7, len(rows))))
        assert batch.entries is not None
        assert not bool(((batch.entries >= 0) & (batch.weights == 0)).any())
        chosen = batch.entries >= 0
        found += list(zip(batch.targets[chosen].tolist(), batch.entries[chosen].tolist(), strict=True))
    assert sorted(found) == wanted


def test_ranks_and_micro_batches_carry_the_same_labels(
    labelled: tuple[Store, dict[str, list[list[int]]]],
) -> None:
    rows = Rows(labelled[0], "train", 16)
    whole = Loader(rows, batch_rows=8, micro_batch=8, prefetch=0).step(1)[0].entries
    parts = [
        batch.entries
        for rank in range(2)
        for batch in Loader(rows, batch_rows=8, micro_batch=2, rank=rank, world=2, prefetch=0).step(1)
    ]
    assert whole is not None and (whole >= 0).any()
    assert [p.tolist() for part in parts if part is not None for p in part] == whole.tolist()
    held_out = Rows(labelled[0], "validation", 16)
    assert all(batch.entries is not None for batch in validation_batches(held_out, 4))


def test_a_store_without_labels_is_what_it_was_before_there_were_labels(tmp_path: Path) -> None:
    """No file, no key, no other fingerprint: stores that people have stay valid."""
    path = write_jsonl(tmp_path / "a.jsonl", texts(30))
    store = build(tmp_path / "store", [str(path)], small_tokenizer(), validation_fraction=0.2).store
    assert not list(store.path.rglob("*.entries.bin")) and store.entries_of is None
    assert "entries_of" not in store.manifest and "entries_of" not in store.manifest["settings"]
    counts = store.manifest["splits"]["train"]["sources"]["a"]
    assert set(counts) == {"documents", "tokens", "bytes", "tokens_file", "offsets_file"}
    assert set(store.manifest["settings"]["sources"][0]) == {
        "name", "weight", "held_out", "place", "kind", "field", "files",
    }  # fmt: skip
    rows = Rows(store, "train", 16)
    assert rows.entries(np.array([0])) is None and aligned(rows, np.array([0])).entries is None


def test_a_source_without_labels_beside_one_with_labels_has_none_known(tmp_path: Path) -> None:
    path, _ = annotated(tmp_path / "a.jsonl", 30)
    plain = write_jsonl(tmp_path / "b.jsonl", texts(20, seed=9))
    store = build(tmp_path / "s", [str(path), str(plain)], small_tokenizer(), validation_fraction=0.0).store
    assert [shard.entries is None for shard in store.shards("train")] == [False, True]
    rows = Rows(store, "train", 16)
    of_plain = np.arange(len(rows) - 3, len(rows))
    found = rows.entries(of_plain)
    assert found is not None and found.shape == (3, 17) and (found == -1).all()
    for wrong in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows.entries(np.array([wrong]))


def test_labels_that_begin_late_in_a_source_stand_at_their_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole batches without labels come first, and the file is made when the first label is seen."""
    monkeypatch.setattr("minilm.data.encoding._BATCH_DOCUMENTS", 8)
    monkeypatch.setattr("minilm.data.output._BACKFILL", 100)
    path = tmp_path / "a.jsonl"
    write_jsonl(path, texts(30, seed=5))
    late, spans = annotated(tmp_path / "late.jsonl", 20, seed=6)
    path.write_text(path.read_text() + late.read_text())
    spans |= {text: [] for text in texts(30, seed=5)}
    store = build(tmp_path / "s", [str(path)], small_tokenizer(), validation_fraction=0.0).store
    wanted = [x for document in expected(store, "train", spans) for x in document]
    labels_read = store.shards("train")[0].entries
    assert labels_read is not None and labels_read.tolist() == wanted


def test_a_killed_build_goes_on_with_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = annotated(tmp_path / "a.jsonl", 120)
    monkeypatch.setattr("minilm.data.build._NOTE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr("minilm.data.encoding._BATCH_DOCUMENTS", 16)
    how = {"validation_fraction": 0.1}
    whole = build(tmp_path / "whole", [str(path)], small_tokenizer(), **how).store
    real, calls = labels.token_entries, 0

    def interrupted(*args: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("minilm.data.encoding.token_entries", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s", [str(path)], small_tokenizer(), **how)
    noted = json.loads((tmp_path / "s.building" / "progress.json").read_text())
    assert noted["sizes"]["train/a.entries.bin"] > 0
    with (tmp_path / "s.building" / "train" / "a.entries.bin").open("ab") as file:
        file.write(b"torn")
    built = build(tmp_path / "s", [str(path)], small_tokenizer(), **how)
    assert built.resumed and built.store.fingerprint == whole.fingerprint


WRONG = [
    ([[0, 3, -1]], "names row -1"),
    ([[0, 3, 2**31]], "names row 2147483648"),
    ([[3, 3, 1]], "does not lie in the text"),
    ([[5, 2, 1]], "does not lie in the text"),
    ([[-1, 2, 1]], "does not lie in the text"),
    ([[4, 12, 1]], "does not lie in the text, which has 11 characters"),
    ([[4, 8, 1], [0, 5, 2]], r"\[0, 5, 2\] and \[4, 8, 1\] overlap"),
    ([[0, 3]], r"\[0, 3\], is not \[start, end, row\]"),
    ([[0, 3.0, 1]], "is not .start, end, row. of integers"),
    ([[0, 3, True]], "is not .start, end, row. of integers"),
    ({"0": 3}, "a list of .start, end, row. is needed, not dict"),
]


@pytest.mark.parametrize(("entries", "message"), WRONG)
def test_wrong_spans_are_refused_with_file_and_line(tmp_path: Path, entries: object, message: str) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"text": "fine"}, {"text": "the cat sat", "entries": entries}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=rf"a\.jsonl:2: wrong labels in the field 'entries' .*{message}"):
        build(tmp_path / "s", [str(path)], small_tokenizer())
    if not isinstance(entries, dict):
        skipping = build(
            tmp_path / "s", [str(path)], small_tokenizer(), validation_fraction=0.0, on_bad_line="skip"
        )
        assert skipping.store.manifest["bad"]["count"] == 1


def test_all_wrong_spans_of_neighbouring_documents_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"text": f"the cat {n}", "entries": [[0, 50, 1], [1, 2, -4]]} for n in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError) as caught:
        build(tmp_path / "s", [str(path)], small_tokenizer())
    message = str(caught.value)
    assert all(f"a.jsonl:{n}" in message for n in (1, 2, 3))
    assert message.count("does not lie in the text") == message.count("names row -4") == 3


def test_another_field_of_labels_and_none_at_all(tmp_path: Path) -> None:
    """A corpus may have a field `entries` of its own."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "the cat sat", "entries": "own", "spans": [[4, 7, 3]]}) + "\n")
    how = {"validation_fraction": 0.0}
    store = build(tmp_path / "s", [f"{path},entries=spans"], small_tokenizer(), **how).store
    assert store.manifest["splits"]["train"]["sources"]["a"]["labelled"] > 0
    plain = build(tmp_path / "t", [f"{path},entries="], small_tokenizer(), **how).store
    assert plain.shards("train")[0].entries is None


def test_the_knowledge_source_is_named_by_its_content(tmp_path: Path) -> None:
    path, _ = annotated(tmp_path / "a.jsonl", 40)
    knowledge = tmp_path / "entries.jsonl"
    knowledge.write_text("{}\n" * 100 + "\n")
    how = {"validation_fraction": 0.0, "entries_of": knowledge}
    store = build(tmp_path / "s", [str(path)], small_tokenizer(), **how).store
    source = KnowledgeSource.read(knowledge)
    assert (store.entries_of, source.records) == (source.sha256, 100)
    assert build(tmp_path / "s", [str(path)], small_tokenizer(), **how).reused
    knowledge.write_text("{}\n" * 101)
    with pytest.raises(DataError, match="entries_of differ"):
        build(tmp_path / "s", [str(path)], small_tokenizer(), **how)
    other = build(tmp_path / "t", [str(path)], small_tokenizer(), **how).store
    assert other.fingerprint != store.fingerprint
    knowledge.write_text("{}\n" * 3)
    with pytest.raises(DataError, match=r"labels name rows that entries.jsonl does not have .*the last is 2"):
        build(tmp_path / "u", [str(path)], small_tokenizer(), **how)
    plain = write_jsonl(tmp_path / "b.jsonl", texts(5))
    with pytest.raises(DataError, match="no document has labels"):
        build(tmp_path / "v", [str(plain)], small_tokenizer(), **how)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(knowledge.read_bytes()))
    assert KnowledgeSource.read(packed).records == 3
    for missing, message in ((tmp_path / "none", "cannot be read"), (tmp_path / "empty", "is empty")):
        (tmp_path / "empty").write_text("\n")
        with pytest.raises(DataError, match=message):
            KnowledgeSource.read(missing)


def test_labels_can_be_added_to_a_store_that_exists(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", {"a": random_documents(20), "b": random_documents(20, seed=1)})
    before = store.fingerprint
    shard = store.shards("train")[0]
    knowledge = KnowledgeSource("k.jsonl", "ab" * 32, 7)
    entries = np.arange(shard.num_tokens) % 8 - 1
    added = write_entries(store, "train", "a", entries, entries_of=knowledge)
    assert added.fingerprint != before and added.entries_of == knowledge.sha256
    found = added.shards("train")[0].entries
    assert found is not None and found.tolist() == entries.tolist() and found.dtype == np.int32
    replaced = write_entries(added, "train", "a", np.full(shard.num_tokens, -1), entries_of=knowledge)
    assert replaced.fingerprint not in (before, added.fingerprint)
    again = write_entries(replaced, "train", "a", entries.astype(np.int32), entries_of=knowledge)
    assert again.fingerprint == added.fingerprint
    assert Store.open(tmp_path / "s", verify=True).fingerprint == added.fingerprint


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_store_is_whole_wherever_adding_labels_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """File and manifest cannot change in one step: between them the store has no labels, never wrong ones."""
    store = store_of(tmp_path / "s", {"a": random_documents(20)})
    old = np.zeros(store.shards("train")[0].num_tokens, dtype=np.int64)
    store = write_entries(store, "train", "a", old)
    real, renames = Path.replace, 0

    def killed(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == killed_at + 1:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        write_entries(store, "train", "a", old + 1)
    found = Store.open(tmp_path / "s", verify=True).shards("train")[0].entries
    assert (found is None) if killed_at else (found is not None and found.tolist() == old.tolist())
    again = write_entries(Store.open(tmp_path / "s"), "train", "a", old + 1).shards("train")[0].entries
    assert again is not None and set(again.tolist()) == {1}


def test_labels_that_do_not_fit_a_store_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", {"a": random_documents(20), "b": random_documents(20, seed=1)})
    size = store.shards("train")[0].num_tokens
    knowledge = KnowledgeSource("k.jsonl", "ab" * 32, 7)
    good = np.zeros(size, dtype=np.int64)
    cases = [
        ("train", "c", good, None, "has no source 'c', but a, b"),
        ("validation", "a", good, None, "has no validation documents"),
        ("train", "a", good[1:], None, "one for each token"),
        ("train", "a", good.astype(float), None, "integers of shape"),
        ("train", "a", good - 2, None, "-2 is neither a row"),
        ("train", "a", good + 7, knowledge, "row 7 is named, but the last one of k.jsonl is 6"),
        ("train", "a", good + 2**31, None, "row 2147483648 is named"),
    ]
    for split, source, entries, of, message in cases:
        with pytest.raises(DataError, match=message):
            write_entries(store, split, source, entries, entries_of=of)
    store = write_entries(store, "train", "a", good, entries_of=knowledge)
    with pytest.raises(DataError, match="labels of train/a name rows of another knowledge source"):
        write_entries(store, "train", "b", np.zeros(store.shards("train")[1].num_tokens, dtype=np.int64))
    assert Store.open(tmp_path / "s").fingerprint == store.fingerprint


def test_altered_labels_are_found_when_the_store_is_opened(
    labelled: tuple[Store, dict[str, list[list[int]]]],
) -> None:
    path = labelled[0].path / "train" / "a.entries.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.entries\.bin was altered"):
        Store.open(labelled[0].path)
    path.write_bytes(bytes(data[:-4]))
    with pytest.raises(DataError, match=r"a\.entries\.bin has"):
        Store.open(labelled[0].path)


def test_what_is_trained_on_can_be_seen_with_its_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "the cat sat on", "entries": [[4, 7, 31]]}) + "\n")
    store = build(tmp_path / "s", [str(path)], small_tokenizer(), validation_fraction=0.0).store
    batch = aligned(Rows(store, "train", 8), np.array([0]))
    assert "the‹ cat =31› sat" in row_text(batch, 0, small_tokenizer()).plain
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(row_table(batch, 0, small_tokenizer(), 8))
    [line] = [
        line
        for line in console.export_text().splitlines()
        if "' cat'" in line and "->" in line and "31" in line
    ]
    assert line.split("->")[1].split()[1] == "'" and line.rstrip().endswith("31")
    assert main(["data", "info", str(store.path)]) == 0
    assert (
        "labelled tokens, with rows of a knowledge source that was not named: train/a 1"
        in capsys.readouterr().out
    )
