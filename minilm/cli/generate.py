"""`minilm generate`: text from a checkpoint, as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from minilm.errors import ConfigError, DataError

DESCRIPTION = """\
Continue a prompt with a trained model. Only the text goes to stdout: the prompt and what follows.

  minilm generate --checkpoint runs/first --prompt "def main("
  minilm generate --checkpoint runs/first --prompt-file start.txt --temperature 0 --max-new-tokens 256
  minilm generate --checkpoint runs/first --num-samples 3 --seed 7 --json > samples.jsonl

Sample i is drawn with seed + i, so that any one of several can be drawn again alone. The order of the choices is
temperature, top-k, top-p. Ctrl-C ends a text.
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
        help="one JSON object a line: prompt, text, tokens, nats, stopped, seed",
    )
    arg("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    arg(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (default: float32)",
    )
    sub.set_defaults(run=run)


def _add_prompt(sub: argparse.ArgumentParser) -> None:
    """What continues what."""
    arg = sub.add_argument
    arg(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run folder (its newest checkpoint) or a checkpoint",
    )
    arg(
        "--weights",
        choices=("last", "ema"),
        default="last",
        help="those of the last step, or their moving average (train.ema_decay); default: last",
    )
    arg(
        "--store",
        metavar="DIR",
        help="knowledge store to read in place of the one that the model was trained with",
    )
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
    arg("--seed", type=int, default=0, help="of the choices (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Generate; returns the exit code. Raises MinilmError for everything that a user can set right."""
    if arguments.num_samples < 1:
        raise ConfigError(f"--num-samples is {arguments.num_samples}; it must be at least 1.")
    prompt = _prompt(arguments)

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
    if arguments.json or not arguments.stream:
        return _together(model, loaded.tokenizer, prompt, arguments)
    return _streamed(model, loaded.tokenizer, prompt, arguments)


def _streamed(model: Any, tokenizer: Any, prompt: str, arguments: argparse.Namespace) -> int:
    from minilm.evaluation.generate import stream

    for number in range(arguments.num_samples):
        options = _options(arguments) | {"seed": arguments.seed + number}
        pieces = stream(model, tokenizer, prompt, **options)  # raises here, before anything is printed
        _heading(number, arguments.num_samples)
        try:
            sys.stdout.write(prompt)
            sys.stdout.flush()
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return 0


def _together(model: Any, tokenizer: Any, prompt: str, arguments: argparse.Namespace) -> int:
    from minilm.evaluation.generate import generate
    from minilm.evaluation.text import text_of

    results = generate(
        model,
        [tokenizer.prompt(prompt)] * arguments.num_samples,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        **_options(arguments),
    )
    for number, result in enumerate(results):
        text = text_of(tokenizer, result.tokens)
        if arguments.json:
            record = {
                "prompt": prompt,
                "text": text,
                "tokens": result.tokens,
                "nats": [round(n, 6) for n in result.nats],
                "stopped": result.stopped,
                "seed": arguments.seed + number,
            }
            print(json.dumps(record), flush=True)
        else:
            _heading(number, len(results))
            print(prompt + text, flush=True)
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return {name: getattr(arguments, name) for name in names}


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
