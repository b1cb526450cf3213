"""Questions about facts, against greedy generation; losses by kind of token, against a walk over single tokens."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minilm import cli
from minilm.cli import data as data_command
from minilm.cli import facts as facts_command
from minilm.data.facts import FactsSettings, generate
from minilm.data.tokenizer import Tokenizer
from minilm.errors import DataError
from minilm.evaluation import facts
from minilm.evaluation.facts import (
    Answer,
    Question,
    answer_all,
    entry_context,
    losses,
    read_questions,
    report,
    summary,
)
from minilm.evaluation.facts_table import BEGIN, END, cost_of_run
from minilm.evaluation.generate import generate as continued
from minilm.evaluation.score import documents
from minilm.models import build, preset

SMALL = FactsSettings(
    entities=40, relations=3, values=8, mentions=700, validation_mentions=60, questions=12, seed=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "small"
    generate(path, SMALL)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    return Tokenizer.train(texts, 300)  # so few that answers have several tokens


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> nn.Module:
    """Random, but for a head that makes it sure of something else at each place."""
    torch.manual_seed(0)
    made = build(preset("original", "tiny", vocab_size=tokenizer.num_tokens, max_length=512))
    with torch.no_grad():
        made.head_weight.mul_(30)
    return made


def run(*words: object) -> int:
    frame = cli.parser("test")
    subparsers = frame.add_subparsers(required=True)
    facts_command.add(subparsers)
    data_command.add(subparsers)
    arguments: argparse.Namespace = frame.parse_args([str(word) for word in words])
    return cli.guarded(lambda: arguments.run(arguments), debug=arguments.debug)


def greedy(model: nn.Module, tokenizer: Tokenizer, prompt: str, number: int) -> list[int]:
    [found] = continued(model, [tokenizer.prompt(prompt)], max_new_tokens=number, temperature=0)
    return found.tokens


def test_an_answer_is_right_exactly_where_greedy_decoding_gives_it(
    folder: Path, tokenizer: Tokenizer, model: nn.Module
) -> None:
    """Half of the questions are asked for what the model says, or for that with another last token."""
    questions = read_questions(folder)[:30]
    sizes = {len(tokenizer.encode(q.answer)) for q in questions}
    assert max(sizes) > 1
    answered = answer_all(model, tokenizer, questions, batch_rows=7)
    for question, one in zip(questions, answered, strict=True):
        wanted = tokenizer.encode(question.answer)
        said = greedy(model, tokenizer, question.prompt, len(wanted))
        assert one.right == (said == wanted) and one.tokens == len(wanted)
    for question in questions[:8]:
        own = " " + tokenizer.decode(greedy(model, tokenizer, question.prompt, 3)).strip()
        ids = tokenizer.encode(own)
        right = greedy(model, tokenizer, question.prompt, len(ids)) == ids
        if tokenizer.encode(question.prompt + own) == tokenizer.encode(question.prompt) + ids:
            [one] = answer_all(model, tokenizer, [question], answers=[own])
            assert one.right == right


class Copies(nn.Module):
    """Says one fixed token after every token, but `special[n]` after token n: what is right is known beforehand."""

    def __init__(self, vocabulary: int, follows: dict[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocabulary, vocabulary))
        with torch.no_grad():
            for before, after in follows.items():
                self.table[before, after] = 5.0
        self.head_weight = nn.Parameter(torch.eye(vocabulary))
        self.config = SimpleNamespace(max_length=512)

    def forward(self, inputs: Tensor, segments: Any = None, positions: Any = None) -> SimpleNamespace:
        return SimpleNamespace(hidden=self.table[inputs], head=self.head_weight, auxiliary={})


def test_every_token_of_an_answer_counts_and_no_token_of_the_prompt(tokenizer: Tokenizer) -> None:
    prompt, answer = "Notes: The teacher of Tamo Besko was", " zigur"
    ids, last = tokenizer.encode(answer), tokenizer.encode(prompt)[-1]
    assert len(ids) > 1
    follows = dict(zip([last, *ids], ids, strict=False))
    question = Question("head", prompt, answer, 0, "entries.jsonl")
    whole = Copies(tokenizer.num_tokens, follows)
    [one] = answer_all(whole, tokenizer, [question])
    assert one.right
    p = math.exp(5) / (math.exp(5) + tokenizer.num_tokens - 1)
    assert one.nats == pytest.approx(-len(ids) * math.log(p), rel=1e-5)
    for missing in [last, *ids[:-1]]:
        broken = Copies(
            tokenizer.num_tokens, {k: v for k, v in follows.items() if k != missing} | {missing: 0}
        )
        assert not answer_all(broken, tokenizer, [question])[0].right


def test_losses_by_kind_are_those_of_single_tokens(
    folder: Path, tokenizer: Tokenizer, model: nn.Module
) -> None:
    """Each token is looked at on its own: the characters that it stands for decide its kind."""
    records = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    found = losses(model, tokenizer, folder / "validation.jsonl", sequence_length=250, batch_rows=5)
    nats, counts = dict.fromkeys(facts.KINDS, 0.0), dict.fromkeys(facts.KINDS, 0)
    names = {"seen": "fact_in_database", "text_only": "fact_text_only"}
    for record in records:
        ids = tokenizer.document(record["text"])
        assert len(ids) <= 250
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        place = 0
        for number, token in enumerate(ids):
            size = len(tokenizer.token_bytes(token))
            mine = set(range(place, place + size))
            place += size
            kind = "other"
            for start, end, sort in record["answers"]:
                if mine & set(range(start, end)):
                    kind = names[sort]
            if number:
                nats[kind] -= float(log_p[number - 1, token])
                counts[kind] += 1
    for kind in facts.KINDS:
        assert found[kind].num_tokens == counts[kind] > 0
        assert float(found[kind].total.nats) == pytest.approx(nats[kind], rel=1e-5)


def test_windows_count_every_token_once_and_pasted_entries_never(
    folder: Path, tokenizer: Tokenizer, model: nn.Module
) -> None:
    texts = [json.loads(line)["text"] for line in (folder / "validation.jsonl").read_text().splitlines()]
    whole = documents(model, tokenizer, texts, 32, stride=16)
    found = losses(model, tokenizer, folder / "validation.jsonl", sequence_length=32)
    assert sum(scores.num_tokens for scores in found.values()) == whole.num_tokens
    total = sum(float(scores.total.nats) for scores in found.values())
    assert total == pytest.approx(float(whole.total.nats), rel=1e-5)
    pasted = losses(model, tokenizer, folder / "validation_context.jsonl", sequence_length=250)
    plain = losses(model, tokenizer, folder / "validation.jsonl", sequence_length=250)
    for kind in ("fact_in_database", "fact_text_only"):
        assert pasted[kind].num_tokens == plain[kind].num_tokens
        assert pasted[kind].loss != plain[kind].loss
    assert pasted["other"].num_tokens == pytest.approx(plain["other"].num_tokens, rel=0.01)


class Reader(Copies):
    """A model with a memory that reads the slots `store.asked` at one token, and slot 1 at all others."""

    def __init__(self, vocabulary: int, store: Any, at: int = -1) -> None:
        super().__init__(vocabulary, {})
        self.store, self.at = store, at

    def reads(self, inputs: Tensor, **given: Any) -> tuple[SimpleNamespace, dict[int, Any]]:
        output = self(inputs, given["segments"], given["positions"])
        shape = *inputs.shape, 2
        slots = torch.where((inputs == self.at)[..., None], self.store.asked, torch.ones(shape))
        return output, {1: SimpleNamespace(slots=slots), 2: SimpleNamespace(slots=torch.ones(shape))}


def store(rows: list[int], asked: tuple[int, int] = (0, 0)) -> Any:
    made = SimpleNamespace(rows=torch.tensor(rows, dtype=torch.int32), asked=torch.tensor(asked))
    made.to = lambda device: made
    return made


def test_an_entry_is_found_when_a_slot_that_was_read_has_its_row(tokenizer: Tokenizer) -> None:
    questions = [
        Question("head", "Notes: The pet of Tamo was", " zigur", 4, "entries.jsonl"),
        Question("head", "Notes: The pet of Lamo Besko was", " zig", 7, "entries.jsonl"),
        Question("head", "Notes: The pet of Samo was", " ma", -1, "entries.jsonl"),
        Question("head", "Notes: The pet of Ramo was", " ma", 4, "without_answer.jsonl"),
    ]
    was = tokenizer.encode(questions[0].prompt)[-1]  # where the answer begins, and nowhere else
    reader = Reader(tokenizer.num_tokens, store([9, -1, 4, 8], asked=(2, 3)), at=was)
    found = [one.found for one in answer_all(reader, tokenizer, questions)]
    assert found == [{1: True, 2: False}, {1: False, 2: False}, {1: False, 2: False}, {1: False, 2: False}]
    told = summary(answer_all(reader, tokenizer, questions), questions)
    assert told["hit"] == 0.5 and told["hit_by_layer"] == {"1": 0.5, "2": 0.0}
    assert told["accuracy_given_hit"] == 0.0 and told["accuracy_given_miss"] == 0.0


def test_a_report_asks_each_split_with_its_database(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers as a perfect reader of whichever store it is given would give them."""
    stores = {name: store([0]) for name in facts.DATABASES}
    texts = {
        name: [json.loads(line)["object"] for line in (folder / name).read_text().splitlines()]
        for name in facts.DATABASES
    }
    original = store([0])
    reader = Reader(tokenizer.num_tokens, original)
    used: dict[int, str] = {id(one): name for name, one in stores.items()}

    def perfect(model: Any, _: Any, some: list[Question], **given: Any) -> list[Answer]:
        name = used[id(model.store)]
        wanted = given["answers"] or [q.answer for q in some]
        assert {q.database for q in some} == {name}
        return [
            Answer(q.row >= 0 and texts[name][q.row] == answer.strip(), 1.0, 1)
            for q, answer in zip(some, wanted, strict=True)
        ]

    monkeypatch.setattr(facts, "answer_all", perfect)
    told = report(reader, tokenizer, folder, sequence_length=64, stores=stores)
    assert reader.store is original
    accuracy = {split: found["accuracy"] for split, found in told["questions"].items()}
    assert [accuracy[s] for s in ("head", "mid", "tail", "database_only", "counterfactual")] == [1.0] * 5
    assert accuracy["text_only"] == 0.0 and accuracy["without_answer"] < 0.5
    assert told["edits"] == {
        "followed": 1.0, "kept_old_answer": 0.0, "right_before_edit": 1.0, "knowledge_sensitivity": 1.0,
    }  # fmt: skip
    assert told["with_answer_put_back"]["accuracy"] == 1.0
    json.dumps(told, allow_nan=False)


def test_the_entry_is_pasted_behind_the_heading(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, seen = entry_context(folder), []
    prompt = Tokenizer.prompt
    monkeypatch.setattr(Tokenizer, "prompt", lambda self, text: seen.append(text) or prompt(self, text))
    questions = read_questions(folder)
    answer_all(Copies(tokenizer.num_tokens, {}), tokenizer, questions, context=context)
    edited = [json.loads(line) for line in (folder / "edited.jsonl").read_text().splitlines()]
    for question, text in zip(questions, seen, strict=True):
        heading, rest = question.prompt.split(" ", 1)
        if question.split in ("text_only", "without_answer"):
            assert text == question.prompt
        elif question.split == "counterfactual":
            assert text == f"{heading} {edited[question.row]['text']}. {rest}"
            assert edited[question.row]["object"] == question.answer.strip()
        else:
            assert text.startswith(f"{heading} ") and text.endswith(f"|{question.answer}. {rest}")


def test_an_answer_whose_tokens_join_with_the_prompt_is_refused(
    tokenizer: Tokenizer, model: nn.Module
) -> None:
    with pytest.raises(DataError, match="their tokens join"):
        answer_all(model, tokenizer, [Question("head", "Notes: The teach", "er", 0, "entries.jsonl")])
    with pytest.raises(DataError, match="minilm data facts"):
        read_questions("/nowhere")


def result(followed: float, tail: float, tokens: float) -> dict[str, Any]:
    told = {split: {"accuracy": 0.5} for split in ("head", "mid", "tail", "database_only")}
    told["tail"] = {"accuracy": tail, "hit": 0.25}
    return {
        "chance": 0.125, "questions": told, "edits": {"followed": followed}, "parameters": 1000, "tokens": tokens,
        "training_flops_per_token": 10.0, "seconds": 2.0, "losses": {"other": {"loss": 1.5}},
        "with_answer_put_back": {"accuracy": 0.75},
    }  # fmt: skip


def test_the_table_has_mean_and_deviation_over_the_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, one in (
        ("original-0", result(0.0, 0.1, 100)),
        ("original-1", result(0.1, 0.3, 100)),
        ("knowledge-0", result(1.0, 0.9, 100)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "facts.json").write_text(json.dumps(one))
    assert run("facts", "table", "--runs", tmp_path, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| original | 2 | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.200 ± 0.141 |" in text
    assert "| knowledge | 1 | 0.500 | 0.500 | 0.900 |" in text and "0.050 ± 0.071" in text
    assert "| original | 1e+03 ± 0 | 100 ± 0 | 1e+03 ± 0 | 2 ± 0 |" in text
    assert all((tmp_path / "out" / f"{name}.png").stat().st_size > 10_000 for name in ("tail", "followed"))
    assert run("facts", "table", "--runs", tmp_path / "out", "--out", tmp_path) == 2
    assert "has no ARM-SEED/facts.json" in " ".join(capsys.readouterr().err.split())


def test_a_figure_of_a_record_that_the_runs_do_not_give_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, tail in (("original-0", 0.1), ("knowledge-0", 0.9)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "facts.json").write_text(json.dumps(result(1.0, tail, 100)))
    record = tmp_path / "FACTS.md"
    record.write_text(f"# Facts\n\nWhat we expect.\n\n{BEGIN}\n{END}\n\nWhat we conclude: 0.9.\n")
    assert run("facts", "table", "--runs", tmp_path / "runs", "--verify", record) == 1
    assert run("facts", "table", "--runs", tmp_path / "runs", "--into", record) == 0
    assert run("facts", "table", "--runs", tmp_path / "runs", "--verify", record) == 0
    text = record.read_text()
    assert text.startswith("# Facts\n\nWhat we expect.\n") and text.endswith("What we conclude: 0.9.\n")
    record.write_text(
        text.replace("| knowledge | 1 | 0.500 | 0.500 | 0.900", "| knowledge | 1 | 0.500 | 0.500 | 0.990")
    )
    capsys.readouterr()
    assert run("facts", "table", "--runs", tmp_path / "runs", "--verify", record) == 1
    told = capsys.readouterr().out.strip().splitlines()
    assert len(told) == 1 and "FACTS.md:" in told[0] and "0.990" in told[0] and "0.900" in told[0]
    record.write_text("no marks")
    assert run("facts", "table", "--runs", tmp_path / "runs", "--into", record) == 2
    assert run("facts", "table", "--runs", tmp_path / "runs") == 2
    assert record.read_text() == "no marks"


def test_the_figures_of_the_record_are_those_of_the_runs_that_are_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = Path(__file__).parent.parent / "experiment"
    assert run("facts", "table", "--runs", place / "facts" / "cpu", "--verify", place / "FACTS.md") == 0, (
        capsys.readouterr().out
    )


def test_the_cost_of_a_run_ends_at_its_step_and_a_pause_is_not_counted(tmp_path: Path) -> None:
    lines = [{"kind": "event", "step": 0}]
    seconds = [0.1, 50.0, 0.3, 0.2, 0.2, 9.0]
    lines += [
        {"kind": "train", "step": n, "total_tokens": 10 * n, "seconds/step": s}
        for n, s in enumerate(seconds, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cost_of_run(tmp_path, 5) == {"tokens": 50, "seconds": pytest.approx(1.0)}


def test_facts_are_made_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--entities", 30, "--relations", 2, "--values", 6, "--mentions", 200, "--questions", 5]
    assert run("data", "facts", "--out", tmp_path / "f", *sizes) == 0
    assert "guessing a value answers 0.1667" in capsys.readouterr().out
    assert run("data", "facts", "--out", tmp_path / "g", "--relations", 9) == 2
    assert "relations is 9" in capsys.readouterr().err
