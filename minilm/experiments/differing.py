"""Which figures of a part are not those of the run's files: line by line, cell by cell."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_CELLS = re.compile(r"(?<!\\)\|")
_NOTHING = "(nothing)"


@dataclass(frozen=True)
class Problem:
    """A place of a record that does not hold. `stated` and `true` are empty where `what` says it all."""

    file: str
    line: int
    what: str
    stated: str = ""
    true: str = ""

    def __str__(self) -> str:
        end = f": stated {self.stated}, but the run's files say {self.true}" if self.true else ""
        return f"{self.file}:{self.line}: {self.what}{end}"


def differing(
    file: str, name: str, stated: Sequence[str], true: Sequence[str], first: int
) -> Iterator[Problem]:
    """A problem for each figure of part `name` that differs; `first` is the number of its first line in the file."""
    matcher = difflib.SequenceMatcher(None, stated, true, autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal":
            continue
        for offset in range(max(i_end - i, j_end - j)):
            here, there = i + offset, j + offset
            mine = stated[here] if here < i_end else None
            other = true[there] if there < j_end else None
            line = first + min(here, max(0, len(stated) - 1))
            if mine is not None and other is not None:
                yield from _line(file, name, line, mine, other, _head(stated, here))
            elif mine is not None and mine.strip():
                yield Problem(file, line, f"{name}", mine.strip(), _NOTHING)
            elif other is not None and other.strip():
                yield Problem(file, line, f"{name}", _NOTHING, other.strip())


def _line(file: str, name: str, line: int, mine: str, other: str, head: list[str]) -> Iterator[Problem]:
    cells, truth = _cells(mine), _cells(other)
    if len(cells) < 2 or len(cells) != len(truth) or cells[0] != truth[0]:
        yield Problem(file, line, name, mine.strip() or _NOTHING, other.strip() or _NOTHING)
        return
    for number, (cell, true) in enumerate(zip(cells, truth, strict=True)):
        if cell != true:
            column = head[number] if number < len(head) else ""
            what = ", ".join(part for part in (name, cells[0], column) if part)
            yield Problem(file, line, what, cell or _NOTHING, true or _NOTHING)
            continue
    if cells == truth:  # blanks between cells
        yield Problem(file, line, name, repr(mine), repr(other))


def _head(lines: Sequence[str], number: int) -> list[str]:
    """The heading of the table that the line stands in."""
    while number > 0 and lines[number].startswith("|"):
        if lines[number].startswith("| ---"):  # also `| ---:`
            return _cells(lines[number - 1])
        number -= 1
    return []


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in _CELLS.split(line)[1:-1]] if line.startswith("|") else []
