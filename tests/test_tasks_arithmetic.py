"""What a model says of texts, against loops over single rows that share no code with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_checkpoint import TEXT
from evaluation_reference import log_probabilities, row_logits, slow_generate, tiny_model
from torch import nn
from zoo_models import tiny

from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckFailed, ConfigError, DataError
from minilm.evaluation.score import documents
from minilm.evaluation.tasks import built_in, files
from minilm.evaluation.tasks.arithmetic import Span, TextModel, Written
from minilm.evaluation.tasks.asking import ask
from minilm.evaluation.tasks.questions import Choice, Cloze, Completion, Task
from minilm.models import names

CONTEXT = 48
PAIRS = [
    ("the cat sat on a", " mat"),
    ("the dog ran ", "under 中文"),  # the space belongs to the answer
    ("", "def return"),  # after the token that begins a document
    ("def return import x y z and", " the cat sat on a mat"),
    ("ret", "urn import"),  # tokens join across the border
    ("the cat", " café"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT] * 5, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> nn.Module:
    return tiny_model(tokenizer.num_tokens, max_length=CONTEXT)


def slow(model: nn.Module, tokenizer: Tokenizer, context: str, answer: str) -> tuple[float, bool, int]:
    """Nats, greedy and number of tokens of the answer, token by token, from one row alone."""
    bare = context.rstrip()
    head = [tokenizer.bos_id, *tokenizer.encode(bare)]
    tokens = [tokenizer.bos_id, *tokenizer.encode(context + answer)]
    first, dropped = len(head), max(0, len(tokens) - (CONTEXT + 1))
    logits = row_logits(model, tokens[dropped:-1])
    logs, nats, greedy = log_probabilities(logits), 0.0, True
    for place in range(first, len(tokens)):
        nats -= float(logs[place - 1 - dropped][tokens[place]])
        greedy = greedy and int(np.argmax(logits[place - 1 - dropped])) == tokens[place]
    return nats, greedy, len(tokens) - first


@pytest.mark.parametrize("batch_rows", [1, 4, None])
def test_likelihoods_are_those_of_single_rows_in_any_batch(model, tokenizer, batch_rows):
    # One whose answer is what greedy decoding gives, and one that is too long for the context.
    start = tokenizer.prompt("the cat")
    text = tokenizer.decode(slow_generate(model, start, 3, temperature=0))
    pairs = [*PAIRS, (" ".join([TEXT] * 4), " mat and")]
    if tokenizer.prompt("the cat" + text)[: len(start)] == start:
        pairs.append(("the cat", text))
    found = TextModel(model, tokenizer, batch_rows=batch_rows).likelihoods(pairs)
    for pair, span in zip(pairs, found, strict=True):
        nats, greedy, tokens = slow(model, tokenizer, *pair)
        assert span.nats == pytest.approx(nats, abs=2e-5) and (span.greedy, span.tokens) == (greedy, tokens)
    assert {span.greedy for span in found} == {True, False}
    assert [span.joined for span in found][:6] == [False, False, False, False, True, False]
    assert [span.cut > 0 for span in found][:7] == [False] * 6 + [True]
    assert found[6].cut == len(tokenizer.prompt(pairs[6][0] + pairs[6][1])) - (CONTEXT + 1)
    assert found[1].num_bytes == len(" under 中文".encode())


def test_numbers_do_not_depend_on_the_batch_and_nothing_is_changed(model, tokenizer):
    model.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = [TextModel(model, tokenizer, batch_rows=rows).likelihoods(PAIRS) for rows in (1, 2, 5)]
    for other in found[1:]:
        assert [s.nats for s in other] == pytest.approx([s.nats for s in found[0]], abs=1e-5)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model.eval()


def test_an_answer_without_a_token_of_its_own_or_longer_than_the_context_is_refused(model, tokenizer):
    texts = TextModel(model, tokenizer)
    with pytest.raises(DataError, match="has 0 tokens of its own"):
        texts.likelihoods([("the cat", "")])
    with pytest.raises(DataError, match=f"must have 1 to the model's context, {CONTEXT}"):
        texts.likelihoods([("the", " cat" * CONTEXT + " mat")])


@pytest.mark.parametrize("name", names())
def test_every_variant_answers_like_its_single_rows(name, tokenizer):
    variant = tiny(name, vocab_size=tokenizer.num_tokens, init_std=0.2).eval()
    reader = TextModel(variant, tokenizer, batch_rows=4)
    for pair, span in zip(PAIRS, reader.likelihoods(PAIRS), strict=True):
        nats, greedy, tokens = slow(variant, tokenizer, *pair)
        assert span.nats == pytest.approx(nats, abs=1e-4) and (span.greedy, span.tokens) == (greedy, tokens)
    for prompt, one in zip(("the cat", "a"), reader.completions(["the cat", "a"], [], 4), strict=True):
        ids = slow_generate(variant, tokenizer.prompt(prompt), 4, temperature=0, eos_id=tokenizer.eos_id)
        assert one.text == tokenizer.decode(ids)


class Fixed(nn.Module):
    """The same logits at every place."""

    def __init__(self, logits: list[float], max_length: int = 16) -> None:
        super().__init__()
        self.each = torch.tensor(logits)
        self.config = SimpleNamespace(max_length=max_length, vocab_size=len(logits))

    def forward(self, inputs, segments=None, positions=None):
        return SimpleNamespace(logits=self.each.expand(*inputs.shape, -1))


def test_only_the_most_probable_token_is_greedy_and_of_equal_ones_the_lower_id(tokenizer):
    (low,), (high,) = sorted(tokenizer.encode(letter) for letter in "qQ")

    def greedy(*most_probable: int, second: tuple[int, ...] = ()) -> bool:
        logits = [0.0] * tokenizer.num_tokens
        for token in most_probable:
            logits[token] = 2.0
        for token in second:
            logits[token] = 1.0
        (span,) = TextModel(Fixed(logits), tokenizer).likelihoods([("", tokenizer.decode([low]))])
        return span.greedy

    assert greedy(low) and greedy(low, high) and greedy(low, second=(0, high))
    assert not greedy(high, second=(low,)) and not greedy(0, low)
    (span,) = TextModel(Fixed([0.0] * tokenizer.num_tokens), tokenizer).likelihoods([("", "cat")])
    assert not span.greedy  # a model that says nothing is not right
    assert span.nats == pytest.approx(span.tokens * math.log(tokenizer.num_tokens), abs=1e-5)
    with pytest.raises(CheckFailed, match="not finite"):
        TextModel(Fixed([math.nan] * tokenizer.num_tokens), tokenizer).likelihoods([("", "cat")])


def test_rolling_counts_every_token_once_and_agrees_with_documents(model, tokenizer):
    texts = ["the cat sat", " ".join([TEXT] * 4), ""]
    found = TextModel(model, tokenizer).rolling(texts)
    ids = [tokenizer.encode(text) for text in texts]
    assert [span.tokens for span in found] == [len(row) for row in ids]
    assert len(ids[1]) > 2 * CONTEXT
    # By hand: windows of 48 that add 24 tokens, the last one moved back to be full.
    row, logs, nats = [tokenizer.bos_id, *ids[1]], {}, 0.0
    for start in [*range(0, len(row) - CONTEXT - 1, CONTEXT // 2), len(row) - CONTEXT - 1]:
        each = log_probabilities(row_logits(model, row[start : start + CONTEXT]))
        for place in range(start + 1, start + CONTEXT + 1):
            logs.setdefault(place, -float(each[place - 1 - start][row[place]]))
    nats = sum(logs.values())
    assert set(logs) == set(range(1, len(row))) and found[1].nats == pytest.approx(nats, abs=1e-4)
    # `documents` also counts EOS.
    whole = documents(model, tokenizer, texts[:1])
    tokens = tokenizer.document(texts[0])
    last = -float(log_probabilities(row_logits(model, tokens))[len(tokens) - 2][tokenizer.eos_id])
    assert found[0].nats == pytest.approx(float(whole.total.nats) - last, abs=1e-5)
    assert found[2].nats == 0.0


@pytest.mark.parametrize("batch_rows", [1, 3, None])
def test_completions_are_greedy_and_end_before_the_first_stop_text(model, tokenizer, batch_rows):
    prompts = ["the cat", "def return import", "a", " ".join([TEXT] * 3), "the dog ran"]
    texts = TextModel(model, tokenizer, batch_rows=batch_rows)
    found = texts.completions(prompts, [], 6)
    stops = set()
    for prompt, one in zip(prompts, found, strict=True):
        ids = tokenizer.prompt(prompt)
        row = ids[-(CONTEXT - 6) :]
        want = tokenizer.decode(slow_generate(model, row, 6, temperature=0, eos_id=tokenizer.eos_id))
        assert one == Written(want, len(ids) - len(row))
        stops.add(want[2:4])
    stopped = texts.completions(prompts, sorted(stops), 6)
    for one, other in zip(found, stopped, strict=True):
        assert one.text.startswith(other.text) and not any(stop in other.text for stop in stops)
        assert len(other.text) <= 2
    with pytest.raises(ConfigError, match="48 new tokens leave no room"):
        texts.completions(["a"], [], CONTEXT)


def test_a_model_without_a_context_length_or_a_longer_one_than_it_has_is_refused(tokenizer):
    endless = Fixed([0.0] * tokenizer.num_tokens)
    del endless.config.max_length
    with pytest.raises(ConfigError, match="does not say how long"):
        TextModel(endless, tokenizer)
    assert TextModel(endless, tokenizer, max_length=9).max_length == 9
    with pytest.raises(ConfigError, match="it must be 2 to the model's 16"):
        TextModel(Fixed([0.0] * 300), tokenizer, max_length=17)


class Said:
    """Somebody who answers with prepared spans."""

    def __init__(self, spans):
        self.spans = spans

    def likelihoods(self, pairs):
        assert len(pairs) == len(self.spans)
        return [Span(*one) for one in self.spans]

    def completions(self, prompts, stop, max_new_tokens):
        return [Written(f" {prompt[-1]}\n") for prompt in prompts]


def test_accuracies_their_normalisations_and_errors_are_those_of_the_harness(tokenizer):
    # One right by log-likelihood, one only per character, one only per byte, and a tie, which goes to the first.
    questions = [
        Choice(question="q1", choices=("ab", "cdef"), answer=0),
        Choice(question="q2", choices=("ab", "cdef"), answer=1),
        Choice(question="q3", choices=("abc", "中文"), answer=1, group="bytes"),
        Choice(question="q4", choices=("a", "b"), answer=1),
    ]
    spans = [
        (1.0, 1, 1, 3.0), (3.0, 2, 0, 5.0),  # per character 0.5 against 0.75
        (1.0, 1, 0, 3.0), (1.9, 2, 2, 5.0),  # 0.5 against 0.475
        (1.2, 1, 0, 4.0), (1.5, 2, 1, 7.0),  # 0.4 against 0.75; per byte 0.4 against 0.25
        (1.0, 1, 1, 2.0), (1.0, 1, 1, 2.0),
    ]  # fmt: skip
    result = ask(Task(name="t", questions=tuple(questions), excluded=("x.jsonl:3: bad.",)), Said(spans))
    values = {name: measure.value for name, measure in result.measures.items()}
    assert values == {"accuracy": 0.25, "accuracy_norm": 0.5, "accuracy_bytes": 0.75, "greedy": 0.75}
    error = result.measures["accuracy"].error
    assert error == pytest.approx(math.sqrt(sum((x - 0.25) ** 2 for x in (1, 0, 0, 0)) / 3) / 2)
    assert result.measures["accuracy"].interval is None  # of four questions nobody can say one
    total = result.sums["answer"]
    assert float(total.nats) == pytest.approx(1.0 + 1.9 + 1.5 + 1.0) and float(total.tokens) == 1 + 2 + 2 + 1
    assert total.bits_per_byte == pytest.approx(5.4 / math.log(2) / (3 + 5 + 7 + 2))
    assert (result.number, result.narrow, result.groups["bytes"]["num_questions"]) == (4, 1, 1)
    told = result.as_dict()
    assert told["num_excluded"] == 1 and told["excluded"] == ["x.jsonl:3: bad."]
    json.dumps(told, allow_nan=False)


def test_perplexity_of_a_cloze_is_per_answer_and_its_loss_per_token():
    questions = tuple(Cloze(text="t", answer=str(n)) for n in range(12))
    nats = [0.1 * n for n in range(12)]
    result = ask(Task(name="t", questions=questions), Said([(n, 3, 3 * (n < 0.25), 4.0) for n in nats]))
    assert result.measures["perplexity"].value == pytest.approx(math.exp(sum(nats) / 12))
    assert result.measures["accuracy"].value == 3 / 12
    assert result.sums["answer"].mean == pytest.approx(sum(nats) / 36)
    low, high = result.measures["perplexity"].interval
    draws = np.random.default_rng(5).choice(nats, (4000, 12)).mean(axis=1)
    assert low == pytest.approx(math.exp(np.quantile(draws, 0.025)), rel=0.05)
    assert high == pytest.approx(math.exp(np.quantile(draws, 0.975)), rel=0.05)


def test_white_space_around_what_is_written_does_not_count():
    questions = tuple(Completion(prompt=f"p{n}", answer=str(n % 2)) for n in range(4))
    result = ask(Task(name="t", questions=questions), Said([]))
    assert result.measures["exact_match"].value == 0.5
    assert [o.said for o in result.outcomes] == ["0", "1", "2", "3"]


def test_a_task_that_cannot_be_asked_is_a_result_with_its_reason(model, tokenizer):
    texts = TextModel(model, tokenizer)
    assert "has no question" in ask(Task(name="t", questions=()), texts).failure
    few = Task(name="t", questions=(Cloze(text="a", answer="b"),))
    assert "1 shots need as many other questions; there are 0" in ask(few, texts, shots=1).failure
    broken = Fixed([math.nan] * tokenizer.num_tokens)
    assert "CheckFailed: The log-likelihood" in ask(few, TextModel(broken, tokenizer)).failure


RANKS = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from minilm.data.tokenizer import Tokenizer
from minilm.models import folder
from minilm.evaluation.tasks.arithmetic import TextModel
from minilm.evaluation.tasks import built_in, files
from minilm.evaluation.tasks.asking import ask
state = PartialState(cpu=True)
reader = TextModel(folder.load({model!r}), Tokenizer.load({tokenizer!r}), batch_rows=3)
names = ("addition", "copying", "induction")
tasks = [built_in.make(n, tokenizer=reader.tokenizer, context=48, number=13) for n in names]
tasks += [files.read({file!r}).task()]
found = [ask(task, reader).as_dict() for task in tasks]
open({out!r} + str(state.process_index), "w").write(json.dumps(found))
state.destroy_process_group()
"""


def test_two_processes_say_what_one_says(model, tokenizer, tmp_path: Path):
    import forked

    from minilm.models import folder

    folder.save(model, tmp_path / "model")
    tokenizer.save(tmp_path / "tokenizer")
    lines = [{"prompt": f"the cat {word}", "answer": "x", "max_new_tokens": 4} for word in ("sat", "on", "a")]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    script = tmp_path / "ranks.py"
    places = {
        name: str(tmp_path / name) for name in ("model", "tokenizer", "out")
    } | {"file": str(tmp_path / "c.jsonl"), "tests": str(Path(__file__).parent)}  # fmt: skip
    script.write_text(RANKS.format(**places))
    done = forked.run(script, [], launcher="cpu2.yaml")
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"out{n}").read_text()) for n in (0, 1)]
    assert ranks[0] == ranks[1]
    reader = TextModel(model, tokenizer)
    names = ("addition", "copying", "induction")
    tasks = [built_in.make(n, tokenizer=tokenizer, context=CONTEXT, number=13) for n in names]
    alone = [ask(task, reader).as_dict() for task in [*tasks, files.read(tmp_path / "c.jsonl").task()]]
    assert [t["num_questions"] for t in alone] == [13, 13, 13, 3]
    for one, other in zip(alone, ranks[0], strict=True):
        for name, measure in one["measures"].items():
            assert measure["value"] == pytest.approx(other["measures"][name]["value"], rel=1e-6, abs=1e-6)
        for group, means in one["groups"].items():
            assert means == pytest.approx(other["groups"][group], abs=1e-6)
        for name, loss in one["losses"].items():
            assert loss["nats"] == pytest.approx(other["losses"][name]["nats"], rel=1e-6)
