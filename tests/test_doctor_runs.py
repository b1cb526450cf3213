"""What training leaves behind is examined end to end: a run, its settings, its checkpoint, a folder made of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import site
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data_stores import store_of
from evaluation_checkpoint import Made, make_run
from training_runs import SETTINGS, documents, make_store, run_here

import minilm
from minilm.__main__ import main
from minilm.doctor.report import Examination
from minilm.doctor.specimens.ranks import pool
from minilm.examination import subject_of
from minilm.models.hf import to_hf
from minilm.training.layout import Layout

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("targets") / "store")


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a tokenizer, with everything turned on that a check asks for."""
    more = {"train__activation_checkpointing": "blocks", "train__ema_decay": 0.9, "model__dropout": 0.1}
    return run_here(tmp_path_factory.mktemp("runs"), store, train__steps=6, train__micro_batch=2, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint with a tokenizer, and the store that belongs to it."""
    return make_run(tmp_path_factory.mktemp("texts"))


def statuses(examination: Examination) -> dict[str, str]:
    return {f.check: f.status for f in examination.findings}


def one(target: Any, check: str, **more: Any) -> Any:
    return minilm.examine(target, only=[check], **more).findings[0]


# ---- what a run hands over -----------------------------------------------------------------------------------


def test_a_healthy_run_passes_whatever_can_be_asked_of_it(run: Path) -> None:
    examination = minilm.examine(run)
    said = statuses(examination)
    assert not examination.of("FAIL"), [(f.check, f.message) for f in examination.of("FAIL")]
    for check in ("rank_parity", "rank_state", "reference_agrees", "recompute", "average", "validation_rows"):
        assert said[check] == "PASS", (check, examination.of("NOT RUN"))
    assert {f.check: f.message for f in examination.findings}["rank_state"].count("differs")  # dropout


def test_a_checkpoint_with_a_tokenizer_shows_its_texts(made: Made) -> None:
    said = statuses(
        minilm.examine(made.checkpoint, only=["encoding", "byte_lengths", "vocabulary", "rows_shown"])
    )
    assert set(said.values()) == {"PASS"}
    message = one(made.run_folder, "byte_lengths").message
    assert "bits per byte are reported" in message


class OnRank:
    """Runs a check's function on a rank where `plant` has broken our layout."""

    def __init__(self, function: Callable[..., Any], plant: Callable[[], Any]) -> None:
        self.function, self.plant = function, plant

    def __call__(self, training: Callable[..., Any], rank: int, world: int) -> Any:
        with self.plant():
            return self.function(training, rank, world)


@contextlib.contextmanager
def never_exchanged() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "accumulating", lambda self, *, last: self.accelerator.no_sync(self.objective))
        yield


@contextlib.contextmanager
def one_seed_for_all() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "seed_dropout", lambda self, seed: torch.manual_seed(seed))
        yield


@contextlib.contextmanager
def own_count() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "all_reduce", lambda self, values: values)
        yield


@pytest.mark.parametrize(
    ("check", "plant", "bug"),
    [
        ("rank_parity", never_exchanged, "no-grad-sync"),
        ("rank_parity", own_count, "ddp-mean-of-rank-means"),
        ("rank_state", one_seed_for_all, "dropout-same-on-ranks"),
    ],
)
def test_a_defect_of_our_trainer_on_ranks_is_found(
    run: Path, check: str, plant: Callable[[], Any], bug: str
) -> None:
    subject = subject_of(run)
    pool(2).run(site.addsitedir, str(HERE))  # so that the processes find this file
    ranks = subject.ranks
    assert ranks is not None
    broken = subject.but(ranks=lambda function, world: ranks(OnRank(function, plant), world))
    finding = one(broken, check)
    assert finding.status == "FAIL" and bug in finding.bugs, finding


def test_a_reference_that_computes_otherwise_is_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minilm.models import parts

    true = parts.SwiGLU.forward
    monkeypatch.setattr(parts.SwiGLU, "forward", lambda self, x: true(self, x) * 1.05)
    finding = one(run, "reference_agrees")
    assert finding.status == "FAIL", finding


def test_a_recomputation_with_other_dropout_is_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.checkpoint import checkpoint

    from minilm.training import passing

    def forgetful(*given: Any, **how: Any) -> Any:
        import torch.utils.checkpoint as library  # the name that the check exchanges for a plain call

        return library.checkpoint(*given, **{**how, "preserve_rng_state": False})

    monkeypatch.setattr(passing, "checkpoint", forgetful)
    assert checkpoint is not forgetful
    finding = one(run, "recompute")
    assert finding.status == "FAIL" and "grad-none-ckpt" in finding.bugs, finding


def test_an_average_with_its_decay_on_the_wrong_side_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minilm.training import ema

    true = ema.get_ema_multi_avg_fn
    monkeypatch.setattr(ema, "get_ema_multi_avg_fn", lambda decay: true(1 - decay))
    finding = one(run, "average")
    assert finding.status == "FAIL" and finding.bugs == ("ema-beta-swapped",), finding


def test_validation_that_drops_its_last_batch_is_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minilm.doctor.targets import our_data

    true = our_data.validation_batches

    def dropped(rows: Any, batch_rows: int, rank: int, world: int) -> Iterator[Any]:
        yield from list(true(rows, batch_rows, rank, world))[:-1]

    monkeypatch.setattr(our_data, "validation_batches", dropped)
    finding = one(run, "validation_rows")
    assert finding.status == "FAIL" and "last-partial-dropped" in finding.bugs, finding


# ---- a run as TARGET -----------------------------------------------------------------------------------------


def settings_file(folder: Path, store: Path) -> Path:
    nested: dict[str, Any] = {}
    for name, value in (SETTINGS | {"data.store": str(store), "train.steps": 20}).items():
        section, key = name.split(".")
        nested.setdefault(section, {})[key] = value
    nested["doctor"]["watch"] = False
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(nested))
    return file


def test_a_settings_file_is_examined_with_fresh_weights(store: Path, tmp_path: Path) -> None:
    file = settings_file(tmp_path, store)
    said = statuses(minilm.examine(str(file), only=["initial_loss", "frozen", "determinism", "epoch_ledger"]))
    assert set(said.values()) == {"PASS"}


def test_data_names_another_store(run: Path, store: Path, tmp_path: Path) -> None:
    leaking = store_of(
        tmp_path / "leaking", {"a": documents(90)}, validation={"a": documents(12)}, vocab_size=48
    )
    for target in (str(run), str(settings_file(tmp_path, store))):
        assert main(["doctor", target, "--only", "held_out"]) == 0
        assert main(["doctor", target, "--only", "held_out", "--data", str(leaking.path)]) == 1
        assert main(["doctor", target, "--only", "held_out", "--data", str(tmp_path / "gone")]) == 2


def test_a_run_whose_store_is_gone_is_examined_without_it(made: Made, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(made.run_folder, moved)
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace(str(made.store.path), str(tmp_path / "gone")))
    examination = minilm.examine(moved, only=["causality", "epoch_ledger"])
    assert statuses(examination) == {"causality": "PASS", "epoch_ledger": "NOT RUN"}


def test_a_hugging_face_folder_with_its_tokenizer(made: Made, tmp_path: Path) -> None:
    to_hf(made.model, bos_id=1, eos_id=2, pad_id=0).save_pretrained(tmp_path)
    made.tokenizer.save(tmp_path)
    wanted = ["causality", "cache_parity", "loss_identity", "vocabulary", "save_load"]
    assert set(statuses(minilm.examine(tmp_path, only=wanted)).values()) == {"PASS"}
    assert main(["doctor", str(tmp_path), "--only", ",".join(wanted)]) == 0


# ---- an unchecked run says so --------------------------------------------------------------------------------


def test_results_of_an_unchecked_run_say_so(run: Path, made: Made, tmp_path: Path, capsys: Any) -> None:
    import eval as evaluation_script

    said, file = "this run was trained unchecked (--check off)", tmp_path / "scores.json"
    given = ["--device", "cpu", "--samples", "0", "--prompt-lengths", "2", "--continuation-tokens", "2"]
    assert evaluation_script.main(["--checkpoint", str(run), "--json", str(file), *given]) == 0
    assert said in capsys.readouterr().out and json.loads(file.read_text())["checks"] == said
    assert evaluation_script.main(["--checkpoint", str(made.run_folder), "--json", str(file), *given]) == 0
    assert said not in capsys.readouterr().out and "checks" not in json.loads(file.read_text())


def test_generated_text_of_an_unchecked_run_says_so_on_stderr(
    made: Made, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(made.run_folder, tmp_path / "run")
    given = ["generate", "--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--max-new-tokens", "2"]
    for checks_of_run, times in (({"suite": "quick"}, 0), ({"suite": "off"}, 1)):
        (tmp_path / "run" / "manifest.json").write_text(
            json.dumps({"state": "finished", "checks": checks_of_run})
        )
        assert main([*given, "--prompt", "the"]) == 0
        shown = capsys.readouterr()
        assert shown.err.count("trained unchecked") == times and "unchecked" not in shown.out
