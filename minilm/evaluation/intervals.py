"""Sums per document, and from them the numbers that are shown, with an interval.

The unit of chance in a test set is the document: tokens of one document are easy or hard together, so an
interval from single tokens would be far too narrow. The bootstrap draws documents with replacement and looks
at how the ratio (all nats) / (all tokens) of such test sets scatters.
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


def processes() -> tuple[int, int]:
    """(rank, number of processes) of this run; (0, 1) where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@dataclass
class DocumentSums:
    """Nats, tokens and bytes of each document, by its index; documents may come in several pieces."""

    totals: dict[int, list[float]] = field(default_factory=dict)
    num_excluded: int = 0

    def add(self, document: int, nats: float, tokens: float, num_bytes: float) -> None:
        total = self.totals.setdefault(document, [0.0, 0.0, 0.0])
        total[0] += nats
        total[1] += tokens
        total[2] += num_bytes

    def values(self) -> np.ndarray:
        """[documents, 3] float64: nats, tokens, bytes, in the order of the documents' indices."""
        return np.array([self.totals[key] for key in sorted(self.totals)], dtype=np.float64).reshape(-1, 3)

    def gathered(self, device: torch.device | str | None = None) -> DocumentSums:
        """The documents of all processes, in every process; a document in pieces of several is added up."""
        rank, world = processes()
        if world == 1:
            return self
        if device is None:
            cuda = torch.distributed.get_backend() == "nccl"
            device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        keys = sorted(self.totals)
        mine = torch.tensor([[key, *self.totals[key]] for key in keys], dtype=torch.float64).reshape(-1, 4)
        sizes = torch.zeros(world, 2, dtype=torch.int64, device=device)
        sizes[rank, 0], sizes[rank, 1] = len(keys), self.num_excluded
        torch.distributed.all_reduce(sizes)
        padded = torch.zeros(int(sizes[:, 0].max()), 4, dtype=torch.float64, device=device)
        padded[: len(keys)] = mine.to(device)
        parts = [torch.empty_like(padded) for _ in range(world)]
        torch.distributed.all_gather(parts, padded)
        whole = DocumentSums(num_excluded=int(sizes[:, 1].sum()))
        for part, size in zip(parts, sizes[:, 0].tolist(), strict=True):
            for key, *values in part[:size].tolist():
                whole.add(int(key), *values)
        return whole


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What is shown of a `Sum`: loss in nats per token, perplexity, bits per byte, the counts, the interval.

    interval              95 % of the loss by document bootstrap; None from fewer than 10 documents
    num_documents         documents with at least one counted token
    num_excluded          documents without one (too short for what was asked)
    context_tokens        inputs that a token is predicted from, at most
    least_context_tokens  and at least, unless its document begins later
    """

    total: Sum
    interval: tuple[float, float] | None = None
    num_documents: int | None = None
    num_excluded: int = 0
    context_tokens: int | None = None
    least_context_tokens: int | None = None

    @classmethod
    def of(cls, sums: DocumentSums, **stated: Any) -> Scores:
        values = sums.values()
        counted = values[values[:, 1] > 0]
        return cls(
            total=Sum.of(*values.sum(axis=0).tolist()),
            interval=bootstrap(counted),
            num_documents=len(counted),
            num_excluded=sums.num_excluded + len(values) - len(counted),
            **stated,
        )

    @property
    def loss(self) -> float:
        """Nats per token. Raises DataError where no token was counted."""
        return self.total.mean

    @property
    def perplexity(self) -> float:
        return self.total.perplexity

    @property
    def bits_per_byte(self) -> float | None:
        """None where no counted token stands for a byte (or no byte lengths were given)."""
        return self.total.bits_per_byte if float(self.total.bytes) > 0 else None

    @property
    def num_tokens(self) -> int:
        return round(float(self.total.tokens))

    @property
    def num_bytes(self) -> int:
        return round(float(self.total.bytes))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, null where there is none (an empty score has null means, never NaN)."""
        if self.num_tokens and not math.isfinite(self.loss):
            raise CheckFailed(
                f"The loss over {self.num_tokens} tokens is {self.loss}. The model gives logits that are not finite: "
                "its weights may have diverged or be damaged. Look at the loss of the run, and at another checkpoint."
            )
        ppl = self.perplexity if self.num_tokens else None
        return {
            "loss": self.loss if self.num_tokens else None,
            "loss_95": list(self.interval) if self.interval else None,
            "perplexity": ppl if ppl is not None and math.isfinite(ppl) else None,
            "bits_per_byte": self.bits_per_byte,
            "nats": float(self.total.nats),
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_documents": self.num_documents,
            "num_excluded": self.num_excluded,
            "context_tokens": self.context_tokens,
            "least_context_tokens": self.least_context_tokens,
        }


def bootstrap(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of (sum of nats) / (sum of tokens); values [documents, >= 2], nats and tokens first.

    None for fewer than `FEWEST_DOCUMENTS` documents. The same documents always give the same interval.
    """
    if len(values) < FEWEST_DOCUMENTS or not np.isfinite(values[:, :2]).all():
        return None
    random = np.random.default_rng(seed)
    units = values[:, :2]
    if len(units) > MOST_UNITS:
        group = random.permutation(len(units)) % MOST_UNITS
        grouped = np.zeros((MOST_UNITS, 2))
        np.add.at(grouped, group, units)
        units = grouped
    means = np.empty(resamples)
    for number in range(resamples):
        nats, tokens = units[random.integers(0, len(units), len(units))].sum(axis=0)
        means[number] = nats / tokens
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
