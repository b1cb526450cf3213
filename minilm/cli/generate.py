"""`minilm generate`: text from a checkpoint, as it comes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.cli.model_flags import add_checkpoint, add_dtype, add_store
from minilm.errors import ConfigError, DataError, listed

if TYPE_CHECKING:
    from minilm.evaluation.generate import Generated

DESCRIPTION = """\
Continue a prompt with a trained model. Only the text goes to stdout: the prompt and what follows.

  minilm generate --checkpoint runs/first --prompt "def main("
  minilm generate --checkpoint runs/first --prompt-file start.txt --temperature 0 --max-new-tokens 256
  minilm generate --checkpoint runs/first --num-samples 3 --seed 7 --json > samples.jsonl
  minilm generate --checkpoint runs/first --interactive

Sample i is drawn with seed + i, so that any one of several can be drawn again alone. The order of the choices is
repetition penalty, temperature, top-k, top-p, min-p. A text ends before a stop string. Ctrl-C ends a text.

With --interactive each line of stdin is a prompt, in a terminal or through a pipe; /help tells the commands.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_prompt(sub)
    _add_choices(sub)
    arg = sub.add_argument
    arg("--num-samples", type=int, default=1, metavar="N", help="texts to generate (default: 1)")
    arg(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print text as it comes, one sample after the other; --no-stream computes all together",
    )
    arg(
        "--json",
        action="store_true",
        help="one JSON object a line: prompt, text, tokens, nats, drawn_nats, stopped, seed",
    )
    arg(
        "--logprobs",
        action="store_true",
        help="log-probability of each new token, under the model and as it was drawn: on stderr, or in the JSON",
    )
    arg("--rate", action="store_true", help="tokens per second, on stderr")
    arg("--interactive", action="store_true", help="one prompt after the other, from stdin")
    arg("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    add_dtype(sub)
    sub.set_defaults(run=run)


def _add_prompt(sub: argparse.ArgumentParser) -> None:
    """What continues what."""
    add_checkpoint(sub)
    add_store(sub)
    prompt = sub.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue (default: empty, a new document)")
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="the prompt is this file (- is stdin), without one line end at its end",
    )


def _add_choices(sub: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and how many."""
    arg = sub.add_argument
    arg(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="stop after so many tokens (default: 128)",
    )
    arg("--temperature", type=float, default=0.8, help="0: always the most probable token (default: 0.8)")
    arg("--top-k", type=int, metavar="K", help="choose among the K most probable tokens (default: all)")
    arg(
        "--top-p",
        type=float,
        metavar="P",
        help="choose among the fewest tokens that reach probability P (default: all)",
    )
    arg(
        "--min-p",
        type=float,
        metavar="P",
        help="choose among tokens at least P times as probable as the most probable (default: all)",
    )
    arg(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="make tokens that were there already less probable (default: 1, no change)",
    )
    arg(
        "--min-new-tokens",
        type=int,
        default=0,
        metavar="N",
        help="no end of text before so many tokens (default: 0)",
    )
    arg(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before this string; may be given several times",
    )
    arg("--seed", type=int, default=0, help="of the choices (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Generate; returns the exit code. Raises MinilmError for everything that a user can set right."""
    _refuse_contradictions(arguments)
    prompt = "" if arguments.interactive else _prompt(arguments)

    import torch

    from minilm.manifest import UNCHECKED, unchecked
    from minilm.run import load_checkpoint

    cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not cuda:
        raise ConfigError("--device cuda was asked for, but torch sees no GPU here.")
    device = "cuda" if cuda and arguments.device != "cpu" else "cpu"
    loaded = load_checkpoint(
        arguments.checkpoint, device=device, weights=arguments.weights, knowledge=arguments.store
    )
    if loaded.tokenizer is None:
        raise DataError(
            f"The checkpoint {loaded.folder} has no tokenizer: it was trained on token ids, so there is no "
            "text to generate."
        )
    model = loaded.model.to(getattr(torch, arguments.dtype))
    print(f"{loaded.folder}, step {loaded.step}, {device} {arguments.dtype}", file=sys.stderr, flush=True)
    if unchecked(loaded.run_folder):
        print(UNCHECKED, file=sys.stderr, flush=True)
    # Text that the terminal's encoding cannot show must not end the program in the middle.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    if arguments.interactive:
        from minilm.cli.generate_loop import loop

        return loop(model, loaded.tokenizer, options(arguments), arguments)
    if arguments.json or not arguments.stream:
        return _together(model, loaded.tokenizer, prompt, arguments)
    return _streamed(model, loaded.tokenizer, prompt, arguments)


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    found = []
    if arguments.num_samples < 1:
        found.append(f"--num-samples is {arguments.num_samples}; it must be at least 1.")
    if arguments.interactive:
        given = {"--prompt": arguments.prompt, "--prompt-file": arguments.prompt_file}
        found += [
            f"{flag} makes no sense with --interactive: prompts come from stdin, one a line."
            for flag, value in given.items()
            if value is not None
        ]
        if arguments.num_samples > 1:
            found.append("--num-samples makes no sense with --interactive: ask again for another sample.")
        if not arguments.stream:
            found.append("--no-stream makes no sense with --interactive; --json gives whole texts.")
    if found:
        raise ConfigError(listed(found))


def _streamed(model: Any, tokenizer: Any, prompt: str, arguments: argparse.Namespace) -> int:
    from minilm.evaluation.generate import stream

    for number in range(arguments.num_samples):
        own = options(arguments) | {"seed": arguments.seed + number}
        pieces = stream(model, tokenizer, prompt, **own)  # raises here, before anything is printed
        _heading(number, arguments.num_samples)
        begun = time.perf_counter()
        try:
            sys.stdout.write(prompt)
            sys.stdout.flush()
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        finally:
            pieces.close()
            sys.stdout.write("\n")
            sys.stdout.flush()
        told(tokenizer, pieces.result, time.perf_counter() - begun, arguments.logprobs, arguments.rate)
    return 0


def _together(model: Any, tokenizer: Any, prompt: str, arguments: argparse.Namespace) -> int:
    from minilm.evaluation.generate import generate

    begun = time.perf_counter()
    results = generate(
        model,
        [tokenizer.prompt(prompt)] * arguments.num_samples,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        tokenizer=tokenizer,
        **options(arguments),
    )
    seconds = time.perf_counter() - begun
    for number, result in enumerate(results):
        if arguments.json:
            found = record(tokenizer, prompt, result, arguments.seed + number, arguments.logprobs)
            print(json.dumps(found), flush=True)
        else:
            _heading(number, len(results))
            print(prompt + result.text, flush=True)
            told(tokenizer, result, 0.0, arguments.logprobs, rate=False)
    if arguments.rate:
        print(_rate(sum(len(r.tokens) for r in results), seconds), file=sys.stderr, flush=True)
    return 0


def record(tokenizer: Any, prompt: str, result: Generated, seed: int, logprobs: bool) -> dict[str, Any]:
    """A text as an object of JSON."""
    found: dict[str, Any] = {
        "prompt": prompt,
        "text": result.text,
        "tokens": result.tokens,
        "nats": [round(n, 6) for n in result.nats],
        "drawn_nats": [round(n, 6) for n in result.drawn_nats],
        "stopped": result.stopped,
        "seed": seed,
    }
    if logprobs:
        found["logprobs"] = [
            {"token": token, "text": text, "logprob": -round(nats, 6), "drawn_logprob": -round(drawn, 6)}
            for token, text, nats, drawn in _by_token(tokenizer, result)
        ]
    return found


def told(tokenizer: Any, result: Generated, seconds: float, logprobs: bool, rate: bool) -> None:
    """What was asked for beside the text: on stderr, so that stdout has the text alone."""
    if logprobs:
        print("  logprob    drawn  token", file=sys.stderr)
        for token, text, nats, drawn in _by_token(tokenizer, result):
            print(f"{-nats:9.4f} {-drawn:8.4f}  {token} {text!r}", file=sys.stderr)
    if rate:
        print(_rate(len(result.tokens), seconds), file=sys.stderr)
    sys.stderr.flush()


def _rate(num_tokens: int, seconds: float) -> str:
    return f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / max(seconds, 1e-9):.1f} tokens/s, prompt included"


def _by_token(tokenizer: Any, result: Generated) -> list[tuple[int, str, float, float]]:
    """Id, text, nats under the model and nats as drawn of each new token; part of a character is shown as U+FFFD."""
    texts = [tokenizer.decode([token], special=True) for token in result.tokens]
    return list(zip(result.tokens, texts, result.nats, result.drawn_nats, strict=True))


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `stream` and `generate` want to know."""
    names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p")
    return {name: getattr(arguments, name) for name in (*names, "repetition_penalty", "stop", "seed")}


def _heading(number: int, count: int) -> None:
    """Between samples: on stderr, so that stdout has the text alone."""
    if count > 1:
        print(f"--- sample {number + 1} of {count}", file=sys.stderr, flush=True)


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        return arguments.prompt or ""
    name = "stdin" if arguments.prompt_file == "-" else arguments.prompt_file
    try:
        raw = sys.stdin.buffer.read() if name == "stdin" else Path(arguments.prompt_file).read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise DataError(f"--prompt-file {name} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"--prompt-file {name} is not UTF-8: byte {error.start}, line {line}.") from error
    # Editors end a file with a line end that nobody meant as part of the prompt.
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
