"""Is one run better than another on the same documents: the paired bootstrap.

Both runs are scored on the same documents. A test set of documents drawn with replacement is scored for both, and the
difference of the two scores is looked at: a document that is hard for both moves it little, so the interval is much
narrower than two intervals side by side would suggest.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 8; for language models Koehn,
Statistical Significance Tests for Machine Translation Evaluation (2004).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilm.alignment import Sum
from minilm.evaluation.intervals import FEWEST_DOCUMENTS, RESAMPLES

DOCUMENTS = "documents"  # of eval.py --per-document
_WHAT_MUST_AGREE = ("split", "sequence_length", "rows_are", "kind")


@dataclass(frozen=True)
class Difference:
    """First run less second: below 0 means that the first has the lower loss.

    metric          "loss" (nats per token) or "bits_per_byte"
    interval        95 %, by paired bootstrap over documents
    num_documents   that both scored
    """

    metric: str
    value: float
    interval: tuple[float, float]
    num_documents: int

    @property
    def significant(self) -> bool:
        """The interval excludes 0."""
        return self.interval[0] > 0 or self.interval[1] < 0


def compare(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> list[Difference] | str:
    """Differences of two eval.json on the same documents; or why there are none.

    Loss only where both count the same number of tokens in every document; bits per byte also where the tokenizers of
    the two cut the same texts into other tokens.
    """
    why = _why_not(first, second)
    if why is not None or first is None or second is None:
        return why or "not run"
    mine, other = _sums(first), _sums(second)
    common = sorted(mine.keys() & other.keys())
    if len(common) < FEWEST_DOCUMENTS:
        return "too few documents that both scored"
    if len(common) < max(len(mine), len(other)):
        return "the two scored different documents"
    a, b = (np.array([sums[key] for key in common]) for sums in (mine, other))
    found = []
    if np.array_equal(a[:, 1:], b[:, 1:]):
        found.append(_difference("loss", a, b, 1, 1.0))
    if np.array_equal(a[:, 2], b[:, 2]) and a[:, 2].sum() > 0:
        found.append(_difference("bits_per_byte", a, b, 2, math.log(2)))
    return found or "the two counted different tokens and different bytes of the same documents"


def _difference(metric: str, a: np.ndarray, b: np.ndarray, below: int, scale: float) -> Difference:
    random = np.random.default_rng(0)
    drawn = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        chosen = random.integers(0, len(a), len(a))
        drawn[number] = _of(a[chosen], below, scale) - _of(b[chosen], below, scale)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(metric, _of(a, below, scale) - _of(b, below, scale), (float(low), float(high)), len(a))


def _of(units: np.ndarray, below: int, scale: float) -> float:
    total = units.sum(axis=0)
    return Sum.of(total[0], total[below]).mean / scale


def _why_not(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> str | None:
    if first is None or second is None:
        return "not run"
    if not isinstance(first.get(DOCUMENTS), list) or not isinstance(second.get(DOCUMENTS), list):
        return "an eval.json has no sums per document (eval.py --per-document)"
    if _fingerprint(first) is None or _fingerprint(second) is None:
        return "an eval.json does not say which data it scored"
    if _fingerprint(first) != _fingerprint(second):
        return "the two were scored on other data"
    if any(first.get(key) != second.get(key) for key in _WHAT_MUST_AGREE):
        return "the two were scored in another way"
    return None


def _fingerprint(evaluation: Mapping[str, Any]) -> str | None:
    """Of the store; of texts their places, and `compare` asks that every document has the same bytes."""
    if evaluation.get("kind") == "text":
        return str(evaluation.get("data"))
    return evaluation.get("store_fingerprint")


def _sums(evaluation: Mapping[str, Any]) -> dict[int, tuple[float, float, float]]:
    """{document: (nats, tokens, bytes)}; bytes that were not counted are 0."""
    return {
        int(one["document"]): (float(one["nats"]), float(one["num_tokens"]), float(one.get("num_bytes") or 0))
        for one in evaluation[DOCUMENTS]
    }
