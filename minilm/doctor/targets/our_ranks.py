"""Our trainer on several processes: its own layout (DDP over gloo, on the CPU), its own loader, rank by rank.

Each process makes everything itself, from the settings and from weights that are handed over in a folder, as the
processes of a launcher do. A pool of processes serves all checks; it is the one that the specimens use.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from minilm.data.loader import DataConfig, open_data
from minilm.doctor.specimens.ranks import pool
from minilm.doctor.targets.our_data import loader_of
from minilm.doctor.targets.our_training import AS_CONFIGURED, training_of
from minilm.models import folder as model_folder
from minilm.training.optim import OptimConfig
from minilm.training.settings import TrainConfig


def ranks_of(
    data: DataConfig,
    rates: OptimConfig,
    train: TrainConfig,
    make_model: Callable[[int], nn.Module],
    *,
    num_steps: int,
) -> Callable[[Callable[..., Any], int], list[Any]]:
    """A `Subject.ranks` for the settings of a run.

    make_model  seed -> the model with which training begins; the seed is the one of the run
    num_steps   length of the schedule
    """

    def run(function: Callable[..., Any], world: int) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            model_folder.save(make_model(train.seed), Path(folder))
            try:
                return pool(world).run(on_rank, function, data, rates, train, folder, num_steps, _free_port())
            except (RuntimeError, OSError, EOFError):
                pool(world).close()  # one rank may still wait for the other
                pool.cache_clear()
                raise

    return run


def on_rank(
    function: Callable[..., Any],
    data: DataConfig,
    rates: OptimConfig,
    train: TrainConfig,
    folder: str,
    num_steps: int,
    port: int,
) -> Any:
    """function(training, rank, world) in a process of the pool, where the process group stands already."""
    from accelerate.state import AcceleratorState, GradientState

    rank, world = dist.get_rank(), dist.get_world_size()
    loader = loader_of(
        open_data(data), train.batch_size, train.rows_per_forward, seed=train.seed, rank=rank, world=world
    )
    train = dataclasses.replace(train, batch_size=loader.batch_rows, micro_batch=loader.micro_batch)
    make = training_of(
        lambda seed: model_folder.load(Path(folder)), rates, train, num_steps=num_steps,
        batches=loader.step,
    )  # fmt: skip

    def training(
        clip_norm: float | None = AS_CONFIGURED, seed: int = train.seed, num_steps: int = num_steps
    ) -> Any:
        return make(clip_norm=clip_norm, seed=seed, num_steps=num_steps)

    with _launched(rank, world, port):
        try:
            return function(training, rank, world)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


@contextmanager
def _launched(rank: int, world: int, port: int) -> Iterator[None]:
    """The environment that a launcher gives to its processes."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update({name: str(value) for name, value in given.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])
