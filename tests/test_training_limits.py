"""Budgets of tokens and minutes, the deterministic mode, and the size of a step given in tokens."""

from __future__ import annotations

import json
import os

import pytest
import torch
from training_runs import SETTINGS, column, flags, make_store, records, run_here

from minilm.errors import ConfigError
from minilm.run import load_config
from minilm.training import limits, trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def test_a_budget_of_tokens_ends_the_run_after_the_step_that_reaches_it(tmp_path, store, capsys):
    free = run_here(tmp_path, store, name="free", train__steps=12)
    budget = column(free, "total_tokens")[5] - 1  # reached within step 6
    run = run_here(tmp_path, store, train__steps=12, train__max_tokens=budget)
    assert f"finished at step 6 (train.max_tokens {budget:,} reached with {budget + 1:,} tokens)" in (
        capsys.readouterr().err
    )
    assert column(run, "loss") == column(free, "loss")[:6]  # the schedule is that of the whole run
    assert records(run, "validation")[-1]["step"] == 6
    assert (run / "checkpoints" / "step-00000006").is_dir()
    assert json.loads((run / "manifest.json").read_text())["state"] == "finished"
    assert any("train.max_tokens" in record["text"] for record in records(run, "event"))

    run_here(tmp_path, store, train__steps=12, train__max_tokens=budget, resume=True)
    assert column(run, "step")[-1] == 6  # still used up
    run_here(tmp_path, store, train__steps=12, resume=True)
    assert column(run, "loss") == column(free, "loss")


def test_a_budget_of_minutes_ends_the_run_at_a_step_border(tmp_path, monkeypatch, store, capsys):
    clock, real = [0.0], trainer.optimizer_step

    def step_of_a_minute(*arguments, **keywords):
        clock[0] += 60
        return real(*arguments, **keywords)

    monkeypatch.setattr(trainer, "optimizer_step", step_of_a_minute)
    monkeypatch.setattr(limits.time, "monotonic", lambda: clock[0])
    run = run_here(tmp_path, store, train__steps=12, train__max_minutes=2.5)
    assert column(run, "step") == [1, 2, 3]
    assert "finished at step 3 (train.max_minutes 2.5 reached)" in capsys.readouterr().err
    assert (run / "checkpoints" / "step-00000003").is_dir()


def test_deterministic_mode_is_on_inside_only(tmp_path, monkeypatch, store):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    real, seen = trainer.optimizer_step, []

    def look(*arguments, **keywords):
        cudnn = torch.backends.cudnn
        seen.append((torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        return real(*arguments, **keywords)

    monkeypatch.setattr(trainer, "optimizer_step", look)
    one = run_here(tmp_path, store, name="one", train__steps=6, train__deterministic=True)
    two = run_here(tmp_path, store, name="two", train__steps=6, train__deterministic=True)
    assert set(seen) == {(True, True, False)}
    assert column(one, "loss") == column(two, "loss")
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_a_cublas_setting_that_breaks_determinism_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG"), limits.deterministic(True):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def settings_with(tmp_path, **changes):
    given = {name: value for name, value in SETTINGS.items() if name != "train.batch_size"}
    given |= {"data.store": tmp_path, "train.steps": 10}
    return load_config(None, flags(given | {key.replace("__", "."): value for key, value in changes.items()}))


def test_tokens_per_step_decides_the_batch_size_and_the_written_settings_can_be_read_again(tmp_path, store):
    resolved = settings_with(tmp_path, train__tokens_per_step=144)
    assert resolved.value.train.batch_size == 6  # rows of 24
    assert resolved.origins["train.batch_size"] == "train.tokens_per_step"
    run = run_here(tmp_path, store, train__steps=6, train__tokens_per_step=192)
    assert load_config(run).value.train.batch_size == 8
    run_here(tmp_path, store, train__steps=6, train__tokens_per_step=192, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__tokens_per_step": 150}, "multiple of data.sequence_length 24: 144"),
        ({"train__tokens_per_step": 10}, "multiple of data.sequence_length 24: 24"),
        ({"train__tokens_per_step": 144, "train__batch_size": 8}, "makes 6 rows of 24 tokens, but"),
    ],
)
def test_tokens_per_step_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings_with(tmp_path, **changes)
