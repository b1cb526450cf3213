"""A step that went wrong is kept, told, and can be computed again."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import (
    SETTINGS,
    column,
    final_weights,
    incidents,
    make_store,
    records,
    report_of,
    run_here,
)

from minilm import models
from minilm.__main__ import main as minilm
from minilm.training import checkpoint
from minilm.training.incident import Spikes
from minilm.training.step import NonFinite
from minilm.training.watch import layer_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# Too small to learn anything: losses go up and down around their mean, and every second one is "a spike".
RESTLESS = {"optim__learning_rate": 1e-5, "train__spike_factor": 0.001, "train__steps": 14}
# So large that the weights of step 1 overflow in the forward of step 2, by themselves.
EXPLODING = {"optim__learning_rate": 1e25, "optim__warmup_steps": 1, "train__steps": 6}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


# ---------------------------------------------------------------- incidents


def test_a_loss_that_overflows_is_kept_and_its_replay_finds_the_same(tmp_path, store, capsys):
    with pytest.raises(
        NonFinite, match=r"The step was not taken(.|\n)*minilm replay .*incidents/step-0000000"
    ):
        run_here(tmp_path, store, **EXPLODING)
    (folder,) = incidents(tmp_path / "run")
    report, last = report_of(folder), records(tmp_path / "run")[-1]
    assert report["kind"] == "nonfinite" and report["step"] == last["step"]
    assert report["loss"] in ("nan", "inf") or report["gradient_norm"] in ("nan", "inf")
    assert report["nonfinite_layers"]
    assert minilm(["replay", str(folder)]) == 0
    assert "equal bit for bit" in capsys.readouterr().out


def test_a_report_is_what_plain_sums_over_the_kept_rows_and_weights_give(tmp_path, store):
    run = run_here(tmp_path, store, **RESTLESS)
    folder = incidents(run)[0]
    report = report_of(folder)
    weights = load_file(next(folder.glob("step-*")) / "model.safetensors")
    # The rows as the text file has them, each document alone, in float64: -log softmax of the next token.
    ids = [
        json.loads(line.partition("ids")[2])
        for line in (folder / "rows.txt").read_text().splitlines()
        if "  ids" in line
    ]
    assert len(ids) == SETTINGS["train.batch_size"]
    model = models.folder.load(next(folder.glob("step-*"))).double()
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for document in ids:
        table = torch.log_softmax(model(torch.tensor([document])).logits[0], dim=-1)
        for place in range(1, len(document)):
            nats, count = nats - table[place - 1, document[place]], count + 1
    (nats / count).backward()
    assert report["loss"] == pytest.approx(float(nats.detach() / count), rel=1e-6)
    named = dict(model.named_parameters())
    assert report["gradient_norm"] == pytest.approx(
        math.sqrt(sum(float(p.grad.square().sum()) for p in named.values())), rel=1e-5
    )
    assert report["layers"].keys() == {layer_of(name) for name in named}
    for layer, numbers in report["layers"].items():
        of_layer = [name for name in named if layer_of(name) == layer]
        norm = math.sqrt(sum(float(weights[n].double().square().sum()) for n in of_layer))
        gradient = math.sqrt(sum(float(named[n].grad.square().sum()) for n in of_layer))
        assert numbers["weight_norm"] == pytest.approx(norm, rel=1e-9)
        assert numbers["gradient_norm"] == pytest.approx(gradient, rel=1e-5)
        assert numbers["nonfinite_weights"] == numbers["nonfinite_gradients"] == 0
    logged = records(run)[report["step"] - 1]
    assert (logged["loss"], logged["gradient_norm"]) == (report["loss"], report["gradient_norm"])


def test_a_replay_is_bit_for_bit_with_dropout_and_micro_batches_and_notices_one_changed_weight(
    tmp_path, store, capsys
):
    run = run_here(tmp_path, store, **RESTLESS, model__dropout=0.2, train__micro_batch=2)
    for folder in incidents(run):
        assert minilm(["replay", str(folder)]) == 0
        assert "equal bit for bit" in capsys.readouterr().out
    before = next(incidents(run)[0].glob("step-*"))
    weights = load_file(before / "model.safetensors")
    weights["norm.weight"][3] += 1e-3
    save_file(weights, before / "model.safetensors", metadata={"format": "pt"})
    assert minilm(["replay", str(before.parent)]) == 2  # damaged, says the checksum
    assert "another checksum" in capsys.readouterr().err
    (before / "files.json").unlink()
    checkpoint._seal(before)
    assert minilm(["replay", str(before.parent)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_counted_by_layer(tmp_path, store, accidents):
    accidents((3, "gradient"))
    with pytest.raises(NonFinite):
        run_here(tmp_path, store, train__steps=6)
    report = report_of(incidents(tmp_path / "run")[0])
    assert report["nonfinite_layers"] == ["embedding"]
    assert report["layers"]["embedding"]["nonfinite_gradients"] == 48 * 32
    assert report["layers"]["blocks.0"]["nonfinite_gradients"] == 0
    assert math.isfinite(report["loss"]) and report["gradient_norm"] == "nan"
    assert minilm(["replay", str(incidents(tmp_path / "run")[0])]) == 1  # it was planted, not computed


def test_a_replay_of_what_is_no_incident_is_refused(tmp_path, store, capsys):
    assert minilm(["replay", str(tmp_path)]) == 2
    assert "is not the report of an incident" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------- spikes


@pytest.mark.parametrize("number", [3, 9, 10, 49, 50, 51, 120])
def test_a_spike_is_above_the_mean_of_the_last_fifty_by_so_many_deviations(number):
    draw = np.random.default_rng(number)
    losses = (3 + draw.normal(size=number)).tolist()
    spikes = Spikes(2.5)
    for loss in [*losses[:5], math.nan, math.inf, *losses[5:]]:
        spikes.add(loss)
    if number < 10:
        assert spikes.limit() is None and not spikes.is_spike(1e9)
        return
    last = losses[-50:]
    limit = sum(last) / len(last) + 2.5 * np.std(last, ddof=1)
    assert spikes.limit() == pytest.approx(limit, rel=1e-12)
    assert spikes.is_spike(limit + 1e-6) and not spikes.is_spike(limit - 1e-6)
    again = Spikes(2.5, json.loads(json.dumps(list(spikes.recent))))  # as a checkpoint keeps them
    assert again.limit() == spikes.limit()


def test_where_the_loss_hardly_moves_a_wobble_is_no_spike():
    spikes = Spikes(3.0, [2.0] * 50)
    assert not spikes.is_spike(2.0 + 3 * 0.02 - 1e-9) and spikes.is_spike(2.0 + 3 * 0.02 + 1e-9)
    assert Spikes(None, [2.0] * 50).limit() is None


def test_keeping_spikes_changes_no_number_and_is_limited(tmp_path, store, monkeypatch):
    from minilm.training import incident

    monkeypatch.setattr(incident, "MOST_SPIKES", 1)
    longer = RESTLESS | {"train__steps": 24}
    plain = run_here(
        tmp_path, store, name="plain", **longer | {"train__spike_factor": "none"}, model__dropout=0.1
    )
    run = run_here(tmp_path, store, **longer, model__dropout=0.1)
    assert column(run, "loss") == column(plain, "loss")
    for name, value in final_weights(run).items():
        assert torch.equal(value, final_weights(plain)[name])
    assert not incidents(plain) and len(incidents(run)) == 1
    told = [r["text"] for r in records(run, "event") if "a spike, above" in r["text"]]
    assert len(told) > 1 and "minilm replay" in told[0] and "not kept, there are 1" in told[1]


def test_an_incident_that_does_not_fit_on_the_disk_is_told_and_the_policy_goes_on(
    tmp_path, store, accidents, monkeypatch
):
    real = checkpoint._seal

    def seal(folder):
        if "incidents" in folder.parts:
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(checkpoint, "_seal", seal)
    accidents((3, "loss"))
    run = run_here(tmp_path, store, train__steps=6, train__on_nonfinite="skip")
    assert column(run, "step") == [1, 2, 3, 4, 5, 6]
    assert any("not kept" in r["text"] and "No space left" in r["text"] for r in records(run, "event"))
