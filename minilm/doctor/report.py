"""What the doctor found, for a person: a table in the terminal, a page, and the same as JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minilm import __version__
from minilm.doctor.catalogue import bugs
from minilm.doctor.core import Finding, Status
from minilm.doctor.roots import in_reading_order, roots_of

MOST_BUGS_SHOWN = 3


@dataclass(frozen=True)
class Examination:
    """All findings about one subject."""

    target: str
    suite: str
    findings: Sequence[Finding]
    about: Mapping[str, Any] = field(default_factory=dict)  # parameters, device, data: what was examined

    def of(self, status: Status) -> list[Finding]:
        """The findings with this status."""
        return [f for f in self.findings if f.status == status]

    @property
    def failures(self) -> list[Finding]:
        """What failed, in the order in which to read it: what others may follow from comes first."""
        return in_reading_order(self.findings)

    def roots(self, finding: Finding) -> list[str]:
        """Failed checks that this failure may follow from."""
        return roots_of(self.findings).get(finding.check, [])

    @property
    def is_healthy(self) -> bool:
        """Something was checked, and nothing failed. What was NOT RUN says nothing."""
        return bool(self.of("PASS")) and not self.of("FAIL")

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 findings or nothing could be checked at all."""
        return 0 if self.is_healthy else 1

    @property
    def seconds(self) -> float:
        return sum(f.seconds for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, in plain values (infinite and undefined numbers as text)."""
        return {
            "minilm": __version__,
            "target": self.target,
            "suite": self.suite,
            "about": dict(self.about),
            "counts": {status: len(self.of(status)) for status in ("PASS", "FAIL", "NOT RUN")},
            "seconds": self.seconds,
            "findings": [
                _plain({**asdict(f), "margin": f.margin, "may_follow_from": self.roots(f)})
                for f in self.findings
            ],
        }

    def write_json(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        _write(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")

    def write_html(self, path: Path) -> None:
        """As one page that needs nothing else."""
        _write(path, page(self))

    def show(self, console: Any = None) -> None:
        """Print the table, what is known of each failure, and why the rest was not run."""
        from rich.console import Console

        print_examination(self, console or Console())

    def summary(self) -> str:
        """One line."""
        counts = ", ".join(f"{len(self.of(s))} {s}" for s in ("PASS", "FAIL", "NOT RUN"))
        return f"{self.target}: {counts} in {self.seconds:.1f} s"


def number(value: float | None, unit: str = "") -> str:
    """Three digits; nothing for None."""
    if value is None:
        return ""
    text = f"{value:.3g}" if math.isfinite(value) else str(value)
    return f"{text} {unit}".strip()


def margin(finding: Finding) -> str:
    """How far from the limit, as a factor; "exact" where the measured value is 0."""
    if finding.margin is None:
        return ""
    if not math.isfinite(finding.margin):
        return "exact"
    return f"x{finding.margin:.3g}" if finding.margin < 999 else f"x{finding.margin:.1e}".replace("e+0", "e")


def print_examination(examination: Examination, console: Any) -> None:
    """The table, then a paragraph for each failure, then the reasons of what was not run."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    # Text, so that a name is shown as it is: "hf:llama:" would become a picture, [x] would vanish.
    console.print(Text(examination.summary(), style="italic"))
    console.print(_table(examination))
    for finding in examination.failures:
        console.print(Text(f"\nFAIL {finding.check}", style="bold red"))
        paragraphs = Table.grid(padding=(0, 1))
        paragraphs.add_column(width=8)
        paragraphs.add_column(overflow="fold")
        for name, text in explained(finding, examination.roots(finding)):
            paragraphs.add_row(Text(f"  {name}", style="bold"), Text(text))
        console.print(paragraphs)
    reasons: dict[str, list[str]] = {}
    for finding in examination.of("NOT RUN"):
        reasons.setdefault(finding.message, []).append(finding.check)
    if reasons:
        console.print(Text("\nNOT RUN (says nothing, neither good nor bad)", style="yellow"))
    for reason, names in reasons.items():
        console.print(Padding(Text(reason), (0, 0, 0, 2)))
        console.print(Padding(Text(", ".join(names), style="dim"), (0, 0, 0, 6)))


def _table(examination: Examination) -> Any:
    """One row a check; where the terminal is narrow the unit gives way, and nothing else."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in ("check", "", "measured", "limit", "margin", "cost"):
        table.add_column(name, justify="left" if name in ("check", "") else "right", no_wrap=True)
    table.add_column("unit", style="dim", overflow="ellipsis")
    colours = {"PASS": "green", "FAIL": "bold red", "NOT RUN": "yellow"}
    group = ""
    for finding in examination.findings:
        if finding.group != group:
            group = finding.group
            table.add_row(Text(group, style="bold"))
        table.add_row(
            Text(f"  {finding.check}"),
            Text(finding.status, style=colours[finding.status]),
            number(finding.measured),
            number(finding.threshold),
            margin(finding),
            f"{finding.seconds:.2f} s",
            Text(finding.unit, no_wrap=True, overflow="ellipsis"),
        )
    return table


def explained(finding: Finding, roots: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(what, text) of a failure: what it may follow from, seen, where, likely cause, what to change, where others met
    it."""
    known = [bugs()[bug] for bug in finding.bugs if bug in bugs()][:MOST_BUGS_SHOWN]
    rows = [("after", f"may follow from {', '.join(roots)}: look there first")] if roots else []
    rows += [("seen", finding.message), ("where", finding.component)]
    rows += [("cause" if n == 0 else "or", f"{bug.id}: {bug.symptom}") for n, bug in enumerate(known)]
    rows.append(("change", finding.advice))
    rows += [("met by", bug.where) for bug in known if bug.urls or bug.source][:2]
    return [(name, text) for name, text in rows if text]


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;width:100%}td,th{padding:.25rem .6rem;text-align:left;border-bottom:1px solid #e5e5e5;
vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.PASS{color:#137333}.FAIL{color:#b3261e;font-weight:600}.NOT{color:#8a6100}
.wide{overflow-x:auto}
section{border-left:4px solid #b3261e;padding:.2rem 1rem;margin:1rem 0;background:#fdf4f3}dt{font-weight:600}
dd{margin:0 0 .4rem 0}code{background:#f4f4f4;padding:0 .2rem}
@media(prefers-color-scheme:dark){body{background:#161616;color:#e6e6e6}td,th{border-color:#333}section{background:#2a1c1b}
.PASS{color:#7ccf8f}.FAIL{color:#ff8a80}.NOT{color:#e3b341}code{background:#2a2a2a}}
"""


def page(examination: Examination) -> str:
    """The report as a self-contained HTML page."""
    title = html.escape(f"minilm doctor: {examination.target}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>",
        f"<p>{html.escape(examination.summary())}; suite {html.escape(examination.suite)}; minilm {__version__}</p>",
    ]
    if examination.about:
        about = ", ".join(f"{k}: {v}" for k, v in examination.about.items())
        parts.append(f"<p>{html.escape(about)}</p>")
    for finding in examination.failures:
        entries = "".join(
            f"<dt>{name}<dd>{_linked(text)}" for name, text in explained(finding, examination.roots(finding))
        )
        parts.append(f"<section><h2 class=FAIL>FAIL {finding.check}</h2><dl>{entries}</dl></section>")
    parts.append(
        "<div class=wide><table><tr><th>check<th><th>what was seen<th>measured<th>limit<th>margin<th>cost"
    )
    group = ""
    for f in examination.findings:
        if f.group != group:
            group = f.group
            parts.append(f"<tr><th colspan=7>{html.escape(group)}")
        parts.append(
            f"<tr><td>{f.check}<td class='{f.status.split()[0]}'>{f.status}<td>{html.escape(f.message)}"
            f"<td class=n>{number(f.measured, f.unit)}<td class=n>{number(f.threshold)}<td class=n>{margin(f)}"
            f"<td class=n>{f.seconds:.2f} s"
        )
    parts.append("</table></div><p>NOT RUN says nothing, neither good nor bad.</p></html>")
    return "\n".join(parts) + "\n"


def _linked(text: str) -> str:
    safe = html.escape(text)
    return f"<a href='{safe}'>{safe}</a>" if text.startswith("https://") else safe


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
