"""The benchmark of scaling: the same step at every point, figures that are what they say, ranks that do the same."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
from benchmark_modules import BENCHMARKS, imported

from minilm import models

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def scaling(monkeypatch):
    """The script, with a machine that makes a billion operations a second."""
    with imported("scaling") as module:
        monkeypatch.setattr(module.measuring, "ceiling", lambda *a, **k: 1e9)
        yield module


def recorded(scaling, tmp_path, *given):
    """(exit code, record) of a quick run."""
    file = tmp_path / "scaling.json"
    code = scaling.main(["--quick", "--json", str(file), *given])
    return code, json.loads(file.read_text(encoding="utf-8"))


def test_the_quick_way_walks_every_axis(scaling, tmp_path, capsys):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    code, record = recorded(scaling, tmp_path)
    assert code == 0
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    points = {axis: [p for p in record["results"] if p["axis"] == axis] for axis in scaling.AXES}
    assert {axis: [p["value"] for p in some] for axis, some in points.items()} == {
        "rows": [1, 2], "length": [16, 32], "size": ["tiny"], "threads": [1], "ranks": [1],
    }  # fmt: skip
    config = models.preset("original", "tiny")
    for point in record["results"]:
        speed = point["tokens_per_second"]
        assert 0 < speed["lowest"] <= speed["median"] <= speed["highest"]
        flops = 3 * config.flops_per_token(point["length"])
        assert point["mfu"] == pytest.approx(speed["median"] * flops / 1e9)
        assert point["mfu_of_data_sheet"] is None and point["layout"].startswith("one process, cpu, fp32")
        # Weights and two moments, and their gradients at least.
        assert point["peak_megabytes"] * 2**20 > 4 * 4 * config.num_parameters()
    assert [p["rows"] * p["length"] for p in points["length"]] == [64, 64]
    few, many = points["rows"]
    assert few["peak_megabytes"] < many["peak_megabytes"]
    page = capsys.readouterr().out
    assert page.startswith(scaling.section(record))
    assert all(f"### {axis.capitalize()}" in page for axis in scaling.AXES)
    assert "are the same, up to rounding" in page and str(tmp_path) not in page


def plan(**changes):
    point = {
        "axis": "ranks",
        "value": 1,
        "wrapper": None,
        "size": "tiny",
        "rows": 4,
        "length": 32,
        "threads": 1,
    }
    shared = {
        "repeats": 2,
        "device": "cpu",
        "dtype": "float32",
        "compile": False,
        "steps": 1,
        "ceiling_seconds": 0.0,
    }
    return {"points": [{**point, "head_size": None, **changes}], **shared}


def test_two_ranks_take_the_same_step_as_one_process(scaling, tmp_path):
    import scaling_worker

    (alone,) = scaling_worker.measure(plan())
    files = tmp_path / "plan.json", tmp_path / "results.json"
    files[0].write_text(json.dumps(plan(value=2, wrapper="DDP")))
    done = forked.run(BENCHMARKS / "scaling_worker.py", [str(file) for file in files], launcher="cpu2.yaml")
    assert done.returncode == 0, done.stderr
    (both,) = json.loads(files[1].read_text())
    assert both["layout"].startswith("DDP on 2 ranks") and both["layout"].endswith("1 x 2 rows")
    assert both["loss_of_first_step"] == pytest.approx(alone["loss_of_first_step"], abs=1e-6)
    assert both["value"] == 2 and both["wrapper"] == "DDP" and len(both["speeds"]) == 2
    # Each rank has half of the rows, and all of the weights and moments.
    states = 4 * 3 * models.preset("original", "tiny").num_parameters() / 2**20
    assert states < both["peak_megabytes"] < alone["peak_megabytes"]
    assert scaling.differing([alone, both], 1e-6) == []


def test_a_speed_is_all_tokens_of_a_turn_by_its_seconds(scaling, monkeypatch):
    import scaling_worker

    def known(runs, repeats):
        for run in runs.values():
            run()
        return {name: [0.5, 0.25, 2.0][:repeats] for name in runs}

    monkeypatch.setattr(scaling.measuring, "interleaved", known)
    (found,) = scaling_worker.measure(plan() | {"steps": 3, "repeats": 3})
    tokens = 3 * 4 * 32
    assert found["speeds"] == [tokens / 0.5, tokens / 0.25, tokens / 2]
    assert found["tokens_per_second"] == {
        "median": tokens / 0.5,
        "lowest": tokens / 2,
        "highest": tokens / 0.25,
    }


def test_heads_are_cut_as_asked_and_long_rows_fit(scaling):
    import scaling_worker

    wide, long = (
        scaling_worker.measure(plan(**c))[0] for c in ({"head_size": 32}, {"length": 160, "rows": 1})
    )
    cut = models.preset("original", "tiny", num_heads=1, num_kv_heads=1)
    assert wide["parameters"] == cut.num_parameters() != long["parameters"]
    assert "absent" not in long  # model tiny knows 128 positions


def test_what_does_not_fit_is_told_and_the_others_go_on(scaling, tmp_path, monkeypatch, capsys):
    import scaling_worker

    right = scaling_worker.optimizer_step

    def limited(layout, batches, **given):
        if batches[0].shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(layout, batches, **given)

    monkeypatch.setattr(scaling_worker, "optimizer_step", limited)
    code, record = recorded(scaling, tmp_path, "--axes", "rows")
    assert code == 0
    fits, too_large = record["results"]
    assert fits["tokens_per_second"]["median"] > 0
    assert too_large["absent"] == "it takes more memory than the device has" and "mfu" not in too_large
    assert "- 2: not measured: it takes more memory than the device has" in capsys.readouterr().out


def test_runs_that_should_begin_alike_and_do_not_are_an_error(scaling, tmp_path, monkeypatch, capsys):
    def point(axis, value, loss, **more):
        return {"axis": axis, "value": value, "wrapper": None, "loss_of_first_step": loss, **more}

    same = [
        point("threads", 1, 5.0),
        point("threads", 2, 5.00001),
        point("rows", 1, 9.0),
        point("rows", 2, 8.0),
    ]
    assert scaling.differing(same, 1e-4) == []
    (found,) = scaling.differing([*same, point("ranks", 1, 5.0), point("ranks", 2, 5.1, wrapper="DDP")], 1e-4)
    assert "ranks 2 (DDP): the first loss is 5.1, that of 1 is 5.0" in found
    assert len(scaling.differing([point("ranks", 1, 5.0), point("ranks", 2, float("nan"))], 1e-4)) == 1
    gone = {"axis": "ranks", "value": 2, "wrapper": "ZeRO-2", "absent": "no"}
    assert scaling.differing([point("ranks", 1, 5.0), gone], 1e-4) == []

    import scaling_worker

    right = scaling_worker.measure
    monkeypatch.setattr(
        scaling_worker, "measure", lambda p: [{**x, "loss_of_first_step": id(x)} for x in right(p)]
    )
    code, _ = recorded(scaling, tmp_path, "--axes", "threads", "--threads", "1", "1")
    assert code == 1
    assert "the first loss is" in capsys.readouterr().err


def test_a_launch_that_fails_is_told_in_its_own_words(scaling, tmp_path, monkeypatch, capsys):
    said = "import sys; print('at /a/b/c.py:3'); sys.exit('ConfigError: no such rank in /x/y/z.yaml: two')"
    monkeypatch.setattr(
        scaling, "launcher", lambda *a: None if a[1] is None else [sys.executable, "-c", said]
    )
    code, record = recorded(scaling, tmp_path, "--axes", "ranks", "--ranks", "2")
    assert code == 0
    alone, *others = record["results"]
    assert alone["value"] == 1 and "absent" not in alone
    assert [one["wrapper"] for one in others] == ["DDP", "ZeRO-2"]
    assert all(one["absent"] == "ConfigError: no such rank in z.yaml: two (ended with 1)" for one in others)
    assert "2 (DDP): not measured: ConfigError: no such rank" in capsys.readouterr().out


def test_without_deepspeed_there_is_no_zero_and_it_is_said(scaling, tmp_path, monkeypatch):
    find = scaling.importlib.util.find_spec
    monkeypatch.setattr(
        scaling.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    _, record = recorded(scaling, tmp_path, "--axes", "ranks", "--ranks", "1")
    assert [one.get("absent") for one in record["results"]] == [None, "deepspeed is not installed"]


def test_the_command_of_a_launch_is_the_one_of_the_documentation(scaling):
    assert scaling.launcher(1, None, "cuda") is None
    command = scaling.launcher(2, "ZeRO-2", "cpu")
    file = Path(command[command.index("--config_file") + 1])
    assert file.is_file() and file.name == "cpu2_zero2.yaml"
    assert command[command.index("--num_processes") + 1] == "2"
    for device, wrapper in scaling.LAUNCHERS:
        assert Path(scaling.launcher(1, wrapper, device)[5]).is_file()


def test_rounds_of_a_point_add_up(scaling):
    def one(*speeds, peak):
        middle = sorted(speeds)[len(speeds) // 2]
        return {"speeds": list(speeds), "tokens_per_second": {"median": middle}, "peak_megabytes": peak,
                "mfu": middle * 10 / 1000, "mfu_of_data_sheet": middle / 2, "ceiling_flops": 1000}  # fmt: skip

    found = scaling.pooled([one(10, 20, 30, peak=5), {"absent": "failed once"}, one(40, 50, 60, peak=7)])
    assert found["tokens_per_second"] == {"median": 35, "lowest": 10, "highest": 60}
    assert found["peak_megabytes"] == 7
    assert found["mfu"] == pytest.approx(0.35) and found["mfu_of_data_sheet"] == pytest.approx(17.5)
    assert scaling.pooled([{"absent": "a"}, {"absent": "b"}]) == {"absent": "a"}


def test_nobody_is_left_when_the_time_is_over(scaling, tmp_path):
    from whole_tree import run_whole

    note = tmp_path / "pid"
    inner = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    # As a launcher does: its ranks have sessions of their own.
    outer = (
        "import subprocess, sys, time; print('begun', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True, "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); time.sleep(60)"
    )
    for seconds in (2, 5, 20):  # a busy machine may not have begun all of them
        code, text = run_whole([sys.executable, "-c", outer], seconds=seconds)
        if note.is_file() and note.read_text():
            break
    assert code is None and text == "begun\n"
    number = int(note.read_text())
    for _ in range(100):
        if not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a process is left")
    assert run_whole([sys.executable, "-c", "raise SystemExit(3)"]) == (3, "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--lengths", "24"], "--lengths 24 does not divide the 64 tokens"),
        (["--ranks", "3"], "--ranks 3 does not divide the 2 rows"),
        (["--rows", "0"], "at least 1"),
        (["--head-size", "24"], "does not divide the width of tiny"),
        (["--axes", "row"], "invalid choice: 'row'"),
    ],
)
def test_what_cannot_be_is_refused(scaling, capsys, given, said):
    with pytest.raises(SystemExit):
        scaling.main(["--quick", *given])
    assert said in capsys.readouterr().err
