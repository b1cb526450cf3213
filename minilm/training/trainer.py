"""The loop: data, step, validate, sample, save, stop. Everything else is handed in as a value."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from minilm.alignment import Sum
from minilm.data.loader import Loader
from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckFailed, MinilmError
from minilm.training import checkpoint, clock, incident, optim, pending, rollback, saving
from minilm.training.columns import Columns, Counts
from minilm.training.layout import Layout
from minilm.training.limits import Budget, is_due
from minilm.training.outcome import Outcome
from minilm.training.settings import Log, Progress, TrainConfig
from minilm.training.signals import StopSignals
from minilm.training.step import NonFinite, StepResult, Unread, discard, optimizer_step, refuse_unknown_tokens
from minilm.training.validating import Validation
from minilm.training.watch import StepView, Watcher, around_forwards


class Trainer:
    """Runs steps from where the run stands to its last one.

    validate() -> Sum over the validation rows, on all ranks; sample(step) -> samples, on the first rank only.
    Both leave training mode and random states as they found them. around_step(step): entered before the data of a
    step is fetched, left when its line is in the log (later only for a step that no watcher holds up, see `pending`).
    flops_per_step: of all ranks together, forward and backward; with it and a known device the log has the share of
    the hardware's peak (mfu).
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
        self.validation, self.sample = Validation(validate, layout, log, progress), sample
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
        self.pending: pending.Pending | None = None  # the step before, if nobody has read its numbers
        self.again = 0  # a step that the device refused, to be taken again: it is looked at
        self.last_saved: int | None = None
        self.stopped = StopSignals(progress.message)
        self.budget = Budget(layout, max_tokens=config.max_tokens, max_minutes=config.max_minutes)

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
        result: StepResult | None = None
        self.progress.start(self.num_steps, self.step)
        used_up = self.budget.used_up(self.counts.total_tokens)
        with self.stopped.heard(), self.saver:
            if self.step == 0:
                self.validation.at(0)
            while self.step < self.num_steps and not used_up:
                before = self.step
                with self.around_step(self.step + 1):
                    result = self._one_step()
                if result is None:  # to be read later: nothing is due after it
                    continue
                if self.step <= before:  # went back: all that is due there was done
                    if result.stop:
                        break
                    continue
                self.saver.poll()  # one that failed in the background ends the run here, not at the next save
                used_up = self.budget.used_up(self.counts.total_tokens)
                at_end = self.step == self.num_steps or bool(used_up)
                due = functools.partial(
                    is_due, self.config, step=self.step, stopping=result.stop, at_end=at_end
                )
                if due("validate_every"):
                    self.validation.at(self.step)
                if due("save_every"):
                    self._save()
                if due("sample_every"):  # after the save: a text that cannot be written must cost nothing
                    self._sample()
                if result.stop:
                    break
        loss = result.loss.mean if result and result.is_finite else None
        complete = self.step >= self.num_steps
        state: Literal["finished", "interrupted"] = "finished" if complete or used_up else "interrupted"
        if used_up and not complete:
            self.log.event(self.step, f"finished: {used_up}")
        return Outcome(
            state, self.step, loss, self.validation.mean, self.stopped.number, None if complete else used_up
        )

    def _one_step(self) -> StepResult | None:
        """One step of the run, or the way back from it: then `self.step` is not larger than before.

        None: its numbers will be read later, or it turned out that the step before must be taken again.
        """
        try:
            try:
                return self._next_step()
            except Exception:
                self._count_pending()  # whatever became of this step, the one before it has its line
                raise
        except pending.TakeAgain as refused:
            self._go_before(refused.begun)
            return None

    def _next_step(self) -> StepResult | None:
        begun = self._begin()
        step, kept, watching = begun.view.step, list[str](), list[Watcher]()

        def may_wait() -> bool:
            self._count_pending()
            watching.extend(watcher for watcher in self.watchers if watcher.wants(step))
            return self._may_wait(step, watching)

        def inspect(result: StepResult) -> None:
            kind = self._wrong_with(result)
            if kind is not None:
                suspect = incident.Suspect(kind, begun.view, result, begun.rates, begun.random_state)
                self._look_into(suspect, kept)

        def before_update() -> None:
            for watcher in watching:
                watcher.before_update(begun.view)

        try:
            result = optimizer_step(
                self.layout,
                begun.view.micro_batches,
                stop=self.stopped.number is not None,
                inspect=inspect,
                before_update=before_update,
                forwards=around_forwards(self.watchers, begun.view),
                may_wait=may_wait,
            )
        except rollback.GoBack as back:
            self._go_back(back)
            return back.result
        except NonFinite as bad:
            result = bad.result
            if self.config.on_nonfinite == "stop" or self.counts.num_skipped >= self.config.skip_budget:
                self._give_up(result, begun.rates, kept)
            discard(self.layout)
            self.counts.num_skipped += 1
            watching = []
        self.step, ended = step, clock.mark(self.layout.device)
        if isinstance(result, Unread):
            self.pending = pending.Pending(begun, result, watching, ended)
            return None
        if step == self.again and result.is_finite:
            self.log.event(step, f"step {step} {pending.ANOTHER_ANSWER}", show=True)
        self._count(begun, result, watching, ended)
        return result

    def _begin(self) -> pending.Begun:
        """Fetch the data of the next step and set its rates."""
        start = time.perf_counter()
        began = self.pending.ended if self.pending else clock.mark(self.layout.device)
        micro_batches = next(self.loader)
        data_seconds = time.perf_counter() - start
        data_step = self.loader.next_step - 1
        refuse_unknown_tokens(micro_batches, self.layout.model, lambda: self.loader.where(data_step))
        optim.set_rate(self.layout.optimizer, optim.rate_at(self.rates, self.step, self.num_steps))
        return pending.Begun(
            StepView(self.step + 1, self.layout, micro_batches),
            optim.rates_of(self.layout.optimizer),
            checkpoint.random_states(self.layout.device),
            data_step,
            self.columns.position(),
            began,
            data_seconds,
        )

    def _may_wait(self, step: int, watching: Sequence[Watcher]) -> bool:
        """May what this step measures be read when the next one is under way? See `pending`."""
        return (
            self.layout.can_wait
            and step != self.again
            and not pending.is_awaited(self.config, step, self.num_steps, watching)
            and not self.budget.used_up(self.counts.total_tokens + self.columns.most_tokens)
        )

    def _count_pending(self) -> None:
        """Read the step before, if nobody has, and count it. Raises TakeAgain where the device refused it."""
        if self.pending is None:
            return
        former, self.pending = self.pending, None
        result = former.read()
        if self.layout.average is not None:
            self.layout.average.update()
        self._count(former.begun, result, former.watching, former.ended)
        self.saver.poll()

    def _count(
        self, begun: pending.Begun, result: StepResult, watching: Sequence[Watcher], ended: clock.Mark
    ) -> None:
        """A step that is done, taken or skipped: into the counts, the log and the console."""
        if result.is_finite:
            self.counts.total_tokens += int(result.loss.tokens)
            self.spikes.add(result.loss.mean)
        stats = self.columns.of_step(
            result,
            self.counts,
            rates=begun.rates,
            position=begun.position,
            seconds=pending.seconds(begun, ended),
            data_seconds=begun.data_seconds,
        )
        for watcher in watching:
            stats |= watcher.after_step(begun.view, stats)
        self.log.log("train", begun.view.step, stats)
        self.progress.update(begun.view.step, stats)

    def _go_before(self, begun: pending.Begun) -> None:
        """To before a step that the device refused; what was begun of the step after it is forgotten."""
        discard(self.layout)
        self.loader.skip_to(begun.data_step)
        checkpoint.set_random_states(begun.random_state, self.layout.device)
        self.step, self.again = begun.view.step - 1, begun.view.step

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
        self.validation.forget()
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
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            **dataclasses.asdict(self.counts),
            "recent_losses": list(self.spikes.recent),
            "validation_loss": self.validation.mean_at(self.step),
            "validation_store": self.validation_store,
            "loader": self.loader.state_dict(),
        }
