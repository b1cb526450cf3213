"""Learning rate and parameter groups against closed forms written here, not against the module's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from minilm import models
from minilm.training import optim
from minilm.training.optim import OptimConfig


def rates(config: OptimConfig, num_steps: int) -> list[float]:
    return [optim.rate_at(config, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
@pytest.mark.parametrize(("num_steps", "warmup"), [(100, 10), (100, 0), (7, 3), (1, 0), (12, 11)])
def test_last_step_has_the_final_rate_and_the_highest_is_never_exceeded(schedule, num_steps, warmup):
    config = OptimConfig(learning_rate=2e-3, final_rate=0.05, schedule=schedule, warmup_steps=warmup)
    values = rates(config, num_steps)
    assert math.isclose(values[-1], 2e-3 * 0.05, rel_tol=1e-12)
    assert max(values) <= 2e-3 * (1 + 1e-12)
    after = values[warmup:]
    assert all(a >= b for a, b in itertools.pairwise(after))


def test_warm_up_is_linear_and_its_first_step_moves_the_weights():
    values = rates(OptimConfig(learning_rate=1.0, warmup_steps=4, schedule="constant"), 8)
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_cosine_is_half_way_between_top_and_bottom_in_its_middle():
    config = OptimConfig(learning_rate=1.0, final_rate=0.0, warmup_steps=0, schedule="cosine")
    # After step s the cosine has turned by pi (s + 1) / 100.
    assert rates(config, 100) == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * (s + 1) / 100)) for s in range(100)]
    )


def test_wsd_is_constant_until_the_last_share_of_steps():
    values = rates(
        OptimConfig(learning_rate=1.0, final_rate=0.0, warmup_steps=2, schedule="wsd", decay_share=0.25), 20
    )
    assert values[2:15] == [1.0] * 13
    assert values[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_decay_on_matrices_only_and_every_parameter_once():
    model = models.build(models.preset("original", "tiny"))
    decayed, free = optim.groups(model.parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in free["params"])
    seen = [id(p) for part in (decayed, free) for p in part["params"]]
    assert len(seen) == len(set(seen)) == len(list(model.parameters()))


def test_a_step_without_gradient_shrinks_matrices_by_the_decay_and_leaves_vectors():
    model = models.build(models.preset("original", "tiny"))
    optimizer = optim.build(model, OptimConfig(learning_rate=0.5, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if p.dim() >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_the_rate_that_is_shown_is_the_one_in_the_optimizer():
    model = torch.nn.Linear(2, 2)
    optimizer = optim.build(model, OptimConfig())
    optim.set_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    assert optim.rates_of(optimizer) == {"learning_rate": 0.125}
