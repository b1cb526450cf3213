"""Two processes, launched as users launch them, compute what one process computes: DDP and DeepSpeed ZeRO-2.

Run by accelerate on two CPU ranks through gloo, with the launcher files of run_file/accelerate; resumed runs in forks.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
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

from minilm.training import checkpoint

STEPS = 30
pytestmark = [pytest.mark.usefixtures("fresh_accelerate"), pytest.mark.xdist_group("two ranks")]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, store):
    return run_here(tmp_path_factory.mktemp("runs"), store, name="alone", train__steps=STEPS)


def on_two(folder, store, **changes):
    """The flags of a run on two ranks: four micro-batches of one row on each."""
    settings = SETTINGS | {"data.store": store, "run.folder": folder, "run.name": "two", "train.steps": STEPS}
    settings |= {"train.micro_batch": 1, "train.ranks": 2, "train.save_every": 10}
    return flags(settings | {key.replace("__", "."): value for key, value in changes.items()})


def run_on_two(folder, store, launcher, *more, really=False, **changes):
    result = launched([*on_two(folder, store, **changes), *more], launcher=launcher, really=really)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "two", result


def run_on_two_machines(folder, store, launcher, **changes):
    """Two launchers on this machine, one process each: as many commands as machines, which differ in their number."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(40_000 + os.getpid() % 20_000)]
    file = ["--config_file", str(ROOT / "run_file" / "accelerate" / launcher)]
    machines = []
    for rank in range(2):
        command = [*accelerate, *file, "--machine_rank", str(rank), *address, str(ROOT / "train.py")]
        machines.append(
            subprocess.Popen(
                [*command, *on_two(folder, store, **changes)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )
    try:
        outputs = [machine.communicate(timeout=200)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    for machine, output in zip(machines, outputs, strict=True):
        assert machine.returncode == 0, output[-3000:]
    return folder / "two", outputs


def closed_form_rates(num_steps):
    """Warm-up over 5 steps to 5e-3, then a cosine to a tenth of it, reached in the last step."""
    rates = []
    for step in range(num_steps):
        turned = math.pi * (step - 4) / (num_steps - 5)
        rates.append(5e-3 * (step + 1) / 5 if step < 5 else 5e-4 + (5e-3 - 5e-4) * (1 + math.cos(turned)) / 2)
    return rates


def assert_is(run, alone):
    """The run logs what one process alone logs: losses and norms to rounding, everything else exactly."""
    for name in ("loss", "gradient_norm"):
        assert column(run, name) == pytest.approx(column(alone, name), rel=1e-5), name
    for name in ("step_tokens", "total_tokens", "learning_rate", "epoch", "step"):
        assert column(run, name) == column(alone, name), name
    assert column(run, "learning_rate") == pytest.approx(closed_form_rates(STEPS), rel=1e-12)
    assert column(run, "learning_rate")[-1] == pytest.approx(0.1 * 5e-3, rel=1e-12)


@pytest.mark.parametrize("launcher", ["cpu2.yaml", "cpu2_zero2.yaml"])
def test_two_ranks_log_the_losses_of_one_process_in_float32_and_resume_bit_for_bit(
    tmp_path, store, alone, launcher
):
    run, result = run_on_two(tmp_path, store, launcher, really=True)
    assert ("ZeRO-2 on 2 rank(s)" if "zero" in launcher else "DDP on 2 ranks") in result.stderr
    assert_is(run, alone)
    assert records(run, "validation")[-1]["loss"] == pytest.approx(
        records(alone, "validation")[-1]["loss"], rel=1e-5
    )
    weights, expected = final_weights(run), final_weights(alone)
    assert weights.keys() == expected.keys()  # the tied matrix once, in float32
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)

    # The same run again from its checkpoint at step 20: nothing may differ.
    losses, norms = column(run, "loss"), column(run, "gradient_norm")
    saved = checkpoint.list_checkpoints(run / "checkpoints")
    assert [c.step for c in saved] == [20, 30]
    saved[-1].folder.rename(tmp_path / "moved away")
    run_on_two(tmp_path, store, launcher, "--resume")
    assert column(run, "loss") == losses and column(run, "gradient_norm") == norms
    for name, value in final_weights(run).items():
        assert torch.equal(value, weights[name]), name


def test_a_checkpoint_of_two_ranks_goes_on_as_one_process_and_the_other_way_round(tmp_path, store, alone):
    two, _ = run_on_two(tmp_path, store, "cpu2_zero2.yaml")
    shutil.rmtree(two / "checkpoints" / "step-00000030")
    back = run_here(tmp_path, store, name="two", resume=True, train__steps=STEPS, train__save_every=15)
    assert column(back, "loss") == pytest.approx(column(alone, "loss"), rel=1e-5)
    assert column(back, "step") == list(range(1, STEPS + 1))
    shutil.rmtree(two / "checkpoints" / "step-00000030")
    again, _ = run_on_two(tmp_path, store, "cpu2_zero2.yaml", "--resume")
    assert column(again, "loss") == pytest.approx(column(alone, "loss"), rel=1e-5)
    for name, value in final_weights(again).items():
        torch.testing.assert_close(value, final_weights(alone)[name], rtol=1e-3, atol=1e-5)


def test_zero2_in_bf16_stays_within_a_hundredth_and_keeps_float32_weights(tmp_path, store, alone):
    run, _ = run_on_two(tmp_path, store, "cpu2_zero2.yaml", train__precision="bf16")
    assert column(run, "loss") == pytest.approx(column(alone, "loss"), rel=1e-2)
    weights = final_weights(run)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    rounded = [torch.equal(value, value.bfloat16().float()) for value in weights.values()]
    assert not any(rounded)  # the master weights, not the bfloat16 copies
    layout = json.loads((run / "manifest.json").read_text())["layout"]
    assert layout["precision"] == "bf16" and layout["zero_stage"] == 2


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_schedule_takes_one_step_per_optimizer_step_whatever_the_accumulation(
    tmp_path, store, alone, micro_batch
):
    assert_is(run_here(tmp_path, store, train__steps=STEPS, train__micro_batch=micro_batch), alone)


@pytest.mark.parametrize("launcher", ["multi_node.yaml", "multi_node_zero2.yaml"])
def test_two_machines_log_the_losses_of_one_process(tmp_path, store, alone, launcher):
    run, outputs = run_on_two_machines(tmp_path, store, launcher, train__micro_batch=4)
    assert ("ZeRO-2 on 2 rank(s)" if "zero" in launcher else "DDP on 2 ranks") in outputs[0]
    assert "step 30" in outputs[0] and "step 30" not in outputs[1]  # the first machine tells
    assert_is(run, alone)


def test_a_launch_that_starts_fewer_processes_than_asked_is_refused(tmp_path, store):
    settings = SETTINGS | {"data.store": store, "run.folder": tmp_path, "train.steps": 10, "train.ranks": 2}
    result = launched(flags(settings))
    assert result.returncode == 2
    assert "train.ranks asks for 2 processes, 1 were launched" in result.stderr
