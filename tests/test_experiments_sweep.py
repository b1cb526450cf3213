"""`minilm sweep`: from one file to many runs and one table, whatever happens on the way."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiment_runs import manifest, train_line
from training_runs import SETTINGS, make_store

from minilm.__main__ import main
from minilm.errors import ConfigError
from minilm.run import load_config
from minilm.sweeping import running, table
from minilm.sweeping.definition import Planned, Sweep, read
from minilm.sweeping.progress import standing, standings, strangers
from minilm.sweeping.running import Runner, devices_of, train_command

# Stands in for training: takes as long as it is told, saves when asked to stop, and notes when it began and ended.
STUB = """
import json, os, signal, sys, time
folder, record, text, seconds, code = json.loads(sys.argv[1])
def end(state, code):
    os.makedirs(folder, exist_ok=True)
    open(folder + "/metrics.jsonl", "w").write(text)
    open(folder + "/manifest.json", "w").write(json.dumps(record | {"state": state}))
    note("end")
    sys.exit(code)
def note(what):
    with open(os.path.dirname(folder) + "/notes", "a") as file:
        device = os.environ.get("CUDA_VISIBLE_DEVICES")
        file.write(json.dumps([what, os.path.basename(folder), time.time(), device]) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: end("interrupted", 143))
signal.signal(signal.SIGINT, lambda *_: None)
note("start")
time.sleep(seconds)
if code:
    print("warming up")
    print("DataError: the store went away.\\nMake it again.\\n(--debug shows the traceback)", file=sys.stderr)
    end("failed", code)
end("finished", 0)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a store and base.yaml, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "store", 30)
    sections: dict[str, dict[str, Any]] = {}
    for name, value in (
        SETTINGS | {"data.store": "store", "train.steps": 2, "optim.warmup_steps": 0}
    ).items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path


def written(place: Path, text: str) -> Path:
    (place / "s.yaml").write_text(text)
    return place / "s.yaml"


GRID = """\
config: base.yaml
seeds: [3, 4]
set:
  train.steps: 2
grid:
  optim.learning_rate: [1.0e-3, 0.01]
  model.num_layers: [1, 2]
"""


def test_a_grid_becomes_its_combinations_with_their_settings(place: Path) -> None:
    sweep = read(written(place, GRID))
    want = [(rate, layers, seed) for rate in (1e-3, 0.01) for layers in (1, 2) for seed in (3, 4)]
    names = ("optim.learning_rate", "model.num_layers", "train.seed")
    assert [tuple(run.settings[name] for name in names) for run in sweep.runs] == want
    assert [run.name for run in sweep.runs][:3] == [
        "learning_rate=0.001,num_layers=1,seed=3",
        "learning_rate=0.001,num_layers=1,seed=4",
        "learning_rate=0.001,num_layers=2,seed=3",
    ]
    assert sweep.folder == Path("runs/s") and sweep.runs[0].folder == Path("runs/s") / sweep.runs[0].name
    for run in sweep.runs:  # what train.py makes of the words that it gets
        config = load_config(place / "base.yaml", run.flags).value
        assert (config.optim.learning_rate, config.model.num_layers, config.train.seed) == tuple(
            run.settings[name] for name in names
        )
        assert config.run_folder == run.folder and config.train.steps == 2


def test_a_list_keeps_its_points_and_odd_values_survive(place: Path) -> None:
    (place / "other").mkdir()
    sweep = read(written(place, """\
config: base.yaml
list:
  - {sample.prompts: ["a, b", "c"], train.epochs: null}
  - {data.store: ./store, optim.name: muon}
  - {data.store: other/../store, optim.name: muon}
"""))  # fmt: skip
    assert [run.seed for run in sweep.runs] == [None] * 3
    assert load_config(place / "base.yaml", sweep.runs[0].flags).value.sample.prompts == ["a, b", "c"]
    names = [run.name for run in sweep.runs]
    assert len(set(names)) == 3 and names[1].startswith("store=store,name=muon-")  # the same last part
    assert all(set(name) & set('/ "[') == set() for name in names)


def test_every_problem_is_said_at_once_with_its_line(place: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(written(place, """\
config: base.yaml
seeds: [1, 1]
folders: runs/x
set: {train.steps: 2, run.name: mine}
grid:
  train.steps: [1, 2]
  optim.learning_rate: 3
"""))  # fmt: skip
    told = str(error.value)
    for part in ("s.yaml:2: seeds must be", "s.yaml:3: unknown key folders", "s.yaml:4: run.name is decided",
                 "s.yaml:7: optim.learning_rate must have a list"):  # fmt: skip
        assert part in told, told
    with pytest.raises(ConfigError) as error:
        read(written(place, """\
config: base.yaml
seeds: [1, 2]
grid:
  optim.learning_rat: [1]
  train.batch_size: [8, 0, nine]
"""))  # fmt: skip
    told = str(error.value)
    assert "s.yaml:4: Unknown setting optim.learning_rat. Did you mean optim.learning_rate" in told
    assert "s.yaml:5: train.batch_size: input should be greater than 0, not '0'" in told
    assert told.startswith("3 problems:") and "not 'nine'" in told  # each once, although six runs have them
    for text, part in (
        ("config: base.yaml\nset: {data.store: nowhere}\n", "s.yaml:2: There is no store nowhere"),
        ("config: other.yaml\n", "s.yaml:1: there is no settings file"),
        ("config: base.yaml\nconfig: base.yaml\n", "s.yaml:2: config was given before, in line 1"),
        ("- 1\n", "is not a sweep"),
        ("seeds: [1]\nset: {train.seed: 2}\n", "s.yaml:2: train.seed is what `seeds` sets"),
        (
            "set: {train.steps: 1}\ngrid: {train.steps: [2]}\n",
            "train.steps is set for all runs and differs too",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            read(written(place, text))
        assert part in str(error.value)


def planned(folder: Path, name: str, rate: float, seed: int, **settings: Any) -> Planned:
    settings = {"train.seed": seed, "optim.learning_rate": rate, "train.steps": 1} | settings
    return Planned(name, {"optim.learning_rate": rate}, seed, (), settings, "d1", folder / name)


def sweep_of(folder: Path, number: int = 3) -> Sweep:
    rates = [0.1, 0.2, 0.3, 0.4]
    runs = [
        planned(folder, f"rate={rate},seed={seed}", rate, seed)
        for rate in rates[:number]
        for seed in (0, 1, 2)
    ]
    return Sweep(folder / "s.yaml", folder, None, tuple(runs))


def words(
    run: Planned, *, loss: float | None = 2.0, seconds: float = 0.0, code: int = 0, bits: float = 1.0
) -> str:
    record = manifest(run.settings, {}, "running", 1)
    last = {"kind": "validation", "step": 1, "unix_seconds": 1.0, "loss": loss, "bits_per_byte": bits}
    if loss is None:
        last["nonfinite"] = {"loss": "nan"}
    earlier = last | {"step": 0, "loss": 0.5, "nonfinite": {}}
    text = "".join(json.dumps(line) + "\n" for line in (earlier, train_line(1, 0.0), last))
    return json.dumps([str(run.folder), record, text, seconds, code])


def stubbed(sweep: Sweep, told: list[str], *, jobs: int = 3, devices: list[str] | None = None, stop: bool = False,
            **behaviour: dict[str, Any]) -> Runner:  # fmt: skip
    """behaviour: name of a run with its words (`_` for `=` and `,`)."""

    def command(_: Sweep, run: Planned) -> list[str]:
        plain = run.name.replace("=", "_").replace(",", "_").replace(".", "_")
        return [sys.executable, "-c", STUB, words(run, **behaviour.get(plain, behaviour.get("every", {})))]

    return Runner(sweep, jobs=jobs, devices=devices, stop_on_failure=stop, say=told.append, command=command)


def notes(sweep: Sweep) -> list[list[Any]]:
    return [json.loads(line) for line in (sweep.folder / "notes").read_text().splitlines()]


def test_so_many_at_a_time_each_on_its_own_device(tmp_path: Path) -> None:
    sweep, told = sweep_of(tmp_path / "s", 2), []
    runner = stubbed(sweep, told, jobs=2, devices=["5", "7"], every={"seconds": 0.3})
    assert runner.run(sweep.runs) is None and runner.failed == {}
    found, busy, most = notes(sweep), set(), 0
    for what, _, _, device in sorted(found, key=lambda note: note[2]):
        assert device in ("5", "7") and (device in busy) == (what == "end")
        busy ^= {device}
        most = max(most, len(busy))
    assert most == 2 and len(found) == 12 and all(standing(run).state == "finished" for run in sweep.runs)


def test_a_failure_stops_no_other_run_unless_asked(tmp_path: Path) -> None:
    sweep, told = sweep_of(tmp_path / "s", 1), []
    runner = stubbed(sweep, told, jobs=1, rate_0_1_seed_0={"code": 3})
    assert runner.run(sweep.runs) is None
    reason = runner.failed["rate=0.1,seed=0"]
    assert reason == "failed, exit code 3: DataError: the store went away. Make it again."
    assert [standing(run).state for run in sweep.runs] == ["failed", "finished", "finished"]
    again, told = sweep_of(tmp_path / "t", 1), []
    stubbed(again, told, jobs=1, stop=True, rate_0_1_seed_0={"code": 3}).run(again.runs)
    assert [standing(run).state for run in again.runs] == ["failed", "new", "new"]
    assert "2 runs are not started: --stop-on-failure." in told


def test_ctrl_c_lets_the_runs_save_and_they_go_on_later(tmp_path: Path) -> None:
    sweep, told = sweep_of(tmp_path / "s", 1), []

    def interrupt() -> None:
        while not (sweep.folder / "notes").exists() or len(notes(sweep)) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    former = signal.getsignal(signal.SIGINT)
    assert stubbed(sweep, told, jobs=2, every={"seconds": 60.0}).run(sweep.runs) == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is former
    assert [standing(run).state for run in sweep.runs] == ["interrupted", "interrupted", "new"]
    assert any(text.startswith("stopping: 2 runs save and end") for text in told)
    due = [one.run for one in standings(sweep) if one.is_due]
    assert due == list(sweep.runs)
    stubbed(sweep, told).run(due)
    assert not [one for one in standings(sweep) if one.is_due]


def test_asked_twice_it_ends_runs_that_do_not_listen(tmp_path: Path) -> None:
    sweep, told = sweep_of(tmp_path / "s", 1), []
    deaf = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"

    def interrupt() -> None:
        log = running.log_of(sweep.runs[0])
        while not (log.exists() and "deaf" in log.read_text()):
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)

    threading.Thread(target=interrupt, daemon=True).start()
    runner = Runner(sweep, jobs=1, devices=None, stop_on_failure=False, say=told.append,
                    command=lambda *_: [sys.executable, "-c", deaf])  # fmt: skip
    began = time.monotonic()
    assert runner.run(sweep.runs) == signal.SIGINT
    assert "ended without saving" in told and time.monotonic() - began < 50


def test_a_changed_definition_is_refused_and_strangers_are_named(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path / "s", 1)
    stubbed(sweep, []).run(sweep.runs)
    assert [one.state for one in standings(sweep)] == ["finished"] * 3 and strangers(sweep) == []
    first = planned(sweep.folder, "rate=0.1,seed=0", 0.1, 0, **{"train.steps": 9, "track.log_every": 3})
    other = Planned(*(getattr(sweep.runs[1], f) for f in ("name", "point", "seed", "flags", "settings")), "d2",
                    sweep.runs[1].folder)  # fmt: skip
    with pytest.raises(ConfigError) as error:
        standings(Sweep(sweep.file, sweep.folder, None, (first, other)))
    told = str(error.value)
    assert "rate=0.1,seed=0 (finished): train.steps was 1, now 9." in told and "log_every" not in told
    assert "its data are no longer those of" in told and "Give another `folder`" in told
    assert strangers(Sweep(sweep.file, sweep.folder, None, (first,))) == [
        "rate=0.1,seed=1",
        "rate=0.1,seed=2",
    ]


def test_the_table_against_numbers_made_by_hand(tmp_path: Path) -> None:
    """Losses 2, 2.5, 3.25: mean 31/12; squared deviations sum to 114/144; sd sqrt(57/144) with n - 1."""
    sweep = sweep_of(tmp_path / "s", 4)
    losses = {"0_1": (3.0, 3.0, 3.0), "0_2": (2.0, 2.5, 3.25), "0_3": (None, 1.0, 1.0)}
    behaviour = {f"rate_{rate}_seed_{seed}": {"loss": loss, "bits": 1.0 + seed}
                 for rate, found in losses.items() for seed, loss in enumerate(found)}  # fmt: skip
    behaviour |= {
        "rate_0_4_seed_0": {"code": 1},
        "rate_0_4_seed_1": {"loss": 9.0},
        "rate_0_4_seed_2": {"code": 1},
    }
    stubbed(sweep, [], jobs=4, **behaviour).run(sweep.runs)
    told = table.table(sweep, standings(sweep))
    assert [row["point"]["optim.learning_rate"] for row in told["rows"]] == [
        0.2,
        0.1,
        0.4,
        0.3,
    ]  # best first, nan last
    best, second, third, last = told["rows"]
    assert best["validation_loss"]["mean"] == pytest.approx(31 / 12, rel=1e-14)
    assert best["validation_loss"]["deviation"] == pytest.approx(math.sqrt(57 / 144), rel=1e-14)
    assert best["bits_per_byte"] == {"mean": 2.0, "deviation": 1.0, "n": 3}
    assert best["tokens_per_second"]["mean"] == pytest.approx(181 / 0.5)
    assert second["validation_loss"] == {"mean": 3.0, "deviation": 0.0, "n": 3}
    assert third["validation_loss"] == {"mean": 9.0, "deviation": None, "n": 1}
    assert third["missing"] == {"rate=0.4,seed=0": "failed", "rate=0.4,seed=2": "failed"}
    assert math.isnan(last["validation_loss"]["mean"])  # the run that diverged is not left out of its mean
    files = table.write(sweep, told)
    text = files[0].read_text()
    assert "| 0.2 | 2.5833 ± 0.6292 | 2.0000 ± 1.0000 | 362 ± 0 | 3 |  |" in text
    assert "| 0.4 | 9.0000 | 1.0000 | 362 | 1 | rate=0.4,seed=0 (failed), rate=0.4,seed=2 (failed) |" in text
    found = json.loads(files[1].read_text())
    assert found["rows"][3]["validation_loss"]["mean"] == "nan" and len(found["runs"]) == 12
    assert len(told["notes"]) == 1


def test_losses_on_other_data_are_not_called_comparable(tmp_path: Path) -> None:
    runs = (planned(tmp_path, "a", 0.1, 0), planned(tmp_path, "b", 0.2, 0, **{"train.validation_rows": 7}))
    sweep = Sweep(tmp_path / "s.yaml", tmp_path, None, runs)
    stubbed(sweep, []).run(sweep.runs)
    assert "not comparable" in table.table(sweep, standings(sweep))["notes"][1]


def test_commands_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of(tmp_path, 1)
    plain = train_command(sweep, sweep.runs[0])
    assert plain == [sys.executable, "-m", "minilm", "train", "--resume"]
    launched = train_command(sweep, sweep.runs[0], "--config_file 'a b.yaml'")
    assert launched[3:7] == ["launch", "--config_file", "a b.yaml", "--main_process_port"]
    assert launched[8:] == plain[1:]
    assert launched[7] != train_command(sweep, sweep.runs[0], "")[5]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices_of(2) is None
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_of(3) == ["0", "1", "2"] and devices_of(9) == ["0", "1", "2", "3"]
    assert devices_of(2, 2) == ["0,1", "2,3"] and devices_of(1, 5) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,2,4,3")
    assert devices_of(2) == ["6", "2"] and devices_of(3, 2) == ["6,2", "4,3"]


def test_from_the_command_line_with_real_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(place, "config: base.yaml\nfolder: out\nseeds: [1]\ngrid: {optim.learning_rate: [0.01]}\n")
    assert main(["sweep", str(file), "--dry-run"]) == 0
    assert "would" in capsys.readouterr().out and not (place / "out").exists()
    assert main(["sweep", str(file)]) == 0
    said = capsys.readouterr()
    assert "[1/1] learning_rate=0.01,seed=1: finished" in said.err and "tokens/s" in said.out
    row = json.loads((place / "out" / "table.json").read_text())["rows"][0]
    lines = (place / "out" / "learning_rate=0.01,seed=1" / "metrics.jsonl").read_text().splitlines()
    validations = [json.loads(line) for line in lines if '"validation"' in line]
    assert row["validation_loss"]["mean"] == validations[-1]["loss"] and validations[-1]["step"] == 2
    assert main(["sweep", str(file)]) == 0  # nothing is left to do
    assert "started" not in capsys.readouterr().err
    written(place, file.read_text().replace("seeds", "set: {train.batch_size: 4}\nseeds"))
    assert main(["sweep", str(file), "--jobs", "0"]) == 2 and main(["sweep", str(file)]) == 2
    assert "train.batch_size was 8, now 4" in " ".join(capsys.readouterr().err.split())
