"""Held-out text under several checkpoints: where does a memory lower the loss, does it retrieve, does it read at all?

    python run_file/free_text/score.py --data store --documents texts/sources.jsonl --out scores \\
        --checkpoint original=runs/original-0 --checkpoint knowledge=runs/knowledge-0

The validation split of a data store with labels (`minilm knowledge align`) is scored in rolling windows, every token
but a document's first once. All others are compared with the first checkpoint, on the same tokens, with a bootstrap
over documents of the differences. Tokens are told apart by

    overlap   the 13 tokens that end with this one stand in a document of --documents (that the entries are from)
    entry     the teacher found an entry for it (it looks at what follows, as a model cannot)

A model with a memory is also scored with the texts of its entries exchanged at random (it finds the same places, where
something else is written) and with an empty store (the null slot alone): what changes then is what it reads.

Written: OUT.json with everything, OUT.md with the tables.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import KINDS, HeldOut, Scored, emptied, exchanged, held_out, lexical, scored

from minilm import cli, models
from minilm.alignment import Sum
from minilm.data.store import Store
from minilm.errors import ConfigError, DataError
from minilm.evaluation.facts import reading
from minilm.evaluation.intervals import bootstrap
from minilm.run import Loaded, load_checkpoint

# --- numbers


def losses(result: Scored, text: HeldOut) -> dict[str, Any]:
    """Loss in nats per token by kind, None where there is no such token."""
    told = {}
    for kind, mask in text.kinds().items():
        total = Sum.of(float(result.nats[mask].sum()), int(mask.sum()))
        told[kind] = total.mean if mask.any() else None
    return told


def difference(one: Scored, other: Scored, text: HeldOut, mask: np.ndarray) -> dict[str, Any]:
    """Nats per token by which `one` is above `other` on the same tokens, with the 95 % interval over documents."""
    number = int(text.documents.max()) + 1
    chosen = text.documents[mask]
    nats = np.bincount(chosen, (one.nats - other.nats)[mask], minlength=number)
    tokens = np.bincount(chosen, minlength=number).astype(np.float64)
    values = np.stack([nats, tokens], axis=1)[tokens > 0]
    between = Sum.of(float(nats.sum()), float(tokens.sum())).mean if mask.any() else None
    return {"difference": between, "interval_95": bootstrap(values), "tokens": int(mask.sum())}


def retrieval(result: Scored, base: Scored, text: HeldOut) -> dict[str, Any]:
    """By memory layer: shares of the teacher's entries that were candidates and were read, null share and gate."""
    kinds = text.kinds()
    entry, rest = kinds["entry"], kinds["no_entry"]
    told: dict[str, Any] = {}
    for layer in result.read:
        share = {
            f"{name}_{where}": float(getattr(result, name)[layer][mask].sum() / max(1, mask.sum()))
            for name, where, mask in (
                ("read", "entry", entry),
                ("candidate", "entry", entry),
                ("null", "entry", entry),
                ("null", "no_entry", rest),
                ("gate", "entry", entry),
                ("gate", "no_entry", rest),
            )
        }
        told[f"block {layer}"] = share
    if result.read:
        hit = entry & np.any([layer > 0 for layer in result.read.values()], axis=0)
        told["where_it_was_read"] = difference(result, base, text, hit)
        told["where_it_was_not"] = difference(result, base, text, entry & ~hit)
    return told


def report(
    compared: Mapping[str, Any], text: HeldOut, length: int, lengths: Mapping[str, int]
) -> dict[str, Any]:
    """Everything, as plain numbers. The first model is what the others are compared with."""
    results = {name: scored(model, text, length) for name, model in compared.items()}
    base = results[next(iter(results))]
    kinds = text.kinds()
    told: dict[str, Any] = {
        "documents": int(text.documents.max()) + 1,
        "tokens": {kind: int(mask.sum()) for kind, mask in kinds.items()},
        "compared_with": next(iter(results)),
        "models": {},
    }
    for name, model in compared.items():
        result, about = results[name], {"trained_tokens": lengths[name]}
        about["parameters"] = sum(p.numel() for p in model.parameters())
        about["loss"] = losses(result, text)
        if result is not base:
            about["against_first"] = {
                kind: difference(result, base, text, mask) for kind, mask in kinds.items()
            }
        if getattr(model, "store", None) is not None:
            config, store = model.config, model.store
            about["retrieval"] = retrieval(result, base, text)
            counts = [config.num_read, config.num_candidates]
            about["lexical"] = lexical(text, store, counts, config.window, config.window_decay)
            about["counts"], about["entries"] = counts, store.num_entries
            about["untrained"] = retrieval(scored(_untrained(model), text, length), base, text)
            for other, made in (("exchanged", exchanged(store)), ("empty", emptied(store))):
                with reading(model, made):
                    changed = scored(model, text, length)
                about[other] = {kind: difference(changed, result, text, mask) for kind, mask in kinds.items()}
        told["models"][name] = about
    return told


def _untrained(model: Any) -> Any:
    """The same model at its first step: a retriever by words alone, through the keys of the grid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.build(model.config)


# --- tables


def tables(told: Mapping[str, Any]) -> str:
    """Markdown: losses by kind, differences with their intervals, retrieval."""
    tokens, results = told["tokens"], told["models"]
    lines = [f"{told['documents']} held-out documents, {tokens['all']:,} predicted tokens.", ""]
    lines += [
        "| loss, nats per token |" + "".join(f" {kind} |" for kind in KINDS),
        "| --- |" + " --- |" * len(KINDS),
    ]
    lines += ["| share of tokens |" + "".join(f" {tokens[k] / max(1, tokens['all']):.1%} |" for k in KINDS)]
    lines += [
        f"| {name} |" + "".join(f" {_number(about['loss'][kind])} |" for kind in KINDS)
        for name, about in results.items()
    ]
    lines += ["", "| difference and 95 % interval |" + "".join(f" {kind} |" for kind in KINDS)]
    lines += ["| --- |" + " --- |" * len(KINDS)]
    for name, about in results.items():
        rows = {f"{name} - {told['compared_with']}": about.get("against_first")}
        rows |= {f"{name}: {other} - own entries": about.get(other) for other in ("exchanged", "empty")}
        for title, differences in rows.items():
            if differences:
                lines.append(f"| {title} |" + "".join(f" {_difference(differences[k])} |" for k in KINDS))
    for name, about in results.items():
        if "retrieval" in about:
            lines += ["", *_retrieval_lines(name, about)]
    return "\n".join(lines) + "\n"


def _retrieval_lines(name: str, about: Mapping[str, Any]) -> list[str]:
    (few, many), entries = about["counts"], about["entries"]
    lines = [
        f"| {name} | hit@{few} | hit@{many} | null: entry | null: none | gate: entry | gate: none |",
        "| --- |" + " --- |" * 6,
        f"| chance | {few / entries:.4f} | {many / entries:.4f} | | | | |",
        f"| window code alone | {about['lexical'][0]:.3f} | {about['lexical'][1]:.3f} | | | | |",
    ]
    columns = ("read_entry", "candidate_entry", "null_entry", "null_no_entry", "gate_entry", "gate_no_entry")
    for when, told in (("before training", about["untrained"]), ("trained", about["retrieval"])):
        for layer, values in told.items():
            if layer.startswith("block"):
                lines.append(
                    f"| {layer}, {when} |" + "".join(f" {values[column]:.3f} |" for column in columns)
                )
    found, missed = (about["retrieval"][key] for key in ("where_it_was_read", "where_it_was_not"))
    lines += [
        "",
        f"{name} against the first model on tokens with an entry: {_difference(found)} on the {found['tokens']:,} "
        f"where it was read, {_difference(missed)} on the {missed['tokens']:,} where it was not.",
    ]
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _difference(told: Mapping[str, Any]) -> str:
    if told["difference"] is None:
        return "-"
    interval = told["interval_95"]
    return f"{told['difference']:+.4f}" + (f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else "")


# --- from the command line


def _load(asked: Sequence[str], data: Store) -> dict[str, Loaded]:
    found: dict[str, Loaded] = {}
    for words in asked:
        name, sign, run = words.partition("=")
        if not (name and sign and run) or name in found:
            raise ConfigError(f"--checkpoint {words}: give NAME=RUN, each name once.")
        found[name] = loaded = load_checkpoint(run)
        if loaded.tokenizer is None or loaded.config is None:
            raise ConfigError(f"{run} is no run folder of text: its tokenizer and settings are needed.")
        data.require_tokenizer(loaded.tokenizer)
        store = getattr(loaded.model, "store", None)
        if store is not None and store.source_sha256 != data.entries_of:
            raise DataError(
                f"The labels of {data.path} name rows of another knowledge source than that of {run}: give the data "
                "that were labelled with its store."
            )
    return found


def main(argv: list[str]) -> int:
    parser = cli.parser(__doc__ or "", prog="score.py")
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="data store with labels; its validation split is scored")
    add("--documents", required=True, metavar="PLACE", help="documents that the entries are from")
    add(
        "--checkpoint",
        required=True,
        action="append",
        metavar="NAME=RUN",
        help="the first is what others are held to",
    )
    add("--out", required=True, type=Path, metavar="FILE", help="without suffix: .json and .md are written")
    asked = parser.parse_args(argv)

    def run() -> int:
        data = Store.open(asked.data)
        loaded = _load(asked.checkpoint, data)
        first = next(iter(loaded.values()))
        assert first.tokenizer is not None and first.config is not None
        length = first.config.data.sequence_length
        text = held_out(data, first.tokenizer, asked.documents)
        lengths = {
            name: one.step * one.config.train.batch_size * one.config.data.sequence_length
            for name, one in loaded.items()
            if one.config is not None
        }
        told = report({name: one.model for name, one in loaded.items()}, text, length, lengths)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.with_name(f"{asked.out.name}.json").write_text(json.dumps(told, indent=1) + "\n")
        asked.out.with_name(f"{asked.out.name}.md").write_text(tables(told))
        print(tables(told))
        return 0

    return cli.guarded(run, debug=asked.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
