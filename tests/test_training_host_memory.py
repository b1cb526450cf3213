"""Does a process keep its freed memory, and leave alone what somebody else has decided?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from minilm.training.host_memory import keep_freed_memory

PAGES = """
import resource, sys
import torch
from minilm.training.host_memory import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("skip")
    sys.exit()

def step():
    blocks = [torch.ones(2**22) for _ in range(4)]  # 16 MB each
    return float(sum(block[0] for block in blocks))

for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Page faults of five steps."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PAGES, way], capture_output=True, text=True, env=clean, check=True
    )
    if done.stdout.strip() == "skip":
        pytest.skip("another C library than glibc, or its allocator is set by the environment")
    return int(done.stdout)


def test_pages_are_not_fetched_again():
    kept, plain = faults("keep"), faults("leave")
    whole = 5 * 4 * 2**24 // 4096  # every page of every block, each time
    assert plain > whole / 4
    assert kept < whole / 10


@pytest.mark.parametrize(
    "name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"]
)
def test_what_the_environment_says_stays(name, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("the allocator was touched"))
    assert keep_freed_memory({"PATH": "/bin", name: "1"}) is False


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("the allocator was touched"))
    assert keep_freed_memory({}) is False
