"""The tutorials do what they say: every block is executed, every output shown is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import tutorial_runner
from tutorial_runner import agrees, blocks, first_missing, performed

from minilm import models

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"
PAGES = sorted(FOLDER.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_works_as_it_is_written(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.syspath_prepend(str(tmp_path))
    models.names()  # all of ours are there before one of a tutorial is added, for its time only
    monkeypatch.setattr(models, "_CONFIG_CLASSES", dict(models._CONFIG_CLASSES))
    text = page.read_text(encoding="utf-8")
    assert len(list(performed(text))) == sum(b.title is None and b.language != "text" for b in blocks(text))


def test_there_are_tutorials_and_each_shows_what_comes_out() -> None:
    assert len(PAGES) >= 4
    for page in PAGES:
        assert any(block.language == "text" for block in blocks(page.read_text(encoding="utf-8"))), page


def test_another_output_than_promised_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = '```python\nprint("loss 2.31")\n```\nand so\n```text\nloss {}\n```\n'
    assert list(performed(page.format("2.32")))
    for wrong in ("2.5", "2.31 nats", "two"):
        with pytest.raises(AssertionError, match="line 5"):
            list(performed(page.format(wrong)))


def test_a_block_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        list(performed("```python\n1 / 0\n```\n"))
    with pytest.raises(AssertionError):
        list(performed("```bash\nls nowhere\n```\n"))
    with pytest.raises(ValueError, match="closed"):
        list(performed("```bash\nls\n"))


def test_how_lines_are_compared() -> None:
    assert agrees("a  1.00 ... z", "a 1.01 b c  z")
    assert not agrees("a 1.00", "a 1.05")
    assert not agrees("3 steps", "4 steps")  # counts are exact
    assert first_missing("b\na", "a\nb\n") == "a"  # the order is part of it
    assert first_missing("a\n...\nc", "a\nb\nc\n") is None
    assert tutorial_runner.TOLERANCE == 0.02
