"""The Dockerfile, the compose file and the shell scripts, as far as they can be read without a container engine.

Its steps are carried out by .ci/image.py, which needs root and minutes; here is what it relies on.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "run_file").rglob("*.sh")), ROOT / ".ci" / "run"]


def program(name: str) -> str:
    """A linter of the extra `package`, beside this Python or on the path; its lack is a failure, not a skip."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    assert found, f"{name} is missing: pip install -e '.[package]'"
    return found


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minilm_ci_image", ROOT / ".ci" / "image.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    lint = [program("hadolint"), "--config", str(ROOT / ".hadolint.yaml")]
    done = subprocess.run([*lint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    bad = tmp_path / "Dockerfile"
    bad.write_text(text("Dockerfile").replace(" --no-install-recommends", ""))
    assert subprocess.run([*lint, str(bad)], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(
        [program("shellcheck"), "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_image_has_a_pinned_base_a_user_without_rights_and_dependencies_before_the_source(
    image: ModuleType,
) -> None:
    steps = list(image.instructions(text("Dockerfile")))
    base = next(rest for name, rest in steps if rest.startswith("BASE="))
    assert re.fullmatch(r"BASE=nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu24\.04", base)
    names = [name for name, _ in steps]
    assert [rest for name, rest in steps if name == "USER"] == ["${USER_ID}"]
    assert names.index("USER") > max(n for n, name in enumerate(names) if name == "RUN")
    heavy = next(
        n for n, (name, rest) in enumerate(steps) if name == "RUN" and "install_dependencies" in rest
    )
    assert heavy < steps.index(("COPY", ". ."))
    before = {rest for name, rest in steps[:heavy] if name == "COPY"}
    assert before == {"pyproject.toml ./", "run_file/install.sh run_file/"}  # what that layer depends on


def test_instructions_are_joined_over_lines_and_comments(image: ModuleType) -> None:
    written = "# first\nFROM a\nRUN one \\\n    # why\n    && two\nenv A=1\n"
    assert list(image.instructions(written)) == [("FROM", "a"), ("RUN", "one      && two"), ("ENV", "A=1")]


def test_the_context_is_what_the_ignore_file_lets_through(image: ModuleType) -> None:
    files = [
        "a.py",
        "docs/a.md",
        "minilm/docs.py",
        "minilm/__pycache__/a.pyc",
        "x/y/run.log",
        "run_file/quickstart.sh",
    ]
    left = image.context_files(files, "# comment\ndocs\n**/__pycache__\n**/*.log\n")
    assert left == ["a.py", "minilm/docs.py", "run_file/quickstart.sh"]
    needed = [
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "minilm/run.py",
        "run_file/install.sh",
        "train.py",
        "eval.py",
    ]
    hidden = [".git/config", "runs/a/metrics.jsonl", "data/x", "tests/test_run.py", "minilm/a.log"]
    assert image.context_files(needed + hidden, text(".dockerignore")) == needed


def test_variables_are_replaced_as_the_builder_does(image: ModuleType) -> None:
    machine = image.Machine(Path("/"))
    for name, rest in (
        ("ARG", "A=1"),
        ("ENV", 'B=${A}2 C="x y"'),
        ("ENV", "PATH=/opt/bin:$PATH"),
        ("USER", "${A}"),
    ):
        image.carried_out(machine, name, rest, [])
    assert (machine.environment["B"], machine.environment["C"], machine.user) == ("12", "x y", "1")
    assert machine.environment["PATH"].startswith("/opt/bin:/usr/sbin")
    with pytest.raises(SystemExit, match="teach"):
        image.carried_out(machine, "ADD", "x y", [])


def compose(name: str) -> dict[str, Any]:
    """The services; `!reset` is a tag of Docker Compose alone."""
    return yaml.safe_load(text(name).replace("!reset ", ""))["services"]


def test_the_dashboard_is_for_this_machine_only_and_sees_the_runs_of_the_trainer(image: ModuleType) -> None:
    services = compose("compose.yaml")
    assert services["dashboard"]["ports"] == ["127.0.0.1:5092:5092"]
    volumes = next(rest for name, rest in image.instructions(text("Dockerfile")) if name == "VOLUME")
    assert {v.partition(":")[2] for v in services["trainer"]["volumes"]} == set(
        re.findall(r'"([^"]+)"', volumes)
    )
    assert "runs:/opt/minilm/runs" in services["dashboard"]["volumes"]
    assert all(service["cap_drop"] == ["ALL"] for service in services.values())
    assert compose("compose.cpu.yaml") == {"trainer": {"deploy": None}}
