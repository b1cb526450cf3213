"""A part of the report of eval.py: what it found, as JSON, as tables in the terminal and as a piece of the page.

Continuations, tasks, agreement: each is one class with these members, in the file that measures it. The report
knows nothing else of them, so a further question does not touch it.
"""

from __future__ import annotations

from typing import Any, Protocol

from rich.console import Console


class Section(Protocol):
    """One question's answers. Made from numbers that were measured already: nothing here computes."""

    @property
    def name(self) -> str:
        """Its key in the JSON file, lower case with underscores."""

    @property
    def title(self) -> str:
        """Its heading in the terminal and on the page."""

    @property
    def failed(self) -> bool:
        """True makes eval.py end with exit code 1, after everything is printed and written."""

    def as_dict(self) -> dict[str, Any]:
        """Everything, for the JSON file: numbers unrounded, no NaN or infinity, counts beside every mean."""

    def print(self, console: Console) -> None:
        """The same for the terminal, as rich tables."""

    def html(self) -> str:
        """The same for the page: an HTML fragment with every text escaped, pictures as inline SVG, no script."""
