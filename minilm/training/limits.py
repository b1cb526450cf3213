"""Limits of a run besides its number of steps, and the deterministic mode."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import torch

from minilm.errors import ConfigError
from minilm.training.layout import Layout

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class Budget:
    """Is the run's budget of tokens or minutes used up? The clock starts with the object."""

    def __init__(self, layout: Layout, *, max_tokens: int | None, max_minutes: float | None) -> None:
        self.layout, self.max_tokens, self.max_minutes = layout, max_tokens, max_minutes
        self.start = time.monotonic()

    def used_up(self, total_tokens: int) -> str | None:
        """What is used up, for people; None while something is left. Collective: all ranks get the same answer."""
        if self.max_tokens is not None and total_tokens >= self.max_tokens:
            return f"train.max_tokens {self.max_tokens:,} reached with {total_tokens:,} tokens"
        if self.max_minutes is not None:
            minutes = (time.monotonic() - self.start) / 60
            # Clocks differ between ranks, and one that stops alone would leave the others waiting.
            if self.layout.all_reduce([float(minutes >= self.max_minutes)])[0] > 0:
                return f"train.max_minutes {self.max_minutes:g} reached"
        return None


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Inside, torch takes only algorithms that give the same bits each time, and raises where it has none.

    To be entered before the first CUDA product: cuBLAS reads CUBLAS_WORKSPACE_CONFIG then, and never again.
    """
    if not on:
        yield
        return
    if os.environ.setdefault(_WORKSPACE, ":4096:8") not in (":4096:8", ":16:8"):
        raise ConfigError(
            f"train.deterministic needs the environment variable {_WORKSPACE} to be :4096:8 or :16:8, it is "
            f"{os.environ[_WORKSPACE]}: other values let cuBLAS choose algorithms by chance. Unset it."
        )
    cudnn = torch.backends.cudnn
    former = cudnn.benchmark, cudnn.deterministic
    was_on, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
        cudnn.benchmark, cudnn.deterministic = former
