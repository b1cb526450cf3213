"""`minilm.evaluate`: one number whoever asks, in whatever batches, on however many processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from data_stores import WORDS, small_tokenizer, store_of, write_jsonl
from data_stores import texts as some_texts
from evaluation_checkpoint import make_run
from evaluation_reference import Fixed, row_logits, tiny_model, token_losses
from evaluation_worker import LENGTH, everything
from training_runs import column, documents, records, run_here
from zoo_models import every_model, tiny

import minilm
from minilm.data.build import build
from minilm.data.loader import validation_batches
from minilm.data.rows import Rows
from minilm.data.store import Store
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError
from minilm.evaluation.tally import edges_up_to

EXACT = ("num_tokens", "num_bytes", "num_documents", "num_excluded", "accuracy", "accuracy_top5")
ROUNDED = ("loss", "perplexity", "bits_per_byte", "nats", "loss_95", "bits_per_byte_95", "accuracy_95")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("public"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A store of two sources and texts, some longer than the context."""
    folder = tmp_path_factory.mktemp("corpus")
    places = [str(write_jsonl(folder / f"{n}.jsonl", some_texts(24, seed=n, longest=30))) for n in (1, 2)]
    build(folder / "store", places, small_tokenizer(), validation_fraction=0.5)
    return Store.open(folder / "store"), some_texts(31, seed=1, longest=30)[:17]


def fitting(made) -> list[str]:
    """Texts that need no second window."""
    return [text for text in made.texts if len(made.tokenizer.document(text)) <= 128]


def same(a: dict, b: dict, rel: float = 1e-6) -> None:
    """Two dictionaries of scores."""
    assert a["num_tokens"] > 0
    assert {key: a[key] for key in EXACT} == pytest.approx({key: b[key] for key in EXACT}, rel=1e-12)
    for key in ROUNDED:
        if b[key] is None:  # no interval of so few documents
            assert a[key] is None, key
        else:
            assert a[key] == pytest.approx(b[key], rel=rel), key


@every_model
def test_scores_do_not_depend_on_the_batch_size(name, corpus):
    store, texts = corpus
    model = tiny(name, vocab_size=small_tokenizer().num_tokens)
    for data in (str(store.path), texts):
        one, *others = (
            minilm.evaluate(model, data, tokenizer=small_tokenizer(), sequence_length=LENGTH, batch_rows=rows)
            for rows in (1, 3, 8)
        )
        for other in others:
            same(one.scores.as_dict(), other.scores.as_dict())
            assert one.by_context.mean == other.by_context.mean


def test_two_processes_find_what_one_finds(corpus, tmp_path):
    store, texts = corpus
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = Path(__file__).parent / "evaluation_worker.py"
    out = tmp_path / "two.json"
    done = forked.run(script, [str(store.path), str(tmp_path / "texts.json"), str(out)], launcher="cpu2.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = json.loads(out.read_text()), everything(store, texts, 0, 1)
    assert two["overlap"] == one["overlap"] and sum(one["overlap"]["covered"]) > 0
    ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] and len(ranks[0]) == 6
    for what in ranks[0]:
        if (
            "batches" in what
        ):  # there the numbers of the documents depend on who scored them, and so does the draw
            assert two[what]["scores"]["loss"] == pytest.approx(one[what]["scores"]["loss"], rel=1e-6)
            assert two[what]["scores"]["accuracy"] == one[what]["scores"]["accuracy"]
            assert two[what]["excluded"] == one[what]["excluded"]
            continue
        same(two[what]["scores"], one[what]["scores"])
        for a, b in zip(two[what]["by_context"]["buckets"], one[what]["by_context"]["buckets"], strict=True):
            assert [a[n] for n in ("least", "most", "num_tokens")] == [
                b[n] for n in ("least", "most", "num_tokens")
            ]
            assert a["nats"] == pytest.approx(b["nats"], rel=1e-6)
            assert a["loss_95"] == pytest.approx(b["loss_95"], rel=1e-5)
        assert two[what]["by_source"].keys() == one[what]["by_source"].keys()


def test_a_place_a_store_texts_and_batches_give_one_number(made):
    place = minilm.evaluate(made.run_folder, made.store.path)
    model = minilm.evaluate(made.model, str(made.store.path), tokenizer=made.tokenizer, sequence_length=48)
    same(place.scores.as_dict(), model.scores.as_dict())
    rows = Rows(made.store, "validation", 48)
    batches = minilm.evaluate(made.model, validation_batches(rows, 4), tokenizer=made.tokenizer)
    for name in ("loss", "bits_per_byte", "accuracy", "accuracy_top5", "num_tokens"):
        assert getattr(batches.scores, name) == pytest.approx(getattr(place.scores, name), rel=1e-6)
    assert batches.excluded == {"num_positions_that_do_not_count": 48 * len(rows) - rows.num_targets}
    file = minilm.evaluate(made.model, str(made.corpus), tokenizer=made.tokenizer)
    short = fitting(made)
    texts = minilm.evaluate(made.model, (text for text in made.texts), tokenizer=made.tokenizer)
    same(file.scores.as_dict(), texts.scores.as_dict())
    flat = [n for t in short for n in token_losses(made.model, made.tokenizer.document(t))]
    found = minilm.evaluate(made.model, short, tokenizer=made.tokenizer)
    assert found.loss == pytest.approx(math.fsum(flat) / len(flat), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_accuracies_are_those_of_a_loop(made):
    model = tiny_model(made.tokenizer.num_tokens, init_std=0.02)
    with torch.no_grad():  # so that tokens of the text come often among the first
        model.embedding.weight[made.tokenizer.document(made.texts[5])] *= 8
    ranks = []
    for text in fitting(made):
        tokens = made.tokenizer.document(text)
        logits = row_logits(model, tokens)
        for i in range(1, len(tokens)):
            order = sorted(range(logits.shape[1]), key=lambda v, i=i: (-logits[i - 1][v], v))
            ranks.append(order.index(tokens[i]))
    found = minilm.evaluate(model, fitting(made), tokenizer=made.tokenizer).scores
    assert found.accuracy == sum(r == 0 for r in ranks) / len(ranks)
    assert found.accuracy_top5 == sum(r < 5 for r in ranks) / len(ranks)
    assert 0 < found.accuracy < found.accuracy_top5 < 1
    low, high = found.intervals["accuracy_top5"]
    assert low < found.accuracy_top5 < high


def test_every_interval_is_of_its_ratio_of_sums_over_documents_drawn_with_replacement(made):
    scored = minilm.evaluate(made.model, made.texts, tokenizer=made.tokenizer)
    values, random = scored.documents.values(), np.random.default_rng(0)
    drawn = [values[random.integers(0, len(values), len(values))].sum(axis=0) for _ in range(1000)]
    nats, tokens, num_bytes, top1, top5 = np.array(drawn).T
    expected = {
        "loss": nats / tokens,
        "perplexity": np.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "accuracy": top1 / tokens,
        "accuracy_top5": top5 / tokens,
    }
    assert scored.scores.intervals.keys() == expected.keys()
    for name, ratios in expected.items():
        assert scored.scores.intervals[name] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), rel=2e-3)
        assert len(set(scored.scores.intervals[name])) == 2 or name == "accuracy"


def test_bits_per_byte_compare_models_with_different_tokenizers():
    """Two tokenizers, models that give each byte 9 bits and each end 3: nats per token differ, bits per byte do not."""
    texts = some_texts(20, seed=4)
    found = []
    for vocab_size in (259, 380):
        tokenizer = Tokenizer.train(texts * 2, vocab_size=vocab_size)
        p = 512.0 ** -tokenizer.byte_lengths.double()
        p[tokenizer.eos_id], p[tokenizer.bos_id] = 1 / 8, 1e-30
        p[tokenizer.pad_id] = 0
        p[tokenizer.pad_id] = 1 - p.sum()
        assert p[tokenizer.pad_id] > 0
        found.append(minilm.evaluate(Fixed(p.log().tolist(), 512), texts, tokenizer=tokenizer))
    one, other = found
    num_bytes = sum(len(text.encode()) for text in texts)
    assert one.bits_per_byte == pytest.approx(9 + 3 * len(texts) / num_bytes, rel=1e-6)
    assert other.bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-6)
    assert other.loss > 1.2 * one.loss and other.scores.num_bytes == one.scores.num_bytes == num_bytes


@pytest.mark.parametrize("length", [16, 33])
def test_loss_by_context_is_that_of_the_tokens_with_so_many_before_them(made, length):
    """Rolling windows: each token once, with as many tokens before it as its window really has."""
    texts = [*made.texts[:20], " ".join(WORDS * 4)]
    contexts: dict[int, list[float]] = {}
    for text in texts:
        tokens = made.tokenizer.document(text)
        start, done = 0, 1
        while done < len(tokens):
            start = max(0, min(start, len(tokens) - length - 1))
            window = tokens[start : start + length + 1]
            for i, nats in enumerate(token_losses(made.model, window), 1):
                if start + i >= done:
                    contexts.setdefault(i, []).append(nats)
                    done = start + i + 1
            start += length // 2
    scored = minilm.evaluate(made.model, texts, tokenizer=made.tokenizer, sequence_length=length)
    found = scored.by_context
    assert found.num_tokens == sum(map(len, contexts.values())) == scored.scores.num_tokens
    assert (found.least, found.most) == (1, length)
    every = [n for n, nats in contexts.items() for _ in nats]
    assert found.mean == pytest.approx(np.mean(every))
    assert [b.most for b in found.buckets][:-1] == edges_up_to(length)[:-1]
    for bucket in found.buckets:
        nats = [x for n in range(bucket.least, bucket.most + 1) for x in contexts[n]]
        assert bucket.scores.num_tokens == len(nats)
        assert bucket.scores.loss == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)


def test_sources_are_scored_apart_and_make_up_the_whole(corpus, tmp_path):
    store, texts = corpus
    model = tiny("original", vocab_size=small_tokenizer().num_tokens)
    scored = minilm.evaluate(model, str(store.path), tokenizer=small_tokenizer(), sequence_length=LENGTH)
    assert set(scored.by_source) == {"1", "2"}
    for name in ("num_tokens", "num_bytes", "num_documents"):
        assert sum(getattr(s, name) for s in scored.by_source.values()) == getattr(scored.scores, name)
    for shard in store.shards("validation"):
        alone = store_of(
            tmp_path / shard.source, {"a": [[1, 2]]}, vocab_size=store.vocab_size,
            validation={"a": [shard.document(n).tolist() for n in range(shard.num_documents)]},
        )  # fmt: skip
        found = minilm.evaluate(model, str(alone.path), sequence_length=LENGTH)
        assert scored.by_source[shard.source].loss == pytest.approx(found.loss, rel=1e-6)
    for number in (1, 2):
        write_jsonl(tmp_path / f"{number}.jsonl", texts[number::2])
    files = minilm.evaluate(model, str(tmp_path / "*.jsonl"), tokenizer=small_tokenizer())
    for number in (1, 2):
        alone = minilm.evaluate(model, texts[number::2], tokenizer=small_tokenizer())
        same(files.by_source[str(tmp_path / f"{number}.jsonl")].as_dict(), alone.scores.as_dict())


def test_each_document_has_its_record(made):
    texts = fitting(made)
    found = minilm.evaluate(made.model, texts, tokenizer=made.tokenizer).document_records()
    numbers = list(range(len(texts)))
    assert numbers == [r["document"] for r in found] == [r["number_in_source"] for r in found]
    for record, text in zip(found, texts, strict=True):
        nats = token_losses(made.model, made.tokenizer.document(text))
        assert record["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
        assert (record["num_tokens"], record["num_bytes"]) == (len(nats), len(text.encode()))


def test_wrong_use_is_refused(made):
    with pytest.raises(DataError, match="nothing to score"):
        minilm.evaluate(made.model, [])
    with pytest.raises(DataError, match="Texts need a tokenizer"):
        minilm.evaluate(made.model, ["a text"])
    with pytest.raises(ConfigError, match="sequence length"):
        minilm.evaluate(made.model, ["a text"], tokenizer=made.tokenizer, sequence_length=500)
    large = Tokenizer.train(some_texts(200), vocab_size=500)
    with pytest.raises(ConfigError, match="do not belong together"):
        minilm.evaluate(made.model, str(made.corpus), tokenizer=large)


def test_validation_in_training_is_this_and_leaves_no_trace(tmp_path, capsys):
    """The loss that a run logs is what `evaluate` says of its checkpoint; a run without validation is the same run."""
    store_of(tmp_path / "store", {"a": documents(40)}, validation={"a": documents(12, seed=1)}, vocab_size=48)
    changes = {"train__steps": 6, "model__dropout": 0.2}
    run = run_here(tmp_path, tmp_path / "store", name="with", train__validate_every=1, **changes)
    said = capsys.readouterr()
    quiet = run_here(tmp_path, tmp_path / "store", name="without", train__validate_every=6, **changes)
    assert column(run, "loss") == column(quiet, "loss")
    assert len(records(run, "validation")) == 7 > len(records(quiet, "validation"))
    scored = minilm.evaluate(run, str(tmp_path / "store"))
    assert records(run, "validation")[-1]["loss"] == pytest.approx(scored.loss, rel=1e-6)
    assert all(seconds > 0 for seconds in column(run, "seconds/validation", "validation"))
    line = next(part for part in (said.out + said.err).splitlines() if "step 6: validation loss" in part)
    assert " s, " in line and line.rstrip().endswith("% of the time)")
