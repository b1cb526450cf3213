"""The README in two languages says the same: headings, commands, figures and links cannot drift apart."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMENT = re.compile(r"\s+#\s.*$", re.M)  # comments in code are translated, code is not
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def sections(text: str) -> list[str]:
    """The text between headings, in order."""
    return re.split(r"^#+ .*$", text, flags=re.M)


def differences(english: str, chinese: str) -> list[str]:
    """What the two READMEs do not have in common."""
    found = []
    levels = [[len(h) for h in re.findall(r"^(#+) ", prose(text), re.M)] for text in (english, chinese)]
    if levels[0] != levels[1]:
        found.append(f"headings: {levels}")
    code = [
        [(lang, COMMENT.sub("", body)) for lang, body in FENCE.findall(text)] for text in (english, chinese)
    ]
    found += [f"code: {a} and {b}" for a, b in zip(*code, strict=False) if a != b]
    if len(code[0]) != len(code[1]):
        found.append(f"code blocks: {len(code[0])} and {len(code[1])}")
    for number, (a, b) in enumerate(zip(sections(prose(english)), sections(prose(chinese)), strict=False)):
        for what, pattern in (
            ("figures", r"\d[\d,.]*(?<=\d)"),
            ("links", r"\]\(([^)]+)\)"),
            ("words of code", r"`([^`\n]+)`"),
            ("rows of tables", r"^\|"),
            ("points", r"^- "),
        ):
            counts = [Counter(re.findall(pattern, text, re.M)) for text in (a, b)]
            if counts[0] != counts[1]:
                found.append(f"section {number}, {what}: {counts[0] - counts[1]} and {counts[1] - counts[0]}")
    return found


def without_switch(text: str) -> str:
    """Without the line that leads from one language to the other."""
    return re.sub(r"^(English \|.*|\[English\].*)$", "", text, count=1, flags=re.M)


def test_the_two_languages_have_the_same_structure_commands_and_figures() -> None:
    assert differences(without_switch(read("README.md")), without_switch(read("README_zh.md"))) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("## 医生\n", ""),
        ("4.42", "4.24"),
        ("(docs/scale.md)", "(docs/scales.md)"),
        ("--resume ", "--resumed "),
        ("`manifest.json`", "`manifest.yaml`"),
    ],
)
def test_a_change_in_one_language_is_seen(old: str, new: str) -> None:
    english, chinese = without_switch(read("README.md")), without_switch(read("README_zh.md"))
    assert old in chinese
    assert differences(english, chinese.replace(old, new, 1))


def test_the_translation_is_one() -> None:
    for number, text in enumerate(sections(prose(read("README_zh.md")))[1:]):
        assert len(CHINESE.findall(text)) > 20, number
    shown = COMMENT.findall("".join(body for _, body in FENCE.findall(read("README_zh.md"))))
    assert sum(bool(CHINESE.search(comment)) for comment in shown) > 20


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_every_file_that_is_linked_is_there(name: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)", prose(read(name))):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_the_scripts_and_files_in_commands_are_there() -> None:
    commands = "\n".join(body for language, body in FENCE.findall(read("README.md")) if language == "bash")
    for path in re.findall(r"(?:run_file|benchmarks)/[\w/]+\.\w+", commands):
        assert (ROOT / path).is_file(), path
