"""manifest.json: what ran. Enough to say, months later, which code made a number, from which data, on what.

    manifest = begin(run_folder, config=..., origins=..., data=..., tokenizer=..., model=..., layout=...)
    ...
    manifest.finish("finished", step=5000, results={"validation_loss": 2.31})

One file for the life of a run folder: a resume adds an entry to `resumes`, with what differs from the start.
It is written at once, so that a run that is killed leaves one too, with the state "running"; `state_of` tells it from
one that runs, by the process that is named there. Rank 0 writes it.
Nothing here can block a run: git gets seconds, no network is asked, what cannot be found out is said to be so.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from minilm import processes
from minilm.errors import CheckpointError

FILE = "manifest.json"
UNCHECKED = "this run was trained unchecked (--check off)"
State = Literal["finished", "interrupted", "failed"]
StateOf = Literal["running", "finished", "interrupted", "failed", "died"]
_PACKAGES = (
    *("minilm", "torch", "transformers", "tokenizers", "accelerate", "deepspeed", "datasets", "safetensors"),
    *("numpy", "pydantic", "swanlab", "swanboard", "flash-attn"),
)
_PARTS = ("config", "code", "packages", "machine", "data", "tokenizer", "model", "layout")
# Settings from outside that change results or speed. Only these prefixes: an environment also holds secrets.
_ENVIRONMENT = (
    "CUDA_",
    "CUBLAS_",
    "NCCL_",
    "TORCH_",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "ACCELERATE_",
    "DS_",
    "PYTHONHASHSEED",
)
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_GIT_SECONDS = 10.0
_MOST_DIFF_BYTES = 2_000_000


class Manifest:
    """The record of one run, always equal to RUN/manifest.json. `record` is what is in the file."""

    def __init__(self, run_folder: Path, record: dict[str, Any]) -> None:
        self.path = run_folder / FILE
        self.record = record

    @classmethod
    def read(cls, run_folder: Path | str) -> Manifest:
        """Raises CheckpointError where the file is missing or damaged."""
        path = Path(run_folder) / FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}). Is this a run folder?"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error}). The file was changed or damaged.") from error
        if not isinstance(record, dict) or "state" not in record:
            raise CheckpointError(f"{path}: not the manifest of a run.")
        return cls(Path(run_folder), record)

    def update(self, **parts: Any) -> None:
        """Add parts (`model={...}`, `layout={...}`) as they become known, and write.

        In a resumed run the start keeps its parts; what differs goes into the latest entry of `resumes`.
        """
        for name, value in _jsonable(parts).items():
            if name in self.record and self.record[name] is not None and self.record["resumes"]:
                if self.record[name] != value:
                    self.record["resumes"][-1]["changed"][name] = _changes(self.record[name], value)
            else:
                self.record[name] = value
        self._write()

    def finish(
        self,
        state: State,
        *,
        step: int | None = None,
        error: str | None = None,
        results: Mapping[str, Any] | None = None,
    ) -> None:
        """Write how the run ended; `error` says why it was interrupted or failed."""
        if state not in ("finished", "interrupted", "failed"):
            raise ValueError(f"state is {state!r}; it must be finished, interrupted or failed.")
        end = {"state": state, "ended": _now(), "step": step, "error": error, "results": dict(results or {})}
        self.record.update(_jsonable(end))
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.record, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(self.path, text.encode("utf-8", errors="backslashreplace") + b"\n")


def begin(
    run_folder: Path | str,
    *,
    config: Mapping[str, Any],
    origins: Mapping[str, str] | None = None,
    data: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    layout: Mapping[str, Any] | None = None,
    step: int = 0,
) -> Manifest:
    """Start the manifest of a run, or add a resume to the one that is there.

    config, origins   the resolved settings, and who decided each ("default", "run.yaml, line 3", "--a.b")
    data              the store's manifest or its fingerprint and counts; `tokenizer` likewise
    model             name, number of parameters, ...
    layout            number of processes, precision, ZeRO stage, ...
    step              optimizer steps already done
    """
    folder = Path(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    again = (folder / FILE).is_file()
    start = {
        "started": _now(),
        "command": shlex.join(sys.orig_argv),
        "folder": str(Path.cwd()),
        "process": processes.describe(),
    }
    parts = {
        "config": dict(config),
        "origins": dict(origins or {}),
        "code": describe_code(folder),
        "packages": describe_packages(),
        "machine": describe_machine(),
        "data": data,
        "tokenizer": tokenizer,
        "model": model,
        "layout": layout,
    }
    running: dict[str, Any] = {"state": "running", "ended": None, "error": None, "step": step, "results": {}}
    if not again:
        manifest = Manifest(folder, {**running, **start, **_jsonable(parts), "resumes": []})
        manifest._write()
        return manifest
    manifest = Manifest.read(folder)
    before = {name: manifest.record.get(name) for name in running}
    if before["state"] == "running":  # we hold the run folder: it runs no more
        before["state"] = "died (no end was recorded)"
    manifest.record["resumes"].append({"at_step": step, **start, "before": before, "changed": {}})
    manifest.record.update(running)
    manifest.update(**{name: parts[name] for name in _PARTS if parts[name] is not None})
    return manifest


def state_of(run_folder: Path | str) -> StateOf:
    """How a run stands: what its manifest says, but "died" where the process that would have written the end is gone.

    A process of another host, or of another container on this one, cannot be seen from here: it counts as running.
    Raises CheckpointError where there is no manifest.
    """
    record = Manifest.read(run_folder).record
    if record["state"] != "running":
        return record["state"]
    process = record["resumes"][-1]["process"] if record["resumes"] else record["process"]
    return "running" if processes.lives(process) else "died"


def unchecked(run_folder: Path | str | None) -> bool:
    """Was the run begun without the doctor's checks: to be said with every result of it. CheckpointError if damaged."""
    if run_folder is None or not (Path(run_folder) / FILE).is_file():
        return False
    checks = Manifest.read(run_folder).record.get("checks") or {}
    return checks.get("suite") == "off"


def describe_code(diff_folder: Path | None = None) -> dict[str, Any]:
    """The code that runs: a hash of minilm's source files, and git's commit and uncommitted changes.

    Changes to tracked files are saved in `diff_folder` (`git apply` takes them), named after their content: a
    resume with the same changes needs no second file. Files that git does not know are named.
    """
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {"source_sha256": digest.hexdigest(), "git": _describe_git(package, diff_folder)}


def describe_packages() -> dict[str, str | None]:
    """Versions of the packages that make the numbers; None: not installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def describe_machine() -> dict[str, Any]:
    """Python, system, processor, memory, accelerators and the environment variables that change results."""
    import psutil
    import torch

    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            gpus.append(
                {
                    "name": found.name,
                    "memory_bytes": found.total_memory,
                    "capability": f"{found.major}.{found.minor}",
                }
            )
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "nvidia_driver": _nvidia_driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT) and not any(word in name for word in _SECRET)
        },
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file: a reader finds the old or the new content, whenever the process or machine stops."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error.strerror}). Free some space or choose another run folder."
        ) from error


def _describe_git(package: Path, diff_folder: Path | None) -> dict[str, Any]:
    try:
        top = _git(package, "rev-parse", "--show-toplevel").decode().rstrip("\n")
        # An installed package can lie inside somebody's repository without being a part of it.
        if not _git(package, "ls-files", "--", "*.py"):
            return {"commit": None, "why": "minilm's source is not tracked by git here"}
        commit = _git(package, "rev-parse", "HEAD").decode().strip()
        changes = _git(Path(top), "diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv", "--no-color")
        unknown = _git(Path(top), "ls-files", "--others", "--exclude-standard", "-z").split(b"\0")[:-1]
    except _GitFailed as failure:
        return {"commit": None, "why": str(failure)}
    found: dict[str, Any] = {"commit": commit, "dirty": bool(changes or unknown)}
    if changes:
        found["diff_sha256"] = hashlib.sha256(changes).hexdigest()
        if diff_folder is not None and len(changes) <= _MOST_DIFF_BYTES:
            found["diff"] = f"code-{found['diff_sha256'][:12]}.diff"
            write_atomically(diff_folder / found["diff"], changes)
        else:
            found["diff"] = f"not saved: {len(changes):,} bytes"
    if unknown:
        found["untracked"] = [os.fsdecode(name) for name in unknown[:100]]
        found["num_untracked"] = len(unknown)
    return found


class _GitFailed(Exception):
    """git is missing, slow, or has no answer: the reason goes into the manifest."""


def _git(folder: Path, *arguments: str) -> bytes:
    # No locks (someone may be committing), no questions, no helpers.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    command = [
        "git",
        "-c",
        "core.fsmonitor=false",
        "-c",
        "core.quotePath=false",
        "-C",
        str(folder),
        *arguments,
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_GIT_SECONDS,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        raise _GitFailed("git is not installed") from None
    except subprocess.TimeoutExpired:
        raise _GitFailed(f"git {arguments[0]} took more than {_GIT_SECONDS:g} s") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().split("\n")[0]
        raise _GitFailed(f"git {arguments[0]}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").split("\n"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _nvidia_driver() -> str | None:
    """From the driver's own file: nvidia-smi can take seconds, or hang with a broken GPU."""
    version = Path("/proc/driver/nvidia/version")
    if not version.is_file():
        return None
    words = version.read_text(errors="replace").split("\n")[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), " ".join(words))


def _changes(before: Any, after: Any, name: str = "") -> dict[str, Any]:
    """Only what differs, as {"a.b": [before, after]}."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {name: [before, after]} if before != after else {}
    found: dict[str, Any] = {}
    for key in sorted(before.keys() | after.keys()):
        found |= _changes(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    return found


def _jsonable(value: Any) -> Any:
    """As JSON gives it back, so that a record in memory equals the one in the file."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): _jsonable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(inner) for inner in value]
    return str(value)


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
