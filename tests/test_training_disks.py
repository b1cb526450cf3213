"""Full and read-only disks, damaged files: told, and nothing that was saved is lost."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from training_runs import (
    column,
    final_weights,
    incidents,
    make_store,
    run_here,
)

from minilm.__main__ import main as minilm
from minilm.data.store import Shard
from minilm.errors import CheckpointError, ConfigError, DataError
from minilm.training import checkpoint, trainer
from minilm.training.step import NonFinite

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


# ---------------------------------------------------------------- broken disks and files


def test_a_shard_that_is_altered_during_the_run_is_named_at_the_next_start(tmp_path, store, accidents):
    own = tmp_path / "store"
    shutil.copytree(store, own)
    shard = next((own / "train").glob("*.tokens.bin"))
    settings = {"train__steps": 12, "train__save_every": 4}
    accidents((6, "loss"))
    with pytest.raises(NonFinite):
        run_here(tmp_path, own, **settings)
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    accidents()
    with pytest.raises(DataError, match=rf"{shard.name} was altered after it was written"):
        run_here(tmp_path, own, resume=True, **settings)
    assert minilm(["replay", str(incidents(tmp_path / "run")[0])]) == 2
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    run = run_here(tmp_path, own, resume=True, **settings)
    assert column(run, "step") == list(range(1, 13))


def test_a_token_that_no_vocabulary_has_ends_the_run_with_its_metrics_and_checkpoint(
    tmp_path, store, monkeypatch
):
    """The second line of defence, behind the checks of the store: uint8 ids, 255 is above the vocabulary of 48."""
    own = tmp_path / "store"
    shutil.copytree(store, own)
    shard = next((own / "train").glob("*.tokens.bin"))
    monkeypatch.setattr(Shard, "check", lambda self: None)
    real, taken = trainer.optimizer_step, []

    def step(*arguments, **keywords):
        taken.append(1)
        if len(taken) == 7:
            with shard.open("r+b") as file:
                file.write(b"\xff" * shard.stat().st_size)
        return real(*arguments, **keywords)

    monkeypatch.setattr(trainer, "optimizer_step", step)
    with pytest.raises(DataError, match=r"Token id 255 is outside"):
        run_here(tmp_path, own, train__steps=40, train__save_every=5)
    done = column(tmp_path / "run", "step")
    assert done == list(range(1, len(done) + 1)) and len(done) >= 7
    assert checkpoint.find(tmp_path / "run")[0].step == len(done) // 5 * 5
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "failed"


@pytest.fixture
def small_disk(tmp_path):
    """mount(megabytes, flags) -> folder on a file system of its own; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip("tmpfs cannot be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def test_a_run_folder_that_cannot_be_written_is_named_before_anything_is_computed(store, small_disk):
    folder = small_disk("size=1m", "ro")
    with pytest.raises(ConfigError, match=r"run folder .* cannot be written: Read-only file system"):
        run_here(folder, store, train__steps=6)


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(store, small_disk, monkeypatch, background):
    folder = small_disk("size=4m")
    settings = {"train__steps": 12, "train__save_every": 4, "train__keep_last": 9, "model__dropout": 0.1}
    ballast, real, taken = folder / "ballast", trainer.optimizer_step, []

    def step(*arguments, **keywords):
        taken.append(1)
        if len(taken) == 7:  # leaves room for a part of the second checkpoint of 0.27 MB
            ballast.write_bytes(b"x" * (shutil.disk_usage(folder).free - 200_000))
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", step)
        with pytest.raises(
            CheckpointError, match=r"could not be written.*No space left(.|\n)*--resume"
        ) as caught:
            run_here(folder, store, train__save_in_background=background, **settings)
    assert "step-00000004 is the newest one that is complete" in str(caught.value)
    checkpoints = folder / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [
        "step-00000004"
    ]  # half a save is not left behind
    assert not checkpoint.damage(checkpoints / "step-00000004")
    assert 8 <= column(folder / "run", "step")[-1] < 12
    assert json.loads((folder / "run" / "manifest.json").read_text())["state"] == "failed"
    ballast.unlink()
    run = run_here(folder, store, resume=True, **settings)
    whole = run_here(folder.parent, store, name="whole", **settings)
    assert column(run, "loss") == column(whole, "loss")
    for name, value in final_weights(run).items():
        assert torch.equal(value, final_weights(whole)[name])


def test_a_checkpoints_folder_that_cannot_be_written_is_named_before_anything_is_computed(
    store, small_disk, monkeypatch
):
    folder = small_disk("size=4m", "ro")
    run = folder.parent / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(folder, target_is_directory=True)
    with pytest.raises(
        CheckpointError, match=r"checkpoints cannot take the checkpoints.*Read-only file system"
    ):
        run_here(folder.parent, store, train__steps=6)
    # A start that computed nothing takes no name and binds no setting.
    (run / "checkpoints").unlink()
    run_here(folder.parent, store, train__steps=7)
    assert column(run, "step") == list(range(1, 8))


def test_a_disk_that_becomes_read_only_ends_the_run_and_keeps_what_is_there(store, small_disk, monkeypatch):
    folder = small_disk("size=4m")
    (folder.parent / "run").mkdir()
    (folder.parent / "run" / "checkpoints").symlink_to(folder, target_is_directory=True)
    settings = {"train__steps": 12, "train__save_every": 3, "train__keep_last": 9}
    real, taken = trainer.optimizer_step, []

    def step(*arguments, **keywords):
        taken.append(1)
        if len(taken) == 5:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, capture_output=True)
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", step)
        with pytest.raises(CheckpointError, match=r"could not be written.*Read-only file system"):
            run_here(folder.parent, store, **settings)
    assert [c.step for c in checkpoint.list_checkpoints(folder)] == [3]
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True, capture_output=True)
    run = run_here(folder.parent, store, resume=True, **settings)
    assert column(run, "step") == list(range(1, 13))


def test_a_start_that_failed_takes_no_name_and_binds_no_setting(tmp_path, store, accidents):
    """No memory in the very first step: another batch size, another rate, the same name."""
    accidents((1, "memory"))
    with pytest.raises(MemoryError):
        run_here(tmp_path, store, train__steps=6)
    run = tmp_path / "run"
    assert json.loads((run / "manifest.json").read_text())["step"] == 0
    accidents()
    run_here(tmp_path, store, train__steps=6, optim__learning_rate=1e-3)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["config"]["optim.learning_rate"] == 1e-3 and manifest["resumes"] == []
    assert manifest["state"] == "finished" and column(run, "step") == list(range(1, 7))
    plain = run_here(tmp_path, store, name="plain", train__steps=6, optim__learning_rate=1e-3)
    assert column(run, "loss") == column(plain, "loss")
    with pytest.raises(ConfigError, match=r"is in use \(its run: finished\)"):
        run_here(tmp_path, store, train__steps=6)
