"""The Markov source: what is said about its entropy is true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minilm.alignment import score
from minilm.data.build import build
from minilm.data.loader import validation_batches
from minilm.data.rows import Rows
from minilm.data.synthetic import Markov, MarkovSettings
from minilm.errors import ConfigError


@pytest.mark.parametrize("settings", [(2, 2, 0), (3, 2, 1), (17, 5, 2), (64, 64, 3), (300, 4, 4)])
def test_stationary_distribution_and_entropy_rate_equal_an_eigenvector_computation(
    settings: tuple[int, int, int],
) -> None:
    vocab, branching, seed = settings
    chain = Markov(MarkovSettings(vocab=vocab, branching=branching, seed=seed))
    matrix = chain.transition_matrix()
    assert matrix.shape == (vocab, vocab)
    assert np.allclose(matrix.sum(axis=1), 1, atol=1e-12)
    assert ((matrix > 0).sum(axis=1) <= branching).all()
    values, vectors = np.linalg.eig(matrix.T)
    one = np.argmin(np.abs(values - 1))
    stationary = np.real(vectors[:, one]) / np.real(vectors[:, one]).sum()
    assert np.allclose(chain.stationary, stationary, atol=1e-10)
    logs = np.log(np.where(matrix > 0, matrix, 1))
    assert chain.entropy_rate_nats == pytest.approx(
        -float(stationary @ (matrix * logs).sum(axis=1)), abs=1e-10
    )
    assert 0 < chain.entropy_rate_nats <= np.log(branching) + 1e-12


def test_sampled_documents_have_the_entropy_that_was_promised() -> None:
    """A plug-in estimate from counts of pairs, which knows nothing of the chain."""
    chain = Markov(MarkovSettings(vocab=8, branching=3, documents=300, length=1000, seed=5))
    documents = [d.tokens for d in chain.documents()]
    pairs = np.zeros((8, 8))
    for tokens in documents:
        np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    assert pairs.sum() == 300 * 999
    conditional = pairs / pairs.sum(axis=1, keepdims=True)
    empirical = -(pairs * np.log(np.where(conditional > 0, conditional, 1))).sum() / pairs.sum()
    assert empirical == pytest.approx(chain.entropy_rate_nats, abs=0.005)  # sd about 0.001
    firsts = np.bincount([d[0] for d in documents], minlength=8) / 300
    assert np.abs(firsts - chain.stationary).max() < 0.1  # drawn from the stationary distribution
    own = sum(chain.nats(d) for d in documents) / pairs.sum()
    assert own == pytest.approx(chain.entropy_rate_nats, abs=0.005)


def test_nats_of_a_document_equal_the_transition_matrix() -> None:
    chain = Markov(MarkovSettings(vocab=9, branching=3, documents=2, length=50))
    matrix = chain.transition_matrix()
    for document in chain.documents():
        slow = -sum(np.log(matrix[a, b]) for a, b in zip(document.tokens, document.tokens[1:], strict=False))
        assert chain.nats(document.tokens) == pytest.approx(slow, rel=1e-12)


def test_the_floor_in_the_store_is_what_the_true_chain_scores_on_the_rows(tmp_path: Path) -> None:
    """End to end: logits of the true chain, through rows, align and score, in both kinds of rows."""
    spec = "synthetic:markov?vocab=40&branching=3&documents=200&length=256&seed=1"
    store = build(tmp_path / "s", [spec], None).store
    known = store.entropy
    assert known is not None and store.manifest["tokenizer"] is None and store.vocab_size == 40
    chain = Markov(MarkovSettings.parse(spec))
    assert known["rate_nats"] == chain.entropy_rate_nats
    table = torch.tensor(np.log(chain.transition_matrix() + 1e-300))
    # A document cut into rows loses the targets at the cuts in neither kind.
    for kind in ("packed", "document"):
        rows = Rows(store, "validation", 100, kind)
        total = sum(score(table[batch.inputs], batch) for batch in validation_batches(rows, 16))
        assert int(total.tokens) == known["validation"]["targets"]
        assert float(total.nats) == pytest.approx(known["validation"]["nats"], rel=1e-9)
    targets = known["train"]["targets"]
    assert known["train"]["nats"] / targets == pytest.approx(known["rate_nats"], abs=5 * 0.8 / targets**0.5)


def test_documents_are_a_function_of_the_seed(tmp_path: Path) -> None:
    def ids(seed: int, documents: int) -> list[list[int]]:
        settings = MarkovSettings(vocab=20, documents=documents, length=30, seed=seed)
        return [d.tokens.tolist() for d in Markov(settings).documents()]

    assert ids(0, 300) == ids(0, 300)
    assert ids(0, 300) != ids(1, 300)
    assert len({json.dumps(d) for d in ids(0, 600)}) == 600
    before = np.random.get_state()[1].tolist()
    ids(0, 10)
    assert np.random.get_state()[1].tolist() == before


def test_a_large_vocabulary_is_quick_and_needs_no_dense_matrix() -> None:
    chain = Markov(MarkovSettings(vocab=6400, branching=8))
    assert chain.stationary.sum() == pytest.approx(1) and chain.stationary.min() > 0


def test_wrong_settings_are_listed_together() -> None:
    with pytest.raises(ConfigError) as caught:
        MarkovSettings.parse("synthetic:ising?vocab=x&colour=3&branching=1&length=1")
    for part in (
        "no synthetic source 'ising'",
        "vocab=x is not",
        "'colour' is unknown",
        "branching=1",
        "length must",
    ):
        assert part in str(caught.value)
