"""The facts corpus, judged from its files alone: what is known from where, and that no split leaks into another."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from minilm.data.build import build
from minilm.data.facts import FactsSettings, generate
from minilm.data.facts.language import RELATIONS, num_words, words
from minilm.data.facts.world import make_world
from minilm.data.facts.write import SPLITS
from minilm.data.labels import KnowledgeSource
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError

SMALL = FactsSettings(
    entities=60, relations=4, values=16, mentions=2500, validation_mentions=150, questions=20, seed=3
)
DATABASES = ("entries.jsonl", "edited.jsonl", "without_answer.jsonl")


class Files:
    """The files of a facts folder, and the statements found in the texts by matching the forms of the relations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus, self.validation = self.read("corpus.jsonl"), self.read("validation.jsonl")
        self.questions, self.edits = self.read("questions.jsonl"), self.read("edits.jsonl")
        self.databases = {name: self.read(name) for name in DATABASES}
        name = r"(?P<s>[A-Z][a-z]+(?: [A-Z][a-z]{2})? [A-Z][a-z]{4})"
        forms = [
            (relation, re.escape(form).replace(r"\{s\}", name).replace(r"\{c\}", "(?:, who [^.]*?,)?"))
            for relation, all_forms in RELATIONS.items()
            for form in all_forms
        ]
        self._forms = [
            (relation, re.compile(form.replace(r"\{o\}", "(?P<o>[a-z]{5})") + r"(?=[ .,]|$)", re.I))
            for relation, form in forms
        ]

    def read(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def stated(self, records: list[dict[str, Any]]) -> Counter[tuple[str, str, str]]:
        """(subject, relation, value) of every statement that a text makes, as often as it does."""
        found: Counter[tuple[str, str, str]] = Counter()
        for record in records:
            for sentence in re.split(r"\. |: ", record["text"]):
                for relation, form in self._forms:
                    if match := form.search(sentence):
                        found[(match["s"], relation, match["o"])] += 1
        return found

    def of(self, split: str) -> list[dict[str, Any]]:
        return [q for q in self.questions if q["split"] == split]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("facts") / "small"
    generate(folder, SMALL)
    return Files(folder)


def fact(record: dict[str, Any]) -> tuple[str, str]:
    return record["subject"], record["relation"]


def test_no_fact_is_in_two_splits_and_every_split_has_questions(files: Files) -> None:
    facts = [fact(q) for q in files.questions]
    assert len(facts) == len(set(facts))
    counts = Counter(q["split"] for q in files.questions)
    assert set(counts) == set(SPLITS) and min(counts.values()) >= 4


def test_what_the_text_states_is_what_the_splits_say(files: Files) -> None:
    """The statements are found again in the text by the forms of the relations, without any help of the generator."""
    stated = files.stated(files.corpus)
    assert sum(stated.values()) == SMALL.mentions
    of_fact = {(s, r): value for s, r, value in stated}
    assert len(of_fact) == len(stated)  # one fact never has two values
    times = {(s, r): count for (s, r, _), count in stated.items()}
    subjects, relations = {s for s, _ in of_fact}, {r for _, r in of_fact}
    for question in files.questions:
        answer = question.get("was", question["answer"]).strip()
        if question["split"] == "database_only" or question["sort"] == "database_only":
            assert fact(question) not in of_fact and question["exposures"] == 0
            assert question["subject"] in subjects and question["relation"] in relations
        else:
            assert of_fact[fact(question)] == answer
            assert times[fact(question)] == question["exposures"] > 0
    everything = {(s, r) for s, r, _ in files.stated(files.validation)}
    assert everything <= set(of_fact)  # the validation text tells nothing new


def test_the_database_has_the_facts_that_it_should_have(files: Files) -> None:
    entries = files.databases["entries.jsonl"]
    rows = {fact(entry): (row, entry["object"]) for row, entry in enumerate(entries)}
    assert len(rows) == len(entries)
    stated = {(s, r): value for s, r, value in files.stated(files.corpus)}
    assert all(stated.get(key, value) == value for key, (_, value) in rows.items())
    for question in files.questions:
        if question["sort"] == "text_only":
            assert question["row"] == -1 and fact(question) not in rows
        else:
            assert rows[fact(question)] == (question["row"], question.get("was", question["answer"]).strip())
    total = SMALL.entities * SMALL.relations
    hidden = [key for key in rows if key not in stated]
    unlisted = [key for key in stated if key not in rows]
    assert (len(hidden), len(unlisted)) == (round(0.1 * total), round(0.1 * total))
    forms = [re.escape(e["object"]) for e in entries]
    assert len(set(forms)) <= SMALL.values
    assert not any(entry["text"] in record["text"] for entry in entries[:40] for record in files.corpus)


def test_an_edited_database_differs_in_the_asked_rows_alone(files: Files) -> None:
    entries, edited = files.databases["entries.jsonl"], files.databases["edited.jsonl"]
    changed = {row for row, pair in enumerate(zip(entries, edited, strict=True)) if pair[0] != pair[1]}
    asked = {q["row"]: q for q in files.of("counterfactual")}
    assert changed == set(asked) == {edit["row"] for edit in files.edits}
    for row, question in asked.items():
        old, new = entries[row], edited[row]
        assert fact(old) == fact(new) == fact(question)
        assert f" {old['object']}" == question["was"] != question["answer"] == f" {new['object']}"
        assert question["database"] == "edited.jsonl"
    assert {q["sort"] for q in asked.values()} == {"seen", "database_only"}
    assert {q["band"] for q in asked.values()} == {"head", "mid", "tail", ""}
    for edit in files.edits:
        assert {key: value for key, value in edit.items() if key != "row"} == edited[edit["row"]]


def test_a_database_without_the_answer_has_entries_about_strangers_there(files: Files) -> None:
    entries, without = files.databases["entries.jsonl"], files.databases["without_answer.jsonl"]
    changed = {row for row, pair in enumerate(zip(entries, without, strict=True)) if pair[0] != pair[1]}
    asked = files.of("without_answer")
    assert changed == {q["row"] for q in asked} and all(q["sort"] == "seen" for q in asked)
    removals = {record.pop("row"): record for record in files.read("removals.jsonl")}
    assert removals == {row: without[row] for row in changed}
    known = {s for s, _, _ in files.stated(files.corpus)} | {entry["subject"] for entry in entries}
    assert not known & {without[row]["subject"] for row in changed}
    assert not {fact(q) for q in asked} & {fact(entry) for entry in without}


@pytest.mark.parametrize("seed", range(3))
def test_every_entity_is_in_the_text_also_where_much_is_only_in_the_database(seed: int) -> None:
    settings = FactsSettings(entities=80, relations=2, database_only=0.4, text_only=0.0, seed=seed)
    world = make_world(settings)
    assert sum(fact.sort == "database_only" for fact in world.facts) == 64
    assert len({fact.subject for fact in world.stated}) == 80
    assert not set(world.others) & {fact.subject for fact in world.facts}


def test_labels_and_answers_stand_at_the_values_of_the_statements(files: Files) -> None:
    entries = files.databases["entries.jsonl"]
    for records in (files.corpus, files.validation):
        stated, labelled = files.stated(records), Counter[tuple[str, str, str]]()
        for record in records:
            for start, end, row in record["entries"]:
                entry = entries[row]
                assert record["text"][start:end] == entry["object"]
                labelled[(*fact(entry), entry["object"])] += 1
        in_database = {fact(entry) for entry in entries}
        assert labelled == {key: n for key, n in stated.items() if key[:2] in in_database}
    for record in files.validation:
        spans = [[start, end] for start, end, sort in record["answers"] if sort == "seen"]
        assert spans == [[start, end] for start, end, _ in record["entries"]]
    unlabelled = sum(sort == "text_only" for r in files.validation for _, _, sort in r["answers"])
    assert unlabelled > 0


def test_no_document_states_a_fact_twice_and_none_is_in_both_texts(files: Files) -> None:
    for record in (*files.corpus, *files.validation):
        assert max(files.stated([record]).values(), default=1) == 1
    assert not {r["text"] for r in files.corpus} & {r["text"] for r in files.validation}


def test_exposures_fall_as_zipf_and_the_bands_follow_them(files: Files) -> None:
    counts = sorted(files.stated(files.corpus).values(), reverse=True)
    spare = SMALL.mentions - len(counts)
    harmonic = sum(1 / rank for rank in range(1, len(counts) + 1))
    for rank, count in enumerate(counts, 1):
        assert abs(count - 1 - spare / harmonic / rank) <= 1
    bands = {
        band: [q["exposures"] for q in files.questions if q["band"] == band]
        for band in ("head", "mid", "tail")
    }
    for more, less in pairwise(bands.values()):
        assert min(more) >= max(less)


def test_a_third_of_the_text_is_filler_and_key_words_stand_at_varying_distance(files: Files) -> None:
    description = json.loads((files.folder / "facts.json").read_text())
    assert description["corpus"]["filler_share"] == pytest.approx(0.3, abs=0.01)
    distances = Counter(
        len(q["prompt"].split(q["subject"])[1].split()) for q in files.questions
    )  # words between the subject and the answer
    assert len(distances) >= 6 and max(distances) >= 8 and min(distances) <= 2
    for forms in RELATIONS.values():
        assert len(set(forms)) == 5
        assert all(form.index("{s}") < form.index("{o}") and form.endswith("{o}") for form in forms)


def test_with_context_each_fact_of_the_database_stands_behind_its_entry(files: Files) -> None:
    entries = {entry["text"] for entry in files.databases["entries.jsonl"]}
    plain, pasted = files.validation, files.read("validation_context.jsonl")
    for one, other in zip(plain, pasted, strict=True):
        parts, place = [], 0
        for start, end in other["pasted"]:
            assert other["text"][start:end].removesuffix(".") in entries
            parts.append(other["text"][place:start])
            place = end + 1
        assert "".join([*parts, other["text"][place:]]) == one["text"]
        assert len(other["pasted"]) == len(one["entries"])
        values = [other["text"][start:end] for start, end, _ in other["answers"]]
        assert values == [one["text"][start:end] for start, end, _ in one["answers"]]
    assert len(files.read("corpus_context.jsonl")) == len(files.corpus)


def test_the_same_settings_give_the_same_files(files: Files, tmp_path: Path) -> None:
    generate(tmp_path / "again", SMALL)
    for path in files.folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    other = FactsSettings(**{**SMALL.__dict__, "seed": 4})
    generate(tmp_path / "other", other)
    for name in ("corpus.jsonl", "entries.jsonl", "questions.jsonl"):
        assert (tmp_path / "other" / name).read_bytes() != (files.folder / name).read_bytes()


def test_a_folder_is_used_again_refused_or_replaced(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "facts"
    told = generate(folder, SMALL)
    dates = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert generate(folder, SMALL) == told
    assert dates == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    other = FactsSettings(**{**SMALL.__dict__, "seed": 4})
    with pytest.raises(DataError, match="made with other settings"):
        generate(folder, other)
    with (folder / "entries.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"altered or removed: entries\.jsonl"):
        generate(folder, SMALL)
    assert generate(folder, SMALL, force=True) == told
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for force in (False, True):
        with pytest.raises(DataError, match="holds no facts"):
            generate(tmp_path / "mine", SMALL, force=force)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_settings_that_do_not_fit_are_told_at_once(tmp_path: Path) -> None:
    wrong = FactsSettings(
        entities=2, relations=9, values=1, mentions=5, filler=1.0, questions=0, database_only=0.1
    )
    with pytest.raises(ConfigError) as caught:
        generate(tmp_path / "x", wrong)
    for name in ("entities", "relations", "values", "filler", "mentions", "questions"):
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match=r"together at most 0\.5"):
        generate(tmp_path / "x", FactsSettings(database_only=0.4, text_only=0.2))
    with pytest.raises(ValueError, match="too many"):
        words("middle", num_words("middle"), __import__("random").Random(0))


def test_answers_are_one_to_three_tokens_of_a_tokenizer_trained_on_the_text(
    files: Files, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.train([r["text"] for r in files.corpus], 800)
    sizes = Counter(len(tokenizer.encode(q["answer"])) for q in files.questions)
    assert set(sizes) <= {1, 2, 3} and sizes[1] > 0.8 * len(files.questions)
    names = Counter(len(tokenizer.encode(f" {q['subject']}")) for q in files.questions)
    assert names[2] + names[3] > 0.8 * len(files.questions)
    for question in files.questions:
        prompt = tokenizer.encode(question["prompt"])
        assert tokenizer.encode(question["prompt"] + question["answer"])[: len(prompt)] == prompt
    store = build(
        tmp_path / "store",
        [str(files.folder / "corpus.jsonl")],
        tokenizer,
        validation_sources=[str(files.folder / "validation.jsonl")],
        entries_of=files.folder / "entries.jsonl",
    ).store
    assert store.entries_of == KnowledgeSource.read(files.folder / "entries.jsonl").sha256
    labelled = store.manifest["splits"]["train"]["sources"]["corpus"]["labelled"]
    assert labelled >= sum(len(r["entries"]) for r in files.corpus)
