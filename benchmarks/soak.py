"""Kill a small run at random moments, again and again, and hold what comes out against a run that nobody disturbed.

    python benchmarks/soak.py --kills 20                   one process
    python benchmarks/soak.py --kills 20 --ranks 2         two, by accelerate with DeepSpeed ZeRO-2

Each trial starts `train.py --resume`, waits for a moment and sends kill -9: to all processes or, with two ranks,
sometimes to one rank alone. A third of the trials aims into a save: at a random offset after a folder `.saving-` has
appeared in checkpoints/. The others take a random moment while it starts, or after a step. Then the run may finish.
Final weights, optimizer state and every number in the train lines of metrics.jsonl (but for times and memory) must be
those of the undisturbed run, bit for bit. Exit code 0 if so, 1 if not.

OUT/soak.json has a record of each trial: the moment, where it stood, what it left behind, what was found at the next
start (checkpoint to go on from, half-written and damaged ones) and how many steps and seconds were lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from minilm.training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("seconds/", "memory/", "tokens_per_second", "mfu", "unix_seconds")  # differ between any two runs

SETTINGS = {
    "data.sequence_length": 24,
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.hidden_dim": 64,
    "model.max_length": 64,
    "model.dropout": 0.1,  # random states matter
    "train.batch_size": 8,
    "train.micro_batch": 2,
    "train.device": "cpu",
    "train.validate_every": 1000,
    "train.save_every": 7,
    "optim.warmup_steps": 5,
    "track.swanlab": "off",
    "doctor.check": "off",  # of each start, not of the run
}


def soak(
    out: Path,
    store: Path,
    *,
    kills: int,
    ranks: int = 1,
    steps: int = 300,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """The whole experiment below `out`; returns the report, which is also in out/soak.json after each trial."""
    draw = random.Random(seed)
    began = time.perf_counter()
    undisturbed = _Process(out, store, "undisturbed", ranks, steps)
    errors = undisturbed.wait()
    if undisturbed.code != 0:
        raise RuntimeError(f"The undisturbed run failed:\n{errors[-3000:]}")
    reference = out / "undisturbed"
    report: dict[str, Any] = {
        "ranks": ranks, "steps": steps, "seed": seed, "undisturbed_seconds": undisturbed.seconds, "trials": []
    }  # fmt: skip
    for number in range(1, kills + 1):
        trial = _trial(out, store, ranks, steps, draw, startup=undisturbed.first_step_seconds)
        report["trials"].append(trial)
        _write(out, report)
        if not quiet:
            print(f"kill {number}/{kills}: {json.dumps(trial)}", flush=True)
    last = _Process(out, store, "killed", ranks, steps)
    errors = last.wait()
    report |= {"finish_code": last.code, "differences": _differences(out / "killed", reference)}
    for number, trial in enumerate(report["trials"], 1):
        if trial["damaged"]:
            report["differences"].append(f"kill {number} left damaged checkpoints: {trial['damaged']}")
    if leftovers := sorted(p.name for p in (out / "killed" / "checkpoints").glob(".*")):
        report["differences"].append(f"the end of the run has leftovers of earlier kills: {leftovers}")
    if last.code != 0:
        report["differences"].append(f"the last start ended with {last.code}: {errors[-1000:]}")
    report["seconds"] = time.perf_counter() - began
    _write(out, report)
    return report


def _trial(
    out: Path, store: Path, ranks: int, steps: int, draw: random.Random, *, startup: float
) -> dict[str, Any]:
    run = out / "killed"
    trial: dict[str, Any] = {"stood_at_step": _last_step(run), "aimed": _aim(draw)}
    newest, changed = _newest(run), _last_change(run)
    process = _Process(out, store, "killed", ranks, steps)
    if trial["aimed"] == "while it starts":
        process.sleep(draw.uniform(0, startup))
    elif trial["aimed"] == "in a save":
        # Half of the offsets are shorter than such a small save takes, the others reach the rename and the pruning.
        offset = draw.choice((draw.uniform(0, 0.004), draw.uniform(0, 0.02)))
        skipped = draw.randint(0, 2)  # saves that are let pass
        seen: set[str] = set()
        while process.code is None and len(seen) <= skipped:
            seen |= {path.name for path in (run / "checkpoints").glob(".saving-*")}
            process.sleep(0.0005)
        process.sleep(offset)
        trial["moment"] = f"{offset * 1000:.1f} ms after {max(seen, default='nothing')} appeared"
    else:
        target, offset = newest + draw.randint(1, 15), draw.uniform(0, 0.15)
        # Lines that an earlier start left are no sign of this one: it begins by moving them away.
        while process.code is None and not (
            _last_change(run) != changed and newest < _last_step(run) >= target
        ):
            process.sleep(0.01)
        process.sleep(offset)
        trial["moment"] = f"{offset:.3f} s after step {target}"
    alone = ranks > 1 and draw.random() < 0.4
    trial["killed"] = process.kill_one_rank(draw) if alone else process.kill_all()
    process.wait()
    trial |= {"code": process.code, "seconds": process.seconds, "died_at_step": _last_step(run)}
    if process.code in (1, 2):
        trial["message"] = process.errors()[-600:]
    return trial | _found(run)


def _aim(draw: random.Random) -> str:
    return draw.choices(("in a save", "while it starts", "after a step"), (2, 1, 3))[0]


def _last_change(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.is_file() else 0


def _newest(run: Path) -> int:
    return max((int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*")), default=0)


def _found(run: Path) -> dict[str, Any]:
    """What the next start will find, and what has to be done again."""
    folder = run / "checkpoints"
    found = checkpoint.list_checkpoints(folder)
    damaged = {c.step: problems for c in found if (problems := checkpoint.damage(c.folder))}
    newest = max((c.step for c in found if c.step not in damaged), default=0)
    again = [line for line in _train_lines(run, measured=True) if line["step"] > newest]
    return {
        "left_behind": sorted(p.name for p in folder.glob(".*")),
        "damaged": damaged,  # none may be: a folder with its final name is whole
        "goes_on_from_step": newest,
        "steps_lost": len(again),
        "seconds_lost": round(sum(line["seconds/step"] for line in again), 3),
    }


class _Process:
    """`train.py --resume` in a session of its own, started as a user would."""

    def __init__(self, out: Path, store: Path, name: str, ranks: int, steps: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        settings = SETTINGS | {"data.store": store, "run.folder": out, "run.name": name, "train.steps": steps}
        settings["train.ranks"] = ranks
        command = [str(ROOT / "train.py"), "--resume", *(f"--{k}={v}" for k, v in settings.items())]
        if ranks > 1:
            launcher = ROOT / "run_file" / "accelerate" / "cpu2_zero2.yaml"
            where = ["--config_file", str(launcher), "--main_process_port", str(_free_port())]
            command = ["-m", "accelerate.commands.accelerate_cli", "launch", *where, *command]
        self._errors, self._run = out / f"{name}.stderr", out / name
        self._began = time.perf_counter()
        self.first_step_seconds = 5.0
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command], stdout=errors, stderr=errors,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def errors(self) -> str:
        return self._errors.read_text(encoding="utf-8", errors="replace")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self) -> str:
        seen = False
        while self.code is None:
            if not seen and _last_step(self._run) > 0:
                seen, self.first_step_seconds = True, time.perf_counter() - self._began
            if time.perf_counter() - self._began > 600:
                self.kill_all()
                raise TimeoutError(f"The run hangs:\n{self.errors()[-3000:]}")
            time.sleep(0.05)
        self.seconds = round(time.perf_counter() - self._began, 2)
        return self.errors()

    def kill_all(self) -> str:
        """kill -9 to the process and all that it started (the launcher gives each rank a session of its own)."""
        try:
            own = psutil.Process(self._process.pid)
            family = [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return "nothing: it had ended"
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()
        psutil.wait_procs(family)
        return "all processes"

    def kill_one_rank(self, draw: random.Random) -> str:
        """kill -9 to one worker; the launcher must notice and end the other."""
        try:
            children = psutil.Process(self._process.pid).children(recursive=True)
            workers = [child for child in children if any("train.py" in part for part in child.cmdline())]
            rank = draw.randrange(len(workers)) if workers else -1
            if rank < 0:
                return self.kill_all()
            workers[rank].send_signal(signal.SIGKILL)
            return f"worker {rank} alone"
        except psutil.NoSuchProcess:
            return self.kill_all()


def _differences(run: Path, reference: Path) -> list[str]:
    """What is not as in the undisturbed run, bit for bit."""
    found = []
    ours, theirs = _train_lines(run), _train_lines(reference)
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        found.append(
            f"{len(ours)} train lines with other steps than the {len(theirs)} of the undisturbed run"
        )
    found += [f"step {b['step']}: {a} instead of {b}" for a, b in zip(ours, theirs, strict=False) if a != b][
        :3
    ]
    newest = [sorted((folder / "checkpoints").glob("step-*")) for folder in (run, reference)]
    if not all(newest):
        return [*found, "a run has no checkpoint"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        if (newest[0][-1] / name).read_bytes() != (newest[1][-1] / name).read_bytes():
            found.append(f"{name} of the last checkpoint differs")
    return found


def _train_lines(run: Path, *, measured: bool = False) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [
        {key: value for key, value in line.items() if measured or not key.startswith(MEASURED)}
        for line in lines
        if line["kind"] == "train"
    ]


def _last_step(run: Path) -> int:
    lines = _train_lines(run)
    return lines[-1]["step"] if lines else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _synthetic_store(out: Path) -> Path:
    from minilm.data.build import build

    build(out / "store", ["synthetic:markov?vocab=64&documents=300&length=60"], None)
    return out / "store"


def _write(out: Path, report: dict[str, Any]) -> None:
    (out / "soak.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--store", type=Path, help="a small store; default: a synthetic one is built in OUT")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the runs and soak.json")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: give a new folder")
    store = arguments.store or _synthetic_store(arguments.out)
    report = soak(
        arguments.out, store.resolve(), kills=arguments.kills, ranks=arguments.ranks,
        steps=arguments.steps, seed=arguments.seed,
    )  # fmt: skip
    for difference in report["differences"]:
        print(f"DIFFERENT: {difference}")
    trials = report["trials"]
    in_saves = sum(any(name.startswith(".saving-") for name in trial["left_behind"]) for trial in trials)
    print(
        f"{in_saves} kills left a half-written save; {sum(t['steps_lost'] for t in trials)} steps done again"
    )
    print(f"{arguments.kills} kills, {len(report['differences'])} differences; {arguments.out / 'soak.json'}")
    return 1 if report["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
