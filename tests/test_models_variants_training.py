"""The variants are trained, stopped, resumed and spread over ranks by the code that trains `original`."""

from __future__ import annotations

import pytest
import torch
from training_runs import SETTINGS, column, final_weights, flags, launched, make_store, records, run_here

from minilm.run import load_checkpoint
from minilm.training import trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STEPS = 14
SMALL = {
    "no_ffn": {},
    "no_ffn_matched": {"model__num_layers": 4},
    "persistent": {"model__num_persistent": 24},
    "moe": {"model__num_experts": 4, "model__hidden_dim": 32, "model__router_z_weight": 0.001},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def of(name, **changes):
    return {"model__name": name, "train__steps": STEPS, **SMALL[name], **changes}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", SMALL)
def test_every_variant_learns_and_can_be_loaded(name, optimizer, tmp_path, store, capsys):
    run = run_here(tmp_path, store, **of(name, optim__name=optimizer, train__micro_batch=4))
    losses = column(run, "loss")
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.15
    assert load_checkpoint(run).model.config.name == name
    said = " ".join(capsys.readouterr().err.split())
    told = f"has no effect: model {name} has no use for it"
    assert (told in said) == (name != "moe")
    if name == "moe":
        balance = column(run, "auxiliary/balance")
        assert all(0.0095 < value < 0.02 for value in balance)  # 0.01 x (1 when even, 2 when collapsed)
        assert all(0 < value < 0.1 for value in column(run, "auxiliary/router_z"))


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_mixture_that_died_continues_bit_for_bit(optimizer, tmp_path, store, monkeypatch):
    settings = of("moe", optim__name=optimizer, train__micro_batch=4, model__dropout=0.1, train__save_every=5)
    reference = run_here(tmp_path, store, name="undisturbed", **settings)
    real, taken = trainer.optimizer_step, []

    def step_or_die(*arguments, **keywords):
        taken.append(1)
        if len(taken) == 8:
            raise PowerCut
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", step_or_die)
        with pytest.raises(PowerCut):
            run_here(tmp_path, store, **settings)
    run = run_here(tmp_path, store, resume=True, **settings)
    for name in ("step", "loss", "auxiliary/balance", "gradient_norm"):
        assert column(run, name) == column(reference, name), name
    weights, expected = final_weights(run), final_weights(reference)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.xdist_group("two ranks")
@pytest.mark.parametrize("launcher", ["cpu2_zero2.yaml"])
def test_a_mixture_on_two_ranks_is_one_process(launcher, tmp_path, store):
    """With more experts than tokens can fill, so that some have no token on a rank."""
    sparse = {"model__num_experts": 32, "model__balance_weight": 0.1, "train__usage_every": 1}
    settings = of("moe", **sparse) | {"train__micro_batch": 1}
    alone = run_here(tmp_path, store, name="alone", **settings)
    spread = SETTINGS | {"data.store": store, "run.folder": tmp_path, "run.name": "two", "train.ranks": 2}
    spread |= {key.replace("__", "."): value for key, value in settings.items()}
    result = launched(flags(spread), launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("loss", "auxiliary/balance", "auxiliary/router_z", "uniformity/cosine"):
        assert column(tmp_path / "two", name) == pytest.approx(column(alone, name), rel=1e-4, abs=1e-5), name
    first, same = records(tmp_path / "two")[0], records(alone)[0]
    shares = {name: value for name, value in same.items() if name.startswith("usage/")}
    assert len(shares) == 2 * (32 + 2)
    assert {name: first[name] for name in shares} == pytest.approx(shares, rel=1e-6)
