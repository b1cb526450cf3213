"""Replacing entries: a new store beside the old one, with the edits written down. No training, no new layout.

An edited entry gets new tokens and a new code. It keeps its slot, because the keys of a trained model stand for the
grid as it is; an entry that is about something else now may be moved to the empty slot that is nearest to its code.
All other entries, their codes and places, and the code vectors of all tokens that had one stay as they are.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError, listed
from minilm.knowledge import records
from minilm.knowledge.codes import entry_codes, token_table
from minilm.knowledge.files import publish, reserved
from minilm.knowledge.records import Fields, Record
from minilm.knowledge.store import DECIDE, FOLLOW, KnowledgeStore, means, quantised
from minilm.knowledge.texts import Texts, fields_of

PARTS = ("text", "subject", "relation", "object")
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A replacement. Which entry: its source row, or a text that it alone contains. What: a text, or parts of it.

    Parts that are not given stay as the record has them, but a new `text` without a subject is the whole new record:
    its key part is all of the text.
    """

    row: int | None = None
    find: str | None = None
    text: str | None = None
    subject: str | None = None
    relation: str | None = None
    object: str | None = None
    where: str = "the edit"


@dataclass(frozen=True)
class Done:
    """What an edit did. `cosine`: of the new code with the old one; `belongs`: are its row and column the nearest."""

    row: int
    old_text: str
    new_text: str
    old_slot: int
    slot: int
    cosine: float
    belongs: bool
    num_tokens: int  # of the new text, before it was cut to the width


def read_edits(path: str | Path) -> list[Edit]:
    """Edits from a JSON Lines file: {"row": 5, "object": "Varn"} or {"find": "Tamo rises", "text": "..."}.

    Raises DataError with all bad lines.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The edits {path} cannot be read: {error}.") from error
    edits, wrong = [], []
    kinds: dict[str, type] = {"row": int, "find": str, **dict.fromkeys(PARTS, str)}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            wrong.append(f"{path}:{number}: not JSON ({str(error)[:100]})")
            continue
        bad = _bad_parts(value, kinds) if isinstance(value, dict) else ["a JSON object is needed"]
        wrong += [f"{path}:{number}: {problem}" for problem in bad]
        if not bad:
            edits.append(Edit(**value, where=f"{path}:{number}"))
    if not edits and not wrong:
        wrong.append(f"{path} has no edits: it must have one JSON object a line")
    if wrong:
        raise DataError(listed(wrong))
    return edits


def _bad_parts(value: dict[str, Any], kinds: dict[str, type]) -> list[str]:
    return [
        f"{key!r} is not one of {', '.join(kinds)}"
        if key not in kinds
        else f"{key!r} must be of type {kinds[key].__name__}"
        for key, part in value.items()
        if type(part) is not kinds.get(key)
    ]


def edit(
    store: KnowledgeStore, tokenizer: Tokenizer, edits: list[Edit], out: str | Path, *, move: bool = False
) -> tuple[KnowledgeStore, list[Done]]:
    """Make the store `out`: `store` with these entries replaced. `move`: into the nearest empty slots.

    Raises ConfigError and DataError: all edits that are not possible, and a folder that exists.
    """
    out = Path(out).expanduser().resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(
            f"{out} exists: an edited store is a new one. Choose another name, or remove it yourself."
        )
    replaced = _resolved(store, tokenizer, edits)
    if move and store.num_slots == store.num_entries:
        raise ConfigError(
            "The store has no empty slot to move an entry to. "
            "Leave `--move` out: they keep their slots, and models find them there by their new codes."
        )
    tensors = {name: getattr(store, name) for name in (*DECIDE, *FOLLOW)}
    tensors |= {name: tensors[name].clone() for name in ("ids", "lengths", "codes", "rows", "idf")}
    rows_of_tokens = tokenizer.encode_batch([record.text for _, record in replaced.values()])
    codes = _codes(replaced, rows_of_tokens, store, tokenizer, tensors["idf"])
    texts = Texts(store, tokenizer)
    done, log = [], []
    for (row, (value, record)), tokens, code in zip(replaced.items(), rows_of_tokens, codes, strict=True):
        old_slot = int(store.slots[row])
        slot = _nearest_empty(code, tensors["lengths"], store) if move else old_slot
        one = Done(
            row=row,
            old_text=texts.decoded(row),
            new_text=record.text,
            old_slot=old_slot,
            slot=slot,
            cosine=float(code @ store.codes[old_slot].float()) * store.code_scale,
            belongs=bool((_scores(code, store) == _scores(code, store).max()).view(-1)[slot]),
            num_tokens=len(tokens),
        )
        _put(tensors, one, tokens[: store.width], quantised(code))
        done.append(one)
        names = ("row", "old_slot", "slot", "old_text", "new_text")
        log.append({**{name: getattr(one, name) for name in names}, "record": value})
    tensors |= means(tensors["codes"], tensors["lengths"], store.side)
    lineage = [*store.description["lineage"], {"parent": store.fingerprint, "edits": log}]
    edited = KnowledgeStore.sealed({**store.description, "lineage": lineage}, tensors)
    with reserved(out) as folder:
        publish(edited, tokenizer, folder, out)
    return KnowledgeStore.open(out), done


def _resolved(
    store: KnowledgeStore, tokenizer: Tokenizer, edits: list[Edit]
) -> dict[int, tuple[dict[str, Any], Record]]:
    """Source row -> its new record, as JSON and as it is understood."""
    texts, fields = Texts(store, tokenizer), fields_of(store)
    wrong: list[str] = []
    rows: dict[int, Edit] = {}
    for one in edits:
        found = _row_of(one, store, texts)
        if isinstance(found, str):
            wrong.append(f"{one.where}: {found}")
        elif found in rows:
            wrong.append(f"{one.where}: row {found} is also replaced by {rows[found].where}")
        else:
            rows[found] = one
    old, replaced = texts.records(rows), {}
    for row, one in rows.items():
        value = _new_value(one, old.get(row), fields)
        record = value if isinstance(value, str) else records.record_of(value, fields)
        if isinstance(record, str):
            wrong.append(
                f"{one.where}: {record}{'' if row in old or texts.note is None else f' ({texts.note})'}"
            )
        elif not isinstance(value, str):
            replaced[row] = (value, record)
    if wrong:
        raise DataError(f"The store cannot be edited: {listed(wrong)}")
    return replaced


def _row_of(one: Edit, store: KnowledgeStore, texts: Texts) -> int | str:
    """The source row that an edit means, or what is wrong with it."""
    if (one.row is None) == (one.find is None):
        return "say which entry: either its row, or a text to find it by"
    if all(getattr(one, part) is None for part in PARTS):
        return f"say what shall stand there: {', '.join(PARTS)}"
    if one.row is not None:
        inside = 0 <= one.row < store.num_entries
        return (
            one.row
            if inside
            else f"there is no row {one.row}: the store has rows 0 to {store.num_entries - 1}"
        )
    found = texts.find(one.find or "")
    if len(found) == 1:
        return found[0]
    if not found:
        return f"no entry contains {one.find!r}"
    shown = "".join(f"\n     row {row}: {texts.decoded(row)}" for row in found[:_SHOWN])
    return f"{len(found)} entries contain {one.find!r}; name the row:{shown}"


def _new_value(one: Edit, old: dict[str, Any] | None, fields: Fields) -> dict[str, Any] | str:
    given = {part: getattr(one, part) for part in PARTS if getattr(one, part) is not None}
    named = {getattr(fields, part): value for part, value in given.items()}
    if "text" in given:
        return named
    if old is None:
        return "the record of this entry cannot be read, so its parts are not known: give the whole `text`"
    if fields.text not in old:
        return {**old, **named}
    # The text says the parts, too: what is replaced must stand there once, or nobody knows where.
    text = old[fields.text]
    for part, value in given.items():
        before = old.get(getattr(fields, part))
        if before is None:
            return f"the record has a text and no {part}: give the whole `text`"
        if not isinstance(before, str) or text.count(before) != 1:
            return (
                f"the text {text!r} does not hold its {part} {before!r} exactly once: give the whole `text`"
            )
        text = text.replace(before, value)
    return {**old, **named, fields.text: text}


def _codes(
    replaced: dict[int, tuple[dict[str, Any], Record]],
    rows_of_tokens: list[list[int]],
    store: KnowledgeStore,
    tokenizer: Tokenizer,
    idf: Tensor,
) -> Tensor:
    """[n, C] codes of the new entries. Tokens that no entry had so far get their weight in `idf`."""
    keys = [
        records.key_tokens(record, tokens[: store.width], tokenizer)
        for (_, record), tokens in zip(replaced.values(), rows_of_tokens, strict=True)
    ]
    flat = torch.tensor([token for key in keys for token in key], dtype=torch.int64)
    lengths = torch.tensor([len(key) for key in keys])
    held = torch.zeros(store.vocab_size, dtype=torch.bool)
    held[store.classes[flat].long()] = True
    idf[held[store.classes.long()] & (idf == 0)] = math.log(
        store.num_entries + 1
    )  # as of a token of one entry
    table = token_table(store.classes, idf, store.code_dim, store.seed)
    return entry_codes(table, flat, torch.cumsum(lengths, 0) - lengths)


def _scores(code: Tensor, store: KnowledgeStore) -> Tensor:
    """[side, side]: how near a code is to the means of the row and of the column of each slot."""
    rows, columns = (
        2 * means @ code - (means * means).sum(1) for means in (store.row_means, store.column_means)
    )
    return rows[:, None] + columns


def _nearest_empty(code: Tensor, lengths: Tensor, store: KnowledgeStore) -> int:
    return int(_scores(code, store).view(-1).masked_fill(lengths > 0, -math.inf).argmax())


def _put(tensors: dict[str, Tensor], one: Done, tokens: list[int], code: Tensor) -> None:
    for name, empty in (("ids", 0), ("lengths", 0), ("codes", 0), ("rows", -1)):
        tensors[name][one.old_slot] = empty
    tensors["ids"][one.slot, : len(tokens)] = torch.tensor(tokens).to(tensors["ids"].dtype)
    tensors["lengths"][one.slot] = len(tokens)
    tensors["codes"][one.slot] = code
    tensors["rows"][one.slot] = one.row
