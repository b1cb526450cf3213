"""Rank trainers with a mistake each: where another process can import them, for the plants of the rank checks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from minilm.doctor.specimens.ranks import RankTrainer
from minilm.doctor.specimens.training import Trainer
from minilm.doctor.subject import Rows


class OwnWay(RankTrainer):
    """Gradients are not exchanged."""

    def synchronise(self) -> None:
        pass


class OwnMean(RankTrainer):
    """Each rank divides by its own targets, and the ranks are averaged."""

    def count(self, micro_batches: list[Rows]) -> float:
        return self.world * Trainer.count(self, micro_batches)


class OneEach(RankTrainer):
    """Only the first micro-batch is exchanged."""

    def backward(self, nats: Any, count: int, *rest: Any) -> None:
        super().backward(nats, count, *rest)
        if rest[1] == 0:
            super().synchronise()

    def synchronise(self) -> None:
        pass


class ClipsFirst(RankTrainer):
    """Clipped before the exchange."""

    def synchronise(self) -> None:
        self.norm = Trainer.clip(self)
        super().synchronise()

    def clip(self) -> float:
        return self.norm


class ClipsOnOne(RankTrainer):
    """Clipped on rank 0 only."""

    def clip(self) -> float:
        kept, self.clip_norm = self.clip_norm, self.clip_norm if self.rank == 0 else None
        norm = super().clip()
        self.clip_norm = kept
        return norm


class ClipsShard(RankTrainer):
    """Each rank clips by the norm of its own shard of the parameters."""

    def clip(self) -> float:
        parameters = [p for i, p in enumerate(self.model.parameters()) if i % self.world == self.rank]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm or math.inf, norm)
        return float(norm)


class Apart(RankTrainer):
    """The weights of rank 0 are not sent to the others."""

    def begin_together(self) -> None:
        pass


class FillsUp(RankTrainer):
    """A rank with fewer rows than the other repeats its last one."""

    def step(self, micro_batches: list[Rows]) -> dict[str, float]:
        own = torch.tensor(sum(len(part) for part in micro_batches))
        most = own.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        last = micro_batches[-1]
        missing = int(most - own)
        filled = last.take([*range(len(last)), *[len(last) - 1] * missing])
        total, self.total = super().count(micro_batches), 0.0
        self.total = total
        return super().step([*micro_batches[:-1], filled])

    def count(self, micro_batches: list[Rows]) -> float:
        return self.total


class SameDropout(RankTrainer):
    """Every rank draws the same dropout."""

    def dropout_seed(self) -> int:
        return 1000


class OwnLoss(RankTrainer):
    """Each rank logs its own mean."""

    def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
        return nats / Trainer.count(self, micro_batches)


class LossOverRanks(RankTrainer):
    """The global mean, divided by the ranks once more."""

    def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
        return super().logged(nats, total, micro_batches) / self.world


class SameShard(RankTrainer):
    """Every rank has the rows of rank 0."""

    def shard(self) -> int:
        return 0


class ScheduleOfAll(RankTrainer):
    """The schedule is advanced once for each rank."""

    def rate(self, step: int) -> float:
        return self.planned_rate(step * self.world)
