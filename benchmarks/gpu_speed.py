"""All that is to be known of the speed on a GPU, by one call of less than 9 minutes, with a report of what is reached.

    python benchmarks/gpu_speed.py --out gpu_speed                     one CUDA GPU: 26m, 128 x 512, bfloat16
    python benchmarks/gpu_speed.py --out trial --scale cpu             the same path in small on a CPU, two minutes
    python benchmarks/gpu_speed.py --out gpu_speed --only zero         one part; the report keeps the others

    step     training_step.py: minilm and transformers, eager and compiled, head sizes 16 and 64
    zero     scaling.py: DeepSpeed ZeRO-2 on one GPU against no wrapper
    inside   step_inside.py: who waits for the GPU, kernel by kernel where the time goes; traces are kept
    parts    parts.py: attention by kernel and head size, loss head, norm and the like, optimizers
    scaling  scaling.py: rows, sequence length, size of the model

Parts run in this order, what matters most first, each in processes of its own: one that fails or runs out of time is
told with the reason and the others go on. What there was no time for gets it in another call (--only parts scaling).
OUT/report.md says which goals are reached and what stands in the way, OUT/report.json has everything, OUT/inside the
traces. Exit code 1 if a part failed, not if a goal is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import parts as parts_of_step
import scaling
import step_inside
import torch
import training_step
from whole_tree import run_whole

from minilm.training.hardware import peak_flops

HERE = Path(__file__).resolve().parent
# Arguments of each command, by scale. GPU: what the goals are about; cpu: small, to try the script.
PLAN: dict[str, dict[str, dict[str, list[str]]]] = {
    "gpu": {
        "step": {"training_step": ["--size", "26m", "--head-size", "16", "64", "--repeats", "5", "--only", "minilm",
                                   "minilm-compiled", "transformers", "transformers-compiled"]},
        "zero": {"scaling_zero": ["--axes", "ranks", "--ranks", "1", "--head-size", "64", "--rounds", "1"]},
        "inside": {
            "inside_16": ["--head-size", "16"],
            "inside_64": ["--head-size", "64"],
            "inside_64_compiled": ["--head-size", "64", "--compile"],
        },
        "parts": {"parts": ["--head-sizes", "16", "64", "128", "--no-compile"]},
        "scaling": {"scaling": ["--axes", "rows", "length", "size", "--head-size", "64", "--repeats", "3"]},
    },
    "cpu": {
        "step": {"training_step": ["--quick", "--head-size", "8", "16", "--only", "minilm", "transformers"]},
        "zero": {"scaling_zero": ["--quick", "--axes", "ranks", "--ranks", "1", "--head-size", "16"]},
        "inside": {"inside_16": ["--quick", "--head-size", "16"]},
        "parts": {"parts": ["--quick", "--only", "attention", "head"]},
        "scaling": {"scaling": ["--quick", "--axes", "rows", "size"]},
    },
}  # fmt: skip
SCRIPTS = {
    "step": "training_step",
    "zero": "scaling",
    "inside": "step_inside",
    "parts": "parts",
    "scaling": "scaling",
}
SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "step": training_step.section,
    "zero": scaling.section,
    "inside": step_inside.section,
    "parts": parts_of_step.section,
    "scaling": scaling.section,
}
OURS = ("minilm", "minilm-compiled")  # as training_step.py calls them
LEAST_SECONDS = 20  # for a command to be worth a start


class Bench:
    """Where the results lie and how much time is left."""

    def __init__(self, out: Path, scale: str, minutes: float) -> None:
        self.out, self.scale, self.end = out.resolve(), scale, time.monotonic() + 60 * minutes
        self.out.mkdir(parents=True, exist_ok=True)

    def part(self, name: str) -> dict[str, Any]:
        """Run the commands of a part: {"records": [...], "failed": {command: reason}}."""
        found: dict[str, Any] = {"records": [], "failed": {}}
        for title, given in PLAN[self.scale][name].items():
            try:
                found["records"].append(self.run(SCRIPTS[name], title, given))
            except RuntimeError as error:
                say(f"{title}: {str(error).splitlines()[-1]}")
                found["failed"][title] = str(error)
        return found

    def run(self, script: str, title: str, given: list[str]) -> dict[str, Any]:
        """The record that a benchmark wrote. RuntimeError with its last lines where it wrote none."""
        left = self.end - time.monotonic()
        if left < LEAST_SECONDS:
            raise RuntimeError("there was no time left for it")
        say(f"{title} ({left:.0f} s left)")
        if script == "step_inside":
            place = ["--out", str(self.out / "inside" / title)]
        else:
            place = ["--json", str(self.out / f"{title}.json")]
        command = [sys.executable, str(HERE / f"{script}.py"), *given, *place]
        begun = time.time()
        code, text = run_whole(command, seconds=left)
        files = sorted(Path(place[1]).glob("*.json")) if script == "step_inside" else [Path(place[1])]
        fresh = [file for file in files if file.is_file() and file.stat().st_mtime >= begun]
        how = f"ended with {code}" if code is not None else f"was ended after {left:.0f} s: the time was over"
        if not fresh:
            tail = "\n".join(text.splitlines()[-30:])
            raise RuntimeError(f"python benchmarks/{script}.py {' '.join(given)}\n{tail}\n{how}")
        record: dict[str, Any] = json.loads(fresh[-1].read_text(encoding="utf-8"))
        # A comparison that found something wrong has written what it found: both are told.
        complaint = None if code == 0 else f"{text[-2000:]}\n{how}"
        return {**record, "seconds": time.time() - begun, "complaint": complaint}


# ---------------------------------------------------------------- goals


def goals(parts: dict[str, Any], peak: float | None) -> Iterator[tuple[str, str, bool | None]]:
    """(goal, what was measured, reached?) None: not measured."""
    cases = {
        case["head_size"]: case for record in _records(parts, "step") for case in record["results"]["cases"]
    }
    for head_size, least in ((64, 0.40), (16, 0.25)):
        share, said = _mfu(cases.get(head_size), peak)
        yield (
            f"at least {least:.0%} MFU with head size {head_size}",
            said,
            None if share is None else share >= least,
        )
    for head_size, case in sorted(cases.items()):
        for other, least in (("transformers", 2.0), ("transformers-compiled", 1.0)):
            ratio = _ratio(case, other)
            said = "not measured" if ratio is None else f"{measuring.told(ratio)} x"
            reached = None if ratio is None else ratio["median"] >= least
            yield f"at least {least:g} x {other} with head size {head_size}", said, reached
    yield _zero(parts)
    for record in _records(parts, "inside"):
        settings, waiting = record["settings"], record["results"]["waiting"]
        name = f"{'compiled' if settings['compile'] else 'eager'}, head size {settings['head_size']}"
        seen = waiting["seen_by_torch"]
        count = None if seen is None else sum(one["count"] for one in seen)
        said = "not measured: no CUDA" if count is None else f"{count} in {waiting['steps']} steps"
        reached = None if count is None else count == 0
        yield f"no call that waits for the GPU inside of a step ({name})", said, reached


def _zero(parts: dict[str, Any]) -> tuple[str, str, bool | None]:
    done = [one for r in _records(parts, "zero") for one in r["results"] if "absent" not in one]
    speeds = {one["wrapper"]: _median(one) for one in done}
    goal = "ZeRO-2 on one GPU within 5 % of no wrapper"
    if not {None, "ZeRO-2"} <= speeds.keys():
        return goal, "not measured", None
    ratio = speeds["ZeRO-2"] / speeds[None]
    return goal, f"{ratio:.1%} of the speed without a wrapper", ratio >= 0.95


def _mfu(case: dict[str, Any] | None, peak: float | None) -> tuple[float | None, str]:
    """The better of eager and compiled: of the data sheet where the device is known, else of the measured product."""
    ours = [case["contenders"][name] for name in OURS if name in case["contenders"]] if case else []
    done = [one for one in ours if "failed" not in one]
    if not done:
        return None, "not measured"
    best = max(done, key=_median)
    measured: float = best["mfu"]
    sheet = _median(best) * best["flops_per_token"] / peak if peak else None
    said = f"{measured:.1%} of the measured product" + (f", {sheet:.1%} of the data sheet" if sheet else "")
    return measured if sheet is None else sheet, f"{said} ({best['label']})"


def _median(one: dict[str, Any]) -> float:
    return float(one["tokens_per_second"]["median"])


def _ratio(case: dict[str, Any], other: str) -> dict[str, float] | None:
    """How many times as fast as `other` the better of ours is, turn by turn."""
    done = {name: one for name, one in case["contenders"].items() if "failed" not in one}
    ours = [done[name] for name in OURS if name in done]
    if not ours or other not in done:
        return None
    return measuring.paired(done[other]["seconds"], max(ours, key=_median)["seconds"])


def _records(parts: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = parts.get(name, {}).get("records", [])
    return found


def in_the_way(parts: dict[str, Any]) -> Iterator[str]:
    """What a step is spent on beside its arithmetic, from the profiles."""
    for record in _records(parts, "inside"):
        found, settings = record["results"], record["settings"]
        how = "compiled" if settings["compile"] else "eager"
        whole = found["busy_seconds"] + (found["idle_seconds"] or 0.0)
        step, floor = found["seconds"]["median"], found["flops_per_step"] / found["product_flops"]
        said = [f"{kind} {took / whole:.0%}" for kind, took in found["kinds"].items() if took / whole >= 0.01]
        if found["idle_seconds"] is not None:
            said.append(f"nothing to do {found['idle_seconds'] / whole:.0%}")
        yield (
            f"Head size {settings['head_size']}, {how}: {1e3 * step:,.1f} ms a step, of which all arithmetic at the "
            f"speed of the best product would take {floor / step:.0%}. Spent on: {', '.join(said)}."
        )


# ---------------------------------------------------------------- the report


def markdown(report: dict[str, Any]) -> str:
    """Goals first, then what stands in the way, then the sections of all benchmarks."""
    about, parts = report["machine"], report["parts"]
    device = (
        about["accelerator"]
        or f"{about['processor']}, {about['cores']} cores (a trial: the goals are of a GPU)"
    )
    lines = [
        "# Speed on a GPU",
        "",
        f"{about['date']}, {device}, CUDA {about['cuda']}, torch {about['torch']}, ",
    ]
    lines[-1] += (
        f"transformers {about['transformers']}, Python {about['python']}. Command: `{report['command']}`"
    )
    words = {True: "yes", False: "no", None: "not measured"}
    rows = [[goal, said, words[reached]] for goal, said, reached in goals(parts, report["data_sheet_flops"])]
    lines += ["", "## Goals", "", measuring.table(["goal", "measured", "reached"], rows, left=3), ""]
    lines += ["## What stands in the way", "", *(f"- {line}" for line in in_the_way(parts)), ""]
    for name, part in parts.items():
        for title, why in part["failed"].items():
            lines += [f"## {title}: failed", "", "```", why, "```", ""]
        for record in part["records"]:
            lines += [SECTIONS[name](record)]
            if record["complaint"]:
                lines += ["It ended with a complaint:", "", "```", record["complaint"], "```", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results, traces and report")
    parser.add_argument("--scale", choices=PLAN, default="gpu", help="cpu: tiny, to try the script")
    parser.add_argument(
        "--only", nargs="+", choices=SCRIPTS, help="the report keeps what is there of the others"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="after which nothing more is begun (default: 8.5)"
    )
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    if args.scale == "gpu" and not cuda:
        parser.error("no CUDA device is visible. --scale cpu runs the same path in small.")
    bench = Bench(args.out, args.scale, args.minutes)
    file = bench.out / "report.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["parts"] if args.only and file.is_file() else {}
    report: dict[str, Any] = {
        "command": f"python benchmarks/gpu_speed.py --out {args.out.name} --scale {args.scale}",
        "machine": measuring.machine(),
        "data_sheet_flops": peak_flops(torch.device("cuda"), bf16=True) if cuda else None,
        "parts": kept,
    }
    for name in args.only or SCRIPTS:
        kept[name] = bench.part(name)
        report["parts"] = {key: kept[key] for key in SCRIPTS if key in kept}
        # After each part: what is cut off from outside leaves a report of what was done.
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (bench.out / "report.md").write_text(markdown(report) + "\n", encoding="utf-8")
    print((bench.out / "report.md").read_text(encoding="utf-8"))
    return (
        1
        if any(part["failed"] or any(r["complaint"] for r in part["records"]) for part in kept.values())
        else 0
    )


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
