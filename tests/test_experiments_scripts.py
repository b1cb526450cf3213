"""The experiment scripts with stand-ins for the programs that they start: what runs in which order, what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from minilm.run import load_config

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "run_file"
STAND_IN = """#!/usr/bin/env bash
name=$(basename "$0")
if [ "$name $1" = "python run_file/free_gpu.py" ]; then
  echo "Stand-in GPU: 80 of 80 GB free"
  exit "${NO_GPU:-0}"
fi
if [ "$name $1" = "python -c" ]; then exit 0; fi
echo "$name $*" >>"$CALLS"
if [ "$name" = accelerate ] && [ -n "${SLOW:-}" ]; then
  trap 'echo saved >>"$CALLS"; exit 143' TERM
  touch "$CALLS.training"
  for _ in $(seq 300); do sleep 0.1; done
fi
"""


@pytest.fixture
def stage(tmp_path: Path) -> dict[str, str]:
    """An environment in which python, minilm and accelerate only note that they were called."""
    places = tmp_path / "bin"
    places.mkdir()
    for name in ("python", "minilm", "accelerate"):
        (places / name).write_text(STAND_IN)
        (places / name).chmod(0o755)
    own = {
        "PATH": f"{places}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "RUNS": str(tmp_path / "runs"),
    }
    return (
        {k: v for k, v in os.environ.items() if k not in ("SCALE", "DATA", "KNOWLEDGE")}
        | own
        | {"DISK_GB": "0"}
    )


def start(script: str, *words: str, stage: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *words],
        env=stage | more,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def calls(stage: dict[str, str]) -> list[str]:
    path = Path(stage["CALLS"])
    return path.read_text().splitlines() if path.is_file() else []


def wait_for(condition, what: str) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError(what)


def ended(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_settings_are_those_of_the_experiment():
    config = load_config(SCRIPTS / "experiment_1_4_0" / "full.yaml").value
    model, train, optim = config.model, config.train, config.optim
    assert (model.name, model.dim, model.num_layers, model.num_heads, model.num_kv_heads) == (
        "original",
        512,
        8,
        32,
        8,
    )
    assert model.num_parameters() == 25_829_888
    assert (config.data.sequence_length, train.batch_size, train.batch_size // train.micro_batch) == (
        512,
        128,
        8,
    )
    assert (train.epochs, train.precision, config.track.swanlab, config.track.log_every) == (
        3,
        "bf16",
        "local",
        10,
    )
    assert (optim.name, optim.learning_rate, optim.warmup_steps, optim.clip_norm) == ("adamw", 2e-4, 0, 1.0)
    other = load_config(SCRIPTS / "experiment_1_4_1" / "full.yaml").value
    assert (other.model, other.optim) == (model, optim)
    assert (other.train.batch_size, other.train.micro_batch, other.train.epochs) == (128, 16, 3)
    for name in ("experiment_1_4_0", "experiment_1_4_1"):
        small = load_config(SCRIPTS / name / "cpu.yaml").value
        assert small.train.device == "cpu" and small.model.num_parameters() < 2_000_000


def test_the_baseline_runs_in_the_background_with_log_and_pid(stage, tmp_path):
    done = start("experiment_1_4_0.sh", "--train.epochs=1", stage=stage)
    assert done.returncode == 0, done.stderr
    number = int((tmp_path / "runs" / "experiment.pid").read_text())
    assert f"PID    {number}" in done.stdout and "tail -f" in done.stdout
    wait_for(lambda: ended(number), "the script in the background")
    log = (tmp_path / "runs" / "experiment.log").read_text()
    assert "GPU      Stand-in GPU: 80 of 80 GB free" in log
    run = tmp_path / "runs" / "original"
    said = calls(stage)
    assert [line.split()[:3] for line in said[:2]] == [
        ["minilm", "tokenizer", "train"],
        ["minilm", "data", "build"],
    ]
    assert said[2].startswith(
        "accelerate launch --config_file run_file/accelerate/zero2.yaml --num_processes 1 train.py "
    )
    assert said[2].endswith(f"--run.folder={run.parent} --run.name=original --resume --train.epochs=1")
    assert said[3] == f"python eval.py --checkpoint {run} --per-document --agreement --json {run}/eval.json"
    assert said[4:] == [
        f"minilm record {run} --out {run.parent}/EXPERIMENT_1_4_0.md",
        f"minilm record --verify {run.parent}/EXPERIMENT_1_4_0.md",
    ]


def test_a_stop_reaches_the_training_and_nothing_follows(stage, tmp_path):
    assert start("experiment_1_4_0.sh", stage=stage, SLOW="1").returncode == 0
    number = int((tmp_path / "runs" / "experiment.pid").read_text())
    wait_for(lambda: Path(stage["CALLS"] + ".training").exists(), "the training")
    again = start("experiment_1_4_0.sh", stage=stage)
    assert again.returncode == 2 and f"It runs already: process {number}" in again.stderr
    os.kill(number, signal.SIGTERM)
    wait_for(lambda: ended(number), "the end of the script")
    assert calls(stage)[-1] == "saved"


def test_a_dry_run_writes_and_starts_nothing(stage, tmp_path):
    for script, scale in (
        ("experiment_1_4_0.sh", "full"),
        ("experiment_1_4_1.sh", "full"),
        ("experiment_1_4_1.sh", "cpu"),
    ):
        done = start(script, "--dry-run", "--train.steps=7", stage=stage, SCALE=scale)
        assert done.returncode == 0, done.stderr
        trained = [line for line in done.stdout.splitlines() if "--run.name=" in line]
        names = [line.split("--run.name=")[1].split()[0] for line in trained]
        assert names == (["original"] if "1_4_0" in script else ["original", "knowledge", "no_ffn"])
        assert all(line.startswith("would run:") and line.endswith("--train.steps=7") for line in trained)
        assert all("zero2.yaml" in line for line in trained) == (scale == "full")
    assert calls(stage) == [] and not (tmp_path / "runs").exists()
    assert "minilm compare" in done.stdout and done.stdout.count("minilm record") == 4


def test_all_that_is_missing_is_said_at_once(stage):
    done = start(
        "experiment_1_4_0.sh", stage=stage | {"DISK_GB": "999999"}, DATA="/nowhere.jsonl", NO_GPU="1"
    )
    assert done.returncode == 2
    assert "there is no /nowhere.jsonl" in done.stderr
    assert "999999 are needed" in done.stderr
    assert "Stand-in GPU" in done.stderr
    assert calls(stage) == []


def test_wrong_words_are_refused(stage):
    assert "choose cpu or full" in start("experiment_1_4_1.sh", stage=stage, SCALE="half").stderr
    assert "RUNS=FOLDER" in start("experiment_1_4_0.sh", "--run.name=x", stage=stage).stderr
    assert "Give both" in start("experiment_1_4_1.sh", stage=stage, DATA="/nowhere").stderr
    assert "--dry-run" in start("experiment_1_4_0.sh", "--help", stage=stage).stdout
    assert calls(stage) == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean():
    scripts = sorted(map(str, SCRIPTS.glob("experiment_*.sh")))
    done = subprocess.run(
        ["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert len(scripts) == 3 and done.returncode == 0, done.stdout
