"""Processes that can be recognised later: does the one that began a run still live?"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil


def describe() -> dict[str, Any]:
    """This process, so that another one can find out whether it still lives, whatever became of its number."""
    return {
        "number": os.getpid(),
        "started_unix_seconds": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "boot": _text_of(Path("/proc/sys/kernel/random/boot_id")),
        "namespace": _namespace(),
    }


def lives(process: dict[str, Any]) -> bool:
    """Is the process that `describe` described alive? True where it cannot be seen from here."""
    here = describe()
    if process["host"] != here["host"]:
        return True
    if process["boot"] != here["boot"]:
        return False
    if process["namespace"] != here["namespace"]:
        return True
    try:
        other = psutil.Process(process["number"])
        # The number may have gone to another process. psutil gives the start in hundredths of a second.
        same = abs(other.create_time() - process["started_unix_seconds"]) < 1
        return same and other.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _namespace() -> str | None:
    """Process numbers mean something within it alone (a container has its own)."""
    path = Path("/proc/self/ns/pid")
    return str(path.readlink()) if path.is_symlink() else None
