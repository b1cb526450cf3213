"""From settings to a running Trainer: data, model, layout, validation, samples and log put together."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from minilm import models, preview
from minilm.alignment import Sum
from minilm.books import Books
from minilm.config import Resolved, flatten
from minilm.data.loader import Data, Loader, open_data, validation_batches
from minilm.errors import ConfigError
from minilm.evaluation.generate import generate
from minilm.evaluation.score import evaluate
from minilm.evaluation.text import byte_lengths_of
from minilm.models import folder as model_folder
from minilm.run import CONFIG, RunConfig, load_config, with_vocabulary
from minilm.training import checkpoint, optim, passing
from minilm.training.layout import Layout
from minilm.training.limits import deterministic
from minilm.training.lock import locked
from minilm.training.objective import Objective
from minilm.training.profile import StepProfiler, Steps
from minilm.training.trainer import Outcome, Trainer, exit_code
from minilm.training.watch import LayerNorms, Watcher

SAMPLES = "samples.md"
PROFILE = "profile"

# Settings that change no weight and no logged training loss: how often something is looked at, where things lie,
# and how the same global batch is cut.
_FREE_ON_RESUME = (
    *(
        "run.",
        "track.",
        "sample.",
        "data.store",
        "data.validation_store",
        "data.prefetch",
        "train.micro_batch",
    ),
    *(
        "train.ranks",
        "train.device",
        "train.keep_",
        "train.save_every",
        "train.sample_every",
        "train.validat",
        "train.activation_checkpointing",
        "train.max_",
        "train.on_nonfinite",
        "train.skip_budget",
        "train.spike_factor",
    ),
)


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
    if dry_run:
        return _preview(layout, config, resolved.origins, data, resume, profile)
    with locked(layout, config.run_folder):
        return _run(layout, config, resolved.origins, data, resume, profile)


def _preview(
    layout: Layout,
    config: RunConfig,
    origins: dict[str, str],
    data: Data,
    resume: bool,
    profile: Steps | None,
) -> int:
    """What a real start checks before it writes, and a page in place of the training."""
    _, found = _start_or_resume(config, resume, layout)
    plan = preview.Plan(
        config, origins, layout, data, _loader(config, layout, data), found.step if found else 0
    )
    if profile is not None:
        profile.check(done=plan.step, num_steps=plan.num_steps)
    if layout.is_main:
        preview.show(plan, Console())
    return 0


def _loader(config: RunConfig, layout: Layout, data: Data) -> Loader:
    return Loader(
        data.train,
        batch_rows=config.train.batch_size,
        micro_batch=layout.micro_batch,
        rank=layout.rank,
        world=layout.world_size,
        seed=config.train.seed,
        prefetch=config.data.prefetch,
    )


def _run(
    layout: Layout,
    config: RunConfig,
    origins: dict[str, str],
    data: Data,
    resume: bool,
    profile: Steps | None,
) -> int:
    used, found = _start_or_resume(config, resume, layout)
    model = _model(config, layout, found)
    layout.prepare(
        Objective(model).to(layout.device), optim.build(model, config.optim), ema_decay=config.train.ema_decay
    )
    loader = _loader(config, layout, data)
    num_steps = config.train.num_steps(loader.steps_per_epoch)
    if config.optim.warmup_steps > num_steps:
        raise ConfigError(
            f"optim.warmup_steps: {config.optim.warmup_steps} steps of warm-up do not fit into the {num_steps} steps "
            f"that train.epochs {config.train.epochs} makes."
        )
    if found is not None and found.step >= num_steps:
        if layout.is_main:
            print(
                f"{config.run_folder} is finished: {found.folder.name} of {num_steps} steps.", file=sys.stderr
            )
        return 0
    if profile is not None:
        profile.check(done=found.step if found else 0, num_steps=num_steps)
    length = config.data.sequence_length
    # Dropout must differ between ranks; the weights are the same on all, they were drawn before.
    torch.manual_seed(config.train.seed * 100_003 + layout.rank + 1)
    with Books(config, origins, layout, data, step=found.step if found else 0) as books:
        watchers, profiler = _observers(config, layout, books, profile)
        trainer = Trainer(
            config.train,
            config.optim,
            layout=layout,
            loader=loader,
            run_folder=config.run_folder,
            log=books.log,
            progress=books.progress,
            validate=_validation(config, layout, data),
            sample=_sampling(config, layout, data),
            tokenizer=data.tokenizer,
            watchers=watchers,
            around_step=profiler.around if profiler else contextlib.nullcontext,
            flops_per_step=config.train.batch_size * length * config.model.training_flops_per_token(length),
        )
        books.announce(loader, trainer)
        with loader, profiler or contextlib.nullcontext():
            if found is not None:
                trainer.resume(found)
            elif used:  # killed before its first save: the same run from its first step
                books.log.resume_at(0)
            outcome = trainer.run()
        books.outcome = outcome
    if layout.is_main:
        _farewell(config, outcome)
    return exit_code(outcome)


def _observers(
    config: RunConfig, layout: Layout, books: Books, profile: Steps | None
) -> tuple[list[Watcher], StepProfiler | None]:
    """The watchers that the settings ask for; the profiler is one of them, on the first rank."""
    watchers: list[Watcher] = [LayerNorms(config.train.norms_every)] if config.train.norms_every else []
    if profile is None or not layout.is_main:
        return watchers, None
    about = f"{config.model.name}, {config.model.num_parameters():,} parameters; {layout}"
    place = config.run_folder / PROFILE
    profiler = StepProfiler(profile, place, layout.device, message=books.progress.message, about=about)
    return [*watchers, profiler], profiler


def _start_or_resume(config: RunConfig, resume: bool, layout: Layout) -> tuple[bool, checkpoint.Found | None]:
    """Is the run folder in use (allowed with --resume only), and the checkpoint to continue from, if it has one."""
    folder = config.run_folder
    used = (folder / "metrics.jsonl").is_file() or bool(checkpoint.list_checkpoints(folder / "checkpoints"))
    layout.barrier()  # nobody looks after the first rank has begun to write
    if not resume:
        if used:
            raise ConfigError(
                f"The run folder {folder} is in use. Continue it with --resume, or give another --run.name."
            )
        return False, None
    if used:
        _refuse_changes(config, folder)
    if not checkpoint.list_checkpoints(folder / "checkpoints"):
        return used, None
    found, damaged = checkpoint.find(folder)
    for line in damaged if layout.is_main else ():
        print(f"damaged checkpoint passed over: {line}", file=sys.stderr)
    # train.precision auto follows the machine and the launcher: what it stood for must not change unseen.
    before, now = found.trainer["layout"]["precision"], layout.facts()["precision"]
    if before != now:
        raise ConfigError(
            f"The run was trained in {before}, and here train.precision {config.train.precision} means {now}. Give "
            f"--train.precision={before} to go on with it, or another --run.name to start a new run."
        )
    return used, found


def _refuse_changes(config: RunConfig, folder: Path) -> None:
    """A resumed run is the run that was never interrupted: settings that change its numbers must be as before."""
    before, now = flatten(load_config(folder / CONFIG).value), flatten(config)
    changed = [
        f"{key}: {before.get(key)!r} before, {now[key]!r} now"
        for key in now
        if before.get(key) != now[key]
        and not key.startswith(_FREE_ON_RESUME)
        and not (key == "train.precision" and "auto" in (before.get(key), now[key]))
    ]
    if changed:
        raise ConfigError(
            "These settings decide the numbers of the run and differ from those it was started with: "
            + "; ".join(changed)
            + ". Give the old ones to resume, or another --run.name to start a new run."
        )


def _model(config: RunConfig, layout: Layout, found: checkpoint.Found | None) -> torch.nn.Module:
    torch.manual_seed(config.train.seed)
    model = models.build(config.model)
    if found is not None:
        model_folder.load_weights(model, found.folder)
    recompute = config.train.activation_checkpointing == "blocks"
    passing.arrange(model, recompute=recompute, compiled=config.train.compile)
    return model.to(layout.device)


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


def _farewell(config: RunConfig, outcome: Outcome) -> None:
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
        f"  run folder  {folder}\n  curve       {folder / 'loss.png'}\n  samples     {folder / SAMPLES}",
        file=sys.stderr,
    )
