"""The processes of a sweep: each run is one `minilm train`, so many at a time, and none takes another one with it.

Each run is a session of its own: Ctrl-C reaches the sweep alone, which asks every run to save and stop. A run that was
stopped, or died, goes on with --resume when the sweep is started again.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from minilm.sweeping.definition import Planned, Sweep
from minilm.sweeping.progress import standing

_POLL_SECONDS = 0.2
_STOPPED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}
_TAIL_BYTES = 8192

Command = Callable[[Sweep, Planned], list[str]]


@dataclass
class _Job:
    run: Planned
    number: int  # of all that this sweep starts, from 1
    devices: str | None
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float


def train_command(sweep: Sweep, run: Planned, launch: str | None = None) -> list[str]:
    """The command of a run. launch: arguments for `accelerate launch`, which then starts it on several processes."""
    words = ["-m", "minilm", "train", *(["--config", str(sweep.config)] if sweep.config else [])]
    words += [*run.flags, "--resume"]
    if launch is None:
        return [sys.executable, *words]
    given = shlex.split(launch)
    if not any(word.startswith("--main_process_port") for word in given):
        given += ["--main_process_port", str(_free_port())]  # two launches at once may not share one
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *given, *words]


def devices_of(jobs: int, each: int = 1) -> list[str] | None:
    """What each of so many jobs gets as CUDA_VISIBLE_DEVICES; None where there are no GPUs.

    As many entries as can be served, which may be fewer than `jobs`: no GPU is given twice.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = torch.cuda.device_count()
    if not number:
        return None
    names = (
        [name.strip() for name in visible.split(",")][:number] if visible else list(map(str, range(number)))
    )
    groups = [",".join(names[first : first + each]) for first in range(0, len(names) - each + 1, each)]
    return groups[:jobs]


class Runner:
    """Runs what is due; `failed` are the names of runs that ended in any way but well, each with the reason.

    say      gets a line for each start and end
    devices  one entry a job (`devices_of`), handed out and taken back; None: no GPUs
    """

    def __init__(
        self,
        sweep: Sweep,
        *,
        jobs: int,
        devices: list[str] | None,
        stop_on_failure: bool,
        say: Callable[[str], None],
        command: Command = train_command,
    ) -> None:
        self.sweep, self.jobs, self.stop_on_failure = sweep, jobs, stop_on_failure
        self._say, self._command = say, command
        self._free: list[str | None] = [*devices] if devices is not None else [None] * jobs
        self._running: list[_Job] = []
        self.failed: dict[str, str] = {}
        self.num_done = 0

    def run(self, due: Sequence[Planned]) -> int | None:
        """Run them to the end, or until SIGINT, SIGTERM or SIGHUP ask for a stop: returns that signal's number."""
        waiting = list(due)
        # Signals are only noted: one that raised between the start of a process and its entry here would lose it.
        with _noted() as asked:
            try:
                while (waiting or self._running) and not asked:
                    while waiting and self._free and len(self._running) < self.jobs and not asked:
                        self._start(waiting.pop(0), len(due))
                    time.sleep(_POLL_SECONDS)
                    self._look(len(due))
                    if self.failed and self.stop_on_failure and waiting:
                        self._say(f"{len(waiting)} runs are not started: --stop-on-failure.")
                        waiting.clear()
                if asked:
                    self._stop(asked, len(due))
            finally:
                self._kill()  # those that were not given the time to save; nobody is left behind
        return asked[0] if asked else None

    def _start(self, run: Planned, total: int) -> None:
        devices = self._free.pop(0)
        self.sweep.folder.mkdir(parents=True, exist_ok=True)
        log = log_of(run).open("ab")
        environment = dict(os.environ)
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        # Every run would otherwise use every core, and N of them at once would wait for each other.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.jobs)))
        process = subprocess.Popen(
            self._command(self.sweep, run),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        number = self.num_done + len(self._running) + 1
        self._running.append(_Job(run, number, devices, process, log, time.monotonic()))
        on = "" if devices is None else f" on GPU {devices}"
        self._say(f"[{number}/{total}] {run.name}: started{on}")

    def _look(self, total: int) -> None:
        for job in [job for job in self._running if job.process.poll() is not None]:
            self._ended(job, total)

    def _ended(self, job: _Job, total: int) -> None:
        self._running.remove(job)
        self._free.append(job.devices)
        job.log.close()
        self.num_done += 1
        code, taken = job.process.returncode, _clock(time.monotonic() - job.began)
        state = standing(job.run).state
        if code == 0 and state == "finished":
            self._say(f"[{job.number}/{total}] {job.run.name}: finished in {taken}")
            return
        word = "interrupted" if code in _STOPPED else "failed"
        reason = f"{word}, exit code {code}: {_reason(log_of(job.run)) or 'no message'}"
        self.failed[job.run.name] = reason
        self._say(f"[{job.number}/{total}] {job.run.name}: {reason} (all of it: {log_of(job.run)})")

    def _stop(self, asked: list[int], total: int) -> None:
        """Ask all to save and end, and wait for them until somebody asks again."""
        if self._running:
            self._say(
                f"stopping: {len(self._running)} runs save and end (Ctrl-C again: at once, without saving)"
            )
        for job in self._running:
            _signal(job, signal.SIGTERM)
        before = len(asked)
        while self._running and len(asked) == before:
            time.sleep(_POLL_SECONDS)
            self._look(total)
        if self._running:
            self._say("ended without saving")

    def _kill(self) -> None:
        for job in self._running:
            _signal(job, signal.SIGKILL)  # also what a launcher left behind
            job.process.wait()
            job.log.close()
        self._running.clear()


def log_of(run: Planned) -> Path:
    """What a run prints, beside its folder: a run that fails early has none."""
    return run.folder.with_name(f"{run.name}.log")


def _signal(job: _Job, number: int) -> None:
    """To the whole session: a launcher of one process does not pass a signal on."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.process.pid, number)


@contextlib.contextmanager
def _noted() -> Iterator[list[int]]:
    """The numbers of SIGINT, SIGTERM and SIGHUP as they come. What is ignored (nohup) stays ignored."""
    asked: list[int] = []
    former = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            former[number] = signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _reason(log: Path) -> str:
    """What a failed run said: the paragraph of a user's error, else its last line, as of a traceback."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace").strip()
    # What stands behind the paragraph was printed earlier, and came out of a buffer when the process ended.
    text, _, _ = text.partition("\n(--debug")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    begun = [
        n for n, line in enumerate(lines) if ": " in line and line.split(":")[0].endswith(("Error", "Failed"))
    ]
    told = " ".join(lines[begun[-1] :]) if begun else (lines[-1] if lines else "")
    return told[:400]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
