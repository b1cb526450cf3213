"""Where the time and the memory of chosen steps go: a trace for a viewer, and one page of numbers.

    RUN/profile/10-13/trace.json.gz    open in ui.perfetto.dev or chrome://tracing
    RUN/profile/10-13/profile.md

The profiler looks and does nothing else: the losses are those of a run without it. It slows steps down, though,
so the page speaks of shares; the times to quote are in metrics.jsonl, of steps that were not profiled. The first
rank is profiled.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from minilm.errors import ConfigError
from minilm.training.watch import StepView

PARTS = ("data", "forward", "backward", "optimizer")
_TOP = 12  # rows of a table: the page stays one page
_STEP = "minilm step"


@dataclass(frozen=True)
class Steps:
    """Steps `first` to `last`, both included, numbered as in the log (from 1)."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Steps:
        """`10:13` or `10`. Raises ConfigError."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
        steps = cls(int(match[1]), int(match[2] or match[1])) if match else cls(0, 0)
        if not 1 <= steps.first <= steps.last:
            raise ConfigError(
                f"--profile {text}: give the first and the last step to profile, numbered from 1, for instance "
                "--profile 10:13 (four steps) or --profile 10."
            )
        return steps

    def check(self, *, done: int, num_steps: int) -> None:
        """Raises ConfigError where a run that stands after step `done` will not come past all of these steps."""
        if self.first <= done or self.last > num_steps:
            raise ConfigError(
                f"--profile {self.first}:{self.last} lies outside of what will be run: steps {done + 1} to "
                f"{num_steps}."
            )

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last


class StepProfiler:
    """Profiles `steps` into `folder`/FIRST-LAST. A watcher, for the step's own times, and a context around each step.

    `with` ends it whatever happens; a run that stops in between leaves what was seen until then.
    """

    def __init__(
        self, steps: Steps, folder: Path, device: torch.device, *, message: Callable[[str], None], about: str
    ) -> None:
        self.steps, self.device, self.message, self.about = steps, device, message, about
        self.folder = folder / f"{steps.first}-{steps.last}"
        self._running: torch.profiler.profile | None = None
        self._seen: dict[int, Mapping[str, Any]] = {}

    def wants(self, step: int) -> bool:
        return step in self.steps

    def before_update(self, view: StepView) -> None:
        """Nothing to see there."""

    def after_step(self, view: StepView, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Remembers the step's times; adds no column."""
        self._seen[view.step] = dict(values)
        return {}

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around everything that a step does, the fetching of its data included."""
        if step not in self.steps:
            yield
            return
        if self._running is None:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = torch.profiler.profile(
                activities=activities, record_shapes=True, profile_memory=True, acc_events=True
            )
            self._running.start()
        with record_function(f"{_STEP} {step}"):
            yield
        if step == self.steps.last:
            self._finish()

    def _finish(self) -> None:
        if self._running is None:
            return
        profiler, self._running = self._running, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels of the last step may still be under way
        profiler.stop()
        if not self._seen:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        page = "\n".join(self._page(profiler, trace)) + "\n"
        (self.folder / "profile.md").write_text(page, encoding="utf-8")
        self.message(f"profile of {len(self._seen)} step(s) in {self.folder}")

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def _page(self, profiler: torch.profiler.profile, trace: Path) -> Iterator[str]:
        yield f"# Steps {min(self._seen)} to {max(self._seen)}\n"
        yield f"{self.about}, torch {torch.__version__}. The profiler slows steps down: read the shares.\n"
        yield from _table(
            ["step", "seconds", *(f"{part} %" for part in PARTS), "rest %"], _shares(self._seen), "r" * 7
        )
        operators = in_steps(profiler.events(), set(self._seen))
        cuda = self.device.type == "cuda"
        for on_device in (True, False) if cuda else (False,):
            where = "Kernels on the device" if on_device else "Operators on the CPU"
            yield f"\n## {where}, by self time\n"
            yield from _table(
                ["operator", "calls", "ms", "%"], _by_time(operators, on_device, shapes=False), "lrrr"
            )
            yield f"\n## {where}, by self time and shapes of their inputs\n"
            yield from _table(
                ["operator", "shapes", "calls", "ms", "%"],
                _by_time(operators, on_device, shapes=True),
                "llrrr",
            )
        yield "\n## Memory\n"
        growth = peak_growth(trace, cuda) / 1e6
        yield f"- tensors on {self.device.type}: at the peak {growth:,.1f} MB more than when the first step began"
        yield f"- process: {psutil.Process().memory_info().rss / 1e6:,.1f} MB resident after the last one"
        if cuda:
            allocated = torch.cuda.max_memory_allocated(self.device) / 1e6
            reserved = torch.cuda.max_memory_reserved(self.device) / 1e6
            yield f"- device: {allocated:,.1f} MB allocated and {reserved:,.1f} MB reserved at the peak of the run"
        yield "\nWhat operators allocated, freed or not:\n"
        yield from _table(["operator", "calls", "MB"], _by_memory(operators, cuda), "lrr")


def _shares(seen: Mapping[int, Mapping[str, Any]]) -> Iterator[list[str]]:
    rows = {
        str(step): [values["seconds/step"], *(values.get(f"seconds/{part}", 0.0) for part in PARTS)]
        for step, values in seen.items()
    }
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, (whole, *parts) in rows.items():
        shares = [100 * part / whole for part in [*parts, whole - sum(parts)]]
        yield [name, f"{whole:.4f}", *(f"{share:.1f}" for share in shares)]


def in_steps(events: Iterable[Any], steps: set[int]) -> list[Any]:
    """The operators that ran inside of the given steps: validation or a save between two steps is not theirs."""
    events = list(events)
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    names = {f"{_STEP} {step}" for step in steps}
    ranges = [(e.time_range.start, e.time_range.end) for e in on_cpu if e.name in names]
    return [
        event
        for event in on_cpu
        if event.name != "[memory]"
        and any(start <= event.time_range.start and event.time_range.end <= end for start, end in ranges)
    ]


def _key(event: Any, shapes: bool) -> tuple[str, ...]:
    name = "(Python, and waiting)" if event.name.startswith(_STEP) else event.name
    if not shapes:
        return (name,)
    sizes = [s for s in (event.input_shapes or []) if s]
    return name, " ".join("x".join(map(str, size)) for size in sizes if all(isinstance(n, int) for n in size))


def _by_time(operators: list[Any], on_device: bool, *, shapes: bool) -> Iterator[list[str]]:
    totals: dict[tuple[str, ...], list[float]] = {}
    for event in operators:
        entry = totals.setdefault(_key(event, shapes), [0, 0.0])
        entry[0] += 1
        entry[1] += event.self_device_time_total if on_device else event.self_cpu_time_total
    whole = sum(micros for _, micros in totals.values()) or 1.0
    for key, (calls, micros) in sorted(totals.items(), key=lambda item: -item[1][1])[:_TOP]:
        if micros > 0:
            names = [f"`{part}`" if part else "" for part in key]
            yield [*names, f"{calls:,}", f"{micros / 1e3:,.2f}", f"{100 * micros / whole:.1f}"]


def _by_memory(operators: list[Any], cuda: bool) -> Iterator[list[str]]:
    totals: dict[str, list[float]] = {}
    for event in operators:
        taken = event.self_device_memory_usage if cuda else event.self_cpu_memory_usage
        if taken > 0:
            entry = totals.setdefault(event.name, [0, 0.0])
            entry[0] += 1
            entry[1] += taken
    for name, (calls, taken) in sorted(totals.items(), key=lambda item: -item[1][1])[:_TOP]:
        yield [f"`{name}`", f"{calls:,}", f"{taken / 1e6:,.1f}"]


def peak_growth(trace: Path, cuda: bool) -> int:
    """Most bytes in tensors at once, over those at the start: a running sum over the trace's record of allocations."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    records = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and (event["args"]["Device Type"] == 1) == cuda
    ]
    held = peak = 0
    for _, size in sorted(records, key=lambda record: record[0]):
        held += size
        peak = max(peak, held)
    return peak


def _table(head: list[str], rows: Iterable[list[str]], align: str) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join(" ---: " if side == "r" else " --- " for side in align) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
