"""How long training waits for its checkpoints: written in the background against written while everybody waits.

    python benchmarks/save_wait.py --out DIR                                     6m model, a save every 30 steps
    python benchmarks/save_wait.py --out DIR --size 26m --save-every 30 --micro-batch 2

The same short run is made twice, with and without `train.save_in_background`, on this machine one after the other.
Waiting is what the trainer itself measures (`seconds_waited` of each "saved" event: gathering, copying, waiting for
the save before) over the wall time of the steps; the last save of a run, which is always waited for, is told apart.
Both runs must end with the same weights. Exit code 1 if background saving waits for more than --promise of the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from minilm.data.build import build
from minilm.launch import train
from minilm.run import load_config
from minilm.track import read_metrics


def measure(out: Path, store: Path, background: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run; returns what it waited for and what it took."""
    name = "background" if background else "at once"
    settings = {
        "data.store": store, "data.sequence_length": arguments.sequence_length, "run.folder": out, "run.name": name,
        "model.size": arguments.size, "model.max_length": arguments.sequence_length, "train.steps": arguments.steps,
        "train.batch_size": arguments.batch_size, "train.save_every": arguments.save_every,
        "train.validate_every": arguments.steps, "train.validation_rows": 1, "train.device": "cpu",
        "train.save_in_background": background, "optim.warmup_steps": 5, "track.swanlab": "off",
    }  # fmt: skip
    if arguments.micro_batch:
        settings["train.micro_batch"] = arguments.micro_batch
    train(load_config(None, [f"--{key}={value}" for key, value in settings.items()]), resume=False)
    steps, events = read_metrics(out / name, "train"), read_metrics(out / name, "event")
    saves = [event for event in events if event["text"].startswith("saved step-")]
    # From the end of the first step to the end of the last one: all saves but the last fall into it.
    wall = steps[-1]["unix_seconds"] - steps[0]["unix_seconds"]
    waited = sum(save["seconds_waited"] for save in saves[:-1])
    folder = out / name / "checkpoints" / f"step-{arguments.steps:08d}"
    return {
        "background": background,
        "wall_seconds": wall,
        "saves": len(saves) - 1,
        "waited_seconds": waited,
        "waited_share": waited / wall,
        "seconds_writing": [save["seconds_writing"] for save in saves[:-1]],
        "seconds_waited": [save["seconds_waited"] for save in saves[:-1]],
        "last_save_seconds": saves[-1]["seconds_waited"],
        "mean_step_seconds": sum(step["seconds/step"] for step in steps[1:]) / (len(steps) - 1),
        "checkpoint_mb": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6,
        "files": json.loads((folder / "files.json").read_text())["files"]["model.safetensors"]["blake2b"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for the runs and save_wait.json")
    parser.add_argument("--size", default="6m", help="of the model `original`")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=None)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--save-every", type=int, default=30)
    parser.add_argument("--promise", type=float, default=0.05, help="largest share of the time")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: give a new folder")
    build(arguments.out / "store", ["synthetic:markov?vocab=6400&documents=2000&length=300"], None)
    found = [measure(arguments.out, arguments.out / "store", b, arguments) for b in (False, True)]
    report = {"settings": {k: str(v) for k, v in vars(arguments).items()}, "runs": found,
              "threads": torch.get_num_threads(), "machine": platform.platform()}  # fmt: skip
    (arguments.out / "save_wait.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{'':14}{'steps take':>12}{'of which waiting':>18}{'share':>9}{'last save':>11}")
    for run in found:
        label = "background" if run["background"] else "at once"
        print(f"{label:14}{run['wall_seconds']:>10.1f} s{run['waited_seconds']:>16.2f} s{run['waited_share']:>9.2%}"
              f"{run['last_save_seconds']:>9.2f} s")  # fmt: skip
    print(
        f"{found[0]['saves']} saves of {found[0]['checkpoint_mb']:.0f} MB, one every {arguments.save_every} steps of "
        f"{found[0]['mean_step_seconds']:.3f} s; ratio of waiting "
        f"{found[1]['waited_seconds'] / found[0]['waited_seconds']:.3f}"
    )
    if found[0]["files"] != found[1]["files"]:
        print("DIFFERENT: the two runs end with different weights")
        return 1
    return 0 if found[1]["waited_share"] <= arguments.promise else 1


if __name__ == "__main__":
    sys.exit(main())
