"""`minilm generate --interactive`, through a pipe and in a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from evaluation_checkpoint import make_run

from minilm.__main__ import main
from minilm.evaluation.generate import generate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("loop"))


@pytest.fixture
def talk(made, capsys, monkeypatch):
    def run(lines, *flags):
        given = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        asked = ["--checkpoint", str(made.run_folder), "--device", "cpu", "--max-new-tokens", "12"]
        code = main(["generate", *asked, "--interactive", *flags])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def texts(made, *asked):
    """(prompt, options) -> the text that `generate` gives alone."""
    return [
        generate(
            made.model,
            [made.tokenizer.prompt(prompt)],
            **{"max_new_tokens": 12, "temperature": 0.8, **options},
            eos_id=made.tokenizer.eos_id,
            tokenizer=made.tokenizer,
        )[0].text
        for prompt, options in asked
    ]


def test_each_line_of_a_pipe_is_continued_with_the_next_seed_and_only_text_goes_to_stdout(made, talk):
    code, out, err = talk(["the cat", "", "dog", "//x"], "--seed", "4")
    want = texts(made, ("the cat", {"seed": 4}), ("dog", {"seed": 5}), ("/x", {"seed": 6}))
    assert (code, out) == (0, "".join(text + "\n" for text in want))
    assert ">" not in out and "Ctrl-D" not in err


def test_commands_change_what_follows(made, talk):
    commands = [
        "/set temperature 0",
        "the",
        "/set temperature 2",
        "/set top_k 9",
        "/set min_p 0.1",
        "/seed 7",
        "the",
    ]
    code, out, _ = talk([*commands, "/set top_k none", "/set min_p none", "/seed 7", "the", "/quit", "never"])
    want = texts(
        made,
        ("the", {"temperature": 0}),
        ("the", {"temperature": 2.0, "top_k": 9, "min_p": 0.1, "seed": 7}),
        ("the", {"temperature": 2.0, "seed": 7}),
    )
    assert (code, out) == (0, "".join(text + "\n" for text in want)) and len(set(want)) == 3


def test_a_stop_string_may_be_set_with_escapes(made, talk):
    (text,) = texts(made, ("the", {"temperature": 0}))
    stop = text[3:5]
    _, out, err = talk(
        ["/set temperature 0", f"/set stop {json.dumps(stop)}", "/show", "the", "/set stop none", "the"]
    )
    assert out == text[: text.index(stop)] + "\n" + text + "\n"
    assert f"stop {json.dumps(stop, ensure_ascii=False)}\n" in err


def test_what_is_wrong_is_told_with_its_line_and_the_others_go_on(made, talk):
    lines = [
        b"the",
        b"/set heat 3",
        b"/set top_k x",
        b"/set min_p 7",
        b"/nothing",
        b'/set stop "',
        b"a" * 900,
        b"caf\xe9",
        b"the",
    ]
    code, out, err = talk(b"\n".join(lines), "--temperature", "0")
    (text,) = texts(made, ("the", {"temperature": 0}))
    assert (code, out) == (1, f"{text}\n{text}\n")
    told = dict(re.findall(r"^Line (\d+): (.*)$", err, re.M))
    wanted = {
        "2": "no setting 'heat'",
        "3": "top_k is 'x'",
        "4": "min_p is 7.0",
        "5": "no command /nothing",
        "6": "quotes that do not close",
        "7": "needs a context of",
        "8": "not UTF-8 (byte 3",
    }
    assert told.keys() == wanted.keys() and all(part in told[line] for line, part in wanted.items())
    assert "Traceback" not in err


def test_wrong_flags_are_refused_before_the_first_line(talk):
    code, out, err = talk(["the"], "--top-k", "0", "--min-p", "4")
    assert (code, out) == (2, "") and "2 problems" in err


def test_json_gives_one_object_a_line(made, talk):
    code, out, _ = talk(["the", "dog"], "--json", "--logprobs", "--seed", "3")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(r["prompt"], r["seed"]) for r in records] == [("the", 3), ("dog", 4)]
    assert [r["text"] for r in records] == texts(made, ("the", {"seed": 3}), ("dog", {"seed": 4}))
    assert all(len(r["logprobs"]) == len(r["tokens"]) for r in records)


def test_help_rate_and_log_probabilities_go_to_stderr(made, talk):
    _, out, err = talk(
        ["/help", "/rate", "/logprobs", "the", "/rate", "/logprobs", "the"], "--temperature", "0"
    )
    (text,) = texts(made, ("the", {"temperature": 0}))
    assert out == f"{text}\n{text}\n"
    assert "/set NAME VALUE" in err and err.count("tokens/s") == 1 and err.count("logprob ") >= 1


class Terminal:
    """The program in a terminal of its own."""

    def __init__(self, *flags):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "minilm", "generate", "--interactive", "--device", "cpu", *flags]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        self.shown = ""

    def until(self, pattern, seconds=60):
        """Read until the pattern comes; what was read up to its end is forgotten."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.shown!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.shown += os.read(self.master, 4096).decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, text):
        os.write(self.master, text.encode())

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_in_a_terminal_ctrl_c_stops_the_text_and_ctrl_d_the_program(made):
    flags = "--checkpoint", str(made.run_folder), "--max-new-tokens", "125", "--temperature", "2"
    terminal = Terminal(*flags)
    try:
        terminal.until("Ctrl-D ends")
        terminal.until("> ")
        stopped = False
        for _ in range(20):  # a text may be over before the signal comes
            terminal.type("t\n")
            terminal.until("t\r\n.")
            os.kill(terminal.process.pid, signal.SIGINT)
            stopped = "(stopped)" in terminal.until("> ")
            if stopped:
                break
        assert stopped and terminal.process.poll() is None
        terminal.type("/set max_new_tokens 3\n")
        terminal.until("> ")
        terminal.type("half a line")
        terminal.until("half a line")
        time.sleep(0.3)  # Python's readline looks for signals only while it waits for a key
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()
