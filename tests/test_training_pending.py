"""Numbers of a step that are read a step later: the run is that which looks at every step, bit for bit."""

from __future__ import annotations

import itertools
import os
import signal

import pytest
import torch
from deferred_runs import WAITS_ON, Batches, assert_the_same, both_ways
from safetensors.torch import load_file
from training_runs import column, incidents, make_store, records, run_here

from minilm import launch
from minilm.data.loader import Loader
from minilm.errors import DataError
from minilm.training import clock, limits, optim, pending
from minilm.training.layout import Layout
from minilm.training.optim import OptimConfig
from minilm.training.step import NonFinite

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# 15 steps an epoch. Step 1 has no optimizer state before it, after the others something is due: they are looked at.
RUN = {"train__steps": 17, "train__save_every": 6, "train__validate_every": 10, "train__usage_every": "none"}
RUN |= {"train__keep_last": 9, "model__dropout": 0.1}
AWAITED = {1, 6, 10, 12, 17}
SKIP = {"train__on_nonfinite": "skip"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


@pytest.mark.parametrize(
    "settings",
    [
        {"train__micro_batch": 4, "train__ema_decay": 0.9},
        {"data__rows": "packed", "train__usage_every": 4, "train__sample_every": 7, "train__norms_every": 9},
        {"model__name": "moe", "model__num_experts": 4, "train__micro_batch": 2, "optim__clip_norm": "none"},
    ],
    ids=["documents, an average", "packed, columns at intervals", "auxiliary losses, no clipping"],
)
def test_a_run_that_reads_later_is_the_run_that_looks_at_every_step(tmp_path, store, monkeypatch, settings):
    looked, later = both_ways(tmp_path, store, monkeypatch, **RUN | settings)
    assert_the_same(looked, later)
    assert looked[2].are("StepResult") == list(range(17))
    more = {4, 7, 8, 9, 14, 16} if "train__usage_every" in settings else set()
    assert later[2].are("StepResult") == [step - 1 for step in sorted(AWAITED | more)]
    assert later[2].are("Unread") == [step - 1 for step in range(1, 18) if step not in AWAITED | more]
    if "model__name" in settings:
        assert all(r["auxiliary/balance"] > 0 for r in records(later[0]))


# Batch b comes in step b + 1. Then: the batches in whose step it is found out that the device refused the one before.
ACCIDENTS = {
    "in the middle": ({3: "loss"}, [4]),
    "a gradient alone": ({3: "gradient"}, [4]),
    "the loss alone": ({7: "logged loss"}, [8]),
    "right before a save": ({4: "loss"}, [5]),
    "the step that is saved": ({5: "gradient"}, []),
    "right after a save": ({6: "loss"}, [7]),
    "before the last": ({15: "loss"}, [16]),
    "the last": ({16: "gradient"}, []),
    "the first two": ({0: "loss", 1: "loss"}, []),
    "two in a row, and another": ({2: "loss", 3: "gradient", 7: "loss"}, [3, 4, 8]),
}


@pytest.mark.parametrize("what", ACCIDENTS)
def test_a_step_that_is_not_finite_is_skipped_as_if_it_had_been_looked_at(tmp_path, store, monkeypatch, what):
    accidents, found_out = ACCIDENTS[what]
    average = {"train__ema_decay": 0.9} if what == "in the middle" else {}
    looked, later = both_ways(tmp_path, store, monkeypatch, accidents, **RUN | SKIP | average)
    assert_the_same(looked, later)
    assert looked[2].are("NonFinite") == later[2].are("NonFinite") == list(accidents)
    assert later[2].are("TakeAgain") == found_out and not looked[2].are("TakeAgain")
    assert len(incidents(later[0])) == len(accidents)


@pytest.mark.parametrize(
    ("accidents", "settings", "step"),
    [
        ({3: "loss"}, {}, 4),
        ({4: "gradient"}, {}, 5),
        ({5: "loss"}, {}, 6),
        ({16: "loss"}, {}, 17),
        ({3: "loss", 6: "loss", 12: "gradient"}, SKIP | {"train__skip_budget": 2}, 13),
    ],
    ids=[
        "in the middle",
        "right before a save",
        "the step that is saved",
        "the last",
        "the budget is used up",
    ],
)
def test_a_step_that_is_not_finite_stops_the_run_before_it(
    tmp_path, store, monkeypatch, accidents, settings, step
):
    kept = {}

    def stop_at(layout):
        kept["layout"] = layout

    planned = accidents | {2: stop_at}
    looked, later = both_ways(tmp_path, store, monkeypatch, planned, **RUN | settings)
    assert_the_same(looked, later)
    assert isinstance(later[1], NonFinite) and column(later[0], "step")[-1] == step
    # The weights in memory are those that the incident has of before the step.
    saved = next(incidents(later[0])[-1].glob("step-*")) / "model.safetensors"
    before = load_file(saved)
    for name, parameter in kept["layout"].model.named_parameters():
        if name in before:
            assert torch.equal(parameter.detach(), before[name]), name


def test_a_step_that_is_finite_when_it_is_computed_again_is_taken_and_told(tmp_path, store, monkeypatch):
    monkeypatch.setattr(Layout, "WAITS_ON", WAITS_ON)
    with monkeypatch.context() as patch:
        accidents = {3: "gradient"}
        batches = Batches(patch, accidents)
        accidents[4] = lambda layout: accidents.pop(3, None)  # when it is found out, the cause is gone
        run = run_here(tmp_path, store, name="again", **RUN)
    assert batches.are("TakeAgain") == [4] and not incidents(run)
    (told,) = [r for r in records(run, "event") if "computed again" in r["text"]]
    assert told["step"] == 4 and "not finite at first" in told["text"]
    plain = run_here(tmp_path, store, name="plain", **RUN)
    assert column(run, "loss") == column(plain, "loss")


@pytest.mark.parametrize("accidents", [{}, {7: "loss"}], ids=["finite", "after one that is not finite"])
def test_an_error_finds_the_step_before_it_in_the_log(tmp_path, store, monkeypatch, accidents):
    """Data that cannot be read, one step after a step that nobody has looked at."""
    real = Loader._step

    def torn(loader, step):
        if step == 8:
            raise DataError("the shard was cut off")
        return real(loader, step)

    monkeypatch.setattr(Loader, "_step", torn)
    looked, later = both_ways(tmp_path, store, monkeypatch, accidents, **RUN)
    assert_the_same(looked, later)
    assert isinstance(later[1], NonFinite if accidents else DataError)
    assert column(later[0], "step")[-1] == 8


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_the_other_does(tmp_path, store, monkeypatch):
    asked = {7: lambda layout: os.kill(os.getpid(), signal.SIGTERM)}
    looked, later = both_ways(tmp_path, store, monkeypatch, asked, **RUN)
    assert_the_same(looked, later)
    # It comes within step 8: the next one is the last.
    assert column(later[0], "step")[-1] == 9 and (later[0] / "checkpoints" / "step-00000009").is_dir()
    looked, later = both_ways(tmp_path, store, monkeypatch, resume=True, **RUN)
    assert_the_same(looked, later)
    assert column(later[0], "step") == list(range(1, 18)) and later[2].are("Unread")


def test_budgets_end_both_runs_after_the_same_step(tmp_path, store, monkeypatch):
    free = run_here(tmp_path, store, name="free", **RUN)
    tokens = column(free, "total_tokens")[8] - 1  # reached within step 9
    looked, later = both_ways(tmp_path, store, monkeypatch, train__max_tokens=tokens, **RUN)
    assert_the_same(looked, later)
    assert column(later[0], "step")[-1] == 9 and later[2].are("Unread") == [1, 2, 3, 4, 6]

    now = [0.0]
    minute = dict.fromkeys(range(17), lambda layout: now.__setitem__(0, now[0] + 60))
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    looked, later = both_ways(tmp_path / "minutes", store, monkeypatch, minute, train__max_minutes=8.5, **RUN)
    assert_the_same(looked, later)
    assert column(later[0], "step")[-1] == 9 and later[2].are("Unread")


def test_what_looks_for_spikes_and_other_optimizers_look_at_every_step(tmp_path, store, monkeypatch):
    short = RUN | {"train__steps": 12}
    for settings in ({"train__spike_factor": 0.001}, {"optim__name": "muon"}):
        folder = tmp_path / next(iter(settings))
        looked, later = both_ways(folder, store, monkeypatch, **short | settings)
        assert_the_same(looked, later)
        assert not later[2].are("Unread")


def test_on_a_cpu_every_step_is_looked_at(tmp_path, store, monkeypatch):
    with monkeypatch.context() as patch:
        batches = Batches(patch)
        run_here(tmp_path, store, **RUN | {"train__steps": 8})
    assert len(batches.are("StepResult")) == 8


# ---------------------------------------------------------------- watchers


class Notes:
    """A watcher that writes down how it is called. patient: it can wait, but for every fifth step."""

    def __init__(self, patient):
        self.calls, self.values = [], {}
        if patient:
            self.can_wait = lambda step: step % 5 != 0

    def wants(self, step):
        self.calls.append(("wants", step))
        return step != 7

    def before_update(self, view):
        self.calls.append(("before", view.step))

    def after_step(self, view, values):
        self.calls.append(("after", view.step))
        self.values[view.step] = dict(values)
        return {"note": view.step}


@pytest.mark.parametrize("patient", [True, False])
def test_watchers_see_steps_one_after_another_whenever_they_are_read(tmp_path, store, monkeypatch, patient):
    seen, real = [], launch._observers

    def observers(*arguments):
        watchers, profiler = real(*arguments)
        seen.append(Notes(patient))
        return [*watchers, seen[-1]], profiler

    monkeypatch.setattr(launch, "_observers", observers)
    short = RUN | {"train__steps": 13, "train__save_every": 100}
    looked, later = both_ways(tmp_path, store, monkeypatch, **short)
    assert_the_same(looked, later)
    calls = [
        (what, step)
        for step in range(1, 14)
        for what in (("wants", "before", "after") if step != 7 else ("wants",))
    ]
    assert seen[0].calls == seen[1].calls == calls
    for record in records(later[0]):
        if record["step"] != 7:
            assert record["note"] == record["step"]
            assert seen[1].values[record["step"]]["loss"] == record["loss"]
    assert later[2].are("Unread") == [s - 1 for s in range(2, 13) if s == 7 or (patient and s % 5)]


def test_the_watch_finds_a_wrong_mode_in_the_step_in_which_it_is(tmp_path, store, monkeypatch):
    planted = {7: lambda layout: layout.model.eval(), 8: lambda layout: layout.model.train()}
    settings = RUN | {"doctor__watch": "true", "model__dropout": 0.0}
    looked, later = both_ways(tmp_path, store, monkeypatch, planted, **settings)
    assert_the_same(looked, later)
    (told,) = [r for r in records(later[0], "event") if "watch_mode FAIL" in r["text"]]
    assert told["step"] == 8 and 7 in later[2].are("Unread")


# ---------------------------------------------------------------- times


def test_the_seconds_of_steps_without_a_pause_add_up_to_the_time_that_passed(tmp_path, store, monkeypatch):
    """A clock that goes on by one whenever it is read: no time is counted twice, none is lost."""
    now, spans, real = [0.0], [], pending.seconds

    def tick():
        now[0] += 1
        return now[0]

    def noted(begun, ended):
        spans.append((begun.view.step, begun.began, ended))
        return real(begun, ended)

    monkeypatch.setattr(clock.time, "perf_counter", tick)
    monkeypatch.setattr(pending, "seconds", noted)
    monkeypatch.setattr(Layout, "WAITS_ON", WAITS_ON)
    run = run_here(tmp_path, store, **RUN | {"train__steps": 9})
    assert [step for step, _, _ in spans] == list(range(1, 10))
    assert column(run, "seconds/step") == [end - began for _, began, end in spans]
    for (step, _, end), (_, began, _) in itertools.pairwise(spans):
        paused = step in AWAITED  # nothing was under way after it
        assert began > end if paused else began == end
    for record in records(run):
        parts = [record[f"seconds/{part}"] for part in ("forward", "backward", "optimizer")]
        assert min(parts) > 0 and sum(parts) <= record["seconds/step"]


def test_events_are_waited_for_when_they_are_read_and_never_the_whole_device(monkeypatch):
    waited = []

    class Event:
        """Of CUDA, on a machine without it: comes by at the time of its making."""

        made = 0

        def __init__(self, *, enable_timing):
            assert enable_timing
            Event.made += 1
            self.number = Event.made

        def record(self, stream):
            self.at = 100.0 * self.number

        def synchronize(self):
            waited.append(self.number)

        def elapsed_time(self, end):
            return end.at - self.at  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the whole device was waited for"))
    watch = clock.Stopwatch(torch.device("cuda"))
    for part in ("forward", "backward", "forward", "backward", "optimizer"):
        watch.lap(part)
    assert waited == []
    assert watch.seconds() == pytest.approx({"forward": 0.2, "backward": 0.2, "optimizer": 0.1})
    assert max(waited) == 6


# ---------------------------------------------------------------- the update that the device refuses


def weights_and_state(wrong):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    optimizer = optim.build(model, OptimConfig())
    assert not optim.can_refuse(optimizer)  # it has no state yet
    for number in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
            if number == 2 and wrong is not None:
                p.grad *= torch.nan if wrong else 1
        unless = torch.tensor(float(wrong)) if number == 2 and wrong is not None else None
        before = [p.detach().clone() for p in model.parameters()]
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
        with optim.refusing(optimizer, unless):
            optimizer.step()
        assert optim.can_refuse(optimizer) and not hasattr(optimizer, "found_inf")
        if number == 2:
            kept = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            kept &= all(
                torch.equal(value, state[kind])
                for p, state in zip(model.parameters(), states, strict=True)
                for kind, value in optimizer.state[p].items()
            )
            assert kept == bool(wrong)
    return [p.detach() for p in model.parameters()]


def test_a_refused_step_changes_no_bit_and_one_that_is_not_refused_is_the_plain_step():
    plain, taken, refused = (weights_and_state(wrong) for wrong in (None, False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, taken, strict=True))
    assert all(bool(torch.isfinite(p).all()) for p in refused)
    assert any(not torch.equal(a, b) for a, b in zip(plain, refused, strict=True))
