"""Numbers of a step that are read when the next step is under way, so that the device never waits for the host.

Between its backward and its update a step has to be looked at: a loss that is not finite must not become an update, a
spike may send the run back. Looking waits for the device, and the device then waits for the host. So on CUDA

    step k      forward, backward | count step k - 1 | update, which the device refuses if step k is not finite
    step k + 1  forward, backward | count step k ...

The numbers of step k - 1 lie on the host when forward and backward of step k are in the queue: nobody waits. Where they
are not finite, the device has refused the update. Then what was begun of step k is forgotten, data and random states
go back to before step k - 1, and it is taken once more, looked at: it is stopped at, kept or skipped as everywhere
else. So nothing is decided here, and a run writes the same lines, checkpoints and incidents, bit for bit (`TakeAgain`).
(A module that changes buffers in its forward has seen these two steps once more; no model of `minilm.models` does.)

Looked at before their update are: the first step; those after which something is due; those in which a watcher reads
what the device computes; all steps of a run that looks for spikes; and all where `Layout.can_wait` is false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minilm.training.clock import Mark, elapsed
from minilm.training.limits import anything_due
from minilm.training.settings import TrainConfig
from minilm.training.step import StepResult, Unread
from minilm.training.watch import CanWait, StepView, Watcher

ANOTHER_ANSWER = (
    "was not finite at first, and is now that it was computed again. Algorithms that give other bits each time do that "
    "(train.deterministic: true refuses them), and so does faulty memory."
)


@dataclass(frozen=True)
class Begun:
    """A step with what is known before its first forward: what its line, its incident or a second try need.

    rates         that its update uses
    random_state  of this rank, before the first forward
    data_step     of the loader
    position      columns of the position in the data
    began         end of the step before where that is still under way, else before the data was fetched
    data_seconds  that fetching the data took
    """

    view: StepView
    rates: dict[str, float]
    random_state: dict[str, Any]
    data_step: int
    position: dict[str, Any]
    began: Mark
    data_seconds: float


@dataclass(frozen=True)
class Pending:
    """A step whose update is in the queue and whose numbers nobody has read."""

    begun: Begun
    unread: Unread
    watching: Sequence[Watcher]
    ended: Mark

    def read(self) -> StepResult:
        """What it measured. Raises TakeAgain where the device has refused it."""
        result = self.unread.read()
        if not result.is_finite:
            raise TakeAgain(self.begun)
        return self.unread.timed(result)


class TakeAgain(Exception):
    """The device has refused the update of a step: weights and moments are as before it. Ends in the trainer."""

    def __init__(self, begun: Begun) -> None:
        super().__init__(f"step {begun.view.step} is not finite")
        self.begun = begun


def seconds(begun: Begun, ended: Mark) -> float:
    """Of the whole step. Steps that follow each other without a pause add up to the time that passed."""
    return elapsed(begun.began, ended)


def is_awaited(config: TrainConfig, step: int, num_steps: int, watching: Sequence[Watcher]) -> bool:
    """Must a step be looked at before its update, whatever happened before it? By the settings and its watchers."""
    return (
        config.spike_factor is not None  # a spike is kept with its gradient, or not taken
        or anything_due(config, step, num_steps)
        or not all(isinstance(watcher, CanWait) and watcher.can_wait(step) for watcher in watching)
    )
