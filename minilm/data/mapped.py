"""A file that is read through a memory map for days, and noticed when somebody changes it meanwhile.

Reading a mapped file behind its new end kills the process (SIGBUS) without a word, and a file that is written over
gives other tokens from one step to the next. So whoever reads asks `check` before and after: one fstat, a microsecond.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from minilm.errors import DataError


class MappedFile:
    """A file of a store, mapped for reading. `array`: its content, [size / itemsize] of `dtype`.

    size_bytes, blake2b  of the file as the store's manifest has them. Raises DataError for another size.
    """

    def __init__(self, path: Path, dtype: Any, *, size_bytes: int, blake2b: str) -> None:
        self.path, self._size_bytes, self._blake2b = path, size_bytes, blake2b
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}. {_REPAIR}") from error
        weakref.finalize(self, os.close, self._handle)
        self._seen = self._look()
        if self._seen[0] != size_bytes:
            raise DataError(f"{path} has {self._seen[0]} bytes, but {size_bytes} were written. {_REPAIR}")
        # A plain array over the map, several times quicker to slice than np.memmap.
        self.array = np.frombuffer(mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ), dtype=dtype)

    def check(self) -> None:
        """DataError if the file is not the one that was opened: cut off, written over, or on a disk that is gone.

        A file with a new date and the old content (a copy over itself, a `touch`) is as good as before.
        """
        now = self._look()
        if now == self._seen:
            return
        if now[0] != self._size_bytes:
            raise DataError(
                f"{self.path} was cut off while this run reads it: {now[0]} of {self._size_bytes} bytes are left. "
                f"{_REPAIR}"
            )
        if self._checksum() != self._blake2b:
            raise DataError(
                f"{self.path} was altered while this run reads it (its checksum differs). {_REPAIR}"
            )
        self._seen = now

    def _look(self) -> tuple[int, int]:
        """Size and date of the file that is mapped, also when another one has its name by now."""
        try:
            found = os.fstat(self._handle)
        except OSError as error:
            raise DataError(f"{self.path} can no longer be read: {error.strerror}. {_REPAIR}") from error
        return found.st_size, found.st_mtime_ns

    def _checksum(self) -> str:
        digest, place = hashlib.blake2b(digest_size=16), 0
        while block := os.pread(self._handle, 1 << 22, place):
            digest.update(block)
            place += len(block)
        return digest.hexdigest()


_REPAIR = (
    "Copy the store again or build it again (`minilm data build --force`); `minilm data info STORE --verify` names "
    "every damaged file. Then continue a run with --resume: nothing was computed from this file since it was changed."
)
