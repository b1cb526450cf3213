"""Every planted bug is found under its own name and in its place; every healthy look-alike passes."""

from __future__ import annotations

import pytest

from minilm.doctor import specimens
from minilm.doctor.core import Check, Healthy, Planted, checks, run_checks

CHECKS = checks()
PLANTS = [(check, plant) for check in CHECKS for plant in check.plants]
LOOK_ALIKES = [(check, healthy) for check in CHECKS for healthy in check.look_alikes]


@pytest.mark.parametrize(("check", "plant"), PLANTS, ids=lambda x: getattr(x, "bug", None) or x.name)
def test_the_planted_bug_is_found_under_its_own_name(check: Check, plant: Planted) -> None:
    finding = next(run_checks(plant.make(), [check]))
    assert finding.status == "FAIL", finding.message
    assert plant.bug in finding.bugs
    assert plant.component.lower() in finding.component.lower()
    assert finding.advice


@pytest.mark.parametrize(("check", "healthy"), LOOK_ALIKES, ids=lambda x: getattr(x, "what", None) or x.name)
def test_a_healthy_look_alike_passes(check: Check, healthy: Healthy) -> None:
    finding = next(run_checks(healthy.make(), [check]))
    assert finding.status == "PASS", finding.message


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_the_plain_specimen_is_healthy(check: Check) -> None:
    finding = next(run_checks(specimens.subject(), [check]))
    assert finding.status == "PASS" or finding.message.startswith("needs "), finding.message


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_every_check_says_why_how_and_what_it_cannot_see_and_has_a_plant(check: Check) -> None:
    assert check.plants
    for word in ("Why:", "How:", "Cannot see:", "Sources:"):
        assert word in check.text, f"{check.name}: {word}"
