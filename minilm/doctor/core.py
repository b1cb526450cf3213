"""Checks, findings, and the two things done with them: examine a subject, prove the checks.

A check is a function of a `Subject` in a file of `checks/`, with the bugs that it exists for planted beside it:

    @check(group="model", needs=("forward",), cost="4 forwards", quick=True)
    def causality(subject: Subject) -> Finding: ...

    @causality.plant("mask-missing", component="attention")     # an id of the catalogue; must be found by that name
    def _() -> Subject: ...

    @causality.healthy("sliding window of 8")                   # looks odd, is right: must stay silent
    def _() -> Subject: ...
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from minilm.doctor.subject import NEEDS, Subject

Status = Literal["PASS", "FAIL", "NOT RUN"]
Group = Literal[
    "data", "loss", "model", "training", "distributed", "checkpoint", "evaluation", "memory", "oracle"
]


class NotApplicable(Exception):
    """Raised inside a check: why it cannot say anything about this subject. Becomes NOT RUN."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    measured, threshold  the number that decided, and its limit, both in `unit`
    bugs        on FAIL: ids of the catalogue that this looks like, the likeliest first
    component   on FAIL: where, as narrow as it could be found (a module's name, a function, a stage)
    advice      on FAIL: what to change
    details     further numbers, for the page and the JSON
    """

    status: Status
    message: str
    measured: float | None = None
    threshold: float | None = None
    unit: str = ""
    bugs: tuple[str, ...] = ()
    component: str = ""
    advice: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    check: str = ""
    group: str = ""
    seconds: float = 0.0

    @property
    def margin(self) -> float | None:
        """How far from the threshold, as a factor: 1 is on it; large is clear, on either side."""
        if self.measured is None or self.threshold is None:
            return None
        small, large = sorted((abs(self.measured), abs(self.threshold)))
        return math.inf if small == 0 else large / small


def passed(
    message: str, measured: float | None = None, threshold: float | None = None, **more: Any
) -> Finding:
    """A PASS; say in `message` what was seen, not that all is well."""
    return Finding("PASS", message, measured, threshold, **more)


def failed(
    message: str,
    measured: float | None = None,
    threshold: float | None = None,
    *,
    bugs: Sequence[str],
    component: str,
    advice: str,
    **more: Any,
) -> Finding:
    """A FAIL. `bugs` are ids of the catalogue."""
    return Finding(
        "FAIL", message, measured, threshold, bugs=tuple(bugs), component=component, advice=advice, **more
    )


@dataclass(frozen=True)
class Planted:
    """A bug of the catalogue, built into an otherwise healthy subject."""

    bug: str
    component: str  # what the finding's component must contain
    what: str
    make: Callable[[], Subject]


@dataclass(frozen=True)
class Healthy:
    """A subject that looks odd and is right."""

    what: str
    make: Callable[[], Subject]


class Check:
    """A check function with its needs, its planted bugs and its healthy look-alikes. Made by `check`."""

    def __init__(
        self,
        function: Callable[[Subject], Finding],
        group: Group,
        needs: tuple[str, ...],
        cost: str,
        quick: bool,
    ) -> None:
        self.function, self.group, self.needs, self.cost, self.quick = function, group, needs, cost, quick
        self.name = function.__name__
        self.text = (importlib.import_module(function.__module__).__doc__ or "").strip()
        self.plants: list[Planted] = []
        self.look_alikes: list[Healthy] = []

    def __repr__(self) -> str:
        return f"<check {self.name}>"

    def plant(self, bug: str, *, component: str, what: str = "") -> Callable[[Callable[[], Subject]], None]:
        """Decorates a function that builds a subject with this bug."""

        def add(make: Callable[[], Subject]) -> None:
            self.plants.append(Planted(bug, component, what, make))

        return add

    def healthy(self, what: str) -> Callable[[Callable[[], Subject]], None]:
        """Decorates a function that builds a subject that must pass."""

        def add(make: Callable[[], Subject]) -> None:
            self.look_alikes.append(Healthy(what, make))

        return add

    def __call__(self, subject: Subject) -> Finding:
        """Run it. Never raises for what the subject does: a subject that cannot be run is NOT RUN, with the reason."""
        start = time.perf_counter()
        finding = self._run(subject)
        return replace(finding, check=self.name, group=self.group, seconds=time.perf_counter() - start)

    def _run(self, subject: Subject) -> Finding:
        if reason := subject.exceptions.get(self.name):
            return Finding("NOT RUN", reason)
        if lacking := subject.lacks(self.needs):
            names = [NEEDS.get(need, NEEDS.get(need.split(".")[0], need)) for need in lacking]
            return Finding("NOT RUN", f"needs {', '.join(dict.fromkeys(names))}")
        try:
            return self.function(subject)
        except NotApplicable as reason:
            return Finding("NOT RUN", str(reason))
        except Exception as error:  # noqa: BLE001  (foreign code: whatever it raises is shown, never passed)
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}".strip()
            return Finding(
                "NOT RUN",
                f"could not be done: {text[:300]} ({where.filename}:{where.lineno})",
                details={"traceback": traceback.format_exc()},
            )


def check(
    *, group: Group, needs: tuple[str, ...], cost: str, quick: bool = False
) -> Callable[[Callable[[Subject], Finding]], Check]:
    """Make a check of a function. `quick`: part of the quick suite, which runs before each training run."""

    def make(function: Callable[[Subject], Finding]) -> Check:
        return Check(function, group, needs, cost, quick)

    return make


def checks() -> list[Check]:
    """All checks, in the order of groups and names. A module of `checks/` is a file with one or more of them."""
    from minilm.doctor import checks as folder

    found: list[Check] = []
    for module in sorted(pkgutil.iter_modules(folder.__path__), key=lambda m: m.name):
        content = vars(importlib.import_module(f"{folder.__name__}.{module.name}"))
        found += [value for value in content.values() if isinstance(value, Check)]
    order = list(Group.__args__)  # type: ignore[attr-defined]
    return sorted(dict.fromkeys(found), key=lambda c: (order.index(c.group), c.name))


def select(suite: str = "full", only: Iterable[str] = ()) -> list[Check]:
    """The checks of a suite (quick, full), or those named in `only` (checks, groups). ValueError for unknown names."""
    every = checks()
    wanted = list(only)
    if not wanted:
        return [c for c in every if suite == "full" or c.quick]
    known = {c.name for c in every} | {c.group for c in every}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [c for c in every if c.name in wanted or c.group in wanted]


def run_checks(subject: Subject, chosen: Iterable[Check]) -> Iterator[Finding]:
    """Findings one by one, as they come. Random states and modes of the subject are as before after each."""
    from minilm.doctor.probes import untouched

    try:
        for one in chosen:
            with untouched(subject):
                finding = one(subject)
            yield finding
    finally:
        subject.spare.clear()
