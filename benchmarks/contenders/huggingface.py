"""transformers.LlamaForCausalLM with the weights that minilm begins with: in a plain loop, and in its Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from contenders import POOL, Contender, Gate, Shape, count, decay_groups, plain_loop, training_flops
from minilm import models
from minilm.models.hf import to_hf

RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0  # those of minilm


def build(shape: Shape, *, compiled: bool = False, trainer: bool = False) -> Contender:
    """compiled: torch.compile of the whole model, its loss inside; trainer: in the Trainer of transformers."""
    torch.manual_seed(0)
    llama = to_hf(models.build(shape.config())).to(shape.device).train()
    llama.config.use_cache = False
    config = shape.config()
    flops = training_flops(llama, num_layers=config.num_layers, width=config.dim, length=shape.length)
    if trainer:
        run, about = _in_trainer(shape, llama), "fused AdamW, clipped at 1.0, its own data loader, no log"
    else:
        model = torch.compile(llama) if compiled else llama
        optimizer = torch.optim.AdamW(decay_groups(llama), lr=RATE, betas=BETAS, fused=True)

        def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
            # `shift_labels` are taken as they are: the same targets as everybody's, the last of a row included.
            loss: Tensor = model(input_ids=inputs, labels=inputs, shift_labels=targets).loss
            return loss

        run = plain_loop(shape, loss_of, optimizer, list(llama.parameters()), clip=CLIP)
        about = "SDPA, no cache, fused AdamW, matrices decay, clipped at 1.0"
    return Contender(about, count(llama), flops, run)


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Row i of the endless sequence of batches."""

    def __init__(self, shape: Shape, steps: int) -> None:
        self.pairs, self.batch, self.steps = shape.pairs(), shape.batch, steps

    def __len__(self) -> int:
        return self.batch * self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = self.pairs[index // self.batch % POOL]
        row = index % self.batch
        return {"input_ids": inputs[row], "labels": inputs[row], "shift_labels": targets[row]}


class _Turns(TrainerCallback):
    """Between two steps the Trainer waits at the gate."""

    def __init__(self, gate: Gate, loss: Callable[[], Tensor]) -> None:
        self.gate, self.loss, self.over = gate, loss, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.over = not self.gate.wait()
        if self.over:
            raise _Over

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gate.done(self.loss())


class _Over(Exception):
    """No more steps are wanted: the Trainer itself would first take the one that it has begun."""


class _Kept(Trainer):
    """The Trainer, with the loss of the newest step at hand."""

    newest: Tensor

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        self.newest = (found[0] if isinstance(found, tuple) else found).detach()
        return found


def _in_trainer(shape: Shape, llama: Any) -> Callable[[Gate], None]:
    steps = 100_000

    def run(gate: Gate) -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=shape.batch,
                max_steps=steps,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                weight_decay=DECAY,
                max_grad_norm=CLIP,
                optim="adamw_torch_fused",
                bf16=shape.dtype == "bf16",
                use_cpu=shape.device == "cpu",
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
                dataloader_pin_memory=shape.device == "cuda",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = _Kept(model=llama, args=settings, train_dataset=_Rows(shape, steps))
            trainer.add_callback(_Turns(gate, lambda: trainer.newest))
            try:
                trainer.train()
            except _Over:
                return

    return run
