"""What the parts of a step take, without interrupting it: on CUDA by events in the queue, which are read later."""

from __future__ import annotations

import itertools
import time

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """Now: seconds of the host's clock, or on CUDA an event that the device comes by. Waits for nothing."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed(start: Mark, end: Mark) -> float:
    """Seconds from `start` to `end`, marks of one device. Waits until the device has come by `end`, and no further."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    assert not isinstance(start, torch.cuda.Event) and not isinstance(end, torch.cuda.Event)
    return end - start


class Stopwatch:
    """Seconds per named part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Mark]] = [("", mark(device))]

    def lap(self, part: str) -> None:
        """The time since the last mark belongs to `part`."""
        self._marks.append((part, mark(self._device)))

    def seconds(self) -> dict[str, float]:
        """Of all laps so far, by part. Waits until the device has done them."""
        parts: dict[str, float] = {}
        for (_, start), (part, end) in itertools.pairwise(self._marks):
            parts[part] = parts.get(part, 0.0) + elapsed(start, end)
        return parts
