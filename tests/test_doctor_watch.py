"""The quick suite before a run and the watch during it: silent on healthy runs, awake on planted bugs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_stores import store_of
from training_runs import SETTINGS, VOCAB, final_weights, flags, launched, make_store, records, run_here

from minilm import models
from minilm.alignment import Batch, align, score
from minilm.doctor import watch
from minilm.doctor.core import Finding, passed
from minilm.doctor.watch import Watch
from minilm.errors import CheckFailed
from minilm.models.attention import Plan
from minilm.training import optim, step, trainer
from minilm.training.layout import Layout

WATCHED: dict[str, Any] = {"doctor__watch": "true", "doctor__watch_share": 0.9, "train__steps": 12}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("watch") / "store")


def failures(run: Path) -> list[str]:
    return [e["text"] for e in records(run, "event") if " FAIL " in e["text"]]


def test_a_healthy_run_is_checked_watched_and_not_changed_by_it(store: Path, tmp_path: Path) -> None:
    plain = run_here(tmp_path / "plain", store, train__steps=12)
    run = run_here(tmp_path / "watched", store, doctor__check="quick", train__micro_batch=2, **WATCHED)
    looks = records(run, "doctor")
    assert len(looks) >= 2
    assert all(look["failures"] == 0 and look["replay_error"] < 1e-5 for look in looks)
    assert not failures(run)
    kept = json.loads((run / "manifest.json").read_text())["checks"]
    assert kept["counts"]["FAIL"] == 0 and kept["counts"]["PASS"] > 15
    again = run_here(tmp_path / "again", store, train__steps=12, train__micro_batch=2)
    weights, watched = final_weights(again), final_weights(run)
    assert all(torch.equal(weights[name], watched[name]) for name in weights)
    assert [r["loss"] for r in records(again, "train")] == [r["loss"] for r in records(run, "train")]
    assert len(records(plain, "train")) == 12


def test_dropout_and_packed_rows_raise_no_alarm(store: Path, tmp_path: Path) -> None:
    run = run_here(tmp_path, store, model__dropout=0.2, data__rows="packed", doctor__check="quick", **WATCHED)
    assert records(run, "doctor") and not failures(run)


class Clocked:
    """A watch over steps of `step_seconds` each, in which looks and the work at every step take as long as is said."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, step_seconds: float, look: float, standing: float = 0.0
    ):
        self.now, self.step_seconds, self.look, self.standing = 100.0, step_seconds, look, standing
        self.notes: dict[int, float] = {}  # step of a look -> share of time, counted here
        self.watching = 0.0
        monkeypatch.setattr(watch.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(watch, "_modes", self._costs_its_time)
        self.watch = Watch(
            planned_rates=lambda _: {}, precision="fp32", has_dropout=True, steps_per_epoch=10**6,
            report=lambda *_: None, note=lambda number, _: self.notes.update({number: 0.0}), share=0.01,
        )  # fmt: skip
        for name in ("_frame", "_random_floor"):
            monkeypatch.setattr(watch, name, lambda _: passed("healthy", 0, 0, check="x"))
        monkeypatch.setattr(self.watch, "_gradients", lambda _: passed("healthy", 0, 0, check="y"))

    def _costs_its_time(self, _: Any) -> Finding:
        taken = self.standing + (self.look if self.watch._looking else 0.0)
        self.now, self.watching = self.now + taken, self.watching + taken
        return passed("healthy", 0, 0, check="z")

    def train(self, first: int, last: int) -> None:
        view = SimpleNamespace(
            model=None, micro_batches=[], layout=SimpleNamespace(
                world_size=1, all_reduce=lambda values: values, autocast=contextlib.nullcontext
            )
        )  # fmt: skip
        begun = self.now
        for number in range(first, last + 1):
            view.step = number
            assert self.watch.wants(number)
            self.watch.before_update(view)  # type: ignore[arg-type]
            self.now += self.step_seconds
            self.watch.after_step(view, {})  # type: ignore[arg-type]
            if number in self.notes:
                self.notes[number] = self.watching / (self.now - begun)


@pytest.mark.parametrize("first", [1, 501], ids=["from the start", "resumed"])
def test_looks_keep_their_share_of_the_time_from_the_first_one_on(
    monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    clocked = Clocked(monkeypatch, step_seconds=0.33, look=0.17)
    clocked.train(first, first + 1999)
    steps = [step - first + 1 for step in clocked.notes]
    assert steps[0] == 75  # 0.75 / 0.01, whatever the clock says
    assert all(share <= 0.0101 for share in clocked.notes.values()), clocked.notes
    # None is missing: 0.17 s are 1 % of 17 s, which is 51.5 steps.
    assert len(steps) == pytest.approx(2000 / 51.5, abs=1.5)
    assert all(share >= 0.0095 for share in list(clocked.notes.values())[1:])


def test_what_the_watch_does_at_every_step_is_part_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, step_seconds=0.33, look=0.17, standing=0.0015)  # alone 0.45 %
    clocked.train(1, 3000)
    first, *others = clocked.notes.values()
    assert first == pytest.approx(0.17 / (75 * 0.33) + 0.0045, abs=1e-3)  # not foreseen in the number 75
    assert len(others) > 10 and all(share <= 0.0101 for share in others)


def test_where_every_step_alone_costs_more_than_the_share_looks_become_rare_and_do_not_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocked = Clocked(monkeypatch, step_seconds=0.01, look=0.01, standing=0.0005)
    clocked.train(1, 20_000)
    assert 1 < len(clocked.notes) < 20


@pytest.mark.parametrize(
    ("rows", "positions", "sizes"),
    [(5, 1, [1] * 5), (8, 64, [2] * 4), (8, 10_000, [4, 4]), (7, 10_000, [3, 3, 1]), (1, 10_000, [1])],
)
def test_a_step_is_computed_again_in_groups_smaller_than_its_own(
    monkeypatch: pytest.MonkeyPatch, rows: int, positions: int, sizes: list[int]
) -> None:
    model, seen = models.build(models.preset("original", "tiny")), []
    tokens = torch.randint(0, 256, (rows, 33))
    batch = align(tokens, torch.ones_like(tokens))
    layout = SimpleNamespace(device=torch.device("cpu"), all_reduce=lambda values: values)
    view = SimpleNamespace(model=model, layout=layout, micro_batches=[batch])
    monkeypatch.setitem(watch.REPLAYED_POSITIONS, "cpu", positions)
    model.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    with torch.no_grad():
        nats, counted = watch._replay(view)  # type: ignore[arg-type]
        assert seen == sizes
        whole = score(model(batch.inputs, batch.segments, batch.positions).logits, batch)
    assert counted == rows * 32 and nats == pytest.approx(float(whole.nats), rel=1e-6)


def test_rows_have_one_number_each_and_another_one_for_every_other_row() -> None:
    tokens = torch.randint(0, 6400, (64, 512))
    changed = tokens.clone()
    changed[torch.arange(64), torch.arange(64)] += 1
    turned = tokens.flip(1)
    keys = [watch._keys(x) for x in (tokens, tokens.clone(), changed, turned)]
    assert keys[0] == keys[1] and len({*keys[0], *keys[2], *keys[3]}) == 3 * 64
    assert watch._keys(tokens[3:5]) == keys[0][3:5]  # whatever stands beside it


def _scaled_log(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step.optimizer_step

    def scaled(layout: Layout, micro_batches: Any, **kwargs: Any) -> Any:
        result = whole(layout, micro_batches, **kwargs)
        larger = result.loss._replace(nats=result.loss.nats * len(micro_batches))
        return dataclasses.replace(result, loss=larger)

    monkeypatch.setattr(trainer, "optimizer_step", scaled)


def _eval_mode_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step.optimizer_step

    def evaluating(layout: Layout, micro_batches: Any, **kwargs: Any) -> Any:
        layout.model.eval()
        return whole(layout, micro_batches, **kwargs)

    monkeypatch.setattr(trainer, "optimizer_step", evaluating)


def _rate_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    true = optim.set_rate
    monkeypatch.setattr(optim, "set_rate", lambda optimizer, rate: true(optimizer, 2 * rate))


def _shifted_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    from minilm.data import loader

    true = loader.align

    def unshifted(*given: Any, **more: Any) -> Batch:
        batch = true(*given, **more)
        return dataclasses.replace(batch, targets=batch.inputs.clone())

    monkeypatch.setattr(loader, "align", unshifted)


def _frozen_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from minilm.models.parts import SwiGLU

    true = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: true(self, x).detach())


def _eval_is_another_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from minilm.models.parts import Attention

    true = Attention.forward

    def other(self: Attention, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        return true(self, x, plan) if self.training else true(self, x, plan) * 0

    monkeypatch.setattr(Attention, "forward", other)


def _same_rows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from minilm.data.loader import Loader

    true = Loader._rows_of
    monkeypatch.setattr(Loader, "_rows_of", lambda self, step: true(self, step % 3))


PLANTED = {
    "watch_loss": _scaled_log,
    "watch_mode": _eval_mode_kept,
    "watch_schedule": _rate_twice,
    "watch_targets": _shifted_targets,
    "watch_gradients": _frozen_block,
    "watch_modes": _eval_is_another_path,
    "watch_rows": _same_rows_again,
}


@pytest.mark.parametrize("check", PLANTED)
def test_the_watch_finds_what_is_planted_into_our_own_trainer(
    check: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANTED[check](monkeypatch)
    settings = WATCHED | {"train__steps": 45, "train__micro_batch": 2}
    run = run_here(tmp_path, store, train__validate_every=None, **settings)
    assert any(text.startswith(f"{check} FAIL") for text in failures(run)), records(run, "doctor")
    if check == "watch_loss":
        assert "the number of micro-batches too large" in failures(run)[0]


def test_a_model_that_sees_its_target_is_found_by_random_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minilm.models import attention

    monkeypatch.setattr(
        attention, "allowed", lambda queries, keys: queries[:, None, :, None] == keys[:, None, None, :]
    )
    draw = np.random.default_rng(0)  # nothing can be learnt of these documents, but by looking ahead
    random = store_of(
        tmp_path / "random", {"a": draw.integers(0, VOCAB, (200, 25)).tolist()}, vocab_size=VOCAB
    )
    settings = WATCHED | {"train__steps": 400, "model__attention": "eager", "optim__learning_rate": 1e-2}
    run = run_here(tmp_path, random.path, **settings)
    assert any(text.startswith("watch_random FAIL") for text in failures(run))


def test_a_failure_can_stop_the_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scaled_log(monkeypatch)
    with pytest.raises(CheckFailed, match="computed again"):
        run_here(tmp_path, store, doctor__on_failure="stop", train__micro_batch=2, **WATCHED)


def test_a_bug_in_the_model_stops_the_run_before_it_costs_anything(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minilm.models import attention

    monkeypatch.setattr(
        attention, "allowed", lambda queries, keys: queries[:, None, :, None] == keys[:, None, None, :]
    )
    eager = {"model__attention": "eager", "train__steps": 6}
    with pytest.raises(CheckFailed, match=r"causality[\s\S]*mask-missing[\s\S]*--doctor.check=off"):
        run_here(tmp_path, store, doctor__check="quick", **eager)
    run = run_here(
        tmp_path, store, doctor__check="off", **eager
    )  # the name is free, and the omission is written down
    assert json.loads((run / "manifest.json").read_text())["checks"]["suite"] == "off"


def test_the_flag_check_off_is_said_at_the_end(store: Path, tmp_path: Path) -> None:
    given = {k: v for k, v in SETTINGS.items() if k != "doctor.check"}
    given |= {"data.store": store, "run.folder": tmp_path, "run.name": "a", "train.steps": 6}
    done = launched([*flags(given), "--check", "off"])
    assert "unchecked: doctor.check is off" in done.stderr
