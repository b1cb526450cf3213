"""What a user can do wrong when training: one paragraph that says what, where and what to do, exit code 2."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from training_runs import SETTINGS, column, flags, launched, make_store, records, run_here

from minilm import models
from minilm.errors import CheckpointError, ConfigError, DataError
from minilm.training import trainer
from minilm.training.step import NonFinite

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def test_the_command_line_ends_with_2_and_without_a_traceback_for_all_problems_at_once(tmp_path, store):
    given = flags(
        SETTINGS | {"data.store": store, "train.steps": 5, "train.learning_rate": 1, "model.num_heads": 5}
    )
    result = launched(given, really=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "Unknown setting train.learning_rate. Did you mean optim.learning_rate" in result.stderr
    assert "Traceback" in launched([*given, "--debug"]).stderr


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model__num_heads": 5}, ConfigError, r"--model\.num_heads: 5 heads do not divide dim 32"),
        ({"data__sequence_length": 65}, ConfigError, r"longer than model\.max_length 64"),
        ({"train__steps": 3}, ConfigError, r"5 steps of warm-up do not fit into train\.steps 3"),
        ({"train__epochs": 2}, ConfigError, r"exactly one of train\.steps and train\.epochs"),
        (
            {"train__steps": "none", "train__epochs": 0.1},
            ConfigError,
            r"5 steps of warm-up do not fit into the 2 steps that train\.epochs 0\.1 makes",
        ),
        ({"train__micro_batch": 3}, ConfigError, r"train\.micro_batch 3 rows: it must be a multiple of 3"),
        ({"train__batch_size": 4000}, ConfigError, r"4000.*more than the \d+ rows of an epoch"),
        ({"model__vocab_size": 40}, ConfigError, r"--model\.vocab_size.*is 40.*ids up to 47"),
        ({"model__name": "orignal"}, ConfigError, r"There is no model 'orignal'.*did you mean 'original'"),
        ({"model__size": "27m"}, ConfigError, r"model\.size '27m' does not exist for original"),
        ({"data__store": "nowhere"}, DataError, r"nowhere"),
        ({"train__device": "cuda"}, ConfigError, r"train\.device is cuda, but no CUDA device is visible"),
    ],
)
def test_contradictions_are_named(tmp_path, store, changes, error, message):
    with pytest.raises(error, match=message):
        run_here(tmp_path, store, **({"train__steps": 10} | changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # found before anything was written


def test_launcher_settings_that_contradict_the_run_are_refused_all_at_once(tmp_path, store, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json")
    with pytest.raises(ConfigError) as caught:
        run_here(tmp_path, store, train__steps=10, train__micro_batch=4)
    for part in ("ZeRO stage 3", "4 accumulation steps", "clips at 1, optim.clip_norm is 0.5", "ds.json"):
        assert part in str(caught.value)


def test_mixed_precision_of_the_launcher_must_fit(tmp_path, store, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"train\.precision is fp32, but the launcher was told bf16"):
        run_here(tmp_path, store, train__steps=10)


def test_a_token_id_outside_the_vocabulary_is_refused_before_training(tmp_path, store):
    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["vocab_size"] = 20
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        run_here(tmp_path, broken, train__steps=10, model__vocab_size=48)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, store):
    run = run_here(tmp_path, store, train__steps=6)
    with pytest.raises(ConfigError, match=r"model\.dim: 32 before, 64 now"):
        run_here(tmp_path, store, resume=True, train__steps=6, model__dim=64)
    model = models.build(models.preset("original", "tiny"))
    with pytest.raises(CheckpointError, match=r"another model"):
        models.folder.load_weights(model, run / "checkpoints" / "step-00000006")


def test_too_little_disk_is_found_at_the_start(tmp_path, store, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"A checkpoint takes about .* MB free"):
        run_here(tmp_path, store, train__steps=6)


def test_a_full_disk_in_the_middle_keeps_the_last_checkpoint_and_the_metrics(tmp_path, store, monkeypatch):
    from minilm.training import checkpoint

    real = checkpoint._seal

    def seal(folder):
        if "00000012" in folder.name:
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(checkpoint, "_seal", seal)
    with pytest.raises(CheckpointError, match=r"step-00000012 could not be written.*No space left.*--resume"):
        run_here(tmp_path, store, train__steps=18, train__save_every=6)
    run = tmp_path / "run"
    assert checkpoint.find(run)[0].step == 6
    assert column(run, "step")[-1] in (12, 13, 14)  # written in the background: found out at a step border
    assert json.loads((run / "manifest.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    run_here(tmp_path, store, resume=True, train__steps=18, train__save_every=6)
    assert column(run, "step") == list(range(1, 19))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_the_step(
    tmp_path, store, monkeypatch, where
):
    real, taken, kept = trainer.optimizer_step, [], {}

    def poisoned(layout, batches, **keywords):
        taken.append(1)
        if len(taken) == 4:
            kept.update({name: p.detach().clone() for name, p in layout.model.named_parameters()})
            kept["layout"] = layout
            if where == "loss":
                monkeypatch.setattr(layout.model, "forward", _poison(layout.model.forward))
            else:
                next(layout.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
        return real(layout, batches, **keywords)

    monkeypatch.setattr(trainer, "optimizer_step", poisoned)
    with pytest.raises(NonFinite, match=r"The step was not taken"):
        run_here(tmp_path, store, train__steps=10)
    layout = kept.pop("layout")
    for name, p in layout.model.named_parameters():
        assert torch.equal(p.detach(), kept[name]), name
    last = records(tmp_path / "run")[-1]
    assert last["step"] == 4
    assert ("loss" if where == "loss" else "gradient_norm") in last["nonfinite"]  # shown, not repaired
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "failed"


def _poison(forward):
    def poisoned(*arguments, **keywords):
        output = forward(*arguments, **keywords)
        output.hidden = output.hidden * math.inf
        return output

    return poisoned
