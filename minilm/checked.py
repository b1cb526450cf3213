"""The doctor's part in a run: the quick suite before the first step, the watch while it trains."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from minilm.books import Books
from minilm.data.loader import Loader
from minilm.doctor import preflight
from minilm.doctor.core import Finding, NotApplicable
from minilm.doctor.report import explained
from minilm.doctor.subject import Subject, Training
from minilm.doctor.targets.our_data import data_view
from minilm.doctor.targets.our_model import model_subject
from minilm.doctor.targets.our_training import decays_of
from minilm.doctor.watch import Watch
from minilm.errors import CheckFailed
from minilm.start import Start
from minilm.training import optim

UNCHECKED = "unchecked: doctor.check is off"
STATES = {"PASS": "passed", "FAIL": "failed", "NOT RUN": "not run"}


def before_first_step(start: Start, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Examine what will train, on the first rank; returns what the manifest keeps. Collective.

    Raises CheckFailed on every rank if a check failed: nothing was trained, and the run's name stays free.
    """
    layout, off = start.layout, start.config.doctor.check == "off"
    if off:
        return {"suite": "off", "note": UNCHECKED}
    problem: CheckFailed | None = None
    summary: dict[str, Any] = {}
    if layout.is_main:
        examination = preflight.preflight(subject_of_start(start, model, optimizer))
        summary = preflight.summary(examination)
        print(f"checks  {counted(summary)}", file=sys.stderr)
        try:
            preflight.refuse(examination)
        except CheckFailed as error:
            problem = error
    if layout.all_reduce([float(problem is not None)])[0] > 0:
        raise problem or CheckFailed("The first rank found a failure before the first step.")
    return summary


def subject_of_start(start: Start, model: nn.Module, optimizer: torch.optim.Optimizer) -> Subject:
    """The very model, optimizer and data of a run as a subject."""
    config, data = start.config, start.data
    fresh = start.found is None and start.source is None
    subject = model_subject(
        model, tokenizer=data.tokenizer, fresh=fresh, name=str(config.run_folder), config=config.model
    )
    loader = functools.partial(Loader, prefetch=0)
    view = data_view(
        data, batch_rows=config.train.batch_size, micro_batch=config.train.rows_per_forward, loader=loader
    )

    def training() -> Training:
        # A copy of both together: their parameters stay the same objects, and a check may take a step.
        own, its = copy.deepcopy((model, optimizer))
        return Training(
            module=own,
            step=_not_before_the_run,
            optimizer=its,
            clip_norm=config.optim.clip_norm,
            decays=decays_of(own),
        )

    return subject.but(data=view, training=training)


def _not_before_the_run(_: Any) -> dict[str, float]:
    raise NotApplicable("before a run its training step is not taken: `minilm doctor` does it on a copy")


def watch_of(start: Start, books: Books) -> Watch | None:
    """The watch of a run, or None where it is turned off. What it finds is said at once and stands in the metrics."""
    config = start.config
    if not config.doctor.watch:
        return None

    def report(step: int, finding: Finding) -> None:
        text = "; ".join(f"{name}: {value}" for name, value in explained(finding))
        books.log.event(step, f"{finding.check} FAIL {text}", show=True)

    def note(step: int, values: Mapping[str, float]) -> None:
        books.log.log("doctor", step, values)

    def planned(step: int) -> dict[str, float]:
        return {"learning_rate": optim.rate_at(config.optim, step, start.num_steps)}

    return Watch(
        planned_rates=planned,
        precision="bf16" if start.layout.bf16 else "fp32",
        has_dropout=config.model.dropout > 0,
        steps_per_epoch=start.loader.steps_per_epoch,
        report=report,
        note=note,
        share=config.doctor.watch_share,
        stop=config.doctor.on_failure == "stop",
    )


def counted(summary: dict[str, Any]) -> str:
    """`21 passed, 0 failed, 3 not run in 4.2 s`, or that nothing was checked."""
    if summary.get("suite") == "off":
        return UNCHECKED
    counts = summary["counts"]
    said = ", ".join(f"{counts[status]} {name}" for status, name in STATES.items())
    return f"{said} in {summary['seconds']:.1f} s"
