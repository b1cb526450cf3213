"""The loop: data, step, validate, sample, save, stop. Everything else is handed in as a value."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from minilm.alignment import Sum
from minilm.errors import CheckpointError
from minilm.training import checkpoint, optim
from minilm.training.hardware import peak_flops
from minilm.training.layout import Layout
from minilm.training.settings import Batches, Log, Progress, TrainConfig
from minilm.training.step import NonFinite, StepResult, optimizer_step
from minilm.training.watch import StepView, Watcher


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `state`: finished or interrupted."""

    state: Literal["finished", "interrupted"]
    step: int
    loss: float | None
    validation_loss: float | None
    signal: int | None = None


class Trainer:
    """Runs steps from where the run stands to its last one.

    validate() -> Sum over the validation rows, on all ranks; sample(step) -> samples, on the first rank only.
    Both leave training mode and random states as they found them. flops_per_step: of all ranks together, forward
    and backward; with it and a known device the log has the share of the hardware's peak (mfu).
    """

    def __init__(
        self,
        config: TrainConfig,
        rates: optim.OptimConfig,
        *,
        layout: Layout,
        loader: Batches,
        run_folder: Path,
        log: Log,
        progress: Progress,
        validate: Callable[[], Sum] | None,
        sample: Callable[[int], list[dict[str, Any]]] | None,
        save_tokenizer: Callable[[Path], object] | None,
        watchers: Sequence[Watcher] = (),
        flops_per_step: float | None = None,
    ) -> None:
        self.config, self.rates, self.layout, self.loader = config, rates, layout, loader
        self.checkpoints = run_folder / "checkpoints"
        self.log, self.progress = log, progress
        self.validate, self.sample, self.save_tokenizer = validate, sample, save_tokenizer
        self.num_steps = config.num_steps(loader.steps_per_epoch)
        self.watchers, self.flops_per_step = watchers, flops_per_step
        self.peak_flops = peak_flops(layout.device, bf16=layout.bf16)
        self.step = 0
        self.total_tokens = 0
        self.last_validation: tuple[int, Sum] | None = None
        self.last_saved: int | None = None
        self._signal: int | None = None

    def resume(self, found: checkpoint.Found) -> None:
        """Continue after `found`: optimizer, random states, position in the data, counts, metrics. Collective."""
        state = checkpoint.load(self.layout, found)
        self.loader.load_state_dict(state["loader"])
        self.step, self.total_tokens, self.last_saved = state["step"], state["total_tokens"], state["step"]
        self.log.resume_at(self.step)
        self.log.event(self.step, f"resumed from {found.folder.name}")

    def run(self) -> Outcome:
        """Train to the last step, or to the next step border after SIGINT or SIGTERM (saving first)."""
        self._refuse_small_disk()
        self.layout.objective.train()
        result: StepResult | None = None
        self.progress.start(self.num_steps, self.step)
        if self.step == 0 and self.step < self.num_steps:
            self._validate()
        with self._signals():
            while self.step < self.num_steps:
                result = self._one_step()
                due = self._due(result.stop)
                if due("validate_every") or due("save_every"):
                    self._validate()
                if due("sample_every"):
                    self._sample()
                if due("save_every"):
                    self._save()
                if result.stop:
                    break
        loss = result.loss.mean if result else None
        validation = self.last_validation[1].mean if self.last_validation else None
        state: Literal["finished", "interrupted"] = (
            "finished" if self.step >= self.num_steps else "interrupted"
        )
        return Outcome(state, self.step, loss, validation, self._signal)

    def _due(self, stopping: bool) -> Callable[[str], bool]:
        """Is `validate_every`, ... due after this step? At the end everything is; a stop only saves."""
        at_end = self.step == self.num_steps

        def due(name: str) -> bool:
            every = getattr(self.config, name)
            if stopping and not at_end:
                return name == "save_every"
            return at_end or (every is not None and self.step % every == 0)

        return due

    def _one_step(self) -> StepResult:
        start = time.perf_counter()
        micro_batches = next(self.loader)
        data_seconds = time.perf_counter() - start
        optimizer = self.layout.optimizer
        optim.set_rate(optimizer, optim.rate_at(self.rates, self.step, self.num_steps))
        rate = optim.rate_of(optimizer)
        view = StepView(self.step + 1, self.layout, micro_batches)
        watching = [watcher for watcher in self.watchers if watcher.wants(view.step)]

        def before_update() -> None:
            for watcher in watching:
                watcher.before_update(view)

        try:
            result = optimizer_step(
                self.layout, micro_batches, stop=self._signal is not None, before_update=before_update
            )
        except NonFinite as bad:  # shown as it is, then the run stops
            values = {"loss": bad.loss.mean, "gradient_norm": bad.gradient_norm, "learning_rate": rate}
            self.log.log("train", self.step + 1, values)
            raise
        seconds = time.perf_counter() - start
        self.step += 1
        step_tokens = int(result.loss.tokens)
        self.total_tokens += step_tokens
        stats = {
            "loss": result.loss.mean,
            **{f"auxiliary/{name}": value for name, value in result.auxiliary.items()},
            "learning_rate": rate,
            "gradient_norm": result.gradient_norm,
            "step_tokens": step_tokens,
            "total_tokens": self.total_tokens,
            "epoch": self.step / self.loader.steps_per_epoch,
            "tokens_per_second": step_tokens / seconds,
            "seconds/step": seconds,
            "seconds/data": data_seconds,
            **{f"seconds/{part}": value for part, value in result.seconds.items()},
            **_memory(self.layout.device),
        }
        if self.flops_per_step is not None and self.peak_flops is not None:
            stats["mfu"] = self.flops_per_step / seconds / (self.peak_flops * self.layout.world_size)
        for watcher in watching:
            stats |= watcher.after_step(view, stats)
        self.log.log("train", self.step, stats)
        self.progress.update(self.step, stats)
        return result

    def _validate(self) -> None:
        if self.validate is None or (self.last_validation and self.last_validation[0] == self.step):
            return
        start = time.perf_counter()
        total = self.validate()
        self.last_validation = (self.step, total)
        values: dict[str, Any] = {
            "loss": total.mean,
            "perplexity": total.perplexity,
            "tokens": int(total.tokens),
        }
        if float(total.bytes):
            values["bits_per_byte"] = total.bits_per_byte
        values["seconds/validation"] = time.perf_counter() - start
        self.log.log("validation", self.step, values)
        self.progress.message(
            f"step {self.step}: validation loss {total.mean:.4f}, perplexity {total.perplexity:.1f}"
        )

    def _sample(self) -> None:
        if self.sample is not None and self.layout.is_main:
            self.log.sample(self.step, self.sample(self.step))
        self.layout.barrier()

    def _save(self) -> None:
        if self.last_saved == self.step:
            return
        self.log.sync()
        current = self.last_validation is not None and self.last_validation[0] == self.step
        state = {
            "step": self.step,
            "num_steps": self.num_steps,
            "total_tokens": self.total_tokens,
            "validation_loss": self.last_validation[1].mean if current and self.last_validation else None,
            "loader": self.loader.state_dict(),
        }
        start = time.perf_counter()
        path = checkpoint.save(self.layout, self.checkpoints, state, tokenizer=self.save_tokenizer)
        self.last_saved = self.step
        if self.layout.is_main:
            checkpoint.prune(
                self.checkpoints, keep_last=self.config.keep_last, keep_best=self.config.keep_best
            )
        self.log.event(self.step, f"saved {path.name}", seconds=time.perf_counter() - start)

    def _refuse_small_disk(self) -> None:
        """Find out now, not after hours, that the first checkpoint will not fit."""
        needed = checkpoint.bytes_needed(sum(p.numel() for p in self.layout.model.parameters()))
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.checkpoints).free
        if free < needed:
            raise CheckpointError(
                f"A checkpoint takes about {needed / 1e6:,.0f} MB, {self.checkpoints} has {free / 1e6:,.0f} MB free. "
                "Free space or choose another place with run.folder."
            )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a save at the next step border; a second Ctrl-C ends at once.

        A launcher passes Ctrl-C on as SIGTERM, so SIGTERM never counts as the second one.
        """

        def on_signal(number: int, frame: object) -> None:
            if number == signal.SIGINT and self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = self._signal or number
            self.progress.message(
                "stopping: will save after this step (Ctrl-C again: end at once, without saving)"
            )

        former = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def exit_code(outcome: Outcome) -> int:
    """0 for a finished run; 128 + signal for one that was asked to stop, as shells do."""
    return 0 if outcome.state == "finished" else 128 + (outcome.signal or signal.SIGINT)


def _memory(device: torch.device) -> dict[str, float]:
    """Megabytes: of the process, and of the device where there is one."""
    values = {"memory/process_mb": psutil.Process().memory_info().rss / 1e6}
    if device.type == "cuda":
        values["memory/allocated_mb"] = torch.cuda.memory_allocated(device) / 1e6
        values["memory/peak_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return values
