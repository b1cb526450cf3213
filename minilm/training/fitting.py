"""`train.micro_batch: auto`: the most rows of one forward that fit into memory, found at the start of a run.

Tried are the numbers that divide a rank's rows of a step, from the largest down. Which rows are in a step, and so every
number of the run, does not depend on the answer but by rounding: it may be found anew at each start.

CUDA  The estimate by the shapes says where to begin, with as much optimism as it may be wrong. Then forward and
      backward of a step are done on the device, on a model of their own, beside room for the optimizer and a reserve.
      What does not fit raises, is caught, and the next smaller number is tried. Blocks are not compiled for that:
      compiled ones keep less.
CPU   Nothing can be tried: where memory ends, the system kills the process. The estimate alone decides, and may fill
      no more than a share of what is free (available memory or the rest of the container's limit, whichever is less,
      divided by the processes on the machine).

Ranks may find different numbers; the smallest is taken by all.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from minilm import models
from minilm.alignment import Batch
from minilm.errors import ConfigError, OutOfMemory
from minilm.models.base import ModelConfig
from minilm.training import passing
from minilm.training.estimate import Memory
from minilm.training.layout import Layout
from minilm.training.objective import Objective
from minilm.training.passing import Recompute

# Of free memory on a CPU. The estimate counts tensors, to 15 %; with the allocator's gaps and the threads' own buffers
# a process grew by 1.2 to 1.3 times as much (reference size, 4 and 8 x 512).
CPU_SHARE = 0.7
_FILES = ("inactive_file", "active_file")  # in memory.stat of a control group
OPTIMISM = (
    1.15  # an estimate above the free memory of a CUDA device by as much as it may be wrong is still tried
)
RESERVE = (
    0.05  # of a CUDA device's memory: communication, gaps between tensors, kernels with buffers of their own
)
# Told where not even one row fits: what is large in a model, and what makes it smaller.
ADVICE = (
    "Less memory take: train.activation_checkpointing half or blocks, a shorter data.sequence_length, a smaller "
    "model.size, more ranks with ZeRO. --train.micro_batch=1 tries it all the same."
)


@dataclass(frozen=True)
class Room:
    """Memory that this process may take, in bytes, and whose it is."""

    free: int
    where: str


@dataclass(frozen=True)
class Fit:
    """rows of one forward, and how they were found, for people."""

    rows: int
    told: str


def largest(
    layout: Layout,
    needed: Callable[[int], Memory],
    room: Room,
    fits: Callable[[int], bool] | None,
    *,
    beside: int = 0,
) -> Fit:
    """The largest divisor of this rank's rows that fits on all ranks. Collective.

    needed  rows of a forward -> estimate for one device
    fits    tries so many rows on the device; None where nothing can be tried
    beside  bytes that the run takes when no step is done, and that `needed` does not know
    Raises OutOfMemory, on all ranks, where not even one row fits on one of them, and ConfigError for a model whose
    memory nobody has derived, where nothing can be tried either.
    """
    rank_rows = layout.micro_batch * layout.accumulation
    sizes = [rows for rows in range(rank_rows, 0, -1) if rank_rows % rows == 0]
    peaks = {rows: needed(rows).peak for rows in sizes}
    limit = room.free * (CPU_SHARE if fits is None else OPTIMISM)
    if fits is None and peaks[1] is None:
        raise ConfigError(
            "train.micro_batch auto goes by the memory of a model, and nobody has derived that of this one "
            "(minilm/training/estimate.py). Give the number of rows per forward: --train.micro_batch=4, for instance."
        )
    likely = [rows for rows in sizes if (peak := peaks[rows]) is None or peak + beside <= limit]
    if fits is not None:  # one row is tried whatever the estimate says: the device knows better
        likely = list(itertools.islice(filter(fits, likely or [1]), 1))
    own = likely[0] if likely else 0
    rows = min(_of_all_ranks(layout, own))
    if rows == 0:
        raise OutOfMemory(_nothing_fits(needed(1), room, beside, tried=fits is not None, here=own == 0))
    return Fit(rows, _told(rows, rank_rows, peaks[rows], beside, room, tried=fits is not None, own=own))


def _of_all_ranks(layout: Layout, own: int) -> list[int]:
    """What each rank found: sums are what a layout can do, so every rank fills its own place."""
    found = [0.0] * layout.world_size
    found[layout.rank] = float(own)
    return [int(rows) for rows in layout.all_reduce(found)]


def _told(
    rows: int, rank_rows: int, peak: int | None, beside: int, room: Room, *, tried: bool, own: int
) -> str:
    how = "tried on the device" if tried else f"by the estimate, within {CPU_SHARE:.0%} of what is free"
    size = "not known" if peak is None else f"{(peak + beside) / 1e9:.2f} GB"
    here = f"; this rank alone would take {own}" if own != rows else ""
    return (
        f"train.micro_batch auto: {rows} of a rank's {rank_rows} rows per forward ({how}; by the shapes {size}, "
        f"{room.free / 1e9:.2f} GB free: {room.where}{here})"
    )


def _nothing_fits(one: Memory, room: Room, beside: int, *, tried: bool, here: bool) -> str:
    if not here:
        return f"train.micro_batch auto: not even one row fits on another rank. {ADVICE}"
    named = {**one.parts(), "copy while a checkpoint is written": beside}
    shown = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in named.items() if value)
    total = "not known" if one.peak is None else f"{(one.peak + beside) / 1e9:.3g}"
    share = "it was tried and did not fit" if tried else f"of which a run may take {CPU_SHARE:.0%}"
    return (
        f"train.micro_batch auto: not even one row per forward fits. GB by the shapes: {shown}; at once at most "
        f"{total}. Free are {room.free / 1e9:.3g} GB ({room.where}), {share}. {ADVICE}"
    )


# ---------------------------------------------------------------- what is free


def room_of(layout: Layout) -> Room:
    """What this process may take, now."""
    if layout.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(layout.device)
        return Room(int(free), f"of {torch.cuda.get_device_name(layout.device)}")
    return cpu_room(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cpu_room(
    processes: int, *, groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Room:
    """One of `processes` equal parts of what is free: of the machine, or of the container's limit if that is less.

    groups, own  where Linux tells of control groups, and of those of this process; absent elsewhere
    """
    free, where = psutil.virtual_memory().available, "available on this machine"
    for left in _group_rooms(groups, own):
        if left < free:
            free, where = left, "left of the limit of the control group (container)"
    if processes > 1:
        where = f"{where}, for each of {processes} processes"
    return Room(max(0, free) // processes, where)


def _group_rooms(groups: Path, own: Path) -> Iterator[int]:
    """Bytes left below each memory limit that this process is under: of its own groups and of all above them."""
    if not own.is_file():
        return
    for line in own.read_text(encoding="utf-8").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":  # version 2
            root, names = groups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Inside of a container its own group is often mounted as the root, whatever its name is outside.
        parts = Path(place.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            left = _left(root.joinpath(*parts[:depth]), *names)
            if left is not None:
                yield left


def _left(group: Path, limit: str, used: str) -> int | None:
    """None without a limit. Pages of files are given up when memory is needed, so they do not count as used."""
    try:
        most, now = (group / limit).read_text().strip(), int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if most == "max":
        return None
    kept = "total_" if f"total_{_FILES[0]}" in stat else ""  # version 1 counts the groups below apart
    return int(most) - now + sum(int(stat.get(f"{kept}{name}", 0)) for name in _FILES)


# ---------------------------------------------------------------- the trial


@contextlib.contextmanager
def trial(
    layout: Layout,
    config: ModelConfig,
    needed: Callable[[int], Memory],
    batch_of: Callable[[int], Batch],
    *,
    recompute: Recompute,
) -> Iterator[Callable[[int], bool]]:
    """Inside, a function that says whether so many rows fit on the layout's device. Nothing is left behind.

    batch_of  rows -> that many real rows
    The model is another one than the run's: no weight, gradient or random state of the run is touched.
    """
    device = layout.device
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        try:
            objective: list[nn.Module] = []  # emptied before the memory is given back

            def fits(rows: int) -> bool:
                try:
                    if not objective:
                        objective.append(_objective(layout, config, recompute))
                    _step(layout, objective[0], batch_of(rows), needed(rows))
                except torch.OutOfMemoryError:
                    enough = False
                else:
                    enough = True
                # Outside of the handler: its error holds on to the tensors of the frames that it went through.
                for module in objective:
                    module.zero_grad(set_to_none=True)
                _give_back(device)
                return enough

            yield fits
        finally:
            objective.clear()
            _give_back(device)
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)


def _objective(layout: Layout, config: ModelConfig, recompute: Recompute) -> nn.Module:
    model = models.build(config)
    passing.arrange(model, recompute=recompute, compiled=False)
    objective = Objective(model).to(layout.device)
    if layout.kind == "zero" and layout.bf16:
        objective = objective.bfloat16()
    return objective.train()


def _step(layout: Layout, objective: nn.Module, batch: Batch, memory: Memory) -> None:
    """As in `training.step`; twice where a step has several micro-batches: the second one meets gradients."""
    gradients = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    held = [_held(layout, memory.optimizer + memory.average + memory.buckets)]
    held.append(_held(layout, max(0, memory.gradients - gradients)))
    if layout.device.type == "cuda":
        held.append(_held(layout, round(RESERVE * torch.cuda.mem_get_info(layout.device)[1])))
    batch = batch.to(layout.device)
    for _ in range(2 if memory.accumulates else 1):
        with layout.autocast():
            part, extra = objective(batch)
        loss: Any = part.share(float(batch.num_targets()))
        for value in extra.values():
            loss = loss + value
        loss.backward()
    if layout.device.type == "cuda":
        torch.cuda.synchronize(layout.device)


def _held(layout: Layout, size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=layout.device)


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
