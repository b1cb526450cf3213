"""An interrupted run continued is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from training_runs import column, final_weights, launched, make_store, records, run_here

from minilm.errors import CheckpointError, ConfigError
from minilm.training import checkpoint, trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# 90 documents make about 14 steps an epoch. Dropout, so that random states matter; two micro-batches.
RUN = {"train__steps": 32, "train__micro_batch": 4, "model__dropout": 0.1}
COLUMNS = ("step", "loss", "gradient_norm", "learning_rate", "step_tokens", "total_tokens", "epoch")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, store):
    return run_here(tmp_path_factory.mktemp("runs"), store, name="undisturbed", **RUN)


def assert_same_run(run, reference):
    for name in COLUMNS:
        assert column(run, name) == column(reference, name), name
    assert column(run, "loss", "validation")[-1] == column(reference, "loss", "validation")[-1]
    weights, expected = final_weights(run), final_weights(reference)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


class PowerCut(Exception):
    pass


def cut_power_at(monkeypatch, step):
    """The process dies while it computes this step."""
    real, taken = trainer.optimizer_step, []

    def step_or_die(*arguments, **keywords):
        taken.append(1)
        if len(taken) == step:
            raise PowerCut
        return real(*arguments, **keywords)

    monkeypatch.setattr(trainer, "optimizer_step", step_or_die)


@pytest.mark.parametrize("saved_at", [5, 20], ids=["inside the first epoch", "inside the second epoch"])
def test_a_run_that_died_continues_bit_for_bit(tmp_path, monkeypatch, store, undisturbed, saved_at):
    with monkeypatch.context() as patch:
        cut_power_at(patch, saved_at + 4)
        with pytest.raises(PowerCut):
            run_here(tmp_path, store, **RUN, train__save_every=saved_at)
    run = tmp_path / "run"
    assert column(run, "step")[-1] == saved_at + 3  # three steps were done that no checkpoint has
    run_here(tmp_path, store, resume=True, **RUN, train__save_every=saved_at)
    assert_same_run(run, undisturbed)
    superseded = [json.loads(line) for line in (run / "metrics.superseded.jsonl").read_text().splitlines()]
    assert [r["step"] for r in superseded if r["kind"] == "train"] == [
        saved_at + 1,
        saved_at + 2,
        saved_at + 3,
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_next_step_border_and_the_run_continues_bit_for_bit(
    tmp_path, monkeypatch, store, undisturbed, number
):
    real = trainer.optimizer_step

    def step_with_signal(*arguments, **keywords):
        if keywords.get("stop") is False and not sent:
            sent.append(1)
            os.kill(os.getpid(), number)
        return real(*arguments, **keywords)

    sent: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", step_with_signal)
        run = run_here(tmp_path, store, **RUN)
    assert 1 <= column(run, "step")[-1] <= 3
    assert len(checkpoint.list_checkpoints(run / "checkpoints")) == 1
    assert json.loads((run / "manifest.json").read_text())["state"] == "interrupted"
    run_here(tmp_path, store, resume=True, **RUN)
    assert_same_run(run, undisturbed)


def test_a_run_killed_before_its_first_save_starts_again_and_loses_no_line(
    tmp_path, monkeypatch, store, undisturbed
):
    with monkeypatch.context() as patch:
        cut_power_at(patch, 4)
        with pytest.raises(PowerCut):
            run_here(tmp_path, store, **RUN)
    run = run_here(tmp_path, store, resume=True, **RUN)
    assert_same_run(run, undisturbed)
    assert len((run / "metrics.superseded.jsonl").read_text().splitlines()) >= 3


def test_the_same_batch_may_be_cut_in_another_way_after_a_resume(tmp_path, store):
    whole = run_here(tmp_path, store, name="whole", train__steps=20)
    run_here(tmp_path, store, train__steps=20, train__save_every=10)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    run = run_here(tmp_path, store, resume=True, train__steps=20, train__micro_batch=1)
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=1e-5)


def test_a_finished_run_resumed_does_nothing(tmp_path, store, capsys):
    run = run_here(tmp_path, store, train__steps=6)
    before = (run / "metrics.jsonl").read_bytes(), (run / "manifest.json").read_bytes()
    run_here(tmp_path, store, resume=True, train__steps=6)
    assert ((run / "metrics.jsonl").read_bytes(), (run / "manifest.json").read_bytes()) == before
    assert "is finished" in capsys.readouterr().err


def test_a_used_folder_is_not_written_over_and_changed_settings_are_refused(tmp_path, store):
    run = run_here(tmp_path, store, train__steps=6)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"is in use.*--resume"):
        run_here(tmp_path, store, train__steps=6)
    with pytest.raises(ConfigError) as caught:
        run_here(tmp_path, store, resume=True, train__steps=7, optim__learning_rate=1e-3, train__keep_last=9)
    assert "train.steps: 6 before, 7 now" in str(caught.value)
    assert "optim.learning_rate: 0.005 before, 0.001 now" in str(caught.value)
    assert "keep_last" not in str(caught.value)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_store_is_refused(tmp_path, store):
    run_here(tmp_path, store, train__steps=6)
    (tmp_path / "run" / "checkpoints" / "step-00000006").rename(
        tmp_path / "run" / "checkpoints" / "step-00000003"
    )
    state = tmp_path / "run" / "checkpoints" / "step-00000003" / "trainer.json"
    changed = json.loads(state.read_text()) | {"step": 3}
    state.write_text(json.dumps(changed))
    files = state.with_name("files.json")
    entries = json.loads(files.read_text())
    entries["files"]["trainer.json"] = {"bytes": state.stat().st_size, "blake2b": checkpoint._checksum(state)}
    files.write_text(json.dumps(entries))
    other = make_store(tmp_path / "other", number=95)
    with pytest.raises(CheckpointError, match=r"store was .*, now it is"):
        run_here(tmp_path, other, resume=True, train__steps=6)


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path, store, capsys):
    run = run_here(tmp_path, store, train__steps=20, train__save_every=5)
    folder = run / "checkpoints"
    assert [c.step for c in checkpoint.list_checkpoints(folder)] == [
        15,
        20,
    ]  # the last two; the best is one of them
    weights = folder / "step-00000020" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    (folder / ".saving-step-00000099").mkdir()  # what kill -9 leaves in the middle of a save
    found, damaged = checkpoint.find(run)
    assert found.step == 15
    assert "step-00000020" in damaged[0] and "model.safetensors has another checksum" in damaged[0]
    run_here(tmp_path, store, resume=True, train__steps=20)
    assert "damaged checkpoint passed over" in capsys.readouterr().err
    assert column(run, "step") == list(range(1, 21))


def test_the_last_and_the_best_checkpoint_are_kept(tmp_path, monkeypatch, store):
    # A rate that is far too high after a while: the best checkpoint is not among the last.
    run = run_here(
        tmp_path, store, train__steps=40, train__save_every=5, train__keep_last=1, optim__learning_rate=0.5,
        optim__warmup_steps=40, optim__clip_norm="none",
    )  # fmt: skip
    validated = {r["step"]: r["loss"] for r in records(run, "validation") if r["step"] > 0}
    best = min(validated, key=lambda step: validated[step])
    assert best < 40
    assert [c.step for c in checkpoint.list_checkpoints(run / "checkpoints")] == [best, 40]


def test_ctrl_c_on_the_command_line_exits_130_and_says_how_to_go_on(tmp_path, store):
    import subprocess
    import sys
    import time

    from training_runs import ROOT, SETTINGS, flags

    settings = SETTINGS | {
        "data.store": store,
        "run.folder": tmp_path,
        "run.name": "run",
        "train.steps": 100_000,
    }
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags(settings)], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and '"train"' in metrics.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "--resume" in errors
    done = column(tmp_path / "run", "step")[-1]
    assert checkpoint.find(tmp_path / "run")[0].step == done


def test_launched_helper_reports_failures(tmp_path):
    result = launched(["--config", str(tmp_path / "nowhere.yaml")])
    assert result.returncode == 2 and "There is no settings file" in result.stderr


def test_a_precision_that_follows_the_launcher_may_not_change_on_resume(tmp_path, store, monkeypatch):
    run_here(tmp_path, store, train__steps=6, train__save_every=3, train__precision="auto")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"was trained in fp32, and here train\.precision auto means bf16"):
        run_here(tmp_path, store, resume=True, train__steps=6, train__save_every=3, train__precision="auto")


def test_a_stop_saves_without_validating_first(tmp_path, monkeypatch, store):
    """A launcher kills its processes half a minute after it asked them to stop."""
    real = trainer.optimizer_step
    monkeypatch.setattr(trainer, "optimizer_step", lambda *a, **k: real(*a, **k | {"stop": True}))
    run = run_here(tmp_path, store, train__steps=20, train__validate_every=1)
    assert [r["step"] for r in records(run, "validation")] == [0]
    assert [c.step for c in checkpoint.list_checkpoints(run / "checkpoints")] == [1]


def test_parameters_that_never_had_a_gradient_are_saved_and_resumed(store, tmp_path, monkeypatch):
    from minilm.models.parts import SwiGLU

    true = SwiGLU.forward
    monkeypatch.setattr(
        SwiGLU, "forward", lambda self, x: true(self, x).detach()
    )  # as an expert that nobody chose
    whole = run_here(tmp_path / "whole", store, train__steps=12)
    run_here(tmp_path / "cut", store, train__steps=12, train__save_every=6, train__keep_last=3)
    shutil.rmtree(tmp_path / "cut" / "run" / "checkpoints" / "step-00000012")
    cut = run_here(tmp_path / "cut", store, resume=True, train__steps=12)
    weights, again = final_weights(whole), final_weights(cut)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
