"""The loop: data, step, validate, sample, save, stop. Everything else is handed in as a value."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from minilm.alignment import Batch, Sum
from minilm.data.loader import Loader
from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckFailed, DataError, MinilmError
from minilm.training import checkpoint, incident, optim, rollback, saving
from minilm.training.columns import Columns, Counts
from minilm.training.ema import averaged
from minilm.training.layout import Layout
from minilm.training.limits import Budget
from minilm.training.settings import Log, Progress, TrainConfig
from minilm.training.signals import StopSignals
from minilm.training.step import NonFinite, StepResult, discard, optimizer_step
from minilm.training.watch import StepView, Watcher, around_forwards


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
        validation_store: str | None = None,
    ) -> None:
        self.config, self.rates, self.layout, self.loader = config, rates, layout, loader
        self.run_folder, self.checkpoints = run_folder, run_folder / "checkpoints"
        self.log, self.progress = log, progress
        self.validate, self.sample, self.tokenizer = validate, sample, tokenizer
        self.num_steps = config.num_steps(loader.steps_per_epoch)
        self.watchers, self.around_step = watchers, around_step
        self.validation_store = validation_store
        self.columns = Columns(
            config, layout, loader, num_steps=self.num_steps, flops_per_step=flops_per_step
        )
        self.step = (
            0  # of the schedule; the position in the data is loader.next_step, further on after a rollback
        )
        self.counts = Counts()
        self.saver = saving.Saver(
            layout,
            self.checkpoints,
            config,
            tokenizer=tokenizer.save if tokenizer else None,
            event=log.event,
        )
        self.spikes = incident.Spikes(config.spike_factor)
        self.keeper = incident.Keeper(run_folder, layout, loader, log, tokenizer)
        self.last_validation: tuple[int, Sum] | None = None
        self.validation_seconds, self.began = 0.0, time.perf_counter()
        self.last_saved: int | None = None
        self.stopped = StopSignals(progress.message)

    def resume(self, found: checkpoint.Found) -> None:
        """Continue after `found`: optimizer, random states, position in the data, counts, metrics. Collective."""
        self._stand_at(checkpoint.load(self.layout, found))
        self.log.resume_at(self.step)
        self.log.event(self.step, f"resumed from {found.folder.name}")

    def _stand_at(self, state: dict[str, Any]) -> None:
        """Counts and positions as a checkpoint remembers them (see `_state`)."""
        self.loader.load_state_dict(state["loader"])
        self.step = self.last_saved = state["step"]
        names = {field.name for field in dataclasses.fields(Counts)}
        self.counts = Counts(**{name: state[name] for name in names & state.keys()})
        self.spikes = incident.Spikes(self.config.spike_factor, state.get("recent_losses", ()))

    def run(self) -> Outcome:
        """Train to the last step, or to the next step border after SIGINT or SIGTERM (saving first)."""
        self.saver.prepare(self.num_steps)
        self.layout.objective.train()
        self.began = time.perf_counter()
        result: StepResult | None = None
        self.progress.start(self.num_steps, self.step)
        budget = Budget(self.layout, max_tokens=self.config.max_tokens, max_minutes=self.config.max_minutes)
        used_up = budget.used_up(self.counts.total_tokens)
        with self.stopped.heard(), self.saver:
            if self.step == 0:
                self._validate()
            while self.step < self.num_steps and not used_up:
                before = self.step
                with self.around_step(self.step + 1):
                    result = self._one_step()
                if self.step <= before:  # went back: all that is due there was done
                    if result.stop:
                        break
                    continue
                self.saver.poll()  # one that failed in the background ends the run here, not at the next save
                used_up = budget.used_up(self.counts.total_tokens)
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
        return Outcome(state, self.step, loss, validation, self.stopped.number, None if complete else used_up)

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
        """One step of the run, or the way back from it: then `self.step` is not larger than before."""
        start = time.perf_counter()
        micro_batches = next(self.loader)
        data_seconds = time.perf_counter() - start
        self._refuse_unknown_tokens(micro_batches)
        optim.set_rate(self.layout.optimizer, optim.rate_at(self.rates, self.step, self.num_steps))
        rates = optim.rates_of(self.layout.optimizer)
        view = StepView(self.step + 1, self.layout, micro_batches)
        watching = [watcher for watcher in self.watchers if watcher.wants(view.step)]
        random_state = checkpoint.random_states(self.layout.device)  # goes with the step if it must be kept
        kept: list[str] = []

        def inspect(result: StepResult) -> None:
            kind = self._wrong_with(result)
            if kind is not None:
                self._look_into(incident.Suspect(kind, view, result, rates, random_state), kept)

        def before_update() -> None:
            for watcher in watching:
                watcher.before_update(view)

        try:
            result = optimizer_step(
                self.layout,
                micro_batches,
                stop=self.stopped.number is not None,
                inspect=inspect,
                before_update=before_update,
                forwards=around_forwards(watching, view),
            )
        except rollback.GoBack as back:
            self._go_back(back)
            return back.result
        except NonFinite as bad:
            result = bad.result
            if self.config.on_nonfinite == "stop" or self.counts.num_skipped >= self.config.skip_budget:
                self._give_up(result, rates, kept)
            discard(self.layout)
            self.counts.num_skipped += 1
            watching = []
        seconds = time.perf_counter() - start
        self.step += 1
        if result.is_finite:
            self.counts.total_tokens += int(result.loss.tokens)
            self.spikes.add(result.loss.mean)
        stats = self.columns.of_step(
            result, self.counts, rates=rates, seconds=seconds, data_seconds=data_seconds
        )
        for watcher in watching:
            stats |= watcher.after_step(view, stats)
        self.log.log("train", self.step, stats)
        self.progress.update(self.step, stats)
        return result

    def _wrong_with(self, result: StepResult) -> incident.Kind | None:
        if not result.is_finite:
            return "nonfinite"
        return "spike" if self.spikes.is_spike(result.loss.mean) else None

    def _look_into(self, suspect: incident.Suspect, kept: list[str]) -> None:
        """Keep the step, tell, and decide before its update: return to go on with it, or raise. Collective."""
        target = None
        if suspect.kind == "spike" and self.config.on_spike == "rollback":
            self.saver.wait()
            target = rollback.target_of(self.layout, self.checkpoints, self.config.save_every)
            if target is None:
                text = f"step {suspect.view.step}: a spike, but there is no checkpoint to go back to yet: going on"
                self.log.event(suspect.view.step, text, show=True)
        text, folder = self.keeper.keep(
            suspect, self.spikes, self._state(), self.counts.num_rollbacks, always=target is not None
        )
        kept.append(text)
        if target is None:
            return
        if self.counts.num_rollbacks >= self.config.rollback_budget:
            self._show_untaken(suspect.result, suspect.rates)
            raise CheckFailed(
                f"The loss spikes again: {text}\nThe run went back {self.counts.num_rollbacks} times, which is all "
                "that train.rollback_budget allows; the step was not taken. Usual causes: a learning rate too high, "
                "damaged or very odd documents (the incidents show the rows), train.spike_factor too small. To go on "
                "all the same: --resume with another train.rollback_budget or train.on_spike report."
            )
        raise rollback.GoBack(suspect.result, target, folder)

    def _go_back(self, back: rollback.GoBack) -> None:
        """To the checkpoint, and on with the batches behind the offending one: see `rollback`. Collective."""
        spiked, behind = self.step + 1, self.loader.next_step
        state = rollback.put_back(self.layout, back.target)
        skipped = behind - int(state["loader"]["next_step"])
        num_skipped, num_rollbacks = self.counts.num_skipped, self.counts.num_rollbacks
        self._stand_at(state)
        # What the budgets count has happened, also in the part that is done again.
        self.counts.num_skipped, self.counts.num_rollbacks = num_skipped, num_rollbacks + 1
        self.loader.skip_to(behind)
        self.last_validation = None
        with checkpoint.together(self.layout, f"The way back to step {self.step} could not be written down"):
            self.log.go_back(self.step, back.incident / rollback.ABANDONED if back.incident else None)
            if self.layout.is_main:
                rollback.retire_newer(self.checkpoints, back.target, back.incident)
        text = f"step {spiked} spiked: went back to {back.target.folder.name} and on behind {skipped} skipped batches"
        used = f"{self.counts.num_rollbacks} of {self.config.rollback_budget} times"
        self.log.event(self.step, f"{text} ({used})", show=True, from_step=spiked, skipped_batches=skipped)

    def _give_up(self, result: StepResult, rates: dict[str, float], kept: list[str]) -> NoReturn:
        """Show the step that could not be taken as it is, and stop."""
        self._show_untaken(result, rates)
        if self.counts.num_skipped:
            kept.append(
                f"{self.counts.num_skipped} steps were skipped before, which is all that train.skip_budget allows."
            )
        raise NonFinite(result, "\n".join(kept))

    def _show_untaken(self, result: StepResult, rates: dict[str, float]) -> None:
        values = {"loss": result.loss.mean, "gradient_norm": result.gradient_norm, **rates}
        self.log.log("train", self.step + 1, values)

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
        if float(total.bytes) > 0:  # NaN: not counted
            values["bits_per_byte"] = total.bits_per_byte
        if self.layout.average is not None:
            with averaged(self.layout):
                values["ema_loss"] = self.validate().mean
        now = time.perf_counter()
        values["seconds/validation"] = now - start
        self.validation_seconds += now - start
        share = self.validation_seconds / (now - self.began)  # of the whole time of this process, also saves
        self.log.log("validation", self.step, values)
        cost = f"{now - start:.1f} s" + (f", {share:.1%} of the time" if self.step else "")
        self.progress.message(
            f"step {self.step}: validation loss {total.mean:.4f}, perplexity {total.perplexity:.1f} ({cost})"
        )

    def _sample(self) -> None:
        """A text that cannot be written is told, and never ends a run; a save under way is complete before."""
        if self.sample is not None:
            self.saver.wait()
        if self.sample is not None and self.layout.is_main:
            try:
                self.log.sample(self.step, self.sample(self.step))
            except MinilmError as error:
                self.log.event(self.step, f"no sample: {error}", show=True)
        self.layout.barrier()

    def _save(self) -> None:
        if self.last_saved == self.step:
            return
        self.log.sync()  # a checkpoint must not be newer than the metrics that lead to it
        self.saver.save(self._state())
        self.last_saved = self.step

    def _state(self) -> dict[str, Any]:
        """What a checkpoint remembers of the run at this step border."""
        validated, total = self.last_validation or (None, None)
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            **dataclasses.asdict(self.counts),
            "recent_losses": list(self.spikes.recent),
            "validation_loss": total.mean if total is not None and validated == self.step else None,
            "validation_store": self.validation_store,
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


def exit_code(outcome: Outcome) -> int:
    """0 for a finished run; 128 + signal for one that was asked to stop, as shells do."""
    return 0 if outcome.state == "finished" else 128 + (outcome.signal or signal.SIGINT)
