"""Weights to begin with (train.init_from): of a run, a checkpoint, a Hugging Face folder; all else begins anew."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil

import pytest
import torch
from data_stores import small_tokenizer
from safetensors.torch import load_file
from training_runs import (
    ROOT,
    SETTINGS,
    column,
    final_weights,
    flags,
    launched,
    make_store,
    records,
    run_here,
)

from minilm import initial, models
from minilm.errors import CheckpointError, ConfigError
from minilm.models.hf import to_hf
from minilm.run import load_checkpoint

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STEPS = {"train__steps": 12, "train__save_every": 6, "train__ema_decay": 0.9}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def first(tmp_path_factory, store):
    return run_here(tmp_path_factory.mktemp("runs"), store, name="first", **STEPS)


def scored(checkpoint, out, *more):
    """What eval.py says of a checkpoint."""
    spec = importlib.util.spec_from_file_location("script_eval", ROOT / "eval.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    command = [
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
        "--samples",
        "0",
        "--json",
        str(out),
        *more,
    ]
    assert script.main(command) == 0
    return json.loads(out.read_text())["scores"]["loss"]


def manifest_of(run):
    return json.loads((run / "manifest.json").read_text())


def test_the_first_validation_is_the_evaluation_of_the_source_and_the_rest_begins_anew(
    tmp_path, store, first
):
    run = run_here(tmp_path, store, name="second", train__steps=6, train__init_from=first)
    assert records(run, "validation")[0]["loss"] == records(first, "validation")[-1]["loss"]
    assert records(run, "validation")[0]["loss"] == pytest.approx(
        scored(first, tmp_path / "s.json"), rel=1e-6
    )
    assert column(run, "data/batch") == [0, 1, 2, 3, 4, 5] and column(run, "total_tokens")[0] < 300
    assert column(run, "learning_rate")[0] == column(first, "learning_rate")[0]  # the warm-up, too
    about = manifest_of(run)["initial_weights"]
    assert (about["kind"], about["step"], about["weights"]) == ("checkpoint", 12, "last")
    assert about["path"] == str(first / "checkpoints" / "step-00000012")
    assert about["fingerprint"] == initial.fingerprint(load_checkpoint(first).model)
    assert f"init_from: {first}" in (run / "config.yaml").read_text()


def test_a_fresh_optimizer_and_the_given_weights_make_the_first_update(tmp_path, store, first):
    """By hand: AdamW's first update on the weights of the source, from the gradient of batch 0."""
    run = run_here(
        tmp_path,
        store,
        train__steps=1,
        train__init_from=first,
        optim__clip_norm="none",
        optim__warmup_steps=0,
    )
    before, after = final_weights(first), final_weights(run)
    moments = load_file(run / "checkpoints" / "step-00000001" / "optimizer.safetensors")
    rate = column(run, "learning_rate")[0]
    for name, value in before.items():
        gradient = moments[f"{name}::exp_avg"] / (1 - 0.9)
        decayed = value * (1 - rate * 0.1) if value.dim() >= 2 else value
        expected = decayed - rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_and_the_average_can_be_named(tmp_path, store, first):
    middle = first / "checkpoints" / "step-00000006"
    run = run_here(
        tmp_path, store, name="middle", train__steps=1, optim__warmup_steps=0, train__init_from=middle
    )
    assert records(run, "validation")[0]["loss"] == pytest.approx(
        scored(middle, tmp_path / "s.json"), rel=1e-6
    )
    run = run_here(
        tmp_path, store, name="ema", train__steps=1, optim__warmup_steps=0, train__init_from=first,
        train__init_weights="ema",
    )  # fmt: skip
    loss = records(run, "validation")[0]["loss"]
    assert loss == pytest.approx(scored(first, tmp_path / "s.json", "--weights", "ema"), rel=1e-6)
    assert loss == records(first, "validation")[-1]["ema_loss"] != records(first, "validation")[-1]["loss"]


def test_a_hugging_face_folder(tmp_path, store, first):
    to_hf(load_checkpoint(first).model).save_pretrained(tmp_path / "llama")
    run = run_here(
        tmp_path, store, train__steps=1, optim__warmup_steps=0, train__init_from=tmp_path / "llama"
    )
    assert records(run, "validation")[0]["loss"] == records(first, "validation")[-1]["loss"]
    about = manifest_of(run)["initial_weights"]
    assert about["kind"] == "Hugging Face"
    assert about["fingerprint"] == initial.fingerprint(load_checkpoint(first).model)  # the same numbers


def test_all_differences_are_named_at_once_and_nothing_is_written(tmp_path, store, first):
    with pytest.raises(CheckpointError) as refused:
        run_here(
            tmp_path, store, train__steps=6, train__init_from=first, model__dim=64, model__num_layers=3,
            model__max_length=128,
        )  # fmt: skip
    text = str(refused.value)
    assert "model.dim is 32 there, 64 here" in text and "model.num_layers is 2 there, 3 here" in text
    assert "max_length" not in text  # no number of the model depends on it
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_tokenizer_is_refused(first):
    loaded = load_checkpoint(first)
    ours, theirs = small_tokenizer(400), small_tokenizer(300)
    source = initial.Source(loaded.model, theirs, {"path": "there", "kind": "checkpoint", "weights": "last"})
    initial.check(source, loaded.model.config, theirs)
    for here, said in ((ours, ours.fingerprint), (None, "absent")):
        with pytest.raises(
            CheckpointError, match=f"the tokenizer is {theirs.fingerprint} there, {said} here"
        ):
            initial.check(source, loaded.model.config, here)
    without = dataclasses.replace(source, tokenizer=None)
    with pytest.raises(CheckpointError, match="the tokenizer is absent there"):
        initial.check(without, loaded.model.config, ours)
    initial.check(
        dataclasses.replace(without, about=source.about | {"kind": "Hugging Face"}), loaded.model.config, ours
    )


def test_shapes_are_compared_where_the_settings_agree(first):
    loaded = load_checkpoint(first)
    loaded.model.norm.weight = torch.nn.Parameter(torch.ones(7))
    source = initial.Source(loaded.model, None, {"path": "there", "kind": "checkpoint", "weights": "last"})
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[7\] there, \[32\] here"):
        initial.check(source, models.build(loaded.model.config).config, None)


def test_a_resume_takes_the_weights_of_the_run_and_needs_the_source_no_more(tmp_path, store, first):
    source = tmp_path / "source"
    shutil.copytree(first, source)
    settings = {"train__init_from": source, "train__steps": 12, "train__save_every": 6}
    whole = run_here(tmp_path, store, name="whole", **settings)
    run = run_here(tmp_path, store, **settings)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    shutil.rmtree(source)
    run_here(tmp_path, store, resume=True, **settings)
    assert column(run, "loss") == column(whole, "loss")
    for name, value in final_weights(run).items():
        assert torch.equal(value, final_weights(whole)[name])
    assert manifest_of(run)["initial_weights"] == manifest_of(whole)["initial_weights"]
    with pytest.raises(ConfigError, match=r"train\.init_from: .* before, '' now"):
        run_here(tmp_path, store, resume=True, **settings | {"train__init_from": ""})


def test_the_flag_on_the_command_line_and_its_errors(tmp_path, store, first):
    settings = SETTINGS | {"data.store": store, "run.folder": tmp_path, "run.name": "run", "train.steps": 6}
    done = launched([*flags(settings), "--init-from", str(tmp_path / "nowhere")])
    assert done.returncode == 2 and "there is no folder" in done.stderr
    done = launched([*flags(settings), "--init-from", str(first)])
    assert done.returncode == 0 and "begins with the weights of" in done.stderr, done.stderr
    assert records(tmp_path / "run", "validation")[0]["loss"] == records(first, "validation")[-1]["loss"]
