"""One contender of `training_step.py`, in a process of its own: takes steps when it is told to, and tells about them.

Not to be called by hand. Orders come as lines of JSON on standard input, {"steps": N, "uncounted": M}: M steps, then N
that are timed. Answers go to standard output: first {"about", "parameters", "flops_per_token", "bytes_before"}, then,
for each order, {"seconds", "losses", "peak_bytes", "compilations"}. The end of the input ends the process. Whatever the
contender prints goes to standard error, where its traceback goes, too.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import contenders
import torch


class Turns:
    """The gate (`contenders.Gate`): lets a contender through as often as was ordered, and measures."""

    def __init__(self, orders: TextIO, tell: Callable[[dict[str, Any]], None], device: str) -> None:
        self.step = 0
        self._orders, self._tell, self._cuda = orders, tell, device == "cuda"
        self._left, self._uncounted, self._begun = 0, 0, 0.0
        self._losses: list[contenders.Loss] = []

    def wait(self) -> bool:
        if self._left == 0:
            line = self._orders.readline()
            if not line:
                return False
            order = json.loads(line)
            self._uncounted, self._losses = order["uncounted"], []
            self._left = order["uncounted"] + order["steps"]
        if len(self._losses) == self._uncounted:
            self._synchronize()
            self._begun = time.perf_counter()
        return True

    def done(self, loss: contenders.Loss) -> None:
        self._losses.append(loss)
        self.step += 1
        self._left -= 1
        if self._left:
            return
        self._synchronize()
        seconds = time.perf_counter() - self._begun
        answer = {
            "seconds": seconds / (len(self._losses) - self._uncounted),
            "losses": [float(x() if callable(x) else x) for x in self._losses],
            "peak_bytes": torch.cuda.max_memory_allocated() if self._cuda else peak_bytes(),
            "compilations": compilations(),
        }
        if self._cuda:
            torch.cuda.empty_cache()  # the device is shared with those that wait
        self._tell(answer)

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def compilations() -> int:
    """How many frames torch.compile has compiled in this process, again ones included."""
    counters = sys.modules["torch._dynamo.utils"].counters if "torch._dynamo.utils" in sys.modules else {}
    return int(counters["frames"]["total"]) if "frames" in counters else 0


def peak_bytes() -> int:
    """The most memory that this process had at once.

    Of Linux' own mark, which begins anew with a program: `getrusage` begins with the size of the process that started
    it, and would tell the parent's.
    """
    return memory_mark("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_mark(name: str) -> int | None:
    """VmHWM (most so far) or VmRSS (now) in bytes; None where the system has no /proc."""
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # models print

    def tell(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")

    given = json.loads(sys.argv[1])
    shape = contenders.Shape(**given["shape"])
    if shape.threads is not None:
        torch.set_num_threads(shape.threads)
    module = importlib.import_module(f"contenders.{given['module']}")
    before = 0 if shape.device == "cuda" else memory_mark("VmRSS") or peak_bytes()
    contender = module.build(shape, **given["options"])
    tell(
        {
            "about": contender.about,
            "parameters": contender.parameters,
            "flops_per_token": contender.flops_per_token,
            "bytes_before": before,
        }
    )
    contender.run(Turns(sys.stdin, tell, shape.device))


if __name__ == "__main__":
    main()
