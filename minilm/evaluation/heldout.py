"""What is scored: a split of a store, exactly as training validates on it, or a file of texts as whole documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm.alignment import Batch
from minilm.data.documents import MAX_DOCUMENT_BYTES, BadDocument
from minilm.data.loader import validation_batches
from minilm.data.rows import Rows
from minilm.data.sources import Source, parse_sources
from minilm.data.store import Store
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError, listed
from minilm.evaluation.intervals import DocumentSums, Scores, processes
from minilm.evaluation.mode import autocast, context_tokens, device_of, eval_mode, random_states_kept
from minilm.evaluation.progress import tracked
from minilm.evaluation.score import POSITIONS_PER_BATCH, documents, token_nats
from minilm.evaluation.text import byte_lengths_of

MOST_BAD_SHOWN = 5


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

    def scores(self, model: nn.Module, how: How) -> Scores:
        """The loss over all rows, the same on every process; equal to `evaluate` on `validation_batches`."""
        rank, world = processes()
        length = self.rows.sequence_length
        batch_rows = how.batch_rows or max(1, POSITIONS_PER_BATCH // length)
        lengths = None if self.tokenizer is None else byte_lengths_of(self.tokenizer)
        first = rank * len(self.rows) // world
        num_batches = -(-((rank + 1) * len(self.rows) // world - first) // batch_rows)
        batches = validation_batches(self.rows, batch_rows, rank, world)
        sums, place = DocumentSums(), device_of(model)
        with random_states_kept(), eval_mode(model), autocast(place, how.precision):
            for batch in tracked(batches, num_batches, f"batches of {batch_rows} rows", shown=how.progress):
                nats = token_nats(model, batch.to(place)).double().cpu()
                self._add(sums, batch, nats, np.arange(first, first + len(nats)), lengths)
                first += len(nats)
        return Scores.of(sums.gathered(), context_tokens=length, least_context_tokens=1)

    def token_documents(self, numbers: Sequence[int], most_tokens: int) -> list[list[int]]:
        """The first tokens of some documents, by number over all sources."""
        starts = list(self._first.values())
        found = []
        for number in numbers:
            source = int(np.searchsorted(starts, number, side="right")) - 1
            tokens = self.rows.shards[source].document(number - starts[source])
            found.append(tokens[:most_tokens].astype(np.int64).tolist())
        return found

    def _add(
        self, sums: DocumentSums, batch: Batch, nats: Tensor, numbers: np.ndarray, lengths: Tensor | None
    ) -> None:
        weights = batch.weights.double()
        num_bytes = torch.zeros_like(weights)
        if lengths is not None:
            num_bytes = lengths.double()[torch.where(weights > 0, batch.targets, 0)] * weights
        for row, place in enumerate(self.rows.places(numbers)):
            segments = batch.segments[row]
            totals = torch.zeros(int(segments.max()) + 1, 3, dtype=torch.float64)
            totals.index_add_(0, segments, torch.stack([nats[row], weights[row], num_bytes[row]], dim=1))
            # Segments 1, 2, ... of a row are consecutive documents; 0 is padding.
            for offset, (n, t, b) in enumerate(totals.tolist()):
                if t > 0:
                    sums.add(self._first[place.source] + place.first_document + offset - 1, n, t, b)


class TextFile:
    """Texts of a file or folder, each scored as a whole; longer ones than the window in rolling windows.

    All is read once before anything is computed, so that a bad line is not found at the end of a long job.
    """

    def __init__(
        self, spec: str, tokenizer: Tokenizer | None, sequence_length: int, *, skip_bad: bool = False
    ) -> None:
        if tokenizer is None:
            raise DataError(
                f"{spec} holds text, but the checkpoint has no tokenizer (it was trained on token ids). "
                "Name a store made from the same source."
            )
        (self.source,) = parse_sources([spec])
        if self.source.kind == "synthetic":
            raise DataError(f"{spec} gives token ids without text: make a store of it (`minilm data build`).")
        self.spec, self.tokenizer, self.sequence_length = spec, tokenizer, sequence_length
        self.num_documents, self.bad = _counted(self.source)
        if self.bad and not skip_bad:
            raise DataError(
                f"{spec} has {len(self.bad)} bad documents: "
                + listed([str(bad) for bad in self.bad[:MOST_BAD_SHOWN]])
                + "\nRepair them, or leave them out with --on-bad-line skip."
            )
        if not self.num_documents:
            raise DataError(f"{spec} has no documents.")

    def describe(self) -> dict[str, Any]:
        return {
            "data": self.spec,
            "kind": "text",
            "sequence_length": self.sequence_length,
            "bad_documents_skipped": [str(bad) for bad in self.bad],
        }

    def scores(self, model: nn.Module, how: How) -> Scores:
        texts = tracked(self.texts(), self.num_documents, "documents", shown=how.progress)
        return documents(
            model,
            self.tokenizer,
            texts,
            self.sequence_length,
            batch_rows=how.batch_rows,
            precision=how.precision,
        )

    def texts(self) -> Iterator[str]:
        for document in self.source.documents(MAX_DOCUMENT_BYTES):
            if not isinstance(document, BadDocument):
                yield document.text

    def token_documents(self, numbers: Sequence[int], most_tokens: int) -> list[list[int]]:
        """The first tokens of some documents, by number in the order of the file."""
        wanted = set(numbers)
        found = {
            n: self.tokenizer.document(t)[:most_tokens] for n, t in enumerate(self.texts()) if n in wanted
        }
        return [found[number] for number in numbers]


HeldOut = StoreSplit | TextFile


def open_held_out(
    data: str,
    model: nn.Module,
    tokenizer: Tokenizer | None,
    *,
    split: str = "validation",
    sequence_length: int,
    rows: str = "packed",
    skip_bad: bool = False,
) -> HeldOut:
    """A folder with a store's manifest.json is a store; anything else is read as `minilm data build` reads it."""
    context = context_tokens(model)
    if sequence_length < 1 or (context is not None and sequence_length > context):
        raise ConfigError(
            f"The sequence length is {sequence_length}; it must be 1 to the model's context, {context}."
        )
    if (Path(data) / "manifest.json").is_file():
        return StoreSplit(Rows(Store.open(data), split, sequence_length, rows), tokenizer, model)
    return TextFile(data, tokenizer, sequence_length, skip_bad=skip_bad)


def _counted(source: Source) -> tuple[int, list[BadDocument]]:
    """Number of good documents, and the bad ones."""
    good, bad = 0, []
    for document in source.documents(MAX_DOCUMENT_BYTES):
        if isinstance(document, BadDocument):
            bad.append(document)
        else:
            good += 1
    return good, bad
