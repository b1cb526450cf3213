"""What a model knows: questions about made-up facts, by how it could know them; losses on facts and on other tokens.

The questions, databases and validation documents are those of `minilm data facts` (minilm/data/facts/write.py). A
question is answered right when greedy decoding gives the whole answer, which is the same as: at each of its tokens,
the token itself is the most probable one after the prompt and the tokens before it.

A model with a knowledge memory has its store put in its place question by question: `edited.jsonl` for the facts that
were changed, `without_answer.jsonl` where the answer was taken out. What it read is taken from `model.reads`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.alignment import Batch, align, nll
from minilm.data.labels import token_entries
from minilm.data.tokenizer import Tokenizer
from minilm.errors import DataError
from minilm.evaluation.intervals import DocumentSums, Scores, bootstrap
from minilm.evaluation.mode import autocast, device_of, eval_mode, random_states_kept
from minilm.evaluation.score import windows

DATABASE, EDITED, WITHOUT = "entries.jsonl", "edited.jsonl", "without_answer.jsonl"
DATABASES = (DATABASE, EDITED, WITHOUT)
KINDS = ("fact_in_database", "fact_text_only", "other")  # of the tokens of the validation text
BATCH_ROWS = 64

Context = Callable[["Question"], str | None]


@dataclass(frozen=True)
class Question:
    """A line of questions.jsonl. `row`: its entry in entries.jsonl, or -1; `was`: the answer before an edit."""

    split: str
    prompt: str
    answer: str
    row: int
    database: str
    band: str = ""
    was: str | None = None

    @property
    def entry(self) -> int:
        """The entry that answers it in the database that it is asked with, or -1."""
        return -1 if self.database == WITHOUT else self.row


@dataclass
class Answer:
    """How a question went. `found` by memory layer: was the entry among those that were read; None: not asked."""

    right: bool
    nats: float
    tokens: int
    found: dict[int, bool] = field(default_factory=dict)


def read_questions(folder: str | Path) -> list[Question]:
    """The questions of a facts folder, in its order. Raises DataError."""
    names = Question.__dataclass_fields__
    return [
        Question(**{key: value for key, value in record.items() if key in names})
        for record in _records(Path(folder) / "questions.jsonl")
    ]


def entry_context(folder: str | Path) -> Context:
    """The text of the entry that answers a question, from the database that it is asked with; None where there is
    none: what retrieval without error would paste into the prompt."""
    texts = {name: [record["text"] for record in _records(Path(folder) / name)] for name in DATABASES}
    return lambda question: texts[question.database][question.entry] if question.entry >= 0 else None


def answer_all(
    model: Any,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    answers: Sequence[str] | None = None,
    context: Context | None = None,
    batch_rows: int = BATCH_ROWS,
    precision: str | None = None,
) -> list[Answer]:
    """Ask the model. `answers`: other ones than those of the questions; `context`: see `entry_context`."""
    wanted = [q.answer for q in questions] if answers is None else answers
    rows = [
        _question_row(tokenizer, question, text, context and context(question))
        for question, text in zip(questions, wanted, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].tokens))
    place, found = device_of(model), dict[int, Answer]()
    with random_states_kept(), eval_mode(model), autocast(place, precision):
        for start in range(0, len(order), batch_rows):
            chosen = order[start : start + batch_rows]
            answered = _answers(model, _batch([rows[n] for n in chosen]).to(place))
            found.update(zip(chosen, answered, strict=True))
    return [found[n] for n in range(len(rows))]


def losses(
    model: Any,
    tokenizer: Tokenizer,
    documents: str | Path,
    *,
    sequence_length: int,
    batch_rows: int = BATCH_ROWS,
    precision: str | None = None,
) -> dict[str, Scores]:
    """Loss by kind of token (`KINDS`) over a file of validation documents; pasted entries are not counted.

    sequence_length   of a window; a longer document is scored in windows that overlap by half
    """
    place = device_of(model)
    sums = {kind: DocumentSums() for kind in KINDS}
    rows = list(_document_rows(tokenizer, Path(documents), sequence_length))
    with random_states_kept(), eval_mode(model), autocast(place, precision):
        for start in range(0, len(rows), batch_rows):
            group = rows[start : start + batch_rows]
            batch = _batch(group).to(place)
            each = _forward(model, batch)[1].double().cpu()
            kinds = _kinds(group)
            for number, kind in enumerate(KINDS):
                chosen = (kinds == number).double()
                nats, counts = (each * chosen).sum(dim=1), chosen.sum(dim=1)
                for row, nat, count in zip(group, nats.tolist(), counts.tolist(), strict=True):
                    sums[kind].add(row.document, nat, count, 0.0)
    return {kind: Scores.of(total, context_tokens=sequence_length) for kind, total in sums.items()}


@contextmanager
def reading(model: Any, store: Any | None) -> Iterator[None]:
    """Let a model with a knowledge memory read another store; nothing where there is none."""
    if store is None:
        yield
        return
    before = model.store
    model.store = store
    try:
        yield
    finally:
        model.store = before


def report(
    model: Any,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    sequence_length: int,
    stores: Mapping[str, Any] | None = None,
    with_context: bool = False,
    precision: str | None = None,
) -> dict[str, Any]:
    """Everything that is told of a checkpoint, as plain numbers for JSON.

    stores        the databases as knowledge stores, by the name of their file; none for a model without a memory
    with_context  the entry that answers is pasted before the question, and before each fact of the validation text
    """
    folder = Path(folder)
    questions = read_questions(folder)
    context = entry_context(folder) if with_context else None
    stores = stores or {}

    def ask(some: Sequence[Question], database: str, answers: Sequence[str] | None = None) -> list[Answer]:
        with reading(model, stores.get(database)):
            return answer_all(
                model,
                tokenizer,
                _asked_with(some, database),
                answers=answers,
                context=context,
                precision=precision,
            )

    def of(split: str) -> list[Question]:
        return [q for q in questions if q.split == split]

    splits = list(dict.fromkeys(q.split for q in questions))
    told: dict[str, Any] = {
        split: summary(ask(some, some[0].database), some) for split, some in ((s, of(s)) for s in splits)
    }
    edited = of("counterfactual")
    before = [q.was or "" for q in edited]
    kept, correct = ask(edited, EDITED, before), ask(edited, DATABASE, before)
    described = json.loads((folder / "facts.json").read_text())
    suffix = "_context" if with_context else ""
    with reading(model, stores.get(DATABASE)):
        by_kind = losses(
            model, tokenizer, folder / f"validation{suffix}.jsonl", sequence_length=sequence_length,
            precision=precision,
        )  # fmt: skip
    return {
        "chance": described["chance"],
        "questions": told,
        "edits": {
            "followed": told["counterfactual"]["accuracy"],
            "kept_old_answer": _share_right(kept),
            "right_before_edit": _share_right(correct),
            "knowledge_sensitivity": _share_right(correct) - _share_right(kept),
        },
        "with_answer_put_back": summary(
            ask(of("without_answer"), DATABASE), _asked_with(of("without_answer"), DATABASE)
        ),
        "losses": {kind: scores.as_dict() for kind, scores in by_kind.items()},
    }


def summary(answers: Sequence[Answer], questions: Sequence[Question]) -> dict[str, Any]:
    """Accuracy with its interval by question, nats per token of the answers, and what was read, by memory layer."""
    right = np.array([[a.right, 1.0] for a in answers], dtype=np.float64)
    told: dict[str, Any] = {
        "number": len(answers),
        "accuracy": _share_right(answers),
        "accuracy_95": bootstrap(right),
        "answer_nats": sum(a.nats for a in answers) / max(1, sum(a.tokens for a in answers)),
    }
    layers = sorted({layer for a in answers for layer in a.found})
    known = [a for a, q in zip(answers, questions, strict=True) if q.entry >= 0]
    if layers and known:
        hits = [a for a in known if any(a.found.values())]
        misses = [a for a in known if not any(a.found.values())]
        told["hit"] = len(hits) / len(known)
        told["hit_by_layer"] = {str(n): sum(a.found[n] for a in known) / len(known) for n in layers}
        told["accuracy_given_hit"] = _share_right(hits) if hits else None
        told["accuracy_given_miss"] = _share_right(misses) if misses else None
    return told


def _asked_with(questions: Sequence[Question], database: str) -> list[Question]:
    return [dataclasses.replace(question, database=database) for question in questions]


# --- rows


@dataclass(frozen=True)
class _Row:
    """Tokens, which of them count, the entry each can be known from, the kind of each (an index into KINDS, or -1)."""

    tokens: list[int]
    learn: list[bool]
    entries: list[int]
    kinds: list[int]
    document: int = 0


def _question_row(tokenizer: Tokenizer, question: Question, answer: str, entry: str | None) -> _Row:
    prompt = question.prompt
    if entry is not None:
        heading, rest = prompt.split(" ", 1)
        prompt = f"{heading} {entry}. {rest}"
    before, said = tokenizer.prompt(prompt), tokenizer.encode(answer)
    if tokenizer.encode(prompt + answer) != tokenizer.encode(prompt) + said:
        raise DataError(
            f"With this tokenizer the answer {answer!r} is not the continuation of {prompt!r}: their tokens join. It "
            "cannot be asked so."
        )
    none = [-1] * len(before)
    rows = [question.entry] * len(said)
    return _Row([*before, *said], [False] * len(before) + [True] * len(said), none + rows, none + rows)


def _document_rows(tokenizer: Tokenizer, path: Path, length: int) -> Iterator[_Row]:
    records = _records(path)
    encoded = tokenizer.encode_offsets([record["text"] for record in records])
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    sorts = {"seen": 0, "text_only": 1}
    other, uncounted = KINDS.index("other"), len(KINDS)
    for number, (record, (ids, offsets)) in enumerate(zip(records, encoded, strict=True)):
        spans = [(start, end, sorts[sort]) for start, end, sort in record["answers"]]
        spans += [(start, end, uncounted) for start, end in record.get("pasted", ())]
        marks = token_entries(offsets, sorted(spans)).tolist()
        kinds = [other] * len(before) + [other if mark < 0 else mark for mark in marks] + [other]
        rows = token_entries(offsets, record.get("entries", ())).tolist()
        entries = [-1] * len(before) + rows + [-1]
        tokens = [*before, *ids, tokenizer.eos_id]
        for window in windows(number, range(len(tokens)), length, max(1, length // 2)):
            part = slice(window.tokens[0], window.tokens[-1] + 1)
            learn = [n >= window.learn_from and kind != uncounted for n, kind in enumerate(kinds[part])]
            yield _Row(tokens[part], learn, entries[part], kinds[part], number)


def _batch(rows: Sequence[_Row]) -> Batch:
    return _aligned(rows, [row.entries for row in rows])


def _kinds(rows: Sequence[_Row]) -> Tensor:
    """[B, L]: the kind of each prediction that counts, else -1: it travels with its token, as an entry does."""
    found = _aligned(rows, [row.kinds for row in rows]).entries
    assert found is not None
    return found


def _aligned(rows: Sequence[_Row], labels: Sequence[Sequence[int]]) -> Batch:
    width = max(2, *(len(row.tokens) for row in rows))
    shape = len(rows), width
    tokens, segments = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    learn, entries = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        size = len(row.tokens)
        tokens[number, :size] = torch.tensor(row.tokens)
        segments[number, :size] = 1
        learn[number, :size] = torch.tensor(row.learn)
        entries[number, :size] = torch.tensor(label)
    return align(tokens, segments, learn, entries)


# --- the model


def _forward(model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict[int, Any]]:
    """Logits, nats of each prediction, and what each memory layer read."""
    given: dict[str, Any] = {"segments": batch.segments, "positions": batch.positions}
    read: dict[int, Any] = {}
    if getattr(model, "takes_entries", False):
        given["entries"] = batch.entries  # read only where the configuration asks for an oracle
    if getattr(model, "store", None) is not None and hasattr(model, "reads"):
        output, read = model.reads(batch.inputs, **given)
    else:
        output = model(batch.inputs, **given)
    logits = F.linear(output.hidden, output.head)
    return logits, nll(logits, batch), read


def _answers(model: Any, batch: Batch) -> list[Answer]:
    logits, each, read = _forward(model, batch)
    counts = batch.weights > 0
    right = ((logits.argmax(dim=-1) == batch.targets) | ~counts).all(dim=1).tolist()
    nats, tokens = each.sum(dim=1, dtype=torch.float64).tolist(), counts.sum(dim=1).tolist()
    found: dict[int, list[bool]] = {}
    first = counts.int().argmax(dim=1)  # where the answer begins: the whole choice is made there
    lines = torch.arange(len(first), device=first.device)
    assert batch.entries is not None
    wanted = batch.entries[lines, first]
    for layer, one in read.items():
        rows = model.store.to(one.slots.device).rows[one.slots[lines, first].long()]
        found[layer] = ((rows == wanted[:, None]) & (wanted[:, None] >= 0)).any(dim=1).tolist()
    return [
        Answer(right[n], nats[n], tokens[n], {layer: hits[n] for layer, hits in found.items()})
        for n in range(len(right))
    ]


def _share_right(answers: Sequence[Answer]) -> float:
    return sum(a.right for a in answers) / max(1, len(answers))


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. `minilm data facts` makes such a folder."
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON Lines: {error}.") from error
