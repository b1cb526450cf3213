"""`transformers.Trainer` as a subject: its own loop, its own loss, its own optimizer and schedule, step by step.

Each step is one `trainer.train()` of one step on a copy of the model, with the optimizer and the schedule of the step
before: what is examined is the loop that would train, not a restatement of it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler

from minilm.doctor.core import NotApplicable
from minilm.doctor.probes import random_states_kept
from minilm.doctor.subject import Rows, Subject, Training
from minilm.doctor.targets.foreign import logits_of
from minilm.doctor.targets.huggingface import hugging_face_inputs, huggingface_subject

if TYPE_CHECKING:
    from transformers import Trainer


def trainer_subject(trainer: Trainer, *, name: str = "") -> Subject:
    """Everything that can be asked of a `transformers.Trainer`; it is not changed, and trains nothing of its own.

    The data of the trainer is not used: rows come from the checks, in the form that its model takes (input_ids,
    attention_mask, labels, unshifted with -100). Its class, arguments, loss function and callbacks' absence are kept.
    """
    subject = huggingface_subject(trainer.model, fresh=False, name=name or type(trainer).__name__)

    def training(clip_norm: float | None = None, seed: int = 0, num_steps: int = 20) -> Training:
        clip = trainer.args.max_grad_norm if clip_norm is None else clip_norm
        return _Steps(trainer, clip, seed, num_steps).handed_over()

    def evaluate(batches: Sequence[Rows]) -> float:
        modes = [(part, part.training) for part in trainer.model.modules()]
        try:
            return float(_again(trainer, copy.copy(trainer.model), list(batches)).evaluate()["eval_loss"])
        finally:  # it leaves eval mode behind: its next training step sets the mode, as the check train_mode sees
            for part, mode in modes:
                part.training = mode

    return subject.but(training=training, evaluate=evaluate)


class _MicroBatches(Dataset):  # type: ignore[type-arg]
    """One item is one micro-batch, as the model takes it."""

    def __init__(self, batches: Sequence[Rows]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return hugging_face_inputs(self.batches[index])


def _only_item(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return items[0]


def _again(trainer: Trainer, model: nn.Module, batches: list[Rows], **changes: Any) -> Trainer:
    """A trainer of the same class and arguments over other data, that writes and reports nothing."""
    arguments = copy.copy(trainer.args)
    quiet: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": 1,  # of items; an item is a micro-batch
        "per_device_eval_batch_size": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "load_best_model_at_end": False,
    }
    optimizers = changes.pop("optimizers", (None, None))
    for field, value in {**quiet, **changes}.items():
        setattr(arguments, field, value)

    class InOrder(type(trainer)):  # type: ignore[misc]
        """The same trainer over rows in the order given."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def log(self, logs: Mapping[str, float], *args: Any, **kwargs: Any) -> None:
            self.state.log_history.append(dict(logs))

    data = _MicroBatches(batches)
    with random_states_kept():  # a Trainer seeds the process when it is made
        made = InOrder(
            model=model,
            args=arguments,
            data_collator=_only_item,
            train_dataset=data,
            eval_dataset=data,
            compute_loss_func=trainer.compute_loss_func,
            optimizers=optimizers,
        )
    for name in ("PrinterCallback", "ProgressCallback"):
        for callback in list(made.callback_handler.callbacks):
            if type(callback).__name__ == name:
                made.remove_callback(callback)
    return made


class _Steps:
    """A copy of the model with one optimizer and one schedule over many one-step trainings."""

    def __init__(self, trainer: Trainer, clip_norm: float, seed: int, num_steps: int) -> None:
        self.trainer, self.clip_norm, self.num_steps = trainer, clip_norm, num_steps
        self.model = copy.deepcopy(trainer.model).train()
        self.seed = seed
        owner = _again(trainer, self.model, [])
        owner.create_optimizer_and_scheduler(num_training_steps=num_steps)
        self.optimizer, self.schedule = owner.optimizer, owner.lr_scheduler

    def step(self, micro_batches: list[Rows]) -> Mapping[str, float]:
        one = _again(
            self.trainer,
            self.model,
            micro_batches,
            gradient_accumulation_steps=len(micro_batches),
            max_grad_norm=self.clip_norm,
            optimizers=(self.optimizer, self.schedule),
        )
        one.train()
        logged = next(entry for entry in one.state.log_history if "loss" in entry)
        names = {"loss": "loss", "grad_norm": "gradient_norm", "learning_rate": "learning_rate"}
        return {ours: float(logged[theirs]) for theirs, ours in names.items() if theirs in logged}

    def handed_over(self) -> Training:
        """What the doctor is given."""
        return Training(
            module=self.model,
            step=self.step,
            forward=_forward,
            optimizer=self.optimizer,
            clip_norm=self.clip_norm or None,
            num_steps=self.num_steps,
        )


def _forward(module: nn.Module, tokens: Tensor, segments: Tensor) -> Tensor:
    real = segments > 0
    if any(len(row[row > 0].unique()) > 1 for row in segments):
        raise NotApplicable("packed rows: a Trainer gives its model no document borders")
    mask = {} if bool(real.all()) else {"attention_mask": real.long()}
    with torch.autocast("cpu", enabled=False):
        return logits_of(module(input_ids=tokens, use_cache=False, **mask))
