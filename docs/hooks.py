"""The Chinese page of the site is the README of the repository: a copy would drift."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

INCLUDE = re.compile(r"^\{\{ (README_\w+\.md) \}\}$", re.M)


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Put a README where its name stands, with links that lead from a page of docs/."""
    root = Path(config["config_file_path"]).parent
    return INCLUDE.sub(lambda found: moved((root / found[1]).read_text(encoding="utf-8")), markdown)


def moved(text: str) -> str:
    """Links to docs/ lose it; those to other files of the repository, which the site does not have, become text."""
    text = text.replace("](README.md)", "](docs/index.md)")
    text = re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|docs/)[^)]*\)", r"\1", text)
    return text.replace("](docs/", "](")
