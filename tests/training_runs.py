"""Small training runs for tests: a store of documents with something to learn, run in this process or launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import numpy as np
from data_stores import store_of

ROOT = Path(__file__).parent.parent
VOCAB = 48

# A row is 24 tokens, a step 8 rows: small enough for seconds, uneven enough for every mistake in a mean to show.
SETTINGS = {
    "data.sequence_length": 24,
    "data.rows": "document",
    "model.vocab_size": VOCAB,
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.hidden_dim": 64,
    "model.max_length": 64,
    "train.batch_size": 8,
    "train.device": "cpu",
    "train.precision": "fp32",
    "train.validate_every": 1000,
    "optim.learning_rate": 5e-3,
    "optim.warmup_steps": 5,
    "optim.clip_norm": 0.5,
    "track.swanlab": "off",
    "doctor.check": "off",  # tests of the doctor turn it on
    "doctor.watch": "false",
}


def documents(number: int, *, seed: int = 0) -> list[list[int]]:
    """Counting with a stride of 1 to 3 and some noise, 3 to 60 tokens long: very uneven, and learnable."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        length = int(draw.integers(3, 12) if draw.random() < 0.7 else draw.integers(30, 60))
        tokens = (draw.integers(0, VOCAB) + int(draw.integers(1, 4)) * np.arange(length)) % VOCAB
        noisy = draw.random(length) < 0.1
        tokens[noisy] = draw.integers(0, VOCAB, noisy.sum())
        made.append(tokens.tolist())
    return made


def make_store(folder: Path, number: int = 90) -> Path:
    """A store of `number` training documents (about 12 steps of 8 rows) and some for validation."""
    store_of(folder, {"a": documents(number)}, validation={"a": documents(12, seed=1)}, vocab_size=VOCAB)
    return folder


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def run_here(folder: Path, store: Path, *, name: str = "run", resume: bool = False, **changes: Any) -> Path:
    """Train in this process; keywords with two underscores are settings (train__steps=30). Returns the run folder."""
    from accelerate.state import AcceleratorState, GradientState

    from minilm.launch import train
    from minilm.run import load_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = SETTINGS | {"data.store": store, "run.folder": folder, "run.name": name}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    train(load_config(None, flags(settings)), resume=resume)
    return folder / name


def launched(
    arguments: list[str], *, launcher: str | None = None, timeout: int = 300, really: bool = False
) -> subprocess.CompletedProcess[str]:
    """`train.py` in processes of its own: in one, or in those of one of our launcher files. See `launched_script`."""
    return launched_script(ROOT / "train.py", arguments, launcher=launcher, timeout=timeout, really=really)


def launched_script(
    script: Path,
    arguments: list[str],
    *,
    launcher: str | None = None,
    timeout: int = 300,
    really: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a script in fresh processes. really: by the command of a user, which takes 5 to 20 seconds for imports
    alone; otherwise in forks of a process that has them behind it (`forked.py`)."""
    if not really:
        return forked.run(script, arguments, launcher=launcher, timeout=timeout)
    command = [sys.executable, str(script), *arguments]
    if launcher is not None:
        accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        port = str(20_000 + os.getpid() % 20_000)
        where = [
            "--config_file",
            str(ROOT / "run_file" / "accelerate" / launcher),
            "--main_process_port",
            port,
        ]
        command = [*accelerate, *where, *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


def started(store: Path, folder: Path, **changes: Any) -> subprocess.Popen[str]:
    """A run that would go on for hours, as another process; returns when it has done a step."""
    settings = SETTINGS | {
        "data.store": store,
        "run.folder": folder,
        "run.name": "run",
        "train.steps": 100_000,
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags(settings)], stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "run" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.is_file() and '"train"' in metrics.read_text():
            return process
        time.sleep(0.1)
    process.kill()
    raise TimeoutError(process.communicate()[1])


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def column(run: Path, name: str, kind: str = "train") -> list[Any]:
    return [record[name] for record in records(run, kind)]


def final_weights(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "model.safetensors")


def incidents(run: Path) -> list[Path]:
    return sorted((run / "incidents").glob("step-*")) if (run / "incidents").is_dir() else []


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())
