"""The moving average of the weights, held against a loop over the weights themselves."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    ROOT,
    SETTINGS,
    column,
    final_weights,
    flags,
    launched,
    launched_script,
    make_store,
    records,
    run_here,
)

from minilm.errors import CheckpointError, ConfigError
from minilm.run import load_checkpoint
from minilm.training import trainer
from minilm.training.ema import Average

EMA = {"train__ema_decay": 0.6, "train__steps": 20, "train__validate_every": 10}


def averaged(run, step=20):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_updates_are_the_hand_loop_and_forget_the_start_faster_in_the_beginning(decay):
    live = [torch.randn(3, 2), torch.randn(5)]
    average = Average(live, decay)
    hand = [tensor.double() for tensor in live]
    for t in range(1, 30):
        for tensor in live:
            tensor.add_(torch.randn_like(tensor))
        average.update()
        d = min(decay, (1 + t) / (10 + t))
        hand = [d * old + (1 - d) * new.double() for old, new in zip(hand, live, strict=True)]
    for got, want in zip(average.shadow, hand, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_an_exchange_gives_the_average_and_takes_it_back_bit_for_bit_also_after_an_error():
    live = [torch.randn(40)]
    average = Average(live, 0.5)
    live[0].add_(0.1234567)
    weights, shadow = live[0].clone(), average.shadow[0].clone()
    with pytest.raises(KeyError), average.exchanged():
        assert torch.equal(live[0], shadow) and torch.equal(average.shadow[0], weights)
        raise KeyError
    assert torch.equal(live[0], weights) and torch.equal(average.shadow[0], shadow)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_keeps_the_average_of_its_weights_and_trains_as_without(tmp_path, monkeypatch, store):
    real, path = trainer.optimizer_step, []

    def watched(layout, *arguments, **keywords):
        if not path:
            path.append({n: p.detach().clone() for n, p in layout.model.named_parameters()})
        result = real(layout, *arguments, **keywords)
        path.append({n: p.detach().clone() for n, p in layout.model.named_parameters()})
        return result

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", watched)
        run = run_here(tmp_path, store, **EMA)
    hand = {name: value.double() for name, value in path[0].items()}
    for t, weights in enumerate(path[1:], 1):
        d = min(0.6, (1 + t) / (10 + t))
        hand = {name: d * old + (1 - d) * weights[name].double() for name, old in hand.items()}
    got = averaged(run)
    assert got.keys() == final_weights(run).keys() == hand.keys()
    for name, value in got.items():
        torch.testing.assert_close(value.double(), hand[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, final_weights(run)[name])

    plain = run_here(tmp_path, store, name="plain", **EMA | {"train__ema_decay": None})
    assert column(run, "loss") == column(plain, "loss")
    assert column(run, "loss", "validation") == column(plain, "loss", "validation")
    assert "ema_loss" not in records(plain, "validation")[0]
    validation = records(run, "validation")
    assert validation[0]["ema_loss"] == validation[0]["loss"]
    assert validation[-1]["ema_loss"] != validation[-1]["loss"]
    assert column(run, "loss", "validation")[-1] < column(run, "ema_loss", "validation")[-1] < 4  # it lags

    loaded = load_checkpoint(run, weights="ema").model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in got.items())
    command = ["--checkpoint", run, "--data", store, "--weights", "ema", "--json", tmp_path / "scores.json"]
    command += ["--device", "cpu", "--prompt-lengths", "4", "--continuation-tokens", "4"]
    result = launched_script(ROOT / "eval.py", [str(part) for part in command])
    assert result.returncode == 0, result.stderr[-3000:]
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["loss"] == pytest.approx(validation[-1]["ema_loss"], rel=1e-6)
    with pytest.raises(CheckpointError, match="kept none"):
        load_checkpoint(plain, weights="ema")


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_resumed_run_has_the_same_average_bit_for_bit(tmp_path, store):
    run = run_here(tmp_path, store, train__save_every=10, **EMA)
    before, losses = averaged(run), column(run, "ema_loss", "validation")
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    run_here(tmp_path, store, resume=True, train__save_every=10, **EMA)
    assert column(run, "ema_loss", "validation") == losses
    assert all(torch.equal(value, before[name]) for name, value in averaged(run).items())
    with pytest.raises(ConfigError, match=r"train\.ema_decay"):
        run_here(tmp_path, store, resume=True, train__save_every=10, **EMA | {"train__ema_decay": None})


@pytest.mark.xdist_group("two ranks")
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_averages_the_master_weights_and_resumes_bit_for_bit(tmp_path, store, precision):
    alone = run_here(tmp_path, store, name="alone", **EMA)
    settings = SETTINGS | {"data.store": store, "run.folder": tmp_path, "run.name": "two", "train.ranks": 2}
    settings |= {key.replace("__", "."): value for key, value in EMA.items()}
    settings |= {"train.micro_batch": 2, "train.save_every": 10, "train.precision": precision}
    result = launched(flags(settings), launcher="cpu2_zero2.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "two"
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    for name in ("loss", "ema_loss"):
        assert column(run, name, "validation") == pytest.approx(
            column(alone, name, "validation"), rel=tolerance
        )
    before, lines = averaged(run), column(run, "ema_loss", "validation")
    weights = final_weights(run)
    if precision == "fp32":
        for name, value in averaged(alone).items():
            torch.testing.assert_close(before[name], value, rtol=1e-3, atol=1e-5)
        return
    assert not any(torch.equal(value, value.bfloat16().float()) for value in before.values())
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    result = launched([*flags(settings), "--resume"], launcher="cpu2_zero2.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    assert column(run, "ema_loss", "validation") == lines
    assert all(torch.equal(value, before[name]) for name, value in averaged(run).items())
    assert all(torch.equal(value, weights[name]) for name, value in final_weights(run).items())
