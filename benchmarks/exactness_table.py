"""Measure the exactness grid on this machine and write docs/exactness.md.

    python benchmarks/exactness_table.py                 about a minute on two CPU cores

Starts tests/exactness_worker.py as users start a training: by python on one process, by accelerate on two ranks with
DDP, and with DeepSpeed ZeRO-2 on one and two. Every number of the page comes
from there; the tests hold the same numbers to limits.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "one process": None,
    "DDP, 2 ranks": "cpu2.yaml",
    "ZeRO-2, 1 rank": "zero2.yaml",
    "ZeRO-2, 2 ranks": "cpu2_zero2.yaml",
}
PACKAGES = ("torch", "accelerate", "deepspeed")
QUANTITIES = {"loss": "loss", "gradient_norm": "norm", "gradient": "gradients"}
KINDS = {
    "packed": "packed rows",
    "uneven": "one uneven document a row",
    "masked": "masks, empty micro-batches",
}

TEXT = """# Exactness

The global batch of a step is fixed by the seed and the step; how it is cut into ranks and micro-batches must not show.
This page is measured, not written: `{command}`, {date},
on {machine}, with {versions}.

Each number is the largest relative deviation from a plain float64 loop that walks over the documents one at a time and
knows nothing of minilm's loss: of the logged loss, of the logged gradient norm, and of the gradient of the worst
parameter (norm of the difference over norm). Batches of {rows} rows; everything goes through the real Accelerate, DDP
and DeepSpeed objects, started as users start them. `tests/test_training_exactness.py` holds these numbers to limits,
and also plants mistakes (a factor of the accumulation or of the ranks, a lost micro-batch, a mean of means) and sees
that each of them breaks the limit.

## float32

Limit of the tests: {limit}.

{fp32}

## bf16

bf16 has no exact answer, so its noise is measured first: plain loops in bf16 that know nothing of minilm's step
(autocast for one process and DDP, weights rounded to bf16 for ZeRO-2), eight permutations of the rows, each cut into
micro-batches of 1 to 16 rows. The largest deviation of these loops is the floor; a layout may deviate twice as much.

{floor}

{bf16}

## Updates

Three steps with a large AdamW epsilon (so that the size of the gradient shows in the update), clipped at the
values in the head; relative distance of the whole update from that of `torch.optim.AdamW` and
`torch.nn.utils.clip_grad_norm_` in float64. Last column: the update of a run whose clipping is done for each
micro-batch on its own, at 0.3: what a mistake would look like.

{clipping}

{num_small} steps with a learning rate of 1e-5 under bf16: the share of the float64 update that arrived in the weights
that are 1 at the start, where neighbouring bf16 numbers lie 2^-8 and 2^-7 apart, and the same with master weights in
bf16.

{masters}
"""


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """What the worker found, by layout."""
    found = {}
    for number, (name, launcher) in enumerate(LAYOUTS.items()):
        out = folder / f"{number}.json"
        start = [sys.executable]
        if launcher is not None:
            start += ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port"]
            start += [
                str(20_000 + os.getpid() % 20_000),
                "--config_file",
                str(ROOT / "run_file/accelerate" / launcher),
            ]
        command = [*start, str(ROOT / "tests" / "exactness_worker.py"), str(out), "updates"]
        print("running", name, file=sys.stderr)
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        found[name] = json.loads(out.read_text(encoding="utf-8"))
    return found


def page(found: dict[str, dict[str, Any]]) -> str:
    """docs/exactness.md from what the worker found."""
    sys.path.insert(0, str(ROOT / "tests"))
    from exactness_worker import ROWS
    from update_worker import NUM_SMALL_STEPS

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    floors = [
        [name, *(_short(max(floor[q] for floor in each["floor"].values())) for q in QUANTITIES)]
        for name, each in found.items()
    ]
    clipping = [
        [
            name,
            *(_short(each["clipping"][clip][f"from {clip}"]) for clip in each["clipping"]),
            _short(each["planted clipping"]["each micro-batch"]["from 0.3"]),
        ]
        for name, each in found.items()
    ]
    clips = next(iter(found.values()))["clipping"]
    masters = [
        [
            name,
            f"{each['masters']['right']['share_ones']:.3f}",
            f"{each['planted masters']['rounded']['share_ones']:.3f}",
        ]
        for name, each in found.items()
    ]
    return TEXT.format(
        command="python benchmarks/exactness_table.py",
        date=datetime.date.today().isoformat(),
        machine=machine,
        versions=versions,
        rows=ROWS,
        limit="1e-5",
        fp32=_grid(found, "fp32"),
        bf16=_grid(found, "bf16"),
        floor=_table(["bf16 floor", *QUANTITIES.values()], floors),
        clipping=_table(["layout", *(f"clip {clip}" for clip in clips), "mistake, 0.3"], clipping),
        masters=_table(["layout", "float32 master weights", "bf16 master weights"], masters),
        num_small=NUM_SMALL_STEPS,
    )


def _grid(found: dict[str, dict[str, Any]], precision: str) -> str:
    """One line per kind of rows and micro-batch, three columns per layout."""
    lines = []
    names = [case.split(", ")[:2] for case in next(iter(found.values()))[precision]]
    for number, (kind, micro_batch) in enumerate(names):
        cells = []
        for each in found.values():
            errors = list(each[precision].values())[number]
            cells.append(" / ".join(_short(errors[quantity]) for quantity in QUANTITIES))
        lines.append([f"{KINDS[kind]}, {micro_batch}", *cells])
    about = " / ".join(QUANTITIES.values())
    return _table(["rows", *(f"{name}: {about}" for name in found)], lines)


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _short(value: float) -> str:
    return f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "exactness.md", help="the page to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = page(measure(Path(folder)))
    arguments.out.write_text(text, encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
