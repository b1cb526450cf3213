"""Our own data as the doctor sees it: a store, its rows and its loader, or an excerpt of a large one.

Checks of data count whole epochs, so a large store is shown by its first documents: the same files, and the same `Rows`
and `Loader` code over them. Batches are taken from the loader as training gets them, behind the alignment layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilm.alignment import Batch, align
from minilm.data.loader import Data, Loader, validation_batches
from minilm.data.store import Shard, Store, smallest_dtype
from minilm.doctor.core import NotApplicable
from minilm.doctor.subject import DataView, Rows, Subject
from minilm.errors import DataError
from minilm.evaluation.intervals import processes
from minilm.evaluation.score import encoded

MAX_DOCUMENTS, MAX_TOKENS = 2000, 60_000  # of an excerpt, over all sources of a split
LEAST_STEPS = 8  # of an epoch of the excerpt: smaller batches are used where they would be fewer


def data_subject(data: Data, **settings: Any) -> Subject:
    """A subject that has data and tokenizer only. Arguments as for `data_view`."""
    tokenizer = data.tokenizer
    special = () if tokenizer is None else (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    return Subject(
        name=f"data of {data.train.store.path.name}",
        vocab_size=data.train.store.vocab_size,
        special_ids=tuple(i for i in special if i is not None),
        data=data_view(data, **settings),
        tokenizer=tokenizer,
    )


def data_view(
    data: Data,
    *,
    batch_rows: int = 32,
    micro_batch: int | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
    documents: Callable[[str], Sequence[Any]] | None = None,
    loader: Callable[..., Loader] = Loader,
    knowledge: Callable[[], Sequence[Any]] | None = None,
) -> DataView:
    """What a `DataConfig` opened, for the doctor.

    batch_rows, micro_batch  of the run; an excerpt with few rows is given in smaller batches
    texts      split -> the texts that the store was built from, in its order, where they are still at hand
    documents  split -> what should be in the store; by default its files, read without the classes that train on them
    loader     what makes a `Loader` (a run's own arguments are bound to it)
    knowledge  -> the entries of the model's knowledge store (`our_memory.entries_of`)
    """
    shown = _Shown(data, batch_rows, micro_batch, loader)
    return DataView(
        documents=documents or shown.written,
        stored=shown.stored,
        batches=shown.batches,
        lost_targets=shown.lost,
        fingerprint_of_tokenizer=shown.fingerprints(),
        texts=None if texts is None else lambda split: texts.get(split, ()),
        encoders=_encoders(data.tokenizer),
        validation_batches=None if data.validation is None else shown.validation,
        resumed=shown.resumed,
        sources=shown.sources,
        weights=dict(shown.rows.weights),
        knowledge=knowledge,
        excerpt=shown.excerpt,
    )


def loader_of(
    data: Data, batch_rows: int, micro_batch: int | None, *, seed: int, rank: int, world: int
) -> Loader:
    """A rank's loader over what the doctor looks at, in batches of which an epoch has several."""
    return _Shown(data, max(world, batch_rows // world * world), micro_batch, Loader).loader(
        seed, rank, world
    )


def rows_of(batch: Batch) -> Rows:
    """An aligned batch as the doctor's unshifted rows. DataError where inputs and targets are not of one row."""
    tokens = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
    counts = batch.weights > 0
    learn = torch.cat([torch.ones_like(counts[:, :1]), counts], dim=1)
    # The last token's own segment is not in the batch: it matters only where it is a target of the one before.
    last = torch.where(counts[:, -1:], batch.segments[:, -1:], 0)
    segments = torch.cat([batch.segments, last], dim=1)
    again = align(tokens, segments, learn)
    if not torch.equal(again.weights > 0, counts) or bool((again.targets != batch.targets)[counts].any()):
        raise DataError("A batch has targets that are not the next tokens of its inputs.")
    return Rows(tokens, segments, learn)


class _Shown:
    """Rows and loaders over the whole of some data, or over its first documents."""

    def __init__(
        self, data: Data, batch_rows: int, micro_batch: int | None, loader: Callable[..., Loader]
    ) -> None:
        self.data, self.make = data, loader
        train = data.train
        self.stores = {"train": _Excerpt(train.store, "train")}
        if data.validation is not None:
            self.stores["validation"] = _Excerpt(data.validation.store, "validation")
        excerpt = self.stores["train"]
        self.excerpt = "" if excerpt.whole else f"the first {excerpt.num_documents:,} documents"
        weights = {s.source: train.weights[s.source] for s in excerpt.shards("train")}
        self.rows = train if excerpt.whole else type(train)(
            excerpt, train.split, train.sequence_length, train.kind, weights=weights  # type: ignore[arg-type]
        )  # fmt: skip
        most = max(1, self.rows.rows_per_epoch // LEAST_STEPS)
        self.batch_rows = batch_rows if batch_rows <= most else max(1, most // 2 * 2)
        self.micro_batch = micro_batch

    def written(self, split: str) -> list[np.ndarray]:
        """Documents read from the store's files as plain arrays of numbers."""
        if split not in self.stores:
            return []
        excerpt = self.stores[split]
        return [d for shard in excerpt.shards(split) for d in _read(excerpt.store, split, shard)]

    def stored(self, split: str) -> list[np.ndarray]:
        """The same as the classes give them."""
        if split not in self.stores:
            return []
        return [s.document(k) for s in self.stores[split].shards(split) for k in range(s.num_documents)]

    def sources(self, split: str) -> list[str]:
        return [s.source for s in self.stores[split].shards(split) for _ in range(s.num_documents)]

    def fingerprints(self) -> dict[str, str] | None:
        """Of the tokenizer that each split was made with, as its manifest has it."""
        made = {split: e.store.manifest["tokenizer"] for split, e in self.stores.items()}
        known = {split: tokenizer["fingerprint"] for split, tokenizer in made.items() if tokenizer}
        return known or None

    def loader(self, seed: int, rank: int, world: int, start: int = 0) -> Loader:
        share = max(1, self.batch_rows // world)
        micro = self.micro_batch if self.micro_batch and share % self.micro_batch == 0 else share
        return self.make(
            self.rows, batch_rows=self.batch_rows, micro_batch=micro, rank=rank, world=world, seed=seed,
            start_step=start, prefetch=0,
        )  # fmt: skip

    def batches(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Rows]:
        loader = self.loader(seed, rank, world)
        for step in range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch):
            yield _joined(loader.step(step))

    def validation(self, rank: int, world: int) -> Iterator[Rows]:
        """As evaluation takes them."""
        rows, excerpt = self.data.validation, self.stores["validation"]
        assert rows is not None
        if not excerpt.whole:
            rows = type(rows)(excerpt, rows.split, rows.sequence_length, rows.kind)  # type: ignore[arg-type]
        for batch in validation_batches(rows, self.batch_rows, rank, world):
            yield rows_of(batch)

    def resumed(self, epoch: int, seed: int, rank: int, world: int, done: int) -> Iterator[Rows]:
        """Through the iterator and its saved state, as a run does it."""
        stopped = self.loader(seed, rank, world)
        steps = stopped.steps_per_epoch
        stopped.skip_to(epoch * steps)
        for _ in range(done):
            next(stopped)
        loader = self.loader(seed, rank, world)
        loader.load_state_dict(stopped.state_dict())
        with loader:
            for _ in range((epoch + 2) * steps - (epoch * steps + done)):
                yield _joined(next(loader))

    def lost(self, epoch: int, seed: int) -> int:
        """Targets of the rows at the end of an epoch that fill no batch, which the loader reports as dropped."""
        whole = self.rows.rows_per_epoch
        kept = whole // self.batch_rows * self.batch_rows
        if kept == whole:
            return 0
        left = self.rows.order(epoch, seed, kept, whole)
        tokens, segments = self.rows.batch(left)
        return int(align(torch.from_numpy(tokens), torch.from_numpy(segments)).num_targets())


class _Excerpt:
    """Stands for a store in `Rows`, with the first documents of each source of one split."""

    def __init__(self, store: Store, split: str) -> None:
        self.store, self.split = store, split
        self.path, self.manifest, self.pad_id = store.path, store.manifest, store.pad_id
        self.vocab_size, self.fingerprint = store.vocab_size, store.fingerprint
        shards = store.shards(split)
        total = sum(s.num_tokens for s in shards)
        count = sum(s.num_documents for s in shards)
        share = min(1.0, MAX_TOKENS / total, MAX_DOCUMENTS / count)
        self.whole = share == 1.0
        self._shards = shards if self.whole else [_first(s, share) for s in shards]

    @property
    def num_documents(self) -> int:
        return sum(s.num_documents for s in self._shards)

    def shards(self, split: str) -> list[Shard]:
        if split != self.split:
            raise NotApplicable(f"the excerpt has the {self.split} split only")
        return self._shards


def _first(shard: Shard, share: float) -> Shard:
    """The first documents of a source: at least 2, else as many as have this share of tokens and of documents."""
    by_tokens = int(np.searchsorted(shard.offsets, share * shard.num_tokens, side="right")) - 1
    count = max(min(2, shard.num_documents), min(by_tokens, round(share * shard.num_documents)))
    offsets = shard.offsets[: count + 1]
    return dataclasses.replace(shard, tokens=shard.tokens[: int(offsets[-1])], offsets=offsets)


def _read(store: Store, split: str, shard: Shard) -> list[np.ndarray]:
    """The documents of a shard from the files that the manifest names, by numbers of bytes."""
    files = store.manifest["splits"][split]["sources"][shard.source]
    dtype, folder = smallest_dtype(store.manifest["vocab_size"]), Path(store.path)
    count = shard.num_documents
    offsets = np.fromfile(folder / files["offsets_file"]["path"], dtype="<u8", count=count + 1).astype(
        np.int64
    )
    ids = np.fromfile(folder / files["tokens_file"]["path"], dtype=dtype, count=int(offsets[-1]))
    return [ids[offsets[k] : offsets[k + 1]] for k in range(count)]


def _encoders(tokenizer: Any) -> dict[str, Callable[[str], Sequence[int]]] | None:
    """How training, evaluation and generation begin a text."""
    if tokenizer is None:
        return None
    return {
        "training": tokenizer.document,
        "evaluation": lambda text: next(iter(encoded(tokenizer, [text] * processes()[1])))[1],
        "generation": tokenizer.prompt,
    }


def _joined(batches: Sequence[Batch]) -> Rows:
    parts = [rows_of(batch) for batch in batches]
    return Rows(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Rows)))
