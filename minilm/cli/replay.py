"""`minilm replay`: compute a step that was kept as an incident again, and hold it against what was recorded."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from minilm.alignment import Batch
    from minilm.run import RunConfig
    from minilm.training.checkpoint import Found
    from minilm.training.incident import Report
    from minilm.training.layout import Layout

DESCRIPTION = """\
Forward and backward of one step, from the state before it: the same weights, the same rows of the store, the
same micro-batches, the same random states. Prints loss and norms beside the recorded ones.

  minilm replay runs/first/incidents/step-00000012

Exit code 0 if they are equal, 1 if not. A step of one process in float32 on a CPU must be equal bit for bit; a step
of several ranks (computed here one after the other), of a GPU or in bf16 up to rounding.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "replay",
        help="compute the step of an incident again",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("incident", type=Path, metavar="RUN/incidents/step-N", help="folder of the incident")
    sub.add_argument("--store", metavar="FOLDER", help="where the store lies now (default: as in the run)")
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Raises CheckpointError, DataError or ConfigError for what is missing, damaged or does not fit."""
    from rich.console import Console
    from rich.table import Table

    from minilm.run import CONFIG, load_config
    from minilm.training import checkpoint
    from minilm.training.incident import REPORT, ROWS, Report

    folder: Path = arguments.incident.resolve()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "A step is replayed by one process, however many ranks it had: do not use a launcher."
        )
    report = Report.read(folder / REPORT)
    found, _ = checkpoint.find(folder)
    run_folder = next((parent for parent in folder.parents if (parent / CONFIG).is_file()), None)
    if run_folder is None:
        raise CheckpointError(f"{folder} does not lie in a run folder (none above it has {CONFIG}).")
    overrides = [f"--data.store={arguments.store}"] if arguments.store else []
    resolved = load_config(run_folder, overrides)
    now = recompute(resolved.value, report, found)
    tolerance = _tolerance(report, now.layout)
    table = Table(
        "", "recorded", "replayed", "", title=f"step {report.step}: {report.kind}", title_justify="left"
    )
    different = 0
    for name, before, after, size in _compared(report, now):
        same = _equal(before, after, tolerance, size)
        different += not same
        table.add_row(name, f"{before:.9g}", f"{after:.9g}", "=" if same else "DIFFERENT")
    console = Console(highlight=False)
    console.print(table)
    if report.nonfinite_layers:
        console.print(f"not finite: {', '.join(report.nonfinite_layers)}", soft_wrap=True)
    console.print(f"rows: {folder / ROWS}", soft_wrap=True)
    how = "bit for bit" if tolerance == 0 else f"to {tolerance:g}"
    console.print(f"{different} numbers differ" if different else f"equal {how}")
    return 1 if different else 0


def recompute(config: RunConfig, report: Report, found: Found) -> Report:
    """The report that the step gives now. Trains nothing, writes nothing."""
    import dataclasses

    import torch

    from minilm.alignment import Sum
    from minilm.training import checkpoint
    from minilm.training.incident import layer_states
    from minilm.training.step import accumulate, counts_of
    from minilm.training.watch import StepView

    torch.set_num_threads(report.num_threads)  # sums are cut differently for another number of threads
    micro_batches = _micro_batches(config, report, found)
    layout = _layout(config, report, found)
    every = [batch for batches in micro_batches for batch in batches]
    total, counts = sum(float(batch.num_targets()) for batch in every), counts_of(layout.model, every)
    loss = Sum.zero(layout.device)
    for rank, batches in enumerate(micro_batches):
        random = found.folder / f"random-{rank:05d}.pt"
        checkpoint.set_random_states(torch.load(random, map_location="cpu", weights_only=True), layout.device)
        part, _ = accumulate(layout, batches, total, counts=counts)
        loss = loss + part
    view = StepView(report.step, layout, every)
    return dataclasses.replace(
        report,
        loss=loss.mean,
        gradient_norm=float(layout.gradient_norm()),
        layers=layer_states(view),
        layout=layout.facts(),
    )


def _layout(config: RunConfig, report: Report, found: Found) -> Layout:
    """The model with the weights before the step, as one process trains it."""
    from safetensors.torch import load_file

    from minilm import models
    from minilm.models import folder as model_folder
    from minilm.training import optim, passing
    from minilm.training.layout import Asked, Layout
    from minilm.training.objective import Objective

    layout = Layout(
        Asked(
            config.train.batch_size,
            report.micro_batch,
            report.layout["precision"],
            config.train.device,
            config.optim.clip_norm,
            None,
        )
    )
    model = models.build(model_folder.read_config(found.folder))
    # Not through `folder.load_weights`: it refuses weights that are not finite, and they may be what happened.
    model.load_state_dict(load_file(found.folder / model_folder.WEIGHTS))
    passing.arrange(model, recompute=config.train.activation_checkpointing, compiled=config.train.compile)
    layout.prepare(Objective(model).to(layout.device), optim.build(model, config.optim))
    layout.objective.train()
    return layout


def _micro_batches(config: RunConfig, report: Report, found: Found) -> list[list[Batch]]:
    """Those of the step, by rank."""
    from minilm.data.loader import Loader, open_data

    data, saved, world = open_data(config.data), found.trainer["loader"], report.layout["world_size"]
    micro_batches = []
    for rank in range(world):
        loader = Loader(
            data.train,
            batch_rows=config.train.batch_size,
            micro_batch=report.micro_batch,
            rank=rank,
            world=world,
            seed=config.train.seed,
            prefetch=0,
        )
        loader.load_state_dict(saved)  # refuses another store
        micro_batches.append(next(loader))
    return micro_batches


def _tolerance(report: Report, now: dict[str, Any]) -> float:
    """0: bit for bit. Else relative to the loss, or to the norm of the whole gradient."""
    if report.layout["precision"] == "bf16":
        return 2e-2
    return 0.0 if report.layout == now and now["device"] == "cpu" else 1e-4


def _compared(before: Report, now: Report) -> Iterator[tuple[str, float, float, float]]:
    """Name, recorded value, replayed value, and the size by which a difference is judged."""
    yield "loss", before.loss, now.loss, abs(before.loss)
    whole = abs(before.gradient_norm)
    yield "gradient norm", before.gradient_norm, now.gradient_norm, whole
    for layer, old in before.layers.items():
        new = now.layers[layer]
        yield f"gradient norm, {layer}", old.gradient_norm, new.gradient_norm, whole
        yield f"weight norm, {layer}", old.weight_norm, new.weight_norm, abs(old.weight_norm)


def _equal(before: float, now: float, tolerance: float, size: float) -> bool:
    if not (math.isfinite(before) and math.isfinite(now)):
        # Which of nan and inf comes out depends on the order of the sums, unless nothing may differ.
        both = not math.isfinite(before) and not math.isfinite(now)
        return both and (tolerance > 0 or str(before) == str(now))
    # Among norms of which one is not finite there is nothing to judge by but the number itself.
    return abs(before - now) <= tolerance * (size if math.isfinite(size) else abs(before))
