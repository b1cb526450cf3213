"""How long from launch to the first step, where does it go, and how long does --help take?

    python benchmarks/startup.py                              26m, batches of 8 x 512 on a CPU: 4 minutes on 2 cores
    python benchmarks/startup.py --store STORE --size 100m
    python benchmarks/startup.py --quick --json quick.json    the same path in seconds

Everything is built beforehand: a store with its tokenizer (of builtin:python-docs, if none is given). A start is timed
from the creation of the process until the line of the first step is in metrics.jsonl, by the clock that both share;
then the processes are ended. Told are this time, and this time without the step and the validation before it, whose own
seconds stand in the log. The ways take turns: train.py and `accelerate launch train.py`, with the checks before the
first step (the default) and without them.

The floor is what nobody who trains with torch here can leave out: Python, the import of torch, an optimizer (which
imports torch's compiler), and where Accelerate launches, `accelerate launch` of an empty script. Two further processes
show where the time goes: a start with a clock at each part, and Python's own -X importtime.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
LAUNCHER += ["--config_file", str(ROOT / "run_file/accelerate/single.yaml")]
WAYS = {"train.py": [sys.executable], "accelerate launch train.py": LAUNCHER}
CHECKS = {"with checks": "quick", "without checks": "off"}
TORCH = "import torch; torch.optim.AdamW([torch.zeros(1, requires_grad=True)])"
OF_TORCH = "import torch, an optimizer"
HELPS = (["-m", "minilm", "--help"], ["-m", "minilm", "doctor", "--help"], ["-m", "minilm", "generate", "--help"],
         [str(ROOT / "train.py"), "--help"])  # fmt: skip
IMPORTS = "minilm.launch"
MOST_SECONDS = 300.0  # of one start, on a machine that does other things as well
SHOWN = 10  # packages


class Failed(Exception):
    """A start came to nothing; the text is the last that it said."""


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        store = args.store or made_store(folder)
        flags = _flags(args, store, folder)
        results: dict[str, Any] = {
            "starts": starts(args, flags, folder),
            "phases": phases(flags, folder, args.threads),
            "imports": imports(),
            "floors": floors(args, folder),
            "helps": commands(
                {_called(words): [sys.executable, *words] for words in HELPS[: 1 if args.quick else None]},
                args.repeats,
            ),
        }
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    file = measuring.write("startup", settings, results, args.json, argv=argv)
    print(section(json.loads(file.read_text(encoding="utf-8"))))
    print(f"written to {file}", file=sys.stderr)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arg = parser.add_argument
    arg("--store", type=Path, help="default: one of builtin:python-docs is made first")
    arg("--size", default="26m", help="of model original (default: 26m)")
    arg("--rows", type=int, default=8, help="of a batch (default: 8)")
    arg("--length", type=int, default=512, help="tokens of a row (default: 512)")
    arg("--threads", type=int, default=os.cpu_count(), help="of torch (default: as many as cores)")
    arg("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arg("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    arg("--repeats", type=int, default=3, help="turns (default: 3)")
    arg("--quick", action="store_true", help="a tiny model, train.py alone, one turn")
    arg("--json", type=Path, metavar="FILE", help="default: benchmarks/results/startup.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.rows, args.length, args.repeats = "tiny", 2, 32, 1
        args.ways, args.checks, args.threads = ["train.py"], ["without checks"], 1
    return args


def made_store(folder: Path) -> Path:
    """A store of Python's own documentation, as a user makes it."""
    source, tokenizer, store = ["--source", "builtin:python-docs"], folder / "tokenizer", folder / "store"
    for command in (
        ["tokenizer", "train", *source, "--vocab-size", "6400", "--out", str(tokenizer)],
        ["data", "build", *source, "--tokenizer", str(tokenizer), "--out", str(store)],
    ):
        words = [sys.executable, "-m", "minilm", *command]
        subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return store


def _flags(args: argparse.Namespace, store: Path, folder: Path) -> list[str]:
    """Flags of a run of one step, which is validated on as many rows as a batch has."""
    settings = {
        "data.store": store.resolve(), "data.sequence_length": args.length, "model.size": args.size, "train.steps": 1,
        "train.batch_size": args.rows, "train.validation_rows": args.rows, "train.device": "cpu",
        "optim.warmup_steps": 0, "track.swanlab": "off", "run.folder": folder / "runs",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in settings.items()]


def starts(args: argparse.Namespace, flags: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds of each way, in turns; the first turn is not counted, for files are cold then."""
    cells = {f"{way}, {check}": (WAYS[way], CHECKS[check]) for way in args.ways for check in args.checks}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cells}
    for turn in range(args.repeats if args.quick else 1 + args.repeats):
        for number, (name, (way, check)) in enumerate(cells.items()):
            run = f"{turn}-{number}"
            words = [*way, str(ROOT / "train.py"), *flags, f"--doctor.check={check}", f"--run.name={run}"]
            seconds = started(words, folder / "runs" / run, args.threads)
            if turn or args.quick:
                found[name].append(seconds)
    return {
        name: {key: measuring.spread([one[key] for one in several]) for key in several[0]}
        for name, several in found.items()
    }


def started(words: list[str], run: Path, threads: int) -> dict[str, float]:
    """Launch, wait for the line of the first step, end it. Raises Failed, with what it said, if there is none."""
    log = run.with_suffix(".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        launched = time.time()
        process = subprocess.Popen(
            words, cwd=ROOT, env=_environment(threads), stdout=said, stderr=said, start_new_session=True
        )
    try:
        line = validation = None
        while line is None:
            ended = process.poll() is not None or time.time() - launched > MOST_SECONDS
            lines = list(logged(run / "metrics.jsonl"))
            line = next((x for x in lines if x["kind"] == "train"), None)
            validation = next((x for x in lines if x["kind"] == "validation"), None)
            if ended and line is None:
                raise Failed(f"{' '.join(words)}\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    whole, step = line["unix_seconds"] - launched, line["seconds/step"]
    before = validation["seconds/validation"] if validation is not None else 0.0
    return {"to_the_first_line": whole, "step": step, "validation": before, "start": whole - step - before}


def logged(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log that is being written."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def phases(flags: list[str], folder: Path, threads: int) -> dict[str, Any]:
    """A start with the checks, with a clock at each part; and what it has loaded when its first step begins."""
    file = folder / "phases.json"
    words = [sys.executable, str(Path(__file__).with_name("startup_phases.py")), str(file), *flags]
    done = subprocess.run(
        [*words, "--run.name=phases"], cwd=ROOT, env=_environment(threads), capture_output=True, check=False
    )
    if done.returncode or not file.is_file():
        raise Failed(f"{' '.join(words)}\n{done.stderr.decode(errors='replace')[-3000:]}")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def imports() -> dict[str, float]:
    """Own seconds of the packages that a start imports, those of most first, by Python's -X importtime."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {IMPORTS}"], stderr=subprocess.PIPE, check=True
    )
    seconds: dict[str, float] = {}
    for line in done.stderr.decode().splitlines():
        own, _, name = (part.strip() for part in line.removeprefix("import time:").partition("|"))
        if own.isdigit():
            module = name.rpartition("|")[2].strip()
            package = ".".join(module.split(".")[: 2 if module.startswith("torch.") else 1])
            seconds[package] = seconds.get(package, 0.0) + int(own) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1])[:SHOWN])


def floors(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of processes that do nothing of ours."""
    empty = folder / "empty.py"
    empty.write_text("")
    codes = {"python": "", "import torch": "import torch", OF_TORCH: TORCH}
    if args.quick:
        del codes["import torch"]
    named = {name: [sys.executable, "-c", code] for name, code in codes.items()}
    if "accelerate launch train.py" in args.ways:
        named["accelerate launch of an empty script"] = [*LAUNCHER, str(empty)]
    return commands(named, args.repeats)


def commands(named: dict[str, list[str]], repeats: int) -> dict[str, Any]:
    """Seconds of commands from beginning to end, in turns."""

    def runs(words: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run(
            words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    seconds = measuring.interleaved({name: runs(words) for name, words in named.items()}, repeats)
    return {name: measuring.spread(times) for name, times in seconds.items()}


def _called(words: list[str]) -> str:
    """A command as it is typed."""
    return " ".join(words[1:] if words[0] == "-m" else [Path(words[0]).name, *words[1:]])


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def section(record: dict[str, Any]) -> str:
    """The Markdown of docs/performance.md that these results are."""
    results, settings = record["results"], record["settings"]
    told = measuring.told
    rows = [
        [name, *(told(one[key]) for key in ("start", "to_the_first_line", "step", "validation"))]
        for name, one in results["starts"].items()
    ]
    head = [
        "seconds",
        "launch to first step",
        "to its line in the log",
        "of it the step",
        "of it a validation",
    ]
    (name, first), *rest = results["starts"].items()
    shape = f"{settings['size']}, batches of {settings['rows']} x {settings['length']} tokens"
    floor = results["floors"][OF_TORCH]
    blocks = [
        "## Start",
        f"From launch to the first step it takes {first['start']['median']:.1f} s ({name}; {shape}, "
        f"{settings['threads']} thread(s), everything built), "
        + "; ".join(f"{one['start']['median']:.1f} s with {name}" for name, one in rest)
        + f". A process that imports torch and makes an optimizer in the usual way takes {floor['median']:.1f} s.",
        measuring.table(head, rows),
        "What nobody can leave out, in processes that do nothing of ours (train.py imports torch without Python's "
        "garbage collector, and so in less time than they), and the pages of help:",
        measuring.table(
            ["command", "seconds"],
            [[name, told(one)] for part in ("floors", "helps") for name, one in results[part].items()],
        ),
        "Where the time of `train.py` with its checks goes, in one start:",
        measuring.table(
            ["part", "seconds"], [[k, f"{v:.2f}"] for k, v in results["phases"]["seconds"].items()]
        ),
        f"Of libraries that such a start might load, these are loaded when its first step begins: "
        f"{', '.join(results['phases']['loaded']) or 'none'}. The packages that take longest to import (own seconds, "
        "by `-X importtime`, which slows down all of them): "
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in results["imports"].items())
        + ".",
        f"```\n{record['command']}\n```",
    ]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as failed:
        sys.exit(f"error: a start came to nothing: {failed}")
