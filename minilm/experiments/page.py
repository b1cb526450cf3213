"""A comparison as one HTML file: no script, no other file, nothing from a network; light or dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from minilm.experiments import tables
from minilm.experiments.markdown import visible

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2026; --paper: #fff; --line: #d9dce2; --quiet: #666c78; --warn: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181d; --line: #363a43; --quiet: #9aa1ad; --warn: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: pre; }
td.k { white-space: pre; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
.warn { color: var(--warn); font-weight: 600; } .quiet { color: var(--quiet); }
"""


def page(told: Mapping[str, Any], picture: bytes) -> str:
    """The HTML text; `picture` is the PNG of the curves."""
    title = "Comparison: " + ", ".join(told["runs"])
    image = base64.b64encode(picture).decode("ascii")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        *(f'<p class="warn" role="alert">{_text(warning)}</p>' for warning in told["warnings"]),
        "<h2>Curves</h2>",
        f'<img alt="losses over tokens, FLOPs and time" src="data:image/png;base64,{image}">',
        '<p class="quiet">Lines: training loss, smoothed. Points: validation loss.</p>',
        "<h2>Results</h2>",
        _table(*tables.results(told), numbers_from=1),
        "<h2>Is the difference one?</h2>",
        _table(*tables.differences(told), numbers_from=2),
        f'<p class="quiet">{_text(tables.NOTE)}</p>',
        "<h2>What differs</h2>",
        _table(*tables.differing(told), numbers_from=99),
        "<h2>From</h2><ul>",
        *(f"<li>{_text(folder)}</li>" for folder in told["folders"]),
        "</ul></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ["n" if place >= numbers_from else "k" for place in range(len(row))]
        return "".join(
            f'<{tag} class="{kind}">{_text(text)}</{tag}>' for kind, text in zip(kinds, row, strict=True)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    heading = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f'<div class="wide"><table>{heading}<tbody>\n{body}\n</tbody></table></div>'


def _text(text: str) -> str:
    return html.escape(visible(text))
