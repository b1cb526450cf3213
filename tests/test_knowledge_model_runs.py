"""Knowledge models in whole runs: on two ranks, switched off, resumed, and with a store that is not theirs."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from data_stores import small_tokenizer
from knowledge_reference import facts_on_disk, model_of, store_of
from knowledge_worker import train as train_on_one
from safetensors.torch import load_file, save_file
from training_runs import (
    ROOT,
    column,
    final_weights,
    launched_script,
    make_store,
    records,
    run_here,
)
from zoo_models import tokens

from minilm import models
from minilm.errors import CheckpointError, ConfigError
from minilm.knowledge.store import DECIDE, DESCRIPTION, FOLLOW, TENSORS, KnowledgeStore
from minilm.models import folder

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SMALL = {"store_side": 16, "store_width": 8, "store_code_dim": 16, "key_dim": 16, "router_dim": 16}
SMALL |= {"num_candidates": 16, "memory_head_dim": 8, "memory_heads": 2}
SETTINGS = {f"model__{name}": value for name, value in SMALL.items()}


def written(store: KnowledgeStore, place):
    """As `minilm knowledge build` leaves it, without a tokenizer."""
    place.mkdir()
    save_file({name: getattr(store, name).contiguous() for name in (*DECIDE, *FOLLOW)}, place / TENSORS)
    (place / DESCRIPTION).write_text(json.dumps(store.description))
    return place


# ------------------------------------------------------------------ ranks


@pytest.mark.xdist_group("two ranks")
def test_two_ranks_have_one_memory_and_the_gradient_of_one_process(tmp_path):
    """M14: a table drawn per rank (E9), an update of one rank (E10), a loss gathered without its gradient (E8)."""
    worker = ROOT / "tests" / "knowledge_worker.py"
    result = launched_script(worker, [str(tmp_path / "out.json")], launcher="cpu2_zero2.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    alone = train_on_one()
    assert "one process" in alone["layout"] and max(alone["errors"].values()) < 1e-4
    for layout, ranks in json.loads((tmp_path / "out.json").read_text()).items():
        assert len(ranks) == 2 and all(rank["layout"].startswith(layout) for rank in ranks)
        held_on_two(ranks, alone)


def held_on_two(ranks, alone):
    for before, after in zip(ranks[0]["states"], ranks[1]["states"], strict=True):
        assert before == after
    first, last = ranks[0]["states"]
    assert first["store"] == last["store"]
    assert all(first[name] != last[name] for name in ("keys", "reads", "answer"))  # two-sided: it learnt
    for rank in ranks:
        assert max(rank["errors"].values()) < 1e-4, rank["errors"]
    assert ranks[0]["last"] == pytest.approx(alone["last"], rel=1e-3)


# ------------------------------------------------------------------ switched off


@pytest.mark.parametrize("pair", [("original", "knowledge"), ("no_ffn", "no_ffn_knowledge")])
def test_a_run_without_a_memory_is_the_plain_run(pair, tmp_path):
    """M12: data order, dropout, schedule, optimizer, in a real run: weights bit for bit; with it, the first loss."""
    data = make_store(tmp_path / "data")
    asked = {"train__steps": 4, "model__dropout": 0.1, "optim__warmup_steps": 1}
    if pair[0] == "no_ffn":
        asked["model__name"] = "no_ffn"
    plain = run_here(tmp_path, data, name="plain", **asked)
    off = {"model__name": pair[1], "model__memory": "none", "model__store": ""}
    without = run_here(tmp_path, data, name="without", **asked | off)
    on = {"model__name": pair[1], "model__store": "random", "train__steps": 2}
    having = run_here(tmp_path, data, name="having", **asked | on | SETTINGS)
    a, b = final_weights(plain), final_weights(without)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert column(plain, "loss") == column(without, "loss")
    assert column(having, "loss")[0] == column(plain, "loss")[0]


# ------------------------------------------------------------------ watched


def test_the_watch_replays_an_oracle_with_the_labels_that_it_was_trained_with(tmp_path):
    """Without them it reads nothing, and the replayed loss is that of another model: a false alarm."""
    data, store = facts_on_disk(tmp_path)
    asked = {"model__name": "knowledge", "model__store": store, **SETTINGS, "model__retrieval": "oracle"}
    asked |= {"model__vocab_size": small_tokenizer().num_tokens, "data__rows": "packed"}
    asked |= {"doctor__watch": "true", "doctor__watch_share": 0.5, "train__steps": 6}
    run = run_here(tmp_path, data, optim__learning_rate=0.01, **asked)
    looks = records(run, "doctor")
    assert looks and all(look["failures"] == 0 and look["replay_error"] < 1e-5 for look in looks), looks


# ------------------------------------------------------------------ resume, folders, other stores


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """M18, and again the store of a checkpoint is found by its fingerprint."""
    data, store = facts_on_disk(tmp_path)
    asked = {"model__name": "knowledge", "model__store": store, **SETTINGS, "train__usage_every": 2}
    asked |= {"model__vocab_size": small_tokenizer().num_tokens, "data__rows": "packed"}
    whole = run_here(tmp_path, data, name="whole", train__steps=6, **asked)
    stopped = {"train__steps": 6, "train__save_every": 3}
    run_here(tmp_path, data, name="parts", **asked, **stopped)
    kept = sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))
    assert len(kept) == 2
    described = json.loads((kept[0] / "model.json").read_text())["config"]
    assert described["store_fingerprint"] == KnowledgeStore.open(store).fingerprint
    assert {p.name for p in kept[0].rglob("*") if "knowledge" in p.name} == set()  # a fingerprint, no copy
    a, b = final_weights(whole), final_weights(tmp_path / "parts")
    assert all(torch.equal(a[name], b[name]) for name in a)
    shutil.rmtree(kept[1])
    moved = shutil.copytree(store, tmp_path / "moved")  # where it lies does not matter
    asked["model__store"] = moved
    resumed = run_here(tmp_path, data, name="parts", resume=True, **asked, **stopped)
    c = final_weights(resumed)
    assert all(torch.equal(a[name], c[name]) for name in a)
    usage = [name for name in column_names(whole) if name.startswith("usage/")]
    assert any(name.endswith("coverage") for name in usage)

    assert all(value > 0 for value in column(whole, "auxiliary/retrieval"))  # the labels of the data arrived
    (tmp_path / "again").mkdir()
    _, other = facts_on_disk(tmp_path / "again", 100)
    shutil.rmtree(kept[1])
    with pytest.raises(CheckpointError, match="store_fingerprint"):
        run_here(tmp_path, data, name="parts", resume=True, **{**asked, "model__store": other}, **stopped)


def column_names(run):
    return {name for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model in a folder, whose store lies in another."""
    written(store_of(), tmp_path / "entries")
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    model = models.build(models.preset("knowledge", "tiny", store="entries", init_std=0.2)).eval()
    with torch.no_grad():
        for layer in (model.blocks[n].memory for n in model.config.layers):
            layer.out.normal_(0, 0.2)
    folder.save(model, tmp_path / "model")
    return tmp_path, model


def test_a_loaded_model_reads_the_same_store_and_says_the_same(saved, monkeypatch):
    place, model = saved
    monkeypatch.chdir("/")  # a store is named by where it is, not as seen from here
    loaded = folder.load(place / "model")
    assert loaded.store.fingerprint == model.store.fingerprint == loaded.config.store_fingerprint
    ids = tokens(model, 2, 20)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("what", ["other", "permuted", "truncated", "altered", "missing", "settings"])
def test_a_store_that_is_not_the_models_is_refused(saved, what):
    """M18: E12, a table that is taken for the right one by its name."""
    place, _ = saved
    entries = place / "entries"
    if what == "other":
        remade(entries, store_of(seed=1))
    elif what == "permuted":  # the same entries in other slots: right checksums, another fingerprint
        order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
        store = store_of()
        moved = {name: t[order] if name in ("ids", "lengths", "codes", "rows") else t
                 for name, t in store.tensors().items() if name != "slots"}  # fmt: skip
        kept = ("fingerprint", "checksums", "format", "version", "code_scale")
        settings = {k: v for k, v in store.description.items() if k not in kept}
        remade(entries, KnowledgeStore.sealed(settings, moved))
    elif what == "truncated":
        data = (entries / TENSORS).read_bytes()
        (entries / TENSORS).write_bytes(data[:-100])
    elif what == "altered":
        tensors = load_file(entries / TENSORS)
        tensors["ids"][0, 0] += 1
        save_file(tensors, entries / TENSORS)
    elif what == "missing":
        entries.rename(place / "elsewhere")
    else:
        remade(entries, KnowledgeStore.random(8, 8, 256, code_dim=16))
    with pytest.raises((CheckpointError, ConfigError)) as error:
        folder.load(place / "model")
    wanted = {
        "altered": "differs from its checksum",
        "truncated": "damaged",
        "missing": "elsewhere now, give --store DIR",
    }
    assert wanted.get(what, "store") in str(error.value)
    assert str(entries) in str(error.value)


def remade(place, store):
    for file in place.iterdir():
        file.unlink()
    place.rmdir()
    written(store, place)


def test_a_model_without_a_store_and_settings_that_contradict_are_explained():
    with pytest.raises(ConfigError, match=r"model\.store is not set.*knowledge build.*memory=none"):
        models.build(models.preset("knowledge", "tiny", store=""))
    with pytest.raises(ConfigError, match="no power of two"):
        models.build(models.preset("knowledge", "tiny", store_side=12))
    with pytest.raises(ConfigError, match="num_read 16 < num_candidates 16 < slots of the grid 256"):
        models.build(models.preset("knowledge", "tiny", num_read=16))
    for layers in ([], [0, 0], [2], [-1]):
        with pytest.raises(ConfigError, match=r"memory_layers.*different numbers from 0 to 1"):
            models.build(models.preset("knowledge", "tiny", memory_layers=layers))


def test_what_the_config_predicts_is_what_is_there():
    """Parameters by group, without and with the memory; its products are in the FLOPs."""
    plain, config = models.preset("original", "tiny"), models.preset("knowledge", "tiny")
    assert config.num_parameters() - plain.num_parameters() == sum(
        config.parameter_groups()[name] for name in ("sub-keys", "memory")
    )
    assert config.flops_per_token(64) > plain.flops_per_token(64)
    off = dataclasses.replace(config, memory="none")
    assert off.num_parameters() == plain.num_parameters()
    assert off.flops_per_token(64) == plain.flops_per_token(64)
    assert model_of().config.layers == (1,)
