"""The frame of every command: subcommands, one paragraph for a user's error, exit codes.

Exit codes: 0 done, 1 a check or comparison found something, 2 wrong usage or input, 130 interrupted.
A subcommand is a module of this folder with `add(subparsers)`, which sets `run=` to a function of the parsed
arguments that returns an exit code (None is 0).
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator

from minilm.errors import ConfigError, MinilmError


def guarded(command: Callable[[], int | None], *, debug: bool) -> int:
    """Run a command; a `MinilmError` becomes a paragraph on stderr and exit code 2. Anything else is our defect."""
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a disk that fails under a memory map kills the process: the stack says what it read
    try:
        return command() or 0
    except MinilmError as error:
        rank = int(os.environ.get("RANK", "0"))
        if int(os.environ.get("LOCAL_RANK", rank)) and isinstance(error, ConfigError):
            return 2  # settings are the same on every rank of a machine: its first one says it
        if debug:
            traceback.print_exc()
        of_rank = f" on rank {rank}" if rank else ""
        print(f"\n{type(error).__name__}{of_rank}: {wrapped(str(error))}", file=sys.stderr)
        if not debug:
            print("(--debug shows the traceback)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minilm data show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextlib.contextmanager
def importing(name: str) -> Iterator[None]:
    """Import the module `name` and what hangs on it inside, once per process, without the garbage collector.

    torch and what hangs on it are a million objects, and they stay. The collector would look through them again and
    again while they grow, a quarter of the time of the imports, and again at each of its full rounds later: they are
    put out of its sight (`gc.freeze`). Nothing is done where the module is imported already.
    """
    if name in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def wrapped(text: str) -> str:
    """Paragraphs at 100 columns; lines that are indented (lists, tables) stay as they are."""
    lines = (
        line
        if line.startswith(" ")
        else textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )
    return "\n".join(lines)


def parser(description: str, **kwargs: object) -> argparse.ArgumentParser:
    """An argument parser as all our commands have it; `kwargs` go to argparse."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **kwargs,  # type: ignore[arg-type]
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made
