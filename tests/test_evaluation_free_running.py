"""Free-running continuations: what is written, what it is held against, what the user reads; continuations' losses."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluation_checkpoint import make_run
from evaluation_reference import Scripted, slow_generate, tiny_model, token_losses
from rich.console import Console

from minilm.errors import ConfigError
from minilm.evaluation import free_running, free_writing, text_metrics
from minilm.evaluation.free_running_page import FreeRunning
from minilm.evaluation.free_writing import Writing, continue_freely
from minilm.evaluation.heldout import How
from minilm.evaluation.score import continuation

ROOT = Path(__file__).parent.parent
P, N = 5, 6


class Documents:
    """As much of held-out data as is needed: documents of tokens."""

    def __init__(self, documents):
        self.documents, self.num_documents = documents, len(documents)

    def token_documents(self, numbers, most_tokens):
        return [list(self.documents[n][:most_tokens]) for n in numbers]


def documents(number=12, length=P + N, vocab=290, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=draw).tolist() for _ in range(number)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("free"))


@pytest.fixture(scope="module")
def entry():
    spec = importlib.util.spec_from_file_location("eval_entry", ROOT / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def caught(monkeypatch):
    """The `Written` texts that were measured, greedy ones first."""
    seen = []
    real = free_writing.against_truth

    def against(written, **options):
        seen.append(list(written))
        return real(written, **options)

    monkeypatch.setattr(free_writing, "against_truth", against)
    return seen


# ---------------------------------------------------------------- teacher-forced


def test_a_continuations_loss_is_the_full_loss_restricted_to_its_tokens(made):
    """Two loops in float64: over documents, and over the tokens of each after the prompt."""
    for p in (1, 7):
        found = continuation(made.model, made.tokenizer, made.texts, [p], N)[p]
        nats, count = 0.0, 0
        for text in made.texts:
            tokens = made.tokenizer.document(text)
            if len(tokens) < p + N:
                continue
            losses = token_losses(made.model, tokens[:100])  # losses[i - 1]: of token i
            for i in range(p, p + N):
                nats, count = nats + losses[i - 1], count + 1
        assert found.loss == pytest.approx(nats / count, rel=1e-6) and found.num_tokens == count


# ---------------------------------------------------------------- what is written


def test_texts_are_those_of_a_generator_without_cache_and_follow_their_own_seeds(caught):
    model, data = tiny_model(), documents(7)
    writing = Writing(documents=7, samples=3, temperature=0.9, top_k=40, seed=11)
    continue_freely(model, None, Documents(data), P, N, writing, How(batch_rows=4))
    greedy, sampled = caught
    for number, document in enumerate(data):
        assert list(greedy[number].tokens) == slow_generate(model, document[:P], N, temperature=0)
        assert list(greedy[number].truth) == document[P:] and list(greedy[number].prompt) == document[:P]
        for s in range(3):
            expected = slow_generate(
                model, document[:P], N, temperature=0.9, top_k=40, seed=11 + number * 3 + s
            )
            assert list(sampled[3 * number + s].tokens) == expected


@pytest.mark.parametrize("batch_rows", [1, 5, 64])
def test_the_batch_size_changes_nothing(batch_rows):
    model, data, writing = tiny_model(), documents(7), Writing(documents=7, samples=2, seed=3)
    one = continue_freely(model, None, Documents(data), P, N, writing, How(batch_rows=3))
    other = continue_freely(model, None, Documents(data), P, N, writing, How(batch_rows=batch_rows))
    assert [line.samples for line in one.lines] == [line.samples for line in other.lines]
    assert one.sampled.values == other.sampled.values
    assert [a.loss for a in one.lines] == pytest.approx([b.loss for b in other.lines], rel=1e-6)


def test_two_processes_share_the_documents_and_both_have_all_texts(monkeypatch):
    """Each process writes its own run of documents; what the other one would write is added to it."""
    model, writing = tiny_model(), Writing(documents=5, samples=2, seed=3)
    prompts = [d[:P] for d in documents(5)]
    whole = free_writing._Writer(model, prompts, N, None, How()).write(writing, 2)
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda table: sent.append(table.clone()))
    monkeypatch.setattr(free_writing, "device_of_messages", lambda: torch.device("cpu"))
    for rank in range(2):
        monkeypatch.setattr(free_writing, "processes", lambda rank=rank: (rank, 2))
        free_writing._Writer(model, prompts, N, None, How()).write(writing, 2)
    assert ((sent[0] > 0).any(dim=(1, 2)) == torch.tensor([True, True, False, False, False])).all()
    assert (sum(sent) - 1).tolist() == whole


def test_a_text_ends_with_eos_and_the_truth_may_too(caught):
    tokenizer = SimpleNamespace(eos_id=2)
    tokenizer_free = [[9, 9, 9, 9, 9, 5, 6, 7, 8, 9, 2]] * 3
    model = Scripted([5, 6, 2], 12, prompt_tokens=P)
    found = continue_freely(model, None, Documents(tokenizer_free), P, N, Writing(documents=3))
    assert found.greedy.values["ended"].value == 0, "without a tokenizer no token ends a text"
    written = free_writing._Writer(model, [tokenizer_free[0][:P]], N, tokenizer.eos_id, How()).write(
        Writing(temperature=0), 1
    )
    assert written == [[[5, 6, 2]]]
    texts = free_writing._written(None, [(0, tokenizer_free[0])], P, written, 2)
    assert texts[0].ended and texts[0].truth_ended and texts[0].text == "5 6 2"


def test_the_loss_of_a_line_is_that_of_the_truth_after_its_prompt():
    model, data = tiny_model(), documents(4)
    found = continue_freely(model, None, Documents(data), P, N, Writing(documents=4))
    for line, document in zip(found.lines, data, strict=True):
        expected = token_losses(model, document)[P - 1 :]
        assert len(expected) == N and line.loss == pytest.approx(math.fsum(expected) / N, rel=1e-5)


def test_a_perfect_model_is_told_so():
    truth = [5, 6, 7, 8, 9, 10]
    data = [[1, 2, 3, 4, 11, *truth]] * 12
    found = continue_freely(Scripted(truth, 12, P), None, Documents(data), P, N, Writing(documents=12))
    values = {name: measured.value for name, measured in found.greedy.values.items()}
    assert (values["exact_match"], values["token_accuracy"], values["rouge_l"]) == (1, 1, 1)
    assert values["edit_distance_tokens"] == 0 and found.greedy.by_position == [1.0] * N
    assert values["bleu"] == pytest.approx(100) and found.warnings == []


# ---------------------------------------------------------------- warnings


def test_a_generator_that_repeats_its_prompt_is_warned_of(monkeypatch):
    """The incident: the first tokens of the whole text in place of the new ones."""
    real = free_writing.generate

    def repeating(model, prompts, **options):
        results = real(model, prompts, **options)
        return [SimpleNamespace(tokens=r.prompt[-N:]) for r in results]

    data = Documents(documents(length=8 + N))
    assert continue_freely(tiny_model(), None, data, 8, N, Writing(documents=12)).warnings == []
    monkeypatch.setattr(free_writing, "generate", repeating)
    found = continue_freely(tiny_model(), None, data, 8, N, Writing(documents=12))
    assert any("100% of the 12 greedy texts only repeat their prompt" in w for w in found.warnings)


def test_a_model_that_collapsed_to_one_token_is_warned_of():
    found = continue_freely(Scripted([4] * N, 12, P), None, Documents(documents(vocab=12)), P, N, Writing())
    assert any("are one token again and again" in w for w in found.warnings)
    assert any("the same greedy text follows all 12 prompts" in w for w in found.warnings)


def test_text_that_repeats_itself_in_truth_is_no_reason_for_a_warning():
    data = [[n] * (P + N) for n in range(3, 11)]
    found = continue_freely(Scripted([4] * N, 12, P), None, Documents(data), P, N, Writing())
    assert not any("one token" in w or "repeat" in w for w in found.warnings)


# ---------------------------------------------------------------- hostile input


@pytest.mark.parametrize(
    ("p", "n", "said"),
    [
        (0, N, "a prompt length is 0"),
        (P, 0, "continuation tokens is 0"),
        (500, 500, "need a context of 999 tokens"),
    ],
)
def test_lengths_that_mean_nothing_are_refused_before_anything_is_computed(p, n, said):
    with pytest.raises(ConfigError, match=said):
        continue_freely(tiny_model(), None, Documents(documents()), p, n, Writing())


@pytest.mark.parametrize("data", [[], [[4, 5, 6]] * 3])
def test_data_without_a_long_enough_document_says_so_and_ends_nothing(data):
    found = continue_freely(tiny_model(), None, Documents(data), P, N, Writing())
    assert found.num_excluded == len(data)
    assert found.warnings == [f"none of {len(data)} documents has {P + N} tokens: nothing was written"]
    shown = printed(FreeRunning(writing=Writing(), results=[found]))
    assert "WARNING: none of" in shown


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        Writing(documents=0, samples=-1, temperature=-2.0, top_p=3.0)
    for said in ("documents are 0", "samples per prompt is -1", "temperature is -2.0", "top_p is 3.0"):
        assert said in str(error.value)
    with pytest.raises(ConfigError, match="draws the greedy text every time"):
        Writing(samples=2, temperature=0)


# ---------------------------------------------------------------- the section


def printed(section) -> str:
    out = io.StringIO()
    section.print(Console(file=out, width=300))
    return out.getvalue()


def test_eval_prints_and_writes_texts_and_numbers(made, entry, tmp_path, capsys):
    out, page = tmp_path / "scores.json", tmp_path / "page.html"
    flags = ["--prompt-lengths", "4,8", "--continuation-tokens", "6", "--device", "cpu", "--samples", "0"]
    code = entry.main(
        ["--checkpoint", str(made.run_folder), *flags, "--free-running", "20", "--samples-per-prompt", "2",
         "--top-k", "20", "--json", str(out), "--html", str(page)]
    )  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 0 and "2 per prompt at temperature 0.8, top-k 20, seed 0" in shown
    found = json.loads(out.read_text("utf-8"))["free_running"]
    assert set(found["prompts"]) == {"4", "8"} and found["settings"]["samples"] == 2
    part = found["prompts"]["4"]
    assert set(part["greedy"]) == {*text_metrics.DEFINITIONS, "accuracy_by_position", "across_samples"}
    assert set(part["sampled"]["across_samples"]) == {"self_bleu", "distinct_2", "different"}
    assert set(part["truth"]) == set(text_metrics.OF_ONE_TEXT)
    assert part["sampled"]["exact_match"]["count"] == 2 * part["num_documents"] == 2 * len(part["texts"])
    line = part["texts"][0]
    assert set(line) == {"document", "prompt", "prediction", "samples", "truth", "loss"}
    for text in (line["prediction"], line["truth"], *line["samples"]):
        assert text.split()[0] in shown
    assert "accuracy at token 1:" in shown and "prediction" in page.read_text("utf-8")


def test_text_of_a_model_commands_neither_the_terminal_nor_the_page():
    found = continue_freely(tiny_model(), None, Documents(documents(4)), P, N, Writing(documents=4))
    line = free_writing.Line(
        document=0, prompt="\x1b[31mred", greedy="<script>alert(1)</script>", samples=[], truth="a", loss=1.0
    )
    section = FreeRunning(
        writing=Writing(), results=[free_writing.Continued(**{**vars(found), "lines": [line]})]
    )
    assert "\x1b" not in printed(section)
    assert "<script>" not in section.html() and "&lt;script&gt;" in section.html()


def test_flags_that_make_no_sense_are_refused_before_a_model_is_loaded(entry, capsys):
    code = entry.main(["--checkpoint", "no/such/run", "--samples-per-prompt", "2"])
    assert code == 2 and "--samples-per-prompt needs --free-running" in capsys.readouterr().err
    code = entry.main(
        ["--checkpoint", "no/such/run", "--free-running", "0", "--bleu-tokenize", "words", "--show", "-1"]
    )
    said = capsys.readouterr().err
    assert code == 2 and "documents are 0" in said and "--show is -1" in said


def test_without_the_flag_nothing_is_written(made):
    asked = SimpleNamespace(free_running=None, samples_per_prompt=0)
    assert free_running.sections(asked, None) == [] and free_running.problems(asked) == []
