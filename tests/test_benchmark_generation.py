"""The benchmark of generation: both sides write the same texts, and it says so where they do not."""

from __future__ import annotations

import json

import pytest
import torch
from benchmark_modules import imported


@pytest.fixture
def benchmark():
    with imported("generation") as module:
        yield module


def test_a_quick_run_has_every_figure_and_its_part_of_the_page(benchmark, tmp_path, capsys):
    file, threads = tmp_path / "generation.json", torch.get_num_threads()
    assert benchmark.main(["--quick", "--json", str(file)]) == 0
    assert torch.get_num_threads() == threads
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["benchmark"] == "generation" and record["settings"]["size"] == "tiny"
    assert [(x["rows"], x["threads"]) for x in record["results"]] == [(1, 1), (3, 1)]
    for found in record["results"]:
        assert found["same_text"]
        steps = found["milliseconds_per_step"]
        assert set(steps) == {"ours", "transformers", "dynamic", "static"}
        # The faster of the two caches is what the ratio is of.
        best = min(("dynamic", "static"), key=lambda name: steps[name]["median"])
        assert found["transformers_cache"] == best and steps["transformers"] == steps[best]
        assert found["times_faster"] == found["times_faster_than"][best]
        assert all(value > 0 for value in found["floor_milliseconds"].values())
        assert found["undisturbed_times_faster"] > 0
    text = benchmark.section(record)
    assert text.startswith("## Generation\n") and "the same texts, token for token" in text
    assert text in capsys.readouterr().out
    assert (
        len([line for line in text.splitlines() if line.startswith("| 1 |") or line.startswith("| 3 |")]) == 2
    )


def test_other_texts_are_told_and_are_a_failure(benchmark, tmp_path, capsys, monkeypatch):
    real = benchmark.generate

    def wrong(model, prompts, **options):
        found = real(model, prompts, **options)
        found[-1].tokens[-1] += 1
        return found

    monkeypatch.setattr(benchmark, "generate", wrong)
    file = tmp_path / "generation.json"
    assert benchmark.main(["--quick", "--json", str(file)]) == 1
    assert "error: other texts with 3 streams, 1 threads" in capsys.readouterr().err
    assert "**OTHER TEXTS**" in benchmark.section(json.loads(file.read_text(encoding="utf-8")))
