"""Damaged files: checkpoints that were cut off or altered, shards that change before and while they are read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from training_runs import column, make_store, run_here, started

from minilm.data.loader import Loader
from minilm.data.rows import Rows
from minilm.data.store import Store
from minilm.errors import DataError
from minilm.training import checkpoint

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def own_store(tmp_path, store):
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "store"


def cut_off(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path, place=None):
    place = path.stat().st_size // 2 if place is None else place
    with path.open("r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ 4]))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("spoil", [cut_off, flip, os.remove])
def test_a_damaged_file_of_any_kind_is_named_and_the_run_goes_on_from_the_checkpoint_before(
    tmp_path, store, capsys, spoil
):
    settings = {"train__steps": 6, "train__save_every": 3, "train__ema_decay": 0.9, "model__dropout": 0.1}
    run = run_here(tmp_path, store, **settings)
    last = run / "checkpoints" / "step-00000006"
    whole = {p.relative_to(last): p.read_bytes() for p in last.rglob("*") if p.is_file()}
    assert {str(p) for p in whole} >= {
        *("model.safetensors", "model.json", "optimizer.safetensors", "ema.safetensors"),
        *("random-00000.pt", "trainer.json", "files.json"),
    }
    for name in whole:
        spoil(last / name)
        if spoil is os.remove and str(name) == "files.json":  # what is not sealed is no checkpoint at all
            assert checkpoint.find(run)[0].step == 3
        else:
            found, damaged = checkpoint.find(run)
            assert found.step == 3 and len(damaged) == 1
            assert str(last) in damaged[0], damaged
            if str(name) != "files.json":  # altered, it accuses another file
                assert name.name in damaged[0], damaged
            capsys.readouterr()
        run_here(tmp_path, store, resume=True, **settings)
        if not (spoil is os.remove and str(name) == "files.json"):
            assert f"damaged checkpoint passed over: {last}" in capsys.readouterr().err
        assert {p: (last / p).read_bytes() for p in whole} == whole
    assert column(run, "step") == list(range(1, 7))


def test_no_flipped_bit_of_the_list_of_files_passes_for_a_whole_checkpoint_unseen(tmp_path, store):
    run = run_here(tmp_path, store, train__steps=5)
    folder = run / "checkpoints" / "step-00000005"
    path = folder / "files.json"
    good = path.read_bytes()
    files = json.loads(good)["files"]
    passed = 0
    for place in range(len(good)):
        for bit in (0, 2, 5):
            path.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
            if checkpoint.damage(folder) == []:  # then the list of files is what it was: only spelt otherwise
                assert json.loads(path.read_bytes())["files"] == files
                passed += 1
    assert passed < len(good)  # not all of them


# ---------------------------------------------------------------- shards, before the start


@pytest.mark.parametrize("name", ["a.tokens.bin", "a.offsets.bin"])
@pytest.mark.parametrize(("spoil", "what"), [(cut_off, "bytes, but"), (flip, "was altered after")])
def test_a_shard_that_was_damaged_before_the_start_is_named(own_store, name, spoil, what):
    spoil(own_store / "train" / name)
    with pytest.raises(DataError, match=rf"train/{name}.*{what}(.|\n)*minilm data build"):
        Store.open(own_store)


# ---------------------------------------------------------------- shards, while they are read


@pytest.mark.parametrize("name", ["a.tokens.bin", "a.offsets.bin"])
def test_a_shard_that_is_cut_off_under_a_running_process_ends_it_with_a_word(tmp_path, own_store, name):
    """Reading a mapped file behind its end is SIGBUS: the process would be gone without one."""
    process = started(own_store, tmp_path, train__save_every=5)
    try:
        for _ in range(600):
            if checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"):
                break
            time.sleep(0.1)
        os.truncate(own_store / "train" / name, 0)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2, (process.returncode, errors[-2000:])
    words = " ".join(errors.split())
    assert f"train/{name} was cut off while this run reads it: 0 of" in words and "--resume" in words
    run = tmp_path / "run"
    last = column(run, "step")[
        -1
    ]  # its line may be missing: the line names the documents, by what was cut off
    assert json.loads((run / "manifest.json").read_text())["step"] in (last, last + 1)
    assert not checkpoint.damage(checkpoint.find(run)[0].folder)


CUT_OFF = """
import os, sys
from minilm.data.loader import Loader
from minilm.data.rows import Rows
from minilm.data.store import Store
from minilm.errors import DataError
rows = Rows(Store.open(sys.argv[1]), "train", 24)
loader = Loader(rows, batch_rows=4, micro_batch=4, prefetch=0)
next(loader)
os.truncate(sys.argv[2], 0)
for read in (lambda: next(loader), lambda: loader.where(3), lambda: rows.shards[0].document(3)):
    try:
        read()
    except DataError as error:
        print(str(error).partition(".bin ")[2])
"""


@pytest.mark.parametrize("name", ["a.tokens.bin", "a.offsets.bin"])
def test_nobody_reads_behind_the_end_of_a_shard_that_was_cut_off(own_store, name):
    done = subprocess.run(
        [sys.executable, "-c", CUT_OFF, str(own_store), str(own_store / "train" / name)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.count("was cut off while this run reads it: 0 of") == 3


def loader_of(store, **keywords):
    return Loader(Rows(Store.open(store), "train", 24), batch_rows=4, micro_batch=4, **keywords)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("name", ["a.tokens.bin", "a.offsets.bin"])
def test_one_flipped_bit_under_a_running_loader_is_found_before_its_rows_are_used(own_store, name, prefetch):
    whole = [batches[0].inputs for batches in map(loader_of(own_store).step, range(20))]
    with loader_of(own_store, prefetch=prefetch) as loader:
        for step in range(3):
            assert next(loader)[0].inputs.equal(whole[step])
        flip(own_store / "train" / name)
        with pytest.raises(DataError, match=rf"train/{name} was altered while this run reads it"):
            for step in range(3, 20):
                assert next(loader)[0].inputs.equal(whole[step])


def test_a_shard_with_a_new_date_or_replaced_under_its_name_is_read_as_before(own_store):
    shard = own_store / "train" / "a.tokens.bin"
    with loader_of(own_store, prefetch=0) as loader:
        before = [loader.step(step)[0].inputs for step in range(5)]
        os.utime(shard, (1, 1))
        assert all(loader.step(step)[0].inputs.equal(before[step]) for step in range(5))
        content = shard.read_bytes()
        shard.write_bytes(content)  # cut off for a moment, and there again
        assert all(loader.step(step)[0].inputs.equal(before[step]) for step in range(5))
        shard.unlink()
        shard.write_bytes(b"another file")  # what is mapped is still the old one
        assert all(loader.step(step)[0].inputs.equal(before[step]) for step in range(5))


def test_a_word_is_said_even_where_the_map_itself_fails():
    """A disk that goes away in the middle of a read, which no look at the size can foresee."""
    program = (
        "import os, sys\nfrom minilm import cli\n"
        "cli.guarded(lambda: os.kill(os.getpid(), int(sys.argv[1])), debug=False)"
    )
    died = subprocess.run(
        [sys.executable, "-c", program, str(int(signal.SIGBUS))], capture_output=True, text=True, timeout=60
    )
    assert died.returncode == -signal.SIGBUS and "Bus error" in died.stderr and "line" in died.stderr
