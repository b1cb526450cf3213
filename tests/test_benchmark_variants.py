"""The benchmark of the variants runs, in small, and its ratios and shares are what it says they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_modules import imported

from minilm.knowledge.store import KnowledgeStore

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def variants():
    with imported("variants") as module:
        yield module


def test_all_is_measured_in_pairs_and_the_store_is_kept(variants, tmp_path, capsys):
    out, store = tmp_path / "out.json", tmp_path / "store"
    small = ["--size", "tiny", "--device", "cpu", "--batch", "2", "--length", "32", "--repeats", "3"]
    given = ["--models", "knowledge,moe", "--profile", "knowledge", "--store", str(store), "--json", str(out)]
    assert variants.main([*small, *given]) == 0
    found = json.loads(out.read_text())
    assert list(found["models"]) == ["original", "knowledge", "moe"]
    for name in ("knowledge", "moe"):
        ratio = found["models"][name]["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert found["models"]["knowledge"]["flops_ratio"] > 1.1
    assert found["models"]["knowledge"]["peak_ratio"] > 1.2
    assert found["models"]["moe"]["mfu"] is None  # of a CPU no peak is known
    inside = found["profile"]
    assert sum(part["share"] for part in inside.values()) == pytest.approx(1)
    for part in ("attention", "feed-forward", "memory: retrieval", "memory: read", "memory: index loss"):
        assert inside[part]["forward"] > 0 and inside[part]["backward"] > 0, part
    # The output layer's gradients are made in its forward, the optimizer has no backward.
    assert inside["optimizer"]["backward"] == 0
    kept = KnowledgeStore.open(store)  # whole, with right checksums
    assert kept.num_entries == 16 * 16
    assert "| moe |" in capsys.readouterr().out


def test_a_ratio_is_that_of_neighbours(variants, monkeypatch):
    """A machine that becomes slower and slower: of means over all steps the ratio would be another one."""
    clock = iter(2.0**n for n in range(100))

    def step(name):
        seconds = next(clock) * {"original": 1, "moe": 3}[name]
        return {"step": seconds, "forward": seconds, "cpu": seconds}

    class Fake(variants.Subject):
        def step(self):
            return step(self.config)

    subjects = {name: Fake(name, None, None) for name in ("original", "moe")}
    variants.measure(subjects, repeats=4)
    pairs = zip(subjects["moe"].steps, subjects["moe"].base, strict=True)
    assert [ours["step"] / theirs["step"] for ours, theirs in pairs] == [6.0] * 4
    assert len(subjects["original"].steps) == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--models", "orginal"], "no model is called orginal"),
        (["--size", "27m"], "--size 27m"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_what_is_not_there_is_named(variants, capsys, given, said):
    with pytest.raises(SystemExit):
        variants.main(given)
    assert said in capsys.readouterr().err
