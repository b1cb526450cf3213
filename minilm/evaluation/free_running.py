"""The part of eval.py about free-running text: its flags, and what they ask for (see minilm/evaluation/material.py)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from minilm.errors import ConfigError

if TYPE_CHECKING:
    from minilm.evaluation.free_writing import Writing
    from minilm.evaluation.material import Material
    from minilm.evaluation.section import Section


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this part of eval.py."""
    group = parser.add_argument_group(
        "free-running text", "what the model writes after the prompts of --prompt-lengths, beside the truth"
    )
    group.add_argument(
        "--free-running", type=int, metavar="N", help="write on from N documents (default: none)"
    )
    group.add_argument(
        "--samples-per-prompt",
        type=int,
        default=0,
        metavar="K",
        help="texts drawn per prompt, beside the greedy one (default: 0)",
    )
    group.add_argument("--temperature", type=float, default=0.8, metavar="T", help="of these (default: 0.8)")
    group.add_argument(
        "--top-k", type=int, metavar="K", help="of these: the K most probable tokens (default: all)"
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="of these: the fewest tokens that reach P (default: 1)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of these (default: 0)")
    group.add_argument(
        "--bleu-tokenize",
        default="13a",
        metavar="HOW",
        help="how sacrebleu finds words: 13a, or zh or char for texts without spaces (default: 13a)",
    )
    group.add_argument(
        "--show",
        type=int,
        default=5,
        metavar="N",
        help="texts in the terminal (default: 5; the JSON file has all)",
    )


def problems(arguments: argparse.Namespace) -> list[str]:
    """What is wrong with the flags, before a model is loaded."""
    if arguments.free_running is None:
        return ["--samples-per-prompt needs --free-running N."] if arguments.samples_per_prompt else []
    from minilm.evaluation.text_metrics import require_packages

    found = []
    try:
        require_packages()
        _of_arguments(arguments)
        from sacrebleu.metrics import BLEU

        if arguments.bleu_tokenize not in BLEU.TOKENIZERS:
            found.append(
                f"--bleu-tokenize is {arguments.bleu_tokenize!r}; take one of {', '.join(BLEU.TOKENIZERS)}."
            )
    except ConfigError as error:
        found.append(f"--free-running: {error}")
    if arguments.show < 0:
        found.append(f"--show is {arguments.show}; it must be at least 0.")
    return found


def sections(arguments: argparse.Namespace, material: Material) -> list[Section]:
    """Nothing without --free-running."""
    if arguments.free_running is None:
        return []
    from minilm.evaluation.free_running_page import FreeRunning
    from minilm.evaluation.free_writing import continue_freely
    from minilm.evaluation.report import Asked

    writing = _of_arguments(arguments)
    asked = Asked(prompt_lengths=arguments.prompt_lengths, continuation_tokens=arguments.continuation_tokens)
    lengths = asked.checked_lengths(material.model)
    results = [
        continue_freely(
            material.model,
            material.tokenizer,
            material.held_out,
            length,
            asked.continuation_tokens,
            writing,
            material.how,
        )
        for length in lengths
    ]
    return [FreeRunning(writing=writing, results=results, num_shown=arguments.show)]


def _of_arguments(arguments: argparse.Namespace) -> Writing:
    from minilm.evaluation.free_writing import Writing

    return Writing(
        documents=arguments.free_running,
        samples=arguments.samples_per_prompt,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        bleu_tokenize=arguments.bleu_tokenize,
    )
