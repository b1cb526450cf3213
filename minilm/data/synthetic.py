"""Sources whose entropy is known, so that a training run can be held against its true floor.

`markov`: a chain of order 1 over the vocabulary. Each token has `branching` possible successors with random
probabilities; a document is `length` tokens, its first drawn from the stationary distribution, and has neither
BOS nor EOS. Then every token after the first is drawn given its predecessor, which a causal model sees in every
row and position, and the expected nats of each prediction are the entropy rate

    H = - sum_i pi_i sum_j P_ij ln P_ij        pi P = pi

exactly, however the documents are cut into rows. (The first token of a document or row is never a target.) No
model is below H beyond sampling error; what the true chain itself gets on the very tokens of the store is kept
beside it, which has no sampling error at all.

Source: T. Cover, J. Thomas, "Elements of information theory", section 4.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl

import numpy as np

from minilm.data.documents import Document, content_key
from minilm.errors import ConfigError, listed

_PREFIX = "synthetic:"
_AT_A_TIME = 256  # documents; part of what a seed means


@dataclass(frozen=True)
class MarkovSettings:
    """`synthetic:markov?vocab=256&branching=4&documents=1000&length=1024&seed=0`; each with this default."""

    vocab: int = 256
    branching: int = 4  # successors of each token
    documents: int = 1000
    length: int = 1024  # tokens of each document
    seed: int = 0

    @classmethod
    def parse(cls, spec: str) -> MarkovSettings:
        """Raises ConfigError with everything that is wrong."""
        kind, _, query = spec.removeprefix(_PREFIX).partition("?")
        names = [f.name for f in dataclasses.fields(cls)]
        problems, values = [], {}
        if kind != "markov":
            problems.append(f"there is no synthetic source {kind!r}, only markov")
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in names:
                problems.append(f"{key!r} is unknown: {', '.join(names)} exist")
            elif not value.isdecimal():
                problems.append(f"{key}={value} is not a whole number")
            else:
                values[key] = int(value)
        made = cls(**values)
        if not 2 <= made.branching <= made.vocab:
            problems.append(f"branching={made.branching} must be 2 to vocab ({made.vocab})")
        if made.length < 2 or made.documents < 1:
            problems.append("length must be at least 2 and documents at least 1")
        if problems:
            raise ConfigError(f"Source {spec}: {listed(problems)}.")
        return made


class Markov:
    """The chain of some settings, with what is known about it in closed form (all float64)."""

    def __init__(self, settings: MarkovSettings) -> None:
        self.settings = settings
        v, b = settings.vocab, settings.branching
        generator = np.random.default_rng([settings.seed, 0])
        # The next token (i + 1) is always among the successors: so each can be reached from each, and there is
        # one stationary distribution. Token 0 may follow itself: so the chain does not go round in step.
        successors = np.empty((v, b), dtype=np.int64)  # [V, b]
        for i in range(v):
            certain = [(i + 1) % v] + ([0] if i == 0 and v > 1 else [])
            others = generator.choice(v, size=min(v, b + 2), replace=False)
            successors[i] = [*certain, *others[~np.isin(others, certain)]][:b]
        self.successors = successors
        self.probabilities = generator.dirichlet(np.ones(b), size=v)  # [V, b], rows add up to 1
        self.stationary = self._stationary()  # [V]
        logs = np.log(self.probabilities, out=np.zeros((v, b)), where=self.probabilities > 0)
        self.entropy_of_state = -(self.probabilities * logs).sum(axis=1)  # [V] nats
        self.entropy_rate_nats = float(self.stationary @ self.entropy_of_state)

    def documents(self) -> Iterator[Document]:
        """The documents, always the same ones; made some at a time, so memory does not grow with their number."""
        s = self.settings
        cumulative = self.probabilities.cumsum(axis=1)[:, :-1]  # the last is 1 up to rounding: not needed
        for first in range(0, s.documents, _AT_A_TIME):
            count = min(_AT_A_TIME, s.documents - first)
            generator = np.random.default_rng([s.seed, 1, first])
            tokens = np.empty((count, s.length), dtype=np.int64)
            tokens[:, 0] = generator.choice(s.vocab, size=count, p=self.stationary)
            for t in range(1, s.length):
                state = tokens[:, t - 1]
                branch = (generator.random((count, 1)) >= cumulative[state]).sum(axis=1)
                tokens[:, t] = self.successors[state, branch]
            for n, row in enumerate(tokens):
                key = content_key(row.astype("<u4").tobytes())
                yield Document("", f"{_PREFIX}markov document {first + n}", 0, key, row)

    def nats(self, tokens: np.ndarray) -> float:
        """Sum of -ln P(token | the one before) of one document, without its first token: the chain's own loss."""
        state, following = tokens[:-1], tokens[1:]
        of_state = self.successors[state] == following[:, None]  # [n - 1, b], one True a row
        return -float(np.log((self.probabilities[state] * of_state).sum(axis=1)).sum())

    def transition_matrix(self) -> np.ndarray:
        """[V, V], dense."""
        matrix = np.zeros((self.settings.vocab, self.settings.vocab))
        np.put_along_axis(matrix, self.successors, self.probabilities, axis=1)
        return matrix

    def _stationary(self) -> np.ndarray:
        """pi P = pi by power iteration: V x b work a step, and the dense V x V matrix is never made."""
        v = self.settings.vocab
        flat = self.successors.ravel()
        pi = np.full(v, 1 / v)
        for _ in range(1_000_000):
            following = np.bincount(flat, weights=(pi[:, None] * self.probabilities).ravel(), minlength=v)
            following /= following.sum()
            if np.abs(following - pi).sum() < 1e-14:
                return following
            pi = following
        raise ConfigError(
            f"The chain of {self.settings} mixes too slowly to find its stationary distribution: choose a larger "
            "branching, or another seed."
        )
