"""benchmarks/upkeep.py and benchmarks/memory.py: their quick ways through, and the sums that they do."""

from __future__ import annotations

import contextlib
import importlib
import json
import types

import pytest
from benchmark_modules import imported
from training_runs import make_store

from minilm.doctor import watch
from minilm.doctor.core import passed


@pytest.fixture
def benchmarks():
    """By name; those beside it are found."""
    with imported("measuring"):
        yield importlib.import_module


def test_upkeep_goes_through_and_its_parts_are_those_of_the_run(benchmarks, tmp_path, capfd):
    upkeep, file = benchmarks("upkeep"), tmp_path / "upkeep.json"
    store = make_store(tmp_path / "store")
    assert upkeep.main(["--quick", "--store", str(store), "--horizon", "500", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    found = record["results"]
    assert record["benchmark"] == "upkeep" and record["settings"]["horizon"] == 500
    assert found["share"] == pytest.approx(sum(found["shares"].values()))
    assert 0 < found["share"] < 1 and all(seconds > 0 for seconds in found["seconds"].values())
    bare = found["step_seconds"]["bare"]["median"]
    whole = 500 * bare + sum(found["seconds"].values())
    assert found["shares"]["preflight"] == pytest.approx(found["preflight_seconds"] / whole)
    assert found["seconds"]["log: console"] == pytest.approx(500 * found["per_step_seconds"]["console"])
    assert found["look_seconds"] > found["per_step_seconds"]["watch"]  # replays the step
    page = upkeep.section(record)
    assert page.startswith("## Upkeep\n") and "| **together** |" in page and record["command"] in page
    assert str(tmp_path) not in page + file.read_text()
    assert page in capfd.readouterr().out


def test_time_within_a_part_that_is_another_part_counts_there_alone(benchmarks, monkeypatch):
    upkeep, now = benchmarks("upkeep"), [0.0]
    monkeypatch.setattr(upkeep.time, "perf_counter", lambda: now[0])
    timers = upkeep.Timers()

    def spend(seconds, then=lambda: None):
        now[0] += seconds
        then()

    inner = timers.around("console", lambda: spend(2))
    timers.around("preflight", lambda: spend(5, inner))()
    inner()
    assert timers.calls["preflight"] == [5] and timers.calls["console"] == [2, 2]
    watching = types.SimpleNamespace(can_wait=lambda step: False)
    timers.around("watch", lambda self: spend(1))(watching)
    assert timers.calls[upkeep.LOOKS] == [1] and timers.calls["watch"] == []


def test_the_functions_that_are_timed_exist_and_are_as_before_afterwards(benchmarks):
    upkeep = benchmarks("upkeep")
    before = watch.Watch.wants
    with upkeep.Timers().in_place():
        assert watch.Watch.wants is not before
    assert watch.Watch.wants is before


@pytest.mark.parametrize(
    ("standing", "look", "share"), [(0.0, 0.5, 0.01), (0.004, 2.5, 0.01), (0.001, 0.5, 0.05)]
)
def test_looks_are_counted_as_the_watch_takes_them(benchmarks, monkeypatch, standing, look, share):
    """A watch on a clock of its own, in steps of a second."""
    upkeep, now, looks = benchmarks("upkeep"), [0.0], []

    def spent(seconds):
        now[0] += seconds
        return passed("", 0, 0, check="x")

    monkeypatch.setattr(watch, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(watch, "_modes", lambda model: spent(standing))
    monkeypatch.setattr(watch, "_frame", lambda batches: spent(look))
    monkeypatch.setattr(watch, "_random_floor", lambda view: spent(0))
    for method in ("_rows_once", "_two_modes"):
        monkeypatch.setattr(watch.Watch, method, lambda self, view: [])
    monkeypatch.setattr(watch.Watch, "_gradients", lambda self, view: spent(0))
    layout = types.SimpleNamespace(
        all_reduce=lambda values: values, world_size=1, autocast=contextlib.nullcontext
    )
    it = watch.Watch(
        planned_rates=lambda step: {}, precision="fp32", has_dropout=True, steps_per_epoch=10**6,
        report=lambda *given: None, note=lambda step, values: looks.append(step), share=share,
    )  # fmt: skip
    for step in range(1, 1001):
        it.wants(step)
        now[0] += 1.0
        view = types.SimpleNamespace(step=step, layout=layout, model=None, micro_batches=[])
        it.before_update(view)
        it.after_step(view, {})
    counted = upkeep.num_looks(1.0, standing, look, share=share, steps=1000)
    assert counted == len(looks) > 1
    spent_in_all = counted * look + 1000 * standing
    assert spent_in_all / (1000 + spent_in_all) < share + look / 1000


def test_memory_goes_through_and_policies_change_no_loss(benchmarks, tmp_path, capsys):
    memory, file = benchmarks("memory"), tmp_path / "memory.json"
    assert memory.main(["--quick", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    results = {
        (r["case"]["rows"], r["case"]["policy"], r["case"]["micro_batches"]): r for r in record["results"]
    }
    plain, half, blocks = (results[4, policy, 1] for policy in memory.POLICIES)
    assert plain["loss"] == half["loss"] == blocks["loss"]
    kept = [result["measured"]["activations"] for result in (plain, half, blocks)]
    assert kept[0] > kept[1] > kept[2]
    for result in record["results"]:
        for part in ("weights", "gradients", "optimizer"):  # sums of shapes: exact
            assert result["measured"][part] == result["estimate"][part] > 0
        kept = result["measured"]["activations"]  # random states for the second run of a block, 5 kB each
        assert result["estimate"]["activations"] == pytest.approx(kept, rel=0.01, abs=10_000)
        assert result["estimate"]["peak"] == pytest.approx(result["measured"]["peak"], rel=memory.PROMISED)
    assert results[4, "none", 1]["measured"]["weights"] == 4 * 32_928
    page = memory.section(record)
    assert page.startswith("## Memory\n") and "| blocks |" in page and "within the 15%" in page
    assert page in capsys.readouterr().out


def test_a_policy_that_changes_the_loss_is_told_by_the_exit_code(benchmarks):
    memory = benchmarks("memory")
    results = [{"case": {"rows": 4, "policy": policy}, "loss": 5.0} for policy in memory.POLICIES]
    assert memory.same_losses(results)
    results[1]["loss"] = 5.0000001
    assert not memory.same_losses(results)
