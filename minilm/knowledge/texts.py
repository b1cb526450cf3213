"""What entries say, for people: the record of the source file where it is still there, else the decoded tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from minilm.data.tokenizer import Tokenizer
from minilm.errors import DataError
from minilm.knowledge import records
from minilm.knowledge.files import TOKENIZER
from minilm.knowledge.records import Fields
from minilm.knowledge.store import KnowledgeStore


def tokenizer_of(store: KnowledgeStore) -> Tokenizer:
    """The tokenizer that the store was made with, from its folder. Raises DataError for another one."""
    if store.path is None:
        raise DataError("A knowledge store that has no folder has no tokenizer.")
    tokenizer = Tokenizer.load(store.path / TOKENIZER)
    if tokenizer.fingerprint != store.description["tokenizer"]["fingerprint"]:
        raise DataError(
            f"{store.path / TOKENIZER} is not the tokenizer that this knowledge store was made with. Copy the store "
            "again, or build it again."
        )
    return tokenizer


class Texts:
    """The texts of a store's entries by source row.

    note   why decoded tokens are shown instead of the source's text; None while the source is as it was
    """

    def __init__(self, store: KnowledgeStore, tokenizer: Tokenizer) -> None:
        self.store, self.tokenizer = store, tokenizer
        self.edited = {
            edit["row"]: edit["record"] for step in store.description["lineage"] for edit in step["edits"]
        }
        self._source, self.note = _unchanged(store.description.get("source"))

    def of(self, rows: Iterable[int]) -> dict[int, str]:
        """The whole text of each row, also of one that was cut to the width of the store."""
        rows = list(rows)
        found = self.records(rows)
        fields = fields_of(self.store)
        texts = {}
        for row in rows:
            record = records.record_of(found[row], fields) if row in found else None
            texts[row] = record.text if isinstance(record, records.Record) else self.decoded(row)
        return texts

    def records(self, rows: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The JSON records of those rows that have one: edited ones, and all where the source is as it was."""
        rows = set(rows)
        found = {row: self.edited[row] for row in rows & self.edited.keys()}
        if self._source is not None:
            at = {int(self.store.offsets[row]): row for row in rows - found.keys()}
            for offset, line in _lines_at(self._source, sorted(at)):
                found[at[offset]] = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
        return found

    def decoded(self, row: int) -> str:
        """The text of the tokens that the store holds, which is all that a model sees."""
        return self.tokenizer.decode(self.store.tokens_of(row))

    def find(self, part: str) -> list[int]:
        """The source rows whose decoded tokens contain this text."""
        store, found = self.store, []
        for begin in range(0, store.num_entries, 1 << 16):
            slots = store.slots[begin : begin + (1 << 16)].long()
            # As lists: taking a million tensors apart element by element needs minutes.
            for row, (ids, length) in enumerate(
                zip(store.ids[slots].tolist(), store.lengths[slots].tolist(), strict=True), begin
            ):
                if part in self.tokenizer.decode(ids[:length]):
                    found.append(row)
        return found


def fields_of(store: KnowledgeStore) -> Fields:
    """The names that the store's source gives to the parts of a record."""
    made_from = store.description.get("made_from") or {}
    return Fields(**made_from.get("fields", {}))


def statistics(store: KnowledgeStore) -> dict[str, float]:
    """Numbers of a store for `minilm knowledge info`: lengths in tokens, distinct tokens, rows, columns."""
    held = store.lengths > 0
    lengths = store.lengths[held].double()
    grid = held.view(store.side, store.side)
    distinct, num_held = 0, max(1, int(held.sum()))
    column = torch.arange(store.width)
    for begin in range(0, store.num_slots, 1 << 16):
        part = slice(begin, begin + (1 << 16))
        # Beyond the length stands -1, which no token is.
        ordered = store.ids[part].masked_fill(column >= store.lengths[part][:, None], -1).sort(dim=1).values
        another = torch.ones_like(ordered, dtype=torch.bool)
        another[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        distinct += int((another & (ordered >= 0)).sum())
    return {
        "entries": store.num_entries,
        "slots": store.num_slots,
        "occupied": num_held if store.num_entries else 0,
        "shortest": float(lengths.min()) if store.num_entries else 0,
        "tokens_per_entry": float(lengths.sum() / num_held),
        "longest": float(lengths.max()) if store.num_entries else 0,
        "distinct_tokens_per_entry": distinct / num_held,
        "least_in_row": int(grid.sum(1).min()),
        "most_in_row": int(grid.sum(1).max()),
        "least_in_column": int(grid.sum(0).min()),
        "most_in_column": int(grid.sum(0).max()),
        "without_code": int((held & (store.codes == 0).all(dim=1)).sum()),
    }


def _unchanged(source: dict[str, Any] | None) -> tuple[Path | None, str | None]:
    if source is None:
        return None, "The store has no source file: decoded tokens are shown."
    path = Path(source["path"])
    if not path.is_file():
        return None, f"The source {path} is not there any more: decoded tokens are shown instead of its text."
    if path.stat().st_size != source["size_bytes"] or records.checksum(path) != source["sha256"]:
        return (
            None,
            f"The source {path} was changed since the build: decoded tokens are shown instead of its text.",
        )
    return path, None


def _lines_at(path: Path, offsets: list[int]) -> Iterable[tuple[int, bytes]]:
    """The lines that begin at these offsets, which rise."""
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            for offset in offsets:
                file.seek(offset)
                yield offset, file.readline()
        return
    wanted = list(reversed(offsets))
    for piece in records.pieces(path):  # a compressed file can only be read from its beginning
        while wanted and wanted[-1] < piece.offset + len(piece.data):
            begin = wanted[-1] - piece.offset
            yield wanted.pop(), piece.data[begin:].split(b"\n", 1)[0]
        if not wanted:
            return
