"""Labels made from text alone: held against a slow search over all entries, and against labels that are known."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
from data_stores import small_tokenizer

from minilm import cli
from minilm.cli import knowledge as knowledge_command
from minilm.data.build import build as build_data
from minilm.data.store import Store
from minilm.errors import ConfigError, DataError
from minilm.knowledge import teacher
from minilm.knowledge.build import build as build_knowledge
from minilm.knowledge.store import KnowledgeStore

SENTENCES = [
    "the cat sat on the mat",
    "a dog ran over a field",
    "some birds sing at dawn",
    "many words make one book",
    "old ships sail far north",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = small_tokenizer()
    source = folder / "sentences.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    documents = folder / "documents.jsonl"
    texts = [
        f"It is said that {SENTENCES[n % 5]}. Nobody knew why {SENTENCES[(n + 2) % 5]}." for n in range(12)
    ]
    documents.write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n, text in enumerate(texts)))
    build_knowledge(source, tokenizer, folder / "knowledge", side=4, width=24, workers=1)
    build_data(folder / "data", [str(documents)], tokenizer, validation_fraction=0.0)
    return folder


def test_labels_equal_a_slow_search_over_all_entries(made):
    """The codes only choose candidates: with fewer entries than those, the exact rule decides alone."""
    knowledge, data = KnowledgeStore.open(made / "knowledge"), Store.open(made / "data")
    shard = data.shards("train")[0]
    got = teacher.labels_of(shard.tokens, shard.offsets, knowledge, threshold=0.5)
    classes, idf = knowledge.classes.tolist(), knowledge.idf.tolist()
    checked = 0
    for document in range(shard.num_documents):
        begin = int(shard.offsets[document])
        tokens = [int(t) for t in shard.document(document)]
        assert got[begin] == -1
        for t in range(len(tokens) - 1):
            around = {classes[x] for x in tokens[max(0, t - teacher.BEHIND + 1) : t + teacher.AHEAD + 1]}
            best = {}
            for row in range(len(SENTENCES)):
                entry = knowledge.tokens_of(row)
                share = sum(idf[x] for x in entry if classes[x] in around) / sum(idf[x] for x in entry)
                if classes[tokens[t + 1]] in {classes[x] for x in entry} and share >= 0.5:
                    best[row] = share
            label = int(got[begin + t + 1])
            assert (label == -1) == (not best)
            if best:
                assert best[label] == pytest.approx(max(best.values()))
                checked += 1
    assert checked > 100


def test_the_command_labels_the_store_and_says_how_much(made, capsys):
    parser = argparse.ArgumentParser()
    knowledge_command.add(parser.add_subparsers())
    before = Store.open(made / "data").fingerprint
    arguments = ["knowledge", "align", "--data", str(made / "data"), "--store", str(made / "knowledge")]
    given = parser.parse_args(arguments)
    assert given.run(given) == 0
    after = Store.open(made / "data")
    labels = np.concatenate([shard.entries for shard in after.shards("train")])
    said = capsys.readouterr().out
    assert f"{int((labels >= 0).sum()):,} of {len(labels):,} tokens" in said
    assert after.fingerprint != before and set(np.unique(labels)) <= set(range(-1, len(SENTENCES)))
    knowledge = KnowledgeStore.open(made / "knowledge")
    assert after.entries_of == knowledge.description["source"]["sha256"]
    wrong = parser.parse_args([*arguments, "--threshold", "0"])
    with pytest.raises(ConfigError, match=r"--threshold 0\.0: a share above 0"):
        wrong.run(wrong)
    assert cli.guarded(lambda: wrong.run(wrong), debug=False) == 2


def test_a_store_of_another_tokenizer_is_refused(made, tmp_path):
    build_knowledge(made / "sentences.jsonl", small_tokenizer(300), tmp_path / "knowledge", side=4, workers=1)
    with pytest.raises(DataError, match="made with different tokenizers"):
        teacher.label(Store.open(made / "data"), KnowledgeStore.open(tmp_path / "knowledge"))
