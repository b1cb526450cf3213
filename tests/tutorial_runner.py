"""Does what a tutorial tells: its fenced blocks one after another, in a folder of their own.

A block marked `bash` is executed, commands of minilm in this process (each would import torch again); one marked
`python` is executed in the names that earlier ones left, or, with title="NAME", written to that file. A `text` block
says what the block before it printed: its lines come in this order, `...` stands for anything, and a number with a
point may differ by 2 %, because another processor rounds differently.

    python tests/tutorial_runner.py docs/tutorials/first_run.md        print what each block prints
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^```(?P<language>\w+)(?P<rest>[^\n]*)\n(?P<body>.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?")
TOLERANCE = 0.02


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    body: str
    line: int


def blocks(text: str) -> list[Block]:
    """All fenced blocks that name a language. An unclosed one would hide what follows: it is refused."""
    if len(re.findall(r"^```", text, re.M)) % 2:
        raise ValueError("a fence is not closed")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["rest"])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match["language"], title[1] if title else None, match["body"], line))
    return found


def performed(page: str) -> Iterator[tuple[Block, str]]:
    """Each block of a page with what it printed; what is promised in a `text` block is compared on the way."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.language == "text":
            missing = first_missing(block.body, printed)
            assert missing is None, f"line {block.line}: {missing!r} is not in what was printed:\n{printed}"
            continue
        if block.title is not None:
            Path(block.title).write_text(block.body, encoding="utf-8")
            continue
        printed = {"bash": _shell, "python": _python}[block.language](block.body, names)
        yield block, printed


def _python(source: str, names: dict[str, Any]) -> str:
    with _captured() as out:
        exec(compile(source, "tutorial", "exec"), names)
    return out.getvalue()


def _shell(source: str, names: dict[str, Any]) -> str:
    commands = [shlex.split(line, comments=True) for line in source.replace("\\\n", " ").splitlines()]
    commands = [words for words in commands if words]
    if any(words[0] != "minilm" for words in commands):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", source], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr
    from minilm.__main__ import main

    with _captured() as out:
        for words in commands:
            code = main(words[1:])
            print(f"[exit code {code}]" if code else "", end="")
    return out.getvalue()


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield out


def first_missing(promised: str, printed: str) -> str | None:
    """The first promised line that does not come, in this order, among the printed ones; None if all do."""
    rest = iter(printed.splitlines())
    for line in promised.splitlines():
        if line.strip() not in ("", "...") and not any(agrees(line, other) for other in rest):
            return line
    return None


def agrees(promised: str, printed: str) -> bool:
    """Equal but for spaces, what `...` stands for, and 2 % of numbers with a point."""
    wanted, had = " ".join(promised.split()), " ".join(printed.split())
    pattern = re.escape(NUMBER.sub("\0", wanted)).replace(re.escape("..."), ".*")
    found = re.fullmatch(pattern.replace(re.escape("\0"), f"({NUMBER.pattern})"), had)
    if found is None:
        return False
    pairs = zip(map(float, NUMBER.findall(wanted)), map(float, found.groups()), strict=True)
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) for a, b in pairs)


if __name__ == "__main__":
    pages = [Path(name).resolve() for name in sys.argv[1:]]
    os.environ["COLUMNS"] = "100"
    faulthandler.enable()  # minilm would, on a stderr that is no file here
    for page in pages:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            sys.path.insert(0, folder)
            for done, said in performed(page.read_text(encoding="utf-8")):
                print(f"--- {page.name}, line {done.line}\n{said}", file=sys.__stdout__)
