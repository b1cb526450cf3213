"""What a run writes about itself while it goes on: metrics.jsonl, and SwanLab as its mirror."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from minilm.errors import CheckpointError, MinilmError
from minilm.track.curve import plot_curve
from minilm.track.dashboard import Dashboard, choose_mode
from minilm.track.metrics import MetricsFile, flat

State = Literal["finished", "interrupted", "failed"]
_SWANLAB_STATES = {"finished": "success", "interrupted": "aborted", "failed": "crashed"}


def _off(value: Any) -> Any:
    """YAML reads the word off as false."""
    return "off" if value is False else value


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Section `track` of the settings. metrics.jsonl is always written, every step; this is about the rest."""

    swanlab: Annotated[
        Literal["auto", "off", "local", "offline", "cloud"],
        BeforeValidator(_off),
        Field(
            description="SwanLab dashboard: local (in a browser on this machine, no account), offline (files to "
            "sync later), cloud (needs `swanlab login`), off; auto: local if swanboard is installed, else "
            "offline, and the run says which"
        ),
    ] = "auto"
    project: Annotated[
        str,
        Field(pattern=r"^[0-9a-zA-Z_\-+.]{1,100}$", description="SwanLab project: letters, digits, _ - + ."),
    ] = "minilm"
    name: Annotated[
        str, Field(max_length=80, description="name of the run in SwanLab; empty: the run folder's name")
    ] = ""
    group: Annotated[
        str, Field(max_length=200, description="SwanLab group, for runs that belong together")
    ] = ""
    tags: Annotated[tuple[str, ...], Field(description="SwanLab tags")] = ()
    log_every: Annotated[
        int,
        Field(
            gt=0,
            description="steps between plain log lines and SwanLab points (metrics.jsonl has every step)",
        ),
    ] = 10
    swanlab_folder: Annotated[
        str,
        Field(
            description="where SwanLab writes; empty: `swanlog` beside the run folder, shared by its neighbours"
        ),
    ] = ""
    swanlab_close_seconds: Annotated[
        float, Field(ge=0, le=3600, description="how long the end of a run may wait for SwanLab")
    ] = 30.0


class Tracker:
    """Writes the metrics of one run; rank 0 makes one, other ranks none.

    run_folder     gets metrics.jsonl; if it has one, call `resume_at` first
    settings       the resolved settings (nested or flat), shown in SwanLab
    vocab_size     draws ln(V) into the curve: the loss of knowing nothing
    floor          nats per token, where the data's entropy rate is known: the loss of knowing everything
    message        shows a warning to the user (`Console.message`); default stderr

    SwanLab starts with the first `log`. Whatever happens to it becomes one message and one event.
    """

    def __init__(
        self,
        run_folder: Path | str,
        config: TrackConfig,
        settings: Mapping[str, Any],
        *,
        vocab_size: int | None = None,
        floor: float | None = None,
        message: Callable[[str], None] | None = None,
    ) -> None:
        self.run_folder = Path(run_folder)
        self.config = config
        self.mode, why = choose_mode(config.swanlab)
        self._settings = dict(flat(settings))
        self._message = _to_stderr if message is None else message
        self._metrics = MetricsFile(self.run_folder)
        self._dashboard: Dashboard | None = None
        self._step = max(self._metrics.last_step.values(), default=0)
        if self._metrics.size == 0:
            self._metrics.append(
                "event", 0, time.time(), {"text": "run", "vocab_size": vocab_size, "floor_nats": floor}
            )
        if why is not None:
            self._message(f"SwanLab: {why}.")
        elif self.mode == "local":
            self._message(f"SwanLab: local; to look: swanlab watch {self._folder()}")
        elif self.mode != "off":
            self._message(f"SwanLab: {self.mode}.")

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics; kind is "train" or "validation".

        Steps of a kind must rise: a repeated step raises CheckpointError.
        Values: numbers (also 0-d tensors and arrays), texts, nested mappings. nan and inf are written as such.
        """
        last = self._metrics.last_step.get(kind)
        if last is not None and step <= last:
            raise CheckpointError(
                f"{self._metrics.path} already has {kind} metrics of step {last}, so step {step} would be there "
                "twice. Resume this run (--resume), or start in another run folder."
            )
        self._write(kind, step, values)

    def sample(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Generated texts: mappings with "text" and, usually, "prompt"; other values are kept beside them."""
        self._write("sample", step, {"samples": list(samples)})

    def event(self, step: int, text: str, *, show: bool = False, **values: Any) -> None:
        """Something that happened: a checkpoint, a resume, a warning. `show` also gives it to the user."""
        if show:
            self._message(text)
        self._metrics.append("event", step, time.time(), {"text": text, **values})

    def sync(self) -> None:
        """Metrics are on the disk when this returns. To be called before a checkpoint is declared complete."""
        self._metrics.sync()

    def resume_at(self, step: int) -> None:
        """Go on after `step`: lines of later steps, about to be done again, move to metrics.superseded.jsonl."""
        if self._dashboard is not None:
            raise RuntimeError(
                "resume_at must come before the first log: SwanLab is already following the file."
            )
        # From the start means: the validation before the first step is done again, too.
        moved = self._metrics.truncate_after(step if step > 0 else -1)
        self._step = step
        self.event(step, f"resumed at step {step}", superseded_lines=moved)

    def go_back(self, step: int, into: Path | None) -> None:
        """The run itself goes back to `step`: lines of later steps move to the file `into` (none: as in `resume_at`).

        SwanLab drops steps that come twice, so its curve is ended and another one begun from the first step.
        """
        if self._dashboard is not None:
            try:
                texts = self._dashboard.finish(
                    "aborted", f"went back to step {step}", self._metrics.size, None
                )
            except OSError as problem:
                texts = [self._give_up(problem)]
            self._dashboard = None
        else:
            texts = []
        self._metrics.truncate_after(step, into)
        self._step = step
        self._tell(texts)

    def close(self, state: State, error: str | None = None) -> None:
        """Write the end, draw loss.png, let SwanLab finish. Raises nothing that SwanLab or the drawing caused."""
        try:
            self.event(self._step, f"{state}: {error}" if error else state, state=state)
            curve = self._draw() if "train" in self._metrics.last_step else None
            if self._dashboard is not None:
                # The local board takes a run without an error text for one that ended well.
                reason = None if state == "finished" else (error or state)
                try:
                    texts = self._dashboard.finish(_SWANLAB_STATES[state], reason, self._metrics.size, curve)
                except OSError as problem:
                    texts = [self._give_up(problem)]
                self._dashboard = None
                self._tell(texts)
        finally:
            self._metrics.close()

    def _draw(self) -> Path | None:
        try:
            return plot_curve(self.run_folder)
        except (OSError, MinilmError) as problem:
            self.event(self._step, f"loss.png was not drawn: {problem}", show=True)
            return None

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._metrics.append(kind, step, time.time(), values)
        self._step = max(self._step, step)
        if self.mode != "off":
            self._tell(self._poll())

    def _poll(self) -> list[str]:
        try:
            if self._dashboard is None:
                self._dashboard = self._start_dashboard()
            return self._dashboard.poll()
        except (OSError, ValueError) as problem:  # no folder, no process, no space, a damaged swanlab.json
            return [self._give_up(problem)]

    def _give_up(self, problem: Exception) -> str:
        self.mode = "off"
        if self._dashboard is not None:
            self._dashboard.abandon()
            self._dashboard = None
        return f"SwanLab is off: {problem}. Training goes on and metrics.jsonl is complete."

    def _tell(self, texts: list[str]) -> None:
        for text in texts:
            self.event(self._step, text, show=True)

    def _start_dashboard(self) -> Dashboard:
        return Dashboard(
            self.run_folder,
            self._metrics.path,
            mode=self.mode,
            project=self.config.project,
            name=self.config.name or self.run_folder.resolve().name[:80],
            group=self.config.group,
            tags=self.config.tags,
            folder=self._folder(),
            log_every=self.config.log_every,
            close_seconds=self.config.swanlab_close_seconds,
            settings=self._settings,
        )

    def _folder(self) -> Path:
        if self.config.swanlab_folder:
            return Path(self.config.swanlab_folder)
        return self.run_folder.resolve().parent / "swanlog"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
