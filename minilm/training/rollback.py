"""Going back to the last good checkpoint when a loss spikes, and on behind the batches that led there.

The recipe of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1): "we re-started training from a checkpoint
roughly 100 steps before the spike started, and skipped roughly 200-500 data batches, which cover the batches that were
seen before and during the spike." The authors found that the same batches do no harm from another checkpoint: it is the
combination of these batches with this state of the weights. Here the run goes back to its last checkpoint, and the
global batches from that checkpoint's position in the data up to and including the offending one are left out. The
step, and with it the learning rate, goes back; the position in the data does not: from then on they differ.

Nothing is written down about a rollback until the next checkpoint. A run that is killed before it finds the same
spike from the same checkpoint and goes back in the same way.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from minilm.models import folder as model_folder
from minilm.training import checkpoint
from minilm.training.layout import Layout
from minilm.training.step import StepResult, discard

ABANDONED = (
    "abandoned.jsonl"  # in the folder of the incident: the lines of metrics.jsonl that were done again
)


class GoBack(Exception):
    """Raised between backward and update, by all ranks alike: the step is not taken. Ends in the trainer."""

    def __init__(self, result: StepResult, target: checkpoint.Found, incident: Path | None) -> None:
        super().__init__(f"go back to {target.folder}")
        self.result, self.target, self.incident = result, target, incident


def target_of(layout: Layout, folder: Path, save_every: int | None) -> checkpoint.Found | None:
    """The checkpoint to go back to, the same on every rank; None if there is none. Collective.

    It is the newest that is undamaged and whose validation loss, if it has one, is finite. One that was saved between
    the regular ones, because the run was stopped there, counts only if there is no other: a run that was stopped and
    resumed goes back as far as one that never was.
    """
    step = -1.0
    if layout.is_main:
        saved = [c for c in reversed(checkpoint.list_checkpoints(folder)) if _is_good(c)]
        regular = [c for c in saved if save_every and c.step % save_every == 0]
        step = float(next((c.step for c in regular + saved if not checkpoint.damage(c.folder)), -1))
    step = layout.all_reduce([step if layout.is_main else 0.0])[0]
    if step < 0:
        return None
    return checkpoint.Found(folder / f"step-{int(step):08d}", int(step))


def _is_good(found: checkpoint.Found) -> bool:
    try:
        loss = found.trainer.get("validation_loss")
    except (OSError, ValueError):  # damaged
        return False
    return loss is None or math.isfinite(loss)


def put_back(layout: Layout, target: checkpoint.Found) -> dict[str, Any]:
    """Weights, optimizer, average and random states of the checkpoint; returns trainer.json. Collective."""
    discard(layout)
    if layout.engine is None:
        model_folder.load_weights(layout.model, target.folder)
    return checkpoint.load(layout, target)


def retire_newer(folder: Path, target: checkpoint.Found, into: Path | None) -> None:
    """Checkpoints after `target` belong to what is done again: a resume must not begin with one. First rank only.

    into  folder that gets them; none: they are named `.abandoned-...` where they lie
    """
    for found in checkpoint.list_checkpoints(folder):
        if found.step > target.step:
            place = folder / f".abandoned-{found.folder.name}"
            if into is not None:
                (into / "abandoned").mkdir(exist_ok=True)
                place = into / "abandoned" / found.folder.name
            found.folder.replace(place)
