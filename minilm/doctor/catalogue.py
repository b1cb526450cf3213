"""The catalogue of silent bugs: what each looks like and where people met it (`catalogue.json`)."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bug:
    """One row. `evidence`: public source, reproduced, met in our own runs, known from practice."""

    id: str
    number: int
    group: str
    symptom: str
    source: str
    evidence: tuple[str, ...]
    urls: tuple[str, ...]
    left_out: str = ""  # why no check plants it

    @property
    def where(self) -> str:
        """Where others met it: the first public address, or the source in words."""
        return self.urls[0] if self.urls else self.source or ", ".join(self.evidence)


@functools.cache
def bugs() -> dict[str, Bug]:
    """id -> row, in the order of the catalogue."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    rows = (
        Bug(**{**row, "evidence": tuple(row["evidence"]), "urls": tuple(row["urls"])})
        for row in json.loads(text)
    )
    return {row.id: row for row in rows}


def symptom(bug: str) -> str:
    """What one sees of it; the id itself for one that the catalogue does not have."""
    known = bugs().get(bug)
    return known.symptom if known else bug
