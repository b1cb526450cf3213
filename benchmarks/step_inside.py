"""What one training step does, operation by operation: who waits for the device, and where its time goes.

    python benchmarks/step_inside.py --out OUT                      26m, on CUDA 128 x 512 in bfloat16, on a CPU 8 x 512
    python benchmarks/step_inside.py --out OUT --head-size 64 --compile
    python benchmarks/step_inside.py --out OUT --quick              the same path in small

waiting  Operations of a step for which the host waits until the device has caught up. On CUDA torch itself tells them
         (`torch.cuda.set_sync_debug_mode`); everywhere the operations that bring a number of a tensor to the host are
         counted with the line of minilm that asked. Looking at what is on the CPU anyway waits for nobody on CUDA.
kernels  What took the time of the device (on a CPU: which operations), in kinds, and the time in which it had nothing
         to do. OUT/trace-NAME.json.gz opens in ui.perfetto.dev.

OUT/step_inside-NAME.json has everything.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import measuring
import torch
from scaling_worker import PRECISIONS, Point
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from minilm import models
from minilm.training import host_memory
from minilm.training.layout import Asked, Layout

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, STEPS, TOP = 4, 3, 25
# On CUDA their result is a number or a size on the host.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")
# Name of a kernel or operation -> its kind; the first that fits.
KINDS = (
    ("compiled", r"triton|cpp_fused|inductor"),
    ("attention", r"flash|fmha|sdpa|attention|attend|blockwise|mem_eff|cudnn.*(mha|sdpa)"),
    ("matrix product", r"gemm|gemv|cutlass|nvjet|cublas|wgmma|xmma|s16816|::mm|::addmm|::bmm|linear|mkldnn"),
    ("optimizer", r"multi_tensor|adam|foreach|muon"),
    ("copy and fill", r"memcpy|memset|copy_|fill|zero_|cat|_to_copy|contiguous|clone"),
    ("softmax and loss", r"softmax|logsumexp|nll|gather|scatter"),
    ("reduction", r"reduce|sum|norm|mean|max"),
    ("element by element", r"elementwise|mul|add|silu|exp|sub|div|where|fill"),
)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu" and not args.quick:
        host_memory.keep_freed_memory()
    name = "-".join([f"head{args.head_size}", *(["compiled"] if args.compile else [])])
    with torch.random.fork_rng(devices=[]):
        results = looked_at(point_of(args), args.out / f"trace-{name}.json.gz")
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    file = args.out / f"step_inside-{name}.json"
    measuring.write("step_inside", settings, results, file, argv=argv)
    print(section(json.loads(file.read_text(encoding="utf-8"))))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arg, cuda = parser.add_argument, torch.cuda.is_available()
    arg("--out", type=Path, required=True, metavar="FOLDER")
    arg("--size", choices=models.sizes("original"), help="of model original (default: 26m)")
    arg("--head-size", type=int, help="default: that of the size")
    arg("--rows", type=int, help="default: 8, on CUDA 128")
    arg("--length", type=int, help="default: 512")
    arg("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    arg("--dtype", choices=tuple(PRECISIONS), help="default: float32, on CUDA bfloat16")
    arg("--threads", type=int, help="of torch on a CPU (default: as torch finds it)")
    arg("--compile", action="store_true", help="torch.compile, as train.compile")
    arg("--quick", action="store_true", help="tiny")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: no CUDA device is visible")
    on_cuda = args.device == "cuda"
    usual = ("tiny", 2, 32) if args.quick else ("26m", 128 if on_cuda else 8, 512)
    for key, value in zip(("size", "rows", "length"), usual, strict=True):
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.dtype = args.dtype or ("bfloat16" if on_cuda else "float32")
    known = models.preset("original", args.size)
    args.head_size = args.head_size or known.head_dim
    if args.head_size < 2 or args.head_size % 2 or known.dim % args.head_size:
        parser.error(f"--head-size {args.head_size}: must be even and divide the width {known.dim}")
    if args.rows < 1 or args.length < 2 or (args.threads or 1) < 1:
        parser.error("--rows and --threads must be at least 1, --length at least 2")
    return args


def point_of(args: argparse.Namespace) -> Point:
    """The model with its rows, after the steps that make its moments and kernels."""
    layout = Layout(Asked(args.rows, None, PRECISIONS[args.dtype], args.device, 1.0, 1))  # type: ignore[arg-type]
    wanted = {"size": args.size, "rows": args.rows, "length": args.length, "head_size": args.head_size}
    wanted["threads"] = torch.get_num_threads()
    point = Point(wanted, {"compile": args.compile, "steps": STEPS}, layout)
    for _ in range(-(-WARM_UP // STEPS)):
        point.turn()
    return point


def looked_at(point: Point, trace: Path) -> dict[str, Any]:
    """Everything about the step of a point; its trace is written to `trace`."""
    device = point.layout.device
    return {
        "losses": point.losses,
        "waiting": waiting(point),
        **kernels(point, trace),
        "flops_per_step": point.tokens * point.config.training_flops_per_token(point.wanted["length"]),
        "product_flops": measuring.ceiling(getattr(torch, _dtype(point)), device, seconds=0.1),
    }


def _dtype(point: Point) -> str:
    return "bfloat16" if point.layout.bf16 else "float32"


# ---------------------------------------------------------------- who waits


class _Asked(TorchDispatchMode):
    """Counts operations that bring something of a tensor to the host, by name and the line of minilm that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            device = next((x.device.type for x in args if torch.is_tensor(x)), "cpu")
            self.found[name, device, _asked_by()] += 1
        return func(*args, **(kwargs or {}))


def _asked_by() -> str:
    """file:line of the innermost frame that is minilm's."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "minilm"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "not in minilm"


def waiting(point: Point) -> dict[str, Any]:
    """Of `STEPS` steps: what torch saw waiting on CUDA (None on a CPU), and who asked for numbers on which device."""
    seen = None
    if point.layout.device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                point.turn()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        told = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        counted = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told)
        seen = [{"where": where, "count": count} for where, count in counted.most_common()]
    with _Asked() as asked:
        point.turn()
    rows = [
        {"operation": name, "device": device, "where": where, "count": count}
        for (name, device, where), count in asked.found.most_common()
    ]
    return {"steps": STEPS, "seen_by_torch": seen, "asked": rows}


# ---------------------------------------------------------------- where the time goes


def kernels(point: Point, trace: Path) -> dict[str, Any]:
    """Seconds of a step, and what they were spent on: names with their share, kinds, and nothing to do."""
    cuda = point.layout.device.type == "cuda"
    seconds = _seconds(point, cuda)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        point.turn()
    profiler.export_chrome_trace(str(trace))
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        on_device = event.device_type.name == "CUDA"
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        if took > 0 and on_device == cuda:
            spent[event.key] += took / 1e6 / STEPS
            calls[event.key] += event.count / STEPS
    kinds: Counter[str] = Counter()
    for name, took in spent.items():
        kinds[kind_of(name)] += took
    busy = sum(spent.values())
    return {
        "seconds": seconds,
        "busy_seconds": busy,
        "idle_seconds": max(0.0, seconds["median"] - busy) if cuda else None,
        "kinds": dict(kinds.most_common()),
        "top": [
            {"name": name, "seconds": took, "calls": calls[name], "kind": kind_of(name)}
            for name, took in spent.most_common(TOP)
        ],
        "calls": sum(calls.values()),
    }


def kind_of(name: str) -> str:
    """The kind of a kernel or operation, by its name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def _seconds(point: Point, cuda: bool) -> dict[str, float]:
    """Of a step, without the profiler."""
    found = []
    for _ in range(5 if cuda else 2):
        begun = time.perf_counter()
        point.turn()
        if cuda:
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begun) / STEPS)
    return measuring.spread(found)


# ---------------------------------------------------------------- the page


def section(record: dict[str, Any]) -> str:
    """The Markdown of these results."""
    settings, found = record["settings"], record["results"]
    how = "compiled" if settings["compile"] else "eager"
    lines = [f"### Head size {settings['head_size']}, {how}: inside of a step", ""]
    floor = found["flops_per_step"] / found["product_flops"]
    share = floor / found["seconds"]["median"]
    idle = found["idle_seconds"]
    lines += [
        f"A step takes {measuring.told(found['seconds'], ',.2f', 1e3)} ms; its arithmetic alone, at "
        f"{found['product_flops'] / 1e12:,.2f} TFLOP/s, the best product of this process, {1e3 * floor:,.2f} ms "
        f"({share:.0%}). {found['calls']:,.0f} kernels or operations."
        + (f" The device had nothing to do for {1e3 * idle:,.2f} ms of it." if idle is not None else ""),
        "",
    ]
    rows = [
        [kind, f"{1e3 * s:,.2f}", f"{s / found['busy_seconds']:.1%}"] for kind, s in found["kinds"].items()
    ]
    lines += [measuring.table(["kind", "ms", "share"], rows), ""]
    rows = [
        [f"`{one['name'][:90]}`", one["kind"], f"{1e3 * one['seconds']:,.3f}", f"{one['calls']:,.0f}"]
        for one in found["top"]
    ]
    lines += [measuring.table(["kernel", "kind", "ms", "calls"], rows, left=2), ""]
    return "\n".join([*lines, *_told(found["waiting"]), ""])


def _told(found: dict[str, Any]) -> list[str]:
    seen, steps = found["seen_by_torch"], found["steps"]
    if seen is None:
        lines = [
            f"Nobody waits for a CPU. Numbers that {steps} steps brought to the host, which on CUDA may wait:"
        ]
    else:
        whole = sum(one["count"] for one in seen)
        where = ", ".join(f"{one['where']} ({one['count']})" for one in seen)
        lines = [
            f"torch saw {whole} synchronising calls in {steps} steps{': ' if where else ''}{where}. Numbers brought to "
            "the host:"
        ]
    lines += [""]
    lines += [
        f"- {one['count']} x {one['operation']} of a tensor on {one['device']}, {one['where']}"
        for one in found["asked"]
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
