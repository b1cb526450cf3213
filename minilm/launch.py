"""From settings to a running Trainer: data, model, layout, validation, samples and log put together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from minilm import checked, initial, manifest, models, preview
from minilm.alignment import Batch, Sum
from minilm.books import Books
from minilm.config import Resolved, flatten
from minilm.data.loader import Data, aligned, open_data, validation_batches
from minilm.evaluation.generate import generate
from minilm.evaluation.score import evaluate
from minilm.evaluation.text import byte_lengths_of
from minilm.models import folder as model_folder
from minilm.run import RunConfig, with_vocabulary
from minilm.start import Start, begin, memory_explained
from minilm.track import read_metrics
from minilm.training import fitting, optim, passing, paths
from minilm.training.agreement import same_on_all
from minilm.training.layout import Layout
from minilm.training.limits import deterministic
from minilm.training.lock import locked
from minilm.training.objective import Objective
from minilm.training.outcome import Outcome, exit_code
from minilm.training.profile import StepProfiler, Steps
from minilm.training.trainer import Trainer
from minilm.training.usage import Usage
from minilm.training.watch import LayerNorms, Watcher

SAMPLES = "samples.md"
PROFILE = "profile"


def train(
    resolved: Resolved[RunConfig], *, resume: bool, dry_run: bool = False, profile: str | None = None
) -> int:
    """Run a training job to its end or to a signal; returns the exit code. Every rank calls it.

    dry_run  check everything, show what would be done, write nothing
    profile  steps to profile, `10:13` or `10`

    Raises ConfigError, DataError, CheckpointError or CheckFailed; what was computed until then is on disk.
    """
    with deterministic(resolved.value.train.deterministic):
        layout = Layout(resolved.value.train.asked(resolved.value.optim.clip_norm))
        try:
            return _train(layout, resolved, resume, dry_run, Steps.parse(profile) if profile else None)
        finally:
            layout.close()


def _train(
    layout: Layout, resolved: Resolved[RunConfig], resume: bool, dry_run: bool, profile: Steps | None
) -> int:
    data = open_data(resolved.value.data)
    config = with_vocabulary(resolved, data.train.store)
    same_on_all(layout, {**_shared(config), "the store's fingerprint": data.train.store.fingerprint})
    found = None
    if config.train.micro_batch == "auto":
        config, found = _fitted(layout, config, data, resolved.origins)
    if dry_run:
        return _preview(begin(layout, config, resolved.origins, data, resume=resume, profile=profile), found)
    with locked(layout, config.run_folder):
        start = begin(layout, config, resolved.origins, data, resume=resume, profile=profile)
        with memory_explained(start):
            return _run(start, profile, found)


def _fitted(
    layout: Layout, config: RunConfig, data: Data, origins: dict[str, str]
) -> tuple[RunConfig, fitting.Fit]:
    """The settings with the number that train.micro_batch auto stands for here. The layout is cut accordingly."""
    needed, checkpoint_bytes = preview.memory_by_rows(config, layout, data)
    room, on_cpu, seed = fitting.room_of(layout), layout.device_type == "cpu", config.train.seed
    if on_cpu:  # where the host's memory is the device's, the copy that a save in the background makes counts
        beside = checkpoint_bytes if config.train.save_in_background else 0
        found = fitting.largest(layout, needed, room, None, beside=beside)
    else:
        policy, most = config.train.activation_checkpointing, data.train.rows_per_epoch

        def batch_of(rows: int) -> Batch:  # a batch larger than an epoch is refused, but by what comes after
            return aligned(data.train, data.train.order(0, seed, 0, min(rows, most)))

        with fitting.trial(layout, config.model, needed, batch_of, recompute=policy) as fits:
            found = fitting.largest(layout, needed, room, fits)
    layout.cut(found.rows)
    origins["train.micro_batch"] = f"auto ({origins['train.micro_batch']})"
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=found.rows)), found


def _shared(config: RunConfig) -> dict[str, Any]:
    """The settings that every process must have; a store may lie elsewhere on another machine."""
    own = ("data.store", "data.validation_store", "data.prefetch")
    return {name: value for name, value in flatten(config).items() if name not in own}


def _preview(start: Start, fitted: fitting.Fit | None) -> int:
    """A page in place of the training."""
    if start.layout.is_main:
        console = Console()
        preview.show(start, console)
        if fitted is not None:
            console.print(fitted.told, markup=False, highlight=False)
        for line in start.idle:
            console.print(f"warning: {line}", markup=False, highlight=False)
    return 0


def _run(start: Start, profile: Steps | None, fitted: fitting.Fit | None) -> int:
    config, layout, data, found = start.config, start.layout, start.data, start.found
    if start.is_complete:
        return _close_books(start)
    chosen = paths.take(config.model, layout, compiled=config.train.compile)
    model, source = _model(start)
    optimizer = optim.build(model, config.optim)
    checks = checked.before_first_step(start, model, optimizer)
    passing.arrange(model, recompute=config.train.activation_checkpointing, compiled=config.train.compile)
    layout.prepare(Objective(model).to(layout.device), optimizer, ema_decay=config.train.ema_decay)
    layout.seed_dropout(config.train.seed)
    said = {"source": source, "checks": checks, "paths": chosen}
    with Books(config, start.origins, layout, data, step=start.step, **said) as books:
        watchers, profiler = _observers(start, books, profile)
        trainer = _trainer(start, books, watchers, profiler)
        books.announce(start.loader, trainer)
        for line in start.idle:
            books.progress.message(f"warning: {line}")
        with start.loader, profiler or contextlib.nullcontext():
            if found is not None:
                trainer.resume(found)
            elif start.used:  # killed before its first save: the same run from its first step
                books.log.resume_at(0)
                books.log.event(
                    0, "it has no complete checkpoint: begins again with its first step", show=True
                )
            if source is not None:
                books.log.event(0, f"begins with the weights of {start.source}", show=True)
            if fitted is not None:
                books.log.event(start.step, fitted.told, show=True)
            outcome = trainer.run()
        books.outcome = outcome
    if layout.is_main:
        _farewell(config, outcome, checks)
    return exit_code(outcome)


def _trainer(start: Start, books: Books, watchers: list[Watcher], profiler: StepProfiler | None) -> Trainer:
    config, layout, data, length = start.config, start.layout, start.data, start.config.data.sequence_length
    return Trainer(
        config.train,
        config.optim,
        layout=layout,
        loader=start.loader,
        run_folder=config.run_folder,
        log=books.log,
        progress=books.progress,
        validate=_validation(config, layout, data),
        sample=_sampling(config, layout, data),
        tokenizer=data.tokenizer,
        watchers=watchers,
        around_step=profiler.around if profiler else contextlib.nullcontext,
        flops_per_step=config.train.batch_size * length * config.model.training_flops_per_token(length),
        validation_store=start.validation_fingerprint,
    )


def _close_books(start: Start) -> int:
    """The last step is done and saved. A run that was killed right then has no end in its books: they get it now."""
    found, folder = start.found, start.config.run_folder
    assert found is not None
    if start.layout.is_main:
        has_end = (folder / manifest.FILE).is_file() and manifest.state_of(folder) == "finished"
        print(f"{folder} is finished: {found.folder.name} of {start.num_steps} steps.", file=sys.stderr)
        if not has_end:
            loss = next((r["loss"] for r in read_metrics(folder, "train") if r["step"] == found.step), None)
            validation = found.trainer.get("validation_loss")
            with Books(start.config, start.origins, start.layout, start.data, step=found.step) as books:
                books.log.resume_at(found.step)
                books.outcome = Outcome("finished", found.step, loss, validation)
            print(f"Its manifest and {folder / 'loss.png'} were completed.", file=sys.stderr)
    return 0


def _observers(
    start: Start, books: Books, profile: Steps | None
) -> tuple[list[Watcher], StepProfiler | None]:
    """The watchers that the settings ask for; the profiler is one of them, on the first rank."""
    config, layout = start.config, start.layout
    watchers: list[Watcher] = [LayerNorms(config.train.norms_every)] if config.train.norms_every else []
    if config.train.usage_every:
        told = functools.partial(books.log.event, show=True)
        watchers.append(Usage(config.train.usage_every, warmup_steps=config.optim.warmup_steps, event=told))
    watch = checked.watch_of(start, books)
    watchers += [watch] if watch is not None else []
    if profile is None or not layout.is_main:
        return watchers, None
    about = f"{config.model.name}, {config.model.num_parameters():,} parameters; {layout}"
    place = config.run_folder / PROFILE
    profiler = StepProfiler(profile, place, layout.device, message=books.progress.message, about=about)
    return [*watchers, profiler], profiler


def _model(start: Start) -> tuple[torch.nn.Module, dict[str, Any] | None]:
    """The model with the weights that the run begins with here; and where they come from, if from another one."""
    config, source = start.config, None
    torch.manual_seed(config.train.seed)
    model = models.build(config.model)
    if start.found is not None:
        model_folder.load_weights(model, start.found.folder)
    elif start.source is not None:
        source = initial.take_over(model, start.source)
    return model.to(start.layout.device), source


def _validation(config: RunConfig, layout: Layout, data: Data) -> Callable[[], Sum] | None:
    rows = data.validation
    if rows is None:
        return None
    lengths = byte_lengths_of(data.tokenizer) if data.tokenizer else None

    def validate() -> Sum:
        batches = validation_batches(
            rows, layout.micro_batch, layout.rank, layout.world_size, max_rows=config.train.validation_rows
        )
        with layout.autocast():
            return evaluate(layout.model, batches, byte_lengths=lengths, device=layout.device)

    return validate


def _sampling(config: RunConfig, layout: Layout, data: Data) -> Callable[[int], list[dict[str, Any]]] | None:
    tokenizer, settings = data.tokenizer, config.sample
    if tokenizer is None:
        return None
    # An empty prompt starts a document; without a BOS token the end of the one before it does.
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    prompts = [tokenizer.prompt(text) or [start] for text in settings.prompts]
    room = config.model.max_length - max((len(prompt) for prompt in prompts), default=0)

    def sample(step: int) -> list[dict[str, Any]]:
        with layout.autocast():
            written = generate(
                layout.model,
                prompts,
                max_new_tokens=min(settings.max_new_tokens, max(1, room)),
                temperature=settings.temperature,
                top_k=settings.top_k,
                seed=settings.seed,
                eos_id=tokenizer.eos_id,
            )
        samples = [
            {"prompt": prompt, "text": tokenizer.decode(result.tokens), "stopped": result.stopped}
            for prompt, result in zip(settings.prompts, written, strict=True)
        ]
        with (config.run_folder / SAMPLES).open("a", encoding="utf-8") as file:
            for entry in samples:
                file.write(f"## step {step}, prompt {entry['prompt']!r}, ended by {entry['stopped']}\n\n")
                file.write(
                    "\n".join(f"    {line}" for line in (entry["prompt"] + entry["text"]).splitlines())
                    + "\n\n"
                )
        return samples

    return sample


def _farewell(config: RunConfig, outcome: Outcome, checks: dict[str, Any]) -> None:
    folder = config.run_folder
    if outcome.state == "interrupted":
        print(
            f"\nstopped after step {outcome.step}; continue with the same command and --resume",
            file=sys.stderr,
        )
        return
    validation = "" if outcome.validation_loss is None else f", validation loss {outcome.validation_loss:.4f}"
    loss = "" if outcome.loss is None else f": training loss {outcome.loss:.4f}"
    why = f" ({outcome.reason})" if outcome.reason else ""
    print(f"\nfinished at step {outcome.step}{why}{loss}{validation}", file=sys.stderr)
    print(
        f"  run folder  {folder}\n  curve       {folder / 'loss.png'}\n  samples     {folder / SAMPLES}\n"
        f"  checks      {checked.counted(checks)}",
        file=sys.stderr,
    )
