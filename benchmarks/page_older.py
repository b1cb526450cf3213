"""What the page says of a benchmark that has no `section` of its own, and writes its results in another form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from measuring import table


def evaluation_throughput(record: Mapping[str, Any]) -> str:
    """The part of the page for the results of `evaluation_throughput.py --out`."""
    kinds = {"equal": "documents as long as the context", "mixed": "documents of mixed lengths"}
    said = [f"{record[name]['ratio']:.2f} times ({text})" for name, text in kinds.items()]
    same = all(record[name]["same_loss"] for name in kinds)
    text = (
        f"`minilm.evaluation` scores documents {' and '.join(said)} as fast as a plain loop with transformers; "
        f"{'both have the same loss' if same else '**THE LOSSES DIFFER**'}."
    )
    head = ("documents", "minilm, tokens/s", "transformers, tokens/s", "times as fast", "loss", "loss")
    rows = [
        [
            what,
            f"{record[name]['minilm']['tokens_per_second']:,.0f}",
            f"{record[name]['transformers']['tokens_per_second']:,.0f}",
            f"{record[name]['ratio']:.2f}",
            f"{record[name]['minilm']['loss']:.6f}",
            f"{record[name]['transformers']['loss']:.6f}",
        ]
        for name, what in kinds.items()
    ]
    given = record["settings"]
    about = (
        f"`original:{given['size']}`, context {given['context']}, batches of {given['batch_rows']} rows, "
        f"{given['threads']} thread(s) on {given['device']}; mixed lengths are batched by length here, and as "
        f"they come in the plain loop, which pads them; the best of {given['repeats']} turns of each, by seconds "
        f"{record['equal']['seconds_are']}."
    )
    command = "```\npython benchmarks/evaluation_throughput.py --out FILE\n```"
    return "\n\n".join(["## Evaluation", text, about, table(head, rows), command])
