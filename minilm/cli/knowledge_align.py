"""`minilm knowledge align`: labels for text that has none, so that retrieval can be learnt from it."""

from __future__ import annotations

import argparse

from minilm.errors import ConfigError

_ALIGN = """\
Label the tokens of a data store with the entries that they can be known from: for each position the entry whose rare
words stand around it, before and after. A model with a knowledge memory learns to retrieve from these labels
(auxiliary loss `retrieval`). The labels are written beside the tokens, and the store gets a new fingerprint.

The knowledge store should be made from other documents than the data: from its own, a model learns to find itself.

  minilm knowledge align --data stores/wiki --store stores/sentences
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add this command to those of `minilm knowledge`."""
    align = commands.add_parser(
        "align",
        help="label text with the entries that say the same",
        description=_ALIGN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    align.add_argument("--data", required=True, metavar="DIR", help="data store (minilm data build)")
    align.add_argument(
        "--store", required=True, metavar="DIR", help="knowledge store (minilm knowledge build)"
    )
    align.add_argument(
        "--split", action="append", choices=("train", "validation"), help="default: both that are there"
    )
    align.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="share of an entry's rare words that must stand around a position, 0 to 1 (default: 0.5)",
    )
    align.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if not 0 < args.threshold <= 1:
        raise ConfigError(f"--threshold {args.threshold}: a share above 0, up to 1, is needed.")
    from rich.console import Console
    from rich.progress import Progress

    from minilm.data.store import Store
    from minilm.knowledge.store import KnowledgeStore
    from minilm.knowledge.teacher import label

    data, knowledge = Store.open(args.data), KnowledgeStore.open(args.store)
    sources = {split: data.manifest["splits"][split]["sources"].values() for split in ("train", "validation")}
    splits = args.split or [split for split in sources if any(x["documents"] for x in sources[split])]
    for split in splits:
        total = sum(shard.num_tokens for shard in data.shards(split))
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"labels of {split}", total=total)
            counts = label(
                data,
                knowledge,
                split=split,
                threshold=args.threshold,
                advance=lambda tokens, task=task, progress=progress: progress.advance(task, tokens),
            )
        data = Store.open(args.data)
        for source, labelled in counts.items():
            tokens = next(s.num_tokens for s in data.shards(split) if s.source == source)
            print(f"{split}/{source}: {labelled:,} of {tokens:,} tokens labelled ({labelled / tokens:.1%})")
    return 0
