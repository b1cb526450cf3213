"""`minilm knowledge inspect`: which entries a model read for each token of a text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minilm.errors import ConfigError

_INSPECT = """\
Continue a prompt with a trained model and show, for each token and memory layer, which entries were read, how much of
the attention they had, how much went to the null slot, and how far the gate let it through. Then take the entry that
was read most at the end of the prompt out of the store, and one that was not read, and see whether the answer follows.

  minilm knowledge inspect --checkpoint runs/facts --prompt "The river Tamo rises in"
  minilm knowledge inspect --checkpoint runs/facts --store stores/facts_edited --prompt "..." --html reading.html
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add this command to those of `minilm knowledge`."""
    inspect = commands.add_parser(
        "inspect",
        help="which entries a model reads for each token",
        description=_INSPECT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("--checkpoint", required=True, metavar="DIR", help="a run folder or a checkpoint")
    inspect.add_argument("--prompt", required=True, metavar="TEXT")
    inspect.add_argument("--store", metavar="DIR", help="another knowledge store than that of the training")
    inspect.add_argument(
        "--max-new-tokens", type=int, default=8, metavar="N", help="tokens of the answer (default: 8)"
    )
    inspect.add_argument(
        "--top", type=int, default=2, metavar="N", help="entries to show for a token (default: 2)"
    )
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page there, with all entries")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    inspect.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from minilm.evaluation import reading_page
    from minilm.evaluation.reading import inspect
    from minilm.run import load_checkpoint

    problems = [
        f"{flag} {file}: there is no folder {file.parent}"
        for flag, file in (("--html", args.html), ("--json", args.json))
        if file is not None and not file.parent.is_dir()
    ]
    if args.max_new_tokens < 0 or args.top < 1:
        problems.append("--max-new-tokens must be 0 or more, --top 1 or more")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    loaded = load_checkpoint(args.checkpoint, knowledge=args.store)
    if loaded.tokenizer is None:
        raise ConfigError(
            f"{loaded.folder} has no tokenizer: its model was trained on token ids, not on text."
        )
    inspection = inspect(loaded.model, loaded.tokenizer, args.prompt, max_new_tokens=args.max_new_tokens)
    reading_page.show(inspection, Console(), top=args.top)
    if args.html is not None:
        args.html.write_text(reading_page.page(inspection), encoding="utf-8")
        print(f"written: {args.html}")
    if args.json is not None:
        args.json.write_text(json.dumps(inspection.as_dict(), indent=2, ensure_ascii=False), encoding="utf-8")
        print(f"written: {args.json}")
    return 0
