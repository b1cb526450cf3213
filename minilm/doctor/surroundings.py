"""On what machine a figure was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """`AMD EPYC 7B13, 2 of its cores, Linux`: the processor as the system names it."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (x for x in info.read_text().splitlines() if x.startswith("model name"))
        name = next((x.split(":", 1)[1].strip() for x in lines), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {platform.system()}"
