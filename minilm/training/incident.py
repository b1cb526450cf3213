"""Incidents: a step that went wrong, kept so that it can be looked at and computed again.

    incidents/step-00000012/
        report.json        loss, norms and numbers that are not finite per layer, learning rate, rows, layout
        rows.txt           the rows of the global batch, decoded
        step-00000011/     a checkpoint of the state before the step, with the random states of that moment
        abandoned.jsonl    where the run went back (train.on_spike: rollback): the metrics that it did again

After its first rollback a run does steps again: `step-00000012-rollback-1` is step 12 as it went then.
`minilm replay RUN/incidents/step-00000012` computes forward and backward of that very step.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minilm.alignment import align
from minilm.data.loader import Loader
from minilm.data.show import row_text
from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckpointError
from minilm.training import checkpoint
from minilm.training.layout import Layout
from minilm.training.settings import Log
from minilm.training.step import StepResult
from minilm.training.watch import StepView, layer_of

FOLDER, REPORT, ROWS = "incidents", "report.json", "rows.txt"
MOST_SPIKES = 10  # folders: each holds a checkpoint, and a spike is only a suspicion
Kind = Literal["nonfinite", "spike"]


@dataclass(frozen=True)
class LayerState:
    """One layer before the step: Euclidean norms in float64, and how many elements are nan or infinite."""

    weight_norm: float
    gradient_norm: float
    nonfinite_weights: int
    nonfinite_gradients: int


@dataclass(frozen=True)
class Report:
    """report.json. Numbers that are not finite are written as texts ("nan", "inf"): JSON has none."""

    kind: Kind
    step: int  # that the log has for it
    loss: float
    gradient_norm: float  # of the whole gradient, before clipping
    rates: dict[str, float]
    layers: dict[str, LayerState]
    data_step: int  # of the loader
    epoch: int
    rows: list[str]  # where each row of the global batch comes from
    layout: dict[str, Any]  # Layout.facts
    micro_batch: int
    num_threads: int

    @property
    def nonfinite_layers(self) -> list[str]:
        """Layers with an element of weight or gradient that is not a number."""
        return [
            name
            for name, layer in self.layers.items()
            if layer.nonfinite_weights or layer.nonfinite_gradients
        ]

    def write(self, path: Path) -> None:
        """As JSON."""
        record = {**asdict(self), "nonfinite_layers": self.nonfinite_layers}
        path.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises CheckpointError for a file that is missing or no report."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record.pop("nonfinite_layers")
            numbers = {name: float(record[name]) for name in ("loss", "gradient_norm")}
            layers = {
                name: LayerState(
                    float(layer["weight_norm"]),
                    float(layer["gradient_norm"]),
                    layer["nonfinite_weights"],
                    layer["nonfinite_gradients"],
                )
                for name, layer in record["layers"].items()
            }
            return cls(**record | numbers | {"layers": layers})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not the report of an incident ({error}). Give a folder RUN/{FOLDER}/step-N."
            ) from error


def write(
    run_folder: Path,
    kind: Kind,
    view: StepView,
    result: StepResult,
    *,
    loader: Loader,
    rates: Mapping[str, float],
    state: Mapping[str, Any],
    random_state: dict[str, Any],
    tokenizer: Tokenizer | None,
    num_rollbacks: int = 0,
) -> Path:
    """Keep the step that `view` shows, between its backward and its update. Collective; returns its folder.

    loader        has just given the step's micro-batches
    state         what a checkpoint of the moment before the step holds (trainer.json)
    random_state  of this rank, before the step's first forward
    num_rollbacks  of the run before: a step that is done again has a folder of its own
    Raises CheckpointError, on all ranks, if it could not be written.
    """
    layout, data_step = view.layout, loader.next_step - 1
    again = f"-rollback-{num_rollbacks}" if num_rollbacks else ""
    folder = run_folder / FOLDER / f"step-{view.step:08d}{again}"
    layers = layer_states(view)  # collective: before what one rank may fail at
    before = {**state, "loader": {**loader.state_dict(), "next_step": data_step}}
    checkpoint.save(
        layout,
        folder,
        before,
        tokenizer=tokenizer.save if tokenizer else None,
        random_state=random_state,
    )
    with checkpoint.together(layout, f"The incident {folder} could not be written"):
        if layout.is_main:
            place = loader.where(data_step)
            (folder / ROWS).write_text(rows_text(loader, data_step, tokenizer), encoding="utf-8")
            Report(
                kind=kind,
                step=view.step,
                loss=result.loss.mean,
                gradient_norm=result.gradient_norm,
                rates=dict(rates),
                layers=layers,
                data_step=data_step,
                epoch=place.epoch,
                rows=[str(row) for row in place.rows],
                layout=layout.facts(),
                micro_batch=layout.micro_batch,
                num_threads=torch.get_num_threads(),
            ).write(folder / REPORT)
    return folder


@dataclass(frozen=True)
class Suspect:
    """A step that may have gone wrong, between its backward and its update."""

    kind: Kind
    view: StepView
    result: StepResult
    rates: dict[str, float]
    random_state: dict[str, Any]  # of this rank, before the step's first forward


class Keeper:
    """Writes the incidents of one run and tells of them."""

    def __init__(
        self, run_folder: Path, layout: Layout, loader: Loader, log: Log, tokenizer: Tokenizer | None
    ) -> None:
        self.run_folder, self.layout, self.loader = run_folder, layout, loader
        self.log, self.tokenizer = log, tokenizer

    def keep(
        self,
        suspect: Suspect,
        spikes: Spikes,
        state: Mapping[str, Any],
        num_rollbacks: int,
        *,
        always: bool = False,
    ) -> tuple[str, Path | None]:
        """Write the incident; returns what the user was told, and its folder if there is one. Collective.

        always  also where there are enough spikes already
        A disk that is full does not end the run.
        """
        result, step, folder = suspect.result, suspect.view.step, None
        text = f"step {step}: loss {result.loss.mean:.4g}, gradient norm {result.gradient_norm:.4g}"
        if suspect.kind == "spike":
            text = f"{text}: a spike, above {spikes.limit():.4g}"
            if not always and self._number() >= MOST_SPIKES:
                self.log.event(step, f"{text}; not kept, there are {MOST_SPIKES}", show=True)
                return text, None
        try:
            folder = write(
                self.run_folder,
                suspect.kind,
                suspect.view,
                result,
                loader=self.loader,
                rates=suspect.rates,
                state=state,
                random_state=suspect.random_state,
                tokenizer=self.tokenizer,
                num_rollbacks=num_rollbacks,
            )
            text = f"{text}; kept, compute it again with: minilm replay {folder}"
        except CheckpointError as error:
            text = f"{text}; not kept: {error}"
        self.log.event(step, text, show=True)
        return text, folder

    def _number(self) -> int:
        """Incidents of this run; the first rank counts, so that all ranks agree."""
        folder = self.run_folder / FOLDER
        own = len(list(folder.glob("step-*"))) if self.layout.is_main and folder.is_dir() else 0
        return int(self.layout.all_reduce([float(own)])[0])


def layer_states(view: StepView) -> dict[str, LayerState]:
    """Weights and gradients per layer, in the order of the model. To be called before the update; collective."""
    weights, gradients = _by_layer(view.weights()), _by_layer(view.gradients())
    return {
        layer: LayerState(norm, gradients.get(layer, (0.0, 0))[0], wrong, gradients.get(layer, (0.0, 0))[1])
        for layer, (norm, wrong) in weights.items()
    }


def _by_layer(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[float, int]]:
    found: dict[str, tuple[float, int]] = {}
    for name, tensor in tensors:
        square, wrong = found.get(layer_of(name), (0.0, 0))
        norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
        found[layer_of(name)] = (square + norm * norm, wrong + int((~torch.isfinite(tensor)).sum()))
    return {layer: (math.sqrt(square), wrong) for layer, (square, wrong) in found.items()}


def rows_text(loader: Loader, data_step: int, tokenizer: Tokenizer | None) -> str:
    """The rows of a global batch for people: where each comes from, its text, and the ids that are in it."""
    where = loader.where(data_step)
    lines = [f"step {where.step} of the data, epoch {where.epoch}; [in brackets]: not a target"]
    for place in where.rows:
        tokens, segments = loader.rows[place.row]
        batch = align(torch.from_numpy(tokens)[None], torch.from_numpy(segments)[None])
        lines += ["", str(place), f"  ids  {tokens[segments > 0].tolist()}"]
        if tokenizer is not None:
            lines.append(f"  text {row_text(batch, 0, tokenizer).plain}")
    return "\n".join(lines) + "\n"


class Spikes:
    """Says whether a loss is far above those before it.

    factor  a spike exceeds the mean of the last finite losses by more than this many standard deviations
    recent  the losses before, oldest first; kept in checkpoints, so that a resumed run judges alike

    Nothing is judged before ten losses. The standard deviation counts as at least 1 % of the mean: where the loss
    hardly moves, a wobble in the last digits is no spike. A spike is taken in like any other loss: a level that
    lasts is soon no spike.
    """

    WINDOW, FEWEST, FLOOR = 50, 10, 0.01

    def __init__(self, factor: float | None, recent: Iterable[float] = ()) -> None:
        self.factor = factor
        self.recent: deque[float] = deque(recent, maxlen=self.WINDOW)

    def limit(self) -> float | None:
        """A loss above it is a spike; None where there is nothing to judge by."""
        if self.factor is None or len(self.recent) < self.FEWEST:
            return None
        values = torch.tensor(list(self.recent), dtype=torch.float64)
        center = float(values.mean())
        return center + self.factor * max(float(values.std()), self.FLOOR * abs(center))

    def is_spike(self, loss: float) -> bool:
        limit = self.limit()
        return limit is not None and loss > limit

    def add(self, loss: float) -> None:
        """Take in the loss of a step that was taken."""
        if math.isfinite(loss):
            self.recent.append(loss)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value
