"""Before the first step: the quick suite, on the very model, optimizer and data that will train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minilm.doctor.core import Finding, run_checks, select
from minilm.doctor.report import Examination, explained
from minilm.doctor.subject import Subject
from minilm.errors import CheckFailed


def preflight(subject: Subject, *, watch: Callable[[Finding], object] | None = None) -> Examination:
    """Run the quick suite; the subject is as before afterwards. Never raises for what it finds: see `refuse`."""
    findings = []
    for finding in run_checks(subject, select("quick")):
        findings.append(finding)
        if watch is not None:
            watch(finding)
    return Examination(subject.name, "quick", findings)


def refuse(examination: Examination) -> None:
    """Raise CheckFailed, with everything that is known, if a check failed."""
    failures = examination.failures
    if not failures:
        return
    parts = [
        "\n".join(
            [f"  {f.check}", *(f"    {name:<8}{text}" for name, text in explained(f, examination.roots(f)))]
        )
        for f in failures
    ]
    raise CheckFailed(
        f"{len(failures)} of {len(examination.findings)} checks failed before the first step; nothing was trained.\n"
        + "\n".join(parts)
        + "\nTo train all the same: --doctor.check=off, which is written into the manifest and shown with the results."
    )


def summary(examination: Examination) -> dict[str, Any]:
    """What the manifest keeps: counts, seconds, and each finding in a line."""
    return {
        "suite": examination.suite,
        "seconds": round(examination.seconds, 2),
        "counts": {status: len(examination.of(status)) for status in ("PASS", "FAIL", "NOT RUN")},
        "findings": {f.check: f"{f.status}: {f.message}" for f in examination.findings},
    }
