"""Sums per document, and from them the numbers that are shown, with an interval.

The unit of chance in a test set is the document: tokens of one document are easy or hard together, so an
interval from single tokens would be far too narrow. The bootstrap draws documents with replacement and looks
at how a ratio of sums, such as (all nats) / (all tokens), of such test sets scatters: 95 % of them lie in the interval.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from minilm.alignment import Sum
from minilm.errors import CheckFailed

FEWEST_DOCUMENTS = 10  # fewer say too little about how documents scatter
RESAMPLES = 1000
MOST_UNITS = 10_000  # more documents are drawn in this many groups: the same interval, for less time
DRAWN_AT_ONCE = 1 << 18  # numbers of units in memory
COLUMNS = 5  # of `DocumentSums`: nats, tokens, bytes, top-1, top-5
RATIOS = {  # column above, column below, scale
    "loss": (0, 1, 1.0),
    "bits_per_byte": (0, 2, 1 / math.log(2)),
    "accuracy": (3, 1, 1.0),
    "accuracy_top5": (4, 1, 1.0),
}


def processes() -> tuple[int, int]:
    """(rank, number of processes) of this run; (0, 1) where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def device_of_messages() -> torch.device:
    """Where tensors must be that processes send to each other."""
    cuda = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


class DocumentSums:
    """Sums per document, by its number; a document may come in several pieces.

    Columns: nats, tokens, bytes, and how often the token was the most probable one, or among the five most probable.
    Bytes or hits that were not counted are NaN, and stay so.

    num_excluded   documents that have no counted token and are not in `totals`
    """

    def __init__(self, num_excluded: int = 0) -> None:
        self.num_excluded = num_excluded
        self._keys = np.zeros(0, dtype=np.int64)
        self._sums = np.zeros((0, COLUMNS))
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_new = 0

    def add(
        self,
        document: int,
        nats: float,
        tokens: float,
        num_bytes: float,
        top1: float = math.nan,
        top5: float = math.nan,
    ) -> None:
        self.add_all(np.array([document]), np.array([[nats, tokens, num_bytes, top1, top5]]))

    def add_all(self, documents: np.ndarray, columns: np.ndarray) -> None:
        """`columns` [N, 5], each row for the document of that number in `documents` [N]."""
        self._new.append((documents.astype(np.int64), columns))
        self._num_new += len(documents)
        if self._num_new > max(1 << 16, len(self._keys)):
            self._merge()

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> np.ndarray:
        """Numbers of the documents, rising."""
        self._merge()
        return self._keys

    def values(self) -> np.ndarray:
        """[documents, 5] float64, in the order of the documents' numbers."""
        self._merge()
        return self._sums

    @property
    def totals(self) -> dict[int, list[float]]:
        """{document: its columns}."""
        return dict(zip(self.keys().tolist(), self.values().tolist(), strict=True))

    def only(self, chosen: np.ndarray) -> DocumentSums:
        """The documents for which `chosen` [documents] is true, in the order of `keys`."""
        part = DocumentSums()
        part.add_all(self.keys()[chosen], self.values()[chosen])
        return part

    def gathered(self) -> DocumentSums:
        """The documents of all processes, in every process; a document in pieces of several is added up."""
        rank, world = processes()
        if world == 1:
            return self
        device = device_of_messages()
        keys, values = torch.from_numpy(self.keys()), torch.from_numpy(self.values())
        sizes = torch.zeros(world, 2, dtype=torch.int64, device=device)
        sizes[rank, 0], sizes[rank, 1] = len(keys), self.num_excluded
        torch.distributed.all_reduce(sizes)
        counts, excluded = sizes.T.tolist()
        whole = DocumentSums(num_excluded=sum(excluded))
        every = [_from_all(part.to(device), counts) for part in (keys, values)]
        for numbers, columns in zip(*every, strict=True):
            whole.add_all(numbers, columns)
        return whole

    def _merge(self) -> None:
        if not self._new:
            return
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._new)])
        sums = np.concatenate([self._sums, *(columns for _, columns in self._new)])
        self._keys, places = np.unique(keys, return_inverse=True)
        self._sums = np.stack(
            [np.bincount(places, column, minlength=len(self._keys)) for column in sums.T], axis=1
        )
        self._new, self._num_new = [], 0


def _from_all(mine: torch.Tensor, counts: list[int]) -> list[np.ndarray]:
    """The tensors of all processes; of this one `mine` [counts[rank], ...]."""
    padded = torch.zeros(max(counts), *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    return [part[:count].cpu().numpy() for part, count in zip(parts, counts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What is shown of a `Sum`: loss in nats per token, perplexity, bits per byte, accuracies, counts, intervals.

    hits                  tokens that were the most probable one, and among the five most probable; NaN: not counted
    intervals             95 % by document bootstrap of loss, perplexity, bits_per_byte, accuracy, accuracy_top5; each
                          of a ratio of sums. Empty from fewer than 10 documents
    num_documents         documents with at least one counted token
    num_excluded          documents without one (too short for what was asked)
    context_tokens        inputs that a token is predicted from, at most
    least_context_tokens  and at least, unless its document begins later
    """

    total: Sum
    hits: tuple[float, float] = (math.nan, math.nan)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    num_documents: int | None = None
    num_excluded: int = 0
    context_tokens: int | None = None
    least_context_tokens: int | None = None

    @classmethod
    def of(cls, sums: DocumentSums, **stated: Any) -> Scores:
        values = sums.values()
        has_tokens = values[values[:, 1] > 0]
        nats, tokens, num_bytes, *hits = values.sum(axis=0).tolist()
        return cls(
            total=Sum.of(nats, tokens, num_bytes),
            hits=(hits[0], hits[1]),
            intervals=_intervals(has_tokens),
            num_documents=len(has_tokens),
            num_excluded=sums.num_excluded + len(values) - len(has_tokens),
            **stated,
        )

    @property
    def loss(self) -> float:
        """Nats per token. Raises DataError where no token was counted."""
        return self.total.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the loss."""
        return self.intervals.get("loss")

    @property
    def perplexity(self) -> float:
        return self.total.perplexity

    @property
    def bits_per_byte(self) -> float | None:
        """None where no counted token stands for a byte (or no byte lengths were given)."""
        return self.total.bits_per_byte if float(self.total.bytes) > 0 else None

    @property
    def accuracy(self) -> float | None:
        """Share of the tokens that were the most probable one."""
        return self._share(self.hits[0])

    @property
    def accuracy_top5(self) -> float | None:
        """Share of the tokens that were among the five most probable ones."""
        return self._share(self.hits[1])

    @property
    def num_tokens(self) -> int:
        return round(float(self.total.tokens))

    @property
    def num_bytes(self) -> int | None:
        """None where the bytes were not counted."""
        num_bytes = float(self.total.bytes)
        return None if math.isnan(num_bytes) else round(num_bytes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, null where there is none (an empty score has null means, never NaN)."""
        self.check()
        ppl = self.perplexity if self.num_tokens else None
        return {
            "loss": self.loss if self.num_tokens else None,
            "perplexity": ppl if ppl is not None and math.isfinite(ppl) else None,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
            "accuracy_top5": self.accuracy_top5,
            **{f"{name}_95": self._interval(name) for name in ("perplexity", *RATIOS)},
            "nats": float(self.total.nats),
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_documents": self.num_documents,
            "num_excluded": self.num_excluded,
            "context_tokens": self.context_tokens,
            "least_context_tokens": self.least_context_tokens,
        }

    def check(self) -> None:
        """Raises CheckFailed for a loss that is no number."""
        if self.num_tokens and not math.isfinite(self.loss):
            raise CheckFailed(
                f"The loss over {self.num_tokens} tokens is {self.loss}. The model gives logits that are not finite: "
                "its weights may have diverged or be damaged. Look at the loss of the run, and at another checkpoint."
            )

    def _interval(self, name: str) -> list[float] | None:
        found = self.intervals.get(name)
        return list(found) if found and all(map(math.isfinite, found)) else None

    def _share(self, hits: float) -> float | None:
        return hits / self.num_tokens if self.num_tokens and not math.isnan(hits) else None


def bootstrap(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of (sum of nats) / (sum of tokens); values [documents, >= 2], nats and tokens first.

    None for fewer than `FEWEST_DOCUMENTS` documents. The same documents always give the same interval.
    """
    sums = resampled(values[:, :2], resamples=resamples, seed=seed)
    return None if sums is None else _between(sums[:, 0] / sums[:, 1])


def resampled(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray | None:
    """[resamples, C]: the sums of the columns of `values` [documents, C] over documents drawn with replacement.

    All columns of a line are of the same documents. None for fewer than `FEWEST_DOCUMENTS`, or if one is not finite.
    """
    if len(values) < FEWEST_DOCUMENTS or not np.isfinite(values).all():
        return None
    random = np.random.default_rng(seed)
    units = values
    if len(units) > MOST_UNITS:
        group = random.permutation(len(units)) % MOST_UNITS
        units = np.stack([np.bincount(group, column, minlength=MOST_UNITS) for column in values.T], axis=1)
    parts, count = [], len(units)
    at_once = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, resamples, at_once):
        number = min(at_once, resamples - start)
        drawn = random.integers(0, count, (number, count)) + count * np.arange(number)[:, None]
        times = np.bincount(drawn.ravel(), minlength=number * count).reshape(number, count)
        parts.append(times @ units)
    return np.concatenate(parts)


def _intervals(values: np.ndarray) -> dict[str, tuple[float, float]]:
    """Of all ratios, from the same draws; `values` [documents, 5] as in `DocumentSums`."""
    known = np.isfinite(values).all(axis=0)
    known[:2] = True  # a loss that is not finite has no interval at all
    sums = resampled(values[:, known])
    if sums is None:
        return {}
    column = dict(zip(np.flatnonzero(known).tolist(), sums.T, strict=True))
    found = {}
    for name, (above, below, scale) in RATIOS.items():
        if above in column and below in column and column[below].all():
            found[name] = _between(scale * column[above] / column[below])
    low, high = found["loss"]
    # A rising function of the loss: the ends of the one are those of the other.
    found["perplexity"] = math.exp(min(low, 700.0)), math.exp(min(high, 700.0))
    return found


def _between(ratios: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
