"""Before a run on several processes begins: do all of them mean the same run?

On several machines every process reads its own command line, its own copy of the store and its own disk. What differs
there would not be noticed by the training: ranks would learn from other rows, or with another rate, and the first
checkpoint would fail when it is due. So it is compared at the start. Everything here is collective.
"""

from __future__ import annotations

import hashlib
import random
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minilm.errors import ConfigError, listed
from minilm.training.layout import Layout

PATIENCE_SECONDS = 60.0  # network file systems may show a new file that late to other machines


def same_on_all(layout: Layout, facts: Mapping[str, Any]) -> None:
    """Raises ConfigError on every rank if a fact of one differs from the first rank's."""
    if layout.world_size == 1:
        return
    names = sorted(facts)
    _refuse(
        layout, facts, ["the names of the settings"], [repr(names)]
    )  # before vectors of unequal length meet
    _refuse(layout, facts, names, [repr(facts[name]) for name in names])


def _refuse(layout: Layout, facts: Mapping[str, Any], names: list[str], values: list[str]) -> None:
    own = [_number(value) for value in values]
    first = _from_first(layout, own)
    differing = layout.all_reduce([float(a != b) for a, b in zip(own, first, strict=True)])
    if not any(differing):
        return
    problems = [
        f"{name} (here {facts[name]!r})." if name in facts else f"{name}."
        for name, number in zip(names, differing, strict=True)
        if number
    ]
    raise ConfigError(
        "The processes do not mean the same run. Start all machines with the same command, but for machine_rank. "
        f"What differs, with what rank {layout.rank} on {socket.gethostname()} has: {listed(problems)}"
    )


def shares_folder(layout: Layout, file: Path, append: Callable[[str], object]) -> None:
    """Raises ConfigError on every rank if one does not see `file`, which only the first rank writes, by `append`.

    A number of this start is appended, and the others look for it: a file of the same name on a disk of their own
    does not satisfy them.
    """
    if layout.world_size == 1:
        return
    [number] = _from_first(layout, [float(random.SystemRandom().getrandbits(50))])
    mark = f"start {number:.0f}"
    if layout.is_main:
        append(f"\n{mark}\n")
    layout.barrier()
    blind = not layout.is_main and not _appears(mark, file)
    if layout.all_reduce([float(blind)])[0] == 0:
        return
    who = f"Rank {layout.rank} on {socket.gethostname()}" if blind else "Another rank"
    raise ConfigError(
        f"{who} does not see the run folder {file.parent} of the first rank. A checkpoint has a file of each rank, and "
        "all ranks read it on --resume: give a run.folder on a file system that all machines share, by its whole path."
    )


def _appears(mark: str, file: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        if file.is_file() and mark in file.read_text(encoding="utf-8"):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(min(0.2, PATIENCE_SECONDS))


def _from_first(layout: Layout, values: list[float]) -> list[float]:
    """The first rank's values, on every rank."""
    return layout.all_reduce(values if layout.is_main else [0.0] * len(values))


def _number(text: str) -> float:
    """A text as a whole number that a float64 holds exactly."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))
