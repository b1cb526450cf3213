"""A JSON Lines file to a knowledge store, once: what is under the final name is whole, and never written over.

Pieces of the file are encoded by several processes and put together in the order of the file, so that the store is
the same byte for byte however many there are. All bad records are reported at once, by file and line. The store is
written beside its final name and renamed; a build that fails or is interrupted leaves nothing.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilm.data.progress import progress
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError, listed
from minilm.knowledge import records
from minilm.knowledge.files import publish, reserved
from minilm.knowledge.records import Encoded, Fields, Piece
from minilm.knowledge.store import DESCRIPTION, KnowledgeStore, read_description

_SHOWN = 20  # problems; their number is always told
_WORTH_PROCESSES_BYTES = 8 << 20  # a process needs some 3 s to begin, in which 8 MB are encoded
_LAYOUT = 1  # counts up when codes or places are computed in another way


@dataclass(frozen=True)
class Built:
    """A store and how it came about."""

    store: KnowledgeStore
    reused: bool  # it was there already, made from the same source with the same settings
    seconds: float


def build(
    source: str | Path,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    side: int = 1024,
    width: int = 32,
    code_dim: int = 64,
    seed: int = 0,
    fields: Fields | None = None,
    workers: int | None = None,
) -> Built:
    """Make the store `out`, or find that it is there already.

    source    JSON Lines file, may be compressed (.gz)
    side      of the square grid, a power of two: up to side * side entries
    width     tokens of an entry that are kept, up to 255
    code_dim  length of the codes
    seed      of the fixed random vectors of the tokens
    fields    names of the fields of a record
    workers   processes that encode; None: as many as there are cores, 1 for a small source

    Raises ConfigError for settings, DataError for the source, all problems at once by file and line, and for a folder
    that holds something else.
    """
    began = time.monotonic()
    source, out = Path(source).expanduser().resolve(), Path(out).expanduser().resolve()
    fields = fields or Fields()
    _check_settings(side, width, code_dim, workers, fields)
    made_from = {
        "source_sha256": records.checksum(source),
        "tokenizer": tokenizer.fingerprint,
        "side": side,
        "width": width,
        "code_dim": code_dim,
        "seed": seed,
        "fields": asdict(fields),
        "layout": _LAYOUT,
    }
    if (existing := _existing(out, made_from)) is not None:
        return Built(existing, True, time.monotonic() - began)
    with reserved(out) as folder:
        read = _read(source, tokenizer, side, width, fields, workers)
        if records.checksum(source) != made_from["source_sha256"]:
            raise DataError(f"{source} was changed while it was read: build again when it is finished.")
        settings = {
            **{name: made_from[name] for name in ("side", "width", "code_dim", "seed")},
            "vocab_size": tokenizer.num_tokens,
            "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
            "source": {
                "path": str(source),
                "sha256": made_from["source_sha256"],
                "size_bytes": source.stat().st_size,
            },
            "counts": read.counts,
            "made_from": made_from,
            "built_with": {name: version(name) for name in ("minilm", "tokenizers", "numpy", "torch")},
        }
        with progress("codes and layout", 0, "", 1):
            store = _assembled(settings, read, tokenizer)
        publish(store, tokenizer, folder, out)
    # The checksums were taken from the tensors that were written: not once more.
    return Built(KnowledgeStore.open(out, verify=False), False, time.monotonic() - began)


def _assembled(settings: dict[str, Any], read: _Read, tokenizer: Tokenizer) -> KnowledgeStore:
    return KnowledgeStore.assemble(
        settings,
        ids=torch.from_numpy(read.ids),
        lengths=torch.from_numpy(read.lengths),
        keys=torch.from_numpy(read.keys),
        key_starts=torch.from_numpy(np.cumsum(read.key_lengths) - read.key_lengths),
        offsets=torch.from_numpy(read.offsets),
        classes=torch.from_numpy(records.token_classes(tokenizer)),
    )


@dataclass
class _Read:
    """All records of a source, in its order."""

    ids: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    key_lengths: np.ndarray
    offsets: np.ndarray
    counts: dict[str, Any]


def _check_settings(side: int, width: int, code_dim: int, workers: int | None, fields: Fields) -> None:
    wrong = []
    if side < 1 or side & (side - 1):
        wrong.append(
            f"side is {side}: a power of two is needed, since the grid is made by halving (1024, 2048, ...)"
        )
    if not 1 <= width <= 255:
        wrong.append(f"width is {width}: an entry has 1 to 255 tokens")
    if code_dim < 2:
        wrong.append(f"code_dim is {code_dim}: at least 2 are needed, for rows and for columns")
    if workers is not None and workers < 1:
        wrong.append(f"workers is {workers}: at least 1 is needed")
    names = list(asdict(fields).values())
    if len(set(names)) < len(names):
        wrong.append(f"two parts of a record have the same field: {', '.join(names)}")
    if wrong:
        raise ConfigError(listed(wrong))


def _existing(out: Path, made_from: dict[str, Any]) -> KnowledgeStore | None:
    """The store if it is the one that would be made. DataError for anything else of that name."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / DESCRIPTION).is_file():
        raise DataError(
            f"{out} exists and is not a knowledge store: choose another name, or remove it yourself."
        )
    description = read_description(out)
    old = description.get("made_from")
    if description["lineage"]:
        problem = "It was edited since it was built."
    elif old != made_from:
        differ = [
            f"{key} is {_short((old or {}).get(key))} there, {_short(value)} now"
            for key, value in made_from.items()
            if (old or {}).get(key) != value
        ]
        problem = f"It was made from something else: {listed(differ)}."
    else:
        return KnowledgeStore.open(out)
    raise DataError(
        f"The knowledge store {out} exists. {problem}\nChoose another name, or remove it yourself."
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:13]}..." if isinstance(value, str) and len(value) > 24 else text


# ---------------------------------------------------------------- reading


def _read(
    source: Path, tokenizer: Tokenizer, side: int, width: int, fields: Fields, workers: int | None
) -> _Read:
    size = max(1, source.stat().st_size)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if size >= _WORTH_PROCESSES_BYTES else 1
    parts: list[Encoded] = []
    problems: list[str] = []
    rows = lines = num_problems = 0
    with progress("encoding", size) as advance, _encoder(tokenizer, width, fields, workers) as encode:
        for piece, part in encode(records.pieces(source)):
            num_problems += len(part.problems)
            problems += [
                f"{source}:{lines + line + 1}: {problem}"
                for line, problem in sorted(part.problems)[: _SHOWN - len(problems)]
            ]
            rows, part.lines, part.offsets = (
                rows + len(part.ids),
                part.lines + lines,
                part.offsets + piece.offset,
            )
            lines += part.num_lines
            if rows <= side * side:  # beyond, they are only counted
                parts.append(part)
            advance(piece.done_bytes, f"{rows:,} entries")
    if rows > side * side:
        need = 1 << ((rows - 1).bit_length() + 1) // 2
        problems.append(
            f"{source} has {rows:,} records, but a grid of side {side} has {side * side:,} slots: choose side {need} "
            f"({need * need:,} slots)"
        )
    elif rows + num_problems == 0:
        problems.append(f"{source} has no records: it must have one JSON object a line")
    if num_problems > _SHOWN:
        problems.append(f"and {num_problems - _SHOWN:,} more bad records of {rows + num_problems:,}")
    if problems:
        raise DataError(f"The store cannot be built: {listed(problems)}")
    return _together(parts, width, lines, source)


def _together(parts: list[Encoded], width: int, lines: int, source: Path) -> _Read:
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("ids", "lengths", "num_tokens", "keys", "key_lengths", "offsets", "lines", "hashes")
    }
    _, first, back = np.unique(joined["hashes"], return_index=True, return_inverse=True)
    again = np.flatnonzero(first[back] != np.arange(len(back)))
    cut = np.flatnonzero(joined["num_tokens"] > width)
    counts = {
        "records": len(back),
        "blank_lines": lines - len(back),
        "tokens": int(joined["num_tokens"].sum()),
        "truncated": len(cut),
        "truncated_lines": [int(line) + 1 for line in joined["lines"][cut[:5]]],
        "duplicates": len(again),
        "duplicate_lines": [
            [int(joined["lines"][first[back[n]]]) + 1, int(joined["lines"][n]) + 1] for n in again[:5]
        ],
    }
    kept = ("ids", "lengths", "keys", "key_lengths", "offsets")
    return _Read(**{name: joined[name] for name in kept}, counts=counts)


@contextlib.contextmanager
def _encoder(tokenizer: Tokenizer, width: int, fields: Fields, workers: int) -> Iterator[Any]:
    """Yields a function from pieces to (piece, encoded) in the same order, by `workers` processes."""
    if workers == 1:

        def here(found: Iterator[Piece]) -> Iterator[tuple[Piece, Encoded]]:
            for piece in found:
                yield piece, records.encode_piece(piece.data, piece.offset == 0, tokenizer, width, fields)

        yield here
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork of a process with threads may hang
        _begin,
        (tokenizer.hf, tokenizer.name, tokenizer.fingerprint, width, fields),
    )

    def there(found: Iterator[Piece]) -> Iterator[tuple[Piece, Encoded]]:
        under_way: deque[tuple[Piece, Future[Encoded]]] = deque()
        for piece in found:
            with _interrupts_wait():
                future = pool.submit(_encode, piece.data, piece.offset == 0)
            under_way.append((piece, future))
            if len(under_way) > 2 * workers:
                first, encoded = under_way.popleft()
                yield first, encoded.result()
        for first, encoded in under_way:
            yield first, encoded.result()

    try:
        yield there
    except BrokenProcessPool as error:
        raise DataError(
            "A process that encoded was killed, probably because memory ran out. Use fewer `--workers`."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Processes that begin in here never see Ctrl-C: the first process, which sees it afterwards, ends them.

    Otherwise each one would print a traceback of its own.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_of_this_process: dict[str, Any] = {}  # of a worker: what it was begun with


def _begin(hf: Any, name: str, fingerprint: str, width: int, fields: Fields) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to all processes; the first one ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = Tokenizer(hf, name)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"Tokenizer {name} is another one in a new process. Use `--workers 1`.")
    _of_this_process.update(tokenizer=tokenizer, width=width, fields=fields)


def _encode(data: bytes, first: bool) -> Encoded:
    worker = _of_this_process
    return records.encode_piece(data, first, worker["tokenizer"], worker["width"], worker["fields"])
