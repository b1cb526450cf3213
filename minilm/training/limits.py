"""What is due after a step, limits of a run besides its number of steps, and the deterministic mode."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from minilm.errors import ConfigError
from minilm.training.layout import Layout
from minilm.training.settings import TrainConfig

Interval = Literal["validate_every", "save_every", "sample_every"]
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


def is_due(config: TrainConfig, name: Interval, step: int, *, stopping: bool, at_end: bool) -> bool:
    """Is it due after `step`? At the end everything is; a run that is stopping only saves."""
    every: int | None = getattr(config, name)
    if stopping and not at_end:  # a launcher gives its processes half a minute: save, nothing else
        return name == "save_every"
    if name == "validate_every" and is_due(config, "save_every", step, stopping=stopping, at_end=at_end):
        return True  # so that the best checkpoint is known
    return at_end or (every is not None and step % every == 0)


def anything_due(config: TrainConfig, step: int, num_steps: int) -> bool:
    """Is anything due after `step` of a run that is not stopping?"""
    at_end = step == num_steps
    return any(is_due(config, name, step, stopping=False, at_end=at_end) for name in get_args(Interval))


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
