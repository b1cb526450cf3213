"""A model scored on data: the sums of one pass over it, and what is read from them without computing again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm.alignment import Batch, Sum
from minilm.evaluation.heldout import HeldOut, How
from minilm.evaluation.intervals import DocumentSums, Scores, processes
from minilm.evaluation.mode import autocast, device_of, eval_mode, random_states_kept
from minilm.evaluation.positions import ByContext
from minilm.evaluation.score import predictions
from minilm.evaluation.tally import Tally

MOST_BAD_WRITTEN = 1000
PER_DOCUMENT = ("loss", "bits_per_byte", "accuracy", "accuracy_top5", "num_tokens", "num_bytes")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Teacher-forced scores of a model on some data.

    scores       of everything: loss, perplexity, bits per byte, accuracies, counts, intervals
    by_source    {source: scores}, where the data have several sources (of a store, or files)
    by_context   scores by the number of tokens that were seen before
    documents    sums of each document, by its number
    excluded     what was not scored, and how much
    """

    scores: Scores
    by_source: dict[str, Scores]
    by_context: ByContext
    documents: DocumentSums
    source_of: list[tuple[str, int]] = field(default_factory=list)
    excluded: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.scores.loss

    @property
    def perplexity(self) -> float:
        return self.scores.perplexity

    @property
    def bits_per_byte(self) -> float | None:
        """None where the tokens do not stand for fixed bytes, or byte lengths were not given."""
        return self.scores.bits_per_byte

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "scores": self.scores.as_dict(),
            "by_source": {name: scores.as_dict() for name, scores in self.by_source.items()},
            "by_context": self.by_context.as_dict(),
            "excluded": self.excluded,
        }

    def document_records(self) -> list[dict[str, Any]]:
        """One record for each document with a counted token, in the order of the data."""
        borders = np.cumsum([0, *(count for _, count in self.source_of)])
        records = []
        for number, (nats, tokens, num_bytes, *hits) in self.documents.totals.items():
            if not tokens:
                continue
            scores = Scores(total=Sum.of(nats, tokens, num_bytes), hits=(hits[0], hits[1]))
            record: dict[str, Any] = {"document": number}
            if self.source_of:
                part = int(np.searchsorted(borders, number, side="right")) - 1
                record |= {
                    "source": self.source_of[part][0],
                    "number_in_source": number - int(borders[part]),
                }
            record |= {name: getattr(scores, name) for name in PER_DOCUMENT}
            records.append(record | {"nats": nats})
        return records


def score_held_out(model: nn.Module, held_out: HeldOut, how: How) -> Scored:
    """Score a store's split or texts. Every process calls this and gets the same.

    Raises CheckFailed if the loss is not finite.
    """
    tally = held_out.tally(model, how)
    scores = held_out.scores_of(tally.documents)
    scores.check()
    left_out = held_out.num_documents - (scores.num_documents or 0)
    scores = dataclasses.replace(scores, num_excluded=left_out)
    sources = held_out.sources()
    found = {}
    if len(sources) > 1:
        numbers = tally.documents.keys()
        borders = np.cumsum([0, *(count for _, count in sources)])
        for (name, _), low, high in zip(sources, borders, borders[1:], strict=False):
            found[name] = held_out.scores_of(tally.documents.only((numbers >= low) & (numbers < high)))
    bad = held_out.bad
    excluded = {
        "bad_documents": [str(one) for one in bad[:MOST_BAD_WRITTEN]],
        "num_bad_documents": len(bad),
        "num_documents_without_counted_token": left_out,
        "num_first_tokens": held_out.num_documents,
    }
    return Scored(
        scores=scores,
        by_source=found,
        by_context=ByContext.of(tally),
        documents=tally.documents,
        source_of=sources,
        excluded=excluded,
    )


def score_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    byte_lengths: Tensor | None = None,
    precision: str | None = None,
) -> Scored:
    """Score batches; each process gives its own, disjoint ones. Each segment of a row is a document of its own."""
    rank, world = processes()
    total, place, first, positions = Tally(), device_of(model), 0, 0
    lengths = None if byte_lengths is None else byte_lengths.to(place, torch.float64)
    with random_states_kept(), eval_mode(model), autocast(place, precision):
        for batch in batches:
            found = predictions(model, batch.to(place), lengths)
            numbers = first + found.row * (batch.shape[1] + 1) + found.segment
            total.add(numbers * world + rank, found)
            first += batch.shape[0] * (batch.shape[1] + 1)
            positions += batch.inputs.numel()
    tally = total.gathered()
    scores = Scores.of(tally.documents)
    scores.check()
    every = DocumentSums()
    every.add(rank, 0.0, positions, 0.0)
    num_positions = int(every.gathered().values()[:, 1].sum())
    return Scored(
        scores=scores,
        by_source={},
        by_context=ByContext.of(tally),
        documents=tally.documents,
        excluded={"num_positions_that_do_not_count": num_positions - scores.num_tokens},
    )
