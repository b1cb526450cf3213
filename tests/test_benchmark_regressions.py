"""What is kept from commit to commit: the figures are what they say, and what is worse is told."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from benchmark_modules import BENCHMARKS, imported

from minilm.training.objective import Objective

USUAL = {
    "step": 2.0, "packed step": 2.4, "memory of a step": 0.6, "1 stream": 2.4, "16 streams": 2.6, "operators": 900,
    "kept": 60.0,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def bench():
    """benchmarks/regressions.py with the modules beside it, as when it is run; forgotten afterwards."""
    with imported("regressions") as module:
        yield module


def spread(median):
    return {"median": median, "lowest": 0.9 * median, "highest": 1.1 * median}


def line(commit="abc", processor="A processor", torch="2.13.0+cpu", threads=2, **figures):
    found = {name: spread(value) for name, value in (USUAL | figures).items()}
    machine = {"processor": processor, "torch": torch, "threads": threads, "date": "2026-01-02"}
    return {"commit": commit, **machine, "figures": found}


# ---------------------------------------------------------------- measuring


def test_operators_and_what_is_kept_are_counted(bench, monkeypatch):
    plain, again = bench.counts("tiny", 2, 16), bench.counts("tiny", 2, 16)
    assert plain == again, "the same numbers each time"
    forward, more = Objective.forward, torch.ones(1000, requires_grad=True)

    def with_more(objective, batch):
        torch.zeros(1).neg()
        kept = more * more  # keeps 4,000 bytes, once
        loss, auxiliary = forward(objective, batch)
        return loss._replace(nats=loss.nats + 0 * kept.sum()), auxiliary

    monkeypatch.setattr(Objective, "forward", with_more)
    other = bench.counts("tiny", 2, 16)
    # zeros, neg; product, sum, times 0, plus; and the backward pass of these four.
    assert 6 <= other["operators"]["median"] - plain["operators"]["median"] <= 16
    assert (other["kept"]["median"] - plain["kept"]["median"]) * 1e3 * 32 == pytest.approx(4000, abs=64)


def test_the_figures_are_those_of_the_other_benchmarks(bench):
    steps = json.loads((BENCHMARKS / "results" / "training_step_eager.json").read_text())
    texts = json.loads((BENCHMARKS / "results" / "generation.json").read_text())
    texts["results"] = [one for one in texts["results"] if one["threads"] == 2]
    found = bench.from_steps(steps) | bench.from_texts(texts)
    contenders = steps["results"]["cases"][0]["contenders"]
    assert found["step"] == contenders["minilm"]["ratio_to_plain"]
    assert found["packed step"] == contenders["minilm-packed"]["ratio_to_plain"]
    assert found["memory of a step"]["median"] == contenders["minilm"]["peak_ratio"]
    by_rows = {one["rows"]: one["times_faster"] for one in texts["results"]}
    assert (found["1 stream"], found["16 streams"]) == (by_rows[1], by_rows[16])
    assert {*found, "operators", "kept"} == {figure.name for figure in bench.FIGURES}


@pytest.mark.parametrize("quick", [True, False])
def test_the_other_benchmarks_understand_what_they_are_given(bench, quick):
    given = bench.commands(quick)
    steps = importlib.import_module("training_step").parsed([*given["training_step"], "--json", "x"])
    assert steps.only == ["minilm", "minilm-packed", "transformers"]
    texts = importlib.import_module("generation")._arguments([*given["generation"], "--json", "x"])
    assert quick or (texts.threads == [2] and texts.rows == [1, 16] and steps.threads == 2)


# ---------------------------------------------------------------- judging


def test_what_is_worse_than_the_best_before_is_told(bench):
    before = [line("old", step=2.1, operators=800), line("best", step=2.5), line("last", step=2.0)]
    assert bench.judged(line(step=2.31, operators=807), before) == []
    assert bench.judged(line(step=2.2, operators=800), before) == [
        "step: 2.20 is 12% worse than 2.50 at best"
    ]
    assert bench.judged(line(step=2.5, operators=820), before) == [
        "operators: 820 is 2% worse than 800 at old"
    ]
    worse = bench.judged(line(**{"step": 2.5, "memory of a step": 0.7, "operators": 800}), before)
    assert worse == ["memory of a step: 0.70 is 17% worse than 0.60 at old"]


def test_only_counts_are_compared_with_another_machine(bench):
    slow = {"step": 1.0, "1 stream": 1.0, "memory of a step": 1.0}
    for other in ({"processor": "Another"}, {"threads": 1}):
        assert bench.judged(line(**slow), [line(**other)]) == []
        assert len(bench.judged(line(kept=70.0, **slow), [line(**other)])) == 1
    assert bench.judged(line(kept=70.0, **slow), [line(torch="2.14.1")]) == []
    assert bench.judged(line(), []) == []


def test_a_line_is_added_and_a_worse_one_is_told(bench, monkeypatch, tmp_path, capsys):
    figures = {name: spread(value) for name, value in USUAL.items()}
    monkeypatch.setattr(bench, "measured", lambda quick: figures)
    path = tmp_path / "lines.json"
    assert bench.main(["--json", str(path), "--check"]) == 0
    assert not path.exists()
    assert bench.main(["--json", str(path)]) == 0
    figures["step"] = spread(1.5)
    assert bench.main(["--json", str(path)]) == 1
    lines = json.loads(path.read_text())["results"]["lines"]
    assert [one["figures"]["step"]["median"] for one in lines] == [2.0, 1.5]
    assert "commit" in lines[0] and lines[0]["threads"] == 2
    said = capsys.readouterr()
    assert "WORSE: step: 1.50 is 25% worse than 2.00" in said.err
    assert "| 1.50 (1.35 to 1.65) |" in said.out and "| 900 |" not in said.out


def test_a_benchmark_that_fails_leaves_no_line(bench, monkeypatch, tmp_path, capsys):
    def failing(*_, **__):
        raise subprocess.CalledProcessError(1, [sys.executable, str(BENCHMARKS / "training_step.py")])

    monkeypatch.setattr(bench.subprocess, "run", failing)
    assert bench.main(["--json", str(tmp_path / "lines.json")]) == 2
    assert "training_step.py ended with 1: nothing is kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
