"""Sources to a store. What is under the final name is always whole; what is unfinished is under NAME.building.

Documents are read in order. Exact duplicates are dropped over the whole corpus, validation sources first, so
training and validation share no document. A hash of its content decides which split a document is in: neither
its place nor any other document has a say. Encoding runs on all cores, in the threads of the `tokenizers`
library, while the next documents are read and the last ones written; order and result do not depend on it.

A killed build goes on where it last noted its progress: what is before that is read again to know the documents
(quick), but not encoded again (slow). A build that fails removes what it wrote. At the end the files are read
back for their checksums, the manifest is written, everything is flushed to the disk, and the folder renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilm.data import labels
from minilm.data import store as stores
from minilm.data.documents import MAX_DOCUMENT_BYTES, ReadInterrupted
from minilm.data.encoding import BATCHES, Corpus, Output
from minilm.data.progress import progress
from minilm.data.sources import Source, parse_sources
from minilm.data.store import SPLITS, Store
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError

ON_BAD_LINE = ("error", "skip")
_PROGRESS = "progress.json"
_NOTE_EVERY_SECONDS = 10.0
_ENOUGH_VALIDATION_BYTES = 500_000  # its sampling error is then below that of a training run


@dataclass(frozen=True)
class Built:
    """A store and how it came about."""

    store: Store
    reused: bool  # it was there already, built with the same settings from the same files
    resumed: bool  # a killed build was finished
    seconds: float


def build(
    out: str | Path,
    sources: Sequence[str | Mapping[str, Any]],
    tokenizer: Tokenizer | None,
    *,
    validation_sources: Sequence[str | Mapping[str, Any]] = (),
    validation_fraction: float | None = None,
    on_bad_line: str = "error",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    entries_of: str | Path | None = None,
    force: bool = False,
) -> Built:
    """Build the store `out`, or find that it is there already.

    sources              what to train on, see sources.py
    tokenizer            None for a synthetic source, whose documents are token ids
    validation_sources   held out as a whole; documents of `sources` that are also in them are dropped
    validation_fraction  of the documents of `sources` that are held out. Default: 0 with validation sources, else
                         0.01, 0.02, 0.05 or 0.1: the least that gives 500 kB
    on_bad_line          "error" stops at the first bad document, "skip" counts and reports them
    entries_of           the knowledge source (JSON Lines) whose rows the labels of the documents name; see labels.py
    force                replace another store of this name (never a folder that is something else)

    Raises ConfigError and DataError: wrong settings, unreadable or empty sources, bad lines, no space left.
    """
    began = time.monotonic()
    out = Path(out).expanduser().resolve()
    settings, all_sources = _settings(
        sources, tokenizer, validation_sources, validation_fraction, on_bad_line, max_document_bytes
    )
    if entries_of is not None:
        settings["entries_of"] = labels.described_source(labels.KnowledgeSource.read(entries_of))
    key = _digest(settings)
    if (existing := _existing(out, key, settings, force)) is not None:
        return Built(existing, True, False, time.monotonic() - began)
    folder = out.with_name(out.name + ".building")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            done = _progress_of(folder, key)
            _write(folder, done, settings, all_sources, tokenizer)
            _publish(folder, out)
    except OSError as error:
        _clean(folder)
        raise _disk_error(error, out, all_sources) from error
    except (ConfigError, DataError) as error:
        if not isinstance(error, _Busy | ReadInterrupted):
            _clean(folder)
        raise
    # The checksums were just taken from the disk itself: not once more.
    return Built(Store.open(out, tokenizer, verify=False), False, bool(done), time.monotonic() - began)


def _settings(
    specs: Sequence[str | Mapping[str, Any]],
    tokenizer: Tokenizer | None,
    validation_specs: Sequence[str | Mapping[str, Any]],
    fraction: float | None,
    on_bad_line: str,
    limit: int,
) -> tuple[dict[str, Any], list[tuple[Source, bool]]]:
    """All that decides the contents, and the sources, each with "is it held out as a whole"; those come first."""
    if on_bad_line not in ON_BAD_LINE:
        raise ConfigError(f"on_bad_line is {on_bad_line!r}: choose {' or '.join(ON_BAD_LINE)}.")
    if fraction is not None and not 0 <= fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction}: it must be 0 or more and below 1.")
    parsed = parse_sources([*validation_specs, *specs] if specs else [])
    synthetic = parsed[0].kind == "synthetic"
    if synthetic and tokenizer is not None:
        raise ConfigError(f"{parsed[0].place} gives token ids: it is built without a tokenizer.")
    if not synthetic and tokenizer is None:
        raise ConfigError(
            "A tokenizer is needed to build a store from text: give its folder (`--tokenizer DIR`), made by `minilm "
            "tokenizer train`."
        )
    sources = [(source, number < len(validation_specs)) for number, source in enumerate(parsed)]
    if fraction is None:
        fraction = 0.0 if validation_specs else default_fraction(sum(source.size_bytes for source in parsed))
    vocab_size = tokenizer.num_tokens if tokenizer else parsed[0].markov_settings().vocab
    stores.smallest_dtype(vocab_size)
    return {
        "version": stores.VERSION,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "vocab_size": vocab_size,
        "validation_fraction": fraction,
        "on_bad_line": on_bad_line,
        "max_document_bytes": limit,
        "python": platform.python_version() if any(s.kind == "builtin" for s, _ in sources) else None,
        "sources": [
            {"name": s.name, "weight": s.weight, "held_out": held_out, **s.identity()}
            for s, held_out in sources
        ],
    }, sources


def default_fraction(size_bytes: int) -> float:
    """The share of documents that is held out where none was asked for; few values, so that it seldom changes."""
    if size_bytes == 0:
        return 0.01  # a streamed data set: presumably large
    return next((f for f in (0.01, 0.02, 0.05) if f * size_bytes >= _ENOUGH_VALIDATION_BYTES), 0.1)


def _existing(out: Path, key: str, settings: dict[str, Any], force: bool) -> Store | None:
    """The store if it is the one that would be built. DataError for one that would be lost."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / stores.MANIFEST).is_file():
        raise DataError(f"{out} exists and is not a store: choose another name, or remove it yourself.")
    try:
        manifest = stores.read_manifest(out)
        if manifest["settings_fingerprint"] == key:
            return Store.open(out)
        old = manifest["settings"]
        differing = [name for name in settings if json.dumps(settings[name]) != json.dumps(old.get(name))]
        problem = f"It was built with other settings or from other files ({', '.join(differing)} differ)."
    except DataError as error:
        problem = str(error)
    if force:
        return None
    raise DataError(f"The store {out} exists. {problem} `--force` replaces it; or choose another name.")


class _Busy(DataError):
    """Another process is building this store: its files are not ours to remove."""


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _Busy(f"Another process is building this store in {folder}. Wait for it to end.") from error
        yield


def _progress_of(folder: Path, key: str) -> dict[str, Any]:
    """What an earlier, killed build of the same settings noted; {} (and an empty folder) where there is none."""
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads((folder / _PROGRESS).read_bytes())
        if (
            noted["key"] == key
            and noted["batches"] == BATCHES
            and all((folder / f).stat().st_size >= size for f, size in noted["sizes"].items())
        ):
            return noted
    for path in folder.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {}


def _write(
    folder: Path,
    done: dict[str, Any],
    settings: dict[str, Any],
    sources: list[tuple[Source, bool]],
    tokenizer: Tokenizer | None,
) -> None:
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
        if Tokenizer.load(folder / "tokenizer").fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"Tokenizer {tokenizer.name} becomes another one when it is saved and loaded again."
            )
    names = [source.name for source, _ in sources]
    key, last_note = _digest(settings), time.monotonic()
    with (
        Output(folder, names, settings["vocab_size"], done.get("sizes", {})) as output,
        Corpus(settings, tokenizer, output, skip_items=done.get("items", 0)) as corpus,
        progress("encoding", sum(source.size_bytes for source, _ in sources)) as advance,
    ):
        for source, held_out in sources:
            for _ in corpus.take(source, held_out):
                advance(corpus.position.done_bytes, f"{corpus.num_documents} documents")
                if time.monotonic() - last_note > _NOTE_EVERY_SECONDS and not corpus.replaying:
                    corpus.flush()
                    noted = {"key": key, "batches": BATCHES, "items": corpus.items, "sizes": output.sync()}
                    _note(folder / _PROGRESS, noted)
                    last_note = time.monotonic()
            corpus.flush()
        output.sync()
    corpus.require_documents()
    manifest = corpus.manifest(settings, sources)
    with progress("checksums", sum(f["size_bytes"] for f in stores.files_of(manifest))) as advance:
        done_bytes = 0

        def more(count: int) -> None:
            nonlocal done_bytes
            done_bytes += count
            advance(done_bytes, "")

        for file in stores.files_of(manifest):
            file["blake2b"] = stores.checksum(folder / file["path"], more)
    manifest["settings_fingerprint"] = key
    labels.seal(folder, manifest)


def _publish(folder: Path, out: Path) -> None:
    """Give the finished folder its name, in one step."""
    (folder / _PROGRESS).unlink(missing_ok=True)
    vouched = {f["path"] for f in stores.files_of(stores.read_manifest(folder))}
    for path in folder.glob("*/*.bin"):
        if path.relative_to(folder).as_posix() not in vouched:
            path.unlink()  # of a source without documents in this split
    (folder / "lock").unlink()
    for split in SPLITS:
        _fsync(folder / split)
    for path in [*(folder / "tokenizer").glob("*"), folder]:
        _fsync(path)
    replaced = None
    if out.exists() and any(out.iterdir()):
        replaced = out.with_name(f"{out.name}.replaced-{os.getpid()}")
        out.rename(replaced)
    folder.rename(out)
    _fsync(out.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def _note(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clean(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _disk_error(error: OSError, out: Path, sources: list[tuple[Source, bool]]) -> Exception:
    """An OSError while writing, as a paragraph."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError(f"The store {out} cannot be written: {error.strerror or error} ({error.filename}).")
    size = sum(source.size_bytes for source, _ in sources)
    # With 2 bytes a token and 3 to 4 bytes of text a token; compressed sources hold about 4 times their size.
    need = (
        f"roughly {size * 0.7 / 1e6:.0f} MB for sources of {size / 1e6:.0f} MB, more if they are compressed"
    )
    while not out.exists():
        out = out.parent
    free = shutil.disk_usage(out).free / 1e6
    return DataError(
        f"No space left for the store ({error.strerror}): {free:.0f} MB are free now at {out}, after what was written "
        f"has been removed, and a store needs {need if size else 'about 0.7 times the size of its text'}. "
        "Make room, or build it on another disk."
    )


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
