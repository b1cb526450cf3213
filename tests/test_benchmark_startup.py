"""What a start loads, and the benchmark that times it."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from benchmark_modules import imported
from data_stores import small_tokenizer, texts, write_jsonl

from minilm import cli
from minilm.data.build import build
from minilm.data.tokenizer import Tokenizer

# What is measured once serves many tests: they stay on one worker.
pytestmark = pytest.mark.xdist_group("benchmark_startup")

ROOT = Path(__file__).resolve().parent.parent
# What takes a second or more to import, or is not needed by a run on one process that logs to its folder.
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "accelerate",
    "deepspeed",
    "swanlab",
    "datasets",
    "pydantic",
}
NOT_BY_A_START = {"datasets", "deepspeed", "matplotlib", "pandas", "pyarrow", "swanlab", "torchvision",
                  "transformers.modeling_utils"}  # fmt: skip


@pytest.fixture(scope="module")
def startup():
    """benchmarks/startup.py with the modules beside it, as when it is run; forgotten afterwards."""
    with imported("startup") as module:
        yield module


@pytest.fixture(scope="module")
def written(startup, tmp_path_factory):
    """The quick way through with a store of its own; exit code and record."""
    folder = tmp_path_factory.mktemp("startup")
    lines = write_jsonl(folder / "corpus.jsonl", texts(400))
    store = build(folder / "store", [str(lines)], small_tokenizer()).store
    code = startup.main(["--quick", "--store", str(store.path), "--json", str(folder / "result.json")])
    return code, json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("command", [["--help"], ["doctor", "--help"], ["generate", "--help"]])
def test_a_page_of_help_waits_for_no_large_library(command):
    words = [sys.executable, "-X", "importtime", "-m", "minilm", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "usage: minilm" in done.stdout and "argparse" in imported
    assert imported & HEAVY == set()


def test_the_quick_way_measures_a_start_and_its_parts(startup, written):
    code, record = written
    results = record["results"]
    assert code == 0 and record["benchmark"] == "startup"
    (one,) = results["starts"].values()
    whole = sum(one[key]["median"] for key in ("start", "step", "validation"))
    assert one["to_the_first_line"]["median"] == pytest.approx(whole)
    assert {"import torch", "store and tokenizer", "model", "checks", "manifest and log"} <= set(
        results["phases"]["seconds"]
    )
    assert "torch" in " ".join(results["imports"])
    assert startup.OF_TORCH in results["floors"] and "minilm --help" in results["helps"]


def test_a_start_on_one_process_loads_nothing_that_it_does_not_use(written):
    loaded = set(written[1]["results"]["phases"]["loaded"])
    assert "transformers" in loaded  # its tokenizer
    assert loaded & NOT_BY_A_START == set()


def test_the_section_tells_the_start_and_the_command(startup, written):
    record = written[1]
    (one,) = record["results"]["starts"].values()
    text = startup.section(record)
    assert text.startswith("## Start\n\n") and record["command"] in text
    assert (
        f"it takes {one['start']['median']:.1f} s (train.py, without checks; tiny, batches of 2 x 32" in text
    )


def test_a_start_is_timed_to_the_clock_of_its_log_and_ended(startup, tmp_path):
    """The step and the validation are taken off, half a line is not read, the process does not live on."""
    lines = [{"kind": "validation", "seconds/validation": 2.0}, {"kind": "train", "seconds/step": 3.0}]
    script = tmp_path / "run.py"
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        f"folder, lines = pathlib.Path({str(tmp_path / 'run')!r}), {lines!r}\n"
        "folder.mkdir()\n"
        "(folder / 'number').write_text(str(os.getpid()))\n"
        "for line in lines:\n"
        "    line['unix_seconds'] = time.time() + 100\n"
        "text = '\\n'.join(json.dumps(line) for line in lines)\n"
        "(folder / 'metrics.jsonl').write_text(text[:-5])\n"
        "time.sleep(0.3)\n"
        "(folder / 'metrics.jsonl').write_text(text + '\\n')\n"
        "time.sleep(15)\n"
        "(folder / 'lived_on').touch()\n"
    )
    begun = time.time()
    found = startup.started([sys.executable, str(script)], tmp_path / "run", 1)
    assert (found["step"], found["validation"]) == (3.0, 2.0)
    assert 100 <= found["to_the_first_line"] <= 100 + time.time() - begun
    assert found["start"] == pytest.approx(found["to_the_first_line"] - 5)
    number = int((tmp_path / "run" / "number").read_text())
    assert not Path(f"/proc/{number}").exists() and not (tmp_path / "run" / "lived_on").exists()


def test_a_start_that_fails_says_why(startup, tmp_path):
    words = [sys.executable, "-c", "print('no such store'); raise SystemExit(2)"]
    with pytest.raises(startup.Failed, match="no such store"):
        startup.started(words, tmp_path / "run", 1)


def test_imports_are_without_the_collector_which_then_leaves_them_alone():
    frozen, kept = gc.get_freeze_count(), [[] for _ in range(10)]
    with cli.importing("minilm.no_such_module"):
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > frozen + len(kept)
    with pytest.raises(ModuleNotFoundError), cli.importing("minilm.no_such_module"):
        importlib.import_module("minilm.no_such_module")
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with cli.importing("minilm"):
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
    gc.unfreeze()


def test_a_tokenizer_of_ours_is_read_as_autotokenizer_reads_it(tmp_path, monkeypatch):
    """And without it: to import it takes as long again. A folder that names another class goes through it."""
    small_tokenizer().save(tmp_path / "ours")
    ours = Tokenizer.load(tmp_path / "ours")
    options = {"local_files_only": True, "trust_remote_code": False}
    theirs = Tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path / "ours", **options), "theirs")
    assert type(ours.hf) is type(theirs.hf) and ours.fingerprint == theirs.fingerprint
    ours.save(tmp_path / "again")
    theirs.save(tmp_path / "by_auto")
    for file in (tmp_path / "by_auto").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()

    def asked(*_, **__):
        raise ValueError("AutoTokenizer was asked")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", asked)
    assert Tokenizer.load(tmp_path / "ours").fingerprint == ours.fingerprint
    config = tmp_path / "ours" / "tokenizer_config.json"
    named = json.loads(config.read_text())
    for changed in ({"tokenizer_class": "GPT2Tokenizer"}, {"auto_map": {"AutoTokenizer": ["a.B", None]}}):
        config.write_text(json.dumps(named | changed))
        with pytest.raises(Exception, match="AutoTokenizer was asked"):
            Tokenizer.load(tmp_path / "ours")
    config.write_text(json.dumps(named))
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "llama"}')  # decides for AutoTokenizer
    with pytest.raises(Exception, match="AutoTokenizer was asked"):
        Tokenizer.load(tmp_path / "ours")
