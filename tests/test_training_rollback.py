"""A loss that spikes: back to the last good checkpoint, and on behind the batches that led there.

The reference is a plain run that is given, from its first step, the list of batches without those left out.
"""

from __future__ import annotations

import json
import signal

import pytest
import rollback_worker
import torch
from training_runs import (
    ROOT,
    SETTINGS,
    column,
    final_weights,
    flags,
    launched_script,
    make_store,
    records,
    run_here,
)

from minilm.__main__ import main as minilm
from minilm.data.loader import Loader
from minilm.errors import CheckFailed, ConfigError
from minilm.training import checkpoint, trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

WORKER = ROOT / "tests" / "rollback_worker.py"
# 15 steps an epoch; dropout, so that random states matter.
RUN = {"train__steps": 40, "train__save_every": 5, "train__micro_batch": 4, "model__dropout": 0.1}
RUN |= {"train__spike_factor": 15, "train__keep_last": 2, "train__validate_every": 3}
BACK = RUN | {"train__on_spike": "rollback"}
# Batch 23 comes in step 24: back to 20, and on with 24. Batch 25 is then in step 22: back to 20 again, on with 26.
# Batch 33 is then in step 28: back to 25 (which has done batch 30), on with 34.
POISONED = [23, 25, 33]
BATCHES = [*range(20), *range(26, 31), *range(34, 49)]
OPTIMIZER_STEP = trainer.optimizer_step
NUMBERS = ("step", "loss", "gradient_norm", "learning_rate", "step_tokens", "total_tokens")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, store):
    """No spike, no way back: step s simply gets batch BATCHES[s]."""
    with pytest.MonkeyPatch.context() as patch:
        real = Loader._step
        patch.setattr(Loader, "_step", lambda loader, step: real(loader, [*BATCHES, 0, 0, 0][step]))
        plain = RUN | {"train__spike_factor": "none"}
        return run_here(tmp_path_factory.mktemp("runs"), store, name="reference", **plain)


def poison(monkeypatch, batches, **more):
    rollback_worker.plan(batches, patch=monkeypatch.setattr, **more)


def assert_same_run(run, reference):
    for name in NUMBERS:
        assert column(run, name) == column(reference, name), name
    assert column(run, "loss", "validation") == column(reference, "loss", "validation")
    assert column(run, "step", "validation") == column(reference, "step", "validation")
    weights, expected = final_weights(run), final_weights(reference)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


def incidents(run):
    return {path.name: path for path in sorted((run / "incidents").iterdir())}


def test_a_run_that_goes_back_is_the_run_that_never_got_the_batches(
    tmp_path, store, reference, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        poison(patch, POISONED)
        run = run_here(tmp_path, store, **BACK)
    assert_same_run(run, reference)
    assert column(run, "data/batch") == BATCHES
    assert column(run, "epoch") == [(batch + 1) / 15 for batch in BATCHES]
    assert column(run, "rollbacks") == [0] * 20 + [2] * 5 + [3] * 15
    state = checkpoint.find(run)[0].trainer
    assert (state["step"], state["loader"]["next_step"], state["num_rollbacks"]) == (40, 49, 3)
    told = [r["text"] for r in records(run, "event") if "went back" in r["text"]]
    assert [text.partition(":")[0] for text in told] == [
        "step 24 spiked", "step 22 spiked", "step 28 spiked"
    ]  # fmt: skip
    assert "step-00000020 and on behind 6 skipped batches (2 of 3 times)" in told[1]
    # What was done again is kept with the incident, and only there.
    kept = incidents(run)
    assert list(kept) == ["step-00000022-rollback-1", "step-00000024", "step-00000028-rollback-2"]
    abandoned = {
        name: [
            record["step"]
            for line in (folder / "abandoned.jsonl").read_text().splitlines()
            if (record := json.loads(line))["kind"] == "train"
        ]
        for name, folder in kept.items()
    }
    assert list(abandoned.values()) == [[21], [21, 22, 23], [26, 27]]
    assert not (run / "metrics.superseded.jsonl").exists()
    reports = [json.loads((folder / "report.json").read_text()) for folder in kept.values()]
    assert [(report["step"], report["data_step"]) for report in reports] == [(22, 25), (24, 23), (28, 33)]
    capsys.readouterr()
    assert minilm(["replay", str(kept["step-00000028-rollback-2"])]) == 1  # it was planted, not computed
    assert "step 28: spike" in capsys.readouterr().out


def test_the_average_and_muon_go_back_too(tmp_path, store, monkeypatch):
    more = {"train__ema_decay": 0.9, "optim__name": "muon", "train__steps": 30}
    with monkeypatch.context() as patch:
        poison(patch, [23])
        run = run_here(tmp_path, store, **BACK | more)
    with monkeypatch.context() as patch:
        real = Loader._step
        patch.setattr(Loader, "_step", lambda loader, step: real(loader, step if step < 20 else step + 4))
        plain = run_here(tmp_path, store, name="plain", **RUN | more | {"train__spike_factor": "none"})
    assert_same_run(run, plain)
    assert column(run, "ema_loss", "validation") == column(plain, "ema_loss", "validation")
    for name in ("ema.safetensors", "optimizer.safetensors"):
        newest = "checkpoints/step-00000030"
        assert (run / newest / name).read_bytes() == (plain / newest / name).read_bytes(), name


@pytest.mark.parametrize(
    "die", [27, 30, 32], ids=["after the first way back", "after the second", "in a new part"]
)
def test_killed_after_going_back_and_resumed_it_ends_as_if_nothing_had_happened(
    tmp_path, store, reference, die
):
    settings = SETTINGS | {"data.store": store, "run.folder": tmp_path, "run.name": "run"}
    settings |= {key.replace("__", "."): value for key, value in BACK.items()}
    plan = {"poisoned": POISONED}
    killed = launched_script(WORKER, [json.dumps(plan | {"die": [die]}), *flags(settings)])
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert "went back to step-00000020" in killed.stderr
    resumed = launched_script(WORKER, [json.dumps(plan), *flags(settings), "--resume"])
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same_run(tmp_path / "run", reference)
    assert column(tmp_path / "run", "data/batch") == BATCHES


def test_a_stop_before_the_spike_does_not_change_where_it_goes_back_to(
    tmp_path, store, reference, monkeypatch
):
    """The checkpoint that a stop saves at step 22 is newer than the regular one at step 20."""
    with monkeypatch.context() as patch:
        poison(patch, POISONED)
        inner, taken = trainer.optimizer_step, []

        def stopping(*arguments, **keywords):
            taken.append(1)
            return inner(*arguments, **keywords | {"stop": len(taken) == 22})

        patch.setattr(trainer, "optimizer_step", stopping)
        run_here(tmp_path, store, **BACK)
        assert column(tmp_path / "run", "step")[-1] == 22
        run = run_here(tmp_path, store, resume=True, **BACK)
    assert_same_run(run, reference)
    assert (incidents(run)["step-00000024"] / "abandoned" / "step-00000022").is_dir()


def test_without_a_checkpoint_it_says_so_and_goes_on(tmp_path, store, monkeypatch):
    short = {"train__steps": 16, "train__save_every": "none"}
    with monkeypatch.context() as patch:
        poison(patch, [12])
        run = run_here(tmp_path, store, **BACK | short)
    with monkeypatch.context() as patch:
        poison(patch, [12])
        reported = run_here(tmp_path, store, name="reported", **RUN | short)
    assert any("there is no checkpoint to go back to yet" in r["text"] for r in records(run, "event"))
    assert column(run, "loss") == column(reported, "loss") and list(incidents(run)) == ["step-00000013"]
    for name, value in final_weights(run).items():
        assert torch.equal(value, final_weights(reported)[name])


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path, store, monkeypatch):
    real = checkpoint.damage
    monkeypatch.setattr(
        checkpoint,
        "damage",
        lambda folder, **more: ["torn"] if "00000020" in folder.name else real(folder, **more),
    )
    poison(monkeypatch, [23])
    run = run_here(tmp_path, store, **BACK | {"train__steps": 26})
    assert column(run, "data/batch") == [*range(15), *range(24, 35)]
    assert column(run, "step") == list(range(1, 27))


@pytest.mark.parametrize("saved", ["right before", "before the first update"])
def test_it_goes_back_to_any_checkpoint(tmp_path, store, monkeypatch, saved):
    """To the border at which it stands, and to one without any optimizer state: its only step was skipped."""
    import survival_worker

    back_to = 13 if saved == "right before" else 1
    more = {"train__steps": 18, "train__save_every": 1, "train__keep_last": 99, "train__on_nonfinite": "skip"}
    real_damage, real_step = checkpoint.damage, Loader._step
    with monkeypatch.context() as patch:
        survival_worker.plan([{"step": 1, "rank": 0, "what": "loss"}] if back_to == 1 else [])
        poison(patch, [13])
        only = f"step-{back_to:08d}"
        patch.setattr(
            checkpoint, "damage", lambda f, **m: real_damage(f, **m) if f.name == only else ["torn"]
        )
        run = run_here(tmp_path, store, **BACK | more)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", OPTIMIZER_STEP)
        survival_worker.plan([{"step": 1, "rank": 0, "what": "loss"}] if back_to == 1 else [])
        batches = [*range(back_to), *range(14, 40)]
        patch.setattr(Loader, "_step", lambda loader, step: real_step(loader, batches[step]))
        plain = run_here(tmp_path, store, name="plain", **RUN | more | {"train__spike_factor": "none"})
    monkeypatch.setattr(trainer, "optimizer_step", OPTIMIZER_STEP)
    assert_same_run(run, plain)
    assert column(run, "rollbacks")[-1] == 1


def test_a_used_up_budget_stops_the_run_before_the_step(tmp_path, store, monkeypatch):
    poison(monkeypatch, POISONED)
    with pytest.raises(CheckFailed, match=r"went back 1 times(.|\n)*rollback_budget(.|\n)*--resume"):
        run_here(tmp_path, store, **BACK | {"train__rollback_budget": 1})
    run = tmp_path / "run"
    assert list(incidents(run)) == ["step-00000022-rollback-1", "step-00000024"]
    assert column(run, "step")[-1] == 22
    assert json.loads((run / "manifest.json").read_text())["state"] == "failed"


def test_rollback_without_a_factor_is_refused(tmp_path, store):
    with pytest.raises(ConfigError, match=r"rollback needs train\.spike_factor"):
        run_here(tmp_path, store, train__steps=6, train__on_spike="rollback")


@pytest.mark.xdist_group("two ranks")
@pytest.mark.parametrize("launcher", ["cpu2.yaml", "cpu2_zero2.yaml"])
def test_two_ranks_go_back_together_and_a_killed_run_ends_like_an_undisturbed_one(tmp_path, store, launcher):
    settings = SETTINGS | {"data.store": store, "run.folder": tmp_path, "train.ranks": 2}
    settings |= {key.replace("__", "."): value for key, value in BACK.items()} | {"train.steps": 30}
    plan = json.dumps({"poisoned": [23, 25]})
    whole = [plan, *flags(settings | {"run.name": "whole"})]
    done = launched_script(WORKER, whole, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert column(tmp_path / "whole", "data/batch") == [*range(20), *range(26, 36)]
    again = flags(settings | {"run.name": "killed"})
    killed = launched_script(
        WORKER, [json.dumps({"poisoned": [23, 25], "die": [28]}), *again], launcher=launcher
    )
    assert killed.returncode != 0 and "went back to step-00000020" in killed.stderr
    resumed = launched_script(WORKER, [plan, *again, "--resume"], launcher=launcher)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
