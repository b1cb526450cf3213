"""SIGINT and SIGTERM ask for a stop at the next step border; a second Ctrl-C ends at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


class StopSignals:
    """`number` is the signal that asked first, None as long as nobody did. message: tells the user."""

    def __init__(self, message: Callable[[str], None]) -> None:
        self.number: int | None = None
        self._message = message

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, the signals are taken so; afterwards they do what they did before."""
        former = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        # A launcher passes Ctrl-C on as SIGTERM, so SIGTERM never counts as the second one.
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        self._message("stopping: will save after this step (Ctrl-C again: end at once, without saving)")
