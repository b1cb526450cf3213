"""Every planted bug is found under its own name and in its place; every healthy look-alike passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from minilm.doctor import specimens
from minilm.doctor.catalogue import bugs
from minilm.doctor.core import Check, Healthy, Planted, checks, run_checks
from minilm.doctor.pages import page

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


def test_every_row_of_the_catalogue_is_planted_or_says_why_not() -> None:
    planted = {plant.bug for _, plant in PLANTS}
    assert planted <= bugs().keys(), "a plant that the catalogue does not have"
    assert len(planted) >= 120
    for bug in bugs().values():
        assert (bug.id in planted) != bool(bug.left_out), bug.id


def test_the_page_of_the_matrix_has_every_plant() -> None:
    matrix = (Path(__file__).parent.parent / "docs" / "matrix.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in matrix.splitlines() if line.startswith("| `")]
    shown = {(cells[3].strip(" `"), cells[1].strip(" `")) for cells in rows if len(cells) > 4}
    missing = {(check.name, plant.bug) for check, plant in PLANTS} - shown
    assert not missing, "run `minilm doctor --prove --matrix docs/matrix.md`"


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_the_page_of_a_check_is_what_its_text_says(check: Check) -> None:
    written = Path(__file__).parent.parent / "docs" / "checks" / f"{check.name}.md"
    assert written.read_text(encoding="utf-8") == page(check), "run `minilm doctor --pages docs/checks`"
