"""Token by token results added up: per document, and by the number of tokens that each was predicted from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from minilm.evaluation.intervals import MOST_UNITS, DocumentSums, device_of_messages, processes

TOP = 5  # accuracies are given among the 1 and the 5 most probable tokens


@dataclass(frozen=True)
class Predictions:
    """The predictions of a batch that count, row after row; every field [N].

    row       int64    row of the batch
    segment   int64    document within the row, 1, 2, ...
    context   int64    tokens of its document that it was predicted from
    nats      float64  its loss
    rank      int64    tokens that are more probable, at most 5 (`minilm.ranking.ranks`)
    bytes     float64  that the predicted token stands for; NaN where that is not known
    """

    row: np.ndarray
    segment: np.ndarray
    context: np.ndarray
    nats: np.ndarray
    rank: np.ndarray
    bytes: np.ndarray

    def columns(self) -> np.ndarray:
        """[N, 5]: what `DocumentSums` adds up."""
        one = np.ones(len(self.nats))
        return np.stack(
            [self.nats, one, self.bytes, self.rank < 1, self.rank < TOP], axis=1, dtype=np.float64
        )


@dataclass
class Tally:
    """What was added up. Units of chance are documents; by context they are at most 10,000 groups of documents.

    contexts    {edge: sums of the tokens with a context of at most `edge` tokens, and more than the edge before}
    by_context  [n] int64: number of tokens predicted from exactly 0, 1, 2, ... tokens
    """

    documents: DocumentSums = field(default_factory=DocumentSums)
    contexts: dict[int, DocumentSums] = field(default_factory=dict)
    by_context: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def add(self, documents: np.ndarray, found: Predictions) -> None:
        """`documents` [N]: the number of the document of each prediction."""
        columns = found.columns()
        self.documents.add_all(documents, columns)
        if not len(documents):
            return
        counts = np.bincount(found.context, minlength=len(self.by_context))
        counts[: len(self.by_context)] += self.by_context
        self.by_context = counts
        edges = np.array(edges_up_to(int(found.context.max())))
        bucket = np.searchsorted(edges, found.context)
        for number in np.unique(bucket):
            chosen = bucket == number
            sums = self.contexts.setdefault(int(edges[number]), DocumentSums())
            sums.add_all(documents[chosen] % MOST_UNITS, columns[chosen])

    def gathered(self) -> Tally:
        """The same of all processes together, in every process."""
        _, world = processes()
        if world == 1:
            return self
        device = device_of_messages()
        longest = torch.tensor(len(self.by_context), device=device)
        torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
        counts = torch.zeros(int(longest), dtype=torch.int64, device=device)
        counts[: len(self.by_context)] = torch.from_numpy(self.by_context).to(device)
        torch.distributed.all_reduce(counts)
        contexts = {
            edge: self.contexts.get(edge, DocumentSums()).gathered()
            for edge in edges_up_to(int(longest) - 1)  # the same on every process
        }
        return Tally(
            self.documents.gathered(),
            {edge: sums for edge, sums in contexts.items() if len(sums)},
            counts.cpu().numpy(),
        )

    @property
    def least_context(self) -> int:
        """Fewest tokens that a counted token was predicted from; 0 where nothing was counted."""
        found = np.flatnonzero(self.by_context)
        return int(found[0]) if len(found) else 0

    @property
    def mean_context(self) -> float:
        """Tokens that a counted token was predicted from, on average; 0 where nothing was counted."""
        counts = self.by_context
        return float(np.arange(len(counts)) @ counts) / max(1, int(counts.sum()))


def edges_up_to(longest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... up to the first that is not below `longest`: two to an octave."""
    edges = [1, 2]
    while edges[-1] < longest:
        power = 1 << (len(edges) // 2)
        edges.append(power * 3 // 2 if len(edges) % 2 == 0 else power * 2)
    return edges if longest > 1 else edges[:1]
