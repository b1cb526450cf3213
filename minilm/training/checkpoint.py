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
from torch import Tensor, nn

from minilm.errors import CheckpointError, listed
from minilm.models import folder as model_folder
from minilm.training import state as state_by_name
from minilm.training.layout import Layout

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_SAVING, _REMOVING = ".saving-", ".removing-"  # names that no reader takes for a checkpoint


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
        files = json.loads((folder / "files.json").read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["blake2b"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"files.json cannot be read ({type(error).__name__}: {error})"]
    problems = []
    for name, (size, blake2b) in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif checksums and _checksum(file) != blake2b:
            problems.append(f"{name} has another checksum than when it was written")
    return problems


@dataclass(frozen=True)
class Snapshot:
    """A run at a step border, ready to be written. The first rank has all of it, the others only its place.

    `weights`, `moments`  by parameter name, float32
    `record`              trainer.json
    """

    final: Path
    model: nn.Module  # names and shapes are taken from it, and its settings: nothing that training changes
    weights: dict[str, Tensor]
    moments: state_by_name.OptimizerState
    record: dict[str, Any]
    tokenizer: Callable[[Path], object] | None

    @property
    def aside(self) -> Path:
        return self.final.with_name(f"{_SAVING}{self.final.name}")

    def write(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """Write, seal and rename; the random states are there already. First rank only, on any thread.

        wanted  asked before the rename: a save that nobody waits for any more leaves no checkpoint
        Raises OSError, SafetensorError or CheckpointError; then there is no checkpoint, and what lay aside is gone.
        """
        try:
            model_folder.save(self.model, self.aside, self.weights)
            self.moments.write(self.aside)
            if self.tokenizer is not None:
                self.tokenizer(self.aside / "tokenizer")
            text = json.dumps(self.record, indent=1) + "\n"
            (self.aside / "trainer.json").write_text(text, encoding="utf-8")
            _seal(self.aside)
            if not wanted():
                return
            _replace(self.aside, self.final)
        finally:
            shutil.rmtree(self.aside, ignore_errors=True)  # half of it must not keep a full disk full


def snapshot(
    layout: Layout,
    folder: Path,
    state: dict[str, Any],
    *,
    tokenizer: Callable[[Path], object] | None,
    random_state: dict[str, Any] | None = None,
    keep: Callable[[str, Tensor], Tensor] | None = None,
) -> Snapshot:
    """What `folder`/step-N will hold, N = state["step"]. Collective: every rank calls it, every rank sees a failure.

    random_state  what `random_states` returned at an earlier moment; none: as it is now. Every rank writes its own
                  aside at once, so that it is of this moment.
    keep          (name, tensor) -> a copy of it that training does not change; none: the tensor itself, for a
                  snapshot that is written before anything else is computed
    """
    final = folder / f"step-{state['step']:08d}"
    # What all ranks gather together comes before what one of them may fail at.
    weights, moments = state_by_name.full_weights(layout), state_by_name.optimizer_state(layout)
    if not layout.is_main:
        weights, moments = {}, state_by_name.OptimizerState({}, {})
    elif keep is not None:
        weights = {name: keep(f"weights/{name}", value) for name, value in weights.items()}
        moments = moments.copied(keep)
    record = {"format": FORMAT, **state, "layout": layout.facts()}
    taken = Snapshot(final, layout.model, weights, moments, record, tokenizer)
    with together(layout, f"The checkpoint {final} could not be written"):
        if layout.is_main:
            shutil.rmtree(taken.aside, ignore_errors=True)
            taken.aside.mkdir(parents=True)
    with together(layout, f"The checkpoint {final} could not be written"):
        # torch.save to a full disk names an "unexpected pos"; a plain write says what it is
        states = io.BytesIO()
        torch.save(random_state or random_states(layout.device), states)
        (taken.aside / f"random-{layout.rank:05d}.pt").write_bytes(states.getvalue())
    return taken


def save(
    layout: Layout,
    folder: Path,
    state: dict[str, Any],
    *,
    tokenizer: Callable[[Path], object] | None,
    random_state: dict[str, Any] | None = None,
) -> Path:
    """Take a `snapshot` and write it while everybody waits; returns its folder. Collective."""
    taken = snapshot(layout, folder, state, tokenizer=tokenizer, random_state=random_state)
    with together(layout, f"The checkpoint {taken.final} could not be written"):
        if layout.is_main:
            taken.write()
    return taken.final


def clean(folder: Path) -> list[str]:
    """Remove what kills left below a `checkpoints/` folder: half a save, half a removal. Returns the names.

    Only for whoever holds the run folder, before its first save.
    """
    gone = sorted(folder.glob(f"{_SAVING}*")) + sorted(folder.glob(f"{_REMOVING}*"))
    for path in gone:
        shutil.rmtree(path)
    return [path.name for path in gone]


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
    scored = [(loss, c.folder) for c in found if (loss := _validation_loss(c)) is not None]
    if keep_best and scored:
        keep.add(min(scored)[1])
    gone = [checkpoint.folder for checkpoint in found if checkpoint.folder not in keep]
    for path in gone:
        _remove(path)
    return gone


def _validation_loss(found: Found) -> float | None:
    """None also for a damaged checkpoint: it is not the best of a run, and no reason to end it."""
    try:
        return found.trainer.get("validation_loss")
    except (OSError, ValueError):
        return None


def _remove(path: Path) -> None:
    doomed = path.with_name(f"{_REMOVING}{path.name}")  # half a removal must not look like a checkpoint
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _replace(aside: Path, final: Path) -> None:
    """Give `aside` its name. A folder of that name (the same step again, after a resume) goes without a trace."""
    former = final.with_name(f"{_REMOVING}{final.name}")
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)
        final.rename(former)
    aside.rename(final)
    _sync(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def bytes_needed(num_parameters: int, *, average: bool = False) -> int:
    """Size of one checkpoint: float32 weights, the two moments of AdamW and, where there is one, the average."""
    return (4 if average else 3) * 4 * num_parameters


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
        why = str(failure or "another rank failed").rstrip(".")
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
