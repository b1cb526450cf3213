"""The doctor looks at the memory of our models: what it is handed, what it finds, and that it leaves no trace."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from data_stores import small_tokenizer, texts, write_jsonl
from knowledge_reference import NAMES, emptied, facts_on_disk, memories, model_of, store_of
from training_runs import SETTINGS
from zoo_models import tiny

import minilm
from minilm import models
from minilm.data.build import build as build_data
from minilm.doctor.targets import our_memory
from minilm.doctor.targets.our_memory import entries_of, initial_stds, memory_view, without_gradient
from minilm.doctor.targets.our_model import model_subject
from minilm.knowledge.build import build as build_knowledge
from minilm.models import retrieval

CHECKS = ("retrieval", "memory_use", "memory_spread")
every_name = pytest.mark.parametrize("name", NAMES)


def findings(model, *only, fresh=True, **parts):
    subject = model_subject(model, fresh=fresh).but(**parts)
    return {f.check: f for f in minilm.examine(subject, only=only or CHECKS).findings}


@every_name
@pytest.mark.parametrize("entries", [None, 60])
def test_a_healthy_memory_passes_and_is_as_before(name, entries):
    model = model_of(name)
    model.store = store = store_of(entries)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for finding in findings(model).values():
        assert finding.status == "PASS", finding
    assert model.store is store and model.recorded is None
    store.verify()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_is_not_a_memory_is_not_looked_at():
    for settings in ({"memory": "none", "store": ""}, {"retrieval": "oracle"}):
        assert memory_view(models.build(models.preset("knowledge", "tiny", **settings))) is None
    plain = models.build(models.preset("original", "tiny"))
    assert memory_view(plain) is None and entries_of(plain) is None and initial_stds(plain) == {"*": 0.02}


def test_scores_of_a_large_grid_are_those_of_its_keys(monkeypatch):
    model = model_of()
    small = memory_view(model)
    states = small.states(torch.arange(20)[None])
    monkeypatch.setattr(our_memory, "MOST_KEYS", 0)
    large = memory_view(model)
    assert small.scores is None and large.scores is not None
    torch.testing.assert_close(large.every_score(states), small.every_score(states))
    assert findings(model, "retrieval")["retrieval"].status == "PASS"


def test_candidates_that_are_not_the_best_are_found(monkeypatch):
    """pk-topk-not-exact, mem-index-off-by-one: in our own model."""
    real = retrieval.best_cells

    def fewer(rows, columns, k):
        scores, cells = real(rows, columns, k + 5)
        return scores[..., 5:], cells[..., 5:]

    def exchanged(rows, columns, k):
        scores, cells = real(rows, columns, k)
        return scores, cells % 16 * 16 + cells // 16

    for broken, bug in ((fewer, "pk-topk-not-exact"), (exchanged, "mem-index-off-by-one")):
        monkeypatch.setattr(retrieval, "best_cells", broken)
        finding = findings(model_of(), "retrieval")["retrieval"]
        assert finding.status == "FAIL" and bug in finding.bugs


def alike(model):
    model.keys.keys.copy_(torch.randn(model.keys.keys.shape[-1]).expand_as(model.keys.keys))


def shut(model):
    for layer in memories(model):
        layer.gate_bias.fill_(-30.0)


def nothing(model):
    for layer in memories(model):
        layer.null_bias.fill_(60.0)


def everything(model):
    for layer in memories(model):
        layer.null_bias.fill_(-60.0)


@pytest.mark.parametrize(
    "plant, bug, place",
    [
        (alike, "mem-dead-keys", "keys"),
        (shut, "mem-gate-dead", "gate"),
        (nothing, "mem-gate-dead", "null slot"),
        (everything, "mem-gate-dead", "null slot"),
    ],
)
def test_a_memory_that_says_nothing_is_found(plant, bug, place):
    """M15: dead keys, a gate that closed, a null slot that takes all or nothing."""
    # Alike, all keys tie, and the same few are always taken: few of a grid that is not tiny.
    model = model_of(**({"store_side": 64, "num_candidates": 5} if plant is alike else {}))
    with torch.no_grad():
        plant(model)
    finding = findings(model, "memory_spread", fresh=False)["memory_spread"]
    assert finding.status == "FAIL" and finding.bugs[0] == bug and place in finding.component


def test_a_memory_that_is_told_what_to_read_is_not_accused_of_a_shut_gate():
    """The checks' rows name no entry, so it reads nothing there and no gradient reaches it."""
    learned, told = tiny("knowledge"), tiny("knowledge", retrieval="oracle")
    learned.store = told.store = store_of()
    assert without_gradient(learned) == ()
    (finding,) = findings(told, "gradients_reach").values()
    assert finding.status == "PASS", finding
    accused = findings(told, "gradients_reach", unused=())["gradients_reach"]
    assert accused.status == "FAIL" and ".memory" in accused.component


def test_an_empty_store_is_no_reason_for_an_alarm():
    model = model_of()
    model.store = emptied(store_of(), torch.ones(256, dtype=torch.bool))
    assert findings(model, "memory_spread")["memory_spread"].status == "NOT RUN"


def settings_file(folder, data, store):
    sections: dict = {}
    own = {
        "model.name": "knowledge",
        "model.store": str(store),
        "data.store": str(data),
        "run.folder": str(folder),
    }
    own |= {"model.num_candidates": 16, "model.key_dim": 16, "model.router_dim": 16, "model.num_layers": 3}
    for name, value in (SETTINGS | own).items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    del sections["model"]["vocab_size"]
    sections["train"]["steps"] = 20
    sections["doctor"] = {"check": "off", "watch": False}
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def test_settings_of_a_knowledge_model_are_examined_with_their_store(tmp_path):
    """Two memory layers on a real store: what begins alike, decays or not, and is drawn how, is known."""
    data, store = facts_on_disk(tmp_path)
    path = settings_file(tmp_path, data, store)
    only = [
        *CHECKS,
        "initialisation",
        "decay_groups",
        "optimizer_covers",
        "held_out",
        "causality",
        "cache_parity",
    ]
    examined = minilm.examine(path, only=only)
    assert {f.check: f.status for f in examined.findings} == dict.fromkeys(
        (f.check for f in examined.findings), "PASS"
    ), [f for f in examined.findings if f.status != "PASS"]
    assert "knowledge base" in next(f for f in examined.findings if f.check == "held_out").message


def test_a_store_made_of_validation_text_is_found(tmp_path):
    """M17, mem-eval-leak: the entries are compared with the validation documents."""
    lines = texts(60, longest=40)
    corpus, tokenizer = write_jsonl(tmp_path / "corpus.jsonl", lines), small_tokenizer()
    build_data(tmp_path / "data", [str(corpus)], tokenizer, validation_fraction=0.2)
    pieces = [
        {"text": " ".join(line.split()[n : n + 12])}
        for line in lines
        for n in range(0, len(line.split()), 12)
    ]
    source = tmp_path / "entries.jsonl"
    source.write_text("".join(json.dumps(piece) + "\n" for piece in pieces), encoding="utf-8")
    build_knowledge(source, tokenizer, tmp_path / "kb", side=32, width=32, code_dim=16, workers=1)
    path = settings_file(tmp_path, tmp_path / "data", tmp_path / "kb")
    finding = minilm.examine(path, only=["held_out"]).findings[0]
    assert (
        finding.status == "FAIL" and finding.bugs == ("mem-eval-leak",) and "knowledge" in finding.component
    )
