"""What a silent bug says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from unseen.plain import Kit


@dataclass(frozen=True)
class Bug:
    """A mistake and the `Kit` that has it: `bug.plant(Kit())`.

    `settings` and `packed` are a set-up in which it does harm; `when` says in words what it takes.
    """

    id: str
    part: str
    severity: str  # high: results are wrong; medium: training or numbers are worse; low: small
    mistake: str
    symptom: str
    when: str
    plant: Callable[[Kit], Kit]
    settings: dict[str, Any] = field(default_factory=dict)
    packed: bool = True


def bug(id: str, **about) -> Callable[[Callable[[Kit], Kit]], Bug]:
    """Makes a `Bug` of the function that plants it."""
    return lambda plant: Bug(id=id, plant=plant, **about)
