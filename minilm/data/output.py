"""The files of a store while it is being written: appended to, described, flushed to the disk itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minilm.data import store as stores
from minilm.data.store import SPLITS

_BACKFILL = 1 << 20  # labels written at once


class Output:
    """The files of a store being written: tokens and offsets per split and source, and labels where it has any.

    sizes   bytes of each file that count, from an earlier build; what is behind them is cut off
    """

    def __init__(self, folder: Path, names: list[str], vocab_size: int, sizes: dict[str, int]) -> None:
        self.folder, self.vocab_size = folder, vocab_size
        self.dtype = stores.smallest_dtype(vocab_size)
        self._files: dict[str, BinaryIO] = {}
        for split in SPLITS:
            (folder / split).mkdir(exist_ok=True)
            for name in names:
                for kind in ("tokens", "offsets"):
                    inside = f"{split}/{name}.{kind}.bin"
                    with (folder / inside).open("ab") as file:
                        file.truncate(sizes.get(inside, 0))
                    self._files[inside] = (folder / inside).open("ab", buffering=1 << 20)
                labels = f"{split}/{name}.entries.bin"
                if labels in sizes:
                    self._open_labels(labels, sizes[labels])
                else:
                    (folder / labels).unlink(missing_ok=True)
        self._sizes = {inside: file.tell() for inside, file in self._files.items()}

    def write(
        self,
        split: str,
        name: str,
        tokens: np.ndarray,
        lengths: list[int],
        where: list[str],
        entries: np.ndarray | None = None,
    ) -> None:
        """Append documents: `tokens` end to end, `lengths` of each, and the labels of the tokens where there are any.

        DataError for an id outside the vocabulary.
        """
        ends = np.cumsum(lengths)

        def place(index: int) -> str:
            return f"in {where[int(np.searchsorted(ends, index, side='right'))]}"

        ids = stores.checked_ids(tokens, self.vocab_size, place)
        offsets, start = f"{split}/{name}.offsets.bin", self.num_tokens(split, name)
        if self._sizes[offsets] == 0:
            self._append(offsets, np.zeros(1, dtype="<u8"))
        self._append(offsets, (ends + start).astype("<u8"))
        self._append(f"{split}/{name}.tokens.bin", ids)
        labels = f"{split}/{name}.entries.bin"
        if entries is not None and labels not in self._files:
            self._open_labels(labels, 0)
            self._sizes[labels] = 0
            for begin in range(0, start, _BACKFILL):  # what was written before the first label came
                self._append(labels, np.full(min(_BACKFILL, start - begin), -1, dtype="<i4"))
        if labels in self._files:
            values = np.full(len(ids), -1) if entries is None else entries
            self._append(labels, values.astype("<i4"))

    def num_tokens(self, split: str, name: str) -> int:
        return self._sizes[f"{split}/{name}.tokens.bin"] // self.dtype.itemsize

    def description(self, split: str, name: str) -> dict[str, Any]:
        """Its files as the manifest names them, and how many tokens are labelled; after `sync`."""
        files = {kind: f"{split}/{name}.{kind}.bin" for kind in ("tokens", "offsets", "entries")}
        described: dict[str, Any] = {
            f"{kind}_file": {"path": inside, "size_bytes": self._sizes[inside]}
            for kind, inside in files.items()
            if inside in self._files
        }
        if "entries_file" in described:
            written = np.memmap(self.folder / files["entries"], dtype="<i4", mode="r")
            described["labelled"] = int((written >= 0).sum())
        return described

    def sync(self) -> dict[str, int]:
        """Everything to the disk itself; the size of each file."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return dict(self._sizes)

    def _open_labels(self, inside: str, size: int) -> None:
        with (self.folder / inside).open("ab") as file:
            file.truncate(size)
        self._files[inside] = (self.folder / inside).open("ab", buffering=1 << 20)

    def _append(self, inside: str, values: np.ndarray) -> None:
        self._files[inside].write(values.tobytes())
        self._sizes[inside] += values.nbytes

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            # After a failed write the buffer is still full, and closing would fail the same way and hide it.
            try:
                file.close()
            except OSError:
                file.raw.close()  # type: ignore[attr-defined]
