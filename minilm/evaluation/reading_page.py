"""A reading (`minilm.evaluation.reading`) for people: a table in the terminal, or one HTML page without scripts."""

from __future__ import annotations

from html import escape
from typing import Any

from minilm.evaluation.reading import Inspection, LayerReading, TokenReading

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --strong: #2a7de1; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.text { font: 1.05rem/2.1 ui-monospace, monospace; }
.text a { color: inherit; text-decoration: none; padding: .15em 0; white-space: pre-wrap; border-radius: 3px;
  background: color-mix(in srgb, var(--strong) calc(var(--read) * 60%), transparent); }
.text a.new { border-bottom: 2px solid var(--strong); }
table { border-collapse: collapse; width: 100%; margin: .4rem 0 1.2rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { white-space: pre-wrap; } .quiet { opacity: .7; }
"""


def used(layer: LayerReading) -> float:
    """How much of what entries say came through: 0 to 1."""
    return layer.gate * (1 - layer.null)


def show(inspection: Inspection, console: Any, *, top: int = 2) -> None:
    """Print a table: a line for each token and layer with its `top` entries, then the interventions."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{inspection.store}: what was read", title_justify="left", pad_edge=False)
    for name, justify in (("token", "left"), ("then", "left"), ("p", "right"), ("layer", "right")):
        table.add_column(name, justify=justify, no_wrap=True)
    for name in ("gate", "null"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("entries read (row, share, token with most of it)")
    for token in inspection.tokens:
        for index, layer in enumerate(token.layers):
            first = index == 0
            lines = [f"{e.row}  {e.weight:.0%}  {e.token.strip()!r}  {e.text}" for e in layer.entries[:top]]
            table.add_row(
                Text(repr(token.token)[1:-1] if first else "", style="bold" if token.generated else ""),
                Text(repr(token.next_token)[1:-1] if first else ""),
                f"{token.probability:.2f}" if first else "",
                str(layer.layer),
                f"{layer.gate:.2f}",
                f"{layer.null:.2f}",
                Text("\n".join(lines) or "-"),
            )
    console.print(table)
    console.print(Text(f"{inspection.prompt} -> {inspection.answer}"))
    for line in _changes(inspection):
        console.print(Text(line))
    if inspection.note:
        console.print(Text(inspection.note))


def _changes(inspection: Inspection) -> list[str]:
    return [
        f"{change.what} (row {change.row}: {change.text}): "
        f"p of the next token {change.before:.3f} -> {change.after:.3f}"
        for change in inspection.interventions
    ]


def page(inspection: Inspection) -> str:
    """The whole report as one HTML document."""
    spans = "".join(_span(number, token) for number, token in enumerate(inspection.tokens))
    changes = "".join(f"<li>{escape(line)}</li>" for line in _changes(inspection))
    note = f"<p class=quiet>{escape(inspection.note)}</p>" if inspection.note else ""
    parts = "".join(_section(number, token) for number, token in enumerate(inspection.tokens))
    title = f"What was read: {inspection.prompt}"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{_STYLE}</style>
<h1>What was read</h1>
<p class=quiet>Store: {escape(inspection.store)}. The darker a token, the more of what entries say came through at it;
underlined tokens were generated. Follow a token to its entries.</p>
<p class=text>{spans}</p>
<h2>Does the answer hang on it?</h2>
<ul>{changes or "<li>No entry was read at the end of the prompt.</li>"}</ul>{note}
{parts}
"""


def _span(number: int, token: TokenReading) -> str:
    read = max((used(layer) for layer in token.layers), default=0.0)
    kind = ' class="new"' if token.generated else ""
    return f'<a{kind} href="#t{number}" style="--read:{read:.3f}">{escape(token.token)}</a>'


def _section(number: int, token: TokenReading) -> str:
    rows = "".join(_rows(layer) for layer in token.layers)
    head = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            ("layer", " class=n"),
            ("gate", " class=n"),
            ("null", " class=n"),
            ("share", " class=n"),
            ("row", " class=n"),
            ("most of it on", ""),
            ("entry", ""),
        )
    )
    then = f"then <code>{escape(token.next_token)}</code> with p = {token.probability:.3f}"
    return f'<h2 id="t{number}"><code>{escape(token.token)}</code> {then}</h2><table><tr>{head}</tr>{rows}</table>'


def _rows(layer: LayerReading) -> str:
    own = f"<td class=n>{layer.layer}</td><td class=n>{layer.gate:.3f}</td><td class=n>{layer.null:.3f}</td>"
    if not layer.entries:
        return f"<tr>{own}<td colspan=4>no entry</td></tr>"
    lines = [
        f"<td class=n>{entry.weight:.3f}</td><td class=n>{entry.row}</td><td><code>{escape(entry.token)}</code></td>"
        f"<td>{escape(entry.text)}</td>"
        for entry in layer.entries
    ]
    empty = "<td></td><td></td><td></td>"
    return "".join(f"<tr>{own if n == 0 else empty}{line}</tr>" for n, line in enumerate(lines))
