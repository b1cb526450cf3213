"""The most memory that tensors take during a call."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from minilm.training.profile import peak_growth


def peak_bytes(call: Callable[[], object], device: torch.device | str) -> int:
    """Most bytes in tensors during a call, over those before it: CUDA's allocator knows it, on a CPU it is recorded."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else two lines on stderr for each of many recordings
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json.gz"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        profiler.export_chrome_trace(str(trace))
        return peak_growth(trace, cuda=False)
