"""`minilm knowledge`: build a store of short texts that a model reads, look at it, replace entries in it."""

from __future__ import annotations

import argparse
import time

from minilm.cli import knowledge_align, knowledge_inspect
from minilm.errors import ConfigError

_BUILD = """\
Make a knowledge store from a JSON Lines file, one record a line: a field `text`, or `subject`, `relation` and
`object`. An entry is found by its subject and relation where it has them, else by all of its words. A store that is
there already, from the same file with the same tokenizer and settings, is kept as it is.

  minilm knowledge build --source facts.jsonl --tokenizer tokenizers/python --out stores/facts
"""

_EDIT = """\
Make a new store in which entries are replaced: the answers of a model that reads it follow, without training.
Which entry: its row, or a text that it alone contains. Parts that are not given stay as the record has them.

  minilm knowledge edit --store stores/facts --row 17 --object Varn --out stores/facts_edited
  minilm knowledge edit --store stores/facts --edits edits.jsonl --out stores/facts_edited

with one edit a line: {"row": 17, "object": "Varn"} or {"find": "Tamo rises", "text": "The river Tamo rises in Varn."}
"""

_FIELDS = ("text", "subject", "relation", "object")


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to those of `minilm`."""
    knowledge = subparsers.add_parser(
        "knowledge", help="build and edit a knowledge store", description=__doc__
    )
    commands = knowledge.add_subparsers(metavar="COMMAND", required=True)
    _add_build(commands)
    _add_info(commands)
    _add_edit(commands)
    knowledge_align.add(commands)
    knowledge_inspect.add(commands)


def _add_build(commands: argparse._SubParsersAction) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    build = commands.add_parser(
        "build", help="a JSON Lines file to a store", description=_BUILD, formatter_class=raw
    )
    build.add_argument(
        "--source", required=True, metavar="FILE", help="JSON Lines file, may be compressed (.gz)"
    )
    build.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder, or hf:NAME")
    build.add_argument("--out", required=True, metavar="DIR", help="folder of the store")
    build.add_argument(
        "--side",
        type=int,
        default=1024,
        help="of the square grid, a power of two (default 1024: 1,048,576 entries)",
    )
    build.add_argument("--width", type=int, default=32, help="tokens of an entry that are kept (default 32)")
    build.add_argument("--code-dim", type=int, default=64, help="length of the codes (default 64)")
    build.add_argument("--seed", type=int, default=0, help="of the fixed vectors of the tokens (default 0)")
    build.add_argument("--workers", type=int, help="processes that encode (default: one for each core)")
    for name in _FIELDS:
        build.add_argument(f"--{name}-field", default=name, metavar="NAME", help=f"default {name}")
    build.set_defaults(run=_build)


def _add_info(commands: argparse._SubParsersAction) -> None:
    info = commands.add_parser("info", help="what a store holds")
    info.add_argument("--store", required=True, metavar="DIR", help="folder of the store")
    info.add_argument("--verify", action="store_true", help="compare all checksums")
    info.add_argument("--show", type=int, default=5, metavar="N", help="entries to show (default 5)")
    info.set_defaults(run=_info)


def _add_edit(commands: argparse._SubParsersAction) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    edit = commands.add_parser(
        "edit", help="a new store with other entries", description=_EDIT, formatter_class=raw
    )
    edit.add_argument("--store", required=True, metavar="DIR", help="folder of the store")
    edit.add_argument("--out", required=True, metavar="DIR", help="folder of the new store")
    edit.add_argument("--row", type=int, metavar="N", help="the entry by its row in the source, from 0")
    edit.add_argument("--find", metavar="TEXT", help="the entry by a text that it alone contains")
    edit.add_argument("--edits", metavar="FILE", help="several edits from a JSON Lines file")
    for name in _FIELDS:
        edit.add_argument(f"--{name}", metavar="TEXT", help=f"the new {name}")
    edit.add_argument(
        "--move", action="store_true", help="to the empty slot nearest to the new code, not into the old one"
    )
    edit.set_defaults(run=_edit)


def _build(args: argparse.Namespace) -> None:
    from minilm.data.tokenizer import Tokenizer
    from minilm.knowledge.build import build
    from minilm.knowledge.records import Fields

    built = build(
        args.source,
        Tokenizer.load(args.tokenizer),
        args.out,
        side=args.side,
        width=args.width,
        code_dim=args.code_dim,
        seed=args.seed,
        fields=Fields(**{name: getattr(args, f"{name}_field") for name in _FIELDS}),
        workers=args.workers,
    )
    path = built.store.path
    if built.reused:
        print(f"{path} is there already, from the same source with the same settings: nothing to do.")
    else:
        print(f"built in {built.seconds:.1f} s: {path}")
    _describe(built.store)


def _info(args: argparse.Namespace) -> None:
    from minilm.knowledge.store import KnowledgeStore
    from minilm.knowledge.texts import Texts, statistics, tokenizer_of

    if args.show < 0:
        raise ConfigError("--show must be 0 or more.")
    store = KnowledgeStore.open(args.store, verify=args.verify)
    tokenizer = tokenizer_of(store)
    _describe(store)
    numbers = statistics(store)
    print(
        f"tokens per entry: {numbers['tokens_per_entry']:.1f} on average ({numbers['shortest']:.0f} to "
        f"{numbers['longest']:.0f}), {numbers['distinct_tokens_per_entry']:.1f} of them different"
    )
    print(
        f"entries per row of the grid: {numbers['least_in_row']} to {numbers['most_in_row']}, per column: "
        f"{numbers['least_in_column']} to {numbers['most_in_column']}"
    )
    if numbers["without_code"]:
        print(f"{numbers['without_code']:,} entries have no code: nothing finds them")
    texts = Texts(store, tokenizer)
    if texts.note:
        print(texts.note)
    step = max(1, store.num_entries // max(1, args.show))
    rows = list(range(0, store.num_entries, step))[: args.show]
    for row, text in texts.of(rows).items():
        grid_row, column = divmod(int(store.slots[row]), store.side)
        print(
            f"  row {row}, slot ({grid_row}, {column}), {int(store.lengths[store.slots[row]])} tokens: {text}"
        )
    for number, step_of in enumerate(store.description["lineage"], 1):
        edits = step_of["edits"]
        print(f"edit {number}, of the store {step_of['parent'][:12]}: {len(edits)} entries")
        for edit in edits[: args.show]:
            print(f"  row {edit['row']}: {edit['old_text']}\n      now: {edit['new_text']}")
    if args.verify:
        print("all checksums are right")


def _describe(store: object) -> None:
    from minilm.knowledge.store import KnowledgeStore

    assert isinstance(store, KnowledgeStore)
    counts, source = store.description.get("counts") or {}, store.description.get("source") or {}
    print(f"{store.path}   fingerprint {store.fingerprint}")
    print(
        f"{store.num_entries:,} entries of up to {store.width} tokens in {store.num_slots:,} slots ({store.side} x "
        f"{store.side}, {store.num_entries / store.num_slots:.1%} full), codes of {store.code_dim}"
    )
    if source:
        print(
            f"source {source['path']} ({source['size_bytes'] / 1e6:.1f} MB, sha256 {source['sha256'][:12]})"
        )
    made = store.description["tokenizer"]
    print(f"tokenizer {made['name']}, {store.vocab_size} tokens, fingerprint {made['fingerprint']}")
    if counts.get("truncated"):
        lines = ", ".join(map(str, counts["truncated_lines"]))
        share = counts["truncated"] / counts["records"]
        print(
            f"{counts['truncated']:,} texts ({share:.1%}) were cut to {store.width} tokens; the first lines: {lines}"
        )
    if counts.get("duplicates"):
        pairs = ", ".join(f"{again} (as {first})" for first, again in counts["duplicate_lines"])
        print(f"{counts['duplicates']:,} texts stand there twice or more; the first lines: {pairs}")


def _edit(args: argparse.Namespace) -> None:
    from minilm.knowledge.editing import Edit, edit, read_edits
    from minilm.knowledge.store import KnowledgeStore
    from minilm.knowledge.texts import tokenizer_of

    own = {name: getattr(args, name) for name in ("row", "find", *_FIELDS)}
    if args.edits and any(value is not None for value in own.values()):
        raise ConfigError("Give either --edits FILE or one edit by --row, --find, --text, ..., not both.")
    began = time.monotonic()
    store = KnowledgeStore.open(args.store)
    edits = read_edits(args.edits) if args.edits else [Edit(**own, where="The edit")]
    edited, done = edit(store, tokenizer_of(store), edits, args.out, move=args.move)
    print(f"{len(done)} entries replaced in {time.monotonic() - began:.1f} s: {edited.path}")
    print(f"fingerprint {edited.fingerprint}, made from {store.fingerprint}")
    for one in done:
        print(f"  row {one.row}: {one.old_text}\n      now: {one.new_text}")
        if one.num_tokens > store.width:
            print(f"      cut: {one.num_tokens} tokens, of which {store.width} are kept")
        print(f"      {_place(one.old_slot, one.slot, one.cosine, one.belongs, store.side)}")


def _place(old_slot: int, slot: int, cosine: float, belongs: bool, side: int) -> str:
    code = f"its new code has cosine {cosine:.2f} with the old one"
    if slot != old_slot:
        return f"moved from slot {divmod(old_slot, side)} to {divmod(slot, side)}; {code}"
    if belongs or cosine > 0.99:
        return f"keeps slot {divmod(slot, side)}; {code}"
    return (
        f"keeps slot {divmod(slot, side)}, though other rows or columns are nearer to what it says now ({code}): if "
        "models miss it, `--move` puts it into the nearest empty slot"
    )
