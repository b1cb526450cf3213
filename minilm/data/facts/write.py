"""The files of the facts experiment.

    corpus.jsonl               documents of several sentences; `entries` labels the answers that the database has
    validation.jsonl           as many ways of saying the same facts, other sentences; the same frequencies
    corpus_context.jsonl, validation_context.jsonl
                               the same documents, each fact of the database behind its entry (retrieval by hand)
    entries.jsonl              the database: subject, relation, object, and a text of another form than the statements
    edited.jsonl               the same with other objects in some rows
    without_answer.jsonl       the same with entries about unknown people in the rows that some questions need
    edits.jsonl, removals.jsonl
                               the rows in which these two differ, as `minilm knowledge edit --edits` reads them
    questions.jsonl            prompt, answer, split, row of the fact in entries.jsonl (-1: it is not there), and with
                               which database to ask
    facts.json                 settings, counts, and a checksum of each file

Validation documents also say where their answers are and of which sort (`answers`: [start, end, sort]), and with
context where the pasted text is (`pasted`: [start, end]), so that losses can be told apart.

Splits of the questions, no fact in two of them:

    head, mid, tail   seen in the text (often, seldom, a few times) and in the database
    database_only     never in the text
    text_only         not in the database
    counterfactual    of all four kinds of fact that the database has; asked with edited.jsonl, whose answer is another
    without_answer    seen in the text; asked with without_answer.jsonl, which should cost nothing
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minilm.data.facts.language import HEADINGS, Sentence, entry_text, filler, statement
from minilm.data.facts.world import BANDS, Fact, FactsSettings, World, make_world
from minilm.errors import DataError

DESCRIPTION = "facts.json"
FORMAT, VERSION = "minilm facts", 1
SPLITS = (*BANDS, "database_only", "text_only", "counterfactual", "without_answer")
_SENTENCES = (3, 6)  # of a document

Told = tuple[Sentence, Fact | None]
Record = dict[str, Any]


def generate(out: str | Path, settings: FactsSettings, *, force: bool = False) -> dict[str, Any]:
    """Write the files; the content of facts.json. The same settings give the same files, byte for byte.

    A folder that has them already, of the same settings, is left as it is; another one is only replaced with `force`,
    and one that is something else never. Raises ConfigError, DataError.
    """
    out = Path(out).expanduser()
    settings.check()
    if (existing := _existing(out, settings, force)) is not None:
        return existing
    world = make_world(settings)
    asked = _assign(world, settings)
    building = out.with_name(out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        counts = _write_texts(building, world, settings)
        edits = _edits(world, [fact for fact, split in asked if split == "counterfactual"], settings)
        removed = [fact for fact, split in asked if split == "without_answer"]
        _write_databases(building, world, edits, removed, settings)
        counts["questions"] = _write_questions(building, asked, edits, settings)
        files = {path.name: _checksum(path) for path in sorted(building.iterdir())}
        described = {
            "format": FORMAT,
            "version": VERSION,
            "settings": dataclasses.asdict(settings),
            "facts": _fact_counts(world),
            "chance": 1 / settings.values,
            **counts,
            "files": files,
        }
        (building / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")
        if out.exists():
            shutil.rmtree(out)
        building.rename(out)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise DataError(f"The facts {out} cannot be written: {error.strerror or error}.") from error
    return described


def _existing(out: Path, settings: FactsSettings, force: bool) -> dict[str, Any] | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        described = json.loads((out / DESCRIPTION).read_bytes())
        ours = described["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{out} exists and holds no facts: choose another name, or remove it yourself."
        ) from error
    if not ours:
        raise DataError(f"{out} exists and holds no facts: choose another name, or remove it yourself.")
    if described["version"] == VERSION and described["settings"] == dataclasses.asdict(settings):
        altered = [name for name, sum_ in described["files"].items() if not _is(out / name, sum_)]
        if not altered:
            return dict(described)
        problem = f"these files were altered or removed: {', '.join(altered)}"
    else:
        problem = "it was made with other settings"
    if force:
        return None
    raise DataError(
        f"The facts {out} exist, and {problem}. `--force` makes them again; or choose another name."
    )


# --- texts


def _write_texts(folder: Path, world: World, settings: FactsSettings) -> dict[str, Any]:
    counts = {}
    training = [fact for fact in world.stated for _ in range(fact.exposures)]
    draw = random.Random(f"validation {settings.seed}")
    often = [fact.exposures for fact in world.stated]
    held_out = draw.choices(world.stated, often, k=settings.validation_mentions)
    seen: set[str] = set()
    for name, mentions in (("corpus", training), ("validation", held_out)):
        documents = list(_documents(mentions, settings, random.Random(f"{name} {settings.seed}")))
        texts = [_document(document, context=False) for document in documents]
        repeated = {number for number, record in enumerate(texts) if record["text"] in seen}
        seen.update(record["text"] for record in texts)
        kept = [number for number in range(len(texts)) if number not in repeated]
        pasted = (_document(documents[number], context=True) for number in kept)
        validation = name == "validation"
        _write(folder / f"{name}.jsonl", (_as_record(texts[n], validation) for n in kept))
        _write(folder / f"{name}_context.jsonl", (_as_record(r, validation, context=True) for r in pasted))
        total = sum(len(sentence.text.split()) for n in kept for sentence, _ in documents[n])
        of_filler = sum(
            len(sentence.text.split()) for n in kept for sentence, fact in documents[n] if fact is None
        )
        counts[name] = {"documents": len(kept), "words": total, "filler_share": round(of_filler / total, 4)}
    return counts


def _documents(mentions: list[Fact], settings: FactsSettings, draw: random.Random) -> Iterator[list[Told]]:
    """Statements of these facts and filler, mixed; no fact twice in a document, where it could be copied."""
    told: list[Told] = [(statement(f.subject, f.relation, f.value, draw), f) for f in mentions]
    words = sum(len(sentence.text.split()) for sentence, _ in told)
    wanted = words * settings.filler / (1 - settings.filler)
    while wanted > 0:
        sentence = filler(draw)
        told.append((sentence, None))
        wanted -= len(sentence.text.split())
    draw.shuffle(told)
    waiting: list[Told] = []  # statements whose fact was in the document already
    place = 0
    while place < len(told) or waiting:
        document: list[Told] = []
        facts: set[tuple[str, str]] = set()
        size = draw.randint(*_SENTENCES)
        held, waiting = waiting, []
        while len(document) < size and (held or place < len(told)):
            if held:
                item = held.pop()
            else:
                item, place = told[place], place + 1
            fact = item[1]
            if fact is not None and fact.key in facts:
                waiting.append(item)
                continue
            document.append(item)
            if fact is not None:
                facts.add(fact.key)
        waiting += held
        yield document


def _document(told: list[Told], *, context: bool) -> Record:
    """The text of a document with all that is known about it."""
    heading = HEADINGS[sum(len(sentence.text) for sentence, _ in told) % len(HEADINGS)]
    text, entries, answers, pasted = heading, [], [], [[0, 0]]
    for sentence, fact in told:
        text += " "
        if context and fact is not None and fact.row >= 0:
            entry = f"{entry_text(fact.subject, fact.relation, fact.value)}. "
            pasted.append([len(text), len(text) + len(entry) - 1])
            text += entry
        if fact is not None and sentence.answer is not None:
            start, end = (len(text) + place for place in sentence.answer)
            answers.append([start, end, fact.sort])
            if fact.row >= 0:
                entries.append([start, end, fact.row])
        text += sentence.text
    return {"text": text, "entries": entries, "answers": answers, "pasted": pasted[1:]}


def _as_record(record: Record, validation: bool, context: bool = False) -> Record:
    kept = {"text": record["text"]}
    if not context:
        kept["entries"] = record["entries"]
    if validation:
        kept["answers"] = record["answers"]
        if context:
            kept["pasted"] = record["pasted"]
    return kept


# --- databases


def _write_databases(
    folder: Path, world: World, edits: dict[Fact, str], removed: list[Fact], settings: FactsSettings
) -> None:
    draw = random.Random(f"strangers {settings.seed}")
    database = world.database
    gone = {fact.row for fact in removed}
    strangers = {
        fact.row: _entry(draw.choice(world.others), fact.relation, draw.choice(world.values))
        for fact in database
        if fact.row in gone
    }
    _write(folder / "entries.jsonl", (_entry(f.subject, f.relation, f.value) for f in database))
    _write(
        folder / "edited.jsonl",
        (_entry(f.subject, f.relation, edits.get(f, f.value)) for f in database),
    )
    _write(
        folder / "without_answer.jsonl",
        (strangers.get(f.row) or _entry(f.subject, f.relation, f.value) for f in database),
    )
    _write(
        folder / "edits.jsonl",
        ({"row": fact.row, **_entry(fact.subject, fact.relation, value)} for fact, value in edits.items()),
    )
    _write(folder / "removals.jsonl", ({"row": row, **entry} for row, entry in strangers.items()))


def _edits(world: World, facts: list[Fact], settings: FactsSettings) -> dict[Fact, str]:
    draw = random.Random(f"edits {settings.seed}")
    return {fact: draw.choice([v for v in world.values if v != fact.value]) for fact in facts}


def _entry(subject: str, relation: str, value: str) -> Record:
    return {
        "subject": subject,
        "relation": relation,
        "object": value,
        "text": entry_text(subject, relation, value),
    }


# --- questions


def _assign(world: World, settings: FactsSettings) -> list[tuple[Fact, str]]:
    """Facts and the split that each is asked in. Half of a kind at most goes to its own split."""
    draw = random.Random(f"questions {settings.seed}")
    kinds: dict[str, list[Fact]] = {kind: [] for kind in (*BANDS, "database_only", "text_only")}
    for fact in world.facts:
        kinds[fact.band if fact.sort == "seen" else fact.sort].append(fact)
    asked = []
    for kind, facts in kinds.items():
        draw.shuffle(facts)
        own = min(settings.questions, len(facts) if kind == "text_only" else (len(facts) + 1) // 2)
        asked += [(fact, kind) for fact in facts[:own]]
        left = facts[own:]
        if kind == "text_only":
            continue
        changed = min(max(1, settings.questions // 4), (len(left) + 1) // 2)
        asked += [(fact, "counterfactual") for fact in left[:changed]]
        if kind != "database_only":
            asked += [(fact, "without_answer") for fact in left[changed:][: max(1, settings.questions // 3)]]
    return asked


def _write_questions(
    folder: Path, asked: list[tuple[Fact, str]], edits: dict[Fact, str], settings: FactsSettings
) -> dict[str, int]:
    draw = random.Random(f"prompts {settings.seed}")
    ask_with: Callable[[str], str] = {
        "counterfactual": "edited.jsonl",
        "without_answer": "without_answer.jsonl",
    }.get  # type: ignore[assignment]
    records = []
    for fact, split in sorted(asked, key=lambda item: (SPLITS.index(item[1]), item[0].key)):
        sentence = statement(fact.subject, fact.relation, fact.value, draw)
        answer = edits.get(fact, fact.value) if split == "counterfactual" else fact.value
        records.append(
            {
                "split": split,
                "prompt": f"{draw.choice(HEADINGS)} {sentence.prompt}",
                "answer": f" {answer}",
                "row": fact.row,
                "database": ask_with(split) or "entries.jsonl",
                "subject": fact.subject,
                "relation": fact.relation,
                "sort": fact.sort,
                "band": fact.band,
                "exposures": fact.exposures,
                **({"was": f" {fact.value}"} if split == "counterfactual" else {}),
            }
        )
    _write(folder / "questions.jsonl", records)
    return {split: sum(record["split"] == split for record in records) for split in SPLITS}


def _fact_counts(world: World) -> dict[str, int]:
    counts: dict[str, int] = {"entries": len(world.database)}
    for fact in world.facts:
        kind = f"seen_{fact.band}" if fact.sort == "seen" else fact.sort
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _write(path: Path, records: Iterable[Record]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is(path: Path, checksum: str) -> bool:
    return path.is_file() and _checksum(path) == checksum
