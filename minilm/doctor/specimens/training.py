"""A small trainer in plain torch: one optimizer step over micro-batches, every stage a method to be overridden."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor.specimens.loss import summed_nats
from minilm.doctor.specimens.model import Model
from minilm.doctor.subject import Rows, Training


class Trainer:
    """AdamW, linear warm-up and cosine decay, clipping by the whole norm, the mean over all targets of the step."""

    learning_rate, final_rate, warmup_steps = 3e-3, 3e-4, 3
    weight_decay = 0.1

    def __init__(
        self, model: Model, *, clip_norm: float | None = 1.0, num_steps: int = 20, average_decay: float = 0.9
    ) -> None:
        self.model, self.clip_norm, self.num_steps, self.average_decay = (
            model,
            clip_norm,
            num_steps,
            average_decay,
        )
        self.step_number = 0
        self.optimizer = self.make_optimizer()
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.data_generator = torch.Generator().manual_seed(7)
        self.data_position = 0

    # ---- one step

    def step(self, micro_batches: list[Rows]) -> dict[str, float]:
        self.model.train()
        rate = self.set_rate()
        total = self.count(micro_batches)
        nats = 0.0
        for number, rows in enumerate(micro_batches):
            part, count = self.nats(rows)
            self.backward(part, count, total, number, micro_batches)
            nats += float(part.detach())
        self.synchronise()
        norm = self.clip()
        self.update()
        self.zero_grad()
        self.follow_average()
        self.step_number += 1
        return {"loss": self.logged(nats, total, micro_batches), "gradient_norm": norm, "learning_rate": rate}

    def count(self, micro_batches: list[Rows]) -> float:
        """Targets of the whole step."""
        return float(sum(summed_nats(None, rows)[1] for rows in micro_batches))

    def nats(self, rows: Rows) -> tuple[Tensor, int]:
        """Summed nats of a micro-batch and its number of targets."""
        return summed_nats(self.forward(self.model, rows.tokens, rows.segments), rows)

    def backward(
        self, nats: Tensor, count: int, total: float, number: int, micro_batches: list[Rows]
    ) -> None:
        (nats / max(total, 1.0)).backward()

    def synchronise(self) -> None:
        """Gradients over the ranks; nothing to do for one."""

    def clip(self) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        return float(
            nn.utils.clip_grad_norm_(parameters, self.clip_norm or math.inf, error_if_nonfinite=True)
        )

    def update(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
        return nats / max(total, 1.0)

    # ---- optimizer and schedule

    def make_optimizer(self) -> torch.optim.Optimizer:
        named = dict(self.model.named_parameters())
        groups = [
            {"params": [p for n, p in named.items() if self.decays(n, p)], "weight_decay": self.weight_decay},
            {"params": [p for n, p in named.items() if not self.decays(n, p)], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))

    @staticmethod
    def decays(name: str, parameter: nn.Parameter) -> bool:
        """The policy: matrices are decayed, vectors are not."""
        return parameter.dim() >= 2

    def planned_rate(self, step: int) -> float:
        """The schedule as configured; never overridden by a plant."""
        if step < Trainer.warmup_steps:
            return Trainer.learning_rate * (step + 1) / Trainer.warmup_steps
        share = (step - Trainer.warmup_steps) / max(1, self.num_steps - 1 - Trainer.warmup_steps)
        low, high = Trainer.final_rate, Trainer.learning_rate
        return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    def rate(self, step: int) -> float:
        """The schedule as it is done."""
        return self.planned_rate(step)

    def set_rate(self) -> float:
        rate = self.rate(self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def follow_average(self) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - self.average_decay)

    # ---- data of its own, for resuming

    def batches(self, start: int) -> Iterator[list[Rows]]:
        """Endless micro-batches; batch k is a function of k alone."""
        for number in range(start, 10**9):
            generator = torch.Generator().manual_seed(1000 + number)
            yield Rows.whole(
                torch.randint(3, self.model.size.vocab_size, (4, 12), generator=generator)
            ).split(2)

    def next_rows(self) -> list[Rows]:
        rows = next(self.batches(self.data_position))
        self.data_position += 1
        return rows

    # ---- saving

    def save(self, folder: Path) -> None:
        torch.save(self.state(), folder / "state.pt")
        (folder / "step.json").write_text(json.dumps({"step": self.step_number}))

    def load(self, folder: Path) -> None:
        self.set_state(torch.load(folder / "state.pt", weights_only=True))

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step_number,
            "data": self.data_position,
            "random": torch.get_rng_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step_number, self.data_position = state["step"], state["data"]
        torch.set_rng_state(state["random"])

    # ---- as a subject's part

    def forward(self, module: nn.Module, tokens: Tensor, segments: Tensor) -> Tensor:
        """The model in its training path."""
        return module(tokens, segments)

    def handed_over(self) -> Training:
        """What the doctor is given."""
        return Training(
            module=self.model,
            step=self.step,
            forward=self.forward,
            optimizer=self.optimizer,
            clip_norm=self.clip_norm,
            planned_rate=self.planned_rate,
            num_steps=self.num_steps,
            decays=Trainer.decays,
            save=self.save,
            load=self.load,
            next_rows=self.next_rows,
            average=lambda: self.average,
            average_decay=self.average_decay,
        )


class AutocastTrainer(Trainer):
    """The same in mixed precision: float32 weights, products in bfloat16."""

    def forward(self, module: nn.Module, tokens: Tensor, segments: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(tokens, segments).float()
