"""How far each planned run is, read from its own files: nothing else is remembered, so nothing else can be wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minilm import manifest
from minilm.errors import ConfigError, listed
from minilm.experiments.listing import look
from minilm.sweeping.definition import Planned, Sweep

NEW = "new"
WORDS = {  # state of the run's folder -> what a sweep does
    NEW: "start",
    "finished": "skip",
    "interrupted": "go on",
    "died": "go on",
    "failed": "try again",
    "running": "leave: it runs",
    "damaged": "try again",
}
# They change how a run is shown or where it lies, not what comes out.
_FREE = ("run.", "track.", "data.prefetch")


@dataclass(frozen=True)
class Standing:
    """A planned run and the state of its folder (of `minilm runs`, or "new")."""

    run: Planned
    state: str
    why: str = ""

    @property
    def is_due(self) -> bool:
        return self.state not in ("finished", "running")


def standing(run: Planned) -> Standing:
    """Look at the folder of one run."""
    if not (run.folder / manifest.FILE).exists():
        return Standing(run, NEW)
    row = look(run.folder, now=time.time())
    return Standing(run, row.state, row.why)


def standings(sweep: Sweep) -> list[Standing]:
    """All runs. Raises ConfigError where a folder has a run of other settings than this definition asks for."""
    found = [standing(run) for run in sweep.runs]
    problems = [text for one in found if one.state != NEW for text in _changed(one)]
    if problems:
        raise ConfigError(
            listed(problems)
            + f"\nThe definition was changed after these runs began. Give another `folder` in {sweep.file} and keep "
            "them, or remove their folders to have them again."
        )
    return found


def strangers(sweep: Sweep) -> list[str]:
    """Names of runs in the folder that this definition does not ask for: left alone, and not in the table."""
    ours = {run.name for run in sweep.runs}
    if not sweep.folder.is_dir():
        return []
    places = sorted(path for path in sweep.folder.iterdir() if (path / manifest.FILE).is_file())
    return [path.name for path in places if path.name not in ours]


def _changed(one: Standing) -> Iterator[str]:
    if one.state == "damaged":
        return
    record = manifest.Manifest.read(one.run.folder).record
    had: dict[str, Any] = record.get("config") or {}
    wanted: dict[str, Any] = json.loads(json.dumps(one.run.settings, default=str))  # as the manifest has it
    # A setting that only one of the two has came or went with a version of the program.
    differing = [
        f"{name} was {had[name]}, now {wanted[name]}"
        for name in wanted.keys() & had.keys()
        if had[name] != wanted[name] and not name.startswith(_FREE)
    ]
    if (record.get("data") or {}).get("fingerprint") != one.run.data_fingerprint:
        differing.append(f"its data are no longer those of {wanted.get('data.store')}")
    if differing:
        yield f"{one.run.folder} ({one.state}): {'; '.join(sorted(differing))}."
