"""How fast is each part of a step, beside plain torch and beside its floor?

    python benchmarks/parts.py                          26m at 8 x 512, float32 (CUDA: 128 x 512, bfloat16): 5 minutes
    python benchmarks/parts.py --only attention --head-sizes 16 64
    python benchmarks/parts.py --quick --json quick.json                            the same path in seconds

    attention       by backend and head size, for one document a row and for packed documents of mean 100
    head            the loss some positions at a time against the whole logits: time and memory
    product         the shapes of the model's matrix products
    block           norm, rotary embedding and feed-forward: minilm's, the plain formula, the plain formula compiled
    optimizer       AdamW, Muon, and all that comes after the backward pass

Every way is first held against a formula that shares no code with it, value and gradient; exit code 1 if one of
minilm's differs, or cannot run at all. Then the ways of a case take turns. The floor of a case is the larger of two
times on paper: its arithmetic at the speed of the best matrix product of this run, and the bytes that must move at the
speed of a large copy in this run. A processor's cache can beat the second where a part fits into it.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import torch
from parts_attention import attention_cases
from parts_cases import (
    BOTH,
    FORWARD,
    STEP,
    Case,
    Shape,
    block_cases,
    head_cases,
    product_cases,
)
from parts_optimizers import optimizer_cases
from peak import peak_bytes

from minilm import models
from minilm.training import host_memory

PARTS: dict[str, Callable[[Shape], Iterator[Case]]] = {
    "attention": attention_cases,
    "head": head_cases,
    "product": product_cases,
    "block": block_cases,
    "optimizer": optimizer_cases,
}
_AT_LEAST = {"cpu": 0.02, "cuda": 0.01}  # seconds of one measurement: shorter calls are repeated in it


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu" and not args.quick:
        host_memory.keep_freed_memory()  # as in a run, and for all ways
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = models.preset("original", args.size)
    # Random numbers are drawn, and a model's weights: whoever calls this keeps his generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = Shape(args.rows, args.length, config, tuple(args.head_sizes), device, dtype, args.compile)
        cases = [done for part in args.only for done in _measured(part, shape, args.repeats)]
    enough = {"seconds": 0.0} if args.quick else {}
    limits = {
        "product_flops": max([measuring.ceiling(dtype, device, **enough), *_best_products(cases)]),
        "copy_bytes_per_second": measuring.bandwidth(device, **enough),
    }
    results = {"limits": limits, "cases": [_with_floor(case, limits) for case in cases]}
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    file = measuring.write("parts", settings, results, args.json, argv=argv)
    print(section(json.loads(file.read_text(encoding="utf-8"))))
    print(f"written to {file}", file=sys.stderr)
    wrong = [f"{c['case']}: {why}" for c in results["cases"] if (why := _problem(c))]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arg, cuda = parser.add_argument, torch.cuda.is_available()
    arg("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    arg("--size", choices=models.sizes("original"), help="of model original (default: 26m)")
    arg("--rows", type=int, help="default: 8, on CUDA 128")
    arg("--length", type=int, help="tokens of a row (default: 512)")
    arg("--head-sizes", type=int, nargs="+", help="default: 16 32 64 128")
    arg("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    arg("--dtype", choices=("float32", "bfloat16"), help="default: float32, on CUDA bfloat16")
    arg("--threads", type=int, help="of torch on a CPU (default: as torch finds it)")
    arg("--repeats", type=int, help="turns (default: 5)")
    arg("--no-compile", dest="compile", action="store_false", help="leave the compiled formulas out")
    arg("--quick", action="store_true", help="tiny shapes, two turns, nothing compiled")
    arg("--json", type=Path, metavar="FILE", help="default: benchmarks/results/parts.json")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: no CUDA device is visible")
    on_cuda = args.device == "cuda"
    usual = ("26m", 128 if on_cuda else 8, 512, [16, 32, 64, 128], 5)
    names = ("size", "rows", "length", "head_sizes", "repeats")
    for name, value in zip(names, ("tiny", 2, 48, [16, 32], 2) if args.quick else usual, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dtype = args.dtype or ("bfloat16" if on_cuda else "float32")
    args.compile = args.compile and not args.quick
    if min(args.rows, args.repeats, *args.head_sizes, args.threads or 1) < 1 or args.length < 2:
        parser.error("--rows, --repeats, --threads and --head-sizes must be at least 1, --length at least 2")
    if odd := [size for size in args.head_sizes if size % 2]:
        parser.error(f"--head-sizes {odd[0]}: a head size is even (rotary pairs)")
    return args


# ---------------------------------------------------------------- measuring


def _measured(part: str, shape: Shape, repeats: int) -> Iterator[dict[str, Any]]:
    """The cases of a part, one after another: of each nothing is left when the next one is built."""
    for case in PARTS[part](shape):
        print(f"{datetime.datetime.now():%H:%M:%S} {case.part}: {case.name}", file=sys.stderr, flush=True)
        passes = {}
        for name, calls in case.calls.items():
            peaks = {way: _megabytes(name, call, shape.device) for way, call in calls.items()}
            often = {way: _times(call, shape.device) for way, call in calls.items()}
            repeated = {way: _repeated(call, often[way]) for way, call in calls.items()}
            found = measuring.interleaved(repeated, repeats)
            passes[name] = {
                way: {
                    "seconds": measuring.spread([each / often[way] for each in seconds]),
                    "peak_megabytes": peaks[way],
                }
                for way, seconds in found.items()
            }
        yield {
            "part": case.part, "case": case.name, "ours": case.ours, "plain": case.plain,
            "work": {name: {"flops": flops, "bytes": moved} for name, (flops, moved) in case.work.items()},
            "passes": passes, "errors": case.errors, "tolerance": case.tolerance,
            "disagreeing": case.disagreeing(), "absent": case.absent,
        }  # fmt: skip
        del case, calls, repeated
        gc.collect()


def _megabytes(name: str, call: Callable[[], object], device: torch.device) -> float | None:
    """Of a pass that trains: what a forward pass alone needs is gone at once."""
    return None if name == FORWARD else peak_bytes(call, device) / 2**20


def _times(call: Callable[[], object], device: torch.device) -> int:
    """How often a call is repeated in one measurement."""
    _wait(device)
    begun = time.perf_counter()
    call()
    _wait(device)
    return min(100, math.ceil(_AT_LEAST[device.type] / max(time.perf_counter() - begun, 1e-9)))


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _best_products(cases: list[dict[str, Any]]) -> Iterator[float]:
    """FLOP/s of the products that were measured: a ceiling below one of them would be none."""
    for case in cases:
        if case["part"] == "matrix product":
            for name, ways in case["passes"].items():
                for found in ways.values():
                    yield case["work"][name]["flops"] / found["seconds"]["lowest"]


def _with_floor(case: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    floors = {}
    for name, work in case["work"].items():
        arithmetic = work["flops"] / limits["product_flops"]
        memory = work["bytes"] / limits["copy_bytes_per_second"]
        floors[name] = {
            "arithmetic_seconds": arithmetic,
            "memory_seconds": memory,
            "seconds": max(arithmetic, memory),
            "by": "arithmetic" if arithmetic >= memory else "memory",
        }
    return {**case, "floors": floors}


def _problem(case: dict[str, Any]) -> str | None:
    """Why minilm's own result cannot be believed; None where it can."""
    if case["ours"] in case["absent"] or not all(case["ours"] in ways for ways in case["passes"].values()):
        return f"{case['ours']} did not run: {case['absent'].get(case['ours'], 'it is not among the ways')}"
    ours = [way for way in case["disagreeing"] if way.startswith("minilm")]
    if ours:
        found = {way: case["errors"][way] for way in ours}
        return f"not the formula's values or gradients (limit {case['tolerance']:g}): {found}"
    return None


# ---------------------------------------------------------------- the page


def section(record: dict[str, Any]) -> str:
    """The Markdown of docs/performance.md that these results are."""
    settings, cases = record["settings"], record["results"]["cases"]
    limits = record["results"]["limits"]
    lines = ["## Parts of a step", "", _answer(cases), ""]
    lines += [
        f"{settings['rows']} x {settings['length']} tokens, {settings['dtype']}, widths of `original` "
        f"{settings['size']}; times in milliseconds: median (lowest to highest) of {settings['repeats']} turns; the "
        "other ways by their medians. Memory is what a forward and backward pass needs at most beside its inputs. The "
        f"floor is arithmetic at {limits['product_flops'] / 1e9:,.0f} GFLOP/s, the best matrix product of this run, or "
        f"memory at {limits['copy_bytes_per_second'] / 1e9:,.1f} GB/s, a large copy in this run.",
        "",
    ]
    for part in dict.fromkeys(case["part"] for case in cases):
        some = [case for case in cases if case["part"] == part]
        head = ["case", "pass", "minilm takes", "ms", "MB", "floor, ms", "x floor", "other ways, ms (MB)"]
        lines += [f"### {part.capitalize()}", "", measuring.table(head, list(_rows(some)), left=3), ""]
        lines += [*_absent(some), ""]
    lines += [_agreement(cases), "", f"Command: `{record['command']}`", ""]
    return "\n".join(lines)


def _answer(cases: list[dict[str, Any]]) -> str:
    faster, behind = 0, list[str]()
    far = (0.0, "")
    for case in cases:
        name = BOTH if BOTH in case["passes"] else STEP
        ways, floor = case["passes"][name], case["floors"][name]["seconds"]
        if case["ours"] not in ways:
            continue
        seconds = ways[case["ours"]]["seconds"]["median"]
        far = max(far, (seconds / floor, f"{case['part']} ({case['case']})"))
        rivals = {way: ways[way]["seconds"]["median"] for way in ways if _same(case, way)}
        if not rivals:
            continue
        best = min(rivals, key=rivals.__getitem__)
        faster += seconds < rivals[best]
        if seconds >= rivals[best]:
            behind.append(f"{case['case']}: {best}, {rivals[best] / seconds:.2f} of the time")
    but = f" (not: {'; '.join(behind)})" if behind else ""
    return (
        f"In {faster} of {faster + len(behind)} cases what minilm takes is faster than every other way that computes "
        f"the same{but}; farthest from its floor is {far[1]}, at "
        f"{far[0]:.1f} times the floor."
    )


def _same(case: dict[str, Any], way: str) -> bool:
    """Is this a way of somebody else that computes the same?"""
    errors = case["errors"].get(way, {})
    return not way.startswith("minilm") and bool(errors) and max(errors.values()) <= case["tolerance"]


def _rows(cases: list[dict[str, Any]]) -> Iterator[list[str]]:
    for case in cases:
        for name, ways in case["passes"].items():
            floor, ours = case["floors"][name], ways.get(case["ours"])
            others = "; ".join(_other(way, found) for way, found in ways.items() if way != case["ours"])
            yield [
                case["case"], name, case["ours"],
                measuring.told(ours["seconds"], ",.2f", 1e3) if ours else "",
                _memory(ours) if ours else "",
                f"{1e3 * floor['seconds']:,.3g} ({floor['by']})",
                f"{ours['seconds']['median'] / floor['seconds']:,.1f}" if ours else "",
                others,
            ]  # fmt: skip


def _other(way: str, found: dict[str, Any]) -> str:
    memory = _memory(found)
    return f"{way} {1e3 * found['seconds']['median']:,.2f}" + (f" ({memory})" if memory else "")


def _memory(found: dict[str, Any]) -> str:
    return "" if found["peak_megabytes"] is None else f"{found['peak_megabytes']:,.0f}"


def _absent(cases: list[dict[str, Any]]) -> Iterator[str]:
    """What did not run, why, and in which cases."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for way, why in case["absent"].items():
            found.setdefault((way, why.rstrip(".")), []).append(case["case"])
    for (way, why), names in found.items():
        where = "all cases" if len(names) == len(cases) else ", ".join(names)
        yield f"- {way} ({where}): not run, {why}."


def _agreement(cases: list[dict[str, Any]]) -> str:
    wrong = [f"{way} in {case['case']}" for case in cases for way in case["disagreeing"]]
    if wrong:
        return f"Not the formula's values or gradients: {'; '.join(wrong)}."
    limits = " or ".join(f"{limit:g}" for limit in sorted({case["tolerance"] for case in cases}))
    return (
        "Values and gradients of all ways agree with a formula written in the benchmark, within "
        f"{limits} of its size by part; ways whose name says that they compute something else "
        "are told, not judged."
    )


if __name__ == "__main__":
    sys.exit(main())
