"""Saving while training goes on: the run waits for a copy in memory, a thread of the first rank does the rest.

    save(state)   every rank: gather weights and moments, copy them into host memory, write the random states
                  aside; then a thread writes, checksums, syncs and renames, and removes what is not kept any more
    poll()        at each step border: has the thread ended, and how?
    wait()        until it has; raises on every rank if it failed

What is written is the state at the time of `save`, byte for byte what a save without a thread writes. The thread
touches neither the device, nor the other ranks, nor the log: those belong to the thread that trains.

Cost: the first rank keeps the copies from the first save to the end of the run, 12 bytes of host memory per parameter
(16 with an average of the weights). They are kept because new memory costs more time than the copying does.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from minilm.errors import CheckpointError
from minilm.training import checkpoint
from minilm.training.layout import Layout
from minilm.training.settings import TrainConfig


class Saver:
    """Writes the checkpoints of one run, one at a time. As a context: leaving it waits for the last one.

    event(step, text, **values)  puts a line into the log; "saved step-N" appears when the checkpoint has its name
    Every method but `close` is collective.
    """

    def __init__(
        self,
        layout: Layout,
        folder: Path,
        config: TrainConfig,
        *,
        tokenizer: Callable[[Path], object] | None,
        event: Callable[..., None],
    ) -> None:
        self.layout, self.folder, self.config = layout, folder, config
        self.tokenizer, self.event = tokenizer, event
        self._copies = _Copies()
        self._pending: checkpoint.Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._wanted = True
        self._waited = self._written = 0.0  # seconds of the pending save

    def prepare(self, num_steps: int) -> None:
        """Before the first step: the folder can be written and has room; leftovers of earlier kills are removed.

        Raises CheckpointError on every rank.
        """
        with checkpoint.together(self.layout, f"{self.folder} cannot take the checkpoints of this run"):
            if self.layout.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                probe = self.folder / ".probe"
                probe.write_bytes(b"")
                probe.unlink()
                checkpoint.clean(self.folder)
                number = sum(p.numel() for p in self.layout.model.parameters())
                size = checkpoint.bytes_needed(number, average=self.layout.average is not None)
                refuse_small_disk(self.folder, self.config, num_steps=num_steps, checkpoint_bytes=size)

    def save(self, state: dict[str, Any]) -> None:
        """Save the run as it is now; returns when it may go on. An earlier save is waited for first."""
        self.wait()
        start = time.perf_counter()
        background = self.config.save_in_background
        self._error, self._written = None, 0.0
        self._pending = taken = checkpoint.snapshot(
            self.layout,
            self.folder,
            state,
            tokenizer=self.tokenizer,
            keep=self._copies if background else None,
        )
        if self.layout.is_main and background:
            # A daemon: the second Ctrl-C ends the process at once, and what lies aside is no checkpoint.
            self._thread = threading.Thread(
                target=self._write, args=(taken,), name="minilm-save", daemon=True
            )
            self._thread.start()
        elif self.layout.is_main:
            self._write(taken)
        self._waited = time.perf_counter() - start
        if not background:
            self.wait()

    def poll(self) -> None:
        """Take note of a save that has ended. Raises CheckpointError on every rank if it failed."""
        if self._pending is None:
            return
        alive = self._thread is not None and self._thread.is_alive()
        if not self.layout.all_reduce([float(alive)])[0]:
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written. Raises CheckpointError on every rank if a save failed."""
        if self._pending is None:
            return
        start = time.perf_counter()
        self._join()
        taken, self._pending = self._pending, None
        with checkpoint.together(self.layout, f"The checkpoint {taken.final} could not be written"):
            if self._error is not None:
                raise self._error
        self._waited += time.perf_counter() - start
        self._tell(taken)

    def close(self) -> None:
        """Let this process's thread end, whatever the other ranks do; for a run that is failing already."""
        taken, self._pending = self._pending, None
        if taken is None or not self.layout.is_main:
            return
        self._join()
        with contextlib.suppress(CheckpointError):  # the full disk that ends the run refuses this line, too
            if self._error is None:
                self._tell(taken)
            else:
                text = f"the checkpoint {taken.final} could not be written: {self._error}"
                self.event(taken.record["step"], text, show=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, KeyboardInterrupt):
            self._wanted = False  # "end at once"
        else:
            self.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, taken: checkpoint.Snapshot) -> None:
        start = time.perf_counter()
        try:
            taken.write(lambda: self._wanted)
            checkpoint.prune(self.folder, keep_last=self.config.keep_last, keep_best=self.config.keep_best)
        except (OSError, SafetensorError, CheckpointError) as error:
            self._error = _with_the_newest_whole_one(error, self.folder)
        except BaseException as error:  # noqa: BLE001  (a defect: raised by `wait`, not lost in a thread)
            self._error = error
        self._written = time.perf_counter() - start

    def _tell(self, taken: checkpoint.Snapshot) -> None:
        seconds = {"seconds_waited": self._waited, "seconds_writing": self._written}
        self.event(taken.record["step"], f"saved {taken.final.name}", **seconds)


def most_at_once(config: TrainConfig, num_steps: int) -> int:
    """Checkpoints of a run that lie on the disk together: those kept, and the next, written before one goes."""
    saves = math.ceil(num_steps / config.save_every) if config.save_every else 1
    return min(saves, config.keep_last + int(config.keep_best) + 1)


def refuse_small_disk(folder: Path, config: TrainConfig, *, num_steps: int, checkpoint_bytes: int) -> None:
    """CheckpointError if the checkpoints of the run will not fit: found now, not after hours.

    Those that are in `folder` already, from before a resume, are counted as they are.
    """
    most = most_at_once(config, num_steps)
    missing = max(1, most - len(checkpoint.list_checkpoints(folder)))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < missing * checkpoint_bytes:
        raise CheckpointError(
            f"A checkpoint takes about {checkpoint_bytes / 1e6:,.1f} MB and up to {most} lie there at once "
            f"(train.keep_last {config.keep_last}, train.keep_best {str(config.keep_best).lower()}, and the one being "
            f"written): {missing * checkpoint_bytes / 1e6:,.1f} MB are needed, {folder} has {free / 1e6:,.1f} MB free. "
            "Free space, keep fewer, or choose another place with run.folder."
        )


class _Copies:
    """keep(name, tensor) -> its copy in host memory, in the same place at each save."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return buffer.copy_(tensor.detach())


def _with_the_newest_whole_one(error: Exception, folder: Path) -> CheckpointError:
    kept = checkpoint.list_checkpoints(folder)
    newest = f"; {kept[-1].folder.name} is the newest one that is complete" if kept else ""
    return CheckpointError(f"{str(error).rstrip('.')}{newest}")
