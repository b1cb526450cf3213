"""The page of the benchmarks is that of their results, and what they share measures what it says."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from benchmark_modules import imported

MACHINE = {
    "processor": "A processor", "cores": 2, "threads": 1, "load_average": [0.25, 0, 0], "accelerator": None,
    "python": "3", "torch": "2", "transformers": "5", "minilm": "0", "date": "2026-01-02",
}  # fmt: skip


@pytest.fixture
def page():
    """benchmarks/page.py with the modules beside it, as when it is run; forgotten afterwards."""
    with imported("page") as module:
        yield module


@pytest.fixture
def measuring(page):
    return sys.modules["measuring"]


def spread(median):
    return {"median": median, "lowest": 0.9 * median, "highest": 1.2 * median}


def training_step(speed=4321.0):
    """A record as training_step.py writes it, small."""

    def told(label, speed, **more):
        return {
            "label": label, "about": f"about {label}", "parameters": 5_000_000, "flops_per_token": 3e7,
            "tokens_per_second": spread(speed), "mfu": 0.5, "peak_bytes": 2**30, "peak_ratio": 0.5,
            "ratio_to_plain": spread(2.5), "ratio_to_best_peer": spread(2.25), "loss_gap": None,
            "losses": [8.8, 8.7], "in_order": True, **more,
        }  # fmt: skip

    floors = {
        part: {"flops": 1e9, "bytes": 1e8, "arithmetic_seconds": 0.1, "memory_seconds": 0.2} for part in "ab"
    }
    case = {
        "head_size": 16,
        "shape": {"batch": 8, "length": 512},
        "ceiling_flops_per_second": 2e11,
        "bandwidth_bytes_per_second": 1e10,
        "floors": floors,
        "best_peer": "transformers",
        "contenders": {
            "minilm": told("minilm, eager", speed, loss_gap=1e-6),
            "transformers": told("transformers, plain loop, eager", 1000.0, loss_gap=0.0),
            "litgpt": {"label": "litgpt, eager", "failed": "No module named 'litgpt' (exit code 1)"},
        },
    }
    settings = {"size": "26m", "batch": 8, "length": 512, "device": "cpu", "dtype": "fp32", "repeats": 5}
    return {
        "benchmark": "training_step",
        "command": "python benchmarks/training_step.py --only minilm transformers",
        "machine": MACHINE,
        "settings": {**settings, "steps_per_turn": 1},
        "results": {"cases": [case], "gap_limit": 1e-4, "compared_steps": 8},
    }


def evaluation():
    kind = {
        "minilm": {"tokens_per_second": 3000.0, "loss": 8.5},
        "transformers": {"tokens_per_second": 1500.0, "loss": 8.5},
        "ratio": 2.0, "same_loss": True, "seconds_are": "of the clock",
    }  # fmt: skip
    settings = {"size": "26m", "context": 512, "batch_rows": 8, "threads": 1, "device": "cpu", "repeats": 3}
    return {"settings": settings, "machine": MACHINE, "equal": kind, "mixed": kind}


@pytest.fixture
def folders(tmp_path):
    """Folders of results and docs; what was measured: two benchmarks."""
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    for name, record in {
        "training_step": training_step(),
        "evaluation_throughput": evaluation(),
    }.items():
        (results / f"{name}.json").write_text(json.dumps(record))
    return results, docs


def made(page, folders, *more):
    return page.main(["--results", str(folders[0]), "--docs", str(folders[1]), *more])


def test_the_page_of_the_repository_is_that_of_its_results(page, capsys):
    assert page.main(["--verify"]) == 0, capsys.readouterr().err


def test_the_page_tells_what_was_measured_and_what_was_not(page, folders):
    assert made(page, folders) == 0
    text = (folders[1] / "performance.md").read_text(encoding="utf-8")
    assert "4,321 (3,889 to 5,185)" in text and "2.50 times the plain loop" in text
    assert "litgpt, eager: `No module named 'litgpt' (exit code 1)`" in text
    assert "2.00 times (documents as long" in text
    assert "Measured 2026-01-02, A processor, 2 cores, torch 2" in text
    assert "no figure of a GPU" in text
    assert "![Training step: tokens per second](performance_training_step.png)" in text
    assert text.count("\n## Training step") == 1 and text.count("\n## Evaluation") == 1
    assert (
        "- [Training step, 26m, heads of 16, nobody compiled](#training-step-26m-heads-of-16-nobody-compiled): "
        in text
    )
    assert "## Scaling\n" in text and "Not measured yet" in text
    assert "```\npython benchmarks/scaling.py\n```" in text
    assert text.index("## Training step") < text.index("## Scaling") < text.index("## Evaluation")


def test_a_figure_of_a_gpu_is_named(page, folders):
    record = training_step()
    record["machine"] = {**MACHINE, "accelerator": "A fast one"}
    (folders[0] / "training_step_gpu.json").write_text(json.dumps(record))
    assert made(page, folders) == 0
    text = (folders[1] / "performance.md").read_text(encoding="utf-8")
    assert "no figure of a GPU" not in text and "those that name one (A fast one)" in text
    assert (folders[1] / "performance_training_step_gpu.png").is_file()


def test_verify_sees_other_results_another_page_and_other_pictures(page, folders, capsys):
    results, docs = folders
    assert made(page, folders) == 0
    assert made(page, folders, "--verify") == 0
    picture = docs / "performance_training_step.png"
    old = picture.read_bytes()

    (results / "training_step.json").write_text(json.dumps(training_step(speed=4322.0)))
    assert made(page, folders, "--verify") == 1
    said = capsys.readouterr().err
    assert "performance.md is not the page" in said and "step.png is not the picture" in said
    assert made(page, folders) == 0
    picture.write_bytes(old)  # drawn of what was measured before
    assert made(page, folders, "--verify") == 1
    assert "performance.md" not in capsys.readouterr().err
    picture.unlink()
    assert made(page, folders, "--verify") == 1

    assert made(page, folders) == 0
    text = docs / "performance.md"
    text.write_text(text.read_text(encoding="utf-8").replace("4,322", "9,999"), encoding="utf-8")
    assert made(page, folders, "--verify") == 1
    assert made(page, folders) == 0
    (docs / "performance_gone.png").write_bytes(old)
    capsys.readouterr()
    assert made(page, folders, "--verify") == 1
    assert "performance_gone.png belongs to no results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("training_step.json", "{", "is no JSON"),
        ("mine.json", '{"benchmark": "mine"}', "no benchmarks/mine.py that has `section`"),
        ("measuring.json", "{}", "no benchmarks/measuring.py that has `section`"),
        ("list.json", "[]", "measure again, or remove it"),
        ("training_step.json", '{"machine": {}, "settings": {}, "results": {}}', "measure again"),
    ],
)
def test_results_that_cannot_be_told_are_named(page, folders, capsys, name, text, said):
    (folders[0] / name).write_text(text)
    assert made(page, folders) == 2
    error = capsys.readouterr().err
    assert name in error and said in error
    assert not (folders[1] / "performance.md").exists()


def test_a_folder_that_is_not_there_is_told(page, tmp_path, capsys):
    with pytest.raises(SystemExit):
        page.main(["--results", str(tmp_path / "nowhere")])
    assert "nowhere is no folder" in capsys.readouterr().err


def test_other_losses_are_no_success(page):
    record = evaluation()
    record["mixed"] = {**copy.deepcopy(record["mixed"]), "same_loss": False}
    assert "THE LOSSES DIFFER" in page.section_of("evaluation_throughput")(record)


def test_scaling_is_drawn_with_a_line_per_wrapper(page, tmp_path):
    points = [
        {"axis": "rows", "value": n, "wrapper": None, "tokens_per_second": spread(100.0 * n)} for n in (1, 2)
    ]
    points += [
        {"axis": "ranks", "value": n, "wrapper": w, "tokens_per_second": spread(50.0)}
        for n, w in ((1, None), (2, "DDP"))
    ]
    points.append({"axis": "ranks", "value": 2, "wrapper": "ZeRO-2", "absent": "no deepspeed"})
    figures = sys.modules["page_figures"]
    record = {"benchmark": "scaling", "results": points}
    figures.draw(record, tmp_path / "a.png", "abc")
    assert figures.drawn_from(tmp_path / "a.png") == "abc"

    from matplotlib.figure import Figure

    drawn = Figure()
    figures.DRAWN["scaling"](drawn, record)
    rows, ranks = (axes for axes in drawn.axes if axes.get_visible())
    assert rows.containers[0].lines[0].get_ydata().tolist() == [100.0, 200.0]
    assert [text.get_text() for text in ranks.get_legend().get_texts()] == ["no wrapper", "DDP"]


# ---------------------------------------------------------------- what the benchmarks share


def test_runs_take_turns_after_one_call_that_is_not_counted(measuring, monkeypatch):
    """Each call is slower than the one before: only ratios of neighbours see that one takes three times as long."""
    now, calls, costs = [0.0], [], {"a": 1.0, "b": 3.0}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def run(name):
        now[0] += costs[name] * 2.0 ** (len(calls) // 2)
        calls.append(name)

    seconds = measuring.interleaved({"a": lambda: run("a"), "b": lambda: run("b")}, 3)
    assert "".join(calls) == "abababab"
    assert seconds == {"a": [2.0, 4.0, 8.0], "b": [6.0, 12.0, 24.0]}
    assert measuring.paired(seconds["b"], seconds["a"]) == {"median": 3.0, "lowest": 3.0, "highest": 3.0}
    with pytest.raises(ValueError):
        measuring.paired([1.0], [1.0, 2.0])


def test_a_spread_is_median_lowest_and_highest(measuring):
    found = measuring.spread([5.0, 1.0, 2.0])
    assert found == {"median": 2.0, "lowest": 1.0, "highest": 5.0}
    assert measuring.told(found, ".1f") == "2.0 (1.0 to 5.0)"
    assert measuring.told(found, ",.0f", scale=1000) == "2,000 (1,000 to 5,000)"
    assert measuring.told(None) == ""
    with pytest.raises(ValueError, match="nothing"):
        measuring.spread([])


def test_results_are_written_with_command_and_machine_and_without_folders(measuring, tmp_path):
    settings = {"json": tmp_path / "x.json", "peers": "peers", "sizes": [16, 64], "quick": True, "none": None}
    argv = ["--json", str(tmp_path / "x.json"), "--head-size", "16"]
    path = measuring.write("some", settings, [1.5], tmp_path / "deep" / "x.json", argv=argv)
    record = json.loads(path.read_text())
    assert list(record) == ["benchmark", "command", "machine", "settings", "results"]
    assert record["command"] == "python benchmarks/some.py --json x.json --head-size 16"
    assert record["settings"] == {
        "json": "x.json",
        "peers": "peers",
        "sizes": [16, 64],
        "quick": True,
        "none": None,
    }
    assert record["results"] == [1.5]
    machine = record["machine"]
    assert machine["torch"] == torch.__version__ and machine["threads"] == torch.get_num_threads()
    assert str(tmp_path) not in path.read_text()


def test_the_ceiling_counts_two_operations_for_each_product_of_numbers(measuring, monkeypatch):
    monkeypatch.setattr(measuring, "_SQUARES", {"cpu": (10,)})
    monkeypatch.setattr(measuring, "_SHAPES", ((10, 20, 30),))
    shapes = []

    def fastest(product, seconds):
        shapes.append(tuple(product().shape))
        return {(10, 10): 1.0, (10, 30): 2.0}[shapes[-1]]

    monkeypatch.setattr(measuring, "_fastest", fastest)
    assert measuring.ceiling(torch.float32, "cpu") == 2 * 10 * 20 * 30 / 2.0
    assert set(shapes) == {(10, 10), (10, 30)}


def test_the_fastest_of_at_least_three_calls_counts(measuring, monkeypatch):
    now, durations, calls = [0.0], [9.0, 5.0, 2.0, 4.0, 1.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def run():
        now[0] += durations[len(calls)]
        calls.append(1)

    assert measuring._fastest(run, 6.0) == 2.0  # the first is not counted, the next three are enough
    assert len(calls) == 4


def test_a_second_section_of_a_kind_explains_nothing_twice(page, folders):
    other = training_step(speed=5678.0)
    other["settings"]["size"] = "100m"
    (folders[0] / "training_step_100m.json").write_text(json.dumps(other))
    assert made(page, folders) == 0
    text = (folders[1] / "performance.md").read_text(encoding="utf-8")
    assert "4,321 (" in text and "5,678 (" in text
    assert text.count("Ratios are of neighbours in the same turn") == 1
    assert text.count("*To be read as above.*") == 2  # and the floors, which are the same here


def test_no_two_sections_have_one_name(page, folders):
    (folders[0] / "training_step_again.json").write_text(json.dumps(training_step(speed=5678.0)))
    assert made(page, folders) == 0
    headings = [
        line
        for line in (folders[1] / "performance.md").read_text(encoding="utf-8").splitlines()
        if line[:3] == "## "
    ]
    assert len(set(headings)) == len(headings)
    assert "## Training step, 26m, heads of 16, nobody compiled (training_step_again)" in headings


def test_results_name_the_commit_and_whether_code_was_changed_since(measuring, monkeypatch, tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        ran = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return ran.stdout.strip()

    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(measuring, "__file__", str(tmp_path / "benchmarks" / "measuring.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert measuring.commit() is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "results.json").write_text("1\n")
    git("add", ".")
    git("commit", "-q", "-m", "m")
    name = git("rev-parse", "HEAD")[:10]
    assert measuring.commit() == name
    (tmp_path / "results.json").write_text("2\n")  # what a benchmark itself writes
    assert measuring.commit() == name
    (tmp_path / "code.py").write_text("2\n")
    assert measuring.commit() == name + "+"
