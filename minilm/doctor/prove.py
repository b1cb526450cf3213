"""Plant every bug, and see it found; offer every healthy look-alike, and see silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from minilm.doctor import specimens
from minilm.doctor.core import Check, Finding, run_checks


@dataclass(frozen=True)
class Proof:
    """One row of the matrix: what was offered to a check, and what it said."""

    check: str
    kind: Literal["bug", "healthy"]
    what: str  # id of the bug, or description of the healthy subject
    component: str  # where the bug was planted
    finding: Finding

    @property
    def right(self) -> bool:
        """A bug is found under its own name; a healthy subject passes."""
        if self.kind == "healthy":
            return self.finding.status == "PASS"
        return self.finding.status == "FAIL" and self.what in self.finding.bugs

    @property
    def placed(self) -> bool:
        """The finding names the component in which the bug was planted."""
        return self.component.lower() in self.finding.component.lower()


def prove(chosen: Iterable[Check]) -> Iterator[Proof]:
    """The proofs of these checks, one by one. A check without a plant is an error (ValueError)."""
    for one in chosen:
        if not one.plants:
            raise ValueError(f"the check {one.name} has no planted bug: it has no reason to exist")
        for healthy in one.look_alikes:
            subject = healthy.make()
            yield Proof(one.name, "healthy", healthy.what, "", next(run_checks(subject, [one])))
        for plant in one.plants:
            subject = plant.make()
            yield Proof(one.name, "bug", plant.bug, plant.component, next(run_checks(subject, [one])))


def healthy_specimen(chosen: Iterable[Check]) -> Iterator[Proof]:
    """Each check on the plain specimen: PASS, or NOT RUN where the specimen lacks what the check needs."""
    for one in chosen:
        yield Proof(
            one.name, "healthy", "the plain specimen", "", next(run_checks(specimens.subject(), [one]))
        )
