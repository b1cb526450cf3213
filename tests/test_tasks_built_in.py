"""Built-in tasks: the right answers are right, somebody who knows them gets 1, somebody who does not gets chance.

And a model that knows every row by heart gets 1 through the whole arithmetic, but not if its predictions are read one
place off: the wrong slice does not stay hidden.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluation_checkpoint import TEXT
from evaluation_reference import tiny_model
from torch import nn

from minilm.data.facts import FactsSettings, generate
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError
from minilm.evaluation.facts import answer_all, read_questions
from minilm.evaluation.tasks import built_in
from minilm.evaluation.tasks.arithmetic import Span, TextModel, Written
from minilm.evaluation.tasks.asking import ask
from minilm.evaluation.tasks.questions import Choice, Cloze, Completion, Repetition, Task, chance_of

CONTEXT = 192
NAMES = ("agreement", "brackets", "addition", "copying", "induction")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 5, vocab_size=300)


def made(name: str, tokenizer: Tokenizer, **options) -> Task:
    return built_in.make(name, tokenizer=tokenizer, context=CONTEXT, **options)


class Oracle:
    """Knows the right answers of a task, or none of anything: then every likelihood is drawn by lot."""

    def __init__(self, task: Task, knows: bool) -> None:
        self.random = random.Random(1)
        self.knows = knows
        self.right = {
            (q.context, q.solved()[len(q.context) :]) for q in task.questions if not isinstance(q, Repetition)
        }

    def likelihoods(self, pairs):
        if not self.knows:
            return [Span(self.random.random(), 1, 0, 1.0) for _ in pairs]
        return [Span(1.0, 1, 1, 1.0) if pair in self.right else Span(9.0, 1, 0, 1.0) for pair in pairs]

    def repetitions(self, once):
        found = []
        for row in once:
            right = len(row) - 1
            if not self.knows:  # one of the tokens that stood before
                right = sum(self.random.choice(row) == token for token in row[1:])
            found.append((Span(5.0, len(row) - 1, 0), Span(0.1, len(row) - 1, right)))
        return found


@pytest.mark.parametrize("name", [name for name in NAMES if name != "copying"])
def test_who_knows_the_answers_gets_1_and_who_draws_lots_gets_the_stated_chance(name, tokenizer):
    task = made(name, tokenizer, number=1500)
    assert ask(task, Oracle(task, knows=True)).measures["accuracy"].value == 1
    found = ask(task, Oracle(task, knows=False)).measures["accuracy"]
    assert abs(found.value - chance_of(task.questions)) < 4 * found.error
    assert found.error < 0.02


def test_chance_of_copying_is_that_of_drawing_one_of_the_words(tokenizer):
    task = made("copying", tokenizer, number=1500)
    assert ask(task, Oracle(task, knows=True)).measures["accuracy"].value == 1
    drawn = random.Random(0)
    hits = [drawn.choice(q.text.split(".")[0].split()) == q.answer for q in task.questions]
    assert sum(hits) / len(hits) == pytest.approx(chance_of(task.questions), abs=0.04)


class Parrot(nn.Module):
    """Knows rows by heart: what follows the beginning of one is certain to it. `late`: it says so one place too late.

    Read by who slices the logits against the wrong tokens, a right model looks like that.
    """

    def __init__(self, rows: list[list[int]], num_tokens: int, late: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_length=CONTEXT, vocab_size=num_tokens)
        self.late = late
        self.following: dict[tuple[int, ...], int] = {}
        for row in rows:
            for end in range(1, len(row)):
                self.following.setdefault(tuple(row[:end]), row[end])

    def forward(self, inputs, segments=None, positions=None):
        logits = torch.zeros(*inputs.shape, self.config.vocab_size)
        for b, row in enumerate(inputs.tolist()):
            for place in range(len(row)):
                known = self.following.get(tuple(row[: place + 1 - self.late]))
                if known is not None:
                    logits[b, place, known] = 20.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_right_model_gets_1_and_the_same_model_read_one_place_off_does_not(name, tokenizer):
    task = made(name, tokenizer, number=24)
    if name == "induction":
        rows = [[tokenizer.bos_id, *q.once, *q.once] for q in task.questions]
    else:
        rows = [tokenizer.prompt(q.solved()) for q in task.questions]
    right = ask(task, TextModel(Parrot(rows, tokenizer.num_tokens), tokenizer))
    assert right.failure is None and right.measures["accuracy"].value == 1
    wrong = ask(task, TextModel(Parrot(rows, tokenizer.num_tokens, late=1), tokenizer))
    assert wrong.measures["accuracy"].value < max(0.5, 3 * right.chance), wrong.measures
    worse = wrong.sums["second_copy" if name == "induction" else "answer"].mean
    assert worse > right.sums["second_copy" if name == "induction" else "answer"].mean + 1


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_a_function_of_its_seed(name, tokenizer):
    first = made(name, tokenizer)
    assert made(name, tokenizer).questions == first.questions
    assert made(name, tokenizer, seed=1).questions != first.questions
    assert len(first.questions) == 200 and len({q.where for q in first.questions}) == 200
    assert len(set(first.questions)) > 150
    assert made(name, tokenizer, number=10).questions == first.questions[:10]


def test_the_verb_agrees_with_the_first_noun_and_the_sentences_differ_in_the_verb_alone(tokenizer):
    plural = {"are", "were", "have", "seem"}
    plurals = {"keys", "children", "teachers", "dogs", "letters", "women", "cars", "paintings", "farmers", "songs",
               "books", "birds", "houses", "men", "tables"}  # fmt: skip
    answers = Counter()
    for q in made("agreement", tokenizer).questions:
        assert isinstance(q, Choice)
        right, wrong = q.choices[q.answer].split(), q.choices[1 - q.answer].split()
        ((verb, other),) = {(a, b) for a, b in zip(right, wrong, strict=True) if a != b}
        assert (verb in plural) == (right[1] in plurals) and (other in plural) != (verb in plural)
        nouns = [b for a, b in itertools.pairwise(right) if a == "the" and right.index(b) < right.index(verb)]
        assert len(nouns) == int(q.group.split()[0])
        assert all((noun in plurals) != (right[1] in plurals) for noun in nouns)
        answers[q.answer, verb in plural] += 1
    assert min(answers.values()) > 30 and len(answers) == 4  # neither place nor number gives it away


def balanced(text: str) -> bool:
    closes, opened = {")": "(", "]": "[", "}": "{"}, []
    for character in text:
        if character in "([{":
            opened.append(character)
        elif character in closes and (not opened or opened.pop() != closes[character]):
            return False
    return not opened


def test_one_of_two_sentences_is_balanced_and_both_have_the_same_words(tokenizer):
    for q in made("brackets", tokenizer).questions:
        assert isinstance(q, Choice)
        assert [balanced(choice) for choice in q.choices] == [n == q.answer for n in (0, 1)]
        assert Counter(q.choices[0].split()) == Counter(q.choices[1].split())
        assert sum(map(q.choices[0].count, "([{")) == int(q.group.split()[1])


def test_sums_are_right_and_the_four_numbers_alone_do_not_tell(tokenizer):
    ranks, places = Counter(), Counter()
    for q in made("addition", tokenizer, number=1200).questions:
        assert isinstance(q, Choice)
        left, plus, right, equals = q.question.split()
        assert (plus, equals) == ("+", "=") and int(left) + int(right) == int(q.choices[q.answer])
        assert len(left) == len(right) == int(q.group.split()[0])
        numbers = sorted(map(int, q.choices))
        assert len({b - a for a, b in itertools.pairwise(numbers)}) == 1 and numbers[0] > 0
        ranks[numbers.index(int(q.choices[q.answer]))] += 1
        places[q.answer] += 1
    for counts in (ranks, places):
        assert all(abs(counts[n] - 300) < 75 for n in range(4)), counts


def test_copies_and_repetitions_hold_what_they_say(tokenizer):
    for q in made("copying", tokenizer).questions:
        assert isinstance(q, Cloze)
        first, second = q.text.split(". ")
        assert first.split() == [*second.split(), q.answer] and len(set(first.split())) == int(
            q.group.split()[0]
        )
    for q in made("induction", tokenizer).questions:
        assert isinstance(q, Repetition)
        assert len(set(q.once)) == len(q.once) == 24 and min(q.once) > 2  # 0, 1, 2 are special
    short = built_in.make("induction", num_tokens=50, context=13, number=2)
    assert all(len(q.once) == 6 and max(q.once) < 50 for q in short.questions) and chance_of(
        short.questions
    ) == pytest.approx(1 / 6)
    with pytest.raises(ConfigError, match="needs a context of 9 tokens"):
        built_in.make("induction", num_tokens=50, context=8)


def test_the_loss_of_each_copy_is_that_of_its_tokens_but_the_first(tokenizer):
    from evaluation_reference import token_losses

    model = tiny_model(tokenizer.num_tokens, max_length=CONTEXT)
    once = [5, 9, 200, 31]
    ((first, second),) = TextModel(model, tokenizer).repetitions([once])
    each = token_losses(model, [tokenizer.bos_id, *once, *once])  # of tokens 1, 2, ...
    assert first.nats == pytest.approx(sum(each[1:4]), abs=1e-5) and first.tokens == 3
    assert second.nats == pytest.approx(sum(each[5:8]), abs=1e-5) and second.tokens == 3
    # Without a tokenizer there is nothing to stand before the first token.
    ((first, second),) = TextModel(model, None).repetitions([once])
    each = token_losses(model, [*once, *once])
    assert first.nats == pytest.approx(sum(each[0:3]), abs=1e-5)
    assert second.nats == pytest.approx(sum(each[4:7]), abs=1e-5)


def test_facts_get_the_accuracy_that_they_have_in_their_own_report(tmp_path: Path):
    folder = tmp_path / "facts"
    generate(
        folder,
        FactsSettings(entities=30, relations=2, values=8, mentions=300, validation_mentions=30, questions=9),
    )
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.train(texts, 290)
    task = built_in.make(f"facts={folder}")
    asked = [q for q in read_questions(folder) if q.database == "entries.jsonl"]
    assert len(task.questions) == len(asked) and chance_of(task.questions) == pytest.approx(1 / 8)
    # A model that knows every third answer by heart.
    rows = [tokenizer.prompt(q.prompt + q.answer) for q in asked[::3]]
    model = Parrot(rows, tokenizer.num_tokens)
    result = ask(task, TextModel(model, tokenizer))

    class WithHidden(Parrot):
        """The facts report makes logits itself."""

        def forward(self, inputs, segments=None, positions=None):
            logits = super().forward(inputs).logits
            return SimpleNamespace(hidden=logits, head=torch.eye(logits.shape[-1]))

    answers = answer_all(WithHidden(rows, tokenizer.num_tokens), tokenizer, asked)
    assert [o.measures["accuracy"] for o in result.outcomes] == [float(a.right) for a in answers]
    assert [o.spans["answer"].nats for o in result.outcomes] == pytest.approx(
        [a.nats for a in answers], abs=1e-5
    )
    assert 0.2 < result.measures["accuracy"].value < 0.6 and set(result.groups) == {q.split for q in asked}
    with pytest.raises(DataError, match="`minilm data facts` makes such a folder"):
        built_in.make(f"facts={tmp_path}")
    (tmp_path / "facts.json").write_text("[]")
    with pytest.raises(DataError, match="is not the description of a facts folder"):
        built_in.make(f"facts={tmp_path}")


def test_an_unknown_name_is_answered_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"There is no task 'arithmetic'.*addition.*facts=FOLDER"):
        built_in.make("arithmetic")


def test_completions_can_be_solved_too(tokenizer):
    questions = tuple(Completion(prompt=f"{n} is", answer=str(n), stop=(".",)) for n in range(6))
    rows = [tokenizer.prompt(f"{q.solved()}.") for q in questions]
    model = Parrot(rows, tokenizer.num_tokens)
    result = ask(Task(name="t", questions=questions), TextModel(model, tokenizer))
    assert result.measures["exact_match"].value == 1
    assert Written("x") == ("x", 0)
