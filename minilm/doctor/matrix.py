"""`minilm doctor --prove`: the matrix bug x check, as it comes, as JSON, and as the page docs/matrix.md."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from minilm import __version__
from minilm.doctor.catalogue import bugs
from minilm.doctor.core import Check
from minilm.doctor.prove import Proof, healthy_specimen, prove
from minilm.doctor.report import margin, number
from minilm.doctor.surroundings import machine


def prove_all(chosen: Sequence[Check], *, json_file: Path | None, page: Path | None) -> int:
    """Prove these checks; prints each row, returns 0 if every bug was found by name and every healthy one passed."""
    start = time.perf_counter()
    proofs: list[Proof] = []
    for source in (healthy_specimen, prove):
        for proof in source(chosen):
            proofs.append(proof)
            print(line(proof), flush=True)
    seconds = time.perf_counter() - start
    text, right = summary(proofs, seconds)
    print(f"\n{text}")
    if json_file is not None:
        json_file.write_text(json.dumps(as_dict(proofs, seconds), indent=1) + "\n", encoding="utf-8")
    if page is not None:
        page.write_text(markdown(proofs, seconds), encoding="utf-8")
    return 0 if right else 1


def is_silent(proof: Proof) -> bool:
    """A healthy subject raised no alarm. The plain specimen may lack what a check needs; a look-alike may not."""
    lacks = proof.finding.status == "NOT RUN" and proof.finding.message.startswith("needs ")
    return proof.finding.status == "PASS" or (lacks and proof.what == "the plain specimen")


def line(proof: Proof) -> str:
    """One row for the terminal."""
    f = proof.finding
    if proof.kind == "healthy":
        said = "silent" if is_silent(proof) else "ALARM " if f.status == "FAIL" else "NO RUN"
    else:
        said = "found " if proof.right else "MISSED"
    seen = (
        f"{number(f.measured, f.unit)} against {number(f.threshold)}" if f.measured is not None else f.message
    )
    where = f" in {f.component}" if proof.kind == "bug" else ""
    return f"{said}  {proof.check:<26} {proof.what:<34} {seen[:70]}{where[:60]}"


def summary(proofs: Sequence[Proof], seconds: float) -> tuple[str, bool]:
    """A paragraph of figures, and whether all is as it must be."""
    planted = [p for p in proofs if p.kind == "bug"]
    healthy = [p for p in proofs if p.kind == "healthy"]
    found = [p for p in planted if p.right]
    placed = [p for p in found if p.placed]
    alarms = [p for p in healthy if not is_silent(p)]
    distinct = {p.what for p in planted}
    text = (
        f"{len(distinct)} distinct bugs in {len(planted)} plants: {len(found)} found under their own name "
        f"({len(found) / max(1, len(planted)):.1%}), {len(placed)} with the right component "
        f"({len(placed) / max(1, len(planted)):.1%}).\n"
        f"{len(healthy)} healthy subjects: {len(alarms)} alarms. {len({p.check for p in proofs})} checks, "
        f"{seconds:.0f} s."
    )
    right = len(found) == len(planted) and not alarms and len(placed) >= 0.9 * len(planted)
    return text, right


def as_dict(proofs: Sequence[Proof], seconds: float) -> dict[str, Any]:
    """Everything, with machine and versions."""
    return {
        "minilm": __version__,
        "torch": torch.__version__,
        "machine": machine(),
        "date": date.today().isoformat(),
        "seconds": seconds,
        "proofs": [
            {
                "check": p.check,
                "kind": p.kind,
                "what": p.what,
                "right": p.right or (p.kind == "healthy" and is_silent(p)),
                "placed": p.kind == "healthy" or p.placed,
                "status": p.finding.status,
                "measured": number(p.finding.measured, p.finding.unit),
                "threshold": number(p.finding.threshold),
                "margin": margin(p.finding),
                "component": p.finding.component,
                "message": p.finding.message,
                "seconds": p.finding.seconds,
            }
            for p in proofs
        ],
    }


def markdown(proofs: Sequence[Proof], seconds: float) -> str:
    """The page docs/matrix.md."""
    text, _ = summary(proofs, seconds)
    by_bug: dict[str, list[Proof]] = {}
    for proof in proofs:
        if proof.kind == "bug":
            by_bug.setdefault(proof.what, []).append(proof)
    healthy = {
        (p.check): p for p in proofs if p.kind == "healthy" and p.what == "the plain specimen"
    }  # the other side
    parts = [
        "# Every bug, and the check that finds it",
        "",
        "Made by `minilm doctor --prove --matrix docs/matrix.md`; do not edit.",
        f"{machine()}, torch {torch.__version__}, {date.today().isoformat()}.",
        "",
        text,
        "",
        "Measured and limit are in the unit of the check; *healthy* is what the same check measures on the healthy "
        "specimen. The distance on both sides is what a threshold is worth.",
        "",
        "| bug | what one sees | check | found | measured | limit | healthy | where | met by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for bug, found in sorted(by_bug.items(), key=lambda item: _number(item[0])):
        for proof in found:
            f, known = proof.finding, bugs().get(bug)
            other = healthy.get(proof.check)
            cells = [
                f"`{bug}`",
                known.symptom if known else "",
                f"`{proof.check}`",
                "yes" if proof.right else "NO",
                number(f.measured, f.unit),
                number(f.threshold),
                number(other.finding.measured) if other else "",
                f.component,
                _met(bug),
            ]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    parts += ["", "## Healthy subjects that look odd", "", "| check | subject | said | measured | limit |"]
    parts.append("| --- | --- | --- | --- | --- |")
    for proof in proofs:
        if proof.kind == "healthy" and proof.what != "the plain specimen":
            f = proof.finding
            figures = f"{number(f.measured, f.unit)} | {number(f.threshold)}"
            parts.append(f"| `{proof.check}` | {proof.what} | {f.status} | {figures} |")
    parts += [
        "",
        "## Rows of the catalogue without a plant",
        "",
        "| bug | what one sees | why |",
        "| --- | --- | --- |",
    ]
    for bug in _without(by_bug):
        parts.append(f"| `{bug.id}` | {bug.symptom} | {bug.left_out or 'not yet'} |")
    return "\n".join(parts) + "\n"


def _without(by_bug: Iterable[str]) -> list[Any]:
    planted = set(by_bug)
    return [bug for bug in bugs().values() if bug.id not in planted]


def _number(bug: str) -> int:
    known = bugs().get(bug)
    return known.number if known else sys.maxsize


def _met(bug: str) -> str:
    known = bugs().get(bug)
    if known is None:
        return ""
    return f"[{known.where.split('github.com/')[-1]}]({known.where})" if known.urls else known.where
