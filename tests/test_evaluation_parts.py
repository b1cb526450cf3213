"""eval.py as a whole: parts that fail, are stopped or find something wrong, and the page."""

from __future__ import annotations

import importlib.util
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evaluation_checkpoint import make_run

from minilm.errors import DataError

ROOT = Path(__file__).parent.parent
FLAGS = ["--prompt-lengths", "4", "--continuation-tokens", "6", "--samples", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def entry(monkeypatch):
    spec = importlib.util.spec_from_file_location("eval_entry", ROOT / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Found:
    """A section."""

    title, name = "A <title>", "found"

    def __init__(self, failed=False):
        self.failed = failed

    def as_dict(self):
        return {"seven": 7}

    def print(self, console):
        console.print("seven is 7")

    def html(self):
        return "<p>seven is 7</p>"


class Part:
    """A part of eval.py that gives sections or raises."""

    def __init__(self, outcome, name="minilm.evaluation.part", problems=()):
        self.outcome, self.__name__, self._problems = outcome, name, list(problems)

    def add_flags(self, parser):
        parser.add_argument(f"--{self.__name__.rpartition('.')[2]}-flag", default=3)

    def problems(self, arguments):
        return self._problems

    def sections(self, arguments, material):
        assert material.model is not None and material.run_folder is not None
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def run(entry, monkeypatch, made, tmp_path, parts, *flags):
    monkeypatch.setattr("minilm.cli.eval.parts", lambda: parts)
    json_file, page = tmp_path / "scores.json", tmp_path / "scores.html"
    places = ["--checkpoint", str(made.run_folder), "--json", str(json_file), "--html", str(page)]
    try:
        code = entry.main([*places, *FLAGS, *flags])
    finally:
        found = json.loads(json_file.read_text()) if json_file.exists() else None
    return code, found, page.read_text() if page.exists() else None


def test_a_section_is_printed_and_written_and_one_that_failed_gives_1(
    entry, monkeypatch, made, tmp_path, capsys
):
    for failed, expected in ((False, 0), (True, 1)):
        code, found, page = run(entry, monkeypatch, made, tmp_path, [Part([Found(failed)])])
        assert code == expected and found["found"] == {"seven": 7} and found["missing"] == {}
        shown = capsys.readouterr().out
        assert "seven is 7" in shown and "A <title>" in shown and f"{found['scores']['loss']:.4f}" in shown
        assert "<p>seven is 7</p>" in page and "A &lt;title&gt;" in page and ("(failed)" in page) == failed


def test_what_was_found_before_an_error_or_ctrl_c_is_kept_and_what_is_missing_is_said(
    entry, monkeypatch, made, tmp_path, capsys
):
    later = Part([Found()], "minilm.evaluation.later")
    cases = [(DataError("no such file"), 2, True), (KeyboardInterrupt(), 130, False)]
    for error, expected, goes_on in cases:
        code, found, page = run(entry, monkeypatch, made, tmp_path, [Part(error), later])
        assert code == expected and found["scores"]["num_tokens"] > 0 and found["samples"]
        assert ("found" in found) == goes_on
        assert set(found["missing"]) == ({"part"} if goes_on else {"part", "later"})
        shown = capsys.readouterr()
        assert "part is missing" in shown.err and "not there: part" in shown.out and "Not there: part" in page
        assert "no such file" in shown.err or expected == 130


def test_a_defect_keeps_its_traceback_and_the_numbers(entry, monkeypatch, made, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(entry, monkeypatch, made, tmp_path, [Part(ZeroDivisionError())])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["missing"] == {"part": "stopped by ZeroDivisionError"} and found["scores"]["loss"] > 0


def test_wrong_flags_of_a_part_are_refused_before_anything_is_computed(
    entry, monkeypatch, made, tmp_path, capsys
):
    parts = [Part([Found()], problems=["--part-flag is 3; it must be 4."])]
    code, found, _ = run(entry, monkeypatch, made, tmp_path, parts, "--batch-rows", "0")
    assert (code, found) == (2, None)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 problems" in said and "--part-flag is 3" in said and "--batch-rows is 0" in said


class Tags(HTMLParser):
    """The tags of a page, and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.references = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data", "action")]
        if tag not in ("meta", "html", "use", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        if tag != "html":
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_every_text(entry, monkeypatch, made, tmp_path):
    data = tmp_path / "<img src=x onerror=alert(1)>.jsonl"
    lines = [{"text": f"<script>alert({n})</script> the cat & the dog sat on a mat"} for n in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": 3}]))
    overlap = ["--overlap-with", str(made.store.path), "--per-document"]
    code, found, page = run(
        entry, monkeypatch, made, tmp_path, [], "--data", str(data), "--on-bad-line", "skip", *overlap
    )
    assert code == 0
    tags = Tags(page)
    assert tags.open == [] and not tags.tags & {"script", "img", "link", "iframe", "object"}
    assert all(reference.startswith("#") for reference in tags.references)
    assert {"svg", "table", "style"} <= tags.tags and "url(http" not in page and "@import" not in page
    assert "&lt;sc" in page and "ript&gt;" in page and "currentColor" in page
    assert found["excluded"]["num_bad_documents"] == 1 and "text is not a string" in page
    assert found["excluded"]["num_first_tokens"] == 12 == len(found["documents"])
    assert {"num_words", "num_words_in_shared_runs", "loss"} <= found["documents"][0].keys()
    assert found["overlap"]["clean"]["num_documents"] + found["overlap"]["too_short"]["num_documents"] == 12


def test_several_files_are_scored_together_and_apart(entry, monkeypatch, made, tmp_path, capsys):
    for name, texts in (("a", made.texts[:15]), ("b", made.texts[15:40])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    places = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    code, found, _ = run(entry, monkeypatch, made, tmp_path, [], "--data", *places)
    assert code == 0 and list(found["by_source"]) == places
    assert [s["num_documents"] for s in found["by_source"].values()] == [15, 25]
    assert sum(s["nats"] for s in found["by_source"].values()) == pytest.approx(found["scores"]["nats"])
    assert places[1] in capsys.readouterr().out
    code, found, _ = run(entry, monkeypatch, made, tmp_path, [], "--data", places[0], str(made.store.path))
    assert code == 2 and "is a store" in " ".join(capsys.readouterr().err.split())
