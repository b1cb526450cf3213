"""`minilm data`: build a store of tokens, look into it, see what will be trained on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minilm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from minilm.data.loader import DataConfig

_SOURCES = """\
SOURCE is a place of documents:
  corpus.jsonl[.gz|.zst]       JSON Lines, the text in the field `text`
  corpus.parquet               the text in the column `text`
  docs/  'docs/**/*.md'        text files (and the kinds above), one text a document
  hf:NAME[:CONFIG[:SPLIT]]     a Hugging Face data set, by name (streamed) or a local folder
  builtin:python               documentation and source text of Python's standard library (10 MB);
                               builtin:python-docs and builtin:python-source are its parts
  synthetic:markov?vocab=256&branching=4&documents=1000&length=1024&seed=0
                               token ids of known entropy, without a tokenizer
with options behind commas: wiki.jsonl,weight=2,field=content,name=wiki
  weight=2      passes over this source per epoch        field=content  where the text is
  name=wiki     its name in the store                    suffixes=.tex  more suffixes of text files
  entries=FIELD JSON Lines: where the labels are (default: entries), [[start, end, row], ...]: these
                characters of the text can be known from that record of a knowledge source
"""

_BUILD = f"""\
Turn sources into a store: token ids on disk with a manifest of counts and checksums.

{_SOURCES}
Exact duplicates are dropped over all sources. A hash of its content decides whether a document is
held out for validation, so its place and the other documents have no say in it. A store that is
already there, built from the same files with the same settings, is used as it is; a killed build
goes on where it stopped.

  minilm data build --source builtin:python --tokenizer tokenizers/python --out stores/python
  minilm data build --source wiki.jsonl.gz --source books/,weight=2 --tokenizer DIR --out stores/mix
"""

_FACTS = """\
Write a training text that states made-up facts, a database that holds most of them, and questions
by how they can be answered: from the text alone, from the database alone, from both. Deterministic.

  minilm data facts --out data/facts --entities 1000 --relations 4 --values 64 --mentions 120000
"""
# Named here, so that the help needs no import; `FactsSettings` has the defaults.
FACTS = {
    "entities": "whom the facts are about (default 4096)",
    "relations": "facts about each, up to 8 (default 8)",
    "values": "what a fact may say (default 256)",
    "mentions": "statements of facts in the training text, by Zipf's law (default 400000)",
    "validation-mentions": "and in the validation text (default 4000)",
    "filler": "share of filler in the words of the text (default 0.3)",
    "database-only": "share of facts that the text never states (default 0.1)",
    "text-only": "share of facts that the database lacks (default 0.1)",
    "questions": "of each split, if it has so many facts (default 500)",
    "seed": "of everything that is drawn (default 0)",
}

_SHOW = """\
Show rows as they are trained on: text with document borders, then input -> target of each position.
PATH is a store, a settings file or a run folder; of the latter two the data section, the batch size
and the seed are used, so that step 0 is the first step of that run.

  minilm data show stores/python
  minilm data show config.yaml --step 100 --rows 2 --positions 20
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to those of `minilm`."""
    data = subparsers.add_parser(
        "data",
        help="build a store of tokens, look into it, see rows as they are trained on",
        description=__doc__,
    )
    commands = data.add_subparsers(metavar="COMMAND", required=True)
    for command in (_add_build, _add_facts, _add_info, _add_show):
        command(commands)


def _add_build(commands: argparse._SubParsersAction) -> None:
    build = commands.add_parser(
        "build",
        help="sources to a store",
        description=_BUILD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument(
        "--source", action="append", required=True, metavar="SOURCE", help="may be given several times"
    )
    build.add_argument("--out", required=True, metavar="DIR", help="folder of the store")
    build.add_argument(
        "--tokenizer", metavar="DIR", help="tokenizer folder, or hf:NAME; none for synthetic sources"
    )
    build.add_argument(
        "--validation-source", action="append", default=[], metavar="SOURCE", help="held out as a whole"
    )
    build.add_argument(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="share held out (default: 0.01 to 0.1, the least that gives 500 kB; 0 with --validation-source)",
    )
    build.add_argument(
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="a line that is no document: stop (default), or count it, list it and go on",
    )
    build.add_argument(
        "--entries-of", metavar="FILE", help="knowledge source (JSON Lines) whose rows the labels name"
    )
    build.add_argument("--force", action="store_true", help="replace another store of this name")
    build.set_defaults(run=_build)


def _add_facts(commands: argparse._SubParsersAction) -> None:
    facts = commands.add_parser(
        "facts",
        help="a corpus of made-up facts, its database and questions",
        description=_FACTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    facts.add_argument("--out", required=True, metavar="DIR", help="folder of the files")
    for name, what in FACTS.items():
        kind = float if name in ("filler", "database-only", "text-only") else int
        facts.add_argument(f"--{name}", type=kind, metavar="N", help=what)
    facts.add_argument("--force", action="store_true", help="replace other facts of this name")
    facts.set_defaults(run=_facts)


def _add_info(commands: argparse._SubParsersAction) -> None:
    info = commands.add_parser("info", help="counts, tokenizer and state of a store")
    info.add_argument("store", metavar="STORE")
    info.add_argument(
        "--verify", action="store_true", help="compare the checksums of all files, however large"
    )
    info.set_defaults(run=_info)


def _add_show(commands: argparse._SubParsersAction) -> None:
    show = commands.add_parser(
        "show",
        help="rows as they are trained on",
        description=_SHOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("path", metavar="PATH", help="store, settings file or run folder")
    show.add_argument("--step", type=int, default=0, help="step whose batch is shown (default 0)")
    show.add_argument("--rows", type=int, default=2, help="rows shown (default 2)")
    show.add_argument(
        "--positions", type=int, default=12, help="positions listed per row (default 12; 0: none)"
    )
    show.add_argument("--split", choices=("train", "validation"), default="train")
    show.add_argument("--sequence-length", type=int, help="of a store: tokens per row (default 512)")
    show.add_argument("--row-kind", choices=("packed", "document"), help="of a store: default packed")
    show.set_defaults(run=_show)


def _build(args: argparse.Namespace) -> None:
    from minilm.data.build import build
    from minilm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    try:
        built = build(
            args.out,
            args.source,
            tokenizer,
            validation_sources=args.validation_source,
            validation_fraction=args.validation_fraction,
            on_bad_line=args.on_bad_line,
            entries_of=args.entries_of,
            force=args.force,
        )
    except KeyboardInterrupt:
        print("\nThe same command goes on from here.", file=sys.stderr)
        raise
    if built.reused:
        print(
            f"{built.store.path} is there already, from the same sources with the same settings: nothing to do."
        )
    else:
        how = "finished a killed build" if built.resumed else "built"
        print(f"{how} in {built.seconds:.1f} s: {built.store.path}")
    _describe(built.store.manifest)


def _facts(args: argparse.Namespace) -> None:
    from minilm.data.facts import FactsSettings, generate

    names = [name.replace("-", "_") for name in FACTS]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    told = generate(args.out, FactsSettings(**given), force=args.force)
    facts = ", ".join(f"{count:,} {name}" for name, count in told["facts"].items())
    print(f"{args.out}: {facts}")
    for name in ("corpus", "validation"):
        part = told[name]
        print(
            f"{name}: {part['documents']:,} documents, {part['words']:,} words, {part['filler_share']:.0%} filler"
        )
    print("questions: " + ", ".join(f"{count} {split}" for split, count in told["questions"].items()))
    print(f"guessing a value answers {told['chance']:.4f} of them")


def _info(args: argparse.Namespace) -> None:
    from minilm.data.store import Store

    store = Store.open(args.store, verify=True if args.verify else None)
    made = store.manifest["tokenizer"]
    print(f"{store.path}   fingerprint {store.fingerprint}")
    if made:
        print(f"tokenizer {made['name']}, {made['num_tokens']} tokens, fingerprint {made['fingerprint']}")
    else:
        print(f"token ids without a tokenizer, vocabulary {store.vocab_size}")
    _describe(store.manifest)
    if args.verify:
        print("all checksums are right")


def _describe(manifest: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("split", "source", "weight", "documents", "tokens", "bytes", "bytes/token"):
        table.add_column(name, justify="left" if name in ("split", "source") else "right")
    for split, counts in manifest["splits"].items():
        for source, c in counts["sources"].items():
            if c["documents"]:
                weight = f"{manifest['sources'][source]['weight']:g}"
                ratio = f"{c['bytes'] / c['tokens']:.2f}" if c["bytes"] else ""
                numbers = (f"{c[key]:,}" for key in ("documents", "tokens", "bytes"))
                table.add_row(split, source, weight, *numbers, ratio)
    Console().print(table)
    if manifest["duplicates"]["count"]:
        print(f"{manifest['duplicates']['count']} duplicates dropped")
    bad = manifest["bad"]
    labelled = {
        f"{split}/{source}": c["labelled"]
        for split, counts in manifest["splits"].items()
        for source, c in counts["sources"].items()
        if "labelled" in c
    }
    if labelled:
        named = manifest.get("entries_of")
        of = (
            f"{named['name']}, sha256 {named['sha256'][:12]}"
            if named
            else "a knowledge source that was not named"
        )
        print(f"labelled tokens, with rows of {of}: " + ", ".join(f"{k} {v:,}" for k, v in labelled.items()))
    if bad["count"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad["reasons"].items())
        print(f"{bad['count']} bad documents passed over ({reasons}); the first:")
        for line in bad["first"]:
            print(f"  {line}")
    if manifest["synthetic"]:
        known = manifest["synthetic"]
        print(
            f"entropy rate {known['rate_nats']:.6f} nats per token; the chain itself gets on these very tokens:"
        )
        for split in manifest["splits"]:
            if known[split]["targets"]:
                print(f"  {split} {known[split]['nats'] / known[split]['targets']:.6f}")


def _show(args: argparse.Namespace) -> None:
    from itertools import islice

    import numpy as np
    from rich.console import Console

    from minilm.data.loader import Loader, open_data, validation_batches
    from minilm.data.show import show

    if args.rows < 1 or args.positions < 0 or args.step < 0:
        raise ConfigError("--rows must be at least 1, --positions and --step at least 0.")
    config, batch_rows, seed = _rows_asked(args)
    data = open_data(config)
    title = f"{config.store}, {args.split}"
    if args.split == "train":
        rows = data.train
        batch_rows = batch_rows or min(args.rows, rows.rows_per_epoch)
        loader = Loader(rows, batch_rows=batch_rows, micro_batch=batch_rows, seed=seed, prefetch=0)
        batches, where = loader.step(args.step), loader.where(args.step)
        places, title = (
            where.rows,
            f"{title}, step {args.step} (epoch {where.epoch}), {batch_rows} rows in this batch",
        )
    else:  # validation goes through all rows in the order of the disk
        rows = data.validation
        if rows is None:
            raise DataError(f"The store {config.store} has no validation documents.")
        batches = list(islice(validation_batches(rows, args.rows), args.step, args.step + 1))
        if not batches:
            raise ConfigError(
                f"--step {args.step}: the validation split has {len(rows)} rows, {args.rows} are shown a step."
            )
        first = args.step * args.rows
        places = rows.places(np.arange(first, first + batches[0].shape[0]))
    show(
        Console(),
        f"{title}: {rows.kind} rows of {rows.sequence_length} positions",
        batches,
        places,
        data.tokenizer,
        num_rows=args.rows,
        num_positions=args.positions,
    )


def _rows_asked(args: argparse.Namespace) -> tuple[DataConfig, int | None, int]:
    """How rows are made, the rows of a step where a run says it, and the seed: of a store, settings or a run."""
    from minilm.data.loader import DataConfig
    from minilm.data.store import MANIFEST

    path = Path(args.path)
    own = {"sequence_length": args.sequence_length, "rows": args.row_kind}
    given = {key: value for key, value in own.items() if value is not None}
    if _is_store(path / MANIFEST):
        return DataConfig(store=str(path), **given), None, 0
    if path.exists():
        from minilm.run import load_config

        if given:
            raise ConfigError(
                f"{path} says how rows are made: --sequence-length and --row-kind are for stores."
            )
        settings = load_config(path).value
        return settings.data, settings.train.batch_size, settings.train.seed
    if path.with_name(path.name + ".building").exists():
        raise DataError(
            f"The build of the store {path} did not end: run its `minilm data build` again to go on."
        )
    raise DataError(f"There is no {path}: name a store, a settings file or a run folder.")


def _is_store(manifest: Path) -> bool:
    """A run folder has a manifest.json too, of another kind."""
    import json

    from minilm.data.store import FORMAT

    try:
        return json.loads(manifest.read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False
