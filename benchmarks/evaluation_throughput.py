"""Evaluation against a plain transformers loop: the same weights, the same documents, taking turns. Tokens per second.

    python benchmarks/evaluation_throughput.py --out evaluation_throughput.json                CPU, some minutes
    python benchmarks/evaluation_throughput.py --size tiny --tokens 20000 --out trial.json     seconds
    python benchmarks/evaluation_throughput.py --device cuda --tokens 2000000 --batch-rows 64 --out gpu.json

    equal   documents of exactly the context: nothing is padding on either side
    mixed   lengths from 16 to the context: the plain loop pads each batch to its longest, ours batches like lengths

The plain loop is the usual one: batches of rows padded on the right, `model(input_ids, attention_mask, labels)`, the
mean loss times the number of targets added up. It gives a loss; ours gives the loss per document and by context, and
accuracies. Both losses are compared before any time is believed. Exit code 1 if they differ. On a CPU with one thread
it is the processor's time that is measured, for others may work on the same machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LENGTHS = ("equal", "mixed")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the results, as JSON")
    parser.add_argument("--size", default="26m", help="of model original (default: 26m)")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens (default: 512)")
    parser.add_argument("--tokens", type=int, default=16_384, metavar="N", help="in all documents")
    parser.add_argument("--batch-rows", type=int, default=8, metavar="N", help="of both (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {name: compare(name, arguments) for name in LENGTHS}
    report = {"settings": {**vars(arguments), "out": arguments.out.name}, "machine": machine(), **results}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, found in results.items():
        print(
            f"{name}: minilm {found['minilm']['tokens_per_second']:,.0f} tokens/s, transformers "
            f"{found['transformers']['tokens_per_second']:,.0f}: {found['ratio']:.2f} times; "
            f"losses {found['minilm']['loss']:.6f} and {found['transformers']['loss']:.6f}"
        )
    print(f"wrote {arguments.out}")
    return 0 if all(found["same_loss"] for found in results.values()) else 1


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one kind of documents, one after the other, `repeats` times."""
    from minilm.models import build, preset
    from minilm.models.hf import to_hf

    torch.manual_seed(0)
    model = build(preset("original", arguments.size)).eval().to(arguments.device)
    llama = to_hf(model)
    documents = made_documents(name, arguments.context, arguments.tokens, model.config.vocab_size)
    sides: dict[str, Callable[[], float]] = {
        "minilm": lambda: ours(model, documents, arguments),
        "transformers": lambda: theirs(llama, documents, arguments),
    }
    warm = documents[: arguments.batch_rows]
    ours(model, warm, arguments), theirs(llama, warm, arguments)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses = {}
    alone = arguments.device == "cpu" and arguments.threads == 1
    clock = time.process_time if alone else time.perf_counter
    for _ in range(arguments.repeats):
        for side, score in sides.items():
            start = clock()
            losses[side] = score()  # a number: the device has finished
            seconds[side].append(clock() - start)
    targets = sum(len(document) - 1 for document in documents)
    best = {side: min(times) for side, times in seconds.items()}
    return {
        "documents": len(documents),
        "targets": targets,
        "seconds_are": "of the processor" if alone else "of the clock",
        **{
            side: {
                "tokens_per_second": targets / best[side],
                "loss": losses[side],
                "seconds": times,
                "median_seconds": statistics.median(times),
            }
            for side, times in seconds.items()
        },
        "ratio": best["transformers"] / best["minilm"],
        "same_loss": abs(losses["minilm"] - losses["transformers"]) <= 1e-5 * losses["transformers"],
    }


def made_documents(name: str, context: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """Random tokens: the time does not depend on which they are."""
    draw = torch.Generator().manual_seed(1)
    documents: list[list[int]] = []
    left = tokens
    while left > 0:
        length = context + 1
        if name == "mixed":
            length = int(torch.randint(16, context + 1, (), generator=draw))
        documents.append(torch.randint(3, vocab_size, (length,), generator=draw).tolist())
        left -= length
    return documents


def ours(model: Any, documents: list[list[int]], arguments: argparse.Namespace) -> float:
    """The loss by `minilm.evaluation`."""
    from minilm.evaluation.intervals import Scores
    from minilm.evaluation.score import tally_documents

    found = tally_documents(
        model,
        enumerate(documents),
        arguments.context,
        arguments.context // 2,
        batch_rows=arguments.batch_rows,
    )
    return Scores.of(found.documents).loss


@torch.no_grad()
def theirs(llama: Any, documents: list[list[int]], arguments: argparse.Namespace) -> float:
    """The loss by a plain loop over batches."""
    nats, targets = 0.0, 0
    for start in range(0, len(documents), arguments.batch_rows):
        group = documents[start : start + arguments.batch_rows]
        width = max(map(len, group))
        ids = torch.zeros(len(group), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, document in enumerate(group):
            ids[row, : len(document)] = torch.tensor(document)
            mask[row, : len(document)] = 1
        ids, mask = ids.to(arguments.device), mask.to(arguments.device)
        labels = ids.masked_fill(mask == 0, -100)
        loss = llama(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        count = int((labels[:, 1:] != -100).sum())
        nats, targets = nats + loss.item() * count, targets + count
    return nats / targets


def machine() -> dict[str, Any]:
    """What was measured on, and with what."""
    import transformers

    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = next((line.split(":")[1].strip() for line in lines.splitlines() if "model name" in line), "")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
