"""What a start checks before it writes anything: a real one and a dry run alike."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minilm import initial, preview
from minilm.books import computed, in_use
from minilm.config import flatten
from minilm.data.loader import Data, Loader
from minilm.effect import without_effect
from minilm.errors import CheckpointError, ConfigError, OutOfMemory
from minilm.knowledge.fit import refuse_misfit
from minilm.run import CONFIG, RunConfig, load_config
from minilm.training import checkpoint
from minilm.training.layout import Layout
from minilm.training.profile import Steps

# Settings that change no weight and no logged training loss: how often something is looked at, where things lie,
# and how the same global batch is cut.
_FREE_ON_RESUME = (
    *(
        "run.",
        "track.",
        "doctor.",
        "sample.",
        "data.store",
        "data.validation_store",
        "data.prefetch",
        "model.store",  # the checkpoint knows its fingerprint, and refuses another
        "train.micro_batch",
    ),
    *(
        "train.ranks",
        "train.device",
        "train.keep_",
        "train.save_every",
        "train.save_in_background",
        "train.sample_every",
        "train.validat",
        "train.activation_checkpointing",
        "train.max_",
        "train.on_nonfinite",
        "train.skip_budget",
        "train.spike_factor",
    ),
)


@dataclass(frozen=True)
class Start(preview.Plan):
    """A run that may begin, or go on: everything that could be refused has been looked at."""

    used: bool = False  # the run folder has a run
    found: checkpoint.Found | None = None  # the checkpoint to go on from
    source: initial.Source | None = None  # the weights to begin with, where they are not drawn
    idle: list[str] = field(default_factory=list)  # settings without effect

    @property
    def is_complete(self) -> bool:
        return self.found is not None and self.found.step >= self.num_steps

    @property
    def validation_fingerprint(self) -> str | None:
        return _validation_fingerprint(self.data)


def begin(
    layout: Layout,
    config: RunConfig,
    origins: dict[str, str],
    data: Data,
    *,
    resume: bool,
    profile: Steps | None,
) -> Start:
    """Check settings, run folder, checkpoint and source of weights against each other. Writes nothing.

    Raises ConfigError, DataError or CheckpointError.
    """
    folder = getattr(config.model, "store", "")
    if folder not in ("", "random") and config.model.layers:
        refuse_misfit(folder, data.train.store)
    used, found = _place(config, resume, layout)
    loader = Loader(
        data.train,
        batch_rows=config.train.batch_size,
        micro_batch=layout.micro_batch,
        rank=layout.rank,
        world=layout.world_size,
        seed=config.train.seed,
        prefetch=config.data.prefetch,
        device=layout.device,
    )
    source = None
    if found is not None:
        loader.load_state_dict(
            found.trainer["loader"]
        )  # where the data goes on is not where the schedule does
        _refuse_other_validation(found, data)
    elif config.train.init_from:
        source = initial.open_source(config.train.init_from, config.train.init_weights)
        initial.check(source, config.model, data.tokenizer)
    start = Start(
        config,
        origins,
        layout,
        data,
        loader,
        found.step if found else 0,
        used=used,
        found=found,
        source=source,
        idle=without_effect(config, origins, data),
    )
    if config.optim.warmup_steps > start.num_steps:
        raise ConfigError(
            f"optim.warmup_steps: {config.optim.warmup_steps} steps of warm-up do not fit into the {start.num_steps} "
            f"steps that train.epochs {config.train.epochs} makes."
        )
    if profile is not None and not start.is_complete:
        profile.check(done=start.step, num_steps=start.num_steps)
    return start


@contextlib.contextmanager
def memory_explained(start: Start) -> Iterator[None]:
    """A device without memory for this run ends it with a text that says what takes it and what would take less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"The device has not enough memory for this run: {str(error).splitlines()[0]}\n"
            f"By the shapes, in all on one device: {preview.memory_line(start)}.\n"
            f"Less memory take: a smaller train.micro_batch (now {start.layout.micro_batch}; the global batch and the "
            "numbers stay the same), train.activation_checkpointing blocks (now "
            f"{start.config.train.activation_checkpointing}), more ranks with ZeRO. --dry-run shows memory by part. "
            "Checkpoints are whole: continue with --resume."
        ) from error


def _place(config: RunConfig, resume: bool, layout: Layout) -> tuple[bool, checkpoint.Found | None]:
    """Is the run folder in use (allowed with --resume only), and the checkpoint to continue from, if it has one."""
    folder = config.run_folder
    used = computed(folder)
    layout.barrier()  # nobody looks after the first rank has begun to write
    if not resume:
        if used:
            raise ConfigError(in_use(folder))
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


def _validation_fingerprint(data: Data) -> str | None:
    return data.validation.store.fingerprint if data.validation is not None else None


def _refuse_other_validation(found: checkpoint.Found, data: Data) -> None:
    """The curve, and which checkpoint is the best, mean something only over the same documents."""
    before, now = found.trainer.get("validation_store"), _validation_fingerprint(data)
    if before is not None and before != now:
        raise CheckpointError(
            f"data.validation_store: the run was validated on the store {before}, this one is {now or 'absent'}. It "
            "may lie elsewhere now, but must hold the same: give the old one, or another --run.name to start a new run."
        )
