"""manifest.json: there from the first second, true to the end, never in the way."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilm import manifest
from minilm.errors import CheckpointError

CONFIG = {"optim": {"learning_rate": 1e-3}, "train": {"steps": 10}}


def git(folder: Path, *arguments: str) -> str:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], env=environment, check=True, capture_output=True
    )
    return done.stdout.decode().strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A committed repository with a package in it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "repository" / "minilm"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text("x = 1\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", "-A")
    git(folder.parent, "commit", "-qm", "first")
    return folder


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    begun = manifest.begin(
        tmp_path,
        config=CONFIG,
        origins={"optim.learning_rate": "run.yaml, line 3"},
        data={"fingerprint": "abc", "num_tokens": 5},
        tokenizer={"fingerprint": "def"},
        model={"num_parameters": 25_829_888},
    )
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert record == begun.record
    assert record["state"] == "running" and record["ended"] is None
    assert datetime.datetime.fromisoformat(record["started"]).tzinfo is not None
    assert record["config"] == CONFIG and record["origins"] == {"optim.learning_rate": "run.yaml, line 3"}
    assert record["packages"]["torch"] is not None and record["packages"]["numpy"] is not None
    assert record["machine"]["python"] == sys.version.split()[0]
    assert record["machine"]["memory_bytes"] > 1e8 and record["machine"]["cpu_cores"] >= 1
    assert len(record["code"]["source_sha256"]) == 64

    begun.update(layout={"num_processes": 2, "precision": "bf16", "zero_stage": 2})
    begun.finish("finished", step=10, results={"validation_loss": 2.5, "worst": math.inf})
    record = manifest.Manifest.read(tmp_path).record
    assert record["state"] == "finished" and record["step"] == 10 and record["error"] is None
    assert record["results"] == {"validation_loss": 2.5, "worst": "inf"}
    assert record["layout"]["zero_stage"] == 2
    assert record["ended"] >= record["started"]


def test_how_a_failed_run_ended_is_there(tmp_path: Path) -> None:
    manifest.begin(tmp_path, config=CONFIG).finish("failed", step=3, error="loss is nan at step 3")
    record = manifest.Manifest.read(tmp_path).record
    assert (record["state"], record["error"], record["step"]) == ("failed", "loss is nan at step 3", 3)
    with pytest.raises(ValueError, match="state"):
        manifest.Manifest.read(tmp_path).finish("done")  # type: ignore[arg-type]


def test_resumes_add_up_and_name_what_changed_while_the_start_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "describe_code", lambda folder: {"source_sha256": "0"})
    manifest.begin(tmp_path, config=CONFIG, data={"fingerprint": "abc"}).update(layout={"num_processes": 1})
    second = manifest.begin(tmp_path, config=CONFIG, data={"fingerprint": "abc"}, step=4)
    second.update(layout={"num_processes": 2})
    second.finish("interrupted", step=6, error="SIGTERM")
    third = manifest.begin(tmp_path, config={**CONFIG, "optim": {"learning_rate": 2e-3}}, step=6)
    third.finish("finished", step=10)
    record = manifest.Manifest.read(tmp_path).record
    assert record["config"] == CONFIG and record["layout"] == {"num_processes": 1}
    first, last = record["resumes"]
    assert first["at_step"] == 4 and first["before"]["state"] == "died (no end was recorded)"
    assert first["changed"] == {"layout": {"num_processes": [1, 2]}}
    assert (
        last["at_step"] == 6
        and last["before"]["state"] == "interrupted"
        and last["before"]["error"] == "SIGTERM"
    )
    assert last["changed"] == {"config": {"optim.learning_rate": [1e-3, 2e-3]}}
    assert (record["state"], record["error"]) == ("finished", None)


def test_a_clean_commit(package: Path, tmp_path: Path) -> None:
    found = manifest._describe_git(package, tmp_path)
    assert found == {"commit": git(package, "rev-parse", "HEAD"), "dirty": False}
    assert not list(tmp_path.glob("*.diff"))


def test_uncommitted_changes_are_saved_so_that_they_can_be_applied(package: Path, tmp_path: Path) -> None:
    (package / "model.py").write_text("x = 2\n")
    (package / "weights.bin").write_bytes(bytes(range(256)))
    git(package, "add", "weights.bin")  # staged counts too
    (package / "neu é.py").write_text("new\n")
    found = manifest._describe_git(package, tmp_path)
    diff = (tmp_path / found["diff"]).read_bytes()
    assert found["dirty"]
    assert found["diff_sha256"] == hashlib.sha256(diff).hexdigest()
    assert found["untracked"] == ["minilm/neu é.py"] and found["num_untracked"] == 1
    git(package, "stash", "-q")
    git(package.parent, "apply", str(tmp_path / found["diff"]))
    assert (package / "model.py").read_text() == "x = 2\n"
    assert (package / "weights.bin").read_bytes() == bytes(range(256))


def test_a_huge_diff_is_hashed_but_not_saved(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_MOST_DIFF_BYTES", 10)
    (package / "model.py").write_text("x = 2\n")
    found = manifest._describe_git(package, tmp_path)
    assert "not saved" in found["diff"] and found["diff_sha256"] and not list(tmp_path.glob("*.diff"))


def test_a_package_inside_somebody_elses_repository_is_not_taken_for_it(
    package: Path, tmp_path: Path
) -> None:
    installed = package.parent / "venv" / "minilm"
    installed.mkdir(parents=True)
    (installed / "model.py").write_text("x = 1\n")
    found = manifest._describe_git(installed, None)
    assert found["commit"] is None and "not tracked" in found["why"]


def test_no_git_repository_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = manifest._describe_git(tmp_path, None)
    assert found["commit"] is None and found["why"]


@pytest.mark.parametrize(
    ("script", "why"), [(None, "not installed"), ("sleep 60", "more than"), ("exit 3", "exit code 3")]
)
def test_git_that_is_missing_hangs_or_fails_costs_nothing_but_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, why: str
) -> None:
    if script:
        (tmp_path / "git").write_text(
            f"#!/bin/sh\nexec {script}\n" if "sleep" in script else f"#!/bin/sh\n{script}\n"
        )
        (tmp_path / "git").chmod(0o755)
    search = [str(tmp_path)] + [p for p in os.environ["PATH"].split(":") if script]
    monkeypatch.setenv("PATH", ":".join(search))
    monkeypatch.setattr(manifest, "_GIT_SECONDS", 0.5)
    start = time.monotonic()
    found = manifest._describe_git(tmp_path, None)
    assert time.monotonic() - start < 5
    assert found["commit"] is None and why in found["why"]


def test_the_source_hash_changes_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "minilm"
    package.mkdir()
    (package / "a.py").write_text("1")
    monkeypatch.setattr(manifest, "__file__", str(package / "manifest.py"))
    hashes = [manifest.describe_code()["source_sha256"]]
    (package / "a.py").write_text("2")
    hashes.append(manifest.describe_code()["source_sha256"])
    (package / "a.py").rename(package / "b.py")
    hashes.append(manifest.describe_code()["source_sha256"])
    (package / "notes.txt").write_text("no source")
    assert len(set(hashes)) == 3 and manifest.describe_code()["source_sha256"] == hashes[-1]


def test_no_secret_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_API_KEY", "hunter2")
    monkeypatch.setenv("SWANLAB_API_KEY", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    manifest.begin(tmp_path, config=CONFIG)
    text = (tmp_path / "manifest.json").read_text()
    assert "hunter2" not in text
    assert json.loads(text)["machine"]["environment"]["OMP_NUM_THREADS"] == "3"


def test_a_write_that_fails_keeps_the_old_file_and_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = manifest.begin(tmp_path, config=CONFIG)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        begun.finish("finished")
    assert manifest.Manifest.read(tmp_path).record["state"] == "running"


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_missing_or_damaged_manifest_is_a_users_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        manifest.Manifest.read(tmp_path)
