"""Records: written from the files of a run, verified against them.

A record holds what people think (goal, hypothesis, expected result, conclusion) and what the program found. The second
is a function of the run's files: writing it again gives the same lines, so a figure that was changed is found.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minilm import manifest
from minilm.errors import CheckpointError, ConfigError, DataError, MinilmError, listed
from minilm.experiments import facts, picture, results
from minilm.experiments.differing import Problem, differing
from minilm.experiments.document import FORMAT, Document, parse
from minilm.experiments.facts import Subject
from minilm.experiments.runfiles import NO_END, SOURCES, RunFiles
from minilm.experiments.words import LANGUAGES, words

PARTS: dict[str, tuple[str, Callable[[Subject], list[str]]]] = {  # name in the marks: heading, what writes it
    "sources": ("Sources", facts.sources),
    "settings": ("Settings", facts.settings),
    "code": ("Code", facts.code),
    "environment": ("Environment", facts.environment),
    "command": ("Command", facts.command),
    "timeline": ("Timeline", facts.timeline),
    "metrics": ("Metrics", results.metrics),
    "curve": ("Curve", results.curve),
    "memory": ("Memory", results.memory),
    "step_time": ("Time of a step", results.step_time),
    "samples": ("Samples", results.samples),
    "evaluation": ("Evaluation", results.evaluation),
    "agreement": ("Agreement", results.agreement),
    "doctor": ("Doctor", facts.doctor),
    "comparison": ("Comparison", results.comparison),
}
_PEOPLE = {
    "Goal": "What is this experiment for? What will be decided by it?",
    "Hypothesis": "What do you think is true, and why?",
    "Expected result": "Which number, how large, before the run is started? What would refute the hypothesis?",
}
_CONCLUSION = "What came out, as expected or not? What is decided, what is left open?"
_NOTE = "Set by the program from the run's files; `minilm record --verify` computes it again."


def template(language: str) -> str:
    """An empty record: headings and questions for people, marks for the program."""
    say = words(language)
    lines = [f"# {say('EXPERIMENT_X_Y_Z: what is tried')}", ""]
    for heading, question in _PEOPLE.items():
        lines += [f"## {say(heading)}", "", say(question), ""]
    for name, (heading, _) in PARTS.items():
        note = ["", say(_NOTE)] if name == "sources" else []
        marks = [f"<!-- minilm:begin {name} -->", f"<!-- minilm:end {name} -->"]
        lines += [f"## {say(heading)}", *note, "", *marks, ""]
    return "\n".join([*lines, f"## {say('Conclusion')}", "", say(_CONCLUSION), ""])


def write(
    run: Path,
    out: Path,
    *,
    baseline: Path | None = None,
    others: Sequence[Path] = (),
    language: str | None = None,
    force: bool = False,
) -> list[str]:
    """Write or refresh the program's parts of the record `out`; returns what was overwritten with `force`.

    What is not given is as it was in the record. A new record begins as TEMPLATE.md (TEMPLATE.zh.md) of its folder, or
    the built-in one. Raises ConfigError where a part was changed by hand (nothing is written then), CheckpointError
    where a run cannot be read, DataError where the marks of the record are damaged.
    """
    document = _begun(out, language)
    before = document.about or {}
    language = language or before.get("lang") or "en"
    if language not in LANGUAGES:
        raise ConfigError(f"{out}: its language is {language!r}; it must be one of {', '.join(LANGUAGES)}.")
    by_hand = [part for part in document.parts.values() if part.by_hand]
    named = [f"{out}:{part.first}: the part {part.name} was changed by hand." for part in by_hand]
    if named and not force:
        raise ConfigError(
            listed(named)
            + "\nNothing was written. What people think belongs outside the marks: move it there, or "
            "let it be overwritten with --force (a copy is kept as .bak)."
        )
    folder = out.resolve().parent
    if baseline is None and before.get("baseline"):
        baseline = Path(os.path.normpath(folder / before["baseline"]))
    others = others or [Path(os.path.normpath(folder / place)) for place in before.get("others") or []]
    told: dict[str, Any] = {
        "format": FORMAT,
        "lang": language,
        "run": _relative(run, folder),
        "baseline": _relative(baseline, folder) if baseline else None,
        "others": [_relative(other, folder) for other in others],
    }
    subject = _subject(told, folder)
    if subject.run.state == NO_END:
        told["seen"] = manifest.state_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    if subject.run.of("train"):
        told["picture"] = f"{out.name.removesuffix('.md').removesuffix('.zh')}.png"
        picture.draw(_drawn(subject), folder / told["picture"])
    subject = _subject(told, folder)
    if by_hand and out.is_file():
        shutil.copyfile(out, out.with_name(f"{out.name}.bak"))
    text = document.text(told, {name: _made(name, subject) for name in PARTS})
    manifest.write_atomically(out, text.encode("utf-8", errors="backslashreplace"))
    return named


def keep(run: Path, folder: Path) -> Path:
    """Copy the small files of a run, not its weights, into `folder`/NAME; returns the copy.

    Raises ConfigError where another run is kept under that name, or where `run` itself is meant to be replaced.
    """
    files = RunFiles.read(run)
    parent = run.resolve().parent.name
    copy = folder / (f"{parent}-{run.resolve().name}" if parent not in ("runs", "") else run.resolve().name)
    if copy.resolve() == run.resolve():
        return copy
    if copy.is_dir() and (copy / manifest.FILE).is_file():
        there = manifest.Manifest.read(copy).record
        if there.get("started") != files.manifest.get("started"):
            raise ConfigError(
                f"{copy} holds another run (started {there.get('started')}). Remove it, or rename yours."
            )
    copy.mkdir(parents=True, exist_ok=True)
    git = (files.manifest.get("code") or {}).get("git") or {}
    for name in (*SOURCES, str(git.get("diff") or "")):
        if name and (run / name).is_file():
            manifest.write_atomically(copy / name, (run / name).read_bytes())
    return copy


def verify(places: Sequence[Path]) -> tuple[list[Path], list[Problem]]:
    """(records looked at, everything in them that the run files do not say). Folders are searched for records.

    Raises ConfigError where there is no record.
    """
    files: list[Path] = []
    for place in places:
        if not place.exists():
            raise ConfigError(f"There is no {place} to verify.")
        files += sorted(place.rglob("*.md")) if place.is_dir() else [place]
    looked_at, problems = [], []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(str(path), 1, f"cannot be read: {error}"))
            continue
        if path in places or ("<!-- minilm:" in text and not path.name.startswith("TEMPLATE")):
            looked_at.append(path)
            problems += verify_text(path, text)
    if not looked_at:
        raise ConfigError(f"There is no record in {', '.join(map(str, places))}: nothing was verified.")
    return looked_at, problems


def verify_text(path: Path, text: str) -> Iterator[Problem]:
    """Everything in one record that its run's files do not say."""
    name = str(path)
    try:
        document = parse(text, name)
    except DataError as error:
        yield Problem(name, 1, str(error))
        return
    about = document.about
    if about is None and document.parts and not any(p.written or p.by_hand for p in document.parts.values()):
        return  # a plan: written by people before the start, its parts are still empty
    if about is None:
        yield Problem(
            name, 1, "has no mark `minilm:record` that names its run: write it with minilm record RUN"
        )
        return
    if about.get("format") != FORMAT or about.get("lang") not in LANGUAGES:
        yield Problem(name, 1, "was written in another format: write it again with minilm record RUN")
        return
    try:
        subject = _subject(about, path.resolve().parent)
    except (MinilmError, TypeError) as error:  # TypeError: a first line that was changed by hand
        yield Problem(name, 1, str(error))
        return
    parts = document.parts
    yield from _picture_problems(name, parts["curve"].first if "curve" in parts else 1, subject)
    for part in PARTS:
        if part not in parts:
            yield Problem(name, 1, f"the part {part} is missing: write it again with minilm record RUN")
            continue
        try:
            yield from differing(name, part, parts[part].lines, _made(part, subject), parts[part].first)
        except CheckpointError as error:
            yield Problem(name, parts[part].first, str(error))
    for part in parts.keys() - PARTS.keys():
        yield Problem(name, parts[part].first, f"there is no part {part} of the program")


def _made(part: str, subject: Subject) -> list[str]:
    """The lines of a part. Raises CheckpointError where a file of the run lacks what it needs."""
    try:
        return PARTS[part][1](subject)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{part}: the files of {subject.run.folder} are not as this version writes them "
            f"({type(error).__name__}: {error}). Evaluate it again, or restore them."
        ) from error


def _begun(out: Path, language: str | None) -> Document:
    """The record as it is, or a new one from the template."""
    if out.is_file():
        return parse(out.read_text(encoding="utf-8"), str(out))
    language = language or "en"
    own = out.parent / ("TEMPLATE.md" if language == "en" else f"TEMPLATE.{language}.md")
    text = own.read_text(encoding="utf-8") if own.is_file() else template(language)
    title = out.name.removesuffix(".md").removesuffix(".zh")
    return parse(text.replace("EXPERIMENT_X_Y_Z", title, 1), str(own))


def _subject(about: dict[str, Any], folder: Path) -> Subject:
    """What a record's first line names, read. Raises CheckpointError for a run that is missing or damaged."""
    base = about.get("baseline")
    name = about.get("picture")
    told: dict[str, str] = {}

    def read(place: str) -> RunFiles:
        return RunFiles.read(os.path.normpath(folder / place))

    run, baseline = read(about["run"]), read(base) if base else None
    others = tuple(read(other) for other in about.get("others") or ())
    if name and (folder / name).is_file():
        told = {"file": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
    elif name:
        told = {"file": name, "sha256": "-"}
    found = Subject(run, words(about["lang"]), baseline, others, about.get("seen"), told)
    if told:
        told["data"] = picture.points_hash(_drawn(found))
    return found


def _drawn(subject: Subject) -> list[RunFiles]:
    base = [subject.baseline] if subject.baseline is not None else []
    return [*base, subject.run, *subject.others]


def _picture_problems(name: str, line: int, subject: Subject) -> Iterator[Problem]:
    """Was the picture drawn from these points? Its own hash is compared with the one in the record elsewhere."""
    if not subject.picture:
        if subject.run.of("train"):
            yield Problem(name, line, "curve: the record names no picture")
        return
    path = Path(name).resolve().parent / subject.picture["file"]
    try:
        told = picture.told_points(path)
    except CheckpointError as error:
        yield Problem(name, line, f"curve: {error}")
        return
    if told != subject.picture["data"]:
        stated = f"points {told}" if told else "no points"
        yield Problem(name, line, f"curve: {subject.picture['file']}", stated, subject.picture["data"])


def _relative(place: Path, folder: Path) -> str:
    if not place.is_dir():
        raise CheckpointError(f"There is no run folder {place}.")
    return Path(os.path.relpath(place.resolve(), folder)).as_posix()
