"""One run folder, one run: two writers would tear each other's metrics and checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from minilm.errors import ConfigError
from minilm.training.agreement import shares_folder
from minilm.training.layout import Layout

FILE = ".lock"


@contextlib.contextmanager
def locked(layout: Layout, run_folder: Path) -> Iterator[None]:
    """Hold RUN/.lock while the block runs. Collective: the first rank holds it, all ranks are refused together.

    The system gives the lock back when its process ends, however it ends: what kill -9 leaves is no lock. (A record
    lock of `fcntl`, not `flock`: a process that was forked from the run and outlives it does not hold it.)
    Raises ConfigError if another process has the folder, if it cannot be written, or if a rank does not see it.
    """
    file: IO[str] | None = None
    problem = ""
    if layout.is_main:
        try:
            file = _take(run_folder)
        except ConfigError as error:
            problem = str(error)
    if layout.all_reduce([float(bool(problem))])[0] > 0:
        raise ConfigError(
            problem or f"The first rank was refused the run folder {run_folder}: see its message."
        )
    try:
        shares_folder(layout, run_folder / FILE, lambda text: print(text, file=file, end="", flush=True))
        yield
    finally:
        if file is not None:
            file.close()  # gives the lock back; the file stays, removing it would race with the next run


def _take(run_folder: Path) -> IO[str]:
    path = run_folder / FILE
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"The run folder {run_folder} cannot be written: {error.strerror}. Choose another one with run.folder or "
            "run.name, or mend its permissions."
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError as error:
        file.seek(0)
        holder = file.read()
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"The run folder {run_folder} is being written by {holder or 'another process'}. Wait until it has "
                "ended or stop it (kill -TERM saves first), or give another --run.name."
            ) from error
        raise ConfigError(
            f"The run folder {run_folder} cannot be locked: {error.strerror}. Free space, or choose a disk that has "
            "locks with run.folder."
        ) from error
    return file
