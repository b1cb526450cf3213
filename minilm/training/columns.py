"""The line that metrics.jsonl gets of a step: what was measured, where the run stands, what it took.

loss, auxiliary/NAME, learning_rate, gradient_norm       what was computed; the norm before clipping
step_tokens, total_tokens, tokens_share                  targets of the step, of all steps taken, and their share
                                                         of what the run plans
data/batch, epoch, data/source, data/document            position in the data: number of the global batch, epochs
                                                         begun with it, source and document of its first row
skipped, skipped_steps, rollbacks                        where the settings allow them
tokens_per_second, seconds/..., memory/..., mfu          of this process; mfu only where the peak is known. None of
                                                         them waits for the device: its times are read with the loss
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from minilm.data.loader import Loader
from minilm.training.hardware import peak_flops
from minilm.training.layout import Layout
from minilm.training.settings import TrainConfig
from minilm.training.step import StepResult


@dataclass
class Counts:
    """What a run has done so far. Kept in checkpoints, under these names."""

    total_tokens: int = 0  # targets of the steps that were taken
    num_skipped: int = 0  # steps that were not taken
    num_rollbacks: int = 0


class Columns:
    """Makes the line of a step for one process.

    flops_per_step  of all ranks together, forward and backward; with it and a known device the line has mfu
    """

    def __init__(
        self,
        config: TrainConfig,
        layout: Layout,
        loader: Loader,
        *,
        num_steps: int,
        flops_per_step: float | None,
    ) -> None:
        self.layout, self.loader, self.flops_per_step = layout, loader, flops_per_step
        self.peak_flops = peak_flops(layout.device, bf16=layout.bf16)
        self.most_tokens = loader.batch_rows * loader.rows.sequence_length  # of one step
        planned = num_steps * loader.batch_rows * loader.rows.targets_per_row
        self.planned_tokens = min(planned, config.max_tokens or planned)
        self.shows_skips = config.on_nonfinite == "skip"
        self.shows_rollbacks = config.on_spike == "rollback"

    def of_step(
        self,
        result: StepResult,
        counts: Counts,
        *,
        rates: dict[str, float],
        position: dict[str, Any],
        seconds: float,
        data_seconds: float,
    ) -> dict[str, Any]:
        """The line, after the step was counted.

        position      `position` of when its data was fetched
        seconds       of the whole step
        data_seconds  fetching the data; where steps are read later, the device may have been busy meanwhile
        """
        step_tokens = int(result.loss.tokens)
        values = {
            "loss": result.loss.mean,
            **{f"auxiliary/{name}": value for name, value in result.auxiliary.items()},
            **rates,
            "gradient_norm": result.gradient_norm,
            "step_tokens": step_tokens,
            "total_tokens": counts.total_tokens,
            "tokens_share": counts.total_tokens / self.planned_tokens,
            **position,
            "tokens_per_second": step_tokens / seconds,
            "seconds/step": seconds,
            "seconds/data": data_seconds,
            **{f"seconds/{part}": value for part, value in result.seconds.items()},
            **memory(self.layout.device),
        }
        if not result.is_finite:
            values["skipped"] = True
        if self.shows_skips or counts.num_skipped:
            values["skipped_steps"] = counts.num_skipped
        if self.shows_rollbacks or counts.num_rollbacks:
            values["rollbacks"] = counts.num_rollbacks
        if self.flops_per_step is not None and self.peak_flops is not None:
            values["mfu"] = self.flops_per_step / seconds / (self.peak_flops * self.layout.world_size)
        return values

    def position(self) -> dict[str, Any]:
        """Of the batch that the loader gave last. After a rollback it is not that of the schedule."""
        place = self.loader.place()
        return {
            "epoch": self.loader.next_step / self.loader.steps_per_epoch,
            "data/batch": self.loader.next_step - 1,
            "data/source": place.source,
            "data/document": place.first_document,
        }


def memory(device: torch.device) -> dict[str, float]:
    """Megabytes: of the process, and of the device where there is one."""
    values = {"memory/process_mb": psutil.Process().memory_info().rss / 1e6}
    if device.type == "cuda":
        values["memory/allocated_mb"] = torch.cuda.memory_allocated(device) / 1e6
        values["memory/reserved_mb"] = torch.cuda.memory_reserved(device) / 1e6
        values["memory/peak_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return values
