"""--profile looks and changes nothing: a trace and a page of the chosen steps, and the same numbers as without."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch
from training_runs import SETTINGS, column, final_weights, flags, launched, make_store, records, run_here

from minilm import launch
from minilm.errors import ConfigError
from minilm.run import load_config
from minilm.training import trainer
from minilm.training.profile import Steps, peak_growth

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def profiled(folder, store, steps, *, resume=False, **changes):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = SETTINGS | {"data.store": store, "run.folder": folder, "run.name": "profiled"}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    launch.train(load_config(None, flags(settings)), resume=resume, profile=steps)
    return folder / "profiled"


def trace_of(path):
    with gzip.open(path / "trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def test_the_numbers_of_the_run_do_not_change(tmp_path, store):
    changes = {"train__steps": 8, "train__micro_batch": 4, "model__dropout": 0.1}
    plain = run_here(tmp_path, store, name="plain", **changes)
    run = profiled(tmp_path, store, "3:5", **changes)
    for name in ("loss", "gradient_norm", "learning_rate", "total_tokens"):
        assert column(run, name) == column(plain, name)
    expected = final_weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in final_weights(run).items())


def test_the_trace_holds_the_chosen_steps_and_nothing_between_them_counts(tmp_path, store):
    # Validation after step 4 runs the model many times: it is in the trace, but not in the tables.
    run = profiled(tmp_path, store, "3:5", train__steps=8, train__micro_batch=4, train__validate_every=4)
    folder = run / "profile" / "3-5"
    events = trace_of(folder)
    spans = {e["name"]: e for e in events if e.get("name", "").startswith("minilm step") and "dur" in e}
    assert sorted(spans) == ["minilm step 3", "minilm step 4", "minilm step 5"]

    def inside(event):
        return any(s["ts"] <= event["ts"] <= s["ts"] + s["dur"] for s in spans.values())

    counted = [e for e in events if e.get("name") == "aten::mm" and "dur" in e]
    within = sum(map(inside, counted))
    assert 0 < within < len(counted)
    page = (folder / "profile.md").read_text()
    by_name = page.split("by self time and shapes")[0]
    assert f"| `aten::mm` | {within} |" in by_name
    # Two micro-batches, three steps, the embedding of each in forward only.
    assert sum(inside(e) for e in events if e.get("name") == "aten::embedding") == 6


def test_the_shares_are_those_of_the_log(tmp_path, store):
    run = profiled(tmp_path, store, "2:3", train__steps=6)
    page = (run / "profile" / "2-3" / "profile.md").read_text()
    for record in records(run)[1:3]:
        line = re.search(rf"^\| {record['step']} \|(.*)\|$", page, re.MULTILINE)[1]
        seconds, *shares = [float(cell) for cell in line.split("|")]
        assert seconds == pytest.approx(record["seconds/step"], abs=1e-4)
        parts = [record[f"seconds/{part}"] for part in ("data", "forward", "backward", "optimizer")]
        parts.append(record["seconds/step"] - sum(parts))
        assert shares == pytest.approx([100 * part / record["seconds/step"] for part in parts], abs=0.06)
        assert sum(shares) == pytest.approx(100, abs=0.3)
    time_table = page.split("## Operators on the CPU, by self time\n")[1].split("##")[0]
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in time_table.strip().splitlines()[2:]]
    milliseconds = [float(row[2].replace(",", "")) for row in rows]
    assert milliseconds == sorted(milliseconds, reverse=True) and len(rows) == 12


def test_the_peak_of_memory_is_that_of_tensors_of_a_known_size(tmp_path):
    trace = tmp_path / "trace.json.gz"
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        kept = torch.empty(1_000_000)
        torch.empty(2_000_000)  # freed at once
        more = torch.empty(500_000)
        del kept, more
    profiler.export_chrome_trace(str(trace))
    assert peak_growth(trace, cuda=False) == pytest.approx(12_000_000, abs=1000)


def test_a_run_that_stops_in_between_leaves_what_was_seen(tmp_path, store, monkeypatch):
    real = trainer.optimizer_step
    calls = []

    def fails(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(trainer, "optimizer_step", fails)
    with pytest.raises(KeyboardInterrupt):
        profiled(tmp_path, store, "3:6", train__steps=8)
    page = (tmp_path / "profiled" / "profile" / "3-6" / "profile.md").read_text()
    assert page.startswith("# Steps 3 to 4\n")
    assert not torch.autograd.profiler._is_profiler_enabled


@pytest.mark.parametrize("text", ["", "0:3", "5:3", "a:b", "3:", "-1", "1:2:3"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=r"first and the last step"):
        Steps.parse(text)


def test_steps_beyond_the_run_are_refused_before_it_begins(tmp_path, store):
    assert Steps.parse("7") == Steps(7, 7)
    with pytest.raises(ConfigError, match=r"--profile 5:9 lies outside.*steps 1 to 8"):
        profiled(tmp_path, store, "5:9", train__steps=8)
    assert not (tmp_path / "profiled" / "metrics.jsonl").exists()
    profiled(tmp_path, store, "1", train__steps=8, train__save_every=4)
    with pytest.raises(ConfigError, match=r"lies outside"):
        Steps(4, 6).check(done=4, num_steps=8)
    Steps(5, 6).check(done=4, num_steps=8)


def test_two_ranks_profile_the_first_one(tmp_path, store):
    given = SETTINGS | {"data.store": store, "run.folder": tmp_path, "run.name": "two", "train.steps": 6}
    result = launched([*flags(given), "--profile", "2:3"], launcher="cpu2.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "two" / "profile" / "2-3"
    assert {e["name"] for e in trace_of(folder) if e.get("name", "").startswith("minilm step")} == {
        "minilm step 2",
        "minilm step 3",
    }
    assert "DDP on 2 ranks" in (folder / "profile.md").read_text()
