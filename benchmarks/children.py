"""Processes that take orders: started together, asked one at a time, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A child cannot go on; the text is the reason, for a reader of the results."""


class Child:
    """A process that answers each line of JSON with one, in a session of its own: what it started ends with it.

    log  where its standard error goes; the last line of it is the reason when it dies
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log, self._rest = log, b""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
            )

    def ask(self, order: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Give an order and wait for the answer. Failed if there is none in time."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `answer` finds out why
            self._process.stdin.write((json.dumps(order) + "\n").encode())
            self._process.stdin.flush()
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line. Failed if the process ends without it, or is not ready in time; it is ended then."""
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                self.end()
                raise Failed(f"no answer within {seconds:.0f} s")
            piece = os.read(pipe, 65536)
            if not piece:
                reason = self._reason()
                self.end()
                raise Failed(reason)
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it has not read of an order
                if pipe is not None:
                    pipe.close()

    def _reason(self) -> str:
        code = self._process.wait()
        lines = [x.strip() for x in self._log.read_text(encoding="utf-8", errors="replace").splitlines()]
        said = next((line for line in reversed(lines) if line), "it said nothing")
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:  # nobody here sends it to a child that is still to answer
            how += ": usually the system had no memory left; measure fewer at once (--only)"
        # Of paths the last part: a folder of this machine means nothing to a reader.
        return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", said)[:300] + f" ({how})"


@contextlib.contextmanager
def ended() -> Iterator[list[Child]]:
    """A list to put children in: at the end, by an error, Ctrl-C or SIGTERM too, all of them end."""
    children: list[Child] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield children
    finally:
        for child in children:
            child.end()
        signal.signal(signal.SIGTERM, before)
