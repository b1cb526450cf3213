"""How often the checks that draw something at random accuse a healthy subject.

    python benchmarks/false_alarms.py --out OUT                     20 seeds, about four minutes on one CPU core
    python benchmarks/false_alarms.py --out OUT --seeds 3 --only sampling epoch_order

Each seed gives other weights, another order of the rows, and, since the checks draw from seeds of their own, other
draws within the checks: torch's and numpy's seeding is moved by it. Subjects: the specimen, our smallest original model
with a store and a training step, and four families of transformers. OUT/false_alarms.json has every finding; the table
counts PASS, FAIL and NOT RUN, with how near a PASS came to its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilm.doctor import specimens
from minilm.doctor.core import run_checks, select
from minilm.doctor.subject import Subject
from minilm.doctor.targets.huggingface import family_subject
from minilm.examination import subject_of

ROOT = Path(__file__).resolve().parent.parent
STATISTICAL = (
    *("initial_loss", "random_floor", "epoch_order", "sampled_text", "sampling", "overfit", "initialisation"),
    "entropy_floor",
)
FAMILIES = ("llama", "gpt2", "mixtral", "mamba")
STRIDE = 100_003  # between the seeds of two rounds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=STATISTICAL)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--no-store", action="store_true", help="without our own model, which needs a store")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    store = None if arguments.no_store else made_store(arguments.out)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for name, subject in subjects(seed, arguments.families, store, arguments.out):
            rows += examined(name, subject, seed, arguments.only)
        told = [r for r in rows if r["seed"] == seed and r["status"] == "FAIL"]
        print(f"seed {seed}: {len(told)} alarms {[(r['subject'], r['check']) for r in told]}", flush=True)
        write(arguments.out / "false_alarms.json", rows)
    print(table(rows))
    return 1 if any(row["status"] == "FAIL" for row in rows) else 0


def subjects(
    seed: int, families: Sequence[str], store: Path | None, out: Path
) -> Iterator[tuple[str, Subject]]:
    """Healthy subjects with the weights of a seed."""
    yield "specimen", specimens.subject(seed=seed)
    if store is not None:
        settings = out / "settings.yaml"
        settings.write_text(
            f"data: {{store: {store}, sequence_length: 64}}\nmodel: {{name: original, size: tiny}}\n"
            f"train: {{seed: {seed}, batch_size: 8, device: cpu, steps: 20}}\noptim: {{warmup_steps: 1}}\n"
        )
        yield "original tiny", subject_of(settings)
    for family in families:
        yield f"hf:{family}", family_subject(family, seed)


def examined(name: str, subject: Subject, seed: int, only: Sequence[str]) -> list[dict[str, Any]]:
    """Findings as plain values."""
    with draws_of(seed):
        return [
            {
                "subject": name,
                "seed": seed,
                "check": f.check,
                "status": f.status,
                "message": f.message[:300],
                "measured": f.measured,
                "threshold": f.threshold,
            }
            for f in run_checks(subject, select(only=only))
        ]


@contextlib.contextmanager
def draws_of(seed: int) -> Iterator[None]:
    """Whoever seeds a generator inside gets other numbers for each `seed`; for 0 the usual ones."""
    before = torch.Generator, torch.manual_seed, np.random.default_rng, np.random.seed
    moved = seed * STRIDE

    class Moved(torch.Generator):
        def manual_seed(self, number: int) -> torch.Generator:
            return super().manual_seed(number + moved)

    def default_rng(number: Any = None) -> np.random.Generator:
        if moved and isinstance(number, int | np.integer | list | tuple):
            number = [*(number if isinstance(number, list | tuple) else [number]), moved]
        return before[2](number)

    torch.Generator = Moved  # type: ignore[misc,assignment]
    torch.manual_seed = lambda number: before[1](number + moved)  # type: ignore[assignment]
    np.random.default_rng = default_rng  # type: ignore[assignment]
    np.random.seed = lambda number=None: before[3](None if number is None else number + moved)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.Generator, torch.manual_seed, np.random.default_rng, np.random.seed = before  # type: ignore[misc,assignment]


def made_store(out: Path) -> Path:
    """A small store of Python's own documentation."""
    store = out / "store"
    if not store.is_dir():
        source, tokenizer = ["--source", "builtin:python-docs"], str(out / "tokenizer")
        for command in (
            ["tokenizer", "train", *source, "--vocab-size", "512", "--out", tokenizer],
            ["data", "build", *source, "--tokenizer", tokenizer, "--out", str(store)],
        ):
            subprocess.run([sys.executable, "-m", "minilm", *command], check=True, cwd=ROOT)
    return store.resolve()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Check and subject -> counts of the three statuses, and how near a PASS came to its limit."""
    lines = [
        "| check | subject | PASS | FAIL | NOT RUN | nearest limit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for check, subject in sorted({(row["check"], row["subject"]) for row in rows}):
        these = [row for row in rows if (row["check"], row["subject"]) == (check, subject)]
        count = [sum(row["status"] == status for row in these) for status in ("PASS", "FAIL", "NOT RUN")]
        near = [margin(row) for row in these if row["status"] == "PASS"]
        nearest = min((m for m in near if m is not None), default=None)
        cells = [check, subject, *map(str, count), "" if nearest is None else f"{nearest:.3g} x"]
        lines.append(f"| {' | '.join(cells)} |")
    alarms = sum(row["status"] == "FAIL" for row in rows)
    passes = sum(row["status"] == "PASS" for row in rows)
    return "\n".join([*lines, "", f"{alarms} alarms, {passes} times nothing found"])


def margin(row: dict[str, Any]) -> float | None:
    """How many times further from what was measured the limit is; None where they cannot be compared."""
    measured, threshold = row["measured"], row["threshold"]
    if not isinstance(measured, int | float) or not isinstance(threshold, int | float) or measured < 0:
        return None  # a gain below zero is further away than nothing
    small, large = sorted((abs(measured), abs(threshold)))
    return large / small if small > 0 else None


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    facts = {"torch": torch.__version__, "date": date.today().isoformat(), "findings": rows}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
