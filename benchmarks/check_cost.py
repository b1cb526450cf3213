"""What the checks cost: the quick suite before a run, and the watch while it trains.

    python benchmarks/check_cost.py --out OUT                    26m, batches of 8 x 512: as long as the steps take
    python benchmarks/check_cost.py --out OUT --batch-size 2 --sequence-length 128 --steps 150

Runs the same settings without checks, with the watch, and without again, and compares the median step of the first and
the last with that of the second; the watch's own account (share_of_time in metrics.jsonl) stands beside it. The seconds
of the quick suite come from the manifest. OUT/check_cost.json has everything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", type=Path, help="a store; none: one of builtin:python is made in OUT")
    parser.add_argument("--size", default="26m")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    store = arguments.store or made_store(arguments.out)
    runs = {}
    for name, checks in (
        ("off", {"doctor.check": "off", "doctor.watch": "false"}),
        ("on", {"doctor.check": "quick", "doctor.watch": "true"}),
        ("off again", {"doctor.check": "off", "doctor.watch": "false"}),
    ):
        runs[name] = measured(arguments, store, name.replace(" ", "-"), checks)
    plain = statistics.mean([runs["off"]["median_step_seconds"], runs["off again"]["median_step_seconds"]])
    whole = statistics.mean([runs["off"]["train_seconds"], runs["off again"]["train_seconds"]])
    result: dict[str, Any] = {
        "settings": {k: str(v) for k, v in vars(arguments).items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "runs": runs,
        "quick_suite_seconds": runs["on"]["quick_suite_seconds"],
        "watch_share_of_time": runs["on"]["share_of_time"],
        "median_step_ratio": runs["on"]["median_step_seconds"] / plain,
        "train_time_ratio": runs["on"]["train_seconds"] / whole,
    }
    (arguments.out / "check_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))
    return 0


def made_store(out: Path) -> Path:
    """A small store of Python's own sources."""
    store = out / "store"
    if not store.is_dir():
        source, tokenizer = ["--source", "builtin:python-docs"], str(out / "tokenizer")
        for command in (
            ["tokenizer", "train", *source, "--vocab-size", "6400", "--out", tokenizer],
            ["data", "build", *source, "--tokenizer", tokenizer, "--out", str(store)],
        ):
            subprocess.run([sys.executable, "-m", "minilm", *command], check=True, cwd=ROOT)
    return store


def measured(arguments: argparse.Namespace, store: Path, name: str, checks: dict[str, str]) -> dict[str, Any]:
    """One run, and what its own books say of its time."""
    settings = {
        "data.store": store, "data.sequence_length": arguments.sequence_length, "model.size": arguments.size,
        "train.steps": arguments.steps, "train.batch_size": arguments.batch_size, "train.device": "cpu",
        "train.validate_every": 10**6, "train.save_every": 10**6, "optim.warmup_steps": 1, "run.folder": arguments.out,
        "run.name": name, "track.swanlab": "off", **checks,
    }  # fmt: skip
    flags = [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True, cwd=ROOT)
    folder = arguments.out / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    looks = [line for line in lines if line["kind"] == "doctor"]
    checked = json.loads((folder / "manifest.json").read_text())["checks"]
    return {
        "median_step_seconds": statistics.median(line["seconds/step"] for line in train),
        "train_seconds": train[-1]["unix_seconds"] - train[0]["unix_seconds"],
        "num_looks": len(looks),
        "share_of_time": looks[-1]["share_of_time"] if looks else None,
        "steps_of_looks": [line["step"] for line in looks],
        "quick_suite_seconds": checked.get("seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
