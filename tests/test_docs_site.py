"""The site builds strictly: no broken link, no page without a place, no reference without its module."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_the_reference_is_made_of_the_docstrings(site: Path) -> None:
    page = (site / "reference/alignment/index.html").read_text(encoding="utf-8")
    for name in ("align", "from_labels", "nll", "score", "Sum"):
        assert f'id="minilm.alignment.{name}"' in page
    assert "is TOKEN" in page or "token" in page
    assert 'id="minilm.alignment._' not in page


def test_every_page_can_be_found(site: Path) -> None:
    found = {
        entry["location"] for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    for place in ("", "zh/", "tutorials/first_run/", "doctor/", "checks/causality/", "reference/training/"):
        assert place in found


def test_the_chinese_page_is_the_readme(site: Path) -> None:
    page = (site / "zh/index.html").read_text(encoding="utf-8")
    assert "只有一个对齐层" in page
    assert 'src="../quickstart_loss.png"' in page
    assert 'href="docs/' not in page


def test_a_reader_is_not_sent_elsewhere_for_fonts_or_scripts(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link rel="stylesheet"|img)[^>]*(?:src|href)="(https?:[^"]*)"', page)
    assert not loaded


def test_links_of_a_readme_are_moved() -> None:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = "[a](docs/a.md#b) ![c](docs/c.png) [`m`](minilm/m.py) [l](LICENSE) [x](https://x.org) [n](CHANGELOG.md)"
    assert hooks.moved(text) == "[a](a.md#b) ![c](c.png) `m` l [x](https://x.org) n"
