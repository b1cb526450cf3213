"""What a training step of each model costs, as multiples of `original`: time, memory, tokens per second, MFU.

    python benchmarks/variants.py                                        all models at 26m; CUDA: 128 x 512 in bf16
                                                                         autocast; CPU: 4 x 256, float32, one thread
    python benchmarks/variants.py --models knowledge,moe --repeats 9 --json variants.json
    python benchmarks/variants.py --models knowledge --profile knowledge
    python benchmarks/variants.py --size tiny --repeats 2                the same path in seconds

A step is the trainer's own (`optimizer_step`: forward, backward, clip, AdamW). A step of `original` goes before each
step of another model, and a ratio is that of two neighbours: what else a machine does meets both. Told are medians over
the repetitions, with the lowest and the highest. On a CPU there is a second ratio, of processor time of this process,
which other people's load moves less.

Memory is all that is there at most in a step: weights, moments, store, gradients, activations. On CUDA the allocator's
peak (less what the other models hold), on a CPU the profiler's record of one step more.

The models with a knowledge memory read a store of random entries on a full grid (1024 x 1024 at sizes from 6m on: half
a minute to make). It is made once, written to a folder as `minilm knowledge build` would, and given to each of them as
`model.store`. With `--store DIR` the folder stays and is used again. Rows hold two documents; every eighth token is
labelled with an entry, so that the retrieval losses are paid for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile, record_function

from minilm import models
from minilm.alignment import Batch, align
from minilm.knowledge.store import DECIDE, DESCRIPTION, FOLLOW, TENSORS, KnowledgeStore
from minilm.models.base import ModelConfig
from minilm.training import optim
from minilm.training.hardware import peak_flops
from minilm.training.layout import Asked, Layout
from minilm.training.objective import Objective
from minilm.training.profile import peak_growth
from minilm.training.step import optimizer_step

BASE = "original"
LABELLED_EVERY = 8  # tokens for one whose entry is known
# Class of a module, its method, the part of the step that its time belongs to (the innermost of these counts). Classes
# by name, with those that they come from: a model that has none of them is no error.
RANGES = (
    ("Objective", "forward", "output layer and loss"),
    ("Original", "forward", "embedding, residual sums, last norm"),
    ("Knowledge", "extended", "window codes, drawn entries"),
    ("RMSNorm", "forward", "norms"),
    ("Attention", "forward", "attention"),
    ("SwiGLU", "forward", "feed-forward"),
    ("Experts", "forward", "experts"),
    ("Values", "forward", "value table"),
    ("MemoryLayer", "forward", "memory: gates and output"),
    ("MemoryLayer", "_read", "memory: read"),
    ("Retriever", "forward", "memory: retrieval"),
    ("Retriever", "index_loss", "memory: index loss"),
)
OPTIMIZER, REST = "optimizer", "clipping and the rest"


@dataclass
class Subject:
    """A model that is ready to train, and what was measured of it."""

    config: ModelConfig
    layout: Layout
    batch: Batch
    peak_bytes: int = 0
    steps: list[dict[str, float]] = field(default_factory=list)  # seconds: step, its parts, cpu
    base: list[dict[str, float]] = field(default_factory=list)  # of the step of `original` before each

    def step(self) -> dict[str, float]:
        """Take one; seconds by part, `step` for all, `cpu` of the processor."""
        before = time.process_time()
        parts = optimizer_step(self.layout, [self.batch]).seconds
        return {**parts, "step": sum(parts.values()), "cpu": time.process_time() - before}


def prepared(name: str, args: argparse.Namespace, store: Path) -> Subject:
    """The model after two steps, when its optimizer has its moments, with the memory of a step."""
    cuda = args.device == "cuda"
    elsewhere = torch.cuda.memory_allocated() if cuda else 0
    config = preset(name, args)
    if config.table_bytes():
        config = models.preset(name, args.size, store=str(store), **lengths(args))
    layout = Layout(Asked(args.batch, None, args.dtype, args.device, 1.0, 1))
    torch.manual_seed(0)
    model = models.build(config).to(layout.device)
    layout.prepare(Objective(model).train(), optim.build(model, optim.OptimConfig()))
    subject = Subject(config, layout, rows(config, args).to(layout.device))
    subject.step()
    subject.step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        subject.step()
        subject.peak_bytes = torch.cuda.max_memory_allocated() - elsewhere
    else:
        held = [*model.parameters(), *(x for s in layout.optimizer.state.values() for x in s.values())]
        subject.peak_bytes = sum(x.nbytes for x in held) + config.table_bytes() + _growth(subject)
    return subject


def preset(name: str, args: argparse.Namespace) -> ModelConfig:
    """Of the size asked for; the rows fit into it."""
    return models.preset(name, args.size, **lengths(args))


def lengths(args: argparse.Namespace) -> dict[str, int]:
    return {"max_length": max(args.length, models.preset(BASE, args.size).max_length)}


def rows(config: ModelConfig, args: argparse.Namespace) -> Batch:
    """Random tokens, the same for all models of a vocabulary: two documents a row, some targets with an entry."""
    generator = torch.Generator().manual_seed(1)
    shape = args.batch, args.length + 1
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    segments = 1 + (torch.arange(shape[1]) >= shape[1] // 2).long().expand(shape)
    if not config.table_bytes():
        return align(tokens, segments)
    some = torch.arange(shape[1]) % LABELLED_EVERY == 0
    entries = torch.randint(config.store_side**2, shape, generator=generator)  # type: ignore[attr-defined]
    return align(tokens, segments, entries=torch.where(some, entries, -1))


def write_store(config: Any, folder: Path) -> None:
    """A full store of random entries, unless there is one."""
    if (folder / DESCRIPTION).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    store = KnowledgeStore.random(
        config.store_side, config.store_width, config.vocab_size, code_dim=config.store_code_dim
    )
    save_file({name: getattr(store, name) for name in (*DECIDE, *FOLLOW)}, folder / TENSORS)
    # Last: a folder with a description is a whole store.
    (folder / DESCRIPTION).write_text(json.dumps(store.description, indent=1) + "\n", encoding="utf-8")


def measure(subjects: dict[str, Subject], repeats: int) -> None:
    """A step of `original` before each step of another; alone, it is stepped by itself."""
    base = subjects[BASE]
    for repeat in range(repeats):
        for name, subject in subjects.items():
            if subject is base and len(subjects) > 1:
                continue
            before = base.step()
            base.steps.append(before)
            if subject is not base:
                subject.base.append(before)
                subject.steps.append(subject.step())
            say(
                f"{repeat + 1}/{repeats} {name}: {subject.steps[-1]['step']:.3f} s, original {before['step']:.3f} s"
            )


def summary(subject: Subject, base: Subject) -> dict[str, Any]:
    """Medians and ranges; ratios are of neighbours."""
    config, (count, length) = subject.config, subject.batch.shape
    seconds = statistics.median(step["step"] for step in subject.steps)
    speed = count * length / seconds
    peak = peak_flops(subject.layout.device, bf16=subject.layout.bf16)
    found: dict[str, Any] = {
        "parameters": config.num_parameters(),
        "seconds": {key: spread([step[key] for step in subject.steps]) for key in subject.steps[0]},
        "tokens_per_second": speed,
        "mfu": None if peak is None else speed * config.training_flops_per_token(length) / peak,
        "peak_bytes": subject.peak_bytes,
        "flops_ratio": config.flops_per_token(length) / base.config.flops_per_token(length),
        "peak_ratio": subject.peak_bytes / base.peak_bytes,
    }
    pairs = list(zip(subject.steps, subject.base, strict=False))
    if pairs:
        found["ratio"] = spread([ours["step"] / theirs["step"] for ours, theirs in pairs])
        if subject.layout.device.type == "cpu":
            found["cpu_ratio"] = spread([ours["cpu"] / theirs["cpu"] for ours, theirs in pairs])
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The lines of the report."""

    def times(found: dict[str, float] | None, form: str = ".2f") -> str:
        return "" if not found else " .. ".join(f"{found[k]:{form}}" for k in ("low", "median", "high"))

    head = ("model", "step, x original", "CPU time, x", "FLOPs, x", "peak, x", "peak, MiB", "step, s",
            "forward", "backward", "optimizer", "tokens/s", "MFU")  # fmt: skip
    yield "Low .. median .. high; parts of the step are medians in seconds."
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " ---: |" * (len(head) - 1)
    for name, found in results.items():
        seconds = found["seconds"]
        cells = [
            name,
            times(found.get("ratio")),
            times(found.get("cpu_ratio")),
            f"{found['flops_ratio']:.2f}",
        ]
        cells += [
            f"{found['peak_ratio']:.2f}",
            f"{found['peak_bytes'] / 2**20:,.0f}",
            times(seconds["step"], ".3f"),
        ]
        cells += [f"{seconds[part]['median']:.3f}" for part in ("forward", "backward", "optimizer")]
        cells += [f"{found['tokens_per_second']:,.0f}", "" if found["mfu"] is None else f"{found['mfu']:.3f}"]
        yield "| " + " | ".join(cells) + " |"


# ---------------------------------------------------------------- inside of a step


@contextmanager
def labelled(subject: Subject) -> Iterator[None]:
    """Within, every method of `RANGES` marks its time in a profile."""
    patched = []
    objective = subject.layout.objective
    for module in getattr(objective, "module", objective).modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        for kind, method, label in RANGES:
            if kind in names and (original := getattr(module, method, None)) is not None:
                patched.append((module, method, module.__dict__.get(method)))
                setattr(module, method, _marked(original, label))
    try:
        yield
    finally:
        for module, method, own in reversed(patched):
            # Accelerate, too, sets a `forward` on the object itself: that one comes back.
            delattr(module, method) if own is None else setattr(module, method, own)


def _marked(method: Callable[..., Any], label: str) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"part: {label}"):
            return method(*args, **kwargs)

    return marked


def shares(subject: Subject) -> dict[str, dict[str, float]]:
    """Part -> its milliseconds and share of one step, forward and backward, by a profile of the step.

    The backward of an operation belongs to the part that called it: autograd numbers both alike. On CUDA times are
    those of kernels, on a CPU those of operations, with what Python does between them in a forward.
    """
    cuda = subject.layout.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with labelled(subject), profile(activities=activities) as profiler:
        subject.step()
    # Some operations share a number: the last one that began with it is the one whose backward has it.
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    forward = [event for event in events if not (_backward(event) or _backward(event.cpu_parent))]
    made = {event.sequence_nr: event for event in forward if event.sequence_nr >= 0}
    found: dict[str, dict[str, float]] = {}
    for event in events:
        if event.device_type.name != "CPU":
            continue
        took = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
        part, behind = _part_of(event, made)
        entry = found.setdefault(part, {"forward": 0.0, "backward": 0.0})
        entry["backward" if behind else "forward"] += took
    whole = sum(sum(entry.values()) for entry in found.values())
    for entry in found.values():
        entry["share"] = (entry["forward"] + entry["backward"]) / whole
    return dict(sorted(found.items(), key=lambda item: -item[1]["share"]))


def _backward(event: Any) -> bool:
    return event is not None and event.name.startswith("autograd::engine")


def _part_of(event: Any, made: dict[int, Any]) -> tuple[str, bool]:
    """The part of the step that an event belongs to; is it of the backward pass?"""
    at, behind = event, False
    while at is not None:
        if at.name.startswith("part: "):
            return at.name.removeprefix("part: "), behind
        if at.name.startswith("Optimizer.step"):
            return OPTIMIZER, behind
        if _backward(at) and not behind:
            behind, at = True, made.get(at.sequence_nr)
            continue
        at = at.cpu_parent
    return REST, behind


def _growth(subject: Subject) -> int:
    """Bytes that a step on a CPU needs at most beyond what lies there before it."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json.gz"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            subject.step()
        profiler.export_chrome_trace(str(trace))
        return peak_growth(trace, cuda=False)


# ---------------------------------------------------------------- the command


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="26m", help="of all models (default: 26m)")
    parser.add_argument(
        "--models", default=",".join(models.names()), help="separated by commas (default: all)"
    )
    parser.add_argument("--batch", type=int, help="rows of a step (default: 128 on CUDA, 4 on a CPU)")
    parser.add_argument("--length", type=int, help="tokens of a row (default: 512 on CUDA, 256 on a CPU)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="default: bf16 (autocast) on CUDA, fp32 on a CPU"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: 1)")
    parser.add_argument(
        "--store", type=Path, help="folder for the random store, kept (default: a temporary one)"
    )
    parser.add_argument("--profile", metavar="MODEL", help="where the time of a step of this model goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if cuda else "cpu")
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: no CUDA device is visible")
    args.batch = args.batch or (128 if args.device == "cuda" else 4)
    args.length = args.length or (512 if args.device == "cuda" else 256)
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    named = [*args.models.split(","), *([args.profile] if args.profile else [])]
    if unknown := sorted(set(named) - set(models.names())):
        parser.error(f"no model is called {', '.join(unknown)}; there are {', '.join(models.names())}")
    if args.size not in models.sizes(BASE):
        parser.error(f"--size {args.size}: there are {', '.join(models.sizes(BASE))}")
    if min(args.batch, args.length, args.repeats, args.threads) < 1 or args.length < 2:
        parser.error("--batch, --repeats and --threads must be at least 1, --length at least 2")
    args.names = list(dict.fromkeys((BASE, *named)))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        store = args.store or Path(temporary) / "store"
        stored = [config for name in args.names if (config := preset(name, args)).table_bytes()]
        if stored:
            say(f"store of random entries in {store}")
            write_store(stored[0], store)
        subjects = {}
        for name in args.names:
            say(f"preparing {name}")
            subjects[name] = prepared(name, args, store)
        measure(subjects, args.repeats)
        inside = shares(subjects[args.profile]) if args.profile else None
    results = {name: summary(subject, subjects[BASE]) for name, subject in subjects.items()}
    about = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"CPU, {args.threads} of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "python benchmarks/variants.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "settings": {key: getattr(args, key) for key in ("size", "batch", "length", "dtype", "repeats")},
    }
    print(f"{about['date']}, {about['device']}, torch {about['torch']}: {about['settings']}")
    print("\n".join(table(results)))
    if inside is not None:
        print(f"\nA step of {args.profile}, profiled:")
        for part, times in inside.items():
            print(
                f"{times['share']:6.1%}  {times['forward']:9.1f} ms + {times['backward']:9.1f} ms backward  {part}"
            )
    if args.json:
        args.json.write_text(json.dumps({**about, "models": results, "profile": inside}, indent=1) + "\n")
    return 0


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
