"""`minilm export`: a checkpoint as a folder that transformers, lm-evaluation-harness or llama.cpp loads."""

from __future__ import annotations

import argparse
from typing import Any

from minilm.cli.model_flags import add_checkpoint, add_dtype

DESCRIPTION = """\
Write the model of a checkpoint to a new folder that other software loads.

  minilm export --checkpoint runs/first --out exported
  minilm export --checkpoint runs/first --out exported_gguf --format gguf

hf    a Hugging Face folder with weights, tokenizer and README.md. Model `original` is a Llama there; every other
      model comes with its own code, and is loaded with trust_remote_code=True, without minilm.
gguf  model.gguf for llama.cpp; model `original` only. Needs the package gguf (pip install 'minilm[export]').

What is written is loaded again and compared with the checkpoint first. Nothing is overwritten.
"""


def add(subparsers: Any) -> None:
    """Register the subcommand."""
    sub = subparsers.add_parser(
        "export",
        help="write a model for transformers or llama.cpp",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arg = sub.add_argument
    add_checkpoint(sub)
    arg("--out", required=True, metavar="DIR", help="the folder to make; it must not exist")
    arg("--format", choices=("hf", "gguf"), default="hf", help="default: hf")
    add_dtype(sub)
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export; returns the exit code. Raises MinilmError for everything that a user can set right."""
    from minilm.export import export

    made = export(
        arguments.checkpoint,
        arguments.out,
        kind=arguments.format,
        weights=arguments.weights,
        dtype=arguments.dtype,
    )
    files = sorted(made.iterdir())
    print(f"{made}: {len(files)} files, {sum(f.stat().st_size for f in files) / 2**20:,.1f} MiB")
    same = "the logits are those of the checkpoint" if arguments.format == "hf" else "every number is there"
    print(f"read again: {same}")
    return 0
