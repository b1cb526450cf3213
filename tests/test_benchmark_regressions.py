"""What is kept from commit to commit: the figures are what they say, and what is worse is told."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

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
    return {"median": median, "lowest": 0.97 * median, "highest": 1.02 * median}


MACHINE = {
    "processor": "A processor", "cores": 2, "threads": 2, "torch": "2.13.0+cpu", "transformers": "5.23.0",
    "onednn": True, "date": "2026-01-02",
}  # fmt: skip


def line(commit="abc", machine=None, accepted=None, **figures):
    found = {name: spread(value) for name, value in (USUAL | figures).items()}
    meant = {"accepted": accepted} if accepted else {}
    return {"commit": commit, **MACHINE, **(machine or {}), **meant, "figures": found}


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


def test_what_is_worse_than_before_is_told(bench):
    before = [
        line("old", step=2.4, operators=800),
        line("lucky", step=2.5, operators=790),
        line("last", step=2.0),
    ]

    def worse(**figures):
        return bench.judged(line(**figures), before).worse

    assert len(bench.judged(line(), before).compared) == len(bench.FIGURES)
    assert worse(step=2.22, operators=807) == []
    assert worse(step=2.16, operators=800) == ["step: 2.16 is 10% worse than 2.40 at old"]
    assert worse(step=2.4, operators=830) == ["operators: 830 is 4% worse than 800 at old"]
    assert worse(**{"step": 2.4, "memory of a step": 0.7, "operators": 800}) == [
        "memory of a step: 0.70 is 17% worse than 0.60 at lucky"
    ]
    assert worse(step=float("nan"), operators=800)[0].startswith("step: nan")


def test_a_figure_that_was_once_as_good_as_before_is_noise(bench):
    now = line()
    now["figures"]["step"] = {"median": 1.8, "lowest": 1.7, "highest": 2.01}
    assert bench.judged(now, [line(step=2.0)]).worse == []
    now["figures"]["step"]["highest"] = 1.99
    assert len(bench.judged(now, [line(step=2.0)]).worse) == 1


def test_a_slow_drift_is_told_and_what_is_accepted_is_no_longer_compared(bench):
    lines, told = [], []
    for number in range(6):
        told.append(bool(bench.judged(now := line(f"c{number}", step=2.0 * 0.965**number), lines).worse))
        lines.append(now)
    assert told == [False, False, False, False, True, True]
    lines.append(line("meant", accepted="a check more", step=1.5))
    assert bench.judged(line(step=1.5), lines).worse == []
    assert bench.judged(line(step=1.3), lines).worse == ["step: 1.30 is 13% worse than 1.50 at meant"]


@pytest.mark.parametrize(
    "other", [{"processor": "Another"}, {"threads": 1}, {"cores": 4}, {"transformers": "5.24.0"}]
)
def test_only_counts_are_compared_with_another_machine(bench, other):
    slow = {"step": 1.0, "1 stream": 1.0, "memory of a step": 1.0}
    compared, worse = bench.judged(line(kept=70.0, **slow), [line(machine=other)])
    assert compared == ["operators", "kept"] and len(worse) == 1


@pytest.mark.parametrize("other", [{"torch": "2.14.1"}, {"onednn": False}])
def test_where_nothing_can_be_compared_nobody_says_that_all_is_well(bench, other):
    lines = [line(machine=other), line(kept=70.0, step=1.0)]
    assert bench.judged(lines[1], lines[:1]) == ([], [])
    text = bench.section({"results": {"lines": lines}, "command": "x"})
    assert "nothing could be compared" in text and "worse" not in text
    assert "nothing could be compared" in bench.section({"results": {"lines": lines[:1]}, "command": "x"})


def test_a_line_is_added_and_a_worse_one_is_told(bench, monkeypatch, tmp_path, capsys):
    figures = {name: spread(value) for name, value in USUAL.items()}
    monkeypatch.setattr(bench, "measured", lambda quick: figures)
    path = tmp_path / "lines.json"
    assert bench.main(["--json", str(path), "--check"]) == 0
    assert not path.exists()
    assert bench.main(["--json", str(path)]) == 0
    figures["step"] = spread(1.5)
    assert bench.main(["--json", str(path)]) == 1
    said = capsys.readouterr()
    assert "WORSE: step: 1.50 is 25% worse than 2.00" in said.err
    assert (
        "| 1.50 (1.46 to 1.53) |" in said.out and "At the last of 2 measured commits, step: 1.50" in said.out
    )
    figures["step"] = spread(1.4)
    assert bench.main(["--json", str(path), "--accept", "one check more"]) == 0
    lines = json.loads(path.read_text())["results"]["lines"]
    assert [one["figures"]["step"]["median"] for one in lines] == [2.0, 1.5, 1.4]
    assert {"commit", "transformers", "onednn"} <= set(lines[0]) and lines[0]["threads"] == 2
    assert "was accepted: one check more" in capsys.readouterr().out
    assert bench.main(["--json", str(path), "--quick"]) == 0
    assert capsys.readouterr().out.startswith("Tiny models")
    assert len(json.loads(path.read_text())["results"]["lines"]) == 3 and len(list(tmp_path.iterdir())) == 1


def test_a_benchmark_that_fails_leaves_no_line(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3))
    assert bench.main(["--json", str(tmp_path / "lines.json")]) == 2
    assert "training_step.py ended with 3. Nothing is kept" in capsys.readouterr().err
    with pytest.raises(bench.NotMeasured, match=r"minilm, eager: no memory"):
        one = {"label": "minilm, eager", "failed": "no memory"}
        bench.from_steps({"results": {"cases": [{"contenders": {"minilm": one}}]}})
    (tmp_path / "lines.json").write_text('{"results": ')
    assert bench.main(["--json", str(tmp_path / "lines.json")]) == 2
    assert "lines.json has no lines" in capsys.readouterr().err
    assert (tmp_path / "lines.json").read_text() == '{"results": '
