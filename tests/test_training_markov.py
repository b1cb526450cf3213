"""A model trained on a source of known entropy reaches it and does not go below it."""

from __future__ import annotations

import math

import pytest
from training_runs import column, records, run_here

from minilm.data.build import build
from minilm.data.store import Store


@pytest.mark.usefixtures("fresh_accelerate")
def test_validation_loss_is_just_above_the_entropy_rate_and_not_below_it(tmp_path):
    source = "synthetic:markov?vocab=48&branching=4&documents=1600&length=257&seed=3"
    build(tmp_path / "store", [source], None, validation_fraction=0.1)
    known = Store.open(tmp_path / "store").entropy
    assert known is not None
    run = run_here(
        tmp_path,
        tmp_path / "store",
        **{"data.sequence_length": 64, "data.rows": "packed", "model.dim": 64, "model.num_layers": 1},
        train__steps=400,
        train__batch_size=32,
        train__validation_rows="none",
        optim__learning_rate=1e-2,
        optim__warmup_steps=20,
        optim__clip_norm=1.0,
    )
    result = records(run, "validation")[-1]
    targets = known["validation"]["targets"]
    assert result["tokens"] == targets  # every token of every held-out document but its first, once
    # What the true chain gets on the very same tokens: no sampling error between it and the model.
    floor = known["validation"]["nats"] / targets
    # The spread of the floor itself around the entropy rate, at most ln(V) a token.
    assert floor == pytest.approx(known["rate_nats"], abs=4 * math.log(48) / math.sqrt(targets))
    assert floor < result["loss"] < 1.03 * floor
    assert result["loss"] < 1.03 * known["rate_nats"]
    assert column(run, "loss")[0] == pytest.approx(math.log(48), abs=0.2)  # it did not start there
