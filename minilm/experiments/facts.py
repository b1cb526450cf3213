"""Parts of a record that say what ran: sources, settings, code, environment, command, timeline, doctor.

Each part is a function of the run's files alone, so that it can be computed again: (Subject) -> lines of Markdown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from minilm import manifest
from minilm.experiments.markdown import block, cell, number, table
from minilm.experiments.runfiles import NO_END, SOURCES, RunFiles, utc
from minilm.experiments.words import Words

OF_THE_PLACE = ("run.", "track.")  # where and how a run is written down: no part of the experiment
_QUIET_EVENTS = ("saved ", "resumed ")
_SHOWN_LINES = 40


@dataclass(frozen=True)
class Subject:
    """What a record is about: a run, what it is held against, and in which language.

    baseline  None where the run is the baseline itself
    others    further runs for the comparison
    seen      how a run without an end stood when the record was written: running or died
    picture   what the curve's file says of itself
    """

    run: RunFiles
    say: Words
    baseline: RunFiles | None = None
    others: tuple[RunFiles, ...] = ()
    seen: str | None = None
    picture: dict[str, str] = field(default_factory=dict)


def sources(subject: Subject) -> list[str]:
    """The files that every figure comes from."""
    say, run = subject.say, subject.run
    rows = [(name, run.digests.get(name) or say("not there")) for name in SOURCES]
    return table([say("file of the run"), "sha256"], rows)


def settings(subject: Subject) -> list[str]:
    """What differs from the baseline, and everything that was not left at its default."""
    say, run, lines = subject.say, subject.run, []
    mine = run.settings
    if subject.baseline is not None:
        other = subject.baseline.settings
        rows = [
            (name, _shown(mine, name), _shown(other, name))
            for name in sorted(mine.keys() | other.keys())
            if not name.startswith(OF_THE_PLACE) and _shown(mine, name) != _shown(other, name)
        ]
        lines += [say("Differs from the baseline `{name}`:", name=subject.baseline.name), ""]
        head = [say("setting"), say("this run"), say("baseline")]
        lines += [*(table(head, rows) if rows else [say("Nothing.")]), ""]
    origins = run.manifest.get("origins") or {}
    given = [name for name in mine if origins.get(name, "default") != "default"]
    lines += [say("Given, out of {count} settings; the others have their defaults:", count=len(mine)), ""]
    head = [say("setting"), say("value"), say("where")]
    return lines + table(head, [(name, _shown(mine, name), str(origins[name])) for name in given])


def code(subject: Subject) -> list[str]:
    """Commit and uncommitted changes, and whether the baseline ran the same source."""
    say, found = subject.say, subject.run.manifest.get("code") or {}
    git = found.get("git") or {}
    rows = [
        (say("commit"), git.get("commit") or say("unknown: {why}", why=git.get("why", "-"))),
        (say("source sha256"), found.get("source_sha256", "-")),
        (say("uncommitted changes"), say("yes") if git.get("dirty") else say("no")),
    ]
    if subject.baseline is not None:
        other = (subject.baseline.manifest.get("code") or {}).get("source_sha256")
        same = other == found.get("source_sha256")
        rows.append((say("baseline's source"), say("the same") if same else say("another: {sha}", sha=other)))
    lines = table([say("code"), ""], rows)
    if git.get("untracked"):
        names = ", ".join(f"`{cell(name)}`" for name in git["untracked"][:_SHOWN_LINES])
        lines += [
            "",
            say("Files that git does not know ({count}):", count=git["num_untracked"]) + f" {names}",
        ]
    return lines + _diff(subject, git)


def _diff(subject: Subject, git: dict[str, Any]) -> list[str]:
    say, name = subject.say, git.get("diff")
    if not name:
        return []
    path = subject.run.folder / str(name)
    if not path.is_file():
        return ["", say("The changes are not kept with the run (`{name}`).", name=name)]
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != git.get("diff_sha256"):
        return ["", say("`{name}` is not the file that the manifest names: it was changed.", name=name)]
    rows = list(diff_summary(content.decode("utf-8", errors="replace")))
    head = [say("changed file"), say("lines added"), say("lines removed")]
    return ["", *table(head, [(file, str(plus), str(minus)) for file, plus, minus in rows])]


def diff_summary(text: str) -> Iterator[tuple[str, int, int]]:
    """(file, lines added, lines removed) of each file of a git diff."""
    for part in re.split(r"^diff --git ", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n@@")
        name = head.split("\n")[0].rpartition(" b/")[2]
        lines = body.split("\n")
        yield name, sum(x.startswith("+") for x in lines), sum(x.startswith("-") for x in lines)


def environment(subject: Subject) -> list[str]:
    """Machine, versions, variables."""
    say, record = subject.say, subject.run.manifest
    machine, layout = record.get("machine") or {}, record.get("layout") or {}
    rows = [
        ("Python", str(machine.get("python"))),
        (say("system"), str(machine.get("system"))),
        (say("processor"), f"{machine.get('cpu')}, {machine.get('cpu_cores')} {say('cores')}"),
        (say("memory, GB"), number((machine.get("memory_bytes") or 0) / 1e9, 1)),
        (say("GPUs"), ", ".join(gpu["name"] for gpu in machine.get("gpus") or []) or say("none")),
        ("CUDA", f"{machine.get('cuda') or '-'}, driver {machine.get('nvidia_driver') or '-'}"),
        (say("layout"), ", ".join(f"{name} {value}" for name, value in layout.items())),
    ]
    packages = record.get("packages") or {}
    rows += [(name, version) for name, version in packages.items() if version]
    rows += list((machine.get("environment") or {}).items())
    data, tokenizer = record.get("data") or {}, record.get("tokenizer") or {}
    rows.append((say("data"), f"{data.get('store')}, {data.get('fingerprint')}"))
    rows.append((say("tokenizer"), str(tokenizer.get("fingerprint"))))
    rows.append((say("parameters"), number((record.get("model") or {}).get("num_parameters"))))
    return table([say("environment"), ""], rows)


def command(subject: Subject) -> list[str]:
    """The command line of the start, and of each resume that had another one."""
    record = subject.run.manifest
    lines = block(str(record.get("command", "-")))
    for again in record.get("resumes") or []:
        if again.get("command") != record.get("command"):
            lines += ["", subject.say("Resumed at step {step} with:", step=again["at_step"]), ""]
            lines += block(str(again.get("command")))
    return lines


def timeline(subject: Subject) -> list[str]:
    """Start, resumes, everything that was said on the way, end and why."""
    say, run, record = subject.say, subject.run, subject.run.manifest
    rows = [(utc(record.get("started")), "0", say("started"))]
    for again in record.get("resumes") or []:
        before = again.get("before") or {}
        text = say(
            "resumed; before: {state}", state=_told(say, str(before.get("state")), before.get("error"))
        )
        if again.get("changed"):
            text += "; " + say("changed: {what}", what=", ".join(_changed(again["changed"])))
        rows.append((utc(again.get("started")), str(again.get("at_step")), text))
    said = (event for event in run.of("event") if "state" not in event and "vocab_size" not in event)
    events = [event for event in said if not str(event.get("text")).startswith(_QUIET_EVENTS)]
    rows += [(utc(e["unix_seconds"]), str(e["step"]), str(e["text"])) for e in events[:_SHOWN_LINES]]
    rows.sort(key=lambda row: row[0])
    if run.state == NO_END:
        when = max((r["unix_seconds"] for r in run.metrics), default=None)
        text = say(
            "last line of the log; when this was written the run was: {state}", state=say(subject.seen or "-")
        )
        rows.append((utc(when), str(run.step), text))
    else:
        rows.append(
            (utc(record.get("ended")), str(record.get("step")), _told(say, run.state, record.get("error")))
        )
    lines = table([say("time"), say("step"), say("what")], rows)
    if len(events) > _SHOWN_LINES:
        lines += ["", say("{count} further events are in metrics.jsonl.", count=len(events) - _SHOWN_LINES)]
    return lines


def doctor(subject: Subject) -> list[str]:
    """What the checks before the first step said, and the watch during the run."""
    say, run = subject.say, subject.run
    checks = run.manifest.get("checks")
    if not checks:
        return [say("not run")]
    if checks.get("suite") == "off":
        return [f"**{manifest.UNCHECKED}**"]
    counts, findings = checks.get("counts") or {}, checks.get("findings") or {}
    rows = [(say("suite"), str(checks.get("suite")))]
    rows += [(status, number(counts.get(status))) for status in ("PASS", "FAIL", "NOT RUN")]
    looks = run.of("doctor")
    rows.append((say("looks of the watch during the run"), number(len(looks))))
    rows.append(
        (
            say("failures that the watch found"),
            number(max((int(r.get("failures", 0)) for r in looks), default=0)),
        )
    )
    lines = table([say("doctor"), ""], rows)
    other = [(name, text) for name, text in findings.items() if not str(text).startswith("PASS")]
    return lines + (["", *table([say("check"), say("finding")], other)] if other else [])


def _told(say: Words, state: str, error: Any) -> str:
    return say(state) + (f": {error}" if error else "")


def _changed(changed: dict[str, Any]) -> Iterator[str]:
    for part, what in changed.items():
        names = what if isinstance(what, dict) else {}
        yield f"{part} ({', '.join(names)})" if names and "" not in names else part


def _shown(values: dict[str, Any], name: str) -> str:
    if name not in values:
        return "-"
    value = values[name]
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
