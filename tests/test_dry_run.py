"""--dry-run: every number on the page is that of the run that follows, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from training_runs import SETTINGS, flags, launched, make_store, records, run_here

from minilm import launch, preview
from minilm.config import flatten
from minilm.data.loader import open_data
from minilm.errors import CheckpointError, ConfigError, DataError
from minilm.run import load_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def dry(capsys, folder, store, *, resume=False, **changes):
    """The page, as it is piped into a file."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = SETTINGS | {"data.store": store, "run.folder": folder, "run.name": "run"}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    assert launch.train(load_config(None, flags(settings)), resume=resume, dry_run=True) == 0
    return capsys.readouterr().out


def numbers(page, name):
    """The numbers in the (possibly folded) text beside a name."""
    text = re.search(rf"^{re.escape(name)} +(.*(?:\n {{3,}}.*)*)", page, re.MULTILINE)[1]
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?", text)]


def test_nothing_is_written_and_the_page_fits_80_columns_without_colours(tmp_path, store, capsys):
    page = dry(capsys, tmp_path / "runs", store, train__steps=20)
    assert list(tmp_path.iterdir()) == []
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) <= 80


def test_every_setting_is_there_with_where_it_comes_from(tmp_path, store):
    sections: dict[str, dict] = {}
    for key, value in (SETTINGS | {"data.store": str(store), "train.steps": 20}).items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump(sections))
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "sequence_length" in text)
    given = ["--optim.learning_rate=0.004", f"--run.folder={tmp_path / 'runs'}"]
    result = launched(["--config", str(file), "--dry-run", *given])
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "runs").exists()
    page = re.sub(r"\s+", " ", result.stdout)
    assert f"* data.sequence_length 24 given.yaml:{line} " in page
    assert re.search(r"\* optim\.learning_rate 0\.004 --optim\.learning_ ?rate", page)
    assert " optim.final_rate 0.1 default" in page and "* optim.final_rate" not in page
    shown = set(re.findall(r"^[* ]  ([a-z_]+\.[a-z_0-9]+)", result.stdout, re.MULTILINE))
    known = set(flatten(load_config(file).value))
    assert shown == known


def test_steps_tokens_and_rates_are_those_of_the_run_that_follows(tmp_path, store, capsys):
    changes = {"train__epochs": 1, "train__micro_batch": 4, "data__rows": "document"}
    page = dry(capsys, tmp_path, store, **changes)
    run = run_here(tmp_path, store, **changes)
    rows = records(run)
    steps, _ = numbers(page, "steps")
    assert steps == len(rows)
    positions, targets = numbers(page, "planned tokens")
    assert positions == len(rows) * 8 * 24
    left_over = numbers(page, "an epoch")[2]
    assert targets == pytest.approx(rows[-1]["total_tokens"], rel=0.02 + left_over / (8 * len(rows)))
    assert numbers(page, "first step") == [pytest.approx(rows[0]["learning_rate"], rel=1e-3)]
    assert numbers(page, "after warm-up, step 5") == [pytest.approx(rows[4]["learning_rate"], rel=1e-3)]
    last = numbers(page, f"last step, {len(rows)}")
    assert last == [pytest.approx(rows[-1]["learning_rate"], rel=1e-3)]


def test_the_checkpoint_is_as_large_as_said(tmp_path, store, capsys):
    for changes in ({}, {"train__ema_decay": 0.9}, {"optim__name": "muon"}):
        name = "-".join(changes) or "plain"
        page = dry(capsys, tmp_path, store, train__steps=6, **changes)
        run = run_here(tmp_path, store, name=name, train__steps=6, **changes)
        folder = next((run / "checkpoints").glob("step-*"))
        # The tensors: at this size, headers and random states weigh as much as they do.
        held = sum(f.stat().st_size - header_bytes(f) for f in folder.glob("*.safetensors"))
        assert preview.size(held) in re.search(r"^checkpoint +(.*?) *$", page, re.MULTILINE)[1]


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_the_average_number_of_targets_is_counted_row_by_row_with_the_sources_weights(tmp_path, store):
    from data_stores import store_of
    from training_runs import VOCAB, documents

    store_of(tmp_path / "two", {"a": documents(60), "b": [[1, 2, 3]] * 40}, validation={}, vocab_size=VOCAB)
    for kind in ("packed", "document"):
        for weights in ({}, {"b": 3.0}, {"a": 2.0, "b": 0.0}):
            given = SETTINGS | {"data.store": tmp_path / "two", "data.rows": kind, "data.weights": weights}
            given |= {"train.steps": 9}
            rows = open_data(load_config(None, flags(given)).value.data).train
            counted = []
            for row in rows.order(0, 0):
                _, segments = rows[int(row)]
                pairs = zip(segments.tolist(), segments.tolist()[1:], strict=False)
                counted.append(sum(1 for before, after in pairs if before == after != 0))
            # Over one epoch with whole weights every row of a source comes equally often.
            average = sum(counted) / len(counted)
            assert rows.targets_per_row == pytest.approx(average, rel=1e-9)


def test_two_decoded_rows_of_the_first_step(tmp_path, store, capsys):
    page = dry(capsys, tmp_path, store, train__steps=20)
    run = run_here(tmp_path, store, train__steps=6, train__save_every=3)
    titles = re.findall(r"^row (\d+): a document \d+ · (\d+) targets", page, re.MULTILINE)
    assert len(titles) == 2
    rows = open_data(load_config(run).value.data).train
    wanted = rows.order(0, 0)[:2].tolist()
    assert [int(row) for row, _ in titles] == wanted
    for row, (_, targets) in zip(wanted, titles, strict=True):
        tokens, segments = rows[row]
        assert int(targets) == int((segments != 0).sum()) - 1  # one document a row
        assert re.search(rf"^ +0 +{tokens[0]}  -> +{tokens[1]} ", page, re.MULTILINE)


def test_a_run_to_be_resumed_stands_where_its_checkpoint_is(tmp_path, store, capsys):
    run_here(tmp_path, store, train__steps=12, train__save_every=6)
    with pytest.raises(ConfigError, match="is in use"):
        dry(capsys, tmp_path, store, train__steps=12)
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*"))
    page = dry(capsys, tmp_path, store, resume=True, train__steps=12)
    assert "Two rows of step 13" in page and numbers(page, "stands after step") == [12, 0]
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train__micro_batch": 3}, ConfigError, r"must be a multiple of 3"),
        ({"train__batch_size": 4000}, ConfigError, r"more than the \d+ rows of an epoch"),
        ({"data__store": "nowhere"}, DataError, r"nowhere"),
        ({"train__device": "cuda"}, ConfigError, r"no CUDA device is visible"),
        ({"model__attention": "flash"}, ConfigError, r"flash"),
    ],
)
def test_problems_are_errors_as_in_a_real_start(tmp_path, store, capsys, changes, error, message):
    with pytest.raises(error, match=message):
        dry(capsys, tmp_path, store, **({"train__steps": 10} | changes))
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_an_error_and_too_little_memory_a_warning(tmp_path, store, capsys, monkeypatch):
    monkeypatch.setattr(preview.psutil, "virtual_memory", lambda: type("", (), {"available": 1000})())
    assert "WARNING" in dry(capsys, tmp_path, store, train__steps=10)
    monkeypatch.undo()
    assert "WARNING" not in dry(capsys, tmp_path, store, train__steps=10)
    usage = preview.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(preview.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"A checkpoint takes about .* free"):
        dry(capsys, tmp_path, store, train__steps=10)


def test_two_ranks_print_one_page(tmp_path, store):
    given = SETTINGS | {"data.store": store, "run.folder": tmp_path / "runs", "train.steps": 6}
    result = launched([*flags(given), "--dry-run"], launcher="cpu2_zero2.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Dry run of") == 1
    assert "DeepSpeed ZeRO-2 on 2 rank(s)" in re.sub(r"\s+", " ", result.stdout)
    assert not (tmp_path / "runs").exists()
