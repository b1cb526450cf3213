"""The free-text experiment: its parts share no document, its numbers are those of slow references."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from knowledge_reference import model_of
from zoo_models import tiny

from minilm.errors import DataError
from minilm.knowledge.codes import window_codes

FOLDER = Path(__file__).parents[1] / "run_file" / "free_text"
sys.path.insert(0, str(FOLDER))  # as for the scripts themselves, which import each other by name
import held_out  # noqa: E402
import prepare  # noqa: E402
import score  # noqa: E402

WORDS = [
    "river",
    "town",
    "has",
    "many",
    "small",
    "boats",
    "that",
    "carry",
    "grain",
    "over",
    "water",
    "every",
    "day",
]


# --- the texts


def test_a_hash_of_the_content_alone_decides_the_part_in_the_shares_asked_for():
    keys = [random.Random(n).getrandbits(64) for n in range(20_000)]
    parts = Counter(prepare.part_of(key, 0.3, 0.2) for key in keys)
    for name, share in (("entries", 0.3), ("held_out", 0.2), ("train", 0.5)):
        assert abs(parts[name] / len(keys) - share) < 0.02
    assert prepare.part_of(0, 0.3, 0.2) == "held_out" and prepare.part_of(2**64 - 1, 0.3, 0.2) == "train"


def test_prose_becomes_sentences_and_other_lines_groups():
    prose = (
        "Boats carry the grain\nover water. Every town, as we know,\nhas many boats! Yes. What is left over?"
    )
    code = "one = first(alpha)\ntwo = second(beta)\n\nnumbers = compute(alpha, beta, gamma)"
    assert list(prepare.pieces(prose, most=200)) == [
        "Boats carry the grain over water.",
        "Every town, as we know, has many boats!",
        "What is left over?",
    ]
    assert list(prepare.pieces(code, most=60)) == [
        "one = first(alpha)\ntwo = second(beta)",
        "numbers = compute(alpha, beta, gamma)",
    ]


def test_no_word_is_lost_and_no_piece_is_too_long(monkeypatch):
    monkeypatch.setattr(prepare, "FEWEST_WORDS", 0)
    drawn = random.Random(3)
    for _ in range(60):
        words = [drawn.choice([*WORDS, "x=(1,", "End.", "w" * 70]) for _ in range(drawn.randrange(1, 80))]
        text = "".join(word + drawn.choice([" ", " ", "\n", "\n\n"]) for word in words)
        found = list(prepare.pieces(text, most=50))
        assert all(0 < len(piece) <= 50 for piece in found)
        assert "".join("".join(found).split()) == "".join(words)


def documents(number: int) -> list[str]:
    drawn = random.Random(5)
    return [
        " ".join(
            f"{drawn.choice(WORDS)} {drawn.choice(WORDS)} {drawn.choice(WORDS)} name{n}." for _ in range(6)
        )
        for n in range(number)
    ]


def texts_of(folder: Path, name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = documents(120)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0]]))
    return path, texts


def test_entries_come_from_documents_that_are_neither_trained_on_nor_held_out(corpus, tmp_path):
    path, texts = corpus
    ask = {"most_entries": None, "fewest": 3}
    prepare.prepare([str(path)], tmp_path / "other", same_documents=False, **ask)
    prepare.prepare([str(path)], tmp_path / "same", same_documents=True, **ask)
    other, same = (
        {n: texts_of(tmp_path / f, n) for n in ("sources", "train", "held_out")} for f in ("other", "same")
    )
    assert sorted(itertools.chain(*other.values())) == sorted(texts)  # disjoint, whole, the double one once
    assert same["sources"] == same["train"] == other["train"] and same["held_out"] == other["held_out"]
    for folder, parts in (("other", other), ("same", same)):
        sentences = texts_of(tmp_path / folder, "sentences")
        assert len(set(sentences)) == len(sentences) > 30
        assert all(any(sentence in text for text in parts["sources"]) for sentence in sentences)


def test_fewer_entries_are_a_draw_that_keeps_its_order(corpus):
    texts = corpus[1]
    all_of, some = prepare.entries_of(texts), prepare.entries_of(texts, 40)
    assert len(some) == 40 and [entry for entry in all_of if entry in set(some)] == some
    assert some != all_of[:40] and prepare.entries_of(texts, 10**6) == all_of
    assert set(prepare.entries_of(texts, 20)) < set(some)
    assert prepare.entries_of([texts[0], texts[1], texts[0]]) == prepare.entries_of(texts[:2])


def test_too_few_documents_and_sources_without_text_are_refused(corpus, tmp_path):
    with pytest.raises(DataError, match=r"each part needs 100(.|\n)*held_out: 1\d\."):
        prepare.prepare(
            [str(corpus[0])], tmp_path / "out", same_documents=False, most_entries=None, fewest=100
        )
    with pytest.raises(DataError, match="no sentences"):
        prepare.read(["synthetic:markov?documents=20&length=16"])
    assert not (tmp_path / "out").exists()


# --- the numbers


def text_of(lengths: list[int], vocab_size: int, seed: int = 0) -> held_out.HeldOut:
    drawn = np.random.default_rng(seed)
    documents = np.repeat(np.arange(len(lengths)), lengths)
    number = len(documents)
    entries = np.where(drawn.random(number) < 0.5, drawn.integers(0, 200, number), -1).astype(np.int32)
    counted = np.diff(documents, prepend=-1) == 0
    tokens = drawn.integers(0, vocab_size, number)
    return held_out.HeldOut(tokens, documents, counted, entries, drawn.random(number) < 0.3)


def test_overlap_is_that_of_sets_of_tuples_within_documents():
    drawn = np.random.default_rng(1)
    others = [drawn.integers(0, 3, size).tolist() for size in (300, 5, 200)]
    tokens = np.concatenate(
        [drawn.integers(0, 3, 20), others[0][40:90], others[2][:9], others[2][9:30], [1, 2]]
    )
    documents = np.repeat(np.arange(2), [79, len(tokens) - 79])  # the border cuts a shared run
    grams = {tuple(o[i : i + 13]) for o in others for i in range(len(o) - 12)}
    wanted = [
        t >= 12 and documents[t - 12] == documents[t] and tuple(tokens[t - 12 : t + 1]) in grams
        for t in range(len(tokens))
    ]
    found = held_out.overlapping(tokens, documents, others)
    assert found.tolist() == wanted and 20 < sum(wanted) < 60


def test_every_token_is_scored_once_with_at_least_half_a_window_before_it():
    model, text, length = tiny("original"), text_of([40, 9, 1, 23], 64), 16
    found = held_out.scored(model, text, length).nats
    for start, stop in itertools.pairwise(text.starts):
        assert found[start] == 0.0  # nothing predicts it
        for t in range(start + 1, stop):
            least = max(start, t - length)
            most = max(start, t - length // 2)
            ids = torch.from_numpy(text.tokens)
            with torch.no_grad():
                possible = [
                    -model(ids[None, s:t]).logits[0].log_softmax(dim=-1)[t - s - 1, ids[t]].item()
                    for s in range(least, most + 1)
                ]
            assert min(abs(found[t] - nats) for nats in possible) < 1e-4


def test_hits_null_and_gate_are_those_of_single_tokens():
    model, text = model_of(), text_of([33, 27], 64)
    text = dataclasses.replace(text, entries=np.random.default_rng(4).integers(0, 200, 60))
    found = held_out.scored(model, text, 32)
    assert set(found.read) == set(found.candidate) == set(model.config.layers)
    scores = {}
    for layer in model.config.layers:
        block = model.blocks[layer].memory.retriever
        block.register_forward_hook(lambda _m, _g, out, layer=layer: scores.update({layer: out}))
    for start, stop in itertools.pairwise(text.starts):
        ids = torch.from_numpy(text.tokens[start:stop])[None]
        with torch.no_grad():
            _, reads = model.reads(ids)
        for layer, read in reads.items():
            sums = scores[layer].rows[:, :, None] + scores[layer].columns[:, None, :]
            best = sums.flatten(1).topk(model.config.num_candidates, dim=1).indices
            for t in range(start + 1, stop):
                at, label = t - start - 1, text.entries[t]
                rows = model.store.rows[read.slots[0, at]].tolist()
                assert found.read[layer][t] == (label in rows)
                assert found.candidate[layer][t] == (label in model.store.rows[best[at]].tolist())
                assert found.null[layer][t] == pytest.approx(float(read.null[0, at]), abs=1e-5)
                assert found.gate[layer][t] == pytest.approx(float(read.gates[0, at].mean()), abs=1e-5)
    assert any(0 < found.read[layer].sum() < found.candidate[layer].sum() for layer in found.read)


def test_exchanged_entries_keep_codes_and_places_and_an_empty_store_is_the_null_slot():
    model, text = model_of(), text_of([20], 64)
    store = model.store
    other, empty = held_out.exchanged(store), held_out.emptied(store)
    entry = lambda s, slot: tuple(s.ids[slot, : int(s.lengths[slot])].tolist())  # noqa: E731
    slots = range(store.num_slots)
    assert Counter(entry(store, n) for n in slots) == Counter(entry(other, n) for n in slots)
    assert sum(entry(store, n) != entry(other, n) for n in slots) > 0.9 * store.num_entries
    assert torch.equal(store.codes, other.codes) and torch.equal(store.rows, other.rows)
    own = held_out.scored(model, text, 32).nats
    with score.reading(model, other):
        assert np.abs(held_out.scored(model, text, 32).nats - own).max() > 1e-3
    with score.reading(model, empty):
        null = held_out.scored(model, text, 32).null
    assert all(np.allclose(values[text.counted], 1.0) for values in null.values())
    assert np.array_equal(held_out.scored(model, text, 32).nats, own)  # the model has its own store again


def test_the_lexical_share_asks_with_the_tokens_before_the_labelled_one():
    store, text = model_of().store, text_of([30, 12], 64)
    hits = Counter()
    labelled = [t for t in range(42) if text.counted[t] and text.entries[t] >= 0]
    for t in labelled:
        start = text.starts[text.documents[t]]
        code = window_codes(store.token_codes(), torch.from_numpy(text.tokens[start:t])[None], None, 16, 0.9)[
            0
        ]
        order = (store.codes.float() @ code[t - start - 1]).argsort(descending=True)
        place = order.tolist().index(int(store.slots[text.entries[t]]))
        hits.update(count for count in (40, 120) if place < count)
    wanted = [hits[count] / len(labelled) for count in (40, 120)]
    assert held_out.lexical(text, store, [40, 120], 16, 0.9) == pytest.approx(wanted, abs=1e-9)
    assert 0 < wanted[0] < wanted[1] < 1


def test_differences_are_paired_by_token_and_drawn_by_document():
    text = text_of([30] * 12, 64)
    drawn = np.random.default_rng(2)
    one = held_out.Scored(drawn.random(360) * 5)
    other = held_out.Scored(one.nats + 0.25)  # the same documents are hard for both
    mask = text.kinds()["entry_no_overlap"]
    told = score.difference(other, one, text, mask)
    assert told["difference"] == pytest.approx(0.25)
    assert told["interval_95"] == pytest.approx((0.25, 0.25))
    assert told["tokens"] == mask.sum() < 360
    assert all(text.counted[m] and text.entries[m] >= 0 and not text.overlap[m] for m in np.flatnonzero(mask))
    none = score.difference(other, one, text, np.zeros(360, dtype=bool))
    assert none["difference"] is None and none["interval_95"] is None


def test_the_report_and_its_tables_have_every_model_and_kind():
    plain, model, text = tiny("original"), model_of(), text_of([20] * 12, 64)
    told = score.report({"plain": plain, "with": model}, text, 32, {"plain": 5, "with": 6})
    about = told["models"]["with"]
    counted = text.counted
    nats = held_out.scored(plain, text, 32).nats
    assert told["models"]["plain"]["loss"]["all"] == pytest.approx(nats[counted].sum() / counted.sum())
    gap = about["loss"]["overlap"] - told["models"]["plain"]["loss"]["overlap"]
    assert about["against_first"]["overlap"]["difference"] == pytest.approx(gap)
    split = [about["retrieval"][key]["tokens"] for key in ("where_it_was_read", "where_it_was_not")]
    assert (
        sum(split) == told["tokens"]["entry"]
        and told["tokens"]["overlap"] + told["tokens"]["no_overlap"] == 228
    )
    json.dumps(told)
    page = score.tables(told)
    for words in (
        "| plain |",
        "| with - plain |",
        "with: empty - own entries",
        "window code alone",
        "block ",
    ):
        assert words in page
