"""The report of eval.py as one HTML page: no scripts, nothing loaded from elsewhere, every text escaped."""

from __future__ import annotations

from html import escape

from minilm.evaluation.markup import STYLE, table
from minilm.evaluation.report import DEFINITIONS, HEADS, Report, Sample, cells, excluded_lines, printable

_ABOUT = ("checkpoint", "step", "weights", "checks", "model", "num_parameters", "data", "kind", "split")


def page(report: Report) -> str:
    """The whole report as one HTML document."""
    about = report.about
    known = [name for name in _ABOUT if name in about]
    rest = [name for name in about if name not in known and name != "bad_documents_skipped"]
    facts = table(("", ""), [[name.replace("_", " "), str(about[name])] for name in [*known, *rest]], words=2)
    rows = [["all", *cells(report.scores)]]
    rows += [[name, *cells(scores)] for name, scores in report.by_source.items()]
    rows += [[f"after {p}", *cells(scores)] for p, scores in report.continuations.items()]
    sections = "".join(
        f"<section><h2{' class=bad' if section.failed else ''}>{escape(section.title)}"
        f"{' (failed)' if section.failed else ''}</h2>{section.html()}</section>\n"
        for section in report.sections
    )
    missing = "".join(
        f"<p class=bad>Not there: {escape(part)} ({escape(why)})</p>\n"
        for part, why in report.missing.items()
    )
    left_out = "".join(f"<li>{escape(line)}</li>" for line in excluded_lines(report))
    samples = "".join(map(_sample, report.samples))
    samples = f"<section><h2>Samples</h2>{samples}</section>" if samples else ""
    definitions = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS.items()
    )
    title = f"Evaluation of {about.get('checkpoint', 'a model')}"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style>
<h1>{escape(title)}</h1>
{missing}{table(HEADS, rows)}
<p class=quiet>Loss in nats per token, all numbers teacher-forced. Intervals: 95 %, by bootstrap over documents.</p>
{sections}{samples}
<section><h2>Left out</h2><ul>{left_out}</ul></section>
<section><h2>What was measured, and how</h2>{facts}
<p class=quiet>{report.seconds:.1f} s.</p></section>
<section><h2>Definitions</h2><dl>{definitions}</dl></section>
"""


def _sample(sample: Sample) -> str:
    rows = [[name, printable(getattr(sample, name))] for name in ("prompt", "prediction", "truth")]
    heading = f"Document {sample.document}, loss of the truth {sample.loss:.4f}"
    return f"<h3>{heading}</h3><div class=texts>{table(('', ''), rows, words=2)}</div>"
