"""The loop: data, step, validate, sample, save, stop. Everything else is handed in as a value."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import psutil
import torch

from minilm.alignment import Batch, Sum
from minilm.data.loader import Loader
from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckpointError, DataError, MinilmError
from minilm.training import checkpoint, incident, optim
from minilm.training.ema import averaged
from minilm.training.hardware import peak_flops
from minilm.training.layout import Layout
from minilm.training.limits import Budget
from minilm.training.settings import Log, Progress, TrainConfig
from minilm.training.step import NonFinite, StepResult, discard, optimizer_step
from minilm.training.watch import StepView, Watcher


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `state`: finished or interrupted."""

    state: Literal["finished", "interrupted"]
    step: int
    loss: float | None
    validation_loss: float | None
    signal: int | None = None
    reason: str | None = None  # why it was finished before its last step: a budget


class Trainer:
    """Runs steps from where the run stands to its last one.

    validate() -> Sum over the validation rows, on all ranks; sample(step) -> samples, on the first rank only.
    Both leave training mode and random states as they found them. around_step(step): entered before the data of a
    step is fetched, left when its line is in the log. flops_per_step: of all ranks together, forward
    and backward; with it and a known device the log has the share of the hardware's peak (mfu).
    """

    def __init__(
        self,
        config: TrainConfig,
        rates: optim.OptimConfig,
        *,
        layout: Layout,
        loader: Loader,
        run_folder: Path,
        log: Log,
        progress: Progress,
        validate: Callable[[], Sum] | None,
        sample: Callable[[int], list[dict[str, Any]]] | None,
        tokenizer: Tokenizer | None,
        watchers: Sequence[Watcher] = (),
        around_step: Callable[[int], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        flops_per_step: float | None = None,
    ) -> None:
        self.config, self.rates, self.layout, self.loader = config, rates, layout, loader
        self.run_folder, self.checkpoints = run_folder, run_folder / "checkpoints"
        self.log, self.progress = log, progress
        self.validate, self.sample, self.tokenizer = validate, sample, tokenizer
        self.num_steps = config.num_steps(loader.steps_per_epoch)
        self.watchers, self.around_step = watchers, around_step
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops(layout.device, bf16=layout.bf16)
        self.step = 0
        self.total_tokens = 0
        self.num_skipped = 0
        self.spikes = incident.Spikes(config.spike_factor)
        self.last_validation: tuple[int, Sum] | None = None
        self.last_saved: int | None = None
        self._signal: int | None = None

    def resume(self, found: checkpoint.Found) -> None:
        """Continue after `found`: optimizer, random states, position in the data, counts, metrics. Collective."""
        state = checkpoint.load(self.layout, found)
        self.loader.load_state_dict(state["loader"])
        self.step, self.total_tokens, self.last_saved = state["step"], state["total_tokens"], state["step"]
        self.num_skipped = state.get("num_skipped", 0)
        self.spikes = incident.Spikes(self.config.spike_factor, state.get("recent_losses", ()))
        self.log.resume_at(self.step)
        self.log.event(self.step, f"resumed from {found.folder.name}")

    def run(self) -> Outcome:
        """Train to the last step, or to the next step border after SIGINT or SIGTERM (saving first)."""
        self._refuse_small_disk()
        self.layout.objective.train()
        result: StepResult | None = None
        self.progress.start(self.num_steps, self.step)
        budget = Budget(self.layout, max_tokens=self.config.max_tokens, max_minutes=self.config.max_minutes)
        used_up = budget.used_up(self.total_tokens)
        with self._signals():
            if self.step == 0:
                self._validate()
            while self.step < self.num_steps and not used_up:
                with self.around_step(self.step + 1):
                    result = self._one_step()
                used_up = budget.used_up(self.total_tokens)
                due = self._due(result.stop, at_end=self.step == self.num_steps or bool(used_up))
                if due("validate_every"):
                    self._validate()
                if due("save_every"):
                    self._save()
                if due("sample_every"):  # after the save: a text that cannot be written must cost nothing
                    self._sample()
                if result.stop:
                    break
        loss = result.loss.mean if result and result.is_finite else None
        validation = self.last_validation[1].mean if self.last_validation else None
        complete = self.step >= self.num_steps
        state: Literal["finished", "interrupted"] = "finished" if complete or used_up else "interrupted"
        if used_up and not complete:
            self.log.event(self.step, f"finished: {used_up}")
        return Outcome(state, self.step, loss, validation, self._signal, None if complete else used_up)

    def _due(self, stopping: bool, *, at_end: bool) -> Callable[[str], bool]:
        """Is `validate_every`, ... due after this step? At the end everything is; a stop only saves."""

        def due(name: str) -> bool:
            every = getattr(self.config, name)
            if stopping and not at_end:  # a launcher gives its processes half a minute: save, nothing else
                return name == "save_every"
            if name == "validate_every" and due("save_every"):
                return True  # so that the best checkpoint is known
            return at_end or (every is not None and self.step % every == 0)

        return due

    def _one_step(self) -> StepResult:
        start = time.perf_counter()
        micro_batches = next(self.loader)
        data_seconds = time.perf_counter() - start
        self._refuse_unknown_tokens(micro_batches)
        optimizer = self.layout.optimizer
        optim.set_rate(optimizer, optim.rate_at(self.rates, self.step, self.num_steps))
        rates = optim.rates_of(optimizer)
        view = StepView(self.step + 1, self.layout, micro_batches)
        watching = [watcher for watcher in self.watchers if watcher.wants(view.step)]
        random_state = checkpoint.random_states(self.layout.device)  # goes with the step if it must be kept
        kept: list[str] = []

        def inspect(result: StepResult) -> None:
            if not result.is_finite:
                kept.append(self._keep("nonfinite", view, result, rates, random_state))
            elif self.spikes.is_spike(result.loss.mean):
                self._keep("spike", view, result, rates, random_state)

        def before_update() -> None:
            for watcher in watching:
                watcher.before_update(view)

        try:
            result = optimizer_step(
                self.layout,
                micro_batches,
                stop=self._signal is not None,
                inspect=inspect,
                before_update=before_update,
            )
        except NonFinite as bad:
            result = bad.result
            if self.config.on_nonfinite == "stop" or self.num_skipped >= self.config.skip_budget:
                self._give_up(result, rates, kept)
            discard(self.layout)
            self.num_skipped += 1
            watching = []
        seconds = time.perf_counter() - start
        self.step += 1
        step_tokens = int(result.loss.tokens)
        if result.is_finite:
            self.total_tokens += step_tokens
            self.spikes.add(result.loss.mean)
        stats = {
            "loss": result.loss.mean,
            **{f"auxiliary/{name}": value for name, value in result.auxiliary.items()},
            **rates,
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
        if not result.is_finite:
            stats["skipped"] = True
        if self.flops_per_step is not None and self.peak_flops is not None:
            stats["mfu"] = self.flops_per_step / seconds / (self.peak_flops * self.layout.world_size)
        for watcher in watching:
            stats |= watcher.after_step(view, stats)
        self.log.log("train", self.step, stats)
        self.progress.update(self.step, stats)
        return result

    def _keep(
        self,
        kind: incident.Kind,
        view: StepView,
        result: StepResult,
        rates: dict[str, float],
        random_state: dict[str, Any],
    ) -> str:
        """Write the incident and tell; returns what the user is told. A disk that is full does not end the run."""
        what = f"step {view.step}: loss {result.loss.mean:.4g}, gradient norm {result.gradient_norm:.4g}"
        if kind == "spike":
            what = f"{what}: a spike, above {self.spikes.limit():.4g}"
            if self._spikes_kept() >= incident.MOST_SPIKES:
                self.log.event(view.step, f"{what}; not kept, there are {incident.MOST_SPIKES}", show=True)
                return what
        try:
            folder = incident.write(
                self.run_folder,
                kind,
                view,
                result,
                loader=self.loader,
                rates=rates,
                state=self._state(),
                random_state=random_state,
                tokenizer=self.tokenizer,
            )
            text = f"{what}; kept, compute it again with: minilm replay {folder}"
        except CheckpointError as error:
            text = f"{what}; not kept: {error}"
        self.log.event(view.step, text, show=True)
        return text

    def _spikes_kept(self) -> int:
        """Incidents of this run; the first rank counts, so that all ranks agree."""
        folder = self.run_folder / incident.FOLDER
        own = len(list(folder.glob("step-*"))) if self.layout.is_main and folder.is_dir() else 0
        return int(self.layout.all_reduce([float(own)])[0])

    def _give_up(self, result: StepResult, rates: dict[str, float], kept: list[str]) -> NoReturn:
        """Show the step that could not be taken as it is, and stop."""
        values = {"loss": result.loss.mean, "gradient_norm": result.gradient_norm, **rates}
        self.log.log("train", self.step + 1, values)
        if self.num_skipped:
            kept.append(
                f"{self.num_skipped} steps were skipped before, which is all that train.skip_budget allows."
            )
        raise NonFinite(result, "\n".join(kept))

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
        if self.layout.average is not None:
            with averaged(self.layout):
                values["ema_loss"] = self.validate().mean
        values["seconds/validation"] = time.perf_counter() - start
        self.log.log("validation", self.step, values)
        self.progress.message(
            f"step {self.step}: validation loss {total.mean:.4f}, perplexity {total.perplexity:.1f}"
        )

    def _sample(self) -> None:
        """A text that cannot be written is told, and never ends a run."""
        if self.sample is not None and self.layout.is_main:
            try:
                self.log.sample(self.step, self.sample(self.step))
            except MinilmError as error:
                self.log.event(self.step, f"no sample: {error}", show=True)
        self.layout.barrier()

    def _save(self) -> None:
        if self.last_saved == self.step:
            return
        self.log.sync()
        start = time.perf_counter()
        path = checkpoint.save(
            self.layout,
            self.checkpoints,
            self._state(),
            tokenizer=self.tokenizer.save if self.tokenizer else None,
        )
        self.last_saved = self.step
        if self.layout.is_main:
            checkpoint.prune(
                self.checkpoints, keep_last=self.config.keep_last, keep_best=self.config.keep_best
            )
        self.log.event(self.step, f"saved {path.name}", seconds=time.perf_counter() - start)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint remembers of the run at this step border."""
        validated, total = self.last_validation or (None, None)
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            "total_tokens": self.total_tokens,
            "num_skipped": self.num_skipped,
            "recent_losses": list(self.spikes.recent),
            "validation_loss": total.mean if total is not None and validated == self.step else None,
            "loader": self.loader.state_dict(),
        }

    def _refuse_unknown_tokens(self, micro_batches: Sequence[Batch]) -> None:
        """Ids outside of the vocabulary would end a CUDA device with an assertion that names nothing."""
        highest = max(int(torch.maximum(b.inputs.max(), b.targets.max())) for b in micro_batches)
        num_tokens = self.layout.model.config.vocab_size
        if highest >= num_tokens:
            rows = self.loader.where(self.loader.next_step - 1)
            raise DataError(
                f"Token id {highest} is outside the model's vocabulary 0 .. {num_tokens - 1}: the store was altered "
                "while this run reads it. `minilm data info STORE --verify` names the file; restore it, then continue "
                f"with --resume. What the step is made of:\n{rows}"
            )

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
