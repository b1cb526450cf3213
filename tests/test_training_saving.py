"""Checkpoints are written while training goes on: the same bytes, in order, and a failure is not lost in a thread."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time

import pytest
import torch
from training_runs import SETTINGS, column, flags, launched, make_store, records, run_here

from minilm.errors import CheckpointError
from minilm.training import checkpoint, saving, trainer
from minilm.training.settings import TrainConfig
from minilm.training.step import NonFinite

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def on_seal(monkeypatch):
    """on_seal(function): called with the folder aside, on the thread that writes, before its checksums are made."""
    real = checkpoint._seal

    def plan(function):
        def seal(folder):
            function(folder)
            real(folder)

        monkeypatch.setattr(checkpoint, "_seal", seal)

    return plan


@pytest.fixture
def steps_done(monkeypatch):
    """A list that grows by one with each optimizer step."""
    done: list[int] = []
    real = trainer.optimizer_step

    def counted(*arguments, **keywords):
        result = real(*arguments, **keywords)
        done.append(len(done) + 1)
        return result

    monkeypatch.setattr(trainer, "optimizer_step", counted)
    return done


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def saved_events(run):
    return [r["step"] for r in records(run, "event") if r["text"].startswith("saved step-")]


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("changes", [{"train__ema_decay": 0.9}, {"optim__name": "muon"}])
def test_what_the_thread_writes_is_byte_for_byte_what_is_written_while_training_waits(
    tmp_path, store, on_seal, steps_done, monkeypatch, changes
):
    settings = {"train__steps": 12, "train__save_every": 3, "train__keep_last": 9, "model__dropout": 0.1}
    at_once = run_here(
        tmp_path, store, name="at once", train__save_in_background=False, **settings, **changes
    )
    steps_done.clear()
    ahead = []
    real = checkpoint.Snapshot.write

    def late(taken, wanted):  # the weights in training are others by the time they are written
        time.sleep(0.05)
        ahead.append(len(steps_done) - taken.record["step"])
        real(taken, wanted)

    monkeypatch.setattr(checkpoint.Snapshot, "write", late)
    run = run_here(tmp_path, store, **settings, **changes)
    assert max(ahead) >= 1, "training did not go on: the test shows nothing"
    ours, theirs = contents(run / "checkpoints"), contents(at_once / "checkpoints")
    assert ours.keys() == theirs.keys() and len([n for n in ours if n.endswith("files.json")]) == 4
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert any(name.endswith("ema.safetensors") for name in ours) == ("train__ema_decay" in changes)


@pytest.mark.xdist_group("two ranks")
def test_two_ranks_with_zero_write_the_same_bytes_in_the_background(tmp_path, store):
    settings = SETTINGS | {"data.store": store, "run.folder": tmp_path, "train.ranks": 2, "train.steps": 8}
    settings |= {"train.save_every": 2, "train.keep_last": 9, "model.dropout": 0.1, "train.ema_decay": 0.9}
    for name, background in (("a", True), ("b", False)):
        own = settings | {"run.name": name, "train.save_in_background": background}
        result = launched(flags(own), launcher="cpu2_zero2.yaml")
        assert result.returncode == 0, result.stderr[-3000:]
    ours, theirs = contents(tmp_path / "a" / "checkpoints"), contents(tmp_path / "b" / "checkpoints")
    assert "step-00000002/random-00001.pt" in ours and "step-00000002/ema.safetensors" in ours
    assert ours.keys() == theirs.keys()
    # Python's and numpy's generators, which nothing here draws from, begin differently in each process.
    different = {name for name in ours if ours[name] != theirs[name] and "random-" not in name}
    assert {name.rpartition("/")[2] for name in different} <= {"files.json"}
    for name in (name for name in ours if "random-" in name):
        states = [torch.load(io.BytesIO(found[name]), weights_only=True) for found in (ours, theirs)]
        assert torch.equal(states[0]["torch"], states[1]["torch"]), name


# ---------------------------------------------------------------- order


def test_a_save_is_told_when_the_checkpoint_has_its_name_and_its_metrics_are_there(tmp_path, store, on_seal):
    seen = []

    def look(folder):
        step = int(folder.name.rpartition("-")[2])
        run = folder.parent.parent
        seen.append(step)
        assert step not in saved_events(run) and not (folder.parent / f"step-{step:08d}").exists()
        assert column(run, "step")[step - 1] == step
        assert len(list(folder.parent.glob(".saving-*"))) == 1  # one at a time
        time.sleep(0.03)

    on_seal(look)
    run = run_here(tmp_path, store, train__steps=6, train__save_every=1, train__keep_last=9)
    assert seen == saved_events(run) == [1, 2, 3, 4, 5, 6]
    assert names(run) == [f"step-{step:08d}" for step in seen]
    assert all(not checkpoint.damage(run / "checkpoints" / name) for name in names(run))
    event = next(r for r in records(run, "event") if r["text"] == "saved step-00000001")
    assert event["seconds_writing"] > 0.03


@pytest.mark.parametrize("stopped", [False, True])
def test_the_last_save_of_a_run_and_one_after_a_signal_are_waited_for(
    tmp_path, store, on_seal, monkeypatch, stopped
):
    on_seal(lambda folder: time.sleep(0.6))
    if stopped:
        real = trainer.optimizer_step
        monkeypatch.setattr(trainer, "optimizer_step", lambda *a, **k: real(*a, **k | {"stop": True}))
    run = run_here(tmp_path, store, train__steps=6)
    step = 1 if stopped else 6
    assert names(run) == [f"step-{step:08d}"] and saved_events(run) == [step]


def test_a_run_that_fails_lets_the_save_before_it_end(tmp_path, store, on_seal, accidents):
    on_seal(lambda folder: time.sleep(0.5))
    accidents((6, "loss"))
    with pytest.raises(NonFinite):
        run_here(tmp_path, store, train__steps=9, train__save_every=5)
    assert "step-00000005" in names(tmp_path / "run") and saved_events(tmp_path / "run") == [5]


def test_the_second_ctrl_c_waits_for_no_save_and_leaves_no_checkpoint_behind(
    tmp_path, store, on_seal, monkeypatch
):
    asked, released, real = threading.Event(), threading.Event(), trainer.optimizer_step

    def block(folder):
        asked.set()
        released.wait(20)

    def interrupted(*arguments, **keywords):
        if asked.is_set():
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    on_seal(block)
    monkeypatch.setattr(trainer, "optimizer_step", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_here(tmp_path, store, train__steps=100, train__save_every=5)
    assert time.monotonic() - start < 15 and names(tmp_path / "run")[0].startswith(".saving-")
    released.set()
    for thread in threading.enumerate():
        if thread.name == "minilm-save":
            thread.join()
    assert names(tmp_path / "run") == []


def test_what_kills_left_is_removed_at_the_start_and_nothing_else(tmp_path, store):
    run = run_here(tmp_path, store, train__steps=10, train__save_every=5)
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000010", folder / ".saving-step-00000015")
    (folder / "step-00000010").rename(folder / ".removing-step-00000010")
    (folder / "notes").mkdir()
    run_here(tmp_path, store, resume=True, train__steps=10, train__save_every=5)
    assert names(run) == ["notes", "step-00000005", "step-00000010"]


# ---------------------------------------------------------------- failures


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step_border(
    tmp_path, store, on_seal, monkeypatch
):
    real, done = trainer.optimizer_step, []

    def after_the_thread(*arguments, **keywords):
        done.append(1)
        for thread in threading.enumerate():
            if len(done) == 21 and thread.name == "minilm-save":
                thread.join(60)
        return real(*arguments, **keywords)

    monkeypatch.setattr(trainer, "optimizer_step", after_the_thread)

    def full(folder):
        if "00000020" in folder.name:
            raise OSError(28, "No space left on device")

    on_seal(full)
    with pytest.raises(CheckpointError) as caught:
        run_here(tmp_path, store, train__steps=400, train__save_every=10, train__keep_last=9)
    text = str(caught.value)
    assert "step-00000020 could not be written" in text and "No space left on device" in text
    assert "step-00000010 is the newest one that is complete" in text and "--resume" in text
    run = tmp_path / "run"
    last = column(run, "step")[-1]
    assert 20 <= last <= 21, "it went on"
    assert names(run) == ["step-00000010"] and saved_events(run) == [10]
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["state"], manifest["step"]) == ("failed", last) and "No space left" in manifest["error"]


def test_a_defect_in_the_thread_is_raised_not_lost(tmp_path, store, on_seal):
    def defect(folder):
        raise ZeroDivisionError("a defect")

    on_seal(defect)
    with pytest.raises(ZeroDivisionError):
        run_here(tmp_path, store, train__steps=6)
    assert saved_events(tmp_path / "run") == []


def test_a_damaged_older_checkpoint_neither_ends_the_run_nor_counts_as_the_best(tmp_path, store):
    settings = {"train__steps": 20, "train__save_every": 5, "train__keep_last": 9}
    run = run_here(tmp_path, store, **settings)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    (run / "checkpoints" / "step-00000005" / "trainer.json").write_text('{"validation_loss": ')
    run_here(tmp_path, store, resume=True, **settings | {"train__keep_last": 1})
    assert "step-00000020" in names(run) and "step-00000005" not in names(run)


# ---------------------------------------------------------------- room on the disk


@pytest.mark.parametrize("settings", [
    {"keep_last": 1, "keep_best": False}, {"keep_last": 2}, {"keep_last": 3, "ema_decay": 0.9},
    {"keep_last": 2, "save_every": None}, {"keep_last": 9, "save_every": 4},
])  # fmt: skip
def test_no_more_checkpoints_lie_there_at_once_and_none_is_larger_than_was_asked_for(
    tmp_path, store, on_seal, settings
):
    most, sizes = [0], []

    def look(folder):
        most.append(len(list(folder.parent.glob("*step-*"))))
        sizes.append(sum(len(c) for c in contents(folder).values()))

    on_seal(look)
    config = TrainConfig(**{"steps": 12, "save_every": 2} | settings)
    shown = {name: "none" if value is None else value for name, value in settings.items()}
    changes = {"train__save_every": 2} | {f"train__{name}": value for name, value in shown.items()}
    run_here(tmp_path, store, train__steps=12, **changes)
    assert max(most) <= saving.most_at_once(config, 12) <= max(most) + 1
    needed = checkpoint.bytes_needed(20_128, average=config.ema_decay is not None)
    assert max(sizes) == pytest.approx(
        needed, rel=0.15
    )  # names, settings, random states: small in a real model


def test_a_disk_without_room_for_all_that_is_kept_is_refused_with_the_numbers(tmp_path, monkeypatch):
    config = TrainConfig(steps=100, save_every=10, keep_last=2)
    for free, existing, fits in ((3_999, 0, False), (4_000, 0, True), (1_999, 2, False), (2_000, 2, True)):
        for step in range(existing):
            (tmp_path / f"step-{step:08d}").mkdir(exist_ok=True)
            (tmp_path / f"step-{step:08d}" / "files.json").touch()
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if fits:
            saving.refuse_small_disk(tmp_path, config, num_steps=100, checkpoint_bytes=1_000)
        else:
            with pytest.raises(CheckpointError, match=r"up to 4 lie there at once .*keep_last 2"):
                saving.refuse_small_disk(tmp_path, config, num_steps=100, checkpoint_bytes=1_000)
        monkeypatch.undo()
