"""For tests of benchmarks/: its modules import each other as they lie there, and are forgotten afterwards."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@contextlib.contextmanager
def imported(name: str) -> Iterator[ModuleType]:
    """The module of benchmarks/NAME.py, with those beside it; afterwards all is as before."""
    threads, before = torch.get_num_threads(), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
        for new in set(sys.modules) - before:
            if str(getattr(sys.modules[new], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[new]
        torch.set_num_threads(threads)
