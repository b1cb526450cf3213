"""Tasks as a part of eval.py: what is asked for is refused before anything is computed, or answered and kept."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_checkpoint import Made, make_run

import eval as command
from minilm.errors import ConfigError, DataError
from minilm.evaluation.tasks import built_in
from minilm.evaluation.tasks.arithmetic import TextModel
from minilm.evaluation.tasks.asking import Result, ask
from minilm.evaluation.tasks.prepare import fitting
from minilm.evaluation.tasks.questions import Choice, Cloze, Completion, Task
from minilm.evaluation.tasks.section import TaskSection

QUICK = ("--device", "cpu", "--samples", "0", "--prompt-lengths", "4", "--continuation-tokens", "4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def call(made, capsys):
    def run(*flags):
        code = command.main(["--checkpoint", str(made.run_folder), *QUICK, *map(str, flags)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


PAIR = {"question": "the cat <b>sat</b>", "choices": ["on a mat", "dog"], "answer": 0}


def test_the_tasks_are_in_the_json_the_page_the_log_and_the_terminal(made, call, tmp_path):
    file = written(tmp_path / "ours.jsonl", *[PAIR | {"group": "<i>g"}] * 12, {**PAIR, "answer": 1})
    flags = ("--tasks", f"copying,{file}", "--task-limit", "11", "--batch-rows", "3")
    places = [tmp_path / name for name in ("a.json", "a.html", "log.jsonl")]
    code, out, err = call(*flags, "--json", places[0], "--html", places[1], "--task-log", places[2])
    assert code == 0, out + err
    told = json.loads(places[0].read_text())["tasks"]["results"]
    reader = TextModel(made.model, made.tokenizer)
    expected = {
        "copying": ask(
            fitting(built_in.make("copying"), reader, shots=0, skip_bad=True, cut=False), reader, limit=11
        ),
        "ours": ask(command_task(file), reader, limit=11),
    }
    for name, result in expected.items():
        assert told[name]["num_questions"] == 11 and told[name]["failure"] is None
        for measure, value in result.measures.items():
            assert told[name]["measures"][measure]["value"] == pytest.approx(value.value, rel=1e-6)
        assert told[name]["losses"]["answer"]["loss"] == pytest.approx(result.sums["answer"].mean, rel=1e-6)
    page = places[1].read_text()
    assert "&lt;i&gt;g: accuracy" in page and "<i>g" not in page
    # Built-in questions that are too long for the model are left out: nobody can repair them.
    assert told["copying"]["num_excluded"] > 9 and told["copying"]["chance"] == pytest.approx(
        (6 / 4 + 5 / 8) / 11
    )
    lines = [json.loads(line) for line in places[2].read_text().splitlines()]
    assert [line["task"] for line in lines] == ["copying", "ours"]
    assert [a["where"] for a in lines[1]["answers"]] == [f"{file}:{n}" for n in range(1, 12)]
    assert (
        sum(a["accuracy"] for a in lines[1]["answers"]) / 11 == told["ours"]["measures"]["accuracy"]["value"]
    )
    assert sum(a["nats_answer"] for a in lines[1]["answers"]) == pytest.approx(
        told["ours"]["losses"]["answer"]["nats"]
    )
    assert "copying" in out and "accuracy_norm" in out and "task ours: accuracy" in err


def command_task(path: Path) -> Task:
    from minilm.evaluation.tasks import files

    return files.read(path).task()


def test_what_is_wrong_with_flags_and_lines_is_told_before_a_model_is_loaded(call, tmp_path, monkeypatch):
    monkeypatch.setattr("minilm.assessment.open_model", lambda *a, **k: pytest.fail("a model was loaded"))
    bad = written(tmp_path / "bad.jsonl", {**PAIR, "answer": 5}, {**PAIR, "labels": 1})
    code, out, err = call(
        "--tasks",
        f"{bad},arithmetic",
        "--task-limit",
        "0",
        "--shots",
        "-1",
        "--task-log",
        tmp_path / "no" / "log",
    )
    assert code == 2 and not out
    err = " ".join(err.split())
    for passage in (
        "bad.jsonl:1: answer is 5", "bad.jsonl:2: unknown field 'labels'", "There is no task 'arithmetic'",
        "--task-limit is 0", "--shots is -1", "--task-log: there is no folder",
    ):  # fmt: skip
        assert passage in err, err


def test_bad_lines_may_be_left_out_and_are_counted(call, tmp_path):
    bad = written(tmp_path / "bad.jsonl", PAIR, {**PAIR, "answer": 5}, PAIR)
    code, _, _ = call("--tasks", bad, "--on-bad-line", "skip", "--json", tmp_path / "a.json")
    assert code == 0
    told = json.loads((tmp_path / "a.json").read_text())["tasks"]["results"]["bad"]
    assert (told["num_questions"], told["num_excluded"]) == (2, 1) and "bad.jsonl:2: answer is 5" in told[
        "excluded"
    ][0]


def test_a_task_that_fails_takes_no_other_with_it_and_the_exit_code_says_so(call, tmp_path):
    long = {"text": "the cat sat " * 200, "answer": "on"}
    file = written(tmp_path / "long.jsonl", {"text": "a", "answer": "b"}, long)
    flags = ("--tasks", f"brackets,{file},agreement", "--task-limit", "6", "--json", tmp_path / "a.json")
    code, out, _ = call(*flags)
    assert code == 1
    told = json.loads((tmp_path / "a.json").read_text())["tasks"]["results"]
    assert [told[name]["num_questions"] for name in ("brackets", "long", "agreement")] == [6, 0, 6]
    assert f"{file}:2: prompt and answer need a context of" in told["long"]["failure"]
    assert "long failed: DataError" in out
    code, _, _ = call(*flags, "--on-long-prompt", "cut")
    told = json.loads((tmp_path / "a.json").read_text())["tasks"]["results"]["long"]
    assert (code, told["num_questions"], told["num_cut"]) == (0, 2, 1)
    code, _, _ = call(*flags, "--on-bad-line", "skip")
    told = json.loads((tmp_path / "a.json").read_text())["tasks"]["results"]["long"]
    assert (code, told["num_questions"], told["num_excluded"]) == (0, 1, 1)


def test_ctrl_c_keeps_the_tasks_that_are_done(call, tmp_path, monkeypatch):
    from minilm.evaluation.tasks import section

    def interrupted(task, *rest, **options):
        if task.name == "brackets":
            raise KeyboardInterrupt
        return ask(task, *rest, **options)

    monkeypatch.setattr(section, "ask", interrupted)
    log = tmp_path / "log.jsonl"
    code, out, err = call("--tasks", "agreement,brackets,addition", "--task-limit", "5", "--task-log", log,
                          "--json", tmp_path / "a.json")  # fmt: skip
    assert code == 130
    told = json.loads((tmp_path / "a.json").read_text())
    assert list(told["tasks"]["results"]) == ["agreement"]
    assert json.loads(log.read_text())["task"] == "agreement"
    assert "agreement" in out and "tasks is missing: interrupted" in err


def test_shots_need_room_too_and_rows_of_tokens_take_none(made, call, tmp_path):
    code, _, _ = call(
        "--tasks", "addition,induction", "--task-limit", "5", "--shots", "2", "--json", tmp_path / "a.json"
    )
    told = json.loads((tmp_path / "a.json").read_text())["tasks"]["results"]
    assert code == 0 and [told[name]["shots"] for name in ("addition", "induction")] == [2, 0]
    reader = TextModel(made.model, made.tokenizer, max_length=40)
    task = Task(
        name="t", questions=tuple(Cloze(text="the cat sat on a mat", answer=f"a{n}") for n in range(4))
    )
    assert len(fitting(task, reader, shots=1, skip_bad=False, cut=False).questions) == 4
    with pytest.raises(DataError, match="4 problems"):
        fitting(task, reader, shots=3, skip_bad=False, cut=False)


def test_what_no_model_can_be_asked_is_a_problem_even_if_long_prompts_are_cut(made):
    reader = TextModel(made.model, made.tokenizer, max_length=16)
    task = Task(
        name="t",
        questions=(
            Completion(prompt="the", answer="x", max_new_tokens=16, where="f:1"),
            Completion(prompt="the cat " * 9, answer="x", max_new_tokens=4, where="f:2"),
        ),
    )
    with pytest.raises(DataError, match="f:1: 16 new tokens leave no room") as caught:
        fitting(task, reader, shots=0, skip_bad=False, cut=True)
    assert "f:2" not in str(caught.value)
    fits = Completion(prompt="the", answer="x", max_new_tokens=4)
    left = fitting(
        dataclasses.replace(task, questions=(*task.questions, fits)),
        reader,
        shots=0,
        skip_bad=True,
        cut=False,
    )
    assert left.questions == (fits,) and len(left.excluded) == 2
    with pytest.raises(DataError, match=r"(?s)No question of task t can be asked.*f:1.*f:2"):
        fitting(task, reader, shots=0, skip_bad=True, cut=False)
    choice = Task(
        name="t", questions=(Choice(question="the", choices=("a", "b " * 30), answer=0, where="f:3"),)
    )
    with pytest.raises(DataError, match=r"f:3: .* must have 1 to the model's context, 16"):
        fitting(choice, reader, shots=0, skip_bad=False, cut=True)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        fitting(choice, TextModel(made.model, None), shots=0, skip_bad=False, cut=True)


def test_nothing_is_shown_that_is_not_a_number(made):
    task = Task(name="t", questions=(Cloze(text="a", answer="b"),))
    told = TaskSection([Result(task=task, failure="DataError: <x>")], 1.0)
    assert told.failed and "&lt;x&gt;" in told.html()
    json.dumps(told.as_dict(), allow_nan=False)
    result = ask(task, TextModel(made.model, made.tokenizer))
    json.dumps(TaskSection([result], 1.0).as_dict(), allow_nan=False)
    assert result.measures["accuracy"].error is None


def test_help_does_not_wait_for_torch():
    code = "import sys, eval; sys.exit('torch' in sys.modules)"
    root = str(Path(__file__).parent.parent)
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
