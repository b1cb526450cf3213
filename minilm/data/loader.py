"""Rows to batches, for one rank. The global batch of step s is a function of (seed, s) alone.

    epoch, place = divmod(s, steps_per_epoch)
    the G rows of the step   = rows.order(epoch)[place G : (place + 1) G]
    rank r of W takes        = rows [r G / W : (r + 1) G / W] of them, cut into micro-batches

So the same rows make the same step on 1, 2 or 8 ranks, at any micro-batch size and after any resume; the state
is one number. No random number generator is touched, and threads only fetch ahead.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from minilm.alignment import Batch, align
from minilm.data.rows import RowPlace, Rows
from minilm.data.store import Store
from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckpointError, ConfigError, listed


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    store: Annotated[str, Field(min_length=1, description="folder made by `minilm data build`")]
    validation_store: Annotated[
        str, Field(description="folder whose validation split is evaluated; empty: that of `store`")
    ] = ""
    sequence_length: Annotated[int, Field(gt=0, description="tokens that a row predicts")] = 512
    rows: Annotated[
        Literal["packed", "document"],
        Field(description="packed: documents end to end, nothing padded; document: one a row, padded"),
    ] = "packed"
    weights: Annotated[
        dict[str, float],
        Field(
            description="passes over a source per epoch, by its name, in place of those given to the build"
        ),
    ] = field(default_factory=dict)
    prefetch: Annotated[int, Field(ge=0, description="steps that are fetched ahead by a thread; 0: none")] = 2


class StepRows(NamedTuple):
    """What a step is made of, for people: str() is one line per row."""

    step: int
    epoch: int
    rows: list[RowPlace]  # of the global batch, in order

    def __str__(self) -> str:
        return "\n".join([f"step {self.step}, epoch {self.epoch}:", *(f"  {place}" for place in self.rows)])


class Loader:
    """Micro-batches of one rank, step after step, without end; epochs follow each other.

    batch_rows   rows of the global batch of one step, over all ranks (G)
    micro_batch  rows of one forward; has no influence on what is in a step
    seed         of the order of rows, and of nothing else
    device       that the batches go to. They are made on the CPU; for a CUDA device in pinned memory, by the thread,
                 so that `Batch.to(device, non_blocking=True)` is copied beside the kernels

    Iterating yields `list[Batch]` for `next_step` and goes on to the next, fetched ahead by a thread. `close`
    (or a `with` block) ends the thread. Raises ConfigError for numbers that do not fit, all at once.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_rows: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        start_step: int = 0,
        prefetch: int = 2,
        device: torch.device | None = None,
    ) -> None:
        problems = []
        if not 0 <= rank < world:
            problems.append(f"rank {rank} is not below the number of processes, {world}")
        if min(batch_rows, micro_batch, world) < 1:
            problems.append(
                f"the batch ({batch_rows} rows, train.batch_size) and its parts ({micro_batch}, train.micro_batch) "
                "must be at least 1 row"
            )
        elif batch_rows % (world * micro_batch):
            problems.append(
                f"a batch of {batch_rows} rows (train.batch_size) is not a multiple of processes x train.micro_batch "
                f"({world} x {micro_batch} = {world * micro_batch}), so ranks would get unequal parts"
            )
        if batch_rows > rows.rows_per_epoch:
            problems.append(
                f"a batch of {batch_rows} rows (train.batch_size) is more than the {rows.rows_per_epoch} rows of an "
                f"epoch (rows of {rows.sequence_length} tokens from the {rows.split} split of {rows.store.path}): "
                "choose a smaller train.batch_size, a smaller data.sequence_length, or more data"
            )
        if start_step < 0 or prefetch < 0:
            problems.append(f"start_step ({start_step}) and prefetch ({prefetch}) must be 0 or more")
        if problems:
            raise ConfigError(listed(problems))
        self.rows, self.batch_rows, self.micro_batch = rows, batch_rows, micro_batch
        self.rank, self.world, self.seed, self.prefetch = rank, world, seed, prefetch
        self.device = device or torch.device("cpu")
        self.next_step = start_step
        self._first_row = -1  # of the global batch that was given last
        self._ahead: _Ahead | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.rows.rows_per_epoch // self.batch_rows

    @property
    def dropped_rows(self) -> int:
        """Rows at the end of each epoch that do not fill a batch: other ones each epoch."""
        return self.rows.rows_per_epoch % self.batch_rows

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global batch `step`, on the CPU: batch_rows / world / micro_batch of them."""
        return self._step(step)[0]

    def _step(self, step: int) -> tuple[list[Batch], int]:
        """The micro-batches, and the first row of the global batch."""
        share, chosen = self.batch_rows // self.world, self._rows_of(step)
        first, chosen = int(chosen[0]), chosen[self.rank * share : (self.rank + 1) * share]
        return [
            aligned(self.rows, chosen[start : start + self.micro_batch])
            for start in range(0, share, self.micro_batch)
        ], first

    def _fetched(self, step: int) -> tuple[list[Batch], int]:
        """`_step`, ready to be moved to the device."""
        batches, first = self._step(step)
        if self.device.type == "cuda":
            batches = [pinned(batch) for batch in batches]
        return batches, first

    def place(self) -> RowPlace:
        """Source and document of the first row of the step that iterating gave last: a look-up, no permutation."""
        return self.rows.places(np.array([self._first_row]))[0]

    def skip_to(self, step: int) -> None:
        """Go on with global batch `step`, whatever came before."""
        self.close()
        self.next_step = step

    def where(self, step: int) -> StepRows:
        """Epoch and documents of a step: where to look when its loss is odd."""
        return StepRows(step, self.epoch_of(step), self.rows.places(self._rows_of(step)))

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next. Ranks and micro-batches may change between runs; nothing else may."""
        return {
            "next_step": self.next_step,
            "seed": self.seed,
            "batch_rows": self.batch_rows,
            "sequence_length": self.rows.sequence_length,
            "rows": self.rows.kind,
            "split": self.rows.split,
            "weights": dict(self.rows.weights),
            "store": self.rows.store.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. CheckpointError where this loader would give other batches."""
        own = self.state_dict()
        problems = [f"{key} is missing in the saved state" for key in own if key not in state]
        problems += [
            f"{key} was {state[key]!r}, now it is {own[key]!r}"
            for key in own
            if key != "next_step" and key in state and state[key] != own[key]
        ]
        if problems:
            raise CheckpointError(
                f"The data would not go on where it stopped: {listed(problems)}\nGive the old settings again, or begin "
                "a new run."
            )
        self.skip_to(int(state["next_step"]))

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self.prefetch == 0:
            batches, self._first_row = self._fetched(self.next_step)
        else:
            if self._ahead is None or self._ahead.expected != self.next_step:
                self.close()
                self._ahead = _Ahead(self, self.next_step)
            batches, self._first_row = self._ahead.get()
        self.next_step += 1
        return batches

    def close(self) -> None:
        """End the prefetch thread. The loader can be used further; it starts another one."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows_of(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.rows.order(epoch, self.seed, place * self.batch_rows, (place + 1) * self.batch_rows)


class _Ahead:
    """A thread that makes the batches of steps `first`, `first + 1`, ... before they are asked for."""

    def __init__(self, loader: Loader, first: int) -> None:
        self.expected = first  # the step that `get` returns next
        self._made: queue.Queue[tuple[list[Batch], int] | BaseException] = queue.Queue(
            maxsize=loader.prefetch
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(loader, first), name="minilm-data", daemon=True
        )
        self._thread.start()

    def get(self) -> tuple[list[Batch], int]:
        made = self._made.get()
        if isinstance(made, BaseException):  # raised where it is seen, not lost in a thread
            self.expected = -1  # the thread has ended: another call begins anew instead of waiting for ever
            raise made
        self.expected += 1
        return made

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self, loader: Loader, step: int) -> None:
        if loader.device.type == "cuda" and loader.device.index is not None:
            # A thread begins on device 0: pinning there would open it for the processes of other devices, too.
            torch.cuda.set_device(loader.device)
        while not self._stop.is_set():
            try:
                made: tuple[list[Batch], int] | BaseException = loader._fetched(step)
            except Exception as error:  # noqa: BLE001  (handed to the consumer, which raises it)
                made = error
            while not self._stop.is_set():
                try:
                    self._made.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return
            step += 1


def aligned(rows: Rows, numbers: np.ndarray) -> Batch:
    """Rows by number as a batch, with the labels of their tokens where the store has any."""
    tokens, segments = rows.batch(numbers)
    entries = rows.entries(numbers)
    return align(
        torch.from_numpy(tokens),
        torch.from_numpy(segments),
        entries=None if entries is None else torch.from_numpy(entries),
    )


def pinned(batch: Batch) -> Batch:
    """The same batch in pinned (page-locked) memory."""
    return batch.each(lambda field: field.pin_memory())


def validation_batches(
    rows: Rows, batch_rows: int, rank: int = 0, world: int = 1, *, max_rows: int | None = None
) -> Iterator[Batch]:
    """All rows once, in the order of the disk; the last batch may be smaller.

    Ranks get disjoint runs of rows which together are all of them, whatever `world` divides; one of them may get
    a batch less. `max_rows` takes that many rows, evenly spaced, the same on every call.
    """
    chosen = np.arange(len(rows))
    if max_rows is not None and max_rows < len(rows):
        chosen = np.arange(max_rows) * len(rows) // max_rows
    own = chosen[rank * len(chosen) // world : (rank + 1) * len(chosen) // world]
    for start in range(0, len(own), batch_rows):
        yield aligned(rows, own[start : start + batch_rows])


class Data(NamedTuple):
    """What a `DataConfig` opens. `validation` is None where no store has validation documents."""

    train: Rows
    validation: Rows | None
    tokenizer: Tokenizer | None


def open_data(config: DataConfig) -> Data:
    """Stores, rows and tokenizer of a configuration. Raises DataError, ConfigError; both stores must agree."""
    store = Store.open(config.store)
    tokenizer = store.tokenizer()
    train = Rows(store, "train", config.sequence_length, config.rows, weights=config.weights)
    other = store
    if config.validation_store:
        other = Store.open(config.validation_store, tokenizer)
        if other.vocab_size != store.vocab_size:
            raise ConfigError(
                f"data.validation_store has a vocabulary of {other.vocab_size}, data.store one of {store.vocab_size}."
            )
    validation = None
    if other.manifest["splits"]["validation"]["documents"] or config.validation_store:
        validation = Rows(other, "validation", config.sequence_length, config.rows)
    return Data(train, validation, tokenizer)
