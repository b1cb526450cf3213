"""train.micro_batch auto: the largest number of rows that fits, on one rank and on two, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from training_runs import ROOT, SETTINGS, column, final_weights, flags, launched_script, make_store, run_here

from minilm import launch, models
from minilm.alignment import align
from minilm.errors import ConfigError, OutOfMemory
from minilm.run import load_config
from minilm.training import fitting
from minilm.training.estimate import Memory
from minilm.training.fitting import Room

GB = 10**9


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


class OneRank:
    """What the search needs of a layout."""

    rank, world_size, kind, bf16 = 0, 1, "single", False
    device, device_type = torch.device("cpu"), "cpu"

    def __init__(self, rows, accumulation=1):
        self.micro_batch, self.accumulation = rows, accumulation

    def all_reduce(self, values):
        return values

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


def per_row(rows, size=GB, fixed=2 * GB, **more):
    """An estimate: 2 GB, and 1 GB for each row."""
    given = {"gradients": 0, "optimizer": 0, "average": 0, "buckets": 0, "logits": 0} | more
    return Memory(weights=fixed, activations=rows * size, **given)


# ---------------------------------------------------------------- the search


def test_by_the_estimate_the_largest_divisor_within_the_share_is_taken():
    # 70 % of 20 GB are 14 GB: 12 rows and the 2 GB fit exactly; of 24 rows the divisors are 24, 12, 8, ...
    found = fitting.largest(OneRank(24), per_row, Room(20 * GB, "here"), None)
    assert found.rows == 12
    assert fitting.largest(OneRank(24), per_row, Room(20 * GB - 10, "here"), None).rows == 8
    assert fitting.largest(OneRank(23), per_row, Room(20 * GB, "here"), None).rows == 1  # a prime number
    assert fitting.largest(OneRank(4, accumulation=6), per_row, Room(20 * GB, "here"), None).rows == 12
    beside = fitting.largest(OneRank(24), per_row, Room(20 * GB, "here"), None, beside=1)
    assert beside.rows == 8
    for text in ("12 of a rank's 24 rows", "70%", "14.00 GB", "20.00 GB free: here"):
        assert text in found.told


def test_on_a_device_sizes_are_tried_from_what_the_estimate_may_be_wrong_by():
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= 5

    # 1.15 x 12.2 GB are 14.03 GB: 12 rows may fit, 24 cannot.
    found = fitting.largest(OneRank(24), per_row, Room(12_200_000_000, "of a GPU"), fits)
    assert (found.rows, tried) == (4, [12, 8, 6, 4])
    assert "tried on the device" in found.told


def test_a_model_that_nobody_has_derived_is_tried_from_the_top_and_refused_where_nothing_can_be_tried():
    def unknown(rows):
        return dataclasses.replace(per_row(rows), activations=None)

    assert fitting.largest(OneRank(8), unknown, Room(1, "of a GPU"), lambda rows: rows <= 2).rows == 2
    with pytest.raises(ConfigError, match=r"--train\.micro_batch=4"):
        fitting.largest(OneRank(8), unknown, Room(GB, "here"), None)


def test_one_row_is_tried_even_where_the_estimate_says_no():
    assert fitting.largest(OneRank(8), per_row, Room(GB, "of a GPU"), lambda rows: rows == 1).rows == 1


@pytest.mark.parametrize("fits", [None, lambda rows: False], ids=["by the estimate", "tried"])
def test_where_not_one_row_fits_the_error_has_every_part_and_what_to_do(fits):
    def needed(rows):
        return per_row(rows, gradients=3 * GB, optimizer=4 * GB)

    with pytest.raises(OutOfMemory) as told:
        fitting.largest(OneRank(8), needed, Room(GB, "of the limit"), fits, beside=5 * GB)
    text = str(told.value)
    for part in (
        "weights 2",
        "gradients 3",
        "optimizer 4",
        "activations 1",
        "is written 5",
        "1 GB (of the limit)",
    ):
        assert part in text
    assert "activation_checkpointing half or blocks" in text and "--train.micro_batch=1" in text


# ---------------------------------------------------------------- the trial


def a_trial(memory=None):
    """A small model with dropout, on a CPU."""
    config = models.preset("original", "tiny", dropout=0.1)

    def batch_of(rows):
        tokens = torch.randint(0, 256, (rows, 33), generator=torch.Generator().manual_seed(1))
        return align(tokens, torch.ones_like(tokens))

    nothing = per_row(0, size=0, fixed=0)
    return fitting.trial(OneRank(8), config, lambda rows: memory or nothing, batch_of, recompute="none")


def test_a_trial_is_forward_and_backward_of_so_many_rows_and_leaves_the_random_state_as_it_was(monkeypatch):
    seen, real = [], fitting.Objective.forward

    def forward(self, batch):
        seen.append((batch.shape, self.training, torch.rand(()).item()))
        return real(self, batch)

    monkeypatch.setattr(fitting.Objective, "forward", forward)
    before = torch.get_rng_state()
    with a_trial() as fits:
        assert fits(4) and fits(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [shape for shape, _, _ in seen] == [(4, 32), (2, 32)] and all(training for _, training, _ in seen)


def test_a_trial_does_two_micro_batches_where_a_step_has_several(monkeypatch):
    gradients, real = [], fitting.Objective.forward

    def forward(self, batch):
        gradients.append(self.model.embedding.weight.grad is not None)
        return real(self, batch)

    monkeypatch.setattr(fitting.Objective, "forward", forward)
    with a_trial(memory=per_row(0, size=0, fixed=0, accumulates=True)) as fits:
        assert fits(2) and fits(2)
    assert gradients == [False, True, False, True]  # each trial begins without


def test_a_trial_keeps_room_for_what_comes_with_the_first_update(monkeypatch):
    sizes = []
    monkeypatch.setattr(fitting, "_held", lambda layout, size: sizes.append(size))
    memory = per_row(0, optimizer=100, average=20, buckets=3, gradients=4 * 32_928 + 7)
    with a_trial(memory=memory) as fits:
        assert fits(1)
    assert sizes == [123, 7]  # of the gradients, what the trial does not make itself


def test_out_of_memory_is_caught_with_nothing_left_and_other_errors_are_not(monkeypatch):
    """By a backward pass that ends after it has made some gradients."""
    objectives = []
    real = fitting._objective
    monkeypatch.setattr(
        fitting, "_objective", lambda *given: objectives.append(real(*given)) or objectives[-1]
    )
    error = torch.OutOfMemoryError("CUDA out of memory")

    def full(gradient):
        raise error

    with a_trial() as fits:
        assert fits(2)
        handle = objectives[0].model.embedding.weight.register_hook(full)
        assert not fits(2)
        assert all(p.grad is None for p in objectives[0].parameters())
        handle.remove()
        assert fits(2)
        error = RuntimeError("a defect")
        objectives[0].model.embedding.weight.register_hook(full)
        with pytest.raises(RuntimeError, match="a defect"):
            fits(2)
    assert len(objectives) == 1


# ---------------------------------------------------------------- what is free


def group(folder, names, limit, used, stat):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


@pytest.mark.parametrize(
    ("own", "groups", "free"),
    [
        # A group of version 2 below one with a smaller limit; pages of files can be given up.
        ("0::/a/b", {"a/b": (V2, "max", 5, {}), "a": (V2, 10_000, 4_000, {"inactive_file": 900, "active_file": 100})},
         7_000),
        # Version 1, with the group mounted as the root, as containers see it; the sums over groups below count.
        ("5:cpu:/x\n4:memory:/docker/12", {"memory": (V1, 8_000, 6_000, {"inactive_file": 1, "total_inactive_file": 500,
                                                                        "total_active_file": 0})}, 2_500),
        ("0::/", {"": (V2, 3_000, 3_500, {})}, 0),  # over its limit already
        ("0::/", {"": (V2, "max", 3_500, {})}, 1_000_000),
        ("0::/", {}, 1_000_000),  # no files: another system
    ],
)  # fmt: skip
def test_the_limit_of_a_container_counts_where_it_is_less_than_what_the_machine_has(
    tmp_path, monkeypatch, own, groups, free
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 1_000_000})())
    (tmp_path / "own").write_text(own + "\n")
    for place, (names, limit, used, stat) in groups.items():
        group(tmp_path / "groups" / place, names, limit, used, stat)
    room = fitting.cpu_room(1, groups=tmp_path / "groups", own=tmp_path / "own")
    assert room.free == free
    assert ("container" in room.where) == (free < 1_000_000)
    assert fitting.cpu_room(4, groups=tmp_path / "groups", own=tmp_path / "own").free == free // 4
    assert fitting.cpu_room(1, groups=tmp_path, own=tmp_path / "absent").free == 1_000_000


# ---------------------------------------------------------------- whole runs


def room_for(monkeypatch, rows, store, **changes):
    """As if there were just enough memory for so many rows of the test model."""
    from minilm import preview
    from minilm.data.loader import open_data
    from minilm.training.layout import Layout

    settings = SETTINGS | {"data.store": store, "train.steps": 6}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    config = load_config(None, flags(settings)).value
    layout = Layout(config.train.asked(None))
    needed, beside = preview.memory_by_rows(config, layout, open_data(config.data))
    room = Room(int((needed(rows).peak + beside) / fitting.CPU_SHARE) + 10, "by a test")
    monkeypatch.setattr(fitting, "room_of", lambda layout: room)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_takes_what_fits_says_so_and_is_the_run_with_that_number(tmp_path, store, monkeypatch):
    room_for(monkeypatch, 2, store)
    plain = run_here(tmp_path, store, name="plain", train__steps=6, train__micro_batch=2)
    run = run_here(tmp_path, store, train__steps=6, train__micro_batch="auto")
    assert column(run, "loss") == column(plain, "loss")
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["micro_batch"] == 2
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["config"]["train.micro_batch"] == 2
    assert manifest["origins"]["train.micro_batch"] == "auto (--train.micro_batch)"
    events = [json.loads(line).get("text", "") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("train.micro_batch auto: 2 of a rank's 8 rows per forward" in text for text in events)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_resumed_run_finds_the_number_anew_and_goes_on_with_the_same_steps(tmp_path, store, monkeypatch):
    plain = run_here(tmp_path, store, name="plain", train__steps=12, train__micro_batch=4)
    room_for(monkeypatch, 4, store)
    run_here(
        tmp_path,
        store,
        train__steps=12,
        train__save_every=6,
        train__micro_batch="auto",
        train__max_tokens=800,
    )
    assert (done := len(column(tmp_path / "run", "step"))) < 12
    room_for(monkeypatch, 2, store)  # somebody else came
    run = run_here(
        tmp_path, store, resume=True, train__steps=12, train__save_every=6, train__micro_batch="auto"
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["micro_batch"] == 2
    assert column(run, "step") == list(range(1, 13))
    assert column(run, "loss")[:done] == column(plain, "loss")[:done]
    assert column(run, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
    for name, value in final_weights(run).items():
        torch.testing.assert_close(value, final_weights(plain)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_dry_run_shows_the_number_and_a_run_without_room_writes_nothing(
    tmp_path, store, monkeypatch, capsys
):
    settings = SETTINGS | {
        "data.store": store,
        "run.folder": tmp_path,
        "train.steps": 6,
        "train.micro_batch": "auto",
    }
    room_for(monkeypatch, 4, store)
    assert launch.train(load_config(None, flags(settings)), resume=False, dry_run=True) == 0
    page = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "train.micro_batch auto: 4 of a rank's 8 rows per forward" in page
    assert "* train.micro_batch 4 auto (--train.micro_batch)" in page
    assert "2 x 4 rows" in page and "rows a forward 4 " in page
    monkeypatch.setattr(fitting, "room_of", lambda layout: Room(1000, "by a test"))
    with pytest.raises(OutOfMemory, match="not even one row"):
        launch.train(load_config(None, flags(settings)), resume=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["0", "-2", "some", "true"])
def test_other_values_are_refused_with_what_may_be_given(store, value):
    given = SETTINGS | {"data.store": store, "train.steps": 6, "train.micro_batch": value}
    with pytest.raises(ConfigError, match="a number of rows from 1 on, auto or none"):
        load_config(None, flags(given))


def test_a_file_may_say_auto_and_not_true(store, tmp_path):
    for value, taken in (("auto", "auto"), ("4", 4), ("null", None)):
        file = tmp_path / "run.yaml"
        file.write_text(f"data: {{store: {store}}}\ntrain: {{steps: 200, micro_batch: {value}}}\n")
        train = load_config(file).value.train
        assert train.micro_batch == taken and train.rows_per_forward == (taken if taken == 4 else None)
    file.write_text(f"data: {{store: {store}}}\ntrain: {{steps: 200, micro_batch: true}}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2.*a number of rows from 1 on, auto or none"):
        load_config(file)


@pytest.mark.parametrize("launcher", ["cpu2.yaml", "cpu2_zero2.yaml"])
def test_two_ranks_agree_on_the_smaller_number_and_train_with_it(tmp_path, store, launcher):
    """By a stand-in for a device that ends at 4 rows on the first rank and at 2 on the second."""
    given = SETTINGS | {
        "data.store": store, "run.folder": tmp_path, "run.name": "run", "train.steps": 6, "train.batch_size": 8,
        "train.micro_batch": "auto", "train.ranks": 2,
    }  # fmt: skip
    result = launched_script(ROOT / "tests" / "fitting_worker.py", ["4,2", *flags(given)], launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    found = sorted(
        (json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")),
        key=lambda x: x["rank"],
    )
    assert [one["tried"] for one in found] == [[4], [4, 2]]
    assert [(one["rows"], one["accumulation"]) for one in found] == [(2, 2), (2, 2)]
    assert len(column(tmp_path / "run", "loss")) == 6
    assert "mismatch" not in result.stderr + result.stdout  # what Accelerate says where its copy differs


def test_where_one_rank_has_no_room_all_end(tmp_path, store):
    given = SETTINGS | {
        "data.store": store, "run.folder": tmp_path, "train.steps": 6, "train.micro_batch": "auto", "train.ranks": 2,
    }  # fmt: skip
    result = launched_script(
        ROOT / "tests" / "fitting_worker.py", ["4,0", *flags(given)], launcher="cpu2.yaml"
    )
    assert result.returncode == 2
    assert result.stderr.count("OutOfMemory: train.micro_batch auto: not even one row") == 2
    assert "fits on another rank" in result.stderr and list(Path(tmp_path).iterdir()) == []
