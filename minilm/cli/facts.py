"""`minilm facts`: what checkpoints know of made-up facts, and the table that compares them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from minilm.errors import ConfigError

_SCORE = """\
Ask a checkpoint the questions of a facts folder (`minilm data facts`): accuracy by how an answer can be
known, edits followed, losses on facts and on all other tokens.

  minilm facts score --checkpoint runs/original --facts data/facts --json original.json
  minilm facts score --checkpoint runs/knowledge --facts data/facts --knowledge data/knowledge

--knowledge is a folder with the databases as knowledge stores: entries, and edited and without_answer,
which `minilm knowledge edit` makes of it from edits.jsonl and removals.jsonl.
"""

_TABLE = """\
Mean and standard deviation over the seeds of each arm, as a table and two plots.

  minilm facts table --runs runs/facts --out runs/facts
  minilm facts table --runs experiment/facts/cpu --into experiment/FACTS.md
  minilm facts table --runs experiment/facts/cpu --verify experiment/FACTS.md

RUNS holds a folder ARM-SEED for each run, with its facts.json of `minilm facts score`. --into puts the table
between the marks of a record; --verify names each line of a record's table that is not what the runs give,
and ends with exit code 1.
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to those of `minilm`."""
    raw = argparse.RawDescriptionHelpFormatter
    facts = subparsers.add_parser("facts", help="what checkpoints know of made-up facts", description=__doc__)
    commands = facts.add_subparsers(metavar="COMMAND", required=True)
    score = commands.add_parser("score", help="ask one checkpoint", description=_SCORE, formatter_class=raw)
    score.add_argument("--checkpoint", required=True, metavar="DIR", help="a run folder or a checkpoint")
    score.add_argument("--facts", required=True, metavar="DIR", help="folder of `minilm data facts`")
    score.add_argument("--knowledge", metavar="DIR", help="folder of the databases as knowledge stores")
    score.add_argument(
        "--context", action="store_true", help="paste the entry that answers before each question"
    )
    score.add_argument("--sequence-length", type=int, metavar="N", help="default: that of the run")
    score.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    score.set_defaults(run=_score)
    table = commands.add_parser(
        "table", help="compare the arms of an experiment", description=_TABLE, formatter_class=raw
    )
    table.add_argument(
        "--runs", required=True, metavar="DIR", help="folder with a folder ARM-SEED for each run"
    )
    table.add_argument("--out", metavar="DIR", help="where table and plots are written")
    table.add_argument("--into", type=Path, metavar="FILE", help="record whose table is written anew")
    table.add_argument("--verify", type=Path, metavar="FILE", help="record whose table is recomputed")
    table.set_defaults(run=_table)


def _score(args: argparse.Namespace) -> None:
    from minilm.evaluation.facts import DATABASES, report
    from minilm.evaluation.facts_table import cost_of_run
    from minilm.knowledge.store import KnowledgeStore
    from minilm.run import load_checkpoint

    loaded = load_checkpoint(args.checkpoint)
    if loaded.tokenizer is None:
        raise ConfigError(
            f"{loaded.folder} was trained on token ids without a tokenizer: it cannot be asked."
        )
    length = args.sequence_length or (loaded.config and loaded.config.data.sequence_length)
    if not length or length < 1:
        raise ConfigError("Say how long a window of the validation text is: --sequence-length N, at least 1.")
    reads = getattr(loaded.model, "store", None) is not None
    if reads != bool(args.knowledge):
        raise ConfigError(
            f"{loaded.folder} reads a knowledge store: give the stores to ask it with, --knowledge DIR."
            if reads
            else f"{loaded.folder} reads no knowledge store: leave --knowledge out."
        )
    stores = (
        {name: KnowledgeStore.open(Path(args.knowledge) / Path(name).stem) for name in DATABASES}
        if reads
        else {}
    )
    told = report(
        loaded.model,
        loaded.tokenizer,
        args.facts,
        sequence_length=length,
        stores=stores,
        with_context=args.context,
    )
    config: Any = loaded.model.config
    about = {
        "checkpoint": str(loaded.folder),
        "step": loaded.step,
        "context": args.context,
        "parameters": config.num_parameters(),
        **(cost_of_run(loaded.run_folder, loaded.step) if loaded.run_folder else {}),
        "training_flops_per_token": config.training_flops_per_token(length),
    }
    for split, found in told["questions"].items():
        low, high = found["accuracy_95"] or (0.0, 1.0)
        hit = f"   entry read {found['hit']:.3f}" if "hit" in found else ""
        print(f"{split:15} {found['accuracy']:.3f}  ({low:.3f} to {high:.3f}, {found['number']}){hit}")
    print(f"{'chance':15} {told['chance']:.3f}")
    for name, value in told["edits"].items():
        print(f"{name:22} {value:.3f}")
    for kind, scores in told["losses"].items():
        print(f"loss {kind:17} {scores['loss']:.4f} over {scores['num_tokens']} tokens")
    if args.json:
        args.json.write_text(json.dumps({**about, **told}, indent=1) + "\n")


def _table(args: argparse.Namespace) -> int:
    from minilm.evaluation.facts_table import collect, differing, placed, plot, written
    from minilm.manifest import write_atomically

    if not (args.out or args.into or args.verify):
        raise ConfigError("Say what the table is for: --out DIR, --into RECORD or --verify RECORD.")
    for record in (args.into, args.verify):
        if record is not None and not record.is_file():
            raise ConfigError(f"There is no record {record}.")
    arms = collect(args.runs)
    text = written(arms)
    if args.verify is not None:
        wrong = differing(args.verify.read_text(encoding="utf-8"), text, str(args.verify))
        print("\n".join(wrong) or f"{args.verify}: every figure of the table is that of the runs")
        if wrong:
            return 1
    if args.into is not None:
        record = placed(args.into.read_text(encoding="utf-8"), text, str(args.into))
        write_atomically(args.into, record.encode())
        print(f"wrote the table of {args.into}")
    if args.out is not None:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(text)
        print(text)
        for path in plot(arms, out):
            print(f"wrote {path}")
    return 0
