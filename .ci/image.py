"""Carry the Dockerfile out where no container engine runs: its steps, one after another, in a clean Debian root.

    sudo python3 .ci/image.py                   make a root with debootstrap, carry out every step, try the result
    sudo python3 .ci/image.py --root FOLDER     use this clean root (it is changed)

COPY takes what .dockerignore lets through, RUN and WORKDIR and USER happen in the root by chroot, ENV and ARG hold for
what follows. It needs root, debootstrap and a Debian mirror; what is missing is said, with exit code 3 (not run).

What this does not show: the base image itself (Debian 12 stands in for Ubuntu 24.04 with CUDA, so Python is 3.11 and no
GPU is seen), layers and their cache, and the isolation of a container. pip's settings and certificates of this machine
are taken along, because a mirror may be all that it reaches.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
NOT_RUN = 3
CLONE_NEWNS = 0x00020000  # of linux/sched.h: os.unshare comes with Python 3.12
HOST_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
CERTIFICATES = "/opt/host-certificates.crt"  # not under /etc/ssl, which ca-certificates of the root fills
# What the finished image is asked, as its own user: the program is there, it trains, and the source is not writable.
TRIAL = r"""
minilm --version
minilm params original:26m | grep 25,829,888
trial=data/trial; mkdir -p $trial
python -c 'for i in range(40): print(f"{{\"text\": \"{i + 1} follows {i}\"}}")' > $trial/texts.jsonl
minilm tokenizer train --source $trial/texts.jsonl --vocab-size 300 --out $trial/tokenizer
minilm data build --source $trial/texts.jsonl --validation-fraction 0.1 --tokenizer $trial/tokenizer --out $trial/store
python train.py --data.store=$trial/store --data.sequence_length=32 --model.size=tiny --train.steps=3 \
  --train.batch_size=4 --optim.warmup_steps=1 --run.name=trial --track.swanlab=off
test -s runs/trial/metrics.jsonl
if touch minilm/written 2>/dev/null; then echo "the source can be written by the user of the image"; exit 1; fi
"""


@dataclass
class Machine:
    """The state that the instructions change: where, as whom, with which environment."""

    root: Path
    folder: str = "/"
    user: str = "0"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    arguments: dict[str, str] = field(default_factory=dict)
    shell: tuple[str, ...] = ("/bin/sh", "-c")

    def expand(self, text: str) -> str:
        """${NAME} and $NAME of ARG and ENV, as the builder replaces them outside RUN."""
        known = {**self.arguments, **self.environment}
        return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: known.get(found[1] or found[2], ""), text)

    def call(self, command: str) -> None:
        """`command` in the shell of the image. Raises CalledProcessError."""
        environment = {**self.arguments, **self.environment, **_pip_settings()}
        environment["HOME"] = self._home()
        words = ["chroot"]
        if self.user != "0":
            words.append(f"--userspec={self.user}:{self.user}")
        inside = [*self.shell, f"cd {shlex.quote(self.folder)}\n{command}"]
        subprocess.run(
            [*words, str(self.root), *inside], check=True, env=environment, stdin=subprocess.DEVNULL
        )

    def _home(self) -> str:
        lines = (self.root / "etc/passwd").read_text().splitlines()
        return next((line.split(":")[5] for line in lines if line.split(":")[2] == self.user), "/root")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(INSTRUCTION, rest) of a Dockerfile; continued lines are joined, comments between them left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for whole in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if whole.strip():
            name, _, rest = whole.strip().partition(" ")
            yield name.upper(), rest.strip()


def carried_out(machine: Machine, name: str, rest: str, context: list[str]) -> str:
    """Do one instruction; returns what is said of it: done, or why it means nothing here."""
    if name == "SHELL":
        machine.shell = tuple(re.findall(r'"([^"]*)"', rest))
    elif name == "ARG":
        key, _, value = rest.partition("=")
        machine.arguments.setdefault(key, machine.expand(value))
    elif name == "ENV":
        pairs = [word.partition("=") for word in shlex.split(rest)]
        machine.environment.update({key: machine.expand(value) for key, _, value in pairs})
    elif name == "WORKDIR":
        machine.folder = machine.expand(rest)
        (machine.root / machine.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif name == "USER":
        machine.user = machine.expand(rest)
    elif name == "COPY":
        copied = _copy(machine, shlex.split(rest), context)
        return f"done ({copied} files)"
    elif name == "RUN":
        machine.call(re.sub(r"--mount=\S+\s*", "", rest))
    elif name in ("FROM", "LABEL", "VOLUME", "HEALTHCHECK", "CMD"):
        return "nothing to do in a root"
    else:
        raise SystemExit(f"{name} {rest}: .ci/image.py does not know this instruction; teach it.")
    return "done"


def _copy(machine: Machine, words: list[str], context: list[str]) -> int:
    if any(word.startswith("--") for word in words):
        raise SystemExit(f"COPY {' '.join(words)}: .ci/image.py knows no flags of COPY; teach it.")
    *sources, place = words
    target, count = machine.root / machine.folder.lstrip("/") / place, 0
    for source in sources:
        found = [path for path in context if source == "." or path == source or path.startswith(f"{source}/")]
        if not found:
            raise SystemExit(f"COPY {source}: .dockerignore hides it, or it is not there.")
        for path in found:
            to = target / (path if source == "." else Path(path).name)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / path, to)
            count += 1
    return count


def context_files(names: list[str], ignore: str) -> list[str]:
    """The files of `names` that .dockerignore lets through (its plain patterns and **/; no exceptions with !)."""
    patterns = [line.strip() for line in ignore.splitlines() if line.strip() and not line.startswith("#")]
    return [name for name in names if not any(_hides(pattern, name) for pattern in patterns)]


def _hides(pattern: str, name: str) -> bool:
    parts = name.split("/")
    if pattern.startswith("**/"):
        return any(fnmatchcase(part, pattern[3:]) for part in parts)
    return fnmatchcase("/".join(parts[: pattern.count("/") + 1]), pattern)


def _pip_settings() -> dict[str, str]:
    """What pip is told on this machine by the environment; the certificates lie where `_furnish` put them."""
    told = {
        key: value for key, value in os.environ.items() if key.startswith("PIP_") or key.endswith("_proxy")
    }
    return told | ({"PIP_CERT": CERTIFICATES} if HOST_CERTIFICATES.exists() else {})


def _furnish(root: Path) -> None:
    """/proc, /dev, the resolver, and what pip's settings of this machine point to. The mounts end with this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "this user may not make a mount namespace")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for place in ("/dev", "/proc"):
        subprocess.run(["mount", "--rbind", place, f"{root}{place}"], check=True)
    copies = {"/etc/resolv.conf": "/etc/resolv.conf", str(HOST_CERTIFICATES): CERTIFICATES}
    pip = [sys.executable, "-m", "pip", "config"]
    files = subprocess.run([*pip, "debug"], capture_output=True, text=True, check=False).stdout.splitlines()
    copies |= {
        name: name for line in files if (name := line.partition(", exists: True")[0].strip()) != line.strip()
    }
    for source, target in copies.items():
        if Path(source).exists():
            (root / target.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / target.lstrip("/"))
    settings = subprocess.run([*pip, "list"], capture_output=True, text=True, check=False).stdout
    # Of a file:// index the files lie beside the pages, so it is its parent that is needed.
    indexes = [str(Path(page).parent) for page in re.findall(r"file://(/[\w/.-]+)", settings)]
    for folder in dict.fromkeys([*indexes, *re.findall(r"(?<==')(/[\w/.-]+)", settings)]):
        if Path(folder).is_dir():  # on this machine's disk: to be read, never written
            (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", folder, f"{root}{folder}"], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", f"{root}{folder}"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="a clean root that is there already")
    given = parser.parse_args()
    missing = [what for what in ("debootstrap", "mount", "chroot") if not shutil.which(what)]
    if os.geteuid() != 0 or missing:
        why = f"needs {', '.join(missing)}" if missing else "needs root"
        print(f"NOT RUN: the steps of the Dockerfile in a clean root ({why})")
        return NOT_RUN
    tracked = subprocess.run(
        ["git", "-C", str(HOME), "ls-files", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    context = context_files(
        [n for n in tracked if (HOME / n).is_file()], (HOME / ".dockerignore").read_text()
    )
    with tempfile.TemporaryDirectory(prefix="minilm-root-") as made:
        root = given.root.resolve() if given.root else Path(made) / "root"
        if not given.root:
            subprocess.run(
                ["debootstrap", "--variant=minbase", "bookworm", str(root)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        pid = os.fork()  # the mounts are the child's: when it ends they are gone, and the root can be removed
        if pid == 0:
            os._exit(_child(root, context))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(root: Path, context: list[str]) -> int:
    _furnish(root)
    machine = Machine(root)
    for name, rest in [*instructions((HOME / "Dockerfile").read_text()), ("RUN", TRIAL)]:
        begun = time.monotonic()
        print(f"== {name} {' '.join(rest.split())[:120]}", flush=True)
        try:
            said = carried_out(machine, name, rest, context)
        except subprocess.CalledProcessError as error:
            print(f"FAILED with exit code {error.returncode}", flush=True)
            return 1
        print(f"   {said}, {time.monotonic() - begun:.0f} s", flush=True)
    print(
        "The steps of the Dockerfile were carried out in a clean root, and what they made trains.", flush=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
