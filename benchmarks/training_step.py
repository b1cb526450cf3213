"""Training steps per second: minilm against transformers and, where their code is at hand, four other trainers.

    python benchmarks/training_step.py --head-size 16 64 --peers PEERS      CPU: 8 x 512, float32, 2 threads
    python benchmarks/training_step.py --size 100m --json benchmarks/results/training_step_100m.json
    python benchmarks/training_step.py --only minilm transformers --repeats 9
    python benchmarks/training_step.py --quick                              the same path in small, half a minute

Every contender has a process of its own that stays alive. All are given the same tokens; they take steps turn by turn,
so that what else the machine does meets all, and a ratio is that of two contenders in the same turn. Memory is the
most that the process of a contender ever had (CUDA: what the allocator gave out). PEERS is a folder with checkouts
named nanoGPT, nanochat, litgpt, minimind; who cannot be imported, compiles too slowly or fails is told with the reason.

All stay alive at the same time: at 8 x 512 on a CPU each has 2 to 3 GB, so 24 GB of memory hold eight (--only). These
take some minutes for a head size, the larger part for torch.compile, whose caches begin empty. Exit code 1 if minilm
and transformers, which begin with the same weights, have other losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contenders
import measuring
import torch
from children import Child, Failed, ended
from contenders import PLAIN, Entry, Shape
from training_step_told import section

from minilm import models
from minilm.models.original import OriginalConfig

__all__ = ["floors", "main", "section"]

BATCHES = {"cpu": {"26m": 8, "100m": 2, "350m": 1}, "cuda": {"26m": 128, "100m": 32, "350m": 16}}
WARM_UP = 2  # steps that are not counted; the first of them compiles
START_SECONDS, STEP_SECONDS = 600, 300
# Losses in nats between those with the same weights: rounding, which AdamW makes larger with every step. So only the
# first steps are compared.
GAPS = {"fp32": 1e-4, "bf16": 2e-2}
COMPARED = 8


@dataclass
class Runner:
    """A contender while it is measured."""

    name: str
    entry: Entry
    child: Child | None
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of a step, one per turn
    losses: list[float] = field(default_factory=list)  # of all steps, uncounted ones first
    compiled: list[int] = field(default_factory=list)  # frames compiled so far, after each order
    first_seconds: float = 0.0
    failed: str | None = None

    def ready(self) -> None:
        """Wait until it can take steps. Failed with the reason."""
        assert self.child is not None
        self.facts |= self.child.answer(START_SECONDS)

    def order(self, steps: int, seconds: float, uncounted: int = 0) -> float:
        """Steps of it; seconds of one, after some that are not counted. Failed with the reason."""
        assert self.child is not None
        answer = self.child.ask({"steps": steps, "uncounted": uncounted}, seconds)
        self.losses += answer["losses"]
        self.compiled.append(answer["compilations"])
        self.facts["peak_bytes"] = answer["peak_bytes"]
        return float(answer["seconds"])


def measured(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """One comparison: all contenders at one shape."""
    known = contenders.entries()
    entries = {name: known[name] for name in args.only}
    with tempfile.TemporaryDirectory() as folder, ended() as children:
        runners = [started(name, entry, shape, Path(folder), children) for name, entry in entries.items()]
        for runner in runners:
            _or_reason(runner, Runner.ready)
        for runner in runners:
            _or_reason(runner, lambda r: warmed_up(r, args))
        dtype = torch.bfloat16 if shape.dtype == "bf16" else torch.float32
        at_least = 0.0 if args.quick else 0.3
        best = 0.0 if args.quick else measuring.ceiling(dtype, shape.device)
        # Who waits leaves a GPU's memory to the others, and gets it anew with the first step of a turn.
        steps, uncounted = args.steps_per_turn, 1 if shape.device == "cuda" else 0
        for turn in range(args.repeats):
            for runner in runners:
                _or_reason(runner, lambda r: r.seconds.append(r.order(steps, STEP_SECONDS, uncounted)))
            say(f"turn {turn + 1} of {args.repeats}: " + _turn(runners))
        # Before and after: it is the ceiling that is wanted, not what others leave of it.
        best = max(best, measuring.ceiling(dtype, shape.device, seconds=at_least))
        speed = measuring.bandwidth(shape.device, seconds=at_least)
    return {
        "head_size": shape.head_size,
        "shape": {key: value for key, value in dataclasses.asdict(shape).items() if key != "peers"},
        "ceiling_flops_per_second": best,
        "bandwidth_bytes_per_second": speed,
        "floors": floors(shape, best, speed),
        **summary(runners, shape, best),
    }


def started(name: str, entry: Entry, shape: Shape, folder: Path, children: list[Child]) -> Runner:
    """With a process, which begins to import and build at once. `children` get it: they end whatever happens."""
    if entry.folder and not (Path(str(shape.peers)) / entry.folder).is_dir():
        return Runner(name, entry, None, failed=f"there is no folder {entry.folder} in the folder of peers")
    given = {"shape": dataclasses.asdict(shape), "module": entry.module, "options": entry.options}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    # Caches that begin empty: else the seconds to compile would depend on what was compiled before. They are set, not
    # given as a default: where torch's compiler was imported, this process has the common folder in its environment.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"{name}-inductor")
    environment["TRITON_CACHE_DIR"] = str(folder / f"{name}-triton")
    if shape.threads is not None:
        environment["OMP_NUM_THREADS"] = str(shape.threads)
    environment |= entry.environment
    command = [sys.executable, str(Path(__file__).with_name("contender.py")), json.dumps(given)]
    child = Child(command, environment, folder / f"{name}.log")
    children.append(child)
    return Runner(name, entry, child)


def warmed_up(runner: Runner, args: argparse.Namespace) -> None:
    say(f"{runner.entry.label}: first steps")
    runner.first_seconds = runner.order(1, args.compile_limit)
    for _ in range(WARM_UP - 1):
        runner.order(1, STEP_SECONDS)


def _or_reason(runner: Runner, do: Callable[[Runner], object]) -> None:
    """Do something with a contender that has not failed; when it fails now, keep the reason."""
    if runner.failed is not None:
        return
    try:
        do(runner)
    except Failed as reason:
        runner.failed = str(reason)
        say(f"{runner.entry.label}: FAILED: {reason}")


def summary(runners: list[Runner], shape: Shape, best: float) -> dict[str, Any]:
    """Figures of all: who failed has a reason instead."""
    whole = {runner.name: runner for runner in runners if runner.failed is None}
    plain = whole.get(PLAIN)
    rivals = [r for r in whole.values() if r.entry.module != "ours" and not r.entry.environment]
    fastest = min(rivals, key=lambda r: statistics.median(r.seconds), default=None)
    tokens = shape.batch * shape.length
    found: dict[str, Any] = {}
    for runner in runners:
        told: dict[str, Any] = {"label": runner.entry.label}
        if runner.failed is not None:
            found[runner.name] = told | {"failed": runner.failed}
            continue
        speed = measuring.spread([tokens / s for s in runner.seconds])
        told |= runner.facts | {
            "seconds": runner.seconds,
            "tokens_per_second": speed,
            "mfu": speed["median"] * runner.facts["flops_per_token"] / best,
            "ratio_to_plain": _ratio(runner, plain),
            "ratio_to_best_peer": _ratio(runner, fastest),
            "peak_ratio": runner.facts["peak_bytes"] / plain.facts["peak_bytes"] if plain else None,
            "losses": runner.losses,
            "in_order": _in_order(runner.losses, shape.config().vocab_size),
            "loss_gap": _gap(runner, plain),
        }
        if runner.entry.options.get("compiled"):
            told["compile_seconds"] = max(0.0, runner.first_seconds - statistics.median(runner.seconds))
            told["recompilations"] = runner.compiled[-1] - runner.compiled[WARM_UP - 1]
        found[runner.name] = told
    return {"best_peer": fastest.name if fastest else None, "contenders": found}


def _ratio(runner: Runner, other: Runner | None) -> dict[str, float] | None:
    """How many times as fast as another, turn by turn."""
    return None if other is None else measuring.paired(other.seconds, runner.seconds)


def _in_order(losses: list[float], vocab_size: int) -> bool:
    """Are all losses numbers, and the first that of a model which knows nothing yet: ln V, within 1 nat?"""
    return all(map(math.isfinite, losses)) and abs(losses[0] - math.log(vocab_size)) < 1.0


def _gap(runner: Runner, plain: Runner | None) -> float | None:
    """The largest difference of losses to the plain loop, for those who must have the same."""
    if plain is None or not runner.entry.same_weights:
        return None
    gaps = [abs(a - b) for a, b in zip(runner.losses[:COMPARED], plain.losses[:COMPARED], strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.inf  # max passes over NaN


def floors(shape: Shape, flops_per_second: float, bytes_per_second: float) -> dict[str, dict[str, float]]:
    """What a step must at least do, by part: operations, bytes through the memory, and the seconds of both.

    Each of the three products of a linear layer (forward, gradient of the input, gradient of the weight) reads two of
    the three matrices involved and writes the third. Attention reads queries, keys and values and writes its output,
    and in the backward pass reads these and the output's gradient and writes three gradients. Whatever lies between is
    taken as done on the way, the logits as never stored. AdamW reads weight, gradient and two moments and writes three
    of them; the norm of the gradient reads it once more.
    """
    config: OriginalConfig = shape.config()
    tokens, number = shape.batch * shape.length, 2 if shape.dtype == "bf16" else 4
    heads, kv = config.dim, config.num_kv_heads * config.head_dim
    layers = [
        (heads, heads + 2 * kv),
        (heads, heads),
        (heads, 2 * config.hidden_dim),
        (config.hidden_dim, heads),
    ]
    weights = config.num_layers * sum(a * b for a, b in layers)
    through = config.num_layers * sum(a + b for a, b in layers)
    head = config.vocab_size * config.dim
    attended = config.num_layers * config.dim * (shape.length + 1) / 2
    inside = config.num_layers * (3 * (heads + 2 * kv) + 3 * heads)
    parts = {
        "linear layers": (6.0 * weights * tokens, 3 * number * (weights + through * tokens)),
        "output layer and loss": (6.0 * head * tokens, 3 * number * (head + config.dim * tokens)),
        "attention": (12.0 * attended * tokens, number * inside * tokens),
        "AdamW and the gradient's norm": (0.0, 4 * 8 * config.num_parameters()),
    }
    return {
        name: {
            "flops": flops,
            "bytes": float(moved),
            "arithmetic_seconds": flops / flops_per_second,
            "memory_seconds": moved / bytes_per_second,
        }
        for name, (flops, moved) in parts.items()
    }


def _turn(runners: list[Runner]) -> str:
    return ", ".join(f"{r.name} {r.seconds[-1]:.3g} s" for r in runners if r.failed is None)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arg = parser.add_argument
    arg("--size", default="26m", help="of model original (default: 26m)")
    arg("--head-size", type=int, nargs="+", metavar="N", help="default: that of the size")
    arg("--batch", type=int, metavar="N", help=f"rows of a step (default, by device and size: {BATCHES})")
    arg("--length", type=int, default=512, metavar="N", help="tokens of a row (default: 512)")
    arg("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    arg("--dtype", choices=("fp32", "bf16"), help="default: bf16 (autocast) on CUDA, fp32 on a CPU")
    arg("--threads", type=int, default=2, metavar="N", help="of torch on a CPU (default: 2)")
    arg("--repeats", type=int, default=5, metavar="N", help="turns (default: 5)")
    arg("--steps-per-turn", type=int, metavar="N", help="default: 1 on a CPU, 10 on CUDA")
    arg("--peers", type=Path, metavar="FOLDER", help="checkouts nanoGPT, nanochat, litgpt, minimind")
    arg("--only", nargs="+", metavar="NAME", help=f"of {', '.join(contenders.entries())}")
    arg("--compile-limit", type=float, default=300, metavar="SECONDS", help="for a first step (default: 300)")
    arg("--json", type=Path, metavar="FILE", help="default: benchmarks/results/training_step.json")
    arg("--quick", action="store_true", help="a tiny model, eager, 2 turns, one thread: to see that it works")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.length, args.batch = "tiny", 32, 2
        args.threads, args.repeats = 1, 2
    _filled_in(args, parser)
    return args


def _filled_in(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What was left to defaults; all that is wrong is told at once."""
    cuda, known, problems = torch.cuda.is_available(), contenders.entries(), []
    args.device = args.device or ("cuda" if cuda else "cpu")
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    args.batch = args.batch or BATCHES[args.device].get(args.size, 8)
    args.steps_per_turn = args.steps_per_turn or (10 if args.device == "cuda" else 1)
    if args.device == "cuda" and not cuda:
        problems.append("--device cuda: no CUDA device is visible")
    if unknown := sorted(set(args.only or ()) - set(known)):
        problems.append(f"--only: nobody is called {', '.join(unknown)}; there are {', '.join(known)}")
    if args.peers is not None and not args.peers.is_dir():
        problems.append(f"--peers: {args.peers} is no folder")
    if not args.peers and (lone := [x for x in args.only or () if x in known and known[x].folder]):
        problems.append(
            f"--only {', '.join(lone)}: their code is imported from a folder, give --peers FOLDER"
        )
    if min(args.batch, args.threads, args.repeats, args.steps_per_turn) < 1 or args.length < 8:
        problems.append("numbers must be at least 1, --length at least 8")
    if args.size not in models.sizes("original"):
        problems.append(f"--size {args.size}: there are {', '.join(models.sizes('original'))}")
    else:
        width = models.preset("original", args.size).dim
        args.head_size = args.head_size or [models.preset("original", args.size).head_dim]
        problems += [
            f"--head-size {n}: must be even and divide the width {width}"
            for n in args.head_size
            if n < 2 or n % 2 or width % n
        ]
    if problems:
        parser.error("\n".join(problems))
    with_peers = [name for name, entry in known.items() if args.peers is not None or entry.folder is None]
    if args.quick:
        with_peers = [name for name in with_peers if not known[name].options.get("compiled")]
    args.only = [name for name in with_peers if args.only is None or name in args.only]


def shape_of(args: argparse.Namespace, head_size: int) -> Shape:
    threads = args.threads if args.device == "cpu" else None
    peers = str(args.peers.resolve()) if args.peers else None
    return Shape(args.size, head_size, args.batch, args.length, args.device, args.dtype, threads, peers)


def agreeing(case: Mapping[str, Any], dtype: str) -> bool:
    """Are all losses numbers, and those of minilm and transformers the same?"""
    found = [told for told in case["contenders"].values() if "failed" not in told]
    gaps = [told["loss_gap"] for told in found if told["loss_gap"] is not None]
    return all(gap <= GAPS[dtype] for gap in gaps) and all(told["in_order"] for told in found)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    begun = time.monotonic()
    cases = []
    for head_size in args.head_size:
        cases.append(measured(shape_of(args, head_size), args))
    names = ("size", "head_size", "batch", "length", "device", "dtype", "repeats", "steps_per_turn", "quick")
    settings = {name: getattr(args, name) for name in names} | {"warm_up_steps": WARM_UP}
    results = {
        "cases": cases,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "gap_limit": GAPS[args.dtype],
        "compared_steps": COMPARED,
    }
    path = measuring.write("training_step", settings, results, args.json, argv=argv)
    print(section(json.loads(path.read_text(encoding="utf-8"))))
    print(f"wrote {path}", file=sys.stderr)
    if all(agreeing(case, args.dtype) for case in cases):
        return 0
    say("LOSSES DIFFER: see the column `loss gap`, and who is not to be believed")
    return 1


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
