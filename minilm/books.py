"""What the first rank of a run writes about it: settings, manifest, metrics, console. Closed whatever happens."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilm import manifest
from minilm.config import flatten
from minilm.data.loader import Data, Loader
from minilm.errors import MinilmError
from minilm.run import RunConfig, write_config
from minilm.track import Console, Tracker, read_metrics
from minilm.track.metrics import FILE as METRICS
from minilm.training import checkpoint
from minilm.training.layout import Layout
from minilm.training.outcome import Outcome
from minilm.training.trainer import Trainer


class Silent:
    """Log and progress of the ranks that write nothing."""

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...
    def sample(self, step: int, samples: list[dict[str, Any]]) -> None: ...
    def event(self, step: int, text: str, **values: Any) -> None: ...
    def sync(self) -> None: ...
    def resume_at(self, step: int) -> None: ...
    def go_back(self, step: int, into: Path | None) -> None: ...
    def start(self, total_steps: int, initial: int = 0) -> None: ...
    def update(self, step: int, stats: Mapping[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...


class Books:
    """Opens the books of a run; `with` closes them, saying how it ended. `outcome` is set when it has one.

    step: where the run stands (0, or the step of the checkpoint that it resumes from). source: of the weights that
    it begins with, if they are those of another run. checks: what the quick suite said before the first step.
    paths: which way each part of a step goes here (`training.paths`); none: no step is taken.
    """

    def __init__(
        self,
        config: RunConfig,
        origins: Mapping[str, str],
        layout: Layout,
        data: Data,
        *,
        step: int,
        source: dict[str, Any] | None = None,
        checks: dict[str, Any] | None = None,
        paths: Mapping[str, str] | None = None,
    ) -> None:
        self.outcome: Outcome | None = None
        self.log: Any = Silent()
        self.progress: Any = Silent()
        self._config, self._layout, self._data, self._paths = config, layout, data, paths
        self._open: tuple[Console, Tracker, manifest.Manifest] | None = None
        self._start = step
        self._trainer: Trainer | None = None
        if layout.is_main:
            self._open = self._opened(origins, step, source, checks)
            self.progress, self.log, _ = self._open

    def _opened(
        self,
        origins: Mapping[str, str],
        step: int,
        source: dict[str, Any] | None,
        checks: dict[str, Any] | None,
    ) -> tuple[Console, Tracker, manifest.Manifest]:
        config, layout, store = self._config, self._layout, self._data.train.store
        folder, settings, entropy = config.run_folder, flatten(config), store.entropy
        if not computed(folder):
            _forget_failed_start(folder)
        write_config(config)
        record = manifest.begin(
            folder,
            config=settings,
            origins=origins,
            data={"store": str(store.path), "fingerprint": store.fingerprint},
            tokenizer={"fingerprint": self._data.tokenizer.fingerprint if self._data.tokenizer else None},
            model={"name": config.model.name, "num_parameters": config.model.num_parameters()},
            layout={**layout.facts(), **({"paths": dict(self._paths)} if self._paths else {})},
            step=step,
        )
        if source is not None:
            record.update(initial_weights=source)
        if checks is not None:
            record.update(checks=checks)
        console = Console(folder, log_every=config.track.log_every)
        tracker = Tracker(
            folder,
            config.track,
            settings,
            vocab_size=config.model.vocab_size,
            floor=entropy["rate_nats"] if entropy else None,
            message=console.message,
        )
        return console, tracker, record

    def announce(self, loader: Loader, trainer: Trainer) -> None:
        """What is about to happen, in five lines. The manifest will say how far this trainer got."""
        self._trainer = trainer
        say, model, rows = self.progress.message, self._config.model, self._data.train
        left_over = f", {loader.dropped_rows} rows of each epoch left over" if loader.dropped_rows else ""
        say(f"run     {self._config.run_folder}")
        say(f"model   {model.name}, {model.num_parameters():,} parameters")
        if self._paths:
            say(f"paths   {'; '.join(f'{part} {way}' for part, way in self._paths.items())}")
        say(f"layout  {self._layout}; {loader.batch_rows} rows of {rows.sequence_length} tokens a step")
        say(
            f"data    {rows.store.path}: {rows.rows_per_epoch:,} rows, {loader.steps_per_epoch:,} steps an epoch"
            f"{left_over}; {trainer.num_steps:,} steps in all"
        )

    def __enter__(self) -> Books:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        if self._open is None:
            return
        console, tracker, record = self._open
        state = (
            self.outcome.state if self.outcome else "interrupted" if kind is KeyboardInterrupt else "failed"
        )
        reason = None
        if error is not None:
            reason = str(error) if isinstance(error, MinilmError) else f"{type(error).__name__}: {error}"
        results = {}
        if self.outcome is not None:
            results = {"loss": self.outcome.loss, "validation_loss": self.outcome.validation_loss}
        step = self._trainer.step if self._trainer is not None else self._start
        try:
            with contextlib.ExitStack() as last:  # each is done, whatever becomes of the others
                last.callback(console.close)
                last.callback(record.finish, state, step=step, error=reason, results=results)
                last.callback(tracker.close, state, reason)
        except (MinilmError, OSError) as problem:
            if error is None:
                raise
            # The full disk that ended the run refuses its last lines, too: the user must read what came first.
            print(f"the run's last lines could not be written: {problem}", file=sys.stderr)


def in_use(run_folder: Path) -> str:
    """What a second run of the same name is told."""
    state = manifest.state_of(run_folder) if (run_folder / manifest.FILE).is_file() else "of unknown state"
    return (
        f"The run folder {run_folder} is in use (its run: {state}). Continue it with --resume, or give another "
        "--run.name."
    )


def computed(run_folder: Path) -> bool:
    """Has the run done a step? A start that failed before (no memory, no disk) takes no name and binds no setting."""
    metrics = run_folder / METRICS
    if checkpoint.list_checkpoints(run_folder / "checkpoints"):
        return True
    return metrics.is_file() and any(True for _ in read_metrics(metrics, "train"))


def _forget_failed_start(run_folder: Path) -> None:
    """Books that begin with a failed start would show its settings as those of the run. log.txt keeps its story."""
    for name in (METRICS, manifest.FILE):
        (run_folder / name).unlink(missing_ok=True)
