"""Run folders as training and evaluation leave them, written by hand with numbers that a test can compute again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

START = 1_790_000_000.0
SETTINGS = {
    "run.name": "first",
    "run.folder": "runs",
    "data.sequence_length": 24,
    "model.name": "original",
    "model.vocab_size": 48,
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.hidden_dim": 64,
    "model.max_length": 64,
    "train.steps": 20,
    "train.batch_size": 8,
    "optim.learning_rate": 0.005,
    "optim.schedule": "cosine",
}


def loss_at(step: int, shift: float = 0.0) -> float:
    """Falls, with a dip at step 13 that the end does not reach again."""
    return 4.0 - 0.1 * step + shift - (1.25 if step == 13 else 0.0)


def write_run(
    folder: Path, *, shift: float = 0.0, steps: int = 20, state: str = "finished", **changes: Any
) -> Path:
    """A run of `steps` steps; keywords with two underscores change settings (train__steps=5)."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | {"run.name": folder.name} | {k.replace("__", "."): v for k, v in changes.items()}
    origins = dict.fromkeys(settings, "default") | {
        "train.steps": "--train.steps",
        "model.name": "run.yaml:7",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest(settings, origins, state, steps), indent=1))
    lines = [{"kind": "event", "step": 0, "unix_seconds": START, "text": "run", "vocab_size": 48}]
    for step in range(1, steps + 1):
        lines.append(train_line(step, shift))
        if step % 5 == 0:
            validation = {"loss": loss_at(step, shift) + 0.5, "bits_per_byte": 1.5 - step / 100 + shift / 4}
            lines.append({"kind": "validation", "step": step, "unix_seconds": START + step, **validation})
    lines.append(
        {"kind": "event", "step": 7, "unix_seconds": START + 7.5, "text": "spike <b>at</b> step 7 | kept"}
    )
    samples = [{"prompt": "one", "text": " two\n<!-- minilm:end samples -->\n# heading", "stopped": "eos"}]
    lines.append({"kind": "sample", "step": steps, "unix_seconds": START + steps, "samples": samples})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("run:\n  name: first\n")
    (folder / "samples.md").write_text("## step 20\n")
    return folder


def train_line(step: int, shift: float) -> dict[str, Any]:
    seconds = {"step": 0.5, "data": 0.05, "forward": 0.2, "backward": 0.15, "optimizer": 0.06}
    return {
        "kind": "train",
        "step": step,
        "unix_seconds": START + step,
        "loss": loss_at(step, shift),
        "step_tokens": 180 + step,
        "total_tokens": sum(180 + s for s in range(1, step + 1)),
        "tokens_share": step / 20,
        **{f"seconds/{part}": value for part, value in seconds.items()},
        "memory/process_mb": 400.0 + (50 if step == 4 else step),
    }


def manifest(settings: dict[str, Any], origins: dict[str, str], state: str, steps: int) -> dict[str, Any]:
    ended = None if state == "running" else "2026-09-21T14:20:00+00:00"
    git = {"commit": "a" * 40, "dirty": True, "untracked": ["notes.txt"], "num_untracked": 1}
    return {
        "state": state,
        "ended": ended,
        "error": None,
        "step": steps,
        "results": {},
        "started": "2026-09-21T16:13:20+02:00",
        "command": "python train.py --config run.yaml --train.steps=20",
        "folder": "/somewhere",
        "process": {"number": 1, "started_unix_seconds": 1.0, "host": "h", "boot": "b", "namespace": "n"},
        "config": settings,
        "origins": origins,
        "code": {"source_sha256": "c" * 64, "git": git},
        "packages": {"torch": "2.13.0", "numpy": "2.4.6", "flash-attn": None},
        "machine": {
            "python": "3.11.7",
            "cpu": "AMD EPYC",
            "cpu_cores": 2,
            "memory_bytes": 25_000_000_000,
            "gpus": [],
        },
        "data": {"store": "data/store", "fingerprint": "d1"},
        "tokenizer": {"fingerprint": "t1"},
        "model": {"name": "original", "num_parameters": 217_024},
        "layout": {"kind": "single", "world_size": 1},
        "resumes": [],
        "checks": {
            "suite": "quick",
            "seconds": 1.0,
            "counts": {"PASS": 30, "FAIL": 1, "NOT RUN": 2},
            "findings": {"causality": "PASS: 0.0", "balance": "NOT RUN: needs 2 routers"},
        },
    }


def write_evaluation(run: Path, documents: list[tuple[float, int, int]], **changes: Any) -> None:
    """eval.json with (nats, tokens, bytes) of each document."""
    nats, tokens = sum(d[0] for d in documents), sum(d[1] for d in documents)
    scores = {"loss": nats / tokens, "loss_95": [1.25, 1.5], "perplexity": 4.5, "bits_per_byte": 0.75}
    scores |= {"accuracy": 0.625, "num_tokens": tokens, "num_documents": len(documents)}
    rows = [
        {"document": number, "nats": n, "num_tokens": t, "num_bytes": b}
        for number, (n, t, b) in enumerate(documents)
    ]
    sample = {
        "document": 3,
        "prompt": "a | b",
        "prediction": "c\nd",
        "truth": "e",
        "loss": 1.125,
        "stopped": "eos",
    }
    agreed = {
        "what": "validation loss as logged",
        "numbers": {"logged": 2.5, "evaluation": 2.5000001},
        "difference": 1e-7,
        "limit": 1e-6,
        "verdict": "AGREES",
    }
    found = {
        "step": 20,
        "kind": "store",
        "split": "validation",
        "rows_are": "packed",
        "sequence_length": 24,
        "store_fingerprint": "d1",
        "data": "data/store",
        "precision": "fp32",
        "scores": scores,
        "continuations": {"16": scores},
        "samples": [sample],
        "documents": rows,
        "agreement": {"verdict": "AGREES", "rows": [agreed]},
    }
    (run / "eval.json").write_text(json.dumps(found | changes))
