"""Our own trainer as the doctor sees it: the step that trains, with its layout, optimizer, schedule and checkpoints.

Nothing is restated here but the order of three calls (set the rate, take the step, count): forward, loss, accumulation,
clipping, update, average, saving and loading are those of `minilm.training`. It is one process on the settings' device.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilm.alignment import Batch
from minilm.doctor.subject import Rows, Training
from minilm.doctor.targets.our_data import rows_of
from minilm.doctor.targets.our_model import batch_of
from minilm.models import folder as model_folder
from minilm.training import checkpoint, optim, passing, state
from minilm.training.layout import Layout
from minilm.training.objective import Objective
from minilm.training.optim import OptimConfig
from minilm.training.settings import TrainConfig
from minilm.training.step import optimizer_step

AS_CONFIGURED: Any = object()


def training_of(
    make_model: Callable[[int], nn.Module],
    rates: OptimConfig,
    train: TrainConfig,
    *,
    num_steps: int = 20,
    batches: Callable[[int], Sequence[Batch]] | None = None,
) -> Callable[..., Training]:
    """A `Subject.training` for these settings.

    make_model  seed -> one of our models, on the CPU, with the weights that training begins with
    num_steps   length of the schedule
    batches     step -> this rank's micro-batches of that step, as `Loader.step` gives them

    What it returns takes clip_norm, seed and num_steps by keyword. A model is made anew at each call.
    """

    def training(
        clip_norm: float | None = AS_CONFIGURED, seed: int = train.seed, num_steps: int = num_steps
    ) -> Training:
        settings = rates if clip_norm is AS_CONFIGURED else dataclasses.replace(rates, clip_norm=clip_norm)
        return _Steps(make_model(seed), settings, train, num_steps, batches, seed).handed_over()

    return training


def copies_of(model: nn.Module) -> Callable[[int], nn.Module]:
    """A `make_model` for weights that are given: every seed begins with a copy of them."""
    return lambda seed: copy.deepcopy(model).cpu()


def decays_of(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """Our policy, for `Training.decays`: matrices decay, tables that are looked up in (`optim.tables_of`) do not."""
    tables = {id(parameter) for parameter, _ in optim.tables_of(model)}
    spared = {name for name, parameter in model.named_parameters() if id(parameter) in tables}
    return lambda name, parameter: parameter.dim() >= 2 and name not in spared


class _Steps:
    """A layout with its prepared objects, and the number of the next step."""

    def __init__(
        self,
        model: nn.Module,
        rates: OptimConfig,
        train: TrainConfig,
        num_steps: int,
        batches: Callable[[int], Sequence[Batch]] | None,
        seed: int,
    ) -> None:
        self.rates, self.num_steps, self.batches = rates, num_steps, batches
        self.layout = Layout(train.asked(rates.clip_norm))
        passing.arrange(model, recompute=train.activation_checkpointing, compiled=train.compile)
        model = model.to(self.layout.device)
        self.layout.prepare(Objective(model), optim.build(model, rates), ema_decay=train.ema_decay)
        self.layout.seed_dropout(seed)
        self.layout.objective.train()
        self.step_number = self.position = 0

    def step(self, micro_batches: list[Rows]) -> dict[str, float]:
        """As the trainer does it."""
        optim.set_rate(self.layout.optimizer, self.planned_rate(self.step_number))
        rate = optim.rates_of(self.layout.optimizer).get("learning_rate", 0.0)
        result = optimizer_step(self.layout, [batch_of(rows) for rows in micro_batches])
        self.step_number += 1
        return {"loss": result.loss.mean, "gradient_norm": result.gradient_norm, "learning_rate": rate}

    def planned_rate(self, step: int) -> float:
        return optim.rate_at(self.rates, step, self.num_steps)

    def forward(self, module: nn.Module, tokens: Tensor, segments: Tensor) -> Tensor:
        """The model in the precision of training. `module` is the layout's own, or a copy of it."""
        with self.layout.autocast():
            return module(tokens, segments=segments).logits.float()

    def next_rows(self) -> list[Rows]:
        assert self.batches is not None
        micro_batches = self.batches(self.position)
        self.position += 1
        return [rows_of(batch) for batch in micro_batches]

    def save(self, folder: Path) -> None:
        counts = {"step": self.step_number, "num_steps": self.num_steps, "position": self.position}
        checkpoint.save(self.layout, folder, counts, tokenizer=None)

    def load(self, folder: Path) -> None:
        found, _ = checkpoint.find(folder)
        model_folder.load_weights(self.layout.model, found.folder)
        remembered = checkpoint.load(self.layout, found)
        self.step_number, self.position = remembered["step"], remembered["position"]

    def handed_over(self) -> Training:
        """What the doctor is given."""
        model, average = self.layout.model, self.layout.average
        return Training(
            module=model,
            step=self.step,
            forward=self.forward,
            optimizer=self.layout.optimizer,
            clip_norm=self.layout.clip_norm,
            planned_rate=self.planned_rate,
            num_steps=self.num_steps,
            decays=decays_of(model),
            save=self.save,
            load=self.load,
            next_rows=self.next_rows if self.batches is not None else None,
            average=None if average is None else lambda: state.average_weights(self.layout),
            average_decay=None if average is None else average.decay,
        )
