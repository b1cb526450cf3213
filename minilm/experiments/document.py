"""The text of a record: what people wrote, and between marks what the program wrote.

    <!-- minilm:record {"format": 1, "lang": "en", "run": "runs/first", ...} -->     once: what the record is about
    <!-- minilm:begin metrics sha256=... -->
    ...
    <!-- minilm:end metrics -->

A mark counts at the beginning of a line only; what the program writes of a run is indented or within a table, so no
text of a model can be a mark. The hash is of the lines between, as the program wrote them: others were written by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minilm.errors import DataError, listed

FORMAT = 1
_HEADER = re.compile(r"<!-- minilm:record (\{.*\}) -->\Z")
_BEGIN = re.compile(r"<!-- minilm:begin ([a-z_]+)(?: sha256=([0-9a-f]{64}))? -->\Z")
_END = re.compile(r"<!-- minilm:end ([a-z_]+) -->\Z")
_ANY = re.compile(r"<!--\s*minilm:")


@dataclass
class Part:
    """A part of the program: `first` is the number of its first line in the file, from 1; `written` its hash."""

    name: str
    lines: list[str]
    first: int
    written: str | None

    @property
    def by_hand(self) -> bool:
        """Were the lines changed since the program wrote them? An empty part without a hash is one to be filled."""
        if self.written is None:
            return any(line.strip() for line in self.lines)
        return hash_of(self.lines) != self.written


@dataclass
class Document:
    """A record, in pieces: texts of people (list of lines) and parts of the program, in their order."""

    about: dict[str, Any] | None = None
    pieces: list[list[str] | Part] = field(default_factory=list)

    @property
    def parts(self) -> dict[str, Part]:
        return {piece.name: piece for piece in self.pieces if isinstance(piece, Part)}

    def text(self, about: Mapping[str, Any], parts: Mapping[str, list[str]]) -> str:
        """The file with these parts in place of its own; a part that it has no place for comes at the end."""
        lines = [header(about)]
        for piece in self.pieces:
            lines += _framed(piece.name, parts[piece.name]) if isinstance(piece, Part) else piece
        missing = [name for name in parts if name not in self.parts]
        if missing and lines[-1] == "":
            lines.pop()
        for name in missing:
            lines += ["", *_framed(name, parts[name])]
        return "\n".join([*lines, ""] if missing else lines)


def parse(text: str, where: str) -> Document:
    """Raises DataError, with file and line, for marks that do not fit together."""
    found, problems, part = Document(), [], None
    people: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not _ANY.match(line):
            (people if part is None else part.lines).append(line)
            continue
        if match := _HEADER.match(line):
            about = _about(match[1])
            if about is None or found.about is not None or part is not None:
                problems.append(
                    f"{where}:{number}: this mark is damaged, stands there twice or within a part."
                )
            found.about = about if found.about is None else found.about
        elif (match := _BEGIN.match(line)) and part is None and match[1] not in found.parts:
            found.pieces.append(people)
            people, part = [], Part(match[1], [], number + 1, match[2])
        elif (match := _END.match(line)) and part is not None and match[1] == part.name:
            found.pieces.append(part)
            part = None
        else:
            problems.append(
                f"{where}:{number}: the mark {line.strip()!r} has no other that fits, or is damaged."
            )
    if part is not None:
        problems.append(f"{where}:{part.first - 1}: the part {part.name} has no end.")
    if problems:
        raise DataError(listed(problems) + "\nTake the marks from experiment/TEMPLATE.md.")
    found.pieces.append(people)
    return found


def header(about: Mapping[str, Any]) -> str:
    """The first line of a record. A path with `--` or `>` cannot end the comment."""
    text = json.dumps(about, ensure_ascii=False, sort_keys=True)
    text = text.replace("--", "-\\u002d").replace(">", "\\u003e")
    return f"<!-- minilm:record {text} -->"


def hash_of(lines: list[str]) -> str:
    """sha256 of the lines of a part."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _framed(name: str, lines: list[str]) -> list[str]:
    return [f"<!-- minilm:begin {name} sha256={hash_of(lines)} -->", *lines, f"<!-- minilm:end {name} -->"]


def _about(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("run"), str) else None
