"""What a start says and refuses; the position columns; the end of a run that was killed before its books closed."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from data_stores import store_of
from training_runs import (
    ROOT,
    SETTINGS,
    VOCAB,
    column,
    documents,
    flags,
    launched,
    launched_script,
    make_store,
    records,
    run_here,
)

from minilm.data.loader import Loader
from minilm.data.rows import Rows
from minilm.data.store import Store
from minilm.errors import CheckpointError, OutOfMemory
from minilm.training import checkpoint, columns, trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_position_columns_name_the_first_document_of_the_batch(tmp_path, prefetch):
    store_of(
        tmp_path / "store", {"a": documents(40), "b": documents(60, seed=3)},
        validation={"a": documents(4, seed=1)}, vocab_size=VOCAB, weights={"b": 2.0},
    )  # fmt: skip
    run = run_here(
        tmp_path, tmp_path / "store", train__steps=40, data__prefetch=prefetch, train__micro_batch=4
    )
    rows = Rows(Store.open(tmp_path / "store"), "train", 24, "document")
    loader = Loader(rows, batch_rows=8, micro_batch=8)
    assert {record["data/source"] for record in records(run)} == {"a", "b"}
    for record in records(run):
        batch = record["data/batch"]
        assert batch == record["step"] - 1 and record["epoch"] == (batch + 1) / loader.steps_per_epoch
        where = loader.where(batch).rows[0]
        assert (record["data/source"], record["data/document"]) == (where.source, where.first_document)
        inputs = loader.step(batch)[0].inputs[0].tolist()
        document = documents(40) if where.source == "a" else documents(60, seed=3)
        text = " ".join(map(str, document[where.first_document]))
        assert " ".join(map(str, inputs[:2])) in text


def test_tokens_seen_against_tokens_planned(tmp_path, store):
    run = run_here(
        tmp_path, store, train__steps=30
    )  # two epochs of 15 steps; 3 of 123 rows of each are left over
    shares, tokens = column(run, "tokens_share"), column(run, "total_tokens")
    assert shares[-1] == pytest.approx(1, abs=0.02) and shares == sorted(shares)
    assert tokens[9] / shares[9] == pytest.approx(tokens[-1] / shares[-1])  # one plan
    limited = run_here(tmp_path, store, name="limited", train__steps=30, train__max_tokens=tokens[9])
    assert column(limited, "tokens_share")[-1] == 1


def test_counts_are_shown_where_the_settings_can_make_them_rise(tmp_path, store):
    plain = records(run_here(tmp_path, store, name="plain", train__steps=5))[-1]
    assert "skipped_steps" not in plain and "rollbacks" not in plain
    settings = {"train__on_nonfinite": "skip", "train__on_spike": "rollback", "train__spike_factor": 9}
    shown = records(run_here(tmp_path, store, train__steps=5, **settings))[-1]
    assert shown["skipped_steps"] == shown["rollbacks"] == 0


def test_reserved_memory_is_told_on_a_gpu(monkeypatch):
    for name, value in (("memory_allocated", 1e6), ("memory_reserved", 2e6), ("max_memory_allocated", 3e6)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    told = columns.memory(torch.device("cuda", 0))
    assert (told["memory/allocated_mb"], told["memory/reserved_mb"], told["memory/peak_mb"]) == (1, 2, 3)


# ---------------------------------------------------------------- settings without effect


def test_settings_that_change_nothing_are_named(tmp_path, store, capsys):
    run_here(
        tmp_path, store, train__steps=6, optim__muon_momentum=0.5, optim__decay_share=0.5, train__skip_budget=9,
        train__rollback_budget=1, train__init_weights="ema", sample__top_k=3, track__project="mine",
    )  # fmt: skip
    told = [line for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    expected = {
        "optim.muon_momentum 0.5": "optim.name is adamw",
        "optim.decay_share 0.5": "optim.schedule is cosine",
        "train.skip_budget 9": "train.on_nonfinite is stop",
        "train.rollback_budget 1": "train.on_spike is report",
        "train.init_weights ema": "train.init_from is not given",
        "sample.top_k 3": "the store has no tokenizer",
        "track.project mine": "track.swanlab is off",
    }
    assert len(told) == len(expected)
    for name, why in expected.items():
        assert any(line.startswith(f"warning: {name} (--") and why in line for line in told), name


def test_settings_with_an_effect_and_defaults_written_out_are_not_named(tmp_path, store, capsys):
    run_here(tmp_path, store, name="muon", train__steps=6, optim__name="muon", optim__muon_momentum=0.5)
    run_here(tmp_path, store, name="same", train__steps=6, optim__muon_momentum=0.95, train__skip_budget=3)
    assert "has no effect" not in capsys.readouterr().err


# ---------------------------------------------------------------- the validation store


def test_other_validation_documents_are_refused_on_resume_and_a_moved_store_is_not(tmp_path, store):
    def held_out(name, seed):
        store_of(
            tmp_path / name, {"a": documents(4)}, validation={"a": documents(12, seed=seed)}, vocab_size=VOCAB
        )
        return tmp_path / name

    settings = {"train__steps": 12, "train__save_every": 6}
    one, other = held_out("one", 5), held_out("other", 6)
    run = run_here(tmp_path, store, data__validation_store=one, **settings)
    before = records(run, "validation")
    for folder in (run / "checkpoints").glob("step-00000012"):
        folder.rename(tmp_path / "moved away")
    for changed in (other, ""):
        with pytest.raises(
            CheckpointError, match=r"data\.validation_store: the run was validated on the store"
        ):
            run_here(tmp_path, store, resume=True, data__validation_store=changed, **settings)
    moved = one.rename(tmp_path / "elsewhere")
    run_here(tmp_path, store, resume=True, data__validation_store=moved, **settings)
    assert [r["loss"] for r in records(run, "validation")] == [r["loss"] for r in before]


# ---------------------------------------------------------------- ends


KILLED_AT_THE_END = """
import os, signal, sys
import torch
sys.path[:0] = {paths}
torch.set_num_threads(1)
import train
from minilm.books import Books
Books.__exit__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
train.main(sys.argv[1:])
"""


def test_a_run_that_was_killed_between_its_last_save_and_its_end_gets_one(tmp_path, store):
    whole = run_here(tmp_path, store, name="whole", train__steps=12)
    script = tmp_path / "killed.py"
    script.write_text(KILLED_AT_THE_END.format(paths=[str(ROOT)]))
    settings = SETTINGS | {"data.store": store, "run.folder": tmp_path, "run.name": "run", "train.steps": 12}
    assert launched_script(script, flags(settings)).returncode == -signal.SIGKILL
    run = tmp_path / "run"
    assert checkpoint.find(run)[0].step == 12 and not (run / "loss.png").exists()
    assert json.loads((run / "manifest.json").read_text())["state"] == "running"
    run_here(tmp_path, store, resume=True, train__steps=12)
    ended, expected = (json.loads((r / "manifest.json").read_text()) for r in (run, whole))
    assert (ended["state"], ended["step"], ended["results"]) == ("finished", 12, expected["results"])
    assert ended["results"]["loss"] == column(run, "loss")[-1]
    assert (run / "loss.png").stat().st_size > 1000 and column(run, "step") == list(range(1, 13))
    before = (run / "metrics.jsonl").read_bytes()
    run_here(tmp_path, store, resume=True, train__steps=12)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_device_without_memory_ends_the_run_with_what_would_take_less(tmp_path, store, monkeypatch):
    def full(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore")

    monkeypatch.setattr(trainer, "optimizer_step", full)
    with pytest.raises(OutOfMemory) as told:
        run_here(tmp_path, store, train__steps=6, train__micro_batch=4)
    text = str(told.value)
    assert "Tried to allocate 2.00 GiB" in text and "train.micro_batch (now 4;" in text
    assert "activation_checkpointing blocks (now none)" in text
    assert "weights 80.5 kB" in text and "peak" in text  # 4 bytes for each of 20,128 parameters
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "failed"


def test_a_dry_run_after_going_back_shows_the_rows_that_come_next(tmp_path, store, monkeypatch):
    """The schedule stands at step 25, the data at batch 29."""
    import rollback_worker

    settings = {
        "train__steps": 25,
        "train__save_every": 5,
        "train__spike_factor": 15,
        "train__on_spike": "rollback",
    }
    with monkeypatch.context() as patch:
        rollback_worker.plan([23], patch=patch.setattr)
        run = run_here(tmp_path, store, **settings)
    found = checkpoint.find(run)[0]
    assert (found.step, found.trainer["loader"]["next_step"]) == (25, 29)
    given = SETTINGS | {"data.store": store, "run.folder": tmp_path, "run.name": "run"}
    given |= {key.replace("__", "."): value for key, value in settings.items()}
    page = launched([*flags(given), "--resume", "--dry-run"]).stdout
    loader = Loader(Rows(Store.open(store), "train", 24, "document"), batch_rows=8, micro_batch=8)
    assert "Two rows of step 26" in page
    for place in loader.where(29).rows[:2]:
        assert str(place) in page
