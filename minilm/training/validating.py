"""The validation of a run: when it was, what came out, what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from minilm.alignment import Sum
from minilm.training.ema import averaged
from minilm.training.layout import Layout
from minilm.training.settings import Log, Progress


class Validation:
    """Validates at steps, once at each, writes the line and tells it. Collective.

    score() -> Sum over the validation rows, on all ranks; it leaves training mode and random states as they were.
    None: there are no such rows, and nothing is done.
    """

    def __init__(self, score: Callable[[], Sum] | None, layout: Layout, log: Log, progress: Progress) -> None:
        self._score, self._layout, self._log, self._progress = score, layout, log, progress
        self._seconds, self._began = 0.0, time.perf_counter()
        self.last: tuple[int, Sum] | None = None  # step and result

    @property
    def mean(self) -> float | None:
        """The loss of the last one."""
        return self.last[1].mean if self.last else None

    def mean_at(self, step: int) -> float | None:
        """The loss at this step; None where it was not validated."""
        return self.mean if self.last and self.last[0] == step else None

    def forget(self) -> None:
        """The last one is of weights that the run has gone back from."""
        self.last = None

    def at(self, step: int) -> None:
        """Validate the weights that there are after `step`, unless it was done."""
        if self._score is None or (self.last and self.last[0] == step):
            return
        start = time.perf_counter()
        total = self._score()
        self.last = (step, total)
        values: dict[str, Any] = {
            "loss": total.mean,
            "perplexity": total.perplexity,
            "tokens": int(total.tokens),
        }
        if float(total.bytes) > 0:  # NaN: not counted
            values["bits_per_byte"] = total.bits_per_byte
        if self._layout.average is not None:
            with averaged(self._layout):
                values["ema_loss"] = self._score().mean
        now = time.perf_counter()
        values["seconds/validation"] = now - start
        self._seconds += now - start
        share = self._seconds / (now - self._began)  # of the whole time of this process, also saves
        self._log.log("validation", step, values)
        cost = f"{now - start:.1f} s" + (f", {share:.1%} of the time" if step else "")
        self._progress.message(
            f"step {step}: validation loss {total.mean:.4f}, perplexity {total.perplexity:.1f} ({cost})"
        )
