"""The records of a knowledge source, a JSON Lines file: their text, their key part, and both as token ids.

    {"text": "The river Tamo rises in Besk."}
    {"subject": "Tamo", "relation": "rises in", "object": "Besk"}

The text is the field `text`, or subject, relation and object joined by spaces. The KEY PART, by which an entry is
found, is subject and relation where a record has a subject, else all that fits of the text. Records are numbered from
0 in the order of the file, blank lines not counted: that number is the SOURCE ROW, the name of an entry for good.

The file is cut into pieces of about a megabyte at line ends. A piece is encoded on its own, in this process or in
another one, and the result does not depend on which.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from minilm.data.documents import content_key
from minilm.data.tokenizer import Tokenizer
from minilm.errors import DataError

PIECE_BYTES = 1 << 20
LONGEST_LINE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The names that a source gives to the parts of a record."""

    text: Annotated[str, Field(min_length=1, description="field with the whole text")] = "text"
    subject: Annotated[str, Field(min_length=1, description="field with what the entry is about")] = "subject"
    relation: Annotated[str, Field(min_length=1, description="field with what it says of it")] = "relation"
    object: Annotated[str, Field(min_length=1, description="field with what is to be known")] = "object"


@dataclass(frozen=True)
class Piece:
    """Some whole lines of a file: their bytes, where they begin in the (decompressed) file, and how far reading is."""

    data: bytes
    offset: int
    done_bytes: int  # of the file on the disk


@dataclass(frozen=True)
class Record:
    """The text of an entry, and the words by which it is found; None: all of its text."""

    text: str
    key: str | None


@dataclass
class Encoded:
    """The records of a piece. Lines count from 0 within the piece.

    ids      int16 or int32 [n, width], zeros beyond the length;  lengths uint8 [n]
    num_tokens  int64 [n], before cutting
    keys     as ids, the key parts one after another;  key_lengths int64 [n]
    offsets  int64 [n], within the piece;  lines int64 [n];  hashes uint64 [n], of the texts
    problems (line, what is wrong)
    """

    num_lines: int
    ids: np.ndarray
    lengths: np.ndarray
    num_tokens: np.ndarray
    keys: np.ndarray
    key_lengths: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    problems: list[tuple[int, str]] = field(default_factory=list)


def checksum(path: Path) -> str:
    """sha256 of the file as it lies on the disk."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"The knowledge source {path} cannot be read: {error.strerror or error}.") from error


def pieces(path: Path, size: int = PIECE_BYTES) -> Iterator[Piece]:
    """The file, decompressed if it ends in .gz, cut at line ends. Raises DataError for one that cannot be read."""
    offset, number = 0, 0
    try:
        with path.open("rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            while data := lines.read(size):
                if not data.endswith(b"\n"):
                    data += lines.readline(LONGEST_LINE_BYTES)
                if not data.endswith(b"\n") and len(data) >= LONGEST_LINE_BYTES:
                    line = number + data.count(b"\n") + 1
                    raise DataError(
                        f"{path}:{line}: the line has more than {LONGEST_LINE_BYTES >> 20} MB. Is it JSON Lines, "
                        "one record a line?"
                    )
                yield Piece(data, offset, raw.tell())
                offset, number = offset + len(data), number + data.count(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut off after line {number}: {error}.") from error
    except OSError as error:
        raise DataError(f"The knowledge source {path} cannot be read: {error.strerror or error}.") from error


def record_of(value: Any, fields: Fields) -> Record | str:
    """What a line of JSON says, or what is wrong with it."""
    if not isinstance(value, dict):
        return f"a JSON object is needed, not {_kind(value)}"
    names = {role: getattr(fields, role) for role in ("text", "subject", "relation", "object")}
    given = {role: value[name] for role, name in names.items() if value.get(name) is not None}
    wrong = [
        f"field {names[role]!r} is {_kind(part)}, not a string"
        for role, part in given.items()
        if not isinstance(part, str)
    ]
    wrong += [
        f"field {names[role]!r} is empty"
        for role, part in given.items()
        if isinstance(part, str) and not part.strip()
    ]
    if "text" not in given and not {"subject", "object"} <= given.keys():
        has = ", ".join(map(repr, list(value)[:8])) or "none"
        wrong.append(
            f"no field {names['text']!r}, and not both {names['subject']!r} and {names['object']!r}; its fields: {has}"
        )
    if wrong:
        return "; ".join(wrong)
    text = given.get("text") or " ".join(
        given[role].strip() for role in ("subject", "relation", "object") if role in given
    )
    parts = [given[role].strip() for role in ("subject", "relation") if role in given]
    try:
        "".join((text, *parts)).encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate at character {error.start}: half of a character, which UTF-8 cannot write"
    return Record(text, " ".join(parts) if "subject" in given else None)


def encode_piece(data: bytes, first: bool, tokenizer: Tokenizer, width: int, fields: Fields) -> Encoded:
    """The records of a piece as token ids. `first`: it is the beginning of the file, where a byte order mark may be."""
    records, offsets, lines, problems = [], array("q"), array("q"), []
    at = number = 0
    for number, line in enumerate(_lines(data)):
        if line.strip():
            found = _parsed(line, fields, first=first and number == 0)
            if isinstance(found, str):
                problems.append((number, found))
            else:
                records.append(found)
                offsets.append(at)
                lines.append(number)
        at += len(line)
    texts, refused = _encoded([record.text for record in records], tokenizer)
    flat, num_tokens = _flat(texts, tokenizer)
    problems += [
        (lines[n], refused.get(int(n), "the text has no tokens")) for n in np.flatnonzero(num_tokens == 0)
    ]
    lengths = np.minimum(num_tokens, width)
    starts = np.cumsum(num_tokens) - num_tokens
    column = np.arange(width)
    inside = column < lengths[:, None]
    ids = np.zeros((len(records), width), dtype=flat.dtype)
    ids[inside] = flat[(starts[:, None] + column)[inside]]
    keys, key_lengths, refused = _keys(records, ids, inside, tokenizer)
    problems += [(lines[n], problem) for n, problem in refused.items()]
    return Encoded(
        num_lines=number + 1 if data else 0,
        ids=ids,
        lengths=lengths.astype(np.uint8),
        num_tokens=num_tokens,
        keys=keys,
        key_lengths=key_lengths,
        offsets=np.array(offsets, dtype=np.int64),
        lines=np.array(lines, dtype=np.int64),
        hashes=np.array([content_key(record.text.encode()) for record in records], dtype=np.uint64),
        problems=problems,
    )


def key_tokens(record: Record, ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens by which an entry with these ids is found."""
    # With a space before it, as the words stand inside a text: there they are cut into other tokens than at its start.
    return list(ids) if record.key is None else tokenizer.encode(f" {record.key}")


def token_classes(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [num_tokens]: equal for tokens that differ only in a space before them or in upper and lower case.

    So an entry that begins with "Paris" is found from a text that says " Paris". Tokenizers whose tokens do not stand
    for fixed bytes, and special tokens, have a class for each token.
    """
    classes = np.arange(tokenizer.num_tokens, dtype=np.int32)
    first: dict[bytes, int] = {}
    try:
        names = [tokenizer.token_bytes(token) for token in range(tokenizer.num_tokens)]
    except DataError:
        return classes
    for token, name in enumerate(names):
        word = (
            name.removeprefix(b" ").decode(errors="surrogateescape").lower().encode(errors="surrogateescape")
        )
        if word:
            classes[token] = first.setdefault(word, token)
    return classes


def _parsed(line: bytes, fields: Fields, *, first: bool) -> Record | str:
    try:
        value = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start} of the line)"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({str(error)[:100]})"
    return record_of(value, fields)


def _keys(
    records: list[Record], ids: np.ndarray, inside: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """The tokens of all key parts, the number of each, and what the tokenizer refused."""
    named = [n for n, record in enumerate(records) if record.key is not None]
    rows, problems = _encoded([f" {records[n].key}" for n in named], tokenizer)
    flat, sizes = _flat(rows, tokenizer)
    key_lengths = inside.sum(axis=1)
    key_lengths[named] = sizes
    is_named = np.zeros(len(records), dtype=bool)
    is_named[named] = True
    owner_is_named = np.repeat(is_named, key_lengths)
    keys = np.empty(len(owner_is_named), dtype=flat.dtype)
    keys[owner_is_named] = flat
    keys[~owner_is_named] = ids[inside & ~is_named[:, None]]
    return keys, key_lengths, {named[n]: problem for n, problem in problems.items()}


def _encoded(texts: list[str], tokenizer: Tokenizer) -> tuple[list[list[int]], dict[int, str]]:
    """Token ids of each text; for those that the tokenizer refuses none, and why."""
    try:
        return tokenizer.encode_batch(texts), {}
    except DataError:
        rows, refused = [], {}
        for n, text in enumerate(texts):
            try:
                rows.append(tokenizer.encode(text))
            except DataError as error:
                rows.append([])
                refused[n] = str(error)
        return rows, refused


def _flat(rows: list[list[int]], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    flat = array("h" if tokenizer.num_tokens <= 32767 else "i")
    for row in rows:
        flat.extend(row)
    return np.array(flat), np.array([len(row) for row in rows], dtype=np.int64)


def _lines(data: bytes) -> list[bytes]:
    """The lines with their ends, as reading the file gives them; a carriage return ends none."""
    *whole, rest = data.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
