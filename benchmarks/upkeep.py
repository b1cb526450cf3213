"""What does a run pay for being checked, watched, logged and saved, as a share of its steps?

    python benchmarks/upkeep.py                                26m, 8 x 512 on a CPU: 4 to 6 minutes on 2 cores
    python benchmarks/upkeep.py --batch-size 128               the same on one GPU
    python benchmarks/upkeep.py --quick --json quick.json      the same path in seconds

Runs of train.py follow each other: bare (no preflight, no watch, no columns of the model), everything, bare, and so on,
at last everything with the SwanLab mirror writing offline. The functions in question are timed from inside, a part
within a part counted once. What comes once or seldom cannot be seen in so few steps; so a run of --horizon steps is put
together of what was measured: preflight once, the watch's work at every step and as many looks as its own rule allows,
the log's work at every step, two saves. The runs' medians, with and without, stand beside that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import measuring
import psutil

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.02  # of a run: preflight, watch and log together
SAVES = 2  # of 1,000 steps by default
# Part -> the functions that are its work.
PARTS = {
    "preflight": ("minilm.checked:before_first_step",),
    "watch": ("minilm.doctor.watch:Watch.wants", "minilm.doctor.watch:Watch.before_update",
              "minilm.doctor.watch:Watch.after_step"),
    "line of the step": ("minilm.training.columns:Columns.of_step", "minilm.training.columns:Columns.position"),
    "metrics.jsonl": ("minilm.track.metrics:MetricsFile.append",),
    "console": ("minilm.track.console:Console.update",),
    "columns of the model": ("minilm.training.usage:Usage.after_step", "minilm.models.original:pairwise"),
    "SwanLab": ("minilm.track.tracker:Tracker._poll",),
}  # fmt: skip
LOOKS = "looks of the watch"
LOG = ("line of the step", "metrics.jsonl", "console", "columns of the model")
FIRST = 2  # steps of a run that are not counted: its memory is new, and modules are imported
BARE = {"doctor.check": "off", "doctor.watch": "false", "train.usage_every": "none"}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--child"]:
        return _child(Path(argv[1]), argv[2:])
    args = _arguments(argv)
    with tempfile.TemporaryDirectory() as scratch:
        runs = _runs(args, Path(scratch))
    results = told(runs, steps=args.steps, horizon=args.horizon, share=args.watch_share)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "store")}
    path = measuring.write("upkeep", settings, results, args.json, argv=argv)
    print(section(json.loads(path.read_text(encoding="utf-8"))))
    print(f"wrote {path}", file=sys.stderr)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/upkeep.json")
    parser.add_argument("--store", type=Path, help="a store; none: one of a synthetic source is made")
    parser.add_argument("--size", default="26m")
    parser.add_argument("--steps", type=int, default=10, help="of each run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=1000, help="steps of the run that is put together")
    parser.add_argument("--watch-share", type=float, default=0.005, help="doctor.watch_share of that run")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.steps, args.repeats, args.batch_size, args.sequence_length = "tiny", 8, 1, 4, 32
    if args.steps < 8:
        parser.error("--steps: at least 8, the first at which the watch looks")
    return args


# ---------------------------------------------------------------- the runs


def _runs(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    store = args.store or _made_store(scratch, args)
    kinds = {
        "bare": {**BARE, "track.swanlab": "off"},
        # The first look comes after 0.75 / share steps: the eighth.
        "everything": {"doctor.watch_share": 0.1, "track.swanlab": "off"},
    }
    names = [*kinds] * args.repeats
    if not args.quick and importlib.util.find_spec("swanlab") is not None:
        kinds["mirrored"] = {"doctor.watch_share": 0.1, "track.swanlab": "offline"}
        names.append("mirrored")
    return [_run(args, scratch, store, f"{n}-{name}", kinds[name]) for n, name in enumerate(names)]


def _made_store(scratch: Path, args: argparse.Namespace) -> Path:
    vocab, length = (256, 64) if args.quick else (6400, args.sequence_length)
    documents = 4 * args.batch_size * args.steps
    source = f"synthetic:markov?vocab={vocab}&branching=4&documents={documents}&length={length}&seed=0"
    command = ["-m", "minilm", "data", "build", "--source", source, "--out", str(scratch / "store")]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return scratch / "store"


def _run(
    args: argparse.Namespace, scratch: Path, store: Path, name: str, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """One run in a process of its own, with what its functions took and what its books say."""
    settings = {
        "data.store": store, "data.sequence_length": args.sequence_length, "model.size": args.size,
        "train.steps": args.steps, "train.batch_size": args.batch_size, "train.validate_every": "none",
        "train.validation_rows": 1, "train.save_every": max(1, args.steps // SAVES), "optim.warmup_steps": 1,
        "sample.max_new_tokens": 1, "run.folder": scratch, "run.name": name, **changes,
    }  # fmt: skip
    out = scratch / f"{name}.json"
    flags = [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, __file__, "--child", str(out), *flags], check=True, cwd=ROOT)
    lines = [json.loads(line) for line in (scratch / name / "metrics.jsonl").read_text().splitlines()]
    at = {line["step"]: line["unix_seconds"] for line in lines if line["kind"] == "train"}
    return {
        "kind": name.partition("-")[2],
        **json.loads(out.read_text()),
        "looks": [line["step"] for line in lines if line["kind"] == "doctor"],
        # The last one is waited for to its end, as nothing is left to do meanwhile.
        "saves": [line for line in lines if "seconds_writing" in line and line["step"] < args.steps],
        "looks_at_model": sum("uniformity/cosine" in line for line in lines),
        # From line to line: all that a step costs, also after its own clock has stopped.
        "seconds": {step: at[step] - at[step - 1] for step in at if step - 1 >= FIRST},
    }


# ---------------------------------------------------------------- inside of a run


class Timers:
    """Seconds of each part, call by call; a part that runs inside of another one counts for itself alone."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = {part: [] for part in (*PARTS, LOOKS)}
        self._inside: list[float] = []  # of each part that is running: seconds of parts within it

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*given: Any, **named: Any) -> Any:
            self._inside.append(0.0)
            begun = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                took = time.perf_counter() - begun
                looking = part == "watch" and not given[0].can_wait(0)
                self.calls[LOOKS if looking else part].append(took - self._inside.pop())
                if self._inside:
                    self._inside[-1] += took

        return timed

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, every function of `PARTS` is timed. AttributeError for one that is no more."""
        former = []
        try:
            for part, names in PARTS.items():
                for name in names:
                    module, _, path = name.partition(":")
                    *owners, last = path.split(".")
                    owner = functools.reduce(getattr, owners, importlib.import_module(module))
                    former.append((owner, last, getattr(owner, last)))
                    setattr(owner, last, self.around(part, getattr(owner, last)))
            yield
        finally:
            for owner, last, call in reversed(former):
                setattr(owner, last, call)


def _child(out: Path, flags: Sequence[str]) -> int:
    """Train in this process, and write what the parts took."""
    from minilm.cli import train

    timers = Timers()
    with timers.in_place():
        code = train.main(list(flags))
    # The mirror is a process of its own: what it used stands in this one's account of its children.
    used = psutil.Process().cpu_times()
    mirror = used.children_user + used.children_system
    out.write_text(json.dumps({"calls": timers.calls, "children_cpu_seconds": mirror}))
    return code


# ---------------------------------------------------------------- what comes of it


def told(runs: Sequence[Mapping[str, Any]], *, steps: int, horizon: int, share: float) -> dict[str, Any]:
    """What was measured, and the seconds of a run of `horizon` steps put together of it."""
    bare, full = ([run for run in runs if run["kind"] == kind] for kind in ("bare", "everything"))
    mirrored = next((run for run in runs if run["kind"] == "mirrored"), None)
    step = {"bare": _steps(bare), "everything": _steps(full)}
    plain = statistics.median(step["bare"])
    each = {part: _per_step(full, part, steps) for part in ("watch", *LOG)}
    look = sum(sum(run["calls"][LOOKS]) for run in full) / max(1, sum(len(run["looks"]) for run in full))
    looks = num_looks(plain, each["watch"], look, share=share, steps=horizon)
    preflight = statistics.median(sum(run["calls"]["preflight"]) for run in full)
    seconds = {
        "preflight": preflight,
        "watch, at every step": horizon * each["watch"],
        f"watch, {looks} looks": looks * look,
        **{f"log: {part}": horizon * each[part] for part in LOG},
    }
    saves = [save for run in (*bare, *full) for save in run["saves"]]
    waited, writing = ([save[f"seconds_{what}"] for save in saves] for what in ("waited", "writing"))
    whole = horizon * plain + sum(seconds.values())
    return {
        "step_seconds": {kind: measuring.spread(values) for kind, values in step.items()},
        "everything_over_bare": statistics.median(step["everything"]) / plain,
        "per_step_seconds": each,
        "look_seconds": look,
        "preflight_seconds": preflight,
        "seconds": seconds,
        "shares": {part: value / whole for part, value in seconds.items()},
        "share": sum(seconds.values()) / whole,
        "save_seconds": {"waited": measuring.spread(waited), "writing": measuring.spread(writing)},
        "save_share": SAVES * statistics.median(waited) / whole,
        "mirror": None if mirrored is None else {
            "share": _per_step([mirrored], "SwanLab", steps) / plain,
            "cpu_seconds": mirrored["children_cpu_seconds"],
        },
    }  # fmt: skip


def num_looks(step: float, standing: float, look: float, *, share: float, steps: int) -> int:
    """How often the watch looks in so many steps of `step` seconds, by the rule of `minilm.doctor.watch`.

    standing  seconds of its work at every step
    look      seconds of a look
    """
    from minilm.doctor.watch import FIRST_LOOK_COST, LEAST_ROOM

    count, after = 0, math.ceil(FIRST_LOOK_COST / share)
    while after <= steps:
        count += 1
        elapsed, spent = after * (step + standing) + count * look, after * standing + count * look
        per_step = elapsed / after
        each = max(share * per_step - standing, LEAST_ROOM * share * per_step)
        after += max(1, math.ceil(max((spent + look - share * elapsed) / each, 1.0)))
    return count


def _steps(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of the steps in which nothing seldom happened: no look, and no checkpoint written meanwhile."""
    found = []
    for run in runs:
        seldom = {*run["looks"], *(save["step"] + n for save in run["saves"] for n in (0, 1))}
        found += [seconds for number, seconds in run["seconds"].items() if int(number) not in seldom]
    return found


def _per_step(runs: Sequence[Mapping[str, Any]], part: str, steps: int) -> float:
    """Seconds of a part at each step, in the median of the runs. What its first call loads is not counted."""
    from minilm.training.settings import TrainConfig

    found = []
    for run in runs:
        calls = run["calls"][part]
        if part == "columns of the model":  # every so many steps, and by several calls of unlike length
            every = TrainConfig(steps=1).usage_every or math.inf
            found.append(sum(calls) / max(1, run["looks_at_model"]) / every)
        else:
            found.append(statistics.median(calls) * len(calls) / steps if calls else 0.0)
    return statistics.median(found)


def section(record: Mapping[str, Any]) -> str:
    """Its part of docs/performance.md."""
    found, settings = record["results"], record["settings"]
    shares, seconds = found["shares"], found["seconds"]
    horizon = settings["horizon"]
    rows = [[part, f"{seconds[part]:,.2f}", f"{shares[part]:.3%}"] for part in seconds]
    rows.append(["**together**", f"{sum(seconds.values()):,.2f}", f"**{found['share']:.2%}**"])
    kept = "less than" if found["share"] < TARGET else "NOT less than"
    step, saves, mirror = found["step_seconds"], found["save_seconds"], found["mirror"]
    text = [
        "## Upkeep",
        f"Preflight, watch and log together take {found['share']:.2%} of a run of {horizon:,} steps of "
        f"{settings['batch_size']} x {settings['sequence_length']} tokens ({settings['size']}): {kept} the "
        f"{TARGET:.0%} that they may.",
        measuring.table([f"of {horizon:,} steps", "seconds", "share"], rows),
        "The run is put together of parts that were timed inside of short ones: what comes once is counted once, a "
        f"look of the watch ({found['look_seconds']:.2f} s) as often as its rule allows (`doctor.watch_share` "
        f"{settings['watch_share']:g}). A step takes {measuring.told(step['bare'], ',.3f')} s bare and "
        f"{measuring.told(step['everything'], ',.3f')} s with all of this between looks, the medians' ratio being "
        f"{found['everything_over_bare']:.3f}.",
        f"A checkpoint holds training up for {measuring.told(saves['waited'], ',.2f')} s and is written by a thread in "
        f"{measuring.told(saves['writing'], ',.2f')} s: with {SAVES} of them, {found['save_share']:.2%} of the run are "
        "waited for.",
    ]
    if mirror is not None:
        text.append(
            f"The SwanLab mirror (offline) takes {mirror['share']:.3%} of a step in the run; its own process used "
            f"{mirror['cpu_seconds']:.1f} s of a processor in {settings['steps']} steps, nearly all of it to start."
        )
    text.append(f"`{record['command']}`")
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
