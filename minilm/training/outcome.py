"""How a run ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `state`: finished or interrupted."""

    state: Literal["finished", "interrupted"]
    step: int
    loss: float | None
    validation_loss: float | None
    signal: int | None = None
    reason: str | None = None  # why it was finished before its last step: a budget


def exit_code(outcome: Outcome) -> int:
    """0 for a finished run; 128 + signal for one that was asked to stop, as shells do."""
    return 0 if outcome.state == "finished" else 128 + (outcome.signal or signal.SIGINT)
