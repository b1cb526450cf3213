"""The pipeline of a build: documents -> split, duplicates, token ids -> files, with everything counted."""

from __future__ import annotations

import platform
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from minilm.data import store as stores
from minilm.data.documents import BadDocument, Document, Position, Seen, in_validation
from minilm.data.labels import token_entries
from minilm.data.output import Output
from minilm.data.sources import Source
from minilm.data.store import SPLITS
from minilm.data.synthetic import Markov
from minilm.data.tokenizer import Tokenizer
from minilm.errors import DataError

_BATCH_BYTES = 1 << 20  # of text, encoded at once on all cores
_BATCH_DOCUMENTS = 1024
BATCHES = f"{_BATCH_BYTES}-{_BATCH_DOCUMENTS}"  # a build can go on only with the batches it began with
_IN_FLIGHT = 3  # batches: one being encoded, one read, one written
_BAD_SHOWN = 10


@dataclass
class _Encoded:
    """Documents of one batch and split as token ids."""

    split: str
    tokens: np.ndarray
    lengths: list[int]
    where: list[str]
    entries: np.ndarray | None  # the label of each token; None where no document has any


class Corpus:
    """Takes sources one after another, writes what is new of them, and knows what it took.

    skip_items   documents that an earlier build has written: they are read and counted, not encoded
    """

    def __init__(
        self, settings: dict[str, Any], tokenizer: Tokenizer | None, output: Output, *, skip_items: int = 0
    ) -> None:
        self.settings, self.tokenizer, self.output = settings, tokenizer, output
        self.skip_items = skip_items
        self.items = 0  # documents taken so far, bad ones and duplicates included
        self.position = Position()
        self.counts = {split: {} for split in SPLITS}  # type: dict[str, dict[str, Counter[str]]]
        self.bad: Counter[str] = Counter()  # by reason
        self.bad_of_source: Counter[str] = Counter()
        self.first_bad: list[str] = []
        self.duplicates: Counter[str] = Counter()
        self.synthetic: dict[str, Any] | None = None
        self._seen = Seen()
        self._labelled = False
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="minilm-encode")
        self._pending: deque[tuple[str, Future[list[_Encoded]]]] = deque()

    @property
    def replaying(self) -> bool:
        return self.items < self.skip_items

    @property
    def num_documents(self) -> int:
        return sum(c["documents"] for split in self.counts.values() for c in split.values())

    def take(self, source: Source, held_out: bool) -> Iterator[None]:
        """Work through a source; yields after each batch."""
        for split in SPLITS:
            self.counts[split][source.name] = Counter()
        chain = Markov(source.markov_settings()) if source.kind == "synthetic" else None
        if chain is not None:
            self.synthetic = {"rate_nats": chain.entropy_rate_nats, "place": source.place} | {
                split: {"nats": 0.0, "targets": 0} for split in SPLITS
            }
        for batch in _batches(source.documents(self.settings["max_document_bytes"], self.position)):
            good = self._good(batch, source)
            new = self._seen.add(np.array([d.key for d in good], dtype=np.uint64)) if good else []
            kept = [document for document, is_new in zip(good, new, strict=True) if is_new]
            self.duplicates[source.name] += len(good) - len(kept)
            written = (
                self.items < self.skip_items
            )  # notes are taken between batches, and batches do not change
            self.items += len(batch)
            parts = {split: [] for split in SPLITS}  # type: dict[str, list[Document]]
            for document in kept:
                out = held_out or in_validation(document.key, self.settings["validation_fraction"])
                parts["validation" if out else "train"].append(document)
            for split, documents in parts.items():
                count = self.counts[split][source.name]
                count["documents"] += len(documents)
                count["bytes"] += sum(d.num_bytes for d in documents)
                if chain is not None and self.synthetic is not None:
                    for d in documents:
                        assert d.tokens is not None
                        self.synthetic[split]["nats"] += chain.nats(d.tokens)
                        self.synthetic[split]["targets"] += len(d.tokens) - 1
            if not written:
                self._pending.append((source.name, self._pool.submit(self._encode, parts)))
                while len(self._pending) > _IN_FLIGHT:
                    self._write_next()
            yield

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def flush(self) -> None:
        """Write all that is being encoded."""
        while self._pending:
            self._write_next()

    def _write_next(self) -> None:
        name, future = self._pending.popleft()
        for part in future.result():
            self.output.write(part.split, name, part.tokens, part.lengths, part.where, part.entries)

    def _good(self, batch: list[Document | BadDocument], source: Source) -> list[Document]:
        good = []
        checked = [self._within_source(item) for item in batch]
        if self.settings["on_bad_line"] == "error" and (
            bad := [x for x in checked if isinstance(x, BadDocument)]
        ):
            others = "".join(f"\n  also {item}" for item in bad[1:_BAD_SHOWN])
            raise DataError(
                f"Bad document, {bad[0]}. Repair it, or pass over such documents with `--on-bad-line skip`, "
                f"which counts and lists them.{others}"
            )
        for item in checked:
            if isinstance(item, Document):
                self._labelled |= item.entries is not None
                good.append(item)
                continue
            self.bad[item.reason] += 1
            self.bad_of_source[source.name] += 1
            if len(self.first_bad) < _BAD_SHOWN:
                self.first_bad.append(str(item))
        return good

    def _within_source(self, item: Document | BadDocument) -> Document | BadDocument:
        """A document whose labels name records that the knowledge source does not have is a bad one."""
        source = self.settings.get("entries_of")
        if source is None or isinstance(item, BadDocument) or not item.entries:
            return item
        beyond = [f"{list(span)}" for span in item.entries if span[2] >= source["records"]]
        if not beyond:
            return item
        detail = f"{', '.join(beyond)}: the last is {source['records'] - 1}"
        return BadDocument(item.where, f"labels name rows that {source['name']} does not have", detail)

    def _encode(self, parts: dict[str, list[Document]]) -> list[_Encoded]:
        encoded = []
        for split, documents in parts.items():
            if not documents:
                continue
            where = [d.where for d in documents]
            if self.tokenizer is None:
                rows = [d.tokens for d in documents if d.tokens is not None]
                encoded.append(_Encoded(split, np.concatenate(rows), [len(r) for r in rows], where, None))
                continue
            # array.extend copies Python integers several times quicker than np.array does.
            flat, lengths = array("I"), []
            before = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            all_ids, labels = self._ids(documents)
            for ids in all_ids:
                start = len(flat)
                flat.extend(before)
                flat.extend(ids)
                flat.append(self.tokenizer.eos_id)
                lengths.append(len(flat) - start)
            entries = None
            if labels is not None:
                none = np.full(1, -1, dtype=np.int32)  # special tokens are in no text
                pieces = [piece for label in labels for piece in (*[none] * len(before), label, none)]
                entries = np.concatenate(pieces)
            encoded.append(_Encoded(split, np.frombuffer(flat, dtype=np.uint32), lengths, where, entries))
        return encoded

    def _ids(self, documents: list[Document]) -> tuple[list[list[int]], list[np.ndarray] | None]:
        """Ids of each document, and the labels of its tokens where any document has some."""
        assert self.tokenizer is not None
        try:
            if all(d.entries is None for d in documents):
                return self.tokenizer.encode_batch([d.text for d in documents]), None
            encoded = self.tokenizer.encode_offsets([d.text for d in documents])
            return [ids for ids, _ in encoded], [
                _labels(document, offsets) for document, (_, offsets) in zip(documents, encoded, strict=True)
            ]
        except DataError:
            for document in documents:  # which one was it
                try:
                    self.tokenizer.encode(document.text)
                except DataError as error:
                    raise DataError(f"{document.where}: {error}") from error
            raise

    def require_documents(self) -> None:
        """DataError for an empty split that should not be."""
        problems = []
        total = {split: sum(c["documents"] for c in self.counts[split].values()) for split in SPLITS}
        what = f"{self.items} documents read, {self.bad.total()} bad, {self.duplicates.total()} duplicates"
        if not any(total.values()):
            problems.append(f"The corpus is empty: {what}.")
            problems += [f"  {line}" for line in self.first_bad[:3]]
        elif total["train"] == 0:
            problems.append(f"No document is left for training: {what}, {total['validation']} held out.")
        elif total["validation"] == 0 and self.settings["validation_fraction"] > 0:
            problems.append(
                f"No document is held out for validation: {total['train']} documents are too few for a fraction of "
                f"{self.settings['validation_fraction']}. Give a larger `--validation-fraction`, a "
                "`--validation-source`, smaller documents, or `--validation-fraction 0` for a store without validation."
            )
        if self.settings.get("entries_of") and not self._labelled:
            problems.append(
                f"{self.settings['entries_of']['name']} was given as the knowledge source of the labels, but no "
                f"document has labels (field 'entries' of JSON Lines; another field: SOURCE,entries=FIELD)."
            )
        if problems:
            raise DataError("\n".join(problems))

    def manifest(self, settings: dict[str, Any], sources: list[tuple[Source, bool]]) -> dict[str, Any]:
        """All but the checksums and fingerprints."""
        tokenizer = self.tokenizer
        splits = {}
        for split in SPLITS:
            of_sources = {}
            for source, _ in sources:
                count = self.counts[split][source.name]
                of_sources[source.name] = {
                    "documents": count["documents"],
                    "tokens": self.output.num_tokens(split, source.name),
                    "bytes": count["bytes"],
                    **self.output.description(split, source.name),
                }
            totals = {
                key: sum(c[key] for c in of_sources.values()) for key in ("documents", "tokens", "bytes")
            }
            splits[split] = {**totals, "sources": of_sources}
        knowledge = {"entries_of": settings["entries_of"]} if "entries_of" in settings else {}
        return knowledge | {
            "format": stores.FORMAT,
            "version": stores.VERSION,
            "vocab_size": settings["vocab_size"],
            "dtype": self.output.dtype.name,
            "pad_id": tokenizer.pad_id if tokenizer else 0,
            "tokenizer": tokenizer
            and {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "num_tokens": tokenizer.num_tokens,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
                "pad_id": tokenizer.pad_id,
                "lossless": tokenizer.lossless,
            },
            "sources": {
                source.name: {"place": source.place, "weight": source.weight, "held_out": held_out}
                for source, held_out in sources
            },
            "splits": splits,
            "synthetic": self.synthetic,
            "bad": {
                "policy": settings["on_bad_line"],
                "count": self.bad.total(),
                "reasons": dict(self.bad),
                "sources": dict(self.bad_of_source),
                "first": self.first_bad,
            },
            "duplicates": {
                "count": self.duplicates.total(),
                "sources": {k: v for k, v in self.duplicates.items() if v},
            },
            "settings": settings,
            "built_with": {name: version(name) for name in ("minilm", "tokenizers", "numpy")}
            | {"python": platform.python_version()},
        }


def _labels(document: Document, offsets: list[tuple[int, int]]) -> np.ndarray:
    try:
        return token_entries(offsets, document.entries or ())
    except DataError as error:
        raise DataError(f"{document.where}: {error}.") from error


def _batches(documents: Iterator[Document | BadDocument]) -> Iterator[list[Document | BadDocument]]:
    """Lists of documents of about `_BATCH_BYTES`. The same documents always make the same lists."""
    batch: list[Document | BadDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes if isinstance(document, Document) else 0
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
