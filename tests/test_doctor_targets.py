"""A family by its name, a function of a file: each is examined, or refused with a clear word."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from minilm.__main__ import main


def test_a_family_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "hf:llama", "--only", "causality,initial_loss"]) == 0
    assert "hf:llama: 2 PASS" in capsys.readouterr().out
    assert main(["doctor", "hf:lama"]) == 2
    assert "Did you mean" in capsys.readouterr().err


FACTORIES = """
import torch
from torch import nn

class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20)
    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None])

class Seeing(Causal):
    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1, keepdim=True).expand(-1, tokens.shape[1], -1))

def module():
    return Causal()

def seeing():
    return Seeing()

def function():
    model = Causal()
    return lambda tokens: model(tokens)

def subject():
    import minilm
    model = Causal()
    return minilm.Subject(name="mine", vocab_size=20, forward=model, module=model)

def raises():
    raise RuntimeError("no weights here")

def number():
    return 3

def flat():
    return lambda tokens: torch.zeros(tokens.numel(), 20)

def whole():
    return lambda tokens: torch.zeros(*tokens.shape, 20, dtype=torch.long)

def refuses():
    def forward(tokens):
        raise ValueError("tokens must be a list")
    return forward

value = 5
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    file = tmp_path / "factories.py"
    file.write_text(FACTORIES)
    return file


@pytest.mark.parametrize("name", ["module", "function", "subject"])
def test_a_factory_in_a_file(factories: Path, name: str) -> None:
    assert main(["doctor", f"{factories}:{name}", "--only", "causality"]) == 0


def test_a_planted_factory_is_found_with_exit_code_1(factories: Path) -> None:
    assert main(["doctor", f"{factories}:seeing", "--only", "causality"]) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "RuntimeError: no weights here"),
        ("number", "int cannot be examined"),
        ("flat", r"must be \[2, 8, vocabulary\]"),
        ("whole", "must be floating point"),
        ("refuses", "ValueError: tokens must be a list"),
        ("missing", "has no function 'missing'. It has: .*module"),
        ("value", "has no function 'value'"),
    ],
)
def test_a_factory_that_cannot_be_used_is_a_clear_refusal(
    factories: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"{factories}:{name}"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith("ConfigError") and re.search(said, shown), shown
    assert f"factories.py:{name}" in shown or "factories.py has no" in shown, shown


def test_a_file_that_cannot_be_run_is_a_clear_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.py"
    for text, said in (("def make(:\n", "SyntaxError"), ("import nowhere_at_all\n", "ModuleNotFoundError")):
        file.write_text(text)
        assert main(["doctor", f"{file}:make"]) == 2
        shown = capsys.readouterr().err
        assert "ConfigError" in shown and said in shown and "line 1" in shown, shown
    assert main(["doctor", f"{tmp_path / 'gone.py'}:make"]) == 2
    assert "is not a file" in capsys.readouterr().err


def test_json_and_html_hold_every_finding(factories: Path, tmp_path: Path) -> None:
    files = tmp_path / "out" / "r.json", tmp_path / "out" / "r.html"
    code = main(
        ["doctor", f"{factories}:seeing", "--only", "model", "--json", str(files[0]), "--html", str(files[1])]
    )
    assert code == 1

    def never(value: str) -> None:
        raise AssertionError(f"{value} is not JSON")

    report = json.loads(files[0].read_text(), parse_constant=never)
    counts = {s: sum(f["status"] == s for f in report["findings"]) for s in ("PASS", "FAIL", "NOT RUN")}
    assert report["counts"] == counts and counts["FAIL"] and counts["NOT RUN"]
    text = files[1].read_text()
    for finding in report["findings"]:
        assert f"<td>{finding['check']}<td" in text and html.escape(finding["message"]) in text
        if finding["status"] == "FAIL":
            assert finding["bugs"] and finding["component"] and finding["advice"]
            assert html.escape(finding["advice"]) in text
    assert not re.search(r"<(script|link|img|iframe)|src=|@import|url\(", text)
    assert not list(files[0].parent.glob(".*"))  # nothing half-written is left
