"""Overlap with the training data: 13-grams of words against a set of tuples."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
from data_stores import small_tokenizer, store_of, texts, write_jsonl

from minilm.data.build import build
from minilm.data.store import Store
from minilm.errors import DataError
from minilm.evaluation import overlap
from minilm.evaluation.heldout import How, TextList, open_held_out
from minilm.evaluation.overlap import Overlapping, overlap_with, shared_with, words
from minilm.evaluation.scored import score_held_out


def slow_words(text: str) -> list[str]:
    """Character by character."""
    found: list[str] = [""]
    for char in text.lower():
        name = unicodedata.name(char, "")
        if "CJK UNIFIED" in name or "HIRAGANA" in name or "KATAKANA" in name:
            found += [char, ""]
        elif char.isalnum():
            found[-1] += char
        else:
            found.append("")
    return [word for word in found if word]


def slow_shared(data: list[str], training: list[str]) -> list[tuple[int, int]]:
    """(words, words in shared runs) of each text."""
    known = set()
    for text in training:
        each = slow_words(text)
        known |= {tuple(each[i : i + 13]) for i in range(len(each) - 12)}
    found = []
    for text in data:
        each = slow_words(text)
        covered = set()
        for i in range(len(each) - 12):
            if tuple(each[i : i + 13]) in known:
                covered |= set(range(i, i + 13))
        found.append((len(each), len(covered)))
    return found


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The CAT, sat_on a-mat!", ["the", "cat", "sat", "on", "a", "mat"]),
        ("中文字 abc字9", ["中", "文", "字", "abc", "字", "9"]),
        ("ひらカナ x1", ["ひ", "ら", "カ", "ナ", "x1"]),
        ("naïve 42 ...", ["naïve", "42"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected == slow_words(text)


def drawn(number: int, seed: int, pool: str = "a b c d 中 文 E ;") -> list[str]:
    """Few words, so that runs of 13 are met by chance or copied whole."""
    draw = random.Random(seed)
    made = [" ".join(draw.choices(pool.split(), k=draw.randint(0, 60))) for _ in range(number)]
    return made


@pytest.mark.parametrize("at_once", [1 << 20, 7])
def test_runs_of_words_are_those_of_a_set_of_tuples(at_once, monkeypatch):
    monkeypatch.setattr(overlap, "_HASHES_AT_ONCE", at_once)
    draw = random.Random(3)
    training, data = drawn(40, 0), drawn(30, 1)
    for n in range(0, 30, 2):  # a piece of a training text, of 10 to 20 words, somewhere in the middle
        source = draw.choice([t for t in training if len(t.split()) > 40]).split()
        start, length = draw.randrange(15), draw.randint(10, 20)
        data[n] = f"{data[n].upper()}!! {' -- '.join(source[start : start + length])} {data[n]}"
    found = shared_with(data, training)
    expected = slow_shared(data, training)
    assert [*zip(found.words.tolist(), found.covered.tolist(), strict=True)] == expected
    covered = [c for _, c in expected]
    assert 5 < sum(c > 0 for c in covered) < 25 and any(0 < c < w for w, c in expected)


def test_twelve_words_are_no_run_and_runs_do_not_cross_documents():
    twelve = "a b c d e f g h i j k l"
    assert shared_with([f"{twelve} m", twelve], [f"{twelve} m"]).covered.tolist() == [13, 0]
    assert shared_with([f"{twelve} m"], [twelve, f"m {twelve}"]).covered.tolist() == [0]
    assert shared_with([f"{twelve} m"], []).covered.tolist() == [0]
    assert shared_with([twelve, f"{twelve} m"], []).long_enough.tolist() == [False, True]


def test_words_forgotten_for_memory_have_the_same_hash_again(monkeypatch):
    monkeypatch.setattr(overlap, "_MOST_KNOWN", 3)
    training = drawn(20, 5)
    assert shared_with(training, training).covered.tolist() == [c for _, c in slow_shared(training, training)]


def test_order_of_words_counts():
    line = "a b c d e f g h i j k l m"
    assert shared_with([" ".join(reversed(line.split()))], [line]).covered.tolist() == [0]


def test_documents_that_overlap_are_scored_apart(tmp_path):
    from evaluation_reference import Fixed

    tokenizer, every = small_tokenizer(), texts(80, seed=1)
    build(
        tmp_path / "store",
        [str(write_jsonl(tmp_path / "a.jsonl", every[:60]))],
        tokenizer,
        validation_fraction=0,
    )
    store = Store.open(tmp_path / "store")
    data = [*every[:12], *(t.upper() + " and more" for t in every[12:20]), *every[60:], "short one"]
    held_out = TextList(data, tokenizer, 64)
    shared = overlap_with(held_out, store)
    trained = [tokenizer.decode(store.shards("train")[0].document(n).tolist()) for n in range(60)]
    assert sorted(trained) == sorted(every[:60])
    expected = slow_shared(data, trained)
    assert [*zip(shared.words.tolist(), shared.covered.tolist(), strict=True)] == expected

    model = Fixed(np.random.default_rng(0).normal(size=tokenizer.num_tokens).tolist())
    scored = score_held_out(model, held_out, How(batch_rows=4))
    section = Overlapping.of(scored.documents, shared, held_out, "store")
    groups = {
        "overlapping": [t for t, (w, c) in zip(data, expected, strict=True) if c],
        "clean": [t for t, (w, c) in zip(data, expected, strict=True) if not c and w >= 13],
        "too short": [t for t, (w, c) in zip(data, expected, strict=True) if w < 13],
    }
    assert all(len(group) >= 3 for group in groups.values())
    for name, group in groups.items():
        alone = score_held_out(model, TextList(group, tokenizer, 64), How())
        assert section.split[name].loss == pytest.approx(alone.loss, rel=1e-6)
        assert section.split[name].num_tokens == alone.scores.num_tokens
        assert section.split[name].interval == pytest.approx(alone.scores.interval)
    found = section.as_dict()
    assert found["num_words"] == sum(w for w, _ in expected)
    assert found["num_words_in_shared_runs"] == sum(c for _, c in expected)
    assert found["too_short"]["num_documents"] == len(groups["too short"])


def test_ids_are_words_where_there_is_no_text_and_are_never_held_against_text(tmp_path):
    from evaluation_reference import Fixed

    draw = random.Random(0)
    documents = [[draw.randrange(1, 50) for _ in range(40)] for _ in range(12)]
    copied = [documents[3][5:25] + [7] * 10, [8] * 30]
    store = store_of(tmp_path / "s", {"a": documents}, validation={"a": copied})
    held_out = open_held_out(str(tmp_path / "s"), Fixed([0.0] * 50), None, sequence_length=16)
    assert overlap_with(held_out, store).covered.tolist() == [20, 0]
    with pytest.raises(DataError, match="nothing to compare"):
        overlap_with(TextList(["a text"], small_tokenizer(), 16), store)
