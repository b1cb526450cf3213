"""Has something become slower? A few ratios to transformers and counts of a step, kept from commit to commit.

    python benchmarks/regressions.py                     compare with what was reached, add a line: four minutes
    python benchmarks/regressions.py --check             the same, but write nothing
    python benchmarks/regressions.py --accept "WHY"      what is worse now is meant: later lines begin here
    python benchmarks/regressions.py --quick             tiny models, to see that it works; compares and writes nothing

Seconds cannot be compared between two days; ratios to another program on the same machine can, and counts always:

    step, packed step      times as fast as a plain loop around transformers (training_step.py)
    memory of a step       peak of the process, as a share of that loop's
    1 stream, 16 streams   whole calls, times as fast as transformers' `generate` (generation.py)
    operators              that a step calls in torch: forward, backward, update
    kept                   kB a token that the forward pass keeps for the backward pass

Compared are lines since the last accepted one: ratios of the same processor, threads and minor versions of torch and
transformers, counts of the same torch, with oneDNN's products or without. A figure is held against the second best of
them (the best of many is a lucky one; where there is one line, against that). It is worse if its median is, by more
than its allowance (`FIGURES`), and even its best reading is. Everything is measured on the CPU. Exit code 1 if a
figure is worse, 2 if it could not be measured. Measure on a quiet machine, and commit the line with what changed it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import torch
from scaling_worker import Point
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minilm import onednn
from minilm.training.layout import Asked, Layout

HERE = Path(__file__).resolve().parent
THREADS, REPEATS = 2, 5
Spread = dict[str, float]


class NotMeasured(Exception):
    """Why there are no figures; the text is for the reader."""


@dataclass(frozen=True)
class Figure:
    """What is kept of a commit.

    more_is_better  or less
    allowance       the share by which it may be worse than before
    counted         it depends on torch and on the ways that are taken, not on the machine's speed
    """

    name: str
    more_is_better: bool
    allowance: float
    counted: bool = False
    form: str = ".2f"


FIGURES = (
    Figure("step", True, 0.08),
    Figure("packed step", True, 0.08),
    Figure("memory of a step", False, 0.05),
    Figure("1 stream", True, 0.08),
    Figure("16 streams", True, 0.08),
    Figure("operators", False, 0.01, counted=True, form=",.0f"),
    Figure("kept", False, 0.01, counted=True, form=",.1f"),
)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        before = [] if args.quick else lines_of(args.json)
        now = line(measured(args.quick), args.accept)
    except NotMeasured as error:
        print(f"error: {error}. Nothing is kept.", file=sys.stderr)
        return 2
    lines = [*before, now]
    if args.quick:
        print("Tiny models, to see that it works: no figures, and not the size that is named below.\n")
    print(section({"results": {"lines": lines}, "command": "python benchmarks/regressions.py"}))
    if not (args.check or args.quick):
        settings = {"threads": THREADS, "repeats": REPEATS}
        print(f"wrote {measuring.write('regressions', settings, {'lines': lines}, args.json, argv=[])}")
    worse = judged(now, before).worse
    for sentence in worse:
        print(f"WORSE{', accepted' if args.accept else ''}: {sentence}", file=sys.stderr)
    return 1 if worse and not args.accept else 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--quick", action="store_true", help="tiny models; compares and writes nothing")
    parser.add_argument("--accept", metavar="WHY", help="begin anew: why what is worse is meant")
    parser.add_argument(
        "--json",
        type=Path,
        default=measuring.RESULTS / "regressions.json",
        metavar="FILE",
        help="the lines (default: benchmarks/results/regressions.json)",
    )
    return parser.parse_args(argv)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines that were kept, the oldest first; none where there is no file. NotMeasured for a torn one."""
    if not path.is_file():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]["lines"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotMeasured(f"{path} has no lines ({error}); take it back from the last commit") from error
    return found


def line(figures: Mapping[str, Spread], accepted: str | None = None) -> dict[str, Any]:
    """The figures with the commit and the machine; `accepted`: why they may be worse than those before."""
    machine = measuring.machine()
    kept = ("commit", "date", "processor", "cores", "torch", "transformers", "load_average")
    facts = {key: machine[key] for key in kept} | {"threads": THREADS, "onednn": onednn.works()}
    return {**facts, **({"accepted": accepted} if accepted else {}), "figures": dict(figures)}


# ---------------------------------------------------------------- measuring


def measured(quick: bool) -> dict[str, Spread]:
    """Name of a figure -> median, lowest and highest. NotMeasured where a benchmark fails."""
    with tempfile.TemporaryDirectory() as folder:
        steps, texts = (ran(name, options, Path(folder)) for name, options in commands(quick).items())
    size, rows, length = ("tiny", 2, 32) if quick else ("26m", 2, 128)
    return from_steps(steps) | from_texts(texts) | counts(size, rows, length)


def commands(quick: bool) -> dict[str, list[str]]:
    """Benchmark -> what it is given."""
    short = ["--quick"] if quick else ["--repeats", str(REPEATS), "--threads", str(THREADS)]
    return {
        "training_step": ["--device", "cpu", "--only", "minilm", "minilm-packed", "transformers", *short],
        "generation": short,
    }


def ran(name: str, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """The record that another benchmark writes."""
    out = folder / f"{name}.json"
    command = [sys.executable, str(HERE / f"{name}.py"), *options, "--json", str(out)]
    code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    if code:
        raise NotMeasured(f"{name}.py ended with {code}")
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return record


def from_steps(record: Mapping[str, Any]) -> dict[str, Spread]:
    found = record["results"]["cases"][0]["contenders"]
    if failed := [f"{one['label']}: {one['failed']}" for one in found.values() if "failed" in one]:
        raise NotMeasured("; ".join(failed))
    return {
        "step": found["minilm"]["ratio_to_plain"],
        "packed step": found["minilm-packed"]["ratio_to_plain"],
        "memory of a step": measuring.spread([found["minilm"]["peak_ratio"]]),
    }


def from_texts(record: Mapping[str, Any]) -> dict[str, Spread]:
    by_rows = sorted(record["results"], key=lambda one: one["rows"])
    return {"1 stream": by_rows[0]["times_faster"], "16 streams": by_rows[-1]["times_faster"]}


class _Calls(TorchDispatchMode):
    """Counts the operators that torch is called for."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def counts(size: str, rows: int, length: int) -> dict[str, Spread]:
    """What a step of the trainer calls and keeps, on a CPU in float32: the same numbers each time."""
    layout = Layout(Asked(rows, None, "fp32", "cpu", 1.0, 1))
    wanted = {"size": size, "rows": rows, "length": length, "threads": torch.get_num_threads()}
    with torch.random.fork_rng(devices=[]):
        point = Point(wanted, {"compile": False, "steps": 1}, layout)
        point.turn()  # makes the optimizer's moments
        with _Calls() as calls:
            point.turn()
        own = {t.untyped_storage()._cdata for t in point.layout.model.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no other one gets its number
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            point.turn()
    num_bytes = sum(storage.nbytes() for number, storage in kept.items() if number not in own)
    return {
        "operators": measuring.spread([float(calls.number)]),
        "kept": measuring.spread([num_bytes / 1e3 / (rows * length)]),
    }


# ---------------------------------------------------------------- judging and telling


class Judgement(NamedTuple):
    """compared: names of figures that had a line to be held against; worse: a sentence for each that is worse."""

    compared: list[str]
    worse: list[str]


def judged(now: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> Judgement:
    """Hold a line against those before it, the oldest first."""
    begun = max((number for number, one in enumerate(before) if "accepted" in one), default=0)
    found = Judgement([], [])
    for figure in FIGURES:
        known = [one for one in before[begun:] if _kind(figure, one) == _kind(figure, now)]
        known = [one for one in known if figure.name in one["figures"]]
        if not known:
            continue
        found.compared.append(figure.name)
        known.sort(key=lambda one: one["figures"][figure.name]["median"], reverse=figure.more_is_better)
        reference = known[min(1, len(known) - 1)]
        new, old = now["figures"][figure.name], reference["figures"][figure.name]["median"]
        lost = _lost(figure, new["median"], old)
        at_best = _lost(figure, new["highest" if figure.more_is_better else "lowest"], old)
        if not (lost <= figure.allowance or at_best <= 0):  # so that what is no number is worse than any
            found.worse.append(
                f"{figure.name}: {new['median']:{figure.form}} is {lost:.0%} worse than {old:{figure.form}} at "
                f"{reference['commit']}"
            )
    return found


def _lost(figure: Figure, new: float, old: float) -> float:
    return 1 - new / old if figure.more_is_better else new / old - 1


def _kind(figure: Figure, one: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be the same in two lines that are compared."""
    torch_version, transformers = (tuple(one[name].split(".")[:2]) for name in ("torch", "transformers"))
    ways = (torch_version, one["onednn"])
    return ways if figure.counted else (*ways, transformers, one["processor"], one["cores"], one["threads"])


def section(record: Mapping[str, Any]) -> str:
    """Its part of docs/performance.md: a line for each commit that was measured."""
    lines = record["results"]["lines"]
    head = ["commit", "date", *(figure.name for figure in FIGURES)]
    rows = [
        [
            str(one["commit"]),
            one["date"],
            *(_told(figure, one["figures"].get(figure.name)) for figure in FIGURES),
        ]
        for one in lines
    ]
    text = (
        "Times as fast as transformers (a plain training loop, `generate`), memory as a share of that loop's, and of a "
        "step the operators that torch is called for and the kB a token that are kept for the backward pass: `original:"
        f"26m`, float32, {lines[-1]['threads']} threads, medians (lowest to highest). A commit with + was changed."
    )
    blocks = ["## From commit to commit", _found(lines), text, measuring.table(head, rows, left=2)]
    meant = [f"- {one['commit']} was accepted: {one['accepted']}" for one in lines if "accepted" in one]
    return "\n\n".join([*blocks, *(["\n".join(meant)] if meant else []), f"`{record['command']}`"]) + "\n"


def _found(lines: Sequence[Mapping[str, Any]]) -> str:
    where = "the one measured commit" if len(lines) == 1 else f"the last of {len(lines)} measured commits"
    compared, worse = judged(lines[-1], lines[:-1])
    if worse:
        return f"At {where}, {'; '.join(worse)}."
    if not compared:
        return f"At {where} nothing could be compared: no earlier one was measured in the same way."
    return f"At {where}, none of the {len(compared)} figures that can be compared is worse than before."


def _told(figure: Figure, value: Spread | None) -> str:
    if value is None:
        return ""
    same = value["lowest"] == value["highest"]
    return f"{value['median']:{figure.form}}" if same else measuring.told(value, figure.form)


if __name__ == "__main__":
    sys.exit(main())
