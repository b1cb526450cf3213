"""Docstrings of minilm put names and what they mean in columns. Markdown would run them together; here they stay."""

from __future__ import annotations

import re
from typing import Any

import griffe

COLUMNS = re.compile(r"^\S.*?\S?\s{2,}\S")  # a name, two spaces or more, what it is


def kept(text: str) -> str:
    """Paragraphs of columns, indented so that Markdown leaves them alone; all others as they are."""
    return "\n\n".join(_indented(part) if _is_table(part) else part for part in text.split("\n\n"))


def _is_table(paragraph: str) -> bool:
    """Every line begins with a name and its column, or goes on with an indented line."""
    lines = paragraph.splitlines()
    begun = [line for line in lines if not line.startswith(" ")]
    return bool(begun) and lines[0] == begun[0] and all(COLUMNS.match(line) for line in begun)


def _indented(paragraph: str) -> str:
    return "\n".join(f"    {line}" for line in paragraph.splitlines())


class Columns(griffe.Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = kept(obj.docstring.value)
