"""What a user of the package gets: the files, the metadata, and a wheel that trains where there is no checkout."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import minilm

ROOT = Path(__file__).parent.parent
# Executed where only the wheel is: nothing of the checkout may be needed.
TRIAL = """
import json, sys
from pathlib import Path
import minilm
from minilm.__main__ import main
import torch
torch.set_num_threads(1)
assert Path(minilm.__file__).is_relative_to(sys.argv[1]), minilm.__file__
texts = (json.dumps({"text": f"{n} follows {n - 1}, as it must"}) for n in range(80))
Path("texts.jsonl").write_text("\\n".join(texts))
for words in (
    "tokenizer train --source texts.jsonl --vocab-size 280 --out tokenizer",
    "data build --source texts.jsonl --validation-fraction 0.1 --tokenizer tokenizer --out store",
    "train --data.store=store --data.sequence_length=16 --model.size=tiny --train.steps=2 --train.batch_size=4"
    " --optim.warmup_steps=1 --run.name=trial --track.swanlab=off --doctor.check=off",
    "generate --checkpoint runs/trial --prompt 7 --max-new-tokens 2",
):
    assert main(words.split()) == 0, words
"""


@dataclass(frozen=True)
class Built:
    """What was made, and the files that it was made of."""

    wheel: Path
    archive: Path
    files: list[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A source distribution of the files that git would commit, and the wheel that is made of it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    files = [name for name in listed if (ROOT / name).is_file()]
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    # `build` makes the wheel from the source distribution, so a file that is missing there is missing in the wheel.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, archive, files)


def test_the_wheel_has_the_package_its_types_and_its_data_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {name for name in built.files if name.startswith("minilm/") and name.endswith(".py")}
    data = {"minilm/py.typed", "minilm/doctor/catalogue.json"}
    assert names == sources | data


def test_the_source_distribution_is_the_checkout(built: Built) -> None:
    with tarfile.open(built.archive) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "train.py", "eval.py", "run_file/quickstart.sh", "run_file/accelerate/zero2.yaml", "tests/test_packaging.py",
        "tests/public_api.txt", "docs/training.md", "docs/quickstart_loss.png", "README_zh.md", "LICENSE",
        "CHANGELOG.md", "CITATION.cff", "Dockerfile", "mkdocs.yml", ".ci/run",
    }  # fmt: skip
    assert wanted <= names, wanted - names
    assert not [name for name in names if name.startswith(("runs/", "data/")) or name.endswith(".pyc")]


def test_the_metadata_says_what_it_is(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        said = email.message_from_bytes(wheel.read(name))
        entries = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert (said["Name"], said["Version"], said["License-Expression"]) == (
        "minilm",
        minilm.__version__,
        "Apache-2.0",
    )
    assert said["Requires-Python"] == "<3.13,>=3.11"
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    assert said["Description-Content-Type"] == "text/markdown"
    assert "minilm = minilm.__main__:main" in entries


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert cited is not None and project["version"] == cited[1] == minilm.__version__
    assert project["version"] in log


def test_the_wheel_trains_where_there_is_no_checkout(built: Built, tmp_path: Path) -> None:
    target, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target),
         str(built.wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    # -P keeps the folder of the script out; PYTHONPATH stands before the editable installation of this checkout.
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", TRIAL, str(target)], cwd=work, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "runs/trial/metrics.jsonl").stat().st_size > 0
    console = subprocess.run(
        [sys.executable, str(target / "bin/minilm"), "--version"], env=environment, cwd=work, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert console.stdout.strip() == f"minilm {minilm.__version__}", console.stderr
