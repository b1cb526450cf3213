"""The store: built whole or not at all, and refused where it is not what it says."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_stores import random_documents, small_tokenizer, store_of, texts, write_jsonl

from minilm.data import store as stores
from minilm.data.build import build, default_fraction
from minilm.data.store import Store, checked_ids, smallest_dtype
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError


def documents_of(store: Store, split: str) -> list[list[int]]:
    return [s.document(n).tolist() for s in store.shards(split) for n in range(s.num_documents)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", texts(400))


def test_a_store_holds_every_document_once_in_one_split(tmp_path: Path, corpus: Path) -> None:
    """The bugs eos-not-added and train-eval-leak."""
    tokenizer = small_tokenizer()
    built = build(tmp_path / "store", [str(corpus)], tokenizer, validation_fraction=0.1)
    assert not built.reused and not built.resumed
    train, validation = documents_of(built.store, "train"), documents_of(built.store, "validation")
    assert sorted(train + validation) == sorted(tokenizer.document(t) for t in texts(400))
    assert 15 < len(validation) < 70
    assert not {tuple(d) for d in train} & {tuple(d) for d in validation}
    for split in ("train", "validation"):
        counts = built.store.manifest["splits"][split]
        tokens = np.concatenate([s.tokens for s in built.store.shards(split)])
        assert (
            int((tokens == tokenizer.eos_id).sum())
            == counts["documents"]
            == int((tokens == tokenizer.bos_id).sum())
        )
        assert counts["tokens"] == len(tokens)
        assert counts["bytes"] == int(tokenizer.byte_lengths[tokens.astype(int)].sum())


def test_the_split_does_not_depend_on_order_or_other_sources(tmp_path: Path, corpus: Path) -> None:
    shuffled = write_jsonl(tmp_path / "b.jsonl", texts(400)[::-1])
    more = write_jsonl(tmp_path / "more.jsonl", texts(100, seed=8))
    one = build(tmp_path / "one", [str(corpus)], small_tokenizer(), validation_fraction=0.1).store
    two = build(
        tmp_path / "two", [str(more), str(shuffled)], small_tokenizer(), validation_fraction=0.1
    ).store
    held_out = {tuple(d) for d in documents_of(two, "validation")}
    assert {tuple(d) for d in documents_of(one, "validation")} <= held_out
    assert not {tuple(d) for d in documents_of(one, "train")} & held_out


def test_duplicates_are_dropped_over_the_whole_corpus(tmp_path: Path, corpus: Path) -> None:
    store = build(tmp_path / "s", [str(corpus), f"{corpus},name=again"], small_tokenizer()).store
    assert store.manifest["duplicates"] == {"count": 400, "sources": {"again": 400}}
    assert len(documents_of(store, "train")) + len(documents_of(store, "validation")) == 400


def test_validation_sources_are_held_out_as_a_whole(tmp_path: Path, corpus: Path) -> None:
    other = write_jsonl(tmp_path / "held.jsonl", [*texts(20, seed=9), *texts(400)[:5]])
    store = build(tmp_path / "s", [str(corpus)], small_tokenizer(), validation_sources=[str(other)]).store
    assert store.manifest["splits"]["validation"]["documents"] == 25
    assert store.manifest["splits"]["train"]["documents"] == 395


def test_the_store_uses_the_smallest_type_and_refuses_what_does_not_fit() -> None:
    """The bugs tok-uint16-wrap and tok-id-mod-vocab."""
    assert [smallest_dtype(v).itemsize for v in (256, 257, 65_536, 65_537, 2**32)] == [1, 2, 2, 4, 4]
    for size in (0, 2**32 + 1):
        with pytest.raises(DataError, match="cannot be stored"):
            smallest_dtype(size)
    for ids in ([5, 65_536], [3, -1]):
        with pytest.raises(
            DataError, match=r"Token id (65536|-1) at 1 is outside the vocabulary 0 \.\. 65535"
        ):
            checked_ids(np.array(ids), 65_536, lambda index: f"at {index}")
    assert checked_ids(np.array([0, 65_535]), 65_536, str).tolist() == [0, 65_535]


@pytest.mark.parametrize("vocab_size", [256, 257, 65_536, 65_537])
def test_the_highest_id_comes_back(tmp_path: Path, vocab_size: int) -> None:
    documents = [[0, vocab_size - 1, 1], [vocab_size - 1]]
    store = store_of(tmp_path / "s", {"a": documents}, vocab_size=vocab_size)
    assert documents_of(store, "train") == documents


def test_an_id_outside_the_vocabulary_names_its_document(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Token id 50 in a 1 is outside the vocabulary 0 \.\. 49"):
        store_of(tmp_path / "s", {"a": [[1, 2], [3, 50, 4]]})


def test_bad_lines_stop_the_build_or_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts(50)) + '{"text": 3}\nnonsense\n{}\n'
    )
    with pytest.raises(DataError, match=r"a\.jsonl:51: text is not a string \(int\).*--on-bad-line skip"):
        build(tmp_path / "s", [str(path)], small_tokenizer())
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.building").exists()
    store = build(tmp_path / "s", [str(path)], small_tokenizer(), on_bad_line="skip").store
    bad = store.manifest["bad"]
    assert bad["count"] == 3 and bad["sources"] == {"a": 3} and bad["policy"] == "skip"
    assert bad["reasons"] == {"text is not a string": 1, "not JSON": 1, "no field 'text'": 1}
    assert bad["first"][1].startswith(f"{path}:52: not JSON")


def test_empty_corpora_and_empty_splits_are_errors(tmp_path: Path) -> None:
    empty, tiny = tmp_path / "empty.jsonl", write_jsonl(tmp_path / "tiny.jsonl", ["only one"])
    empty.write_text("\n")
    with pytest.raises(DataError, match="corpus is empty: 0 documents read"):
        build(tmp_path / "s", [str(empty)], small_tokenizer())
    empty.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"(?s)corpus is empty: 1 documents read, 1 bad.*empty\.jsonl:1"):
        build(tmp_path / "s", [str(empty)], small_tokenizer(), on_bad_line="skip")
    with pytest.raises(DataError, match=r"too few for a fraction of 0\.1"):
        build(tmp_path / "s", [str(tiny)], small_tokenizer())
    with pytest.raises(DataError, match="No document is left for training"):
        build(tmp_path / "s", [str(tiny)], small_tokenizer(), validation_sources=[f"{tiny},name=x"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.jsonl", "tiny.jsonl"]
    store = build(tmp_path / "s", [str(tiny)], small_tokenizer(), validation_fraction=0).store
    with pytest.raises(DataError, match="no validation documents"):
        store.shards("validation")


def test_wrong_settings_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer is needed"):
        build(tmp_path / "s", [str(corpus)], None)
    with pytest.raises(ConfigError, match="without a tokenizer"):
        build(tmp_path / "s", ["synthetic:markov"], small_tokenizer())
    with pytest.raises(ConfigError, match="validation_fraction is 1"):
        build(tmp_path / "s", [str(corpus)], small_tokenizer(), validation_fraction=1)
    with pytest.raises(ConfigError, match="on_bad_line"):
        build(tmp_path / "s", [str(corpus)], small_tokenizer(), on_bad_line="ignore")
    assert [default_fraction(n) for n in (0, 1000, 10**7, 3 * 10**7, 10**9)] == [0.01, 0.1, 0.05, 0.02, 0.01]


def test_an_identical_store_is_reused_another_one_never_overwritten(tmp_path: Path, corpus: Path) -> None:
    first = build(tmp_path / "s", [str(corpus)], small_tokenizer())
    again = build(tmp_path / "s", [str(corpus)], small_tokenizer())
    assert again.reused and again.store.fingerprint == first.store.fingerprint
    with pytest.raises(DataError, match=r"exists.*validation_fraction differ.*--force"):
        build(tmp_path / "s", [str(corpus)], small_tokenizer(), validation_fraction=0.3)
    forced = build(tmp_path / "s", [str(corpus)], small_tokenizer(), validation_fraction=0.3, force=True)
    assert forced.store.fingerprint != first.store.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "s"]
    write_jsonl(corpus, texts(401))
    with pytest.raises(DataError, match=r"exists.*sources differ"):
        build(tmp_path / "s", [str(corpus)], small_tokenizer(), validation_fraction=0.3)


def test_a_folder_that_is_no_store_is_never_touched(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(DataError, match="is not a store"):
            build(tmp_path / "home", [str(corpus)], small_tokenizer(), force=force)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_the_same_contents_have_the_same_fingerprint_elsewhere(tmp_path: Path, corpus: Path) -> None:
    copy = tmp_path / "elsewhere" / "corpus.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(corpus.read_bytes())
    one = build(tmp_path / "one", [str(corpus)], small_tokenizer()).store
    two = build(tmp_path / "two", [str(copy)], small_tokenizer()).store
    assert one.fingerprint == two.fingerprint


def test_another_tokenizer_is_refused(tmp_path: Path, corpus: Path) -> None:
    """The bug val-set-wrong-tokenizer."""
    build(tmp_path / "s", [str(corpus)], small_tokenizer())
    other = Tokenizer.train(texts(200, seed=4), 399)
    with pytest.raises(DataError, match=r"built with another tokenizer.*fingerprint.*fingerprint"):
        Store.open(tmp_path / "s", other)
    same = Store.open(tmp_path / "s", small_tokenizer()).tokenizer()
    assert same is not None and same.fingerprint == small_tokenizer().fingerprint
    bare = store_of(tmp_path / "bare", {"a": random_documents(3)})
    assert bare.tokenizer() is None
    with pytest.raises(DataError, match="without a tokenizer"):
        bare.require_tokenizer(other)


def test_truncated_altered_and_missing_files_are_refused_by_name(tmp_path: Path, corpus: Path) -> None:
    build(tmp_path / "s", [str(corpus)], small_tokenizer())
    tokens, offsets = (tmp_path / "s" / "train" / f"corpus.{kind}.bin" for kind in ("tokens", "offsets"))
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(
        DataError, match=rf"corpus\.tokens\.bin has {len(whole) - 2} bytes, but {len(whole)} were"
    ):
        Store.open(tmp_path / "s", verify=False)
    tokens.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(DataError, match=r"corpus\.tokens\.bin was altered"):
        Store.open(tmp_path / "s")
    tokens.unlink()
    offsets.unlink()
    with pytest.raises(DataError, match=r"(?s)2 problems.*tokens\.bin is missing.*offsets\.bin is missing"):
        Store.open(tmp_path / "s")


def test_large_stores_are_checked_by_size_and_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_of(tmp_path / "s", {"a": random_documents(50)})
    tokens = tmp_path / "s" / "train" / "a.tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    monkeypatch.setattr(stores, "VERIFY_UP_TO_BYTES", 100)
    Store.open(tmp_path / "s")
    with pytest.raises(DataError, match="altered"):
        Store.open(tmp_path / "s", verify=True)


def test_damaged_and_foreign_manifests_are_refused(tmp_path: Path) -> None:
    store_of(tmp_path / "s", {"a": random_documents(50)})
    file = tmp_path / "s" / "manifest.json"
    whole = file.read_text()
    for text, problem in (
        (whole.replace('"vocab_size": 50', '"vocab_size": 51'), "altered"),
        (whole[:100], "damaged"),
        ("[]", "damaged"),
        ('{"a": 1}', "not the manifest of a store"),
        (whole.replace('"version": 1', '"version": 2'), "format version 2"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=problem):
            Store.open(tmp_path / "s")
    with pytest.raises(DataError, match="Make it with `minilm data build`"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "x.building").mkdir()
    with pytest.raises(DataError, match="interrupted"):
        Store.open(tmp_path / "x")


# --- killed, full, shared


_CHILD = """
import os, signal, sys
from minilm.data import build, encoding
build._NOTE_EVERY_SECONDS = 0.0
encoding._BATCH_DOCUMENTS = 16
batches = 0
original = encoding.Corpus._write_next
def counted(self):
    global batches
    batches += 1
    if batches == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    original(self)
encoding.Corpus._write_next = counted
built = build.build(sys.argv[1], [sys.argv[2]], None)
print(built.resumed, built.store.fingerprint)
"""


def test_a_build_killed_with_signal_9_goes_on_and_gives_the_same_store(tmp_path: Path) -> None:
    spec = "synthetic:markov?documents=400&length=64"
    whole = build(tmp_path / "whole", [spec], None).store

    def child(kill_at: int) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", _CHILD, str(tmp_path / "s"), spec, str(kill_at)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    killed = child(14)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "s").exists()
    noted = json.loads((tmp_path / "s.building" / "progress.json").read_text())
    assert 0 < noted["items"] < 400
    # What was written after the last note is cut off again.
    with (tmp_path / "s.building" / "train" / "markov.tokens.bin").open("ab") as file:
        file.write(b"torn")
    finished = child(10**9)
    assert finished.stdout.split() == ["True", whole.fingerprint], finished.stderr
    assert not (tmp_path / "s.building").exists()
    assert documents_of(Store.open(tmp_path / "s"), "train") == documents_of(whole, "train")


def test_an_interrupted_build_goes_on_without_encoding_again(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = write_jsonl(
        tmp_path / "repeated.jsonl", [*texts(60, seed=3), *texts(400)[::3], *texts(30, seed=3)]
    )
    with repeated.open("a") as file:
        file.write("nonsense\n")
    specs = [str(corpus), f"{repeated},weight=2"]
    how = {"validation_fraction": 0.1, "on_bad_line": "skip"}
    whole = build(tmp_path / "whole", specs, small_tokenizer(), **how).store
    monkeypatch.setattr("minilm.data.build._NOTE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr("minilm.data.encoding._BATCH_DOCUMENTS", 16)
    encode, encoded = Tokenizer.encode_batch, []

    def counted(self: Tokenizer, batch: list[str]) -> list[list[int]]:
        if len(encoded) == 30:
            raise KeyboardInterrupt
        encoded.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "s", specs, small_tokenizer(), **how)
    noted = json.loads((tmp_path / "s.building" / "progress.json").read_text())
    assert noted["items"] > 200
    encoded[:] = [0] * 31
    built = build(tmp_path / "s", specs, small_tokenizer(), **how)
    assert built.resumed
    assert sum(encoded) < 400
    assert built.store.fingerprint == whole.fingerprint
    for key in ("bad", "duplicates", "splits"):
        assert built.store.manifest[key] == whole.manifest[key]


def test_leftovers_of_a_build_with_other_settings_are_not_used(tmp_path: Path, corpus: Path) -> None:
    leftover = tmp_path / "s.building" / "train"
    leftover.mkdir(parents=True)
    (leftover / "corpus.tokens.bin").write_bytes(b"old")
    (tmp_path / "s.building" / "progress.json").write_text(
        '{"key": "other", "items": 1, "sizes": {}, "batches": ""}'
    )
    built = build(tmp_path / "s", [str(corpus)], small_tokenizer())
    assert not built.resumed
    assert (
        built.store.fingerprint == build(tmp_path / "t", [str(corpus)], small_tokenizer()).store.fingerprint
    )


_FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from minilm.data.build import build
from minilm.errors import DataError
try:
    build(sys.argv[1], ["synthetic:markov?documents=400&length=1024"], None)
except DataError as error:
    print(error)
"""


def test_no_space_left_says_what_is_needed_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path / "s")], capture_output=True, text=True, check=False
    )
    assert "No space left for the store" in done.stdout, done.stderr
    assert "MB are free now" in done.stdout and "Make room" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        build(tmp_path / "file" / "s", [str(corpus)], small_tokenizer())


def test_two_builds_of_one_store_do_not_mix(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "s.building"
    folder.mkdir()
    (folder / "progress.json").write_text("{}")
    with (folder / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="Another process is building"):
            build(tmp_path / "s", [str(corpus)], small_tokenizer())
    assert (folder / "progress.json").exists()


def test_a_document_that_cannot_be_encoded_is_named(tmp_path: Path) -> None:
    from test_data_tokenizer import llama_like

    tokenizer = llama_like(tmp_path / "tokenizer", prefix=False, unigram=True)
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "x</s>", "def"])
    with pytest.raises(DataError, match=r"a\.jsonl:2: The text spells the special token"):
        build(tmp_path / "s", [str(path)], tokenizer, validation_fraction=0)
    assert not (tmp_path / "s.building").exists()
