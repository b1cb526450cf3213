"""`minilm generate` as a user calls it: stdout has the text alone, Ctrl-C ends it cleanly, errors are paragraphs."""

from __future__ import annotations

import io
import json
import sys

import pytest
from evaluation_checkpoint import make_run

import minilm.evaluation.generate as generation
from minilm.__main__ import main
from minilm.evaluation.generate import generate
from minilm.evaluation.text import text_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def call(made, capsys):
    def run(*flags):
        code = main(["generate", "--checkpoint", str(made.run_folder), "--device", "cpu", *flags])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def expected(made, prompt, seeds=(0,), max_new_tokens=20, **options):
    tokens = made.tokenizer.prompt(prompt)
    return [
        text_of(
            made.tokenizer,
            generate(
                made.model,
                [tokens],
                max_new_tokens=max_new_tokens,
                seed=s,
                eos_id=made.tokenizer.eos_id,
                **options,
            )[0].tokens,
        )
        for s in seeds
    ]


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_stdout_is_the_prompt_and_the_text_and_nothing_else(made, call, how):
    code, out, err = call("--prompt", "the cat 中", "--max-new-tokens", "20", "--temperature", "0", how)
    (text,) = expected(made, "the cat 中", temperature=0)
    assert (code, out) == (0, "the cat 中" + text + "\n")
    assert "step 7" in err


def test_streamed_and_joint_samples_are_the_same_and_sample_i_is_seed_plus_i(made, call):
    flags = (
        "--prompt",
        "dog",
        "--max-new-tokens",
        "20",
        "--num-samples",
        "3",
        "--seed",
        "5",
        "--top-k",
        "40",
    )
    texts = expected(made, "dog", seeds=(5, 6, 7), temperature=0.8, top_k=40)
    assert len(set(texts)) == 3
    for how in ("--stream", "--no-stream"):
        code, out, _ = call(*flags, how)
        assert (code, out) == (0, "".join(f"dog{text}\n" for text in texts))
    code, out, _ = call(*flags, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["text"] for r in records] == texts and [r["seed"] for r in records] == [5, 6, 7]
    for record in records:
        assert len(record["tokens"]) == len(record["nats"]) <= 20 and record["stopped"] in ("eos", "length")


def test_text_comes_before_the_end(made, monkeypatch):
    """Each piece is flushed before the next token is computed."""
    flushed: list[str] = []

    class Watched(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Watched())
    flags = [
        "--checkpoint",
        str(made.run_folder),
        "--device",
        "cpu",
        "--prompt",
        "the",
        "--max-new-tokens",
        "30",
    ]
    assert main(["generate", *flags]) == 0
    assert len(set(flushed)) > 10 and flushed[0] == "the"


def test_the_prompt_from_a_file_or_stdin_goes_in_as_it_is(made, call, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"two\nlines  \n")
    (text,) = expected(made, "two\nlines  ", temperature=0)
    flags = ("--max-new-tokens", "20", "--temperature", "0")
    assert call("--prompt-file", str(path), *flags)[1] == "two\nlines  " + text + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert call("--prompt-file", "-", *flags)[1] == "two\nlines  " + text + "\n"


def test_no_prompt_starts_a_new_document(made, call):
    assert (
        call("--max-new-tokens", "20", "--temperature", "0")[1] == expected(made, "", temperature=0)[0] + "\n"
    )


def test_ctrl_c_ends_the_line_and_exits_130(call, monkeypatch):
    real, numbers = generation.TextStream.__next__, iter(range(100))

    def interrupted(pieces):
        if next(numbers) == 3:
            raise KeyboardInterrupt
        return real(pieces)

    monkeypatch.setattr(generation.TextStream, "__next__", interrupted)
    code, out, err = call("--prompt", "the", "--max-new-tokens", "50")
    assert code == 130 and out.startswith("the") and out.endswith("\n") and "Traceback" not in err


def test_bfloat16_weights_generate(call):
    code, out, err = call("--prompt", "the", "--max-new-tokens", "5", "--dtype", "bfloat16")
    assert code == 0 and out.startswith("the") and "bfloat16" in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "/nowhere"], "/nowhere"),
        (["--max-new-tokens", "500"], "the model has 128"),
        (["--top-k", "0", "--top-p", "2", "--temperature", "-1"], "3 problems"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--min-p", "2", "--repetition-penalty", "0", "--min-new-tokens", "-1"], "3 problems"),
        (["--stop", ""], "stop string is ''"),
        (["--prompt-file", "/nowhere.txt"], "cannot be read"),
        (["--prompt", "half a character \udc80"], "surrogate"),
    ],
)
@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_every_refusal_is_a_paragraph_and_exit_code_2(call, flags, message, how):
    code, out, err = call(*flags, how)
    assert (code, out) == (2, "") and message in " ".join(err.split()) and "Traceback" not in err


def test_a_prompt_file_that_is_not_utf8_names_the_line(call, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"line\ncaf\xe9\n")
    code, _, err = call("--prompt-file", str(path))
    assert code == 2 and "line 2" in err


def test_stop_strings_penalty_and_log_probabilities_reach_the_generator(made, call):
    flags = ("--prompt", "the", "--max-new-tokens", "20", "--temperature", "0", "--repetition-penalty", "1.2")
    options = {"temperature": 0, "repetition_penalty": 1.2}
    (text,) = expected(made, "the", **options)
    stop = text[5:7]
    for how in ("--stream", "--no-stream"):
        code, out, err = call(*flags, "--stop", "not there", "--stop", stop, "--logprobs", "--rate", how)
        assert (code, out) == (0, "the" + text[: text.index(stop)] + "\n")
        lines = err.splitlines()
        assert lines[1].split() == ["logprob", "drawn", "token"] and "tokens/s" in lines[-1]
    record = json.loads(call(*flags, "--stop", stop, "--json", "--logprobs")[1])
    assert record["stopped"] == "stop" and record["text"] == text[: text.index(stop)]
    assert len(lines) == len(record["tokens"]) + 3
    assert [entry["token"] for entry in record["logprobs"]] == record["tokens"]
    assert [-entry["logprob"] for entry in record["logprobs"]] == record["nats"]
    assert record["drawn_nats"] == [0] * len(record["tokens"])
    (plain,) = expected(made, "the", temperature=0)
    assert text != plain, "the penalty must change something for this to mean something"


@pytest.mark.parametrize(
    "flags", [["--prompt", "a"], ["--prompt-file", "-"], ["--num-samples", "2"], ["--no-stream"]], ids=str
)
def test_what_makes_no_sense_with_a_loop_is_refused(call, flags):
    code, out, err = call("--interactive", *flags)
    assert (code, out) == (2, "") and f"{flags[0]} makes no sense with --interactive" in err
