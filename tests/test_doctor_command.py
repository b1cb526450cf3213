"""`minilm doctor`: wrong usage, its table, its list, its pages; and `assert_healthy` for people's own tests."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from minilm.__main__ import main
from minilm.doctor import specimens
from minilm.doctor.core import Finding, checks
from minilm.doctor.pages import index
from minilm.doctor.report import Examination
from minilm.doctor.testing import assert_healthy

DOCS = Path(__file__).parent.parent / "docs" / "checks"


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["nowhere"], "is none of these"),
        ([], "TARGET is missing"),
        (["hf:llama", "--only", "casuality"], "casuality"),
        (["hf:llama", "--list"], "takes no TARGET"),
        (["hf:llama", "--matrix", "m.md"], "--matrix goes with"),
    ):
        assert main(["doctor", *arguments]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_nothing_checked_is_not_healthy() -> None:
    assert main(["doctor", "hf:llama", "--only", "memory_use"]) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_cuts_no_name_and_no_number(width: int) -> None:
    names = [c.name for c in checks()]
    findings = [
        Finding(
            "FAIL" if n % 7 == 0 else "PASS" if n % 3 else "NOT RUN", "long words " * 30, 1.234e-7, 2e-5,
            unit="of the largest value there is", bugs=("mask-missing",), component="a", advice="do " * 60,
            check=name, group="model", seconds=12.34,
        )
        for n, name in enumerate(names)
    ]  # fmt: skip
    written = io.StringIO()
    Examination("target", "full", findings).show(Console(file=written, width=width))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    head = next(i for i, line in enumerate(lines) if line.startswith("check"))
    for finding, line in zip(findings, lines[head + 2 :], strict=False):  # one line each
        assert re.match(rf"  {finding.check} +{finding.status} +1\.23e-07 +2e-05 +x162 +12\.34 s", line), line
    start = next(i for i, line in enumerate(lines) if line.startswith("FAIL"))
    assert re.match(r" {10}(long|words)", lines[start + 2])  # under the text of the line above
    reasons = written.getvalue().split("NOT RUN (says nothing")[1]
    assert reasons.count("long") == 30  # the reason that all have is said once


def test_the_list_names_every_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f" {check.name} " in shown for check in checks())


def test_pages_are_written_and_old_ones_removed(tmp_path: Path) -> None:
    (tmp_path / "former.md").write_text("a check that is no more")
    assert main(["doctor", "--pages", str(tmp_path)]) == 0
    names = {file.name for file in tmp_path.glob("*.md")}
    assert names == {f"{check.name}.md" for check in checks()} | {"README.md"}


def test_docs_have_a_page_for_each_check_no_other_and_their_table() -> None:
    """What stands on the page of a check: test_doctor_proof."""
    assert {file.stem for file in DOCS.glob("*.md")} == {check.name for check in checks()} | {"README"}
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    assert text == index(checks()), "run `minilm doctor --pages docs/checks`"


def test_assert_healthy() -> None:
    healthy = specimens.subject()
    found = assert_healthy(healthy.module, only=["causality", "loss_identity"], vocab_size=healthy.vocab_size)
    assert {f.check: f.status for f in found.findings} == {"causality": "PASS", "loss_identity": "NOT RUN"}
    with pytest.raises(AssertionError, match="NOT RUN loss_identity: needs the training loss"):
        assert_healthy(healthy.module, only=["causality", "loss_identity"], must_run=["loss_identity"])
    with pytest.raises(AssertionError, match="nothing could be checked"):
        assert_healthy(healthy.module, only=["loss_identity"])

    class Open(specimens.Attention):
        def allowed(self, *args: Any) -> torch.Tensor:
            return torch.ones_like(super().allowed(*args))

    planted = specimens.subject(attention=Open)
    with pytest.raises(AssertionError, match=r"FAIL causality[\s\S]*mask-missing[\s\S]*change"):
        assert_healthy(planted, only=["causality"])
