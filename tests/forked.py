"""Processes for launched tests without the seconds that imports take: forks of one that has imported and done no more.

    run(script, arguments, launcher="cpu2.yaml") -> subprocess.CompletedProcess

What a launch has to show is shown by fresh processes, which a fork is: its memory is its own, and the process that it
was forked from has never built a model, drawn a number or opened a file of a run. Ranks get the environment that
Accelerate's launcher makes of the launcher file, by Accelerate's own functions. What the launcher itself does (its
command line, several machines, ending the other ranks when one dies), and what another order of sets and strings could
do (forks have the hash seed in common), is tested by real launches.

One such process (and one that has imported DeepSpeed, for launches with ZeRO) per process of pytest; it ends with it.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
# Also what the first optimizer and the last picture of a run import.
ALWAYS = ("minilm.launch", "train", "accelerate.commands.launch", "torch._dynamo", "matplotlib.figure",
          "matplotlib.backends.backend_agg")  # fmt: skip
DEEPSPEED = ("deepspeed.ops", "transformers.integrations", "deepspeed.runtime.zero.muon.muon_optimizer")


# ---------------------------------------------------------------- in the process of the tests


def run(
    script: Path,
    arguments: list[str],
    *,
    launcher: str | None = None,
    timeout: float = 300,
    patience: float = 20,
) -> subprocess.CompletedProcess[str]:
    """Run a script in one process, or in as many as a file of run_file/accelerate says; returns what it wrote.

    patience    seconds for the other ranks to end by themselves when one has failed; then they are killed
    returncode  of the first rank that failed, 0 if none did
    Raises subprocess.TimeoutExpired, with nobody left.
    """
    zero = launcher is not None and "zero" in launcher
    server = _server(zero)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        asked = {
            "script": str(script), "arguments": [str(part) for part in arguments], "launcher": launcher,
            "folder": str(Path.cwd()), "environment": {**os.environ, "OMP_NUM_THREADS": "1"},
            "out": str(out), "err": str(err), "timeout": timeout, "patience": patience,
        }  # fmt: skip
        server.stdin.write(json.dumps(asked) + "\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        answer = server.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            _server.cache_clear()
            raise RuntimeError(f"tests/forked.py ended with {server.wait()}: see stderr")
        code = json.loads(answer)["code"]
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    command = [str(script), *asked["arguments"]]
    if code is None:
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    return subprocess.CompletedProcess(command, code, *texts)


@functools.cache
def _server(zero: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__)), *(DEEPSPEED if zero else ())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
    )  # fmt: skip

    def end() -> None:
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]

    atexit.register(end)
    return process


# ---------------------------------------------------------------- in the process that is forked


def serve(more: list[str]) -> None:
    """Answer requests, one a line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints when it is imported
    sys.path[0] = str(ROOT)
    for name in (*ALWAYS, *more):
        __import__(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(
            f"{threads} threads after the imports: a fork would have one of them, and all locks"
        )
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        answers.write(json.dumps({"code": _launch(asked)}) + "\n")
        answers.flush()


def _launch(asked: dict[str, Any]) -> int | None:
    """The exit code, or None if time was up. Nobody is left, however this ends."""
    left = [_fork(asked, environment) for environment in _environments(asked)]
    deadline, failed = time.monotonic() + asked["timeout"], 0
    try:
        while left and time.monotonic() < deadline:
            for process in tuple(left):
                done, status = os.waitpid(process, os.WNOHANG)
                if not done:
                    continue
                left.remove(process)
                if not failed and (failed := os.waitstatus_to_exitcode(status)):
                    deadline = min(deadline, time.monotonic() + asked["patience"])
            time.sleep(0.005)
    finally:
        for process in left:
            os.kill(process, signal.SIGKILL)  # not yet waited for, so it is still this process
            os.waitpid(process, 0)
    return failed or (None if left else 0)


def _environments(asked: dict[str, Any]) -> list[dict[str, str]]:
    """One for each rank."""
    if asked["launcher"] is None:
        return [asked["environment"]]
    from accelerate.commands import launch

    file = ROOT / "run_file" / "accelerate" / asked["launcher"]
    given = ["--config_file", str(file), asked["script"], *asked["arguments"]]
    os.environ.clear()
    os.environ.update(asked["environment"])
    arguments, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        common = launch.prepare_deepspeed_cmd_env(arguments)[1]
    else:
        common = launch.prepare_multi_gpu_env(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    number = str(arguments.num_processes)
    common |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": number,
        "LOCAL_WORLD_SIZE": number,
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(int(number))]


def _fork(asked: dict[str, Any], environment: dict[str, str]) -> int:
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setsid()
        for name, descriptor in (("out", 1), ("err", 2)):
            file = os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(asked["folder"])
        random.seed(), np.random.seed()  # a new interpreter begins with others; torch always with the same
        script = asked["script"]
        sys.argv, sys.path[0] = [script, *asked["arguments"]], str(Path(script).parent)
        code = _code_of(script)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _code_of(script: str) -> int:
    """The exit code of the script, as the interpreter would give it."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001  (whatever it is: this is where the process ends)
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1:])
