"""`minilm knowledge inspect`: what is told is what the model computed, and the interventions are real."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from data_stores import small_tokenizer

from minilm import models
from minilm.cli import knowledge as knowledge_command
from minilm.cli import knowledge_inspect
from minilm.errors import ConfigError
from minilm.evaluation import reading_page
from minilm.evaluation.reading import inspect
from minilm.knowledge.build import build
from minilm.knowledge.store import KnowledgeStore

FACTS = [("the cat", "sat on", f"<b>{n}</b> & mat") for n in range(20)] + [
    (f"dog {n}", "ran over", f"field {n}") for n in range(20)
]
PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    source = folder / "facts.jsonl"
    names = "subject", "relation", "object"
    source.write_text("".join(json.dumps(dict(zip(names, fact, strict=True))) + "\n" for fact in FACTS))
    build(source, tokenizer, folder / "store", side=8, width=16, code_dim=16, workers=1)
    torch.manual_seed(0)
    sizes = {"store_side": 8, "store_width": 16, "vocab_size": tokenizer.num_tokens, "init_std": 0.2}
    made = models.build(models.preset("knowledge", "tiny", store=str(folder / "store"), **sizes)).eval()
    with torch.no_grad():  # as after training: what is read comes through
        for name, value in made.named_parameters():
            if name.endswith("memory.out"):
                value.normal_(0.0, 2.0)
    return made


@pytest.fixture(scope="module")
def seen(model, tokenizer):
    return inspect(model, tokenizer, PROMPT, max_new_tokens=3)


def test_tokens_answer_and_shares_are_those_of_the_model(model, tokenizer, seen):
    ids = tokenizer.prompt(PROMPT)
    with torch.no_grad():
        for _ in range(3):  # greedily, one at a time
            ids.append(int(model(torch.tensor([ids])).logits[0].argmax(dim=-1)[len(ids) - 1]))
        output, reads = model.reads(torch.tensor([ids]))
    stops = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    assert [token.token for token in seen.tokens] == [
        tokenizer.decode([t], special=True) for t in ids[:stops]
    ]
    for t, token in enumerate(seen.tokens):
        probabilities = output.logits[0, t].detach().softmax(dim=-1)
        assert token.probability == pytest.approx(float(probabilities.max()), abs=1e-6)
        assert [layer.layer for layer in token.layers] == sorted(reads)
        for layer in token.layers:
            assert layer.null + sum(entry.weight for entry in layer.entries) == pytest.approx(1, abs=1e-5)
            read = reads[layer.layer]
            real = [s for s in read.slots[0, t].tolist() if model.store.lengths[s]]
            assert {entry.slot for entry in layer.entries} == set(real)
            for entry in layer.entries:
                place = read.slots[0, t].tolist().index(entry.slot)
                assert entry.weight == pytest.approx(float(read.weights[0, t, place]), abs=1e-6)
                subject, relation, value = FACTS[entry.row]
                assert all(word in entry.text for word in (subject, relation, value))


def test_an_entry_taken_out_is_gone_for_the_model_and_only_for_the_question(model, tokenizer, seen):
    before = model.store
    taken, other = seen.interventions
    ids = torch.tensor([tokenizer.prompt(PROMPT)])
    for change in (taken, other):
        tensors = {name: value.clone() for name, value in before.tensors().items()}
        tensors["lengths"][before.slots[change.row]] = 0
        model.store = KnowledgeStore(before.description, tensors)
        try:
            with torch.no_grad():
                without = model(ids).logits[0, ids.shape[1] - 1].softmax(dim=-1)
        finally:
            model.store = before
        with torch.no_grad():
            answer = int(model(ids).logits[0, ids.shape[1] - 1].argmax())
        assert change.after == pytest.approx(float(without[answer]), abs=1e-6)
    # One was read, and it mattered; the other can only have been a candidate.
    assert abs(taken.after - taken.before) > max(1e-3, 2 * abs(other.after - other.before))


def test_the_page_holds_every_entry_escaped_and_no_script(seen):
    page = reading_page.page(seen)
    assert "<script" not in page and "<b>" not in page
    entries = {
        entry.row: entry.text for token in seen.tokens for layer in token.layers for entry in layer.entries
    }
    shown = page.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert entries and all(text in shown for text in entries.values())
    assert page.count('href="#t') == len(seen.tokens) == page.count('<h2 id="t')


def test_a_model_without_a_memory_and_wrong_flags_are_refused(tokenizer, tmp_path):
    plain = models.build(models.preset("original", "tiny", vocab_size=tokenizer.num_tokens))
    with pytest.raises(ConfigError, match="'original' has no knowledge memory"):
        inspect(plain, tokenizer, PROMPT)
    parser = argparse.ArgumentParser()
    knowledge_command.add(parser.add_subparsers())
    where = ["--checkpoint", str(tmp_path), "--prompt", "x"]
    flags = ["--html", str(tmp_path / "no" / "x.html"), "--max-new-tokens", "-1"]
    given = parser.parse_args(["knowledge", "inspect", *where, *flags])
    with pytest.raises(
        ConfigError, match=r"--html .*there is no folder .*--max-new-tokens must be 0 or more"
    ):
        knowledge_inspect._run(given)
