"""Pieces of a page without scripts, readable on light and on dark: a table, and a curve as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from io import StringIO

STYLE = """
:root { color-scheme: light dark; --line: #8884; --strong: #2a7de1; --bad: #c0392b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0 1.2rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre, .texts td { white-space: pre-wrap; overflow-wrap: anywhere; }
.quiet { opacity: .75; } .bad { color: var(--bad); }
svg { max-width: 100%; height: auto; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
"""
_INK = "#010203"  # stands for the colour of the text until the picture is text itself


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """An HTML table; all cells are escaped. The first `words` columns are words, the others numbers."""
    kinds = ["" if n < words else " class=n" for n in range(len(heads))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, heads, strict=True))
    lines = [
        "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f"<div class=wide><table><tr>{head}</tr>\n{body}</table></div>"


def curve(
    x: Sequence[float],
    y: Sequence[float],
    band: Sequence[tuple[float, float] | None],
    *,
    x_label: str,
    y_label: str,
    alt: str,
) -> str:
    """y over x (on a scale of octaves) with a band around it, as inline SVG in the colour of the surrounding text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "minilm",
        "font.family": "sans-serif",
        "font.size": 10,
    }
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings |= dict.fromkeys(colours, _INK)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        known = [n for n, ends in enumerate(band) if ends is not None]
        if known:
            low, high = zip(*(band[n] or (0.0, 0.0) for n in known), strict=True)
            axes.fill_between([x[n] for n in known], low, high, color="#2a7de1", alpha=0.25, linewidth=0)
        axes.plot(x, y, "o-", color="#2a7de1", markersize=3.5, linewidth=1.4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        text = StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
