"""What is scored: a split of a store, exactly as training validates on it, or a file of texts as whole documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from minilm.data.documents import MAX_DOCUMENT_BYTES, BadDocument
from minilm.data.loader import validation_batches
from minilm.data.rows import Rows
from minilm.data.sources import Source, parse_sources
from minilm.data.store import Shard, Store
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError, listed
from minilm.evaluation.intervals import DocumentSums, Scores, processes
from minilm.evaluation.mode import autocast, context_tokens, device_of, eval_mode, random_states_kept
from minilm.evaluation.progress import tracked
from minilm.evaluation.score import (
    POSITIONS_PER_BATCH,
    encoded,
    predictions,
    tally_documents,
    window_lengths,
)
from minilm.evaluation.tally import Tally
from minilm.evaluation.text import byte_lengths_of

MOST_BAD_SHOWN = 5
MOST_FILES_APART = 32  # more files of one place are one source


@dataclass(frozen=True)
class How:
    """How to compute; nothing here changes a number beyond rounding, but for the precision."""

    batch_rows: int | None = None  # default: rows of 8,192 tokens together
    precision: str | None = None
    progress: bool = False


class StoreSplit:
    """The rows of a split: the same rows, through the same function, as the validation of a training run.

    A document that goes on in a further row is scored there without its earlier part, as in training; for the
    interval its parts are one document.
    """

    def __init__(self, rows: Rows, tokenizer: Tokenizer | None, model: nn.Module) -> None:
        self.rows, self.tokenizer, store = rows, tokenizer, rows.store
        if tokenizer is not None or store.manifest["tokenizer"] is not None:
            if tokenizer is None:
                raise DataError(
                    f"The store {store.path} holds text, but the checkpoint has no tokenizer (it was trained on token "
                    "ids): the ids would mean different things. Name the store that it was trained on."
                )
            store.require_tokenizer(tokenizer)
        known = getattr(getattr(model, "config", None), "vocab_size", None)
        if known is not None and store.vocab_size > known:
            raise ConfigError(
                f"The store {store.path} has token ids up to {store.vocab_size - 1}, the model knows 0 to {known - 1}."
            )
        counts = [shard.num_documents for shard in rows.shards]
        self._first = dict(
            zip((s.source for s in rows.shards), np.cumsum([0, *counts]).tolist(), strict=False)
        )
        self.num_documents = sum(counts)
        self.bad: list[BadDocument] = []  # left out when the store was built, and listed then

    def describe(self) -> dict[str, Any]:
        entropy = self.rows.store.entropy
        return {
            "data": str(self.rows.store.path),
            "kind": "store",
            "split": self.rows.split,
            "rows": len(self.rows),
            "rows_are": self.rows.kind,
            "sequence_length": self.rows.sequence_length,
            "store_fingerprint": self.rows.store.fingerprint,
            **({"entropy_rate_nats": entropy["rate_nats"]} if entropy else {}),
        }

    def tally(self, model: nn.Module, how: How) -> Tally:
        """All rows, in the same batches as `validation_batches` gives to `evaluate`; the same on every process."""
        rank, world = processes()
        batch_rows = how.batch_rows or max(1, POSITIONS_PER_BATCH // self.rows.sequence_length)
        first = rank * len(self.rows) // world
        num_batches = -(-((rank + 1) * len(self.rows) // world - first) // batch_rows)
        batches = validation_batches(self.rows, batch_rows, rank, world)
        total, place = Tally(), device_of(model)
        lengths = None if self.tokenizer is None else byte_lengths_of(self.tokenizer)
        lengths = None if lengths is None else lengths.to(place, torch.float64)
        with random_states_kept(), eval_mode(model), autocast(place, how.precision):
            for batch in tracked(batches, num_batches, f"batches of {batch_rows} rows", shown=how.progress):
                found = predictions(model, batch.to(place), lengths)
                # Segments 1, 2, ... of a row are consecutive documents.
                numbers = self._first_documents(first, batch.shape[0])[found.row] + found.segment - 1
                total.add(numbers, found)
                first += batch.shape[0]
        return total.gathered()

    def scores(self, model: nn.Module, how: How) -> Scores:
        """The loss over all rows, the same on every process; equal to `evaluate` on `validation_batches`."""
        return self.scores_of(self.tally(model, how).documents)

    def scores_of(self, sums: DocumentSums) -> Scores:
        """What is said of some of the documents."""
        length = self.rows.sequence_length
        return Scores.of(sums, context_tokens=length, least_context_tokens=1)

    def sources(self) -> list[tuple[str, int]]:
        """(source, number of its documents), in the order in which documents are numbered."""
        return [(shard.source, shard.num_documents) for shard in self.rows.shards]

    def texts(self) -> Iterator[str]:
        """The documents as text, in their order."""
        return (text for shard in self.rows.shards for text in texts_of(shard, self.tokenizer))

    def token_documents(self, numbers: Sequence[int], most_tokens: int) -> list[list[int]]:
        """The first tokens of some documents, by number over all sources."""
        starts = list(self._first.values())
        found = []
        for number in numbers:
            source = int(np.searchsorted(starts, number, side="right")) - 1
            tokens = self.rows.shards[source].document(number - starts[source])
            found.append(tokens[:most_tokens].astype(np.int64).tolist())
        return found

    def _first_documents(self, first: int, count: int) -> np.ndarray:
        """The number of the document that each of these rows begins with."""
        places = self.rows.places(np.arange(first, first + count))
        return np.array([self._first[place.source] + place.first_document for place in places])


class TextFile:
    """Texts of files or folders, each scored as a whole; longer ones than the window in rolling windows.

    All is read once before anything is computed, so that a bad line is not found at the end of a long job.

    specs    one place or several, as `minilm data build` reads them; each file is a source of its own
    """

    def __init__(
        self,
        specs: str | Sequence[str],
        tokenizer: Tokenizer | None,
        sequence_length: int,
        *,
        skip_bad: bool = False,
    ) -> None:
        specs = [specs] if isinstance(specs, str) else list(specs)
        self.spec = ", ".join(specs)
        if tokenizer is None:
            raise DataError(
                f"{self.spec} holds text, but the checkpoint has no tokenizer (it was trained on token ids). "
                "Name a store made from the same source."
            )
        found = parse_sources(specs)
        for source in found:
            if source.kind == "synthetic":
                raise DataError(
                    f"{source.place} gives token ids without text: make a store of it (`minilm data build`)."
                )
        self.tokenizer, self.sequence_length = tokenizer, sequence_length
        self.parts = [part for source in found for part in _files_of(source)]
        counts = [_counted(part) for part in self.parts]
        self.counts = [good for good, _ in counts]
        self.num_documents, self.bad = sum(self.counts), [one for _, bad in counts for one in bad]
        if self.bad and not skip_bad:
            raise DataError(
                f"{self.spec} has {len(self.bad)} bad documents: "
                + listed([str(bad) for bad in self.bad[:MOST_BAD_SHOWN]])
                + "\nRepair them, or leave them out with --on-bad-line skip."
            )
        if not self.num_documents:
            raise DataError(f"{self.spec} has no documents.")

    def describe(self) -> dict[str, Any]:
        return {
            "data": self.spec,
            "kind": "text",
            "sequence_length": self.sequence_length,
            "bad_documents_skipped": [str(bad) for bad in self.bad],
        }

    def tally(self, model: nn.Module, how: How) -> Tally:
        """All documents; the same on every process."""
        length, stride = window_lengths(model, self.sequence_length)
        texts = tracked(self.texts(), self.num_documents, "documents", shown=how.progress)
        return tally_documents(
            model,
            encoded(self.tokenizer, texts),
            length,
            stride,
            byte_lengths=byte_lengths_of(self.tokenizer),
            batch_rows=how.batch_rows,
            precision=how.precision,
        ).gathered()

    def scores(self, model: nn.Module, how: How) -> Scores:
        """The loss over all texts, the same on every process; equal to `documents`."""
        return self.scores_of(self.tally(model, how).documents)

    def scores_of(self, sums: DocumentSums) -> Scores:
        """What is said of some of the documents."""
        length = self.sequence_length
        return Scores.of(sums, context_tokens=length, least_context_tokens=length - max(1, length // 2))

    def sources(self) -> list[tuple[str, int]]:
        """(file, number of its documents), in the order in which documents are numbered."""
        names = [str(part.files[0]) if len(part.files) == 1 else part.place for part in self.parts]
        return [(name, count) for name, count in zip(names, self.counts, strict=True) if count]

    def texts(self) -> Iterator[str]:
        for part in self.parts:
            for document in part.documents(MAX_DOCUMENT_BYTES):
                if not isinstance(document, BadDocument):
                    yield document.text

    def token_documents(self, numbers: Sequence[int], most_tokens: int) -> list[list[int]]:
        """The first tokens of some documents, by number in the order of the files."""
        wanted = set(numbers)
        found = {
            n: self.tokenizer.document(t)[:most_tokens] for n, t in enumerate(self.texts()) if n in wanted
        }
        return [found[number] for number in numbers]


class TextList(TextFile):
    """Texts in memory, scored as those of a file."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer | None, sequence_length: int) -> None:
        if tokenizer is None:
            raise DataError("Texts need a tokenizer: give the one that the model was trained with.")
        if not texts:
            raise DataError("There are no texts to score.")
        self.spec, self.tokenizer, self.sequence_length = "texts", tokenizer, sequence_length
        self._texts, self.num_documents, self.bad = texts, len(texts), []

    def sources(self) -> list[tuple[str, int]]:
        return [(self.spec, self.num_documents)]

    def texts(self) -> Iterator[str]:
        yield from self._texts


HeldOut = StoreSplit | TextFile


def open_held_out(
    data: str | Sequence[str],
    model: nn.Module,
    tokenizer: Tokenizer | None,
    *,
    split: str = "validation",
    sequence_length: int,
    rows: str = "packed",
    skip_bad: bool = False,
) -> HeldOut:
    """A folder with a store's manifest.json is a store; anything else is read as `minilm data build` reads it.

    data   one place, or several of texts
    """
    context = context_tokens(model)
    if sequence_length < 1 or (context is not None and sequence_length > context):
        raise ConfigError(
            f"The sequence length is {sequence_length}; it must be 1 to the model's context, {context}."
        )
    places = [data] if isinstance(data, str) else list(data)
    stores = [place for place in places if (Path(place) / "manifest.json").is_file()]
    if stores and len(places) > 1:
        raise ConfigError(f"{stores[0]} is a store: it is scored alone, not together with other data.")
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    if tokenizer is not None and known is not None and tokenizer.num_tokens > known:
        raise ConfigError(
            f"The tokenizer {tokenizer.name} has {tokenizer.num_tokens} tokens, the model knows {known}: they do not "
            "belong together."
        )
    if stores:
        return StoreSplit(Rows(Store.open(stores[0]), split, sequence_length, rows), tokenizer, model)
    return TextFile(data, tokenizer, sequence_length, skip_bad=skip_bad)


def texts_of(shard: Shard, tokenizer: Tokenizer | None, first: int = 0, step: int = 1) -> Iterator[str]:
    """Every `step`-th document of a shard, decoded; where there is no text, the numbers of its tokens."""
    for number in range(first, shard.num_documents, step):
        ids = shard.document(number).tolist()
        yield " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)


def _files_of(source: Source) -> list[Source]:
    """Each file as a source of its own, unless they are very many (a folder with a text in each file)."""
    if source.kind != "files" or not 1 < len(source.files) <= MOST_FILES_APART:
        return [source]
    return [dataclasses.replace(source, files=(path,)) for path in source.files]


def _counted(source: Source) -> tuple[int, list[BadDocument]]:
    """Number of good documents, and the bad ones."""
    good, bad = 0, []
    for document in source.documents(MAX_DOCUMENT_BYTES):
        if isinstance(document, BadDocument):
            bad.append(document)
        else:
            good += 1
    return good, bad
