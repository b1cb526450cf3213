"""A command run to its end, or ended with all that it started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


def run_whole(
    command: Sequence[str],
    *,
    seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> tuple[int | None, str]:
    """(exit code, what it wrote on stdout and stderr); None in place of the code where its time was over.

    environment  what is set beside that of this process

    By time, Ctrl-C or any other exception, nobody of its descendants is left: a launcher gives its ranks sessions of
    their own, so that a group of processes is not all of them.
    """
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, **(environment or {})}, cwd=folder,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        end(process)
        text, _ = process.communicate()
        return None, text
    except BaseException:
        end(process)
        process.wait()
        raise


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process, which was not waited for yet, and all its descendants."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family[1:], timeout=10)
