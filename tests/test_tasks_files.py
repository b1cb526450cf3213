"""Task files as people write them: every problem of every line, told at once, and good lines kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilm.errors import DataError
from minilm.evaluation.tasks import files
from minilm.evaluation.tasks.prepare import expanded, problems_of
from minilm.evaluation.tasks.questions import Choice, Cloze, Completion, chance_of, prompt_of


def written(path: Path, *lines: object) -> Path:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def test_the_fields_decide_the_kind_and_what_is_left_out_has_its_default(tmp_path):
    choice = {"question": "1 + 1 =", "choices": ["2", "3"], "answer": 1}
    whole = {"choices": ["ab", "ba"], "answer": 0, "group": "g"}
    read = files.read(written(tmp_path / "a.jsonl", choice, whole))
    assert not read.problems
    assert read.questions == [
        Choice(question="1 + 1 =", choices=("2", "3"), answer=1, delimiter=" "),
        Choice(question="", choices=("ab", "ba"), answer=0, delimiter="", group="g"),
    ]
    assert [q.where for q in read.questions] == [f"{tmp_path / 'a.jsonl'}:{n}" for n in (1, 2)]
    read = files.read(written(tmp_path / "b.jsonl", {"text": "t", "answer": "a", "delimiter": "", "id": 7}))
    assert read.questions == [Cloze(text="t", answer="a", delimiter="")]
    read = files.read(written(tmp_path / "c.jsonl", {"prompt": "p", "answer": "a"}))
    assert read.questions == [Completion(prompt="p", answer="a", stop=("\n\n",), max_new_tokens=32)]
    read = files.read(
        written(tmp_path / "d.jsonl", {"prompt": "p", "answer": "a", "stop": ["."], "max_new_tokens": 3})
    )
    assert read.questions == [Completion(prompt="p", answer="a", stop=(".",), max_new_tokens=3)]


BAD = {
    b'{"text": "a", "answer": ': "not JSON",
    b'{"text": "\xff", "answer": "b"}': "not UTF-8 at byte 10",
    b"[1, 2]": "not a JSON object, but of type list",
    b'{"answer": "b"}': "exactly one of the fields 'choices' (multiple choice), 'text' (cloze) and 'prompt'",
    b'{"text": "a", "prompt": "a", "answer": "b"}': "exactly one of the fields",
    b'{"text": "a", "answer": "b", "anwser": 1}': "unknown field 'anwser'; a cloze has answer, delimiter, group",
    b'{"text": " ", "answer": "b"}': "text is empty",
    b'{"text": "a"}': "there is no field 'answer'",
    b'{"text": "a", "answer": 4}': "answer is of type int; it must be a text",
    b'{"text": "a", "answer": ""}': "answer is empty",
    b'{"text": "a \\ud800", "answer": "b"}': "lone surrogate",
    b'{"text": "a", "answer": "b", "delimiter": 1}': "delimiter is 1; it must be a text",
    b'{"question": "", "choices": ["a", "b"], "answer": 0}': "leave it out to compare the choices as whole",
    b'{"question": "a", "context": "a", "choices": ["a", "b"], "answer": 0}': "two names of the same field",
    b'{"question": "a", "choices": ["a"], "answer": 0}': "there are 1 choices",
    b'{"question": "a", "choices": ["a", "a"], "answer": 0}': "two choices are the same text",
    b'{"question": "a", "choices": ["a", ""], "answer": 0}': "choices must be a list of texts that are not",
    b'{"question": "a", "choices": "ab", "answer": 0}': "choices must be a list",
    b'{"question": "a", "choices": ["a", "b"], "answer": 2}': "answer is 2; it must be the number of the right "
    "choice, 0 to 1",
    b'{"question": "a", "choices": ["a", "b"], "answer": true}': "answer is True",
    b'{"question": "a", "choices": ["a", "b"], "answer": "a"}': "answer is 'a'; it must be the number",
    b'{"prompt": "a", "answer": "b", "stop": [""]}': "stop must be a list",
    b'{"prompt": "a", "answer": "b. c", "stop": ["."]}': "the answer contains a stop text",
    b'{"prompt": "a", "answer": " b"}': "answer begins or ends with white space",
    b'{"prompt": "a", "answer": "b", "max_new_tokens": 0}': "max_new_tokens is 0",
    b'{"prompt": "", "answer": "b"}': "prompt is empty",
}


@pytest.mark.parametrize("line", BAD, ids=[line.decode("latin-1")[:60] for line in BAD])
def test_a_bad_line_is_told_with_its_number_and_the_good_ones_are_kept(line, tmp_path):
    good: dict[str, object] = {"text": "a", "answer": "b"}
    if b"choices" in line:
        good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    elif b'"prompt"' in line and b'"text"' not in line:
        good = {"prompt": "p", "answer": "b"}
    path = written(tmp_path / "t.jsonl", good, b"", line, good)
    read = files.read(path)
    assert len(read.questions) == 2 and [q.where for q in read.questions] == [f"{path}:1", f"{path}:4"]
    assert read.problems and all(p.startswith(f"{path}:3: ") for p in read.problems)
    assert any(BAD[line] in problem for problem in read.problems), read.problems
    assert read.task().excluded == tuple(read.problems)


def test_a_line_of_a_gigabyte_is_not_read_into_memory_and_the_next_is_still_line_two(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE_BYTES", 100)
    exact = json.dumps({"text": "x" * 72, "answer": "b"}).encode()
    assert len(exact) + 1 == 100
    long = {"text": "x" * 500, "answer": "b"}
    path = written(tmp_path / "t.jsonl", long, exact, {"text": "a", "answer": "b"}, long)
    read = files.read(path)
    assert [q.where for q in read.questions] == [f"{path}:2", f"{path}:3"]
    size = len(json.dumps(long)) + 1
    assert read.problems == [f"{path}:{n}: the line has {size} bytes, the limit is 100." for n in (1, 4)]


def test_all_problems_of_all_files_are_told_at_once_up_to_a_number(tmp_path, monkeypatch):
    one = written(tmp_path / "one.jsonl", b"{", {"text": "a", "answer": "b"}, b"[]")
    mixed = written(tmp_path / "two.jsonl", {"text": "a", "answer": "b"}, {"prompt": "a", "answer": "b"})
    names = [str(one), str(mixed), str(tmp_path / "none.jsonl"), "agrement"]
    told = "\n".join(problems_of(names, skip_bad=False))
    for passage in (
        f"{one}:1: not JSON", f"{one}:3: not a JSON object", f"{mixed}:2: is a completion, but the lines before are",
        "none.jsonl cannot be read: No such file", "There is no task 'agrement'", "agreement, brackets",
    ):  # fmt: skip
        assert passage in told
    told = "\n".join(problems_of(names, skip_bad=True))
    assert "one.jsonl:1" not in told and "none.jsonl" in told
    assert problems_of([str(one), "copying"], skip_bad=True) == []
    monkeypatch.setattr(files, "MOST_PROBLEMS_SHOWN", 1)
    told = "\n".join(problems_of(names, skip_bad=False))
    assert "one.jsonl:1" in told and "one.jsonl:3" not in told and "and 2 more." in told


def test_a_file_without_a_question_and_a_name_given_twice_are_problems(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        files.read(empty)
    bad = written(tmp_path / "bad.jsonl", b"{")
    assert any("bad.jsonl:1" in problem for problem in problems_of([str(bad)], skip_bad=True))
    assert any("copying twice" in p for p in problems_of(expanded("copying,built-in"), skip_bad=False))
    assert problems_of(expanded(" , "), skip_bad=False) == ["--tasks names no task."]


def test_worked_examples_are_the_first_other_questions(tmp_path):
    lines = [{"question": f"q{n}", "choices": [f"a{n}", "x"], "answer": 0} for n in range(3)]
    questions = files.read(written(tmp_path / "t.jsonl", *lines)).questions
    assert prompt_of(questions[0], questions, 2) == "q1 a1\n\nq2 a2\n\nq0"
    assert prompt_of(questions[2], questions, 2) == "q0 a0\n\nq1 a1\n\nq2"
    assert prompt_of(questions[2], questions, 0) == "q2"
    mixed = [*questions, Choice(question="q", choices=("1", "2", "3", "4"), answer=1)]
    assert chance_of(mixed) == pytest.approx((3 / 2 + 1 / 4) / 4)
    assert chance_of([*mixed, Cloze(text="t", answer="a")]) is None and chance_of([]) is None
