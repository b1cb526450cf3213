"""A package that stands in for SwanLab in the mirror process, the board of the real one, and what its tests share."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minilm.track import TrackConfig, Tracker

# Stands in for the package in the mirror process. How it behaves is in the environment.
FAKE = """
import json, os, sys, time
BEHAVIOUR = os.environ["FAKE_SWANLAB"]
if BEHAVIOUR == "import raises": raise ImportError("libmissing.so: cannot open shared object file")

def note(**what):
    with open(os.environ["FAKE_SWANLAB_NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def act(where):
    if BEHAVIOUR == f"{where} hangs": time.sleep(1000)
    if BEHAVIOUR == f"{where} raises": raise RuntimeError("the server said no")
    if BEHAVIOUR == f"{where} dies": os._exit(9)
    if BEHAVIOUR == f"{where} asks": note(answer=input("Enter your API key: "))
    if BEHAVIOUR == f"{where} interrupts": raise KeyboardInterrupt("stopped by the user")
    if BEHAVIOUR == f"{where} prints": print('{"done": true} nonsense', flush=True)
    if BEHAVIOUR == f"{where} is slow": time.sleep(0.05)

class Run:
    dir = os.environ["FAKE_SWANLAB_NOTES"] + ".run"

def init(**options):
    note(init=options, terminal=os.isatty(0) or os.isatty(1) or os.isatty(2), pid=os.getpid())
    act("init")
    return Run()

def log(values, step):
    act("log")
    note(log={k: v if isinstance(v, (int, float)) else repr(v) for k, v in values.items()}, step=step)

def finish(state, error):
    act("finish")
    note(finish=state, error=error)

class Text(str):
    def __new__(cls, text, caption=None):
        act("Text")
        return str.__new__(cls, text)

class Image(str):
    def __new__(cls, path):
        act("Image")
        return str.__new__(cls, path)
"""


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """install(...)("log hangs") -> the path of the notes that the stand-in takes."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "swanlab.py").write_text(FAKE)
    notes = tmp_path / "notes"

    def behave(behaviour: str) -> Path:
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("FAKE_SWANLAB", behaviour)
        monkeypatch.setenv("FAKE_SWANLAB_NOTES", str(notes))
        return notes

    return behave


class Told(list[str]):
    """The warnings that the user sees, without the line that says which mode was chosen."""

    def __call__(self, text: str) -> None:
        if not text.startswith(("SwanLab: offline", "SwanLab: local")):
            self.append(text)


def tracker(run: Path, told: Told, **config: Any) -> Tracker:
    config = {"swanlab": "offline", "log_every": 1, "swanlab_close_seconds": 5.0, **config}
    return Tracker(run, TrackConfig(**config), {"model": {"dim": 8}, "data": {"store": None}}, message=told)


def noted(notes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.02)


@contextlib.contextmanager
def board(folder: Path, log: Path) -> Iterator[int]:
    """SwanLab's own server for a folder of runs, on a free port of loopback, which is given when it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-c", "from swanlab.cli import cli; cli()", "watch", str(folder)]
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=file, stderr=file
        )

    def answers() -> bool:
        try:
            get(port, "project")
        except OSError:
            return False
        return True

    try:
        wait_for(answers, 60)
        yield port
    finally:
        server.terminate()
        server.wait()


def get(port: int, route: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/api/v1/{route}", timeout=10) as answer:
        return json.loads(answer.read())["data"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
