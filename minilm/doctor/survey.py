"""`minilm doctor --survey`: the checks on a tiny random model of every causal LM family of transformers.

Healthy foreign code must not be accused. A finding that stands is a defect of the library: it has a reproduction in
docs/found.md and is listed in `FOUND`, so that a new one is seen at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from minilm.doctor.core import Check, run_checks, select
from minilm.doctor.report import number
from minilm.doctor.surroundings import machine
from minilm.doctor.targets.families import FOUND, FOUND_EVERYWHERE, exceptions_of
from minilm.doctor.targets.huggingface import families, family_subject
from minilm.errors import ConfigError

Row = dict[str, Any]


def survey_all(chosen: Sequence[Check], *, json_file: Path | None, page: Path | None) -> int:
    """Examine every family; returns 0 if nothing failed but what docs/found.md explains."""
    import transformers

    start = time.perf_counter()
    names = [check.name for check in chosen]
    rows: list[Row] = []
    workers = max(
        1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        for row in pool.map(examine_family, [(family, names) for family in families()]):
            rows.append(row)
            print(line(row), flush=True)
    seconds = time.perf_counter() - start
    text = summary(rows, seconds)
    print(f"\n{text}")
    facts = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "machine": machine(),
        "date": date.today().isoformat(),
        "seconds": seconds,
        "rows": rows,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        page.write_text(markdown(facts, text), encoding="utf-8")
    return 1 if any(unexplained(row) for row in rows) else 0


def _one_thread() -> None:
    torch.set_num_threads(1)


def examine_family(task: tuple[str, Sequence[str]]) -> Row:
    """All findings about one family, as plain values."""
    family, names = task
    import transformers

    transformers.logging.set_verbosity_error()
    with (
        warnings.catch_warnings(),
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        try:
            subject = family_subject(family)
        except ConfigError as error:
            return {
                "family": family,
                "class": "",
                "not_built": str(error).splitlines()[0][:200],
                "findings": [],
            }
        found = [
            {
                "check": f.check,
                "status": f.status,
                "message": f.message[:300],
                "component": f.component,
                "bugs": list(f.bugs),
                "measured": number(f.measured, f.unit),
                "seconds": round(f.seconds, 2),
            }
            for f in run_checks(subject, select(only=names))
        ]
    return {"family": family, "class": type(subject.module).__name__, "not_built": "", "findings": found}


def unexplained(row: Row) -> list[Row]:
    """Failures of a family that docs/found.md does not explain."""
    return [f for f in row["findings"] if f["status"] == "FAIL" and f["check"] not in known_defects(row)]


def known_defects(row: Row) -> dict[str, str]:
    """check -> defect, of a family."""
    return {**FOUND_EVERYWHERE, **FOUND.get(row["family"], {})}


def line(row: Row) -> str:
    """One row for the terminal."""
    if row["not_built"]:
        return f"{row['family']:<28} not built: {row['not_built'][:110]}"
    count = {s: sum(f["status"] == s for f in row["findings"]) for s in ("PASS", "FAIL", "NOT RUN")}
    told = "; ".join(
        f"FAIL {f['check']}: {f['message'][:90]}" for f in row["findings"] if f["status"] == "FAIL"
    )
    return f"{row['family']:<28} {count['PASS']:>3} PASS {count['NOT RUN']:>3} NOT RUN  {told}"


def summary(rows: Sequence[Row], seconds: float) -> str:
    """A paragraph of figures."""
    built = [row for row in rows if not row["not_built"]]
    accused = [row for row in built if unexplained(row)]
    known = [
        row for row in built if any(f["status"] == "FAIL" for f in row["findings"]) and row not in accused
    ]
    passes = sum(f["status"] == "PASS" for row in built for f in row["findings"])
    return (
        f"{len(built)} of {len(rows)} families built ({len({row['class'] for row in built})} classes); "
        f"{passes} checks passed; {len(accused)} families with an unexplained failure, {len(known)} with a known "
        f"defect; {seconds:.0f} s."
    )


def markdown(facts: Row, text: str) -> str:
    """The page docs/survey.md."""
    rows = facts["rows"]
    parts = [
        "# The checks on other people's models",
        "",
        "Made by `minilm doctor --survey --matrix docs/survey.md`; do not edit.",
        f"transformers {facts['transformers']}, torch {facts['torch']}, {facts['machine']}, {facts['date']}.",
        "",
        text,
        "",
        "Each family is a tiny model with random weights, built from its config class. NOT RUN says nothing.",
        "",
        "| family | class | PASS | NOT RUN | FAIL |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["not_built"]:
            continue
        of = {s: [f for f in row["findings"] if f["status"] == s] for s in ("PASS", "FAIL", "NOT RUN")}
        fails = "; ".join(
            f"{f['check']}: {known_defects(row).get(f['check'], f['message'])}" for f in of["FAIL"]
        )
        cells = [
            row["family"],
            row["class"],
            str(len(of["PASS"])),
            str(len(of["NOT RUN"])),
            fails.replace("|", "/"),
        ]
        parts.append(f"| {' | '.join(cells)} |")
    parts += [
        "",
        "## Checks that do not apply, by design",
        "",
        "| family | check | reason |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        for check, reason in exceptions_of(row["family"]).items():
            parts.append(f"| {row['family']} | {check} | {reason} |")
    parts += ["", "## Families that could not be built tiny", "", "| family | why |", "| --- | --- |"]
    parts += [
        f"| {row['family']} | {row['not_built'].replace('|', '/')} |" for row in rows if row["not_built"]
    ]
    return "\n".join(parts) + "\n"
