"""What goes wrong in a long run: it is kept, told, survived, and nothing that was promised is lost."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import survival_worker
import torch
from safetensors.torch import load_file, save_file
from training_runs import (
    ROOT,
    SETTINGS,
    column,
    final_weights,
    flags,
    launched_script,
    make_store,
    records,
    run_here,
)

from minilm import models
from minilm.__main__ import main as minilm
from minilm.errors import CheckpointError, ConfigError, DataError
from minilm.training import checkpoint, trainer
from minilm.training.incident import Spikes
from minilm.training.step import NonFinite
from minilm.training.watch import layer_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

WORKER = ROOT / "tests" / "survival_worker.py"
# Too small to learn anything: losses go up and down around their mean, and every second one is "a spike".
RESTLESS = {"optim__learning_rate": 1e-5, "train__spike_factor": 0.001, "train__steps": 14}
# So large that the weights of step 1 overflow in the forward of step 2, by themselves.
EXPLODING = {"optim__learning_rate": 1e25, "optim__warmup_steps": 1, "train__steps": 6}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def accidents(monkeypatch):
    """accidents((step, what), ...): planned for the next run in this process, in place of those planned before."""
    real = trainer.optimizer_step

    def plan(*planned):
        monkeypatch.setattr(trainer, "optimizer_step", real)
        survival_worker.plan([{"step": step, "rank": 0, "what": what} for step, what in planned])

    return plan


def incidents(run):
    return sorted((run / "incidents").glob("step-*")) if (run / "incidents").is_dir() else []


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


# ---------------------------------------------------------------- incidents


def test_a_loss_that_overflows_is_kept_and_its_replay_finds_the_same(tmp_path, store, capsys):
    with pytest.raises(
        NonFinite, match=r"The step was not taken(.|\n)*minilm replay .*incidents/step-0000000"
    ):
        run_here(tmp_path, store, **EXPLODING)
    (folder,) = incidents(tmp_path / "run")
    report, last = report_of(folder), records(tmp_path / "run")[-1]
    assert report["kind"] == "nonfinite" and report["step"] == last["step"]
    assert report["loss"] in ("nan", "inf") or report["gradient_norm"] in ("nan", "inf")
    assert report["nonfinite_layers"]
    assert minilm(["replay", str(folder)]) == 0
    assert "equal bit for bit" in capsys.readouterr().out


def test_a_report_is_what_plain_sums_over_the_kept_rows_and_weights_give(tmp_path, store):
    run = run_here(tmp_path, store, **RESTLESS)
    folder = incidents(run)[0]
    report = report_of(folder)
    weights = load_file(next(folder.glob("step-*")) / "model.safetensors")
    # The rows as the text file has them, each document alone, in float64: -log softmax of the next token.
    ids = [
        json.loads(line.partition("ids")[2])
        for line in (folder / "rows.txt").read_text().splitlines()
        if "  ids" in line
    ]
    assert len(ids) == SETTINGS["train.batch_size"]
    model = models.folder.load(next(folder.glob("step-*"))).double()
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for document in ids:
        table = torch.log_softmax(model(torch.tensor([document])).logits[0], dim=-1)
        for place in range(1, len(document)):
            nats, count = nats - table[place - 1, document[place]], count + 1
    (nats / count).backward()
    assert report["loss"] == pytest.approx(float(nats.detach() / count), rel=1e-6)
    named = dict(model.named_parameters())
    assert report["gradient_norm"] == pytest.approx(
        math.sqrt(sum(float(p.grad.square().sum()) for p in named.values())), rel=1e-5
    )
    assert report["layers"].keys() == {layer_of(name) for name in named}
    for layer, numbers in report["layers"].items():
        of_layer = [name for name in named if layer_of(name) == layer]
        norm = math.sqrt(sum(float(weights[n].double().square().sum()) for n in of_layer))
        gradient = math.sqrt(sum(float(named[n].grad.square().sum()) for n in of_layer))
        assert numbers["weight_norm"] == pytest.approx(norm, rel=1e-9)
        assert numbers["gradient_norm"] == pytest.approx(gradient, rel=1e-5)
        assert numbers["nonfinite_weights"] == numbers["nonfinite_gradients"] == 0
    logged = records(run)[report["step"] - 1]
    assert (logged["loss"], logged["gradient_norm"]) == (report["loss"], report["gradient_norm"])


def test_a_replay_is_bit_for_bit_with_dropout_and_micro_batches_and_notices_one_changed_weight(
    tmp_path, store, capsys
):
    run = run_here(tmp_path, store, **RESTLESS, model__dropout=0.2, train__micro_batch=2)
    for folder in incidents(run):
        assert minilm(["replay", str(folder)]) == 0
        assert "equal bit for bit" in capsys.readouterr().out
    before = next(incidents(run)[0].glob("step-*"))
    weights = load_file(before / "model.safetensors")
    weights["norm.weight"][3] += 1e-3
    save_file(weights, before / "model.safetensors", metadata={"format": "pt"})
    assert minilm(["replay", str(before.parent)]) == 2  # damaged, says the checksum
    assert "another checksum" in capsys.readouterr().err
    (before / "files.json").unlink()
    checkpoint._seal(before)
    assert minilm(["replay", str(before.parent)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_counted_by_layer(tmp_path, store, accidents):
    accidents((3, "gradient"))
    with pytest.raises(NonFinite):
        run_here(tmp_path, store, train__steps=6)
    report = report_of(incidents(tmp_path / "run")[0])
    assert report["nonfinite_layers"] == ["embedding"]
    assert report["layers"]["embedding"]["nonfinite_gradients"] == 48 * 32
    assert report["layers"]["blocks.0"]["nonfinite_gradients"] == 0
    assert math.isfinite(report["loss"]) and report["gradient_norm"] == "nan"
    assert minilm(["replay", str(incidents(tmp_path / "run")[0])]) == 1  # it was planted, not computed


def test_a_replay_of_what_is_no_incident_is_refused(tmp_path, store, capsys):
    assert minilm(["replay", str(tmp_path)]) == 2
    assert "is not the report of an incident" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------- spikes


@pytest.mark.parametrize("number", [3, 9, 10, 49, 50, 51, 120])
def test_a_spike_is_above_the_mean_of_the_last_fifty_by_so_many_deviations(number):
    draw = np.random.default_rng(number)
    losses = (3 + draw.normal(size=number)).tolist()
    spikes = Spikes(2.5)
    for loss in [*losses[:5], math.nan, math.inf, *losses[5:]]:
        spikes.add(loss)
    if number < 10:
        assert spikes.limit() is None and not spikes.is_spike(1e9)
        return
    last = losses[-50:]
    limit = sum(last) / len(last) + 2.5 * np.std(last, ddof=1)
    assert spikes.limit() == pytest.approx(limit, rel=1e-12)
    assert spikes.is_spike(limit + 1e-6) and not spikes.is_spike(limit - 1e-6)
    again = Spikes(2.5, json.loads(json.dumps(list(spikes.recent))))  # as a checkpoint keeps them
    assert again.limit() == spikes.limit()


def test_where_the_loss_hardly_moves_a_wobble_is_no_spike():
    spikes = Spikes(3.0, [2.0] * 50)
    assert not spikes.is_spike(2.0 + 3 * 0.02 - 1e-9) and spikes.is_spike(2.0 + 3 * 0.02 + 1e-9)
    assert Spikes(None, [2.0] * 50).limit() is None


def test_keeping_spikes_changes_no_number_and_is_limited(tmp_path, store, monkeypatch):
    from minilm.training import incident

    monkeypatch.setattr(incident, "MOST_SPIKES", 1)
    longer = RESTLESS | {"train__steps": 24}
    plain = run_here(
        tmp_path, store, name="plain", **longer | {"train__spike_factor": "none"}, model__dropout=0.1
    )
    run = run_here(tmp_path, store, **longer, model__dropout=0.1)
    assert column(run, "loss") == column(plain, "loss")
    for name, value in final_weights(run).items():
        assert torch.equal(value, final_weights(plain)[name])
    assert not incidents(plain) and len(incidents(run)) == 1
    told = [r["text"] for r in records(run, "event") if "a spike, above" in r["text"]]
    assert len(told) > 1 and "minilm replay" in told[0] and "not kept, there are 1" in told[1]


# ---------------------------------------------------------------- skipping


def skipped_by_hand(tmp_path, store, step, **changes):
    """The same run, its update of `step` left out without any code for it: the checkpoint before is moved on."""
    run = run_here(tmp_path, store, name="by hand", **changes, train__save_every=step - 1, train__keep_last=9)
    folder = run / "checkpoints" / f"step-{step - 1:08d}"
    for other in (run / "checkpoints").glob("step-*"):
        if other != folder:
            shutil.rmtree(other)
    state = json.loads((folder / "trainer.json").read_text())
    state["step"] = state["loader"]["next_step"] = step
    (folder / "trainer.json").write_text(json.dumps(state))
    moved = folder.rename(folder.with_name(f"step-{step:08d}"))
    (moved / "files.json").unlink()
    checkpoint._seal(moved)
    return run_here(
        tmp_path,
        store,
        name="by hand",
        resume=True,
        **changes,
        train__save_every=step - 1,
        train__keep_last=9,
    )


@pytest.mark.parametrize("what", ["loss", "gradient", "loss only"])
def test_a_skipped_step_changes_nothing_but_the_place_in_data_and_schedule(tmp_path, store, accidents, what):
    accidents((5, what))
    run = run_here(tmp_path, store, train__steps=10, train__on_nonfinite="skip", train__micro_batch=4)
    accidents()
    reference = skipped_by_hand(tmp_path, store, 5, train__steps=10, train__micro_batch=4)
    bad = records(run)[4]
    assert bad["step"] == 5 and bad["skipped"] is True
    assert set(bad["nonfinite"]) == {
        "loss": {"loss", "gradient_norm"}, "gradient": {"gradient_norm"}, "loss only": {"loss"}
    }[what]  # fmt: skip
    assert all("skipped" not in r for r in records(run) if r["step"] != 5)
    assert bad["total_tokens"] == records(run)[3]["total_tokens"]  # nothing was learnt from them
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert column(run, name)[5:] == column(reference, name)[-5:], name
    for name, value in final_weights(run).items():
        assert torch.equal(value, final_weights(reference)[name]), name


def test_a_run_stops_when_its_budget_is_used_up_and_a_resume_remembers_what_was_used(
    tmp_path, store, accidents
):
    settings = {
        "train__steps": 12,
        "train__on_nonfinite": "skip",
        "train__skip_budget": 2,
        "train__save_every": 4,
    }
    accidents((2, "loss"), (3, "gradient"), (6, "loss"))
    with pytest.raises(NonFinite, match=r"2 steps were skipped before"):
        run_here(tmp_path, store, **settings)
    assert column(tmp_path / "run", "step")[-1] == 6 and len(incidents(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "failed"
    accidents((3, "loss"))  # step 7: the first two since the resume at step 4 are good
    with pytest.raises(NonFinite, match=r"2 steps were skipped before"):
        run_here(tmp_path, store, resume=True, **settings)
    run = run_here(tmp_path, store, resume=True, **settings | {"train__skip_budget": 3})
    assert column(run, "step") == list(range(1, 13))


def test_a_first_step_that_is_skipped_can_be_saved_and_resumed(tmp_path, store, accidents):
    """Before the first update there is no optimizer state, and that is no damage."""
    settings = {
        "train__steps": 8,
        "train__on_nonfinite": "skip",
        "train__save_every": 1,
        "train__keep_last": 9,
    }
    accidents((1, "loss"))
    run = run_here(tmp_path, store, **settings)
    losses = column(run, "loss")
    for folder in sorted((run / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    accidents()
    run_here(tmp_path, store, resume=True, **settings)
    assert column(run, "loss")[1:] == losses[1:]


# ---------------------------------------------------------------- one run folder, one run


def started(store, folder, **changes):
    """A run that would go on for hours, as another process; returns when it has done a step."""
    settings = SETTINGS | {
        "data.store": store,
        "run.folder": folder,
        "run.name": "run",
        "train.steps": 100_000,
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags(settings)], stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "run" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.is_file() and '"train"' in metrics.read_text():
            return process
        time.sleep(0.1)
    process.kill()
    raise TimeoutError(process.communicate()[1])


def test_a_second_process_on_the_same_run_folder_is_refused_until_the_first_is_gone(tmp_path, store):
    process = started(store, tmp_path, train__save_every=5)
    try:
        for resume in (False, True):
            with pytest.raises(ConfigError, match=rf"is being written by process {process.pid} on "):
                run_here(tmp_path, store, resume=resume, train__steps=100_000, train__save_every=5)
    finally:
        process.kill()  # -9: nothing is cleaned up
        process.communicate()
    done = column(tmp_path / "run", "step")
    assert done == list(range(1, len(done) + 1))  # the refused ones wrote nothing
    with pytest.raises(ConfigError, match=r"train\.steps: 100000 before, 6 now"):  # the folder is free again
        run_here(tmp_path, store, resume=True, train__steps=6)


# ---------------------------------------------------------------- kill -9


def test_three_kills_at_random_moments_leave_no_trace_in_the_run(tmp_path, store):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import soak
    finally:
        sys.path.pop(0)
    report = soak.soak(tmp_path / "soak", store, kills=3, steps=40, seed=1, quiet=True)
    assert report["differences"] == [] and report["finish_code"] == 0
    assert len(report["trials"]) == 3 and all(trial["code"] == -signal.SIGKILL for trial in report["trials"])
    assert json.loads((tmp_path / "soak" / "soak.json").read_text())["trials"] == report["trials"]
    # The comparison is no formality: one changed number is found.
    path = tmp_path / "soak" / "killed" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"total_tokens": ', '"total_tokens": 1', 1))
    assert soak._differences(tmp_path / "soak" / "killed", tmp_path / "soak" / "undisturbed")


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


def test_a_token_that_no_vocabulary_has_ends_the_run_with_its_metrics_and_checkpoint(tmp_path, store):
    """The file changes under the running process: uint8 ids, 255 is above the vocabulary of 48."""
    own = tmp_path / "store"
    shutil.copytree(store, own)
    shard = next((own / "train").glob("*.tokens.bin"))
    process = started(own, tmp_path, train__save_every=5)
    try:
        for _ in range(600):
            if list((tmp_path / "run" / "checkpoints").glob("step-*")):
                break
            time.sleep(0.1)
        with shard.open("r+b") as file:
            file.write(b"\xff" * shard.stat().st_size)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2 and "Traceback" not in errors, errors[-2000:]
    assert "token id 255" in errors.lower()
    assert checkpoint.find(tmp_path / "run")[0].step > 0
    done = column(tmp_path / "run", "step")
    assert done == list(range(1, len(done) + 1))
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


def test_a_disk_that_fills_up_costs_nothing_that_was_saved(store, small_disk):
    folder = small_disk("size=2m")
    settings = {"train__steps": 12, "train__save_every": 4, "train__keep_last": 9}
    ballast = folder / "ballast"
    ballast.write_bytes(b"x" * 1_400_000)  # leaves room for two checkpoints of 0.27 MB and a part of a third
    with pytest.raises(CheckpointError, match=r"could not be written.*No space left(.|\n)*--resume"):
        run_here(folder, store, **settings, model__dropout=0.1)
    saved = checkpoint.list_checkpoints(folder / "run" / "checkpoints")
    assert saved and not any(checkpoint.damage(c.folder) for c in saved)
    assert column(folder / "run", "step")[-1] == saved[-1].step + 4
    ballast.unlink()
    run = run_here(folder, store, resume=True, **settings, model__dropout=0.1)
    whole = run_here(folder.parent, store, name="whole", **settings, model__dropout=0.1)
    assert column(run, "loss") == column(whole, "loss")
    for name, value in final_weights(run).items():
        assert torch.equal(value, final_weights(whole)[name])


def test_an_incident_that_does_not_fit_on_the_disk_is_told_and_the_policy_goes_on(
    tmp_path, store, accidents, monkeypatch
):
    real = checkpoint._seal

    def seal(folder):
        if "incidents" in folder.parts:
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(checkpoint, "_seal", seal)
    accidents((3, "loss"))
    run = run_here(tmp_path, store, train__steps=6, train__on_nonfinite="skip")
    assert column(run, "step") == [1, 2, 3, 4, 5, 6]
    assert any("not kept" in r["text"] and "No space left" in r["text"] for r in records(run, "event"))


# ---------------------------------------------------------------- two ranks


def on_two(folder, store, launcher, accidents_planned, *more, **changes):
    settings = SETTINGS | {"data.store": store, "run.folder": folder, "run.name": "two", "train.ranks": 2}
    settings |= {"train.micro_batch": 2, "train.steps": 16, "train.save_every": 1, "train.keep_last": 99}
    settings |= {"train.on_nonfinite": "skip", "optim.learning_rate": 1e-4, "train.spike_factor": 0.001}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return launched_script(
        WORKER, [json.dumps(accidents_planned), *flags(settings), *more], launcher=launcher
    ), folder / "two"


@pytest.mark.xdist_group("two ranks")
@pytest.mark.parametrize(
    ("launcher", "precision", "what"),
    [
        ("cpu2.yaml", "fp32", "gradient"),
        ("cpu2_zero2.yaml", "bf16", "gradient"),
        ("cpu2_zero2.yaml", "fp32", "loss only"),
    ],
)
def test_two_ranks_skip_together_bit_for_bit_and_one_process_replays_them(
    tmp_path, store, launcher, precision, what, capsys
):
    accident = [{"step": 4, "rank": 1, "what": what}]
    result, run = on_two(tmp_path, store, launcher, accident, train__precision=precision)
    assert result.returncode == 0, result.stderr[-3000:]
    bad = records(run)[3]
    assert bad["skipped"] is True and bad["nonfinite"].keys() == {
        "gradient_norm" if what == "gradient" else "loss"
    }
    folders = [run / "checkpoints" / f"step-{step:08d}" for step in (3, 4, 5)]
    for name in ("model.safetensors", "optimizer.safetensors"):  # float32 masters, moments and their counts
        before, skipped, after = (load_file(folder / name) for folder in folders)
        for key, value in skipped.items():
            assert torch.equal(value, before[key]), key
        assert any(not torch.equal(value, after[key]) for key, value in skipped.items())
    # Nothing of the step is left in the wrappers: fresh processes that never saw it go on with the same numbers.
    losses, norms, weights = column(run, "loss"), column(run, "gradient_norm"), final_weights(run)
    for folder in sorted((run / "checkpoints").glob("step-*"))[4:]:
        shutil.rmtree(folder)
    kept = incidents(run)
    assert [report_of(folder)["kind"] for folder in kept[:2]] == ["nonfinite", "spike"]
    assert minilm(["replay", str(kept[1])]) == 0, capsys.readouterr()
    result, run = on_two(tmp_path, store, launcher, [], "--resume", train__precision=precision)
    assert result.returncode == 0, result.stderr[-3000:]
    assert column(run, "loss")[4:] == losses[4:] and column(run, "gradient_norm")[4:] == norms[4:]
    for name, value in final_weights(run).items():
        assert torch.equal(value, weights[name]), name
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert json.loads((newest / "trainer.json").read_text())["num_skipped"] == 1
