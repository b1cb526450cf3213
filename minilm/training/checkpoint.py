"""Checkpoints: written aside, synced, checksummed, renamed; found, verified, resumed.

    checkpoints/step-00000500/
        model.safetensors  model.json     float32 weights and the model's settings: enough to evaluate or generate
        tokenizer/                        a Hugging Face folder
        optimizer.safetensors             optimizer state by parameter name, the same for every layout
        random-00000.pt                   random states, one file per rank
        trainer.json                      step, tokens, position in the data, how the run was spread
        files.json                        size and checksum of each file, written last

A folder is a checkpoint when it has its final name and every file is as files.json says.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from minilm.errors import CheckpointError, listed
from minilm.models import folder as model_folder
from minilm.training import state as state_by_name
from minilm.training.layout import Layout

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk."""

    folder: Path
    step: int

    @property
    def trainer(self) -> dict[str, Any]:
        return json.loads((self.folder / "trainer.json").read_text(encoding="utf-8"))


def list_checkpoints(folder: Path) -> list[Found]:
    """The complete checkpoints below a run's `checkpoints/` folder, oldest first."""
    found = [
        Found(path, int(match[1]))
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and (path / "files.json").is_file()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find(path: Path, *, verified: bool = True) -> tuple[Found, list[str]]:
    """The newest undamaged checkpoint at `path` (a run folder, its checkpoints/ or one checkpoint).

    Returns it with a line for each damaged one that was passed over. Raises CheckpointError if there is none.
    """
    if (path / "files.json").is_file() and (path / "trainer.json").is_file():
        match = _NAME.fullmatch(path.name)
        candidates = [
            Found(path, int(match[1]) if match else json.loads((path / "trainer.json").read_text())["step"])
        ]
    else:
        candidates = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not candidates:
        what = (
            "is not a folder"
            if not path.is_dir()
            else "holds no complete checkpoint (folders step-... with files.json)"
        )
        raise CheckpointError(f"{path} {what}. Give a run folder or one of its checkpoints.")
    damaged: list[str] = []
    for candidate in reversed(candidates):
        problems = damage(candidate.folder, checksums=verified)
        if not problems:
            return candidate, damaged
        damaged.append(f"{candidate.folder}: {'; '.join(problems)}")
    raise CheckpointError(f"No undamaged checkpoint in {path}. {listed(damaged)}")


def damage(folder: Path, *, checksums: bool = True) -> list[str]:
    """What differs from files.json; empty when the checkpoint is whole."""
    try:
        expected = json.loads((folder / "files.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"files.json cannot be read ({error})"]
    problems = []
    for name, entry in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
        elif checksums and _checksum(file) != entry["blake2b"]:
            problems.append(f"{name} has another checksum than when it was written")
    return problems


def save(
    layout: Layout,
    folder: Path,
    state: dict[str, Any],
    *,
    tokenizer: Callable[[Path], object] | None,
    random_state: dict[str, Any] | None = None,
) -> Path:
    """Write checkpoints/step-N for N = state["step"]. Collective: every rank calls it, every rank sees a failure.

    random_state  what `random_states` returned at an earlier moment; none: as it is now
    """
    final = folder / f"step-{state['step']:08d}"
    aside = folder / f".saving-{final.name}"
    # What all ranks gather together comes before what one of them may fail at.
    weights, moments = state_by_name.full_weights(layout), state_by_name.optimizer_state(layout)
    with together(layout, f"The checkpoint {final} could not be written"):
        if layout.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    with together(layout, f"The checkpoint {final} could not be written"):
        states = (
            io.BytesIO()
        )  # torch.save to a full disk names an "unexpected pos"; a plain write says what it is
        torch.save(random_state or random_states(layout.device), states)
        (aside / f"random-{layout.rank:05d}.pt").write_bytes(states.getvalue())
        if layout.is_main:
            model_folder.save(layout.model, aside, weights)
            moments.write(aside)
            if tokenizer is not None:
                tokenizer(aside / "tokenizer")
            record = {"format": FORMAT, **state, "layout": layout.facts()}
            (aside / "trainer.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with together(layout, f"The checkpoint {final} could not be written"):
        if layout.is_main:
            _seal(aside)
            if final.exists():  # the same step again, after a resume that was stopped at once
                shutil.rmtree(final)
            aside.rename(final)
            _sync(folder)
    return final


def load(layout: Layout, checkpoint: Found) -> dict[str, Any]:
    """Optimizer and random states into a prepared layout, whatever layout wrote them; returns trainer.json.

    The weights of an unsharded model are already in it (models.folder.load_weights); ZeRO's master copies are
    set here. Collective.
    """
    weights = load_file(checkpoint.folder / model_folder.WEIGHTS)
    state_by_name.load(layout, checkpoint.folder, weights)
    own = checkpoint.folder / f"random-{layout.rank:05d}.pt"
    if own.is_file():  # more ranks than when it was saved: the new ones keep their fresh seeds
        set_random_states(torch.load(own, map_location="cpu", weights_only=True), layout.device)
    return checkpoint.trainer


def prune(folder: Path, *, keep_last: int, keep_best: bool) -> list[Path]:
    """Remove all but the last `keep_last` checkpoints and the one with the lowest validation loss."""
    found = list_checkpoints(folder)
    keep = {checkpoint.folder for checkpoint in found[-keep_last:]}
    scored = [(loss, c.folder) for c in found if (loss := c.trainer.get("validation_loss")) is not None]
    if keep_best and scored:
        keep.add(min(scored)[1])
    gone = [checkpoint.folder for checkpoint in found if checkpoint.folder not in keep]
    for path in gone:
        doomed = path.with_name(f".removing-{path.name}")  # half a removal must not look like a checkpoint
        path.rename(doomed)
        shutil.rmtree(doomed)
    return gone


def bytes_needed(num_parameters: int) -> int:
    """Size of one checkpoint: float32 weights and the two moments of AdamW."""
    return 3 * 4 * num_parameters


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of every random generator that training could use, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss],
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextlib.contextmanager
def together(layout: Layout, what: str) -> Any:
    """Run a piece that may fail on one rank; if it did, every rank raises instead of waiting for ever."""
    failure: Exception | None = None
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        failure = error
    if layout.all_reduce([float(failure is not None)])[0] > 0:
        why = failure or "another rank failed"
        raise CheckpointError(
            f"{what}: {why}. Free space or mend the folder, then continue with --resume."
        ) from failure


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blake2b": _checksum(path)}
        for path in files
    }
    (folder / "files.json").write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n")
    for path in [*files, folder / "files.json", *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    """Through to the disk: a rename must not overtake the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
