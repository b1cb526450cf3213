"""Labels: from which entry of a knowledge source can a token be known. From spans of characters to tokens.

A record of JSON Lines may say so beside its text (or under another name, source option `entries=FIELD`):

    {"text": "The river Tamo rises in Besk.", "entries": [[24, 28, 1187]]}

[start, end, row]: the characters text[start:end] (end exclusive) can be known from record `row` (0, 1, 2, ... in the
order of the JSON Lines file from which the knowledge is built; blank lines are not records). Spans may stand in any
order and may not overlap.

A token belongs to a span when at least one of its characters lies in it; a token that touches two spans belongs to
the one with more of its characters, of two with as many to the one that stands first. So a label never gets lost
between two tokens, and a token that has letters of the answer counts as answer. A space before a word is a part of
the word's token in most tokenizers, and a token of several bytes of one character has that character whole.

In a store the labels lie beside the tokens of each source that has any, `NAME.entries.bin`: int32 for each token, -1
where no entry is known (special tokens always). `write_entries` adds or replaces them in a store that exists.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilm.data import store as stores
from minilm.data.store import SPLITS, Store
from minilm.errors import DataError, listed

FIELD = "entries"
LARGEST_ROW = 2**31 - 1
Span = tuple[int, int, int]  # first character, end (exclusive), row of the knowledge source


@dataclass(frozen=True)
class KnowledgeSource:
    """The JSON Lines file whose records the labels name, by its content."""

    name: str
    sha256: str
    records: int

    @classmethod
    def read(cls, path: str | Path) -> KnowledgeSource:
        """Hash a file as it lies on the disk, and count its records (also of a .gz file). Raises DataError."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
                file.seek(0)
                lines = gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file
                records = sum(bool(line.strip()) for line in lines)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"The knowledge source {path} cannot be read: {error}.") from error
        if records == 0:
            raise DataError(f"The knowledge source {path} is empty: it must have one JSON object a line.")
        return cls(path.name, digest.hexdigest(), records)


def spans_of(value: object, text: str) -> tuple[tuple[Span, ...], list[str]]:
    """The spans of a record in the order of the text, and all that is wrong with them."""
    if not isinstance(value, list):
        return (), [f"a list of [start, end, row] is needed, not {type(value).__name__}"]
    spans, problems = [], []
    for number, item in enumerate(value):
        if not isinstance(item, list) or len(item) != 3 or any(type(x) is not int for x in item):
            problems.append(f"number {number}, {json.dumps(item)[:60]}, is not [start, end, row] of integers")
            continue
        start, end, row = item
        if not 0 <= start < end <= len(text):
            problems.append(
                f"number {number}, {item}, does not lie in the text, which has {len(text)} characters"
            )
        if not 0 <= row <= LARGEST_ROW:
            problems.append(f"number {number}, {item}, names row {row}: 0 to {LARGEST_ROW} are possible")
        spans.append((start, end, row))
    spans.sort()
    problems += [
        f"{list(one)} and {list(other)} overlap"
        for one, other in itertools.pairwise(spans)
        if other[0] < one[1]
    ]
    return tuple(spans), problems


def token_entries(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> np.ndarray:
    """Characters of each token [n] and spans -> int32 [n]: row of the span that the token belongs to, or -1.

    offsets   first character and end (exclusive) of each token, in the order of the text
    Raises DataError for a span that no token has a character of (a tokenizer that drops a part of the text).
    """
    entries = np.full(len(offsets), -1, dtype=np.int32)
    most = np.zeros(len(offsets), dtype=np.int64)
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    for start, end, row in spans:
        first = int(np.searchsorted(ends, start, side="right"))
        stop = int(np.searchsorted(starts, end, side="left"))
        within = slice(first, stop)
        shared = np.minimum(ends[within], end) - np.maximum(starts[within], start)
        if not (shared > 0).any():
            raise DataError(
                f"no token stands for the characters {start} to {end} of the text, which are labelled with row {row}: "
                "the tokenizer drops them"
            )
        better = shared > most[within]
        entries[within][better] = row
        most[within][better] = shared[better]
    return entries


def write_entries(
    store: Store, split: str, source: str, entries: np.ndarray, *, entries_of: KnowledgeSource | None = None
) -> Store:
    """Give the tokens of one source and split of a store their labels, in place of any it has; the store reopened.

    entries     integers [num_tokens] in the order of the store: row of the knowledge source, or -1
    entries_of  the knowledge source whose rows these are; a store can have labels of one only

    The manifest is sealed anew, so the fingerprint changes. A process that is killed meanwhile leaves a store that is
    whole, with the old labels, with none for this source, or with the new ones. Not for two writers at once.

    Raises DataError for an array that does not fit, with all that is wrong.
    """
    manifest = stores.read_manifest(store.path)
    shard = next((s for s in store.shards(split) if s.source == source), None)
    if shard is None:
        names = ", ".join(s.source for s in store.shards(split))
        raise DataError(f"The {split} split of {store.path} has no source {source!r}, but {names}.")
    of = None if entries_of is None else entries_of.sha256
    problems = _problems(entries, shard.num_tokens, entries_of)
    others = [
        f"{where}/{name}"
        for where in SPLITS
        for name, counts in manifest["splits"][where]["sources"].items()
        if "entries_file" in counts and (where, name) != (split, source)
    ]
    if others and of != store.entries_of:
        problems.append(
            f"the labels of {', '.join(others)} name rows of another knowledge source "
            f"({store.entries_of and store.entries_of[:12]}) than these ({of and of[:12]})"
        )
    if problems:
        raise DataError(f"Labels for {split}/{source} of the store {store.path}: {listed(problems)}.")
    inside = f"{split}/{source}.entries.bin"
    path = store.path / inside
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(np.ascontiguousarray(entries, dtype="<i4").tobytes())
        file.flush()
        os.fsync(file.fileno())
    counts = manifest["splits"][split]["sources"][source]
    if counts.pop("entries_file", None) is not None:  # while file and checksum cannot change in one step
        del counts["labelled"]
        seal(store.path, manifest)
    temporary.replace(path)
    described = {"path": inside, "size_bytes": path.stat().st_size, "blake2b": stores.checksum(path)}
    counts |= {"entries_file": described, "labelled": int((np.asarray(entries) >= 0).sum())}
    manifest.pop("entries_of", None)
    if entries_of is not None:
        manifest["entries_of"] = described_source(entries_of)
    seal(store.path, manifest)
    return Store.open(store.path)


def described_source(source: KnowledgeSource) -> dict[str, Any]:
    """A knowledge source as a manifest names it."""
    return {"name": source.name, "sha256": source.sha256, "records": source.records}


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Give a manifest its fingerprint and write it, whole or not at all."""
    manifest["fingerprint"] = stores.content_fingerprint(manifest)
    path = folder / stores.MANIFEST
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _problems(entries: np.ndarray, num_tokens: int, source: KnowledgeSource | None) -> list[str]:
    entries = np.asarray(entries)
    if entries.shape != (num_tokens,) or not np.issubdtype(entries.dtype, np.integer):
        return [
            f"integers of shape [{num_tokens}], one for each token, are needed, not {entries.dtype} of "
            f"{list(entries.shape)}"
        ]
    problems = []
    if entries.min(initial=0) < -1:
        problems.append(f"the value {entries.min()} is neither a row (0 or more) nor -1")
    limit = LARGEST_ROW if source is None else source.records - 1
    if entries.max(initial=0) > limit:
        what = "" if source is None else f" of {source.name}"
        problems.append(f"row {entries.max()} is named, but the last one{what} is {limit}")
    return problems
