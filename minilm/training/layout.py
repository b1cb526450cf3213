"""How a run is spread: processes, device, precision, wrapper. The border to Accelerate and DeepSpeed.

Accelerate and DeepSpeed each have several places that decide the same thing (YAML, JSON, environment, code)
and some silently override others. Here the run's settings decide, contradicting launcher settings are refused,
and after `prepare` everything that was asked for is asserted on the objects that will really train.

The scale of the gradient has one formula for all wrappers: each micro-batch gives nats / total * world_size to
backward, total being the number of targets of the whole global batch; DDP and ZeRO average over the ranks.
Nobody divides by the number of micro-batches (DeepSpeed would: `scale_wrt_gas=False`).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from minilm.errors import ConfigError, listed
from minilm.training import optim
from minilm.training.ema import Average, average_of

Kind = Literal["single", "ddp", "zero"]
BUCKET = 500_000_000  # values of DeepSpeed's gradient bucket at most, which is its default


@dataclass(frozen=True)
class Asked:
    """What the run asks for; `Layout` answers with exactly this or raises ConfigError."""

    batch_size: int  # rows per optimizer step, over all ranks and micro-batches
    micro_batch: int | None  # rows per forward on one rank; None: all rows of the rank at once
    precision: Literal["auto", "bf16", "fp32"]
    device: Literal["auto", "cpu", "cuda"]
    clip_norm: float | None
    ranks: int | None  # None: as many as were launched


class Layout:
    """One process's view of the run: rank, world_size, device, precision, accumulation, and the wrapped objects."""

    WAITS_ON: ClassVar[tuple[str, ...]] = ("cuda",)  # devices with a queue, which is worth keeping full

    def __init__(self, asked: Asked) -> None:
        environment = _Environment()
        self.world_size = environment.world_size
        self.device_type = _device(asked, environment)
        self.bf16 = _bf16(asked, environment, self.device_type)
        self.zero_stage = environment.zero_stage
        self.kind: Kind = "zero" if self.zero_stage else "ddp" if self.world_size > 1 else "single"
        rows = asked.batch_size // self.world_size
        self.micro_batch = asked.micro_batch or rows
        self.accumulation = rows // self.micro_batch if self.micro_batch else 0
        self.clip_norm = asked.clip_norm
        problems = _mismatches(asked, environment, self)
        if problems:
            raise ConfigError(listed(problems))
        self.accelerator = self._accelerator()
        self.rank: int = self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        self.engine: Any = None  # the DeepSpeed engine, once prepared
        self.objective: nn.Module
        self.optimizer: torch.optim.Optimizer
        self.average: Average | None = None  # of the weights, where the run keeps one

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def facts(self) -> dict[str, Any]:
        """What a checkpoint and a manifest remember of the layout."""
        precision = "bf16" if self.bf16 else "fp32"
        return {
            "kind": self.kind,
            "world_size": self.world_size,
            "zero_stage": self.zero_stage,
            "precision": precision,
            "device": self.device_type,
        }

    def __str__(self) -> str:
        names = {"single": "one process", "ddp": f"DDP on {self.world_size} ranks"}
        wrapper = names.get(self.kind, f"DeepSpeed ZeRO-{self.zero_stage} on {self.world_size} rank(s)")
        precision = "bf16" if self.bf16 else "fp32"
        return f"{wrapper}, {self.device_type}, {precision}, {self.accumulation} x {self.micro_batch} rows"

    def cut(self, micro_batch: int) -> None:
        """Take so many rows per forward; before `prepare`. ValueError if they do not divide a rank's rows."""
        rows = self.micro_batch * self.accumulation
        if micro_batch < 1 or rows % micro_batch:
            raise ValueError(f"{rows} rows cannot be cut into micro-batches of {micro_batch}.")
        self.micro_batch, self.accumulation = micro_batch, rows // micro_batch
        if self.kind == "zero":
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = self.micro_batch
            settings["gradient_accumulation_steps"] = self.accumulation
            # Accelerate keeps a copy, and warns where the two differ.
            self.accelerator.gradient_accumulation_steps = self.accumulation

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ConfigError for an optimizer that this layout cannot run."""
        if self.kind == "zero" and not isinstance(optimizer, torch.optim.AdamW):
            raise ConfigError(
                "optim.name muon does not go with DeepSpeed ZeRO: ZeRO hands the optimizer flat pieces of all "
                "parameters, and Muon needs whole matrices. Take optim.name adamw, or launch without DeepSpeed (DDP)."
            )

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, *, ema_decay: float | None = None
    ) -> None:
        """Wrap for training, then assert on the wrapped objects what was asked for."""
        from accelerate.utils import DistributedType

        self.check_optimizer(optimizer)
        dtypes = {p.dtype for p in objective.parameters()}
        if self.kind == "zero":
            # DeepSpeed gives the bucket its whole size at once, 1 GB in bf16, also to a model of a few MB.
            bucket = min(BUCKET, sum(p.numel() for p in objective.parameters()))
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings["zero_optimization"]["reduce_bucket_size"] = bucket
        self.objective, wrapped = self.accelerator.prepare(objective, optimizer)
        self.optimizer = wrapped
        facts: list[tuple[str, Any, Any]] = [
            ("number of processes", self.accelerator.num_processes, self.world_size)
        ]
        if self.kind == "zero":
            self.engine = self.accelerator.deepspeed_engine_wrapped.engine
            facts += [
                ("distributed type", self.accelerator.distributed_type, DistributedType.DEEPSPEED),
                ("ZeRO stage", self.engine.zero_optimization_stage(), self.zero_stage),
                ("accumulation steps", self.engine.gradient_accumulation_steps(), self.accumulation),
                ("gradient bucket", self.engine.zero_reduce_bucket_size(), bucket),
                ("clipping norm", float(self.engine.gradient_clipping()), float(self.clip_norm or 0)),
                ("gradient accumulation type", self.engine.get_data_types()[1], torch.float32),
                ("communication type", self.engine.communication_data_type, torch.float32),
            ]
            dtypes = {torch.bfloat16} if self.bf16 else {torch.float32}
        else:
            kind = DistributedType.NO if self.kind == "single" else self.accelerator.distributed_type
            facts.append(("distributed type", self.accelerator.distributed_type, kind))
            facts.append(("mixed precision", self.accelerator.mixed_precision, "bf16" if self.bf16 else "no"))
        facts.append(("parameter types", {p.dtype for p in self.objective.parameters()}, dtypes))
        held = {p.dtype for group in wrapped.param_groups for p in group["params"]}
        # Small updates would be lost in 16 bits.
        facts.append(("16-bit weights in the optimizer", {x for x in held if x.itemsize < 4}, set()))
        facts.append(("device", {p.device.type for p in self.objective.parameters()}, {self.device_type}))
        wrong = [f"{name}: asked for {want}, got {got}." for name, got, want in facts if got != want]
        if wrong:
            raise ConfigError(
                "Accelerate or DeepSpeed did not set up what the run asked for. " + listed(wrong)
            )
        self.average = None if ema_decay is None else average_of(self, ema_decay)

    def seed_dropout(self, seed: int) -> None:
        """Dropout must differ between ranks; the weights are the same on all, they were drawn before."""
        torch.manual_seed(seed * 100_003 + self.rank + 1)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """For forwards outside the wrapped objective (validation, samples): the same precision as in training."""
        if self.bf16 and self.kind != "zero":
            return torch.autocast(self.device_type, torch.bfloat16)
        return contextlib.nullcontext()

    def backward(self, contribution: Tensor, *, last: bool) -> None:
        """Add the gradient of one micro-batch's contribution; ranks are averaged with the last one of the step."""
        if self.engine is not None:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(contribution, scale_wrt_gas=False)
        else:
            contribution.backward()

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: DDP exchanges gradients in the last one only."""
        if self.kind == "ddp" and not last:
            return self.accelerator.no_sync(self.objective)
        return contextlib.nullcontext()

    def gradient_norm(self) -> Tensor:
        """Norm of the whole averaged gradient before clipping, the same on every rank; to be read before `step`."""
        if self.engine is not None:
            inner = self.engine.optimizer
            return torch.as_tensor(inner.scaled_global_norm() / inner.loss_scale)
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    @property
    def can_wait(self) -> bool:
        """Can `step` leave it to the device whether a step is taken, so that nobody has to wait for its numbers?

        Several ranks agree by numbers on the host, and DeepSpeed's step waits itself.
        """
        waits = self.device_type in self.WAITS_ON and self.kind == "single"
        return waits and optim.can_refuse(self.optimizer.optimizer)

    def step(self, norm: Tensor, *, unless: Tensor | None = None) -> None:
        """Clip once by the norm of the whole gradient, update, forget the gradients.

        unless  float32 [] on the device, 0 or 1: where it is 1, weights and moments stay as they are. To update the
                average of the weights is then the caller's (`can_wait` only)
        """
        if self.engine is not None:
            self.engine.step()  # clips by ds_config["gradient_clipping"], updates, clears
        else:
            if self.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(self.objective.parameters(), self.clip_norm, norm)
            with optim.refusing(self.optimizer.optimizer, unless):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None and unless is None:
            self.average.update()

    def all_reduce(self, values: list[float]) -> list[float]:
        """Sums over the ranks."""
        if self.world_size == 1:
            return values
        return self.summed(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def summed(self, values: Tensor) -> Tensor:
        """The same over the ranks, in place, on the device."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group, so that the processes end without a warning."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def model(self) -> nn.Module:
        """The bare model inside the wrapped objective."""
        objective = self.engine.module if self.engine is not None else self.objective
        return getattr(objective, "module", objective).model

    def _accelerator(self) -> Any:
        from accelerate import Accelerator, PartialState

        cpu = self.device_type == "cpu"
        precision = "bf16" if self.bf16 else "no"
        if self.kind != "zero":
            return Accelerator(cpu=cpu, mixed_precision=precision)
        from accelerate import DeepSpeedPlugin

        if cpu:
            # Accelerator(cpu=True) would silently drop DeepSpeed; the state has to be made for the CPU first.
            # The shared-memory extension is compiled at first use (a minute, under a lock that a killed process
            # leaves behind for ever) and only speeds up CPU collectives: gloo does without it.
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            PartialState(cpu=True)
        # Accelerate refuses launcher fields beside a DeepSpeed configuration, because it would ignore them. They
        # were read above: the stage is taken from there, the others are compared with the run's settings.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=self._deepspeed_config(), zero3_init_flag=False)
        return Accelerator(mixed_precision=precision, deepspeed_plugin=plugin)

    def _deepspeed_config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "train_batch_size": self.micro_batch * self.accumulation * self.world_size,
            "gradient_clipping": self.clip_norm or 0.0,
            "zero_optimization": {"stage": self.zero_stage},
            "bf16": {"enabled": self.bf16},
            # The default adds micro-batches up and averages ranks in bfloat16.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31 - 1,
        }


class _Environment:
    """What the launcher (accelerate launch, torchrun) left in the environment."""

    def __init__(self) -> None:
        get = os.environ.get
        self.world_size = int(get("WORLD_SIZE", "1"))
        self.use_cpu = get("ACCELERATE_USE_CPU", "false").lower() == "true"
        self.mixed_precision = get("ACCELERATE_MIXED_PRECISION", "no")
        deepspeed = get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        self.zero_stage = int(get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) if deepspeed else 0
        self.deepspeed = deepspeed
        self.config_file = get("ACCELERATE_DEEPSPEED_CONFIG_FILE") if deepspeed else None
        self.accumulation = _number(get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"))
        self.clipping = _number(get("ACCELERATE_GRADIENT_CLIPPING")) if deepspeed else None
        self.offload = [
            value
            for name in ("OPTIMIZER", "PARAM")
            if deepspeed and (value := get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none")) != "none"
        ]


def _number(text: str | None) -> float | None:
    return None if text in (None, "auto", "None", "none") else float(text)


def _device(asked: Asked, environment: _Environment) -> Literal["cpu", "cuda"]:
    if asked.device == "cuda" and (environment.use_cpu or not torch.cuda.is_available()):
        why = "the launcher was told to use the CPU" if environment.use_cpu else "no CUDA device is visible"
        raise ConfigError(f"train.device is cuda, but {why}.")
    return (
        "cuda" if asked.device != "cpu" and torch.cuda.is_available() and not environment.use_cpu else "cpu"
    )


def _bf16(asked: Asked, environment: _Environment, device: str) -> bool:
    if environment.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"mixed precision {environment.mixed_precision} of the launcher is not supported: bf16 or no."
        )
    if asked.precision == "auto":
        return environment.mixed_precision == "bf16" or device == "cuda"
    if asked.precision == "fp32" and environment.mixed_precision == "bf16":
        raise ConfigError("train.precision is fp32, but the launcher was told bf16. Change one of them.")
    return asked.precision == "bf16"


def _mismatches(asked: Asked, environment: _Environment, layout: Layout) -> list[str]:
    world, micro, steps = layout.world_size, layout.micro_batch, layout.accumulation
    problems = []
    if asked.ranks is not None and asked.ranks != world:
        problems.append(
            f"train.ranks asks for {asked.ranks} processes, {world} were launched. "
            "On CPUs, `accelerate launch --cpu` and distributed_type MULTI_CPU start one process only: "
            "use run_file/accelerate/cpu2.yaml or torchrun."
        )
    if asked.batch_size % world or (asked.batch_size // world) % micro or not steps:
        problems.append(
            f"train.batch_size {asked.batch_size} cannot be cut into {world} rank(s) times micro-batches of "
            f"train.micro_batch {micro} rows: it must be a multiple of {world * micro}."
        )
    if environment.deepspeed and environment.zero_stage not in (1, 2):
        problems.append(
            f"ZeRO stage {environment.zero_stage} is not supported: 1 or 2 (zero_stage in the launcher's file)."
        )
    if environment.config_file:
        problems.append(
            f"The launcher names a DeepSpeed file ({environment.config_file}). DeepSpeed is configured from the "
            "run's settings, so that nothing is said twice: remove deepspeed_config_file."
        )
    if environment.offload:
        problems.append("Offloading optimizer or parameters is not supported: set offload_*_device to none.")
    if environment.accumulation not in (None, 1, steps):
        problems.append(
            f"The launcher asks for {environment.accumulation:g} accumulation steps, but train.batch_size "
            f"{asked.batch_size} / ({world} ranks x micro_batch {micro}) makes {steps}. Remove it there."
        )
    if environment.clipping is not None and environment.clipping != (asked.clip_norm or 0):
        problems.append(
            f"The launcher clips at {environment.clipping:g}, optim.clip_norm is {asked.clip_norm}. Remove it there."
        )
    return problems
