"""What a training run is told (section `train`), and what the trainer needs of the parts it is given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from minilm.training.layout import Asked
from minilm.training.passing import Recompute


def _rows(value: Any) -> Any:
    """One message for what neither of the types of train.micro_batch takes."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if value in (None, "auto") or (isinstance(number, int) and not isinstance(value, bool) and number > 0):
        return number
    raise PydanticCustomError("rows", "should be a number of rows from 1 on, auto or none")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section `train`."""

    steps: Annotated[int | None, Field(gt=0, description="optimizer steps; none: as train.epochs says")] = (
        None
    )
    epochs: Annotated[
        float | None, Field(gt=0, description="passes over the data; none: as train.steps says")
    ] = None
    max_tokens: Annotated[
        int | None,
        Field(gt=0, description="end the run after the step in which this many targets were trained on"),
    ] = None
    max_minutes: Annotated[
        float | None,
        Field(gt=0, description="end the run after the step in which this start of it became so old"),
    ] = None
    deterministic: Annotated[
        bool, Field(description="only algorithms that give the same bits each time; slower on CUDA")
    ] = False
    tokens_per_step: Annotated[
        int | None, Field(gt=0, description="in place of batch_size: batch_size x data.sequence_length")
    ] = None
    batch_size: Annotated[
        int, Field(gt=0, description="rows per optimizer step, over all ranks and micro-batches together")
    ] = 32
    micro_batch: Annotated[
        int | Literal["auto"] | None,
        BeforeValidator(_rows),
        Field(
            description="rows per forward on one rank; none: all rows of the rank at once; auto: as many as fit into "
            "memory, found at the start"
        ),
    ] = None
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        Field(description="auto: bf16 on CUDA or if the launcher says so, else fp32"),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="auto: CUDA if there is one")] = (
        "auto"
    )
    ranks: Annotated[
        int | None, Field(gt=0, description="processes that must take part; none: as launched")
    ] = None
    seed: Annotated[
        int, Field(ge=0, description="of the initial weights, the order of the data and dropout")
    ] = 0
    validate_every: Annotated[
        int | None, Field(gt=0, description="steps between validations; none: with each save")
    ] = 100
    validation_rows: Annotated[
        int | None,
        Field(gt=0, description="rows of the validation split that are scored, spread evenly; none: all"),
    ] = 512
    sample_every: Annotated[
        int | None, Field(gt=0, description="steps between text samples; none: at the end")
    ] = None
    save_every: Annotated[
        int | None, Field(gt=0, description="steps between checkpoints; none: at the end")
    ] = 500
    keep_last: Annotated[int, Field(gt=0, description="checkpoints kept besides the best one")] = 2
    save_in_background: Annotated[
        bool,
        Field(
            description="training goes on while a checkpoint is written; takes 12 bytes of host memory per parameter"
        ),
    ] = True
    norms_every: Annotated[
        int | None,
        Field(gt=0, description="steps between norms of gradient, weights and update per layer; none: never"),
    ] = None
    usage_every: Annotated[
        int | None,
        Field(
            gt=0, description="steps between columns of the model itself: how its parts are used; none: never"
        ),
    ] = 10
    activation_checkpointing: Annotated[
        Recompute,
        Field(
            description="what is computed again in the backward pass instead of kept: none, half of the blocks, all "
            "blocks. Less memory, more time, the same numbers"
        ),
    ] = "none"
    compile: Annotated[bool, Field(description="compile the blocks for training (torch.compile)")] = False
    ema_decay: Annotated[
        float | None,
        Field(gt=0, lt=1, description="keep a moving average of the weights with this decay; none: do not"),
    ] = None
    init_from: Annotated[
        str,
        Field(
            description="begin with the weights of this run folder, checkpoint or Hugging Face folder; empty: drawn "
            "by train.seed. Optimizer, schedule and data begin anew"
        ),
    ] = ""
    init_weights: Annotated[
        Literal["last", "ema"],
        Field(description="of train.init_from: the last weights, or their moving average"),
    ] = "last"
    on_nonfinite: Annotated[
        Literal["stop", "skip"],
        Field(description="a step whose loss or gradient is not finite: stop the run, or skip its update"),
    ] = "stop"
    skip_budget: Annotated[
        int,
        Field(ge=0, description="steps that on_nonfinite: skip may skip in the whole run before it stops"),
    ] = 3
    spike_factor: Annotated[
        float | None,
        Field(
            gt=0,
            description="keep a step as an incident when its loss exceeds the mean of the last 50 by this many "
            "standard deviations; none: do not look",
        ),
    ] = None
    on_spike: Annotated[
        Literal["report", "rollback"],
        Field(
            description="such a step: keep it and go on, or go back to the last checkpoint before it and on with the "
            "data behind it"
        ),
    ] = "report"
    rollback_budget: Annotated[
        int, Field(ge=0, description="times that a run may go back before it stops instead")
    ] = 3
    keep_best: Annotated[
        bool, Field(description="also keep the checkpoint with the lowest validation loss")
    ] = True

    def problems(self) -> Iterator[tuple[str, str]]:
        """Contradictions between these settings."""
        if (self.steps is None) == (self.epochs is None):
            both = "both are given" if self.steps is not None else "neither is given"
            yield "steps", f"exactly one of train.steps and train.epochs decides how long the run is; {both}."
        if self.on_spike == "rollback" and self.spike_factor is None:
            yield (
                "on_spike",
                "rollback needs train.spike_factor, which says what a spike is (6, for instance).",
            )

    def num_steps(self, steps_per_epoch: int) -> int:
        """How long the run is, in optimizer steps."""
        return self.steps or math.ceil((self.epochs or 0) * steps_per_epoch)

    @property
    def rows_per_forward(self) -> int | None:
        """train.micro_batch as a number; None: all rows of the rank at once, or not known before the start (auto)."""
        return None if self.micro_batch == "auto" else self.micro_batch

    def asked(self, clip_norm: float | None) -> Asked:
        return Asked(
            self.batch_size, self.rows_per_forward, self.precision, self.device, clip_norm, self.ranks
        )


class Log(Protocol):
    """What the trainer needs of a tracker (minilm.track.Tracker). Only the first rank has one that writes."""

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None: ...
    def sample(self, step: int, samples: list[dict[str, Any]]) -> None: ...
    def event(self, step: int, text: str, **values: Any) -> None: ...
    def sync(self) -> None: ...
    def resume_at(self, step: int) -> None: ...
    def go_back(self, step: int, into: Path | None) -> None: ...


class Progress(Protocol):
    """What the trainer needs of a console (minilm.track.Console)."""

    def start(self, total_steps: int, initial: int) -> None: ...
    def update(self, step: int, stats: dict[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
