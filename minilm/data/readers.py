"""One file or data set to documents. Every reader names the place of each document and survives damaged input."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minilm.data.documents import BadDocument, Document, Position, ReadInterrupted, document_of
from minilm.data.labels import FIELD, spans_of
from minilm.errors import DataError

Found = Iterator[Document | BadDocument]

COMPRESSED = (".gz", ".zst")
RECORDS = (".jsonl", ".ndjson", ".parquet")
TEXTS = (".txt", ".md", ".rst", ".text")


def kind_of(path: Path) -> str:
    """The suffix that decides how a file is read: `.jsonl` for `a.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def read_file(
    path: Path, text_field: str, limit: int, position: Position, entries_field: str = FIELD
) -> Found:
    """The documents of one file: JSON Lines and parquet by records, anything else as one text.

    entries_field   of JSON Lines: where a record has its labels; empty for none
    """
    before = position.done_bytes
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path, text_field, limit, position)
        elif kind in RECORDS:
            yield from _json_lines(path, (text_field, entries_field), limit, position)
        else:
            yield _text(path, limit)
        position.done_bytes = before + path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path, fields: tuple[str, str], limit: int, position: Position) -> Found:
    longest = 6 * limit + 65536  # JSON may write a byte as six (\u0000), and other fields want room
    before, number, line_end = position.done_bytes, 0, True
    with path.open("rb") as raw:
        lines = _decompressed(path, raw)
        while True:
            try:
                line = lines.readline(longest)
            except (EOFError, gzip.BadGzipFile, zlib.error, _Damaged) as error:
                yield BadDocument(f"{path}:{number + 1}", "compressed file is damaged or cut off", str(error))
                return
            if not line:
                return
            was_end, line_end = line_end, line.endswith(b"\n")
            if not was_end:
                continue  # the rest of a line that was too long
            number += 1
            where = f"{path}:{number}"
            if number % 256 == 1:
                position.done_bytes = before + raw.tell()
            if not line_end and len(line) == longest:
                yield BadDocument(where, "line is too long", f"more than {longest} bytes")
            elif line.strip():
                yield _json_line(line, where, fields, limit, first=number == 1)
            else:
                line_end = True


def _json_line(
    line: bytes, where: str, fields: tuple[str, str], limit: int, *, first: bool
) -> Document | BadDocument:
    text_field, entries_field = fields
    try:
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return BadDocument(where, "not UTF-8", f"byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return BadDocument(where, "not JSON", str(error)[:100])
    if not isinstance(record, dict):
        return BadDocument(where, "not a JSON object", type(record).__name__)
    if text_field not in record:
        return BadDocument(
            where, f"no field {text_field!r}", f"it has {', '.join(map(repr, list(record)[:8]))}"
        )
    document = document_of(record[text_field], where, limit)
    if isinstance(document, Document) and record.get(entries_field) is not None:
        document.entries, problems = spans_of(record[entries_field], document.text)
        if problems:
            return BadDocument(where, f"wrong labels in the field {entries_field!r}", "; ".join(problems))
    return document


def _text(path: Path, limit: int) -> Document | BadDocument:
    where = str(path)
    with path.open("rb") as raw:
        try:
            data = _decompressed(path, raw).read(limit + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error, _Damaged) as error:
            return BadDocument(where, "compressed file is damaged or cut off", str(error))
    if len(data) > limit:
        return BadDocument(where, "document is too long", f"more than {limit} bytes")
    try:
        return document_of(data.decode("utf-8-sig"), where, limit)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        return BadDocument(f"{where}:{line}", "not UTF-8", f"byte {error.start}")


def _parquet(path: Path, text_field: str, limit: int, position: Position) -> Found:
    import pyarrow
    import pyarrow.parquet

    before, size, number = position.done_bytes, path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise DataError(
                    f"{path} has no column {text_field!r}; it has {', '.join(map(repr, names))}. Name the right one: "
                    f"`{path},field=NAME`."
                )
            total = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield document_of(text, f"{path} row {number}", limit)
                position.done_bytes = before + size * number // total
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield BadDocument(f"{path} row {number + 1}", "parquet file is damaged", _first_line(error))


def read_dataset(name: str, config: str, split: str, text_field: str, limit: int) -> Found:
    """A Hugging Face data set: a folder of `save_to_disk`, a folder of files, or a name (streamed, not stored)."""
    rows, label = open_dataset(name, config, split), f"hf:{name}:{config}:{split}"
    columns = rows.column_names
    if columns is not None and text_field not in columns:
        raise DataError(
            f"The data set {label} has no column {text_field!r}; it has {', '.join(map(repr, columns))}. Name the "
            f"right one: `{label},field=NAME`."
        )
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield document_of(row.get(text_field), f"{label} row {number}", limit)
    except (OSError, ValueError, RuntimeError) as error:
        raise ReadInterrupted(
            f"Reading the data set {label} failed after row {number}: {_first_line(error)}. Run the same command again "
            "to go on."
        ) from error


def open_dataset(name: str, config: str, split: str) -> Any:
    """The rows of a Hugging Face data set. Raises DataError with the splits that there are."""
    import datasets

    try:
        if is_saved_dataset(Path(name)):
            opened = datasets.load_from_disk(name)
            if not isinstance(opened, datasets.DatasetDict):
                return opened
            if split not in opened:
                raise DataError(
                    f"The data set {name} has no split {split!r}, but {', '.join(opened)}: write hf:{name}::SPLIT."
                )
            return opened[split]
        return datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The data set hf:{name}:{config}:{split} cannot be read: {_first_line(error)}"
        ) from error


def is_saved_dataset(path: Path) -> bool:
    """Is it a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote?"""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class _Damaged(Exception):
    """A compressed file ends in the middle or has wrong contents."""


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdReader(raw), 1 << 18)  # type: ignore[return-value]
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd, and notices a file that was cut off: the library's own reader ends silently there."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._zstd = raw, zstandard
        self._frame: Any = None  # the decompressor of the frame that is open
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and not (data := self._raw.read(1 << 17)):
                if self._frame is not None:
                    raise _Damaged("the file ends in the middle of a zstd frame")
                return 0
            self._input = self._input or data
            if self._frame is None:
                self._frame = self._zstd.ZstdDecompressor().decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstd.ZstdError as error:
                raise _Damaged(str(error)) from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
