"""Two processes for the specimens: a trainer that is data parallel over gloo, and the pool that runs it.

The processes are started once, on the first use, and end with the program. They are ordinary interpreters, not forks,
and import nothing from the caller's script: what is run on them must be found in an importable module.
"""

from __future__ import annotations

import atexit
import functools
import os
import secrets
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minilm.doctor.specimens.model import Model, Size
from minilm.doctor.specimens.training import Trainer
from minilm.doctor.subject import Rows, Training

PATIENCE_SECONDS = 120


class RankTrainer(Trainer):
    """Data parallel: weights of rank 0, gradients summed over the ranks, everything over the targets of all."""

    def __init__(self, model: Model, **more: Any) -> None:
        super().__init__(model, **more)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.begin_together()
        torch.manual_seed(self.dropout_seed())

    def begin_together(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                dist.broadcast(parameter, 0)

    def dropout_seed(self) -> int:
        return 1000 + self.rank

    def count(self, micro_batches: list[Rows]) -> float:
        return self.summed(super().count(micro_batches))

    def synchronise(self) -> None:
        for parameter in self.model.parameters():
            dist.all_reduce(parameter.grad)

    def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
        return self.summed(nats) / total

    def summed(self, value: float) -> float:
        """Over the ranks."""
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor)
        return float(tensor)

    def next_rows(self) -> list[Rows]:
        """This rank's share of the global batch."""
        rows = super().next_rows()
        return [part.take(slice(self.shard(), None, self.world)) for part in rows]

    def shard(self) -> int:
        return self.rank


def set_up(
    trainer: type[RankTrainer], size: dict[str, Any], seed: int, rank_seeds: bool = False, **asked: Any
) -> Training:
    """A training set-up on this rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 100 * dist.get_rank() * rank_seeds)
        model = Model(Size(**size))
    return trainer(model, **asked).handed_over()


class Pool:
    """Processes that run functions of importable modules, all ranks at once."""

    def __init__(self, world: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        key = secrets.token_bytes(16)
        listener = Listener(str(Path(self.folder.name) / "door"), family="AF_UNIX", authkey=key)
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "SPECIMEN_DOOR": f"{listener.address} {key.hex()} {world}",
        }
        command = [sys.executable, "-c", "from minilm.doctor.specimens.ranks import work; work()"]
        self.processes = [
            subprocess.Popen(command, env=environment | {"SPECIMEN_RANK": str(rank)}) for rank in range(world)
        ]
        self.lines: list[Connection] = [listener.accept() for _ in range(world)]
        listener.close()

    def run(self, function: Callable[..., Any], *given: Any) -> list[Any]:
        """function(*given) on each rank -> what it returned, in the order of the ranks."""
        for line in self.lines:
            line.send((function, given))
        answers = []
        for line in self.lines:
            if not line.poll(PATIENCE_SECONDS):
                self.close()
                raise RuntimeError(f"a rank gave no answer within {PATIENCE_SECONDS} s")
            answers.append(line.recv())
        broken = [text for _, text in ((a[1], a[2]) for a in answers) if text]
        if broken:
            raise RuntimeError(f"on a rank: {broken[0]}")
        return [value for _, value, _ in sorted(answers, key=lambda answer: answer[0])]

    def close(self) -> None:
        for line in self.lines:
            line.close()
        for process in self.processes:
            process.terminate()
            process.wait()
        self.folder.cleanup()


@functools.cache
def pool(world: int) -> Pool:
    """The program's pool of this size; closed when the program ends."""
    made = Pool(world)
    atexit.register(made.close)
    return made


def work() -> None:
    """One process of a pool: answer until the line is cut."""
    address, key, world = os.environ["SPECIMEN_DOOR"].split()
    rank = int(os.environ["SPECIMEN_RANK"])
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(address).parent / "store"), int(world))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=int(world))
    with Client(address, authkey=bytes.fromhex(key)) as line:
        while True:
            try:
                function, given = line.recv()
            except EOFError:
                break
            try:
                line.send((rank, function(*given), ""))
            except Exception:  # noqa: BLE001  (shown by the process that asked)
                line.send((rank, None, traceback.format_exc()[-1500:]))
    dist.destroy_process_group()


def ranks_of(
    trainer: type[RankTrainer], size: dict[str, Any], seed: int, **more: Any
) -> Callable[..., list[Any]]:
    """A subject's part `ranks`: function(set up, rank, world) on each rank of a pool."""

    def run(function: Callable[..., Any], world: int) -> list[Any]:
        try:
            return pool(world).run(_on_rank, function, trainer, size, seed, more)
        except (RuntimeError, OSError, EOFError):
            pool(world).close()  # one rank may still wait for the other
            pool.cache_clear()
            raise

    return run


def _on_rank(
    function: Callable[..., Any],
    trainer: type[RankTrainer],
    size: dict[str, Any],
    seed: int,
    more: dict[str, Any],
) -> Any:
    def training(clip_norm: float | None = 1.0, seed: int = seed, num_steps: int = 20) -> Training:
        return set_up(trainer, size, seed, clip_norm=clip_norm, num_steps=num_steps, **more)

    return function(training, dist.get_rank(), dist.get_world_size())
