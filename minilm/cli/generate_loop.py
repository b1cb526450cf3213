"""`minilm generate --interactive`: one prompt after the other, in a terminal or through a pipe."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from minilm.cli.generate import record, told
from minilm.errors import ConfigError, DataError, MinilmError

HELP = """\
A line is a prompt; its continuation follows. A line that begins with // is a prompt that begins with /.
  /set NAME VALUE   temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens, min_new_tokens, stop;
                    VALUE none leaves the choice out; a stop string with line ends is written in quotes: "\\n\\n"
  /seed N           the next text is drawn with seed N, the one after it with N + 1
  /show             all settings
  /logprobs, /rate  log-probabilities after each text, tokens per second: on and off
  /help, /quit      this; the end (also Ctrl-D)
Ctrl-C stops a text and not the program."""
INTEGERS = "top_k", "max_new_tokens", "min_new_tokens"
NUMBERS = "temperature", "top_p", "min_p", "repetition_penalty"
REMOVABLE = "top_k", "top_p", "min_p", "stop"


def loop(model: Any, tokenizer: Any, options: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Answer the lines of stdin until they end; returns the exit code. `options` are those of `stream`.

    A prompt that cannot be continued is told and skipped. From a pipe, where nobody may read along, it makes the exit
    code 1 in the end. Raises ConfigError for options that mean nothing, before the first line is read.
    """
    return _Loop(model, tokenizer, options, arguments).run()


class _Loop:
    def __init__(
        self, model: Any, tokenizer: Any, options: dict[str, Any], arguments: argparse.Namespace
    ) -> None:
        self.model, self.tokenizer, self.options, self.json = model, tokenizer, options, arguments.json
        self.logprobs, self.rate = arguments.logprobs, arguments.rate
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.commands: dict[str, Callable[[str], None]] = {
            "set": self._set,
            "seed": self._seed,
            "show": self._show,
            "logprobs": self._logprobs,
            "rate": self._rate,
            "help": lambda _: _say(HELP),
        }

    def run(self) -> int:
        _checked(self.options)
        if self.terminal:
            import readline  # line editing and history in `input`

            readline.set_auto_history(True)
            _say("A line is a prompt; /help tells more, Ctrl-D ends.")
        failed, number = False, 0
        while True:
            number += 1
            try:
                line = self._line(number)
                if line is None or line.strip() == "/quit":
                    return int(failed and not self.terminal)
                self._answer(line)
            except KeyboardInterrupt:
                if not self.terminal:
                    return 130
                _say("")  # in the middle of a line that was being typed
            except MinilmError as error:
                failed = True
                _say(str(error) if self.terminal else f"Line {number}: {error}")

    def _line(self, number: int) -> str | None:
        """The next line without its end; None at the end of the input. Raises DataError for what is not UTF-8."""
        if self.terminal:
            try:
                return input("> ")
            except EOFError:
                _say("")
                return None
        raw = sys.stdin.buffer.readline()
        try:
            return raw.decode("utf-8").removesuffix("\n").removesuffix("\r") if raw else None
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 (byte {error.start} of line {number}).") from error

    def _answer(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].strip().partition(" ")
            if name not in self.commands:
                raise ConfigError(f"There is no command /{name}; /help lists them.")
            self.commands[name](rest.strip())
            return
        self._continue(line[1:] if line.startswith("//") else line)

    def _continue(self, prompt: str) -> None:
        from minilm.evaluation.generate import stream

        pieces = stream(self.model, self.tokenizer, prompt, **self.options)
        begun = time.perf_counter()
        try:
            for piece in pieces:
                if not self.json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            _say("\n(stopped)")
        finally:
            pieces.close()
        seconds = time.perf_counter() - begun
        if self.json:
            found = record(self.tokenizer, prompt, pieces.result, self.options["seed"], self.logprobs)
            print(json.dumps(found), flush=True)
        else:
            print(flush=True)
        told(self.tokenizer, pieces.result, seconds, self.logprobs and not self.json, self.rate)
        self.options["seed"] += 1

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        changed = self.options | {name: _value(name, value.strip())}
        _checked(changed)
        self.options = changed

    def _seed(self, rest: str) -> None:
        changed = self.options | {"seed": _number("seed", rest, int)}
        _checked(changed)
        self.options = changed

    def _show(self, _: str) -> None:
        _say("\n".join(f"{name} {_shown(value)}" for name, value in self.options.items()))

    def _logprobs(self, _: str) -> None:
        self.logprobs = not self.logprobs

    def _rate(self, _: str) -> None:
        self.rate = not self.rate


def _checked(options: dict[str, Any]) -> None:
    """Raises ConfigError for settings that mean nothing."""
    from minilm.evaluation.prompts import checked_stop
    from minilm.evaluation.sampling import Sampling

    checked_stop(options["stop"], tokenizer=True)
    Sampling(**{name: value for name, value in options.items() if name != "stop"})


def _value(name: str, text: str) -> Any:
    if name not in (*INTEGERS, *NUMBERS, "stop"):
        raise ConfigError(f"There is no setting {name!r}; /help lists them.")
    if text == "none" and name in REMOVABLE:
        return [] if name == "stop" else None
    if name != "stop":
        return _number(name, text, int if name in INTEGERS else float)
    if not text.startswith('"'):
        return [text]
    try:
        return [str(json.loads(text))]
    except ValueError as error:
        raise ConfigError(f"stop is {text}: quotes that do not close, or an unknown escape.") from error


def _number(name: str, text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        wanted = "an integer" if kind is int else "a number"
        raise ConfigError(f"{name} is {text!r}; it must be {wanted}.") from error


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(json.dumps(text, ensure_ascii=False) for text in value) or "none"
    return "none" if value is None else str(value)


def _say(text: str) -> None:
    """On stderr: stdout has the texts alone."""
    print(text, file=sys.stderr, flush=True)
