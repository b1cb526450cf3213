"""The reference run on one CUDA GPU, held against float32: losses, memory, speed, resume, exactness. One call.

    python benchmarks/gpu_reference.py --out gpu_reference               one GPU: 26m, length 512, 128 rows, 300 steps
    python benchmarks/gpu_reference.py --out trial --scale cpu           the same path in small on a CPU, some minutes
    python benchmarks/gpu_reference.py --out gpu_reference --only grid   one part: losses, resume or grid (it adds up)

    losses  DeepSpeed ZeRO-2 + bf16 + flash attention against float32 with torch's attention, on the same rows from the
            same weights; and each of them again in micro-batches of half the size: what rounding alone changes
    resume  a run, the same run again, and the same run continued from its half: bit for bit?
    grid    tests/exactness_worker.py on this device

The corpus is Python's own documentation and library (builtin:python): nothing is downloaded. What is missing here
(flash-attn, deepspeed, a GPU) is replaced where it can be, and the report says by what. OUT/report.json has
everything, OUT/report.md the tables. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "accelerate", "deepspeed", "flash-attn", "transformers")
COMMON = {
    "train.validate_every": 1_000_000,
    "train.validation_rows": 256,
    "optim.schedule": "cosine",
    "optim.final_rate": 0.05,
    "track.swanlab": "off",
    "sample.prompts": "[]",
}
SCALES: dict[str, dict[str, Any]] = {
    "gpu": {
        "device": "cuda",
        "vocabulary": 6400,
        "micro_batch": 32,
        "steps": 300,
        "resume_steps": 40,
        "settings": {
            "model.size": "26m",
            "data.sequence_length": 512,
            "train.batch_size": 128,
            "optim.learning_rate": 2e-3,
            "optim.warmup_steps": 60,
        },
    },
    "cpu": {
        "device": "cpu",
        "vocabulary": 512,
        "micro_batch": 4,
        "steps": 20,
        "resume_steps": 10,
        "settings": {
            "model.dim": 64,
            "model.num_layers": 2,
            "model.num_heads": 4,
            "model.num_kv_heads": 2,
            "model.hidden_dim": 128,
            "model.max_length": 64,
            "data.sequence_length": 64,
            "train.batch_size": 8,
            "optim.learning_rate": 2e-3,
            "optim.warmup_steps": 5,
        },
    },
}


class Bench:
    """Where things lie, what is there to run them, and what has been found out."""

    def __init__(self, out: Path, scale: str) -> None:
        self.out, self.scale = out.resolve(), SCALES[scale]
        self.out.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []
        self.zero = importlib.util.find_spec("deepspeed") is not None
        if not self.zero:
            self.notes.append(
                "deepspeed is not installed: bf16 is autocast on one process, in place of ZeRO-2."
            )
        self.attention = "flash" if self._flash() else "sdpa"

    def _flash(self) -> bool:
        if self.scale["device"] == "cpu":
            self.notes.append("on a CPU there is no flash-attn: attention is torch's (sdpa) in every run.")
            return False
        if importlib.util.find_spec("flash_attn") is None:
            self.notes.append("flash-attn is not installed: attention is torch's (sdpa) in every run.")
            return False
        return True

    def prepare_data(self) -> None:
        """Tokenizer and store; what is there is used."""
        source = ["--source", "builtin:python"]
        minilm, size = [sys.executable, "-m", "minilm"], str(self.scale["vocabulary"])
        tokenizer, store = str(self.out / "tokenizer"), str(self.out / "store")
        self.call([*minilm, "tokenizer", "train", *source, "--vocab-size", size, "--out", tokenizer])
        self.call([*minilm, "data", "build", *source, "--tokenizer", tokenizer, "--out", store])

    def call(self, command: list[str]) -> float:
        """Run to the end; seconds. Raises RuntimeError with the last lines of a command that failed."""
        start = time.perf_counter()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            tail = "\n".join((result.stdout + result.stderr).splitlines()[-40:])
            raise RuntimeError(f"{' '.join(command)}\nended with {result.returncode}:\n{tail}")
        return time.perf_counter() - start

    def launcher(self, zero: bool) -> list[str]:
        """How a script is started: by python, or by accelerate with ZeRO-2 on one process."""
        if not zero:
            return [sys.executable]
        file, port = ROOT / "run_file" / "accelerate" / "zero2.yaml", str(20_000 + os.getpid() % 20_000)
        start = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        return [*start, "--config_file", str(file), "--num_processes", "1", "--main_process_port", port]

    def train(self, name: str, *, zero: bool, resume: bool = False, **changes: Any) -> dict[str, Any]:
        """A run of its own name; what its log says about speed and memory."""
        settings = COMMON | self.scale["settings"] | {"run.folder": self.out / "runs", "run.name": name}
        settings |= {"data.store": self.out / "store", "train.device": self.scale["device"]}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        flags = [f"--{key}={value}" for key, value in settings.items()]
        if not resume:
            shutil.rmtree(self.run(name), ignore_errors=True)
        print(f"{datetime.datetime.now():%H:%M:%S} {name}", file=sys.stderr, flush=True)
        command = [*self.launcher(zero), str(ROOT / "train.py"), *flags, *(["--resume"] if resume else [])]
        wall = self.call(command)
        lines = self.lines(name)
        late = lines[len(lines) // 2 :]
        found = {
            "command": " ".join(command).replace(str(ROOT), ".").replace(sys.executable, "python"),
            "wall_seconds": wall,
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in late),
            "step_seconds": statistics.median(line["seconds/step"] for line in late),
            "last_loss": lines[-1]["loss"],
            "validation_loss": self.lines(name, "validation")[-1]["loss"],
        }
        for key in ("memory/peak_mb", "memory/process_mb", "mfu"):
            values = [line[key] for line in late if line.get(key) is not None]
            found[key] = (
                max(values) if values and "mb" in key else statistics.median(values) if values else None
            )
        return found

    def run(self, name: str) -> Path:
        return self.out / "runs" / name

    def lines(self, name: str, kind: str = "train") -> list[dict[str, Any]]:
        text = (self.run(name) / "metrics.jsonl").read_text(encoding="utf-8")
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def losses(bench: Bench) -> dict[str, Any]:
    """bf16 against float32, and each against itself in smaller micro-batches."""
    micro, steps = bench.scale["micro_batch"], bench.scale["steps"]
    fast = {"train__precision": "bf16", "model__attention": bench.attention, "train__steps": steps}
    slow = {"train__precision": "fp32", "model__attention": "sdpa", "train__steps": steps}
    runs = {
        "bf16": bench.train("bf16", zero=bench.zero, train__micro_batch=micro, **fast),
        "fp32": bench.train("fp32", zero=False, train__micro_batch=micro, **slow),
        "bf16-half": bench.train("bf16-half", zero=bench.zero, train__micro_batch=micro // 2, **fast),
        "fp32-half": bench.train("fp32-half", zero=False, train__micro_batch=micro // 2, **slow),
    }
    pairs = [("bf16", "fp32"), ("bf16", "bf16-half"), ("fp32", "fp32-half")]
    return {
        "attention_of_bf16": bench.attention,
        "zero2": bench.zero,
        "runs": runs,
        "differences": {f"{a} against {b}": _difference(bench, a, b) for a, b in pairs},
    }


def _difference(bench: Bench, first: str, second: str) -> dict[str, float]:
    """Of the logged losses, in nats, step by step."""
    ours, theirs = bench.lines(first), bench.lines(second)
    if [x["total_tokens"] for x in ours] != [x["total_tokens"] for x in theirs]:
        raise RuntimeError(f"{first} and {second} did not train on the same rows.")
    each = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    signed = statistics.fmean(a["loss"] - b["loss"] for a, b in zip(ours, theirs, strict=True))
    relative = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))
    return {"first step": each[0], "mean": statistics.fmean(each), "max": max(each),
            "max relative": relative, "signed mean": signed}  # fmt: skip


def resume(bench: Bench) -> dict[str, Any]:
    """Twice the same run, then its second half again from the checkpoint in the middle."""
    steps = bench.scale["resume_steps"]
    settings = {
        "train__precision": "bf16",
        "train__micro_batch": bench.scale["micro_batch"],
        "train__steps": steps,
        "train__save_every": steps // 2,
        "optim__warmup_steps": 5,
        "model__attention": "sdpa",
        "model__dropout": 0.1,  # so that random states matter
    }
    found: dict[str, Any] = {}
    for deterministic in (False, True):
        name = f"resume-{'deterministic' if deterministic else 'default'}"
        settings["train__deterministic"] = deterministic
        try:
            found[name] = _resumed(bench, name, settings)
        except RuntimeError as error:  # an operation without a deterministic kernel: said, not hidden
            if not deterministic:
                raise
            found[name] = {"failed": str(error)}
    return found


def _resumed(bench: Bench, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    whole, again, halved = f"{name}-whole", f"{name}-again", f"{name}-halved"
    bench.train(whole, zero=bench.zero, **settings)
    bench.train(again, zero=bench.zero, **settings)
    bench.train(halved, zero=bench.zero, **settings)
    newest = sorted((bench.run(halved) / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(newest)
    bench.train(halved, zero=bench.zero, resume=True, **settings)
    return {
        "twice the same run": _equal(bench, whole, again),
        "interrupted and resumed": _equal(bench, whole, halved),
    }


def _equal(bench: Bench, first: str, second: str) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    names = ("step", "loss", "gradient_norm", "learning_rate", "total_tokens")
    ours, theirs = ([[line[n] for n in names] for line in bench.lines(name)] for name in (first, second))
    differing = [a[0] for a, b in zip(ours, theirs, strict=True) if a != b]
    ends = [sorted((bench.run(name) / "checkpoints").glob("step-*"))[-1] for name in (first, second)]
    files = {}
    for file in ("model.safetensors", "optimizer.safetensors"):
        mine, other = (load_file(end / file) for end in ends)
        same = mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
        files[file] = same
    return {"log equal": not differing, "first differing step": differing[0] if differing else None, **files}


def grid(bench: Bench) -> dict[str, Any]:
    """The exactness grid on one rank of this device, without a wrapper and with ZeRO-2."""
    found = {}
    for name, zero in (("one process", False), *((("ZeRO-2, 1 rank", True),) if bench.zero else ())):
        out = bench.out / "grid.json"
        script = str(ROOT / "tests" / "exactness_worker.py")
        bench.call([*bench.launcher(zero), script, str(out), bench.scale["device"]])
        measured = json.loads(out.read_text(encoding="utf-8"))
        quantities = ("loss", "gradient_norm", "gradient")
        found[name] = {
            what: {q: max(each[q] for each in measured[what].values()) for q in quantities}
            for what in ("fp32", "bf16", "floor")
        } | {"cases": len(measured["fp32"])}
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {"losses": losses, "resume": resume, "grid": grid}


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch

    versions = {}
    for name in PACKAGES:
        found = importlib.util.find_spec(name.replace("-", "_")) is not None
        versions[name] = importlib.metadata.version(name) if found else None
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    about, lines = report["machine"], ["# Reference run", ""]
    versions = ", ".join(f"{name} {v or '(not installed)'}" for name, v in about["versions"].items())
    lines += [
        f"{about['date']}, {about['device']}, CUDA {about['cuda']}, Python {about['python']}, {versions}."
    ]
    lines += [f"Command: `{report['command']}`", "", *(f"- Note: {note}" for note in report["notes"]), ""]
    parts = report["parts"]
    for name, part in parts.items():
        if "failed" in part:
            lines += [f"## {name}: failed", "", "```", part["failed"], "```", ""]
    if "runs" in parts.get("losses", {}):
        part = parts["losses"]
        keys = (
            "last_loss",
            "validation_loss",
            "tokens_per_second",
            "step_seconds",
            "memory/peak_mb",
            "memory/process_mb",
            "mfu",
        )
        wrapper = "ZeRO-2" if part["zero2"] else "autocast"
        lines += [f"## losses (bf16: {wrapper}, attention {part['attention_of_bf16']}; fp32: sdpa)", ""]
        lines += _table(["run", *keys], [[n, *(run[k] for k in keys)] for n, run in part["runs"].items()])
        head = ["difference of the logged loss, nats", *next(iter(part["differences"].values()))]
        lines += _table(head, [[name, *values.values()] for name, values in part["differences"].items()])
        lines += [f"    {run['command']}" for run in part["runs"].values()] + [""]
    if "resume" in parts and "failed" not in parts["resume"]:
        lines += ["## resume, bit for bit", ""]
        rows = []
        for name, pairs in parts["resume"].items():
            if "failed" in pairs:
                lines += [f"{name} failed:", "", "```", pairs["failed"], "```", ""]
                continue
            rows += [[f"{name}: {pair}", *equal.values()] for pair, equal in pairs.items()]
        lines += _table(["", "log", "first differing step", "weights", "optimizer"], rows)
    if "grid" in parts and "failed" not in parts["grid"]:
        lines += ["## grid: largest relative deviation from float64", ""]
        quantities = ("loss", "gradient_norm", "gradient")
        rows = [
            [f"{name}, {what}", *(each[what][q] for q in quantities)]
            for name, each in parts["grid"].items()
            for what in ("fp32", "bf16", "floor")
        ]
        lines += _table(["", *quantities], rows)
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)

    cells = [head, ["---"] * len(head), *([shown(x) for x in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and report")
    parser.add_argument("--scale", choices=SCALES, default="gpu", help="cpu: tiny, to try the script")
    parser.add_argument(
        "--only", choices=PARTS, help="one part; the report keeps what is there of the others"
    )
    arguments = parser.parse_args()
    import torch

    if arguments.scale == "gpu" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible. --scale cpu runs the same path in small.")
    bench = Bench(arguments.out, arguments.scale)
    file = bench.out / "report.json"
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"] if arguments.only and file.is_file() else {}
    report = {"machine": machine(), "scale": arguments.scale, "notes": bench.notes, "parts": parts}
    report["command"] = f"python benchmarks/gpu_reference.py --out {arguments.out} --scale {arguments.scale}"
    bench.prepare_data()
    for name in [arguments.only] if arguments.only else PARTS:
        try:
            parts[name] = PARTS[name](bench)
        except RuntimeError as error:
            parts[name] = {"failed": str(error)}
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (bench.out / "report.md").write_text(markdown(report), encoding="utf-8")
    print((bench.out / "report.md").read_text(encoding="utf-8"))
    return 1 if any("failed" in part for part in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
