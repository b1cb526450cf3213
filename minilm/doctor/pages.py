"""`minilm doctor --pages docs/checks`: a page for each check, from its docstring and its planted bugs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from minilm.doctor.catalogue import bugs
from minilm.doctor.core import Check
from minilm.doctor.subject import NEEDS


def write_pages(chosen: Sequence[Check], folder: Path) -> None:
    """One page per check and an index; pages of checks that no longer exist are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {f"{check.name}.md": page(check) for check in chosen} | {"README.md": index(chosen)}
    for old in folder.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


def page(check: Check) -> str:
    """The Markdown page of one check."""
    needs = ", ".join(dict.fromkeys(NEEDS.get(need.split(".")[0], need) for need in check.needs))
    parts = [
        f"# {check.name}",
        "",
        "Made from the check's own text by `minilm doctor --pages docs/checks`; do not edit.",
        "",
        _sentence(check),
        "",
        f"Group: {check.group}. Needs: {needs}. Cost: {check.cost}. Quick suite: {'yes' if check.quick else 'no'}.",
        "",
        *check.text.splitlines(),
        "",
        "## Planted to prove it",
        "",
        "| bug | what one sees | planted as | met by |",
        "| --- | --- | --- | --- |",
    ]
    for plant in check.plants:
        known = bugs().get(plant.bug)
        cells = (
            f"`{plant.bug}`",
            known.symptom if known else "",
            plant.what or _sentence_of(plant.make) or "",
            (f"[source]({known.urls[0]})" if known.urls else known.source) if known else "",
        )
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if check.look_alikes:
        parts += ["", "## Looks odd, is right: must stay silent", ""]
        parts += [f"- {healthy.what}" for healthy in check.look_alikes]
    return "\n".join(parts).rstrip() + "\n"


def index(chosen: Sequence[Check]) -> str:
    """The list of all checks."""
    parts = [
        "# The checks",
        "",
        "Made by `minilm doctor --pages docs/checks`; do not edit. How to use them: [the doctor](../doctor.md).",
    ]
    group = ""
    for check in chosen:
        if check.group != group:
            group = check.group
            parts += [
                "",
                f"## {group}",
                "",
                "| check | what it holds | quick | bugs planted |",
                "| --- | --- | --- | --- |",
            ]
        quick = "yes" if check.quick else ""
        count = len({plant.bug for plant in check.plants})
        parts.append(f"| [{check.name}]({check.name}.md) | {_sentence(check)} | {quick} | {count} |")
    return "\n".join(parts) + "\n"


def _sentence(check: Check) -> str:
    return _sentence_of(check.function) or check.text.splitlines()[0]


def _sentence_of(function: object) -> str:
    text = inspect.getdoc(function) or ""
    return text.splitlines()[0] if text else ""
