"""Tables and blocks of Markdown that no content can break out of, and how numbers are written in a record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_NUMBER = re.compile(r"[-+]?[0-9][0-9,.e+-]*\Z|-\Z|\[[^]]*\]\Z")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; a column of numbers stands on the right."""
    rows = [[cell(text) for text in row] for row in rows]
    right = [bool(rows) and all(_NUMBER.match(row[place]) for row in rows) for place in range(len(head))]
    lines = ["| " + " | ".join(map(cell, head)) + " |"]
    lines.append("| " + " | ".join("---:" if side else "---" for side in right) + " |")
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def cell(text: str) -> str:
    """One line of text in a table: nothing in it ends the cell or the row, or is taken for HTML."""
    flat = " ".join(visible(text).split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def block(text: str) -> list[str]:
    """Text as it is, indented: no line of it can begin a marker, a heading or a fence."""
    return [f"    {line}".rstrip() for line in visible(text).split("\n")]


def visible(text: str) -> str:
    """Control characters as their pictures; line feeds and tabs stay."""
    pictures = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421}
    strange = dict.fromkeys((*range(128, 160), 0x2028, 0x2029), 0xFFFD)
    halves = text.encode("utf-8", errors="backslashreplace").decode()  # half characters of generated text
    return halves.translate(pictures | strange)


def number(value: Any, digits: int = 4) -> str:
    """A float with so many digits behind the point, an integer with thousands marked, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.{digits}f}" if value == 0 or 1e-3 <= abs(value) < 1e15 else f"{value:.{digits}g}"
    return str(value)


def interval(low: float, high: float, *, signed: bool = False) -> str:
    """`[low, high]`; with their signs where they are limits of a difference."""
    sign = "+" if signed else ""
    return f"[{low:{sign}.4f}, {high:{sign}.4f}]"
