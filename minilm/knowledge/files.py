"""Writing a store: beside its final name, flushed to the disk, then renamed. What has the final name is whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file

from minilm.data.tokenizer import Tokenizer
from minilm.errors import DataError
from minilm.knowledge.store import DECIDE, DESCRIPTION, FOLLOW, TENSORS, KnowledgeStore

TOKENIZER = "tokenizer"  # folder in the store, so that its ids can be read wherever it goes
_LOCK = "lock"


@contextlib.contextmanager
def reserved(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, for one process at a time; gone when the work fails or is interrupted.

    What a killed process left there is removed. Raises DataError where another process is at work, and for a disk that
    is full or cannot be written.
    """
    folder = out.with_name(out.name + ".building")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"Another process is making {out}, in {folder}. Wait for it to end."
                ) from error
            try:
                yield folder
            except BaseException:  # Ctrl-C, too
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        raise DataError(
            f"The knowledge store {out} cannot be written: {error.strerror or error}. Check free space and permissions."
        ) from error


def publish(store: KnowledgeStore, tokenizer: Tokenizer, folder: Path, out: Path) -> None:
    """Write the store into `folder` and give it the name `out`, in one step."""
    tensors = {name: getattr(store, name).contiguous() for name in (*DECIDE, *FOLLOW)}
    # One entry of metadata: several are written in random order, and equal stores would be different files.
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps(store.description, indent=1, ensure_ascii=False) + "\n"
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")
    shutil.copymode(
        folder / DESCRIPTION, folder / TENSORS
    )  # safetensors makes files that only their owner can read
    tokenizer.save(folder / TOKENIZER)
    if Tokenizer.load(folder / TOKENIZER).fingerprint != tokenizer.fingerprint:
        raise DataError(f"Tokenizer {tokenizer.name} becomes another one when it is saved and loaded again.")
    (folder / _LOCK).unlink()
    for path in [*folder.rglob("*"), folder]:
        _to_disk(path)
    try:
        folder.rename(out)
    except OSError as error:
        raise DataError(f"{out} was made by somebody else meanwhile: choose another name.") from error
    _to_disk(out.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
