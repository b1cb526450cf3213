"""Records: what they say is what the files say, people's words stay, and no figure can be changed unseen."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from experiment_runs import loss_at, train_line, write_evaluation, write_run

from minilm.__main__ import main
from minilm.errors import CheckpointError, ConfigError, DataError
from minilm.experiments import numbers, record
from minilm.experiments.document import header, parse
from minilm.experiments.words import _CHINESE

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two evaluated runs, `base` and `second`, of which the second is a little better on each document; its record."""
    folder = tmp_path_factory.mktemp("made")
    base = write_run(folder / "runs" / "base", optim__learning_rate=0.001)
    second = write_run(folder / "runs" / "second", shift=-0.25)
    documents = [(60.0 + 7 * (n % 5), 20 + n, 90 + n) for n in range(12)]
    write_evaluation(base, documents)
    write_evaluation(second, [(nats - 3 - n / 4, t, b) for n, (nats, t, b) in enumerate(documents)])
    record.write(second, folder / "experiment" / "EXPERIMENT_9.md", baseline=base)
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """The folder of the runs, this test's own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs"


@pytest.fixture
def written(runs: Path) -> Path:
    return runs.parent / "experiment" / "EXPERIMENT_9.md"


def row(text: str, part: str, name: str) -> list[str]:
    """The cells of the row `name` of a part."""
    body = text.split(f"<!-- minilm:begin {part} ")[1].split(f"<!-- minilm:end {part}")[0]
    line = next(line for line in body.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def problems_of(path: Path) -> list[record.Problem]:
    return record.verify([path])[1]


def test_the_figures_are_those_of_the_files(written):
    text = written.read_text()
    assert row(text, "metrics", "training loss")[:4] == [
        f"{loss_at(20, -0.25):.4f}", "20", f"{loss_at(13, -0.25):.4f}", "13",
    ]  # fmt: skip
    assert row(text, "metrics", "training loss")[4] == "2026-09-21 14:13:33 UTC"  # 1,790,000,000 and 13 s
    assert row(text, "metrics", "validation loss")[:2] == [f"{loss_at(20, -0.25) + 0.5:.4f}", "20"]
    assert row(text, "memory", "process") == ["450.0", "4", "420.0"]
    assert row(text, "step_time", "forward") == ["200.00", "40.0", "4.0"]
    assert row(text, "step_time", "other") == ["40.00", "8.0", "0.8"]
    tokens = sum(180 + step for step in range(1, 21))
    assert f"Tokens per second in steps: {tokens / 10:,.0f}." in text
    assert f"Tokens trained on: {tokens:,}." in text
    assert row(text, "settings", "optim.learning_rate") == ["0.005", "0.001"]
    assert "| train.steps | 20 | --train.steps |" in text  # given; those at their default are not listed
    assert "| model.dim |" not in text
    assert row(text, "doctor", "FAIL") == ["1"]
    assert "NOT RUN: needs 2 routers" in text and "PASS: 0.0" not in text
    assert row(text, "timeline", "2026-09-21 14:13:20 UTC") == ["0", "started"]
    difference = row(text, "comparison", "second - base")
    assert difference[0] == "loss" and difference[3] == "12"
    assert row(text, "agreement", "validation loss as logged")[-1] == "AGREES"
    assert "Document 3, loss 1.1250" in text


def test_a_record_is_verified_as_it_was_written(written):
    assert problems_of(written) == []


@pytest.mark.parametrize("part", list(record.PARTS))
def test_a_changed_figure_is_named_with_file_line_stated_and_true_value(part, written):
    """Of every line of every part with a digit: one digit becomes another."""
    lines = written.read_text().split("\n")
    first = next(n for n, line in enumerate(lines) if line.startswith(f"<!-- minilm:begin {part} ")) + 1
    last = next(n for n, line in enumerate(lines) if line.startswith(f"<!-- minilm:end {part} "))
    tried = 0
    for number in range(first, last):
        places = [m.start() for m in re.finditer(r"\d", lines[number])]
        if not places:
            continue
        at = places[-1]
        new = str((int(lines[number][at]) + 1) % 10)
        changed = [*lines]
        changed[number] = lines[number][:at] + new + lines[number][at + 1 :]
        found = list(record.verify_text(written, "\n".join(changed)))
        assert len(found) == 1, (lines[number], found)
        assert (found[0].file, found[0].line) == (str(written), number + 1)
        assert found[0].what.startswith(part)
        assert found[0].stated in " ".join(changed[number].split()) and new in found[0].stated
        assert found[0].true != found[0].stated and found[0].true in lines[number]
        tried += 1
    assert tried >= 1


def test_a_figure_is_named_by_its_row_and_column(written):
    text = written.read_text().replace(f"| {loss_at(13, -0.25):.4f} | 13 |", "| 1.0000 | 13 |")
    (found,) = record.verify_text(written, text)
    assert str(found) == (
        f"{written}:{found.line}: metrics, training loss, best: stated 1.0000, but the run's files say 1.2000"
    )


def test_lines_that_were_added_or_removed_are_named(written):
    lines = written.read_text().split("\n")
    place = next(n for n, line in enumerate(lines) if line.startswith("| validation bits per byte"))
    for changed in (
        lines[:place] + lines[place + 1 :],
        [*lines[:place], "| accuracy | 99 |", *lines[place:]],
    ):
        (found,) = record.verify_text(written, "\n".join(changed))
        assert "(nothing)" in str(found) and found.what == "metrics"


def test_words_of_people_are_never_touched(written, runs):
    parts = re.compile(
        r"(<!-- minilm:begin (\w+) .*?<!-- minilm:end \2 -->|\A<!-- minilm:record.*?-->)", re.DOTALL
    )

    def people(text: str) -> list[str]:
        return [piece for n, piece in enumerate(parts.split(text)) if n % 3 == 0]

    text = written.read_text().replace(
        "What do you think is true, and why?", "Wir glauben: 42 \u2028 *ja*\t \n\n\n"
    )
    text = (
        text.replace("## Memory", "Between the parts.\n## Memory").rstrip("\n")
        + "\n\nNo line feed at the end"
    )
    written.write_text(text)
    with (runs / "second" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_line(21, -3.0)) + "\n")
    record.write(runs / "second", written)
    after = written.read_text()
    assert people(after) == people(text)
    assert row(after, "metrics", "training loss")[1] == "21" and problems_of(written) == []
    assert "baseline" in json.loads(re.match(r"<!-- minilm:record (.*) -->", after)[1])  # was not given again


def test_a_part_changed_by_hand_is_named_and_kept(written, runs, capsys):
    changed = written.read_text().replace("| train.steps | 20 |", "| train.steps | 20 (short!) |")
    written.write_text(changed)
    line = (
        changed.split("\n").index(
            "<!-- minilm:begin settings sha256=" + changed.split("begin settings sha256=")[1][:64] + " -->"
        )
        + 2
    )
    with pytest.raises(ConfigError, match=rf"{written}:{line}: the part settings was changed by hand"):
        record.write(runs / "second", written)
    assert written.read_text() == changed
    assert main(["record", str(runs / "second"), "--out", str(written), "--force"]) == 0
    assert "settings was changed by hand. Overwritten" in capsys.readouterr().out
    assert (written.with_name("EXPERIMENT_9.md.bak")).read_text() == changed
    assert "(short!)" not in written.read_text() and problems_of(written) == []


def test_what_cannot_be_computed_again_is_said(written, runs, tmp_path):
    text = written.read_text()
    shutil.move(runs / "base", tmp_path / "elsewhere")
    (found,) = problems_of(written)
    assert "There is no run folder" in found.what and "base" in found.what
    shutil.move(tmp_path / "elsewhere", runs / "base")
    cut = re.sub(r"<!-- minilm:begin agreement.*?end agreement -->\n", "", text, flags=re.DOTALL)
    assert next(p.what for p in record.verify_text(written, cut)).startswith("the part agreement is missing")
    assert "no mark" in next(record.verify_text(written, text.partition("\n")[2])).what
    assert (
        "another format" in next(record.verify_text(written, text.replace('"format": 1', '"format": 2'))).what
    )
    with_more = text + "\n<!-- minilm:begin glory sha256=" + "0" * 64 + " -->\n<!-- minilm:end glory -->\n"
    assert "no part glory" in next(record.verify_text(written, with_more)).what
    with pytest.raises(ConfigError, match="no record"):
        record.verify([runs])
    with pytest.raises(CheckpointError, match="no run folder"):
        record.write(tmp_path / "nothing", written)


def test_a_plan_is_no_record_yet_and_becomes_one(runs):
    plan = runs.parent / "plan" / "EXPERIMENT_10.md"
    plan.parent.mkdir()
    text = record.template("en").replace("What do you think is true, and why?", "That it works.")
    plan.write_text(text)
    assert problems_of(plan) == []
    filled_by_hand = text.replace("<!-- minilm:begin metrics -->", "<!-- minilm:begin metrics -->\nloss 0.1")
    assert "no mark" in next(record.verify_text(plan, filled_by_hand)).what
    record.write(runs / "second", plan)
    assert "That it works." in plan.read_text() and row(plan.read_text(), "memory", "process")[0] == "450.0"
    assert problems_of(plan) == []


def test_files_of_another_make_are_named_and_end_nothing(written, runs):
    found = json.loads((runs / "second" / "eval.json").read_text())
    del found["agreement"]["rows"]
    (runs / "second" / "eval.json").write_text(json.dumps(found))
    problems = problems_of(written)
    assert any("agreement: the files of" in problem.what for problem in problems)
    assert any(problem.what.startswith("sources") for problem in problems)
    with pytest.raises(CheckpointError, match="not as this version writes them"):
        record.write(runs / "second", written)
    strange = written.read_text().replace('"others": []', '"others": 3')
    assert "int" in next(record.verify_text(written, strange)).what


def test_a_run_that_went_on_makes_its_record_stale(written, runs):
    with (runs / "second" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_line(21, 0.0)) + "\n")
    named = {problem.what.split(",")[0] for problem in problems_of(written)}
    assert {"sources", "metrics", "memory", "curve", "comparison"} <= named


def test_a_picture_of_other_data_or_another_picture_is_found(written, runs):
    picture = written.with_suffix(".png")
    whole = picture.read_bytes()
    record.write(runs / "base", written.with_name("OTHER.md"))
    picture.write_bytes(written.with_name("OTHER.png").read_bytes())
    found = problems_of(written)
    assert [p.what for p in found] == ["curve: EXPERIMENT_9.png", "curve, file, sha256"]
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    picture.write_bytes(bytes(damaged))
    assert "damaged" in problems_of(written)[0].what
    picture.unlink()
    assert "cannot be read" in problems_of(written)[0].what
    picture.write_bytes(whole)
    assert problems_of(written) == []


def test_text_of_a_model_or_a_log_cannot_break_out(written):
    text = written.read_text()
    assert (
        "\n    <!-- minilm:end samples -->\n    # heading" not in text
    )  # evaluated samples stand in their place
    assert "spike &lt;b>at&lt;/b> step 7 \\| kept" in text
    assert set(parse(text, "x").parts) == set(record.PARTS)


def test_without_an_evaluation_nothing_is_made_up(runs):
    (runs / "second" / "eval.json").unlink()
    out = runs.parent / "R.md"
    record.write(runs / "second", out, baseline=runs / "base")
    text = out.read_text()
    for part in ("evaluation", "agreement"):
        assert re.search(rf"begin {part} sha256=\w+ -->\nnot run\n<!-- minilm:end {part}", text)
    assert row(text, "comparison", "second - base") == ["-", "not run", "-", "-", "-"]
    assert "\n    one two\n    <!-- minilm:end samples -->\n    # heading" in text
    assert problems_of(out) == []


def test_a_run_without_an_end_is_recorded_as_it_was_seen(runs):
    folder = write_run(runs / "killed", state="running", steps=7)
    out = runs.parent / "K.md"
    record.write(folder, out)  # a process of another host cannot be seen: it counts as running
    text = out.read_text()
    assert '"seen": "running"' in text and "the run was: running" in text
    assert "**Partial**: 35.0 % of the planned tokens." in text
    assert problems_of(out) == []


def test_the_same_figures_stand_in_the_chinese_record(written, runs):
    other = written.with_name("EXPERIMENT_9.zh.md")
    record.write(runs / "second", other, baseline=runs / "base", language="zh")
    assert problems_of(other) == [] and problems_of(written) == []  # they share the picture

    def figures(path: Path) -> list[str]:
        body = path.read_text().split("<!-- minilm:end sources", 1)[1]
        return re.findall(r"[-+]?\d[\d.,:]*\d", re.sub(r"sha256=\w+", "", body))

    assert figures(other) == figures(written)
    assert "| 训练损失 |" in other.read_text() and "## 假设" in other.read_text()
    wrong = other.read_text().replace("| 450.0 | 4 |", "| 350.0 | 4 |")
    assert "memory, 进程, 最高: stated 350.0" in str(next(record.verify_text(other, wrong)))


def test_every_word_of_the_program_is_translated():
    said = set()
    for path in (ROOT / "minilm" / "experiments").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "say" and node.args:
                options = (
                    [node.args[0].body, node.args[0].orelse]
                    if isinstance(node.args[0], ast.IfExp)
                    else node.args[:1]
                )
                said |= {one.value for one in options if isinstance(one, ast.Constant)}
    said |= (
        {name for _, _, name in numbers.CURVES} | {name for _, name in numbers.MEMORY} | set(numbers.PARTS)
    )
    said |= {heading for heading, _ in record.PARTS.values()}
    assert len(said) > 80
    assert said - _CHINESE.keys() == set()


def test_marks_that_do_not_fit_are_named_with_their_line(tmp_path):
    text = "\n".join(
        [
            "<!-- minilm:record {broken} -->",
            "<!-- minilm:begin a -->",
            "<!-- minilm:end b -->",
            "",
            "<!-- minilm:bgin c -->",
        ]
    )
    with pytest.raises(DataError) as caught:
        parse(text, "R.md")
    for line in ("R.md:1:", "R.md:3:", "R.md:5:", "R.md:2: the part a has no end"):
        assert line in str(caught.value)
    about = {"run": "a-->b--c", "format": 1}
    assert parse(header(about), "x").about == about and header(about).count("-->") == 1


def test_kept_runs_hold_no_weights_and_no_other_run(runs, tmp_path):
    (runs / "second" / "checkpoints").mkdir()
    (runs / "second" / "checkpoints" / "weights").write_bytes(b"0" * 100)
    kept = record.keep(runs / "second", tmp_path / "kept")
    assert sorted(p.name for p in kept.iterdir()) == [
        "config.yaml",
        "eval.json",
        "manifest.json",
        "metrics.jsonl",
        "samples.md",
    ]
    other = write_run(tmp_path / "more" / "runs" / "second")
    text = (other / "manifest.json").read_text().replace("16:13:20", "16:13:21")
    (other / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match="holds another run"):
        record.keep(other, tmp_path / "kept")


def test_the_command_says_by_its_exit_code_whether_all_holds(written, runs, capsys):
    assert main(["record", "--verify", str(written.parent)]) == 0
    assert "1 records: every figure is that of the run's files" in capsys.readouterr().out
    written.write_text(written.read_text().replace("450.0", "45.0"))
    assert main(["record", "--verify", str(written.parent)]) == 1
    assert "memory, process, highest: stated 45.0, but the run's files say 450.0" in capsys.readouterr().out
    assert main(["record"]) == 2
    assert main(["record", str(runs / "base"), "--verify", str(written)]) == 2


def test_the_templates_are_what_the_program_takes():
    for language, name in (("en", "TEMPLATE.md"), ("zh", "TEMPLATE.zh.md")):
        assert (ROOT / "experiment" / name).read_text(encoding="utf-8") == record.template(language)


def test_the_records_of_the_repository_hold():
    """Every figure of experiment/ is that of the runs kept beside it."""
    looked_at, problems = record.verify([ROOT / "experiment"])
    assert [str(problem) for problem in problems] == []
    names = {path.name for path in looked_at}
    assert {
        "EXPERIMENT_1_4_0.md",
        "EXPERIMENT_1_4_1.md",
        "EXPERIMENT_1_4_0.zh.md",
        "EXPERIMENT_1_4_1.zh.md",
    } <= names
