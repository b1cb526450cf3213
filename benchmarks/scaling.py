"""How does the speed of training grow with rows, length, model, threads and ranks?

    python benchmarks/scaling.py                   26m around 8 x 512, float32 on a CPU: 7 minutes on 2 cores
                                                   CUDA: around 128 x 512, bfloat16, up to 1b
    python benchmarks/scaling.py --axes rows length --compile
    python benchmarks/scaling.py --quick --json quick.json                          the same path in seconds

    rows      of a step, which is one micro-batch
    length    of a row, with as many tokens in a step
    size      of the model, with half the rows on a CPU, an eighth of them on CUDA
    threads   of a CPU
    ranks     with as many rows in all: one process, DDP, and DeepSpeed ZeRO-2; on a CPU they share its cores

The steps are the trainer's own (`optimizer_step`: forward, backward, clip, AdamW). Each axis has a process of its own,
in which its points take turns; launches of ranks follow one another. MFU is the share of the best matrix product that
the same process measured, on as many threads; of all ranks at once, where there are several. Memory is weights,
moments, gradients and activations of one rank, as tensors. Runs that must begin with the same loss (threads, ranks) are
compared: exit code 1 if they do not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measuring
import scaling_worker
import torch
from whole_tree import run_whole

from minilm import models

ROOT = Path(__file__).resolve().parent.parent
AXES = ("rows", "length", "size", "threads", "ranks")
WRAPPERS = ("DDP", "ZeRO-2")
# Of two runs that compute the same in another order.
SAME_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}
LAUNCHERS = {
    ("cpu", "DDP"): "cpu2.yaml", ("cpu", "ZeRO-2"): "cpu2_zero2.yaml",
    ("cuda", "DDP"): "multi_gpu.yaml", ("cuda", "ZeRO-2"): "zero2.yaml",
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"size": "26m", "row": 8, "rows": [1, 2, 4, 8, 16], "length": 512, "lengths": [128, 256, 512, 1024, 2048],
            "sizes": ["6m", "26m", "100m"], "size_rows": 4, "ranks": [2], "repeats": 3, "rounds": 1},
    "cuda": {"size": "26m", "row": 128, "rows": [8, 32, 64, 128, 256], "length": 512,
             "lengths": [128, 256, 512, 1024, 2048], "sizes": ["6m", "26m", "100m", "350m", "1b"], "size_rows": 16,
             "ranks": [1], "repeats": 7, "rounds": 2},
    "quick": {"size": "tiny", "row": 2, "rows": [1, 2], "length": 32, "lengths": [16, 32], "sizes": ["tiny"],
              "size_rows": 1, "ranks": [], "repeats": 2, "rounds": 1},
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    points = {axis: list(_points(axis, args)) for axis in args.axes}
    groups = [list(itertools.chain(*points.values()))] if args.quick else list(points.values())
    results = [found for group in groups if group for found in _run(group, args, None)]
    if "ranks" in args.axes:
        results += _ranks(args)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    file = measuring.write("scaling", settings, results, args.json, argv=argv)
    print(section(json.loads(file.read_text(encoding="utf-8"))))
    print(f"written to {file}", file=sys.stderr)
    wrong = differing(results, SAME_LOSS[args.dtype])
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arg, cuda = parser.add_argument, torch.cuda.is_available()
    known = models.sizes("original")
    arg("--axes", nargs="+", choices=AXES, default=list(AXES), help=", ".join(AXES))
    arg("--size", choices=known, help="of model original, but for the axis size (default: 26m)")
    arg("--rows", type=int, nargs="+", help="default: 1 2 4 8 16, on CUDA 8 32 64 128 256")
    arg("--lengths", type=int, nargs="+", help="default: 128 256 512 1024 2048")
    arg("--sizes", nargs="+", choices=known, help="default: 6m 26m 100m, on CUDA also 350m 1b")
    arg("--threads", type=int, nargs="+", help="of torch on a CPU; the most are those of the other axes")
    arg(
        "--ranks",
        type=int,
        nargs="+",
        help="beside one process without a wrapper (default: 2, on CUDA all GPUs)",
    )
    arg("--row", type=int, help="rows where they do not vary (default: 8, on CUDA 128)")
    arg("--length", type=int, help="tokens of a row where they do not vary (default: 512)")
    arg("--head-size", type=int, help="heads of this size in place of those of the model")
    arg("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    arg("--dtype", choices=("float32", "bfloat16"), help="default: float32, on CUDA bfloat16")
    arg("--compile", action="store_true", help="torch.compile, as train.compile")
    arg("--repeats", type=int, help="turns (default: 3, on CUDA 7)")
    arg("--rounds", type=int, help="launches of each number of ranks (default: 1, on CUDA 2)")
    arg("--quick", action="store_true", help="tiny, in one process, ranks only if they are asked for")
    arg("--json", type=Path, metavar="FILE", help="default: benchmarks/results/scaling.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: no CUDA device is visible")
    defaults = DEFAULTS["quick" if args.quick else args.device]
    if args.device == "cuda":
        defaults = {**defaults, "ranks": sorted({1, torch.cuda.device_count()})}
    args.size_rows = defaults["size_rows"]
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    cores = os.cpu_count() or 1
    args.threads = args.threads or ([1] if args.quick or args.device == "cuda" else sorted({1, cores}))
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    _refuse(parser, args)
    return args


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    counts = [*args.rows, *args.threads, *args.ranks, args.row, args.repeats, args.rounds]
    if min(counts) < 1 or min(*args.lengths, args.length) < 2:
        parser.error("numbers of rows, threads, ranks and turns must be at least 1, lengths at least 2")
    tokens = args.row * args.length
    if odd := [length for length in args.lengths if tokens % length]:
        parser.error(f"--lengths {odd[0]} does not divide the {tokens} tokens of a step (--row x --length)")
    if odd := [count for count in args.ranks if args.row % count]:
        parser.error(f"--ranks {odd[0]} does not divide the {args.row} rows of a step (--row)")
    if args.head_size:
        sizes = {args.size, *(args.sizes if "size" in args.axes else ())}
        widths = {size: models.preset("original", size).dim for size in sizes}
        if odd := [size for size, width in widths.items() if width % args.head_size or args.head_size % 2]:
            parser.error(f"--head-size {args.head_size} is odd or does not divide the width of {odd[0]}")


# ---------------------------------------------------------------- points


def _points(axis: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The points of an axis within one process."""
    usual = {"size": args.size, "rows": args.row, "length": args.length, "threads": max(args.threads)}
    usual |= {"head_size": args.head_size, "axis": axis, "wrapper": None}
    if axis == "rows":
        yield from ({**usual, "value": rows, "rows": rows} for rows in args.rows)
    elif axis == "length":
        tokens = args.row * args.length
        yield from ({**usual, "value": n, "length": n, "rows": tokens // n} for n in args.lengths)
    elif axis == "size":
        yield from ({**usual, "value": size, "size": size, "rows": args.size_rows} for size in args.sizes)
    elif axis == "threads" and args.device == "cpu":
        yield from ({**usual, "value": threads, "threads": threads} for threads in args.threads)


def _run(
    points: list[dict[str, Any]], args: argparse.Namespace, launcher: list[str] | None
) -> list[dict[str, Any]]:
    """Measured in a process of their own, or with `launcher` in several. RuntimeError with the end of what it said."""
    say(", ".join(f"{point['axis']} {_name(point)}" for point in points))
    plan = {"points": points, **{k: getattr(args, k) for k in ("repeats", "device", "dtype", "compile")}}
    plan |= {"steps": 10 if args.device == "cuda" else 1, "ceiling_seconds": 0.0 if args.quick else 0.3}
    if args.quick and launcher is None:
        return scaling_worker.measure(plan)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "plan.json", Path(folder) / "results.json"
        files[0].write_text(json.dumps(plan), encoding="utf-8")
        script = str(Path(scaling_worker.__file__))
        command = [*(launcher or [sys.executable]), script, *map(str, files)]
        threads = str(max(point["threads"] for point in points))
        code, text = run_whole(command, environment={"OMP_NUM_THREADS": threads}, folder=ROOT)
        if code != 0:
            said = [line.strip() for line in text.splitlines() if line.strip()]
            raise RuntimeError("\n".join([*said[-30:], f"{reason(said)} (ended with {code})"]))
        found: list[dict[str, Any]] = json.loads(files[1].read_text(encoding="utf-8"))
        return found


def _ranks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One process without a wrapper, then each wrapper; several rounds of all of them add up."""
    wanted: list[tuple[int, str | None]] = [(1, None)]
    wanted += [
        (count, wrapper) for count in args.ranks for wrapper in WRAPPERS if (count, wrapper) != (1, "DDP")
    ]
    rounds: dict[tuple[int, str | None], list[dict[str, Any]]] = {key: [] for key in wanted}
    for _ in range(args.rounds):
        for count, wrapper in wanted:
            rounds[count, wrapper].append(_launched(count, wrapper, args))
    return [pooled(found) for found in rounds.values()]


def _launched(count: int, wrapper: str | None, args: argparse.Namespace) -> dict[str, Any]:
    point = {"axis": "ranks", "value": count, "wrapper": wrapper, "size": args.size, "rows": args.row,
             "length": args.length, "threads": max(1, max(args.threads) // count),
             "head_size": args.head_size}  # fmt: skip
    if wrapper == "ZeRO-2" and importlib.util.find_spec("deepspeed") is None:
        return {**point, "absent": "deepspeed is not installed"}
    try:
        return _run([point], args, launcher(count, wrapper, args.device))[0]
    except RuntimeError as error:  # one that cannot be launched here is told, the others go on
        print(error, file=sys.stderr)
        return {**point, "absent": str(error).splitlines()[-1]}


def reason(said: list[str]) -> str:
    """The line of what a failed command wrote that says most: the last one with the name of an error, else the last."""
    errors = [
        line for line in said if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Problem)\b.*:", line)
    ]
    told = (errors or said or ["it said nothing"])[-1]
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", told)[:300]


def launcher(count: int, wrapper: str | None, device: str) -> list[str] | None:
    """The beginning of the command that starts a script on `count` ranks; None: no launcher at all."""
    if wrapper is None:
        return None
    file, port = ROOT / "run_file" / "accelerate" / LAUNCHERS[device, wrapper], 20_000 + os.getpid() % 20_000
    start = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    return [*start, "--num_processes", str(count), "--main_process_port", str(port)]


def pooled(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The same point, launched several times: the turns of all, the most memory, the MFU of the median."""
    done = [one for one in rounds if "absent" not in one]
    if not done:
        return rounds[0]
    speeds = [speed for one in done for speed in one["speeds"]]
    speed = measuring.spread(speeds)
    limit = max(one["ceiling_flops"] for one in done)
    first = done[0]
    share = first["mfu"] * first["ceiling_flops"] / first["tokens_per_second"]["median"]  # FLOPs per token
    return {
        **first, "speeds": speeds, "tokens_per_second": speed, "ceiling_flops": limit,
        "peak_megabytes": max(one["peak_megabytes"] for one in done), "mfu": share * speed["median"] / limit,
        "mfu_of_data_sheet": first["mfu_of_data_sheet"]
        and first["mfu_of_data_sheet"] * speed["median"] / first["tokens_per_second"]["median"],
    }  # fmt: skip


def differing(results: list[dict[str, Any]], tolerance: float) -> list[str]:
    """Points on the same rows from the same weights whose first losses are not the same."""
    found = []
    for axis in ("threads", "ranks"):
        done = [one for one in results if one["axis"] == axis and "absent" not in one]
        for one in done[1:]:
            far = abs(one["loss_of_first_step"] - done[0]["loss_of_first_step"])
            if not far <= tolerance:
                found.append(
                    f"{axis} {_name(one)}: the first loss is {one['loss_of_first_step']}, that of {_name(done[0])} is "
                    f"{done[0]['loss_of_first_step']}, on the same rows."
                )
    return found


# ---------------------------------------------------------------- the page


def section(record: dict[str, Any]) -> str:
    """The Markdown of docs/performance.md that these results are."""
    settings, results = record["settings"], record["results"]
    lines = ["## Scaling", "", _answer(results), ""]
    compiled = "compiled" if settings["compile"] else "eager"
    head_size = f", head size {settings['head_size']}" if settings["head_size"] else ""
    lines += [
        f"`original` {settings['size']}{head_size}, {settings['row']} x {settings['length']} tokens, "
        f"{settings['dtype']}, {compiled}, {max(settings['threads'])} thread(s), but for what an axis says. Tokens/s: "
        "median (lowest to highest). MFU: share of the best matrix product that was measured in the same process.",
        "",
    ]
    for axis in dict.fromkeys(one["axis"] for one in results):
        some = [one for one in results if one["axis"] == axis and "absent" not in one]
        head = [axis, "rows x length", "tokens/s", "MFU", "of the data sheet", "memory, MB"]
        rows = [
            [
                _name(one), f"{one['rows']} x {one['length']}", measuring.told(one["tokens_per_second"], ",.0f"),
                f"{one['mfu']:.1%}", f"{one['mfu_of_data_sheet']:.1%}" if one["mfu_of_data_sheet"] else "",
                f"{one['peak_megabytes']:,.0f}",
            ]
            for one in some
        ]  # fmt: skip
        lines += [f"### {axis.capitalize()}", "", measuring.table(head, rows), ""]
        absent = [one for one in results if one["axis"] == axis and "absent" in one]
        lines += [f"- {_name(one)}: not measured: {one['absent']}" for one in absent]
        lines += [""] if absent else []
    wrong = differing(results, SAME_LOSS[settings["dtype"]])
    if len([one for one in results if one["axis"] in ("threads", "ranks")]) > 1:
        lines += [
            " ".join(wrong)
            or "The first losses with any number of threads and ranks are the same, up to rounding.",
            "",
        ]
    return "\n".join([*lines, f"Command: `{record['command']}`", ""])


def _answer(results: list[dict[str, Any]]) -> str:
    done = [one for one in results if "absent" not in one]
    if not done:
        return "Nothing could be measured."
    said = []
    for axis in dict.fromkeys(one["axis"] for one in done):
        some = [one for one in done if one["axis"] == axis]
        low, high = (pick(some, key=lambda one: one["mfu"]) for pick in (min, max))
        if len(some) > 1:
            said.append(f"{axis} from {low['mfu']:.0%} at {_name(low)} to {high['mfu']:.0%} at {_name(high)}")
    best = max(done, key=lambda one: one["mfu"])
    whole = (
        f"At best training reaches {best['mfu']:.0%} of the measured product ({best['axis']} {_name(best)})"
    )
    return f"{whole}; by axis: {'; '.join(said)}." if said else f"{whole}."


def _name(one: dict[str, Any]) -> str:
    return f"{one['value']}" + (f" ({one['wrapper']})" if one["wrapper"] else "")


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
