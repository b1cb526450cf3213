"""Text for a terminal: harmless whatever a model wrote, and numbers as people read them."""

from __future__ import annotations

import datetime
import math
from typing import Any

from rich.text import Text

from minilm.experiments.markdown import visible

STYLES = {
    "running": "green",
    "waiting": "cyan",
    "interrupted": "yellow",
    "failed": "bold red",
    "died": "bold red",
    "damaged": "bold red",
}
_LABEL = 11
# Marks that turn the direction of a line: harmless to the terminal, but they would mix up the numbers beside them.
_DIRECTIONS = dict.fromkeys((0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def shown(text: str) -> str:
    """One line that commands no terminal: control characters as pictures, no marks of direction."""
    return " ".join(visible(text).translate(_DIRECTIONS).split())


def labelled(label: str, text: str, style: str = "") -> Text:
    """A line that begins with a dim name; all begin their values in one column."""
    return Text.assemble((label.ljust(_LABEL), "dim"), (text, style))


def strange(value: float | None) -> bool:
    """A number, but no finite one."""
    return value is not None and not math.isfinite(value)


def short(value: float | None, digits: int = 4) -> str:
    """With so many digits behind the point."""
    return "-" if value is None else f"{value:.{digits}f}"


def count(value: Any) -> str:
    """12,345"""
    return f"{value:,}" if isinstance(value, int) else "-"


def thousands(value: float | None) -> str:
    """41273 -> 41.3k"""
    if value is None or not math.isfinite(value):
        return "-"
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """h:mm:ss"""
    return "-:--:--" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
