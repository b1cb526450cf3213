"""Freed memory is kept for the next step: on a CPU, getting it anew each time costs a fifth of the step.

The C library gives large blocks back to the system as soon as they are freed, and the next step's first touch of each
page brings it back, page by page. A training step allocates the same blocks again and again, so the process may keep
them; its peak stays where it was, only what lies below the peak is not returned in between. PyTorch's performance guide
advises another allocator for the same reason; two settings of the usual one (`man mallopt`) do it.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_LARGEST_BLOCK = 32 * 2**20  # bytes: the most that the library accepts; larger blocks still go back at once
_NEVER = 2**31 - 1


def keep_freed_memory(environment: Mapping[str, str] | None = None) -> bool:
    """Tell the C library to keep freed blocks in this process. False where that is not ours to say, or not known.

    Whoever has set the allocator by the environment (MALLOC_..., GLIBC_TUNABLES, LD_PRELOAD) has decided already.
    """
    environment = os.environ if environment is None else environment
    decided = any(
        name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in environment
    )
    if decided or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
