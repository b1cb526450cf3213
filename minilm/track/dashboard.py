"""Starts, watches and ends the SwanLab process (`mirror.py`). Nothing here can wait for SwanLab, except
`finish`, and that for a stated time.

    RUN/swanlab.json   what was mirrored where (one entry a start), and the options of the latest
    RUN/swanlab.log    what SwanLab printed
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "swanlab.json"
LOG = "swanlab.log"
STALL_SECONDS = 60.0
_BOARD = "0.1.10b2"  # the one version of swanboard that swanlab 0.10 writes for
_SCRIPT = Path(__file__).with_name("mirror.py")


def choose_mode(wanted: str) -> tuple[str, str | None]:
    """The mode that will be used, and why it is not the one wanted (or what "auto" came to).

    swanlab itself prompts or fails without a mode, and its local mode without the board package goes on as
    if it worked and shows nothing.
    """
    if wanted == "off":
        return "off", None
    if importlib.util.find_spec("swanlab") is None:
        return "off", "swanlab is not installed: metrics.jsonl alone is written"
    if wanted not in ("auto", "local"):
        return wanted, None
    missing = _board_problem()
    if missing is None:
        return "local", None
    how = "pip install 'swanlab[dashboard]' shows runs in a browser here"
    return "offline", f"{missing}, therefore offline (`swanlab sync` uploads it later; {how})"


def _board_problem() -> str | None:
    if importlib.util.find_spec("swanboard") is None:
        return "swanboard is not installed"
    version = _version("swanboard")
    if version != _BOARD and os.environ.get("SWANLAB_SKIP_SWANBOARD_VERSION_CHECK") != "1":
        return f"swanboard is {version}, swanlab 0.10 needs {_BOARD}"
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


class Dashboard:
    """The SwanLab process of one run. `poll` and `finish` return texts for the log."""

    def __init__(
        self,
        run_folder: Path,
        metrics: Path,
        *,
        mode: str,
        project: str,
        name: str,
        group: str,
        tags: tuple[str, ...],
        folder: Path,
        log_every: int,
        close_seconds: float,
        settings: Mapping[str, Any],
    ) -> None:
        self.mode, self.folder, self.close_seconds = mode, folder.resolve(), close_seconds
        self._log = run_folder / LOG
        self._record = run_folder / FILE
        self._started: list[dict[str, Any]] = []
        if self._record.is_file():
            self._started = json.loads(self._record.read_text(encoding="utf-8")).get("started", [])
        resumed = len(self._started)
        self._options = {
            "metrics": str(metrics.resolve()),
            "mode": mode,
            "project": project,
            "name": f"{name} (resumed {resumed})" if resumed else name,
            "description": f"mirror of {metrics.resolve()}",
            "group": group,
            "tags": list(tags),
            "folder": str(self.folder),
            "log_every": log_every,
            "stall_seconds": STALL_SECONDS,
            "settings": {key: _shown(value) for key, value in {**settings, **_machine(run_folder)}.items()},
            "earlier": [s["run_id"] for s in self._started if s["folder"] == str(self.folder)],
        }
        self._buffer = b""
        self._done = False
        self._given_up = False
        self._start()

    def poll(self) -> list[str]:
        """What happened since the last call. Never waits."""
        texts = [text for report in self._reports() if (text := self._read(report))]
        code = self._process.poll()
        if code is not None and not self._done and not self._given_up:
            self._given_up = True
            texts.append(
                f"SwanLab stopped ({_last_line(self._log) or f'exit code {code}'}). Training goes on and "
                f"metrics.jsonl is complete; details in {self._log}."
            )
        return texts

    def finish(self, state: str, error: str | None, size: int, image: Path | None) -> list[str]:
        """Let SwanLab finish with the first `size` bytes of metrics.jsonl; end it after `close_seconds`."""
        texts = self.poll()
        if not self._given_up:
            word = {
                "state": state,
                "error": error and error[:4000],
                "size": size,
                "image": image and str(image),
            }
            with contextlib.suppress(BrokenPipeError):  # it has just died: poll says so
                os.write(self._stdin, json.dumps(word).encode() + b"\n")
            until = time.monotonic() + self.close_seconds
            while self._process.poll() is None and not self._done and time.monotonic() < until:
                time.sleep(0.05)
                texts += self.poll()
            texts += self.poll()
            if not self._done and not self._given_up:
                texts.append(
                    f"SwanLab did not finish within {self.close_seconds:g} s and was ended; its last values may be "
                    f"missing there. metrics.jsonl is complete; details in {self._log}."
                )
        self._end()
        return texts

    def abandon(self) -> None:
        """End it at once."""
        self._end()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save()
        environment = {**os.environ, "SWANLAB_INTERACTIVE": "false", "SWANLAB_TERMINAL_PROXY_TYPE": "none"}
        # The monitor would measure the mirror process and the terminal capture its empty output; git and the
        # list of packages are in manifest.json. A user's own choice stands.
        for name in ("MONITOR", "GIT", "REQUIREMENTS"):
            environment.setdefault(f"SWANLAB_PROBE_{name}", "false")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT), str(self._record)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the trainer; and without a terminal nothing can prompt
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdout, False)
        os.set_blocking(self._stdin, False)

    def _reports(self) -> list[dict[str, Any]]:
        while True:
            try:
                data = os.read(self._stdout, 1 << 16)
            except BlockingIOError:
                break
            if not data:
                break
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]

    def _read(self, report: dict[str, Any]) -> str | None:
        if "ready" in report:
            place = {"run_id": report["run_id"], "folder": str(self.folder), "url": report["url"]}
            self._started.append({"mode": self.mode, "name": self._options["name"], **place})
            self._save()
            return None
        if "stalled" in report:
            return (
                f"SwanLab has not answered for {report['stalled']} s. Training goes on; "
                "what is missing follows when it answers."
            )
        self._done = True
        if report["problems"]:
            return "SwanLab shows other values than metrics.jsonl: " + "; ".join(report["problems"])
        return None

    def _save(self) -> None:
        new = self._record.with_suffix(".json.new")
        text = json.dumps({**self._options, "started": self._started}, indent=1, ensure_ascii=False)
        new.write_text(text, encoding="utf-8", errors="backslashreplace")
        new.replace(self._record)

    def _end(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=2 if self._done else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _last_line(path: Path) -> str:
    """The end of a traceback: its last line says what was wrong."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _machine(run_folder: Path) -> dict[str, Any]:
    """What the run's manifest says of the machine, as lines of the dashboard's config; {} where there is none."""
    path = run_folder / "manifest.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    resumes = record.get("resumes") or [{}]
    machine, packages = record.get("machine") or {}, record.get("packages") or {}
    # A run that was resumed elsewhere is shown where it is now.
    changed = resumes[-1].get("changed", {}).get("machine", {})
    machine = {name: changed[name][1] if name in changed else value for name, value in machine.items()}
    gpus = [f"{gpu['name']}, {gpu['memory_bytes'] / 1e9:.1f} GB" for gpu in machine.get("gpus") or []]
    told = {
        "gpus": "; ".join(gpus) or "none",
        **{
            name: machine.get(name)
            for name in ("cpu", "cpu_cores", "host", "python", "cuda", "nvidia_driver")
        },
        "memory_gb": round(machine["memory_bytes"] / 1e9, 1) if machine.get("memory_bytes") else None,
        "torch": packages.get("torch"),
    }
    return {f"machine.{name}": value for name, value in told.items() if value is not None}


def _shown(value: Any) -> Any:
    """A setting as SwanLab can show it: numbers and texts stay, the rest becomes text."""
    return value if isinstance(value, (int, float, str, bool)) else str(value)
