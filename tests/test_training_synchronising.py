"""In a step that is read later the host waits for nothing that the device computes: counted, not timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deferred_runs import WAITS_ON
from device_stand_in import Device
from training_runs import column, make_store, run_here

from minilm.alignment import Batch
from minilm.models import blockwise
from minilm.models.attention import borders
from minilm.models.original import Original
from minilm.training.layout import Layout
from minilm.training.objective import Objective
from minilm.training.step import Unread
from minilm.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

RUN = {"train__steps": 9, "train__validate_every": "none", "train__usage_every": "none"}
RUN |= {"doctor__watch": "true", "train__micro_batch": 4, "model__dropout": 0.1, "model__attention": "sdpa"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def noted(patch, first, last, plant=None):
    """The trainer with a stand-in for a device below it, from step `first` to step `last` of the next run.

    Returns its `looks` and `events`: ("backward" | "read" | "update", step) in their order. plant(tensor on the
    device) is called in step first + 1, before its update.
    """
    device, events, now = Device(), [], SimpleNamespace(step=0, batches=0)
    one_step, to, forward, check = Trainer._one_step, Batch.to, Objective.forward, Original._check
    backward, update, made, read = Layout.backward, Layout.step, Unread.__init__, Unread.read

    def noted_step(trainer):
        now.step = trainer.step + 1
        if not first <= now.step <= last:
            return one_step(trainer)
        model, optimizer = trainer.layout.model, trainer.layout.optimizer.optimizer
        device.own([*model.parameters()], [*model.buffers()], [*optimizer.state.values()])
        with device.on():
            return one_step(trainer)

    def noted_to(batch, where, *, non_blocking=False):
        assert non_blocking
        moved = to(batch, where, non_blocking=True).each(torch.clone)
        object.__setattr__(moved, "documents", to(batch, "meta").documents)  # counted as it leaves the host
        device.own([*vars(moved).values()])
        return moved

    def read_by_the_device(kernel):
        def inside(*arguments):
            with device.reading():
                return kernel(*arguments)

        return inside

    def noted_forward(objective, batch):
        with device.computing():
            return forward(objective, batch)

    def noted_backward(layout, contribution, *, last):
        with device.computing():
            backward(layout, contribution, last=last)
        if last:
            events.append(("backward", now.step))
            if plant is not None and now.step == first + 1:
                plant(contribution.detach())

    def noted_update(layout, norm, **keywords):
        update(layout, norm, **keywords)
        events.append(("update", now.step))

    def noted_made(unread, *arguments, **keywords):
        made(unread, *arguments, **keywords)
        unread.made_in = now.step

    def noted_read(unread):
        events.append(("read", unread.made_in))
        with device.reading():
            return read(unread)

    patch.setattr(Layout, "WAITS_ON", WAITS_ON)
    patch.setattr(Trainer, "_one_step", noted_step)
    patch.setattr(Batch, "to", noted_to)
    patch.setattr(Objective, "forward", noted_forward)
    # As on CUDA, where positions are not looked at.
    patch.setattr(Original, "_check", lambda model, inputs, segments, _: check(model, inputs, segments, None))
    for name in ("forward", "backward"):  # on CUDA a kernel itself reads where documents begin
        patch.setattr(blockwise, name, read_by_the_device(getattr(blockwise, name)))
    patch.setattr(Layout, "backward", noted_backward)
    patch.setattr(Layout, "step", noted_update)
    patch.setattr(Unread, "__init__", noted_made)
    patch.setattr(Unread, "read", noted_read)
    return device.looks, events


BY_DOCUMENT = {"model__attention": "blockwise", "model__dropout": 0.0}  # it stands for the kernels of CUDA


@pytest.mark.parametrize(
    ("rows", "kernel"), [("packed", {}), ("packed", BY_DOCUMENT), ("document", BY_DOCUMENT)]
)
def test_a_step_waits_for_nothing_and_is_read_after_the_backward_of_the_next(
    tmp_path, store, monkeypatch, rows, kernel
):
    settings = {"data__rows": rows, "train__ema_decay": 0.9, **RUN, **kernel}
    with monkeypatch.context() as patch:
        looks, events = noted(patch, 3, 7)
        run = run_here(tmp_path, store, **settings)
    assert looks == []
    later = [e for step in range(3, 8) for e in (("backward", step), ("read", step - 1), ("update", step))]
    assert events[events.index(("backward", 3)) :][: len(later)] == later
    plain = run_here(tmp_path, store, name="plain", **settings)
    assert column(run, "loss") == column(plain, "loss")


def test_a_step_that_is_looked_at_waits_once(tmp_path, store, monkeypatch):
    with monkeypatch.context() as patch:
        looks, events = noted(patch, 3, 7)
        patch.setattr(Layout, "WAITS_ON", ())
        run_here(tmp_path, store, **RUN)
    assert looks == []  # but for the reading
    assert [e for e in events if e[1] == 5] == [("backward", 5), ("read", 5), ("update", 5)]


SYNCHRONISING = {
    "a number": float,
    "a condition": lambda x: bool(x > 0),
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "a copy": lambda x: x.to("cpu"),
    "another copy": lambda x: x.cpu(),
    "where": lambda x: x.reshape(1).nonzero(),
    "a mask": lambda x: x.reshape(1)[x.reshape(1) > 0],
    "written by a mask": lambda x: x.reshape(1).index_put_((x.reshape(1) > 0,), torch.zeros(1)),
    "different values": lambda x: torch.unique(x.reshape(1)),
    "equality": lambda x: torch.equal(x, x),
    "a host number": lambda x: torch.tensor(1.0, device="cpu"),
    "documents by their borders": lambda x: borders((x + torch.zeros(2, 3)).long(), 2, 3, x.device),
}


@pytest.mark.parametrize("what", SYNCHRONISING)
def test_the_stand_in_notices(tmp_path, store, monkeypatch, what):
    device = Device()
    x = torch.tensor(0.5)
    device.own(x)
    with device.on():
        computed = (x * 2).sqrt() + 1
        torch.zeros(3).tolist()  # of the host
        assert device.looks == []
        SYNCHRONISING[what](computed)
    with device.on():  # where their number is known, nothing is looked at
        borders((computed + torch.zeros(2, 3)).long(), 2, 3, computed.device, 2)
    place = "attention.py" if what.startswith("documents") else "test_training_synchronising.py"
    assert len(device.looks) == 1 and place in device.looks[0]


def test_a_look_that_is_planted_into_the_step_is_counted(tmp_path, store, monkeypatch):
    looks, _ = noted(monkeypatch, 3, 7, plant=lambda tensor: float(tensor))
    run_here(tmp_path, store, **RUN)
    assert len(looks) == 1 and "_local_scalar_dense in test_training_synchronising.py" in looks[0]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: torch counts its synchronising calls"
)
@pytest.mark.parametrize("rows", ["packed", "document"])
@pytest.mark.parametrize("kernel", [{}, {"model__attention": "auto", "model__dropout": 0.0}])
def test_on_cuda_no_call_of_a_step_synchronises(tmp_path, store, monkeypatch, rows, kernel):
    seen, one_step = [], Trainer._one_step

    def strict(trainer):
        if not 3 <= trainer.step + 1 <= 7:
            return one_step(trainer)
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen.append(one_step(trainer))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return seen[-1]

    monkeypatch.setattr(Trainer, "_one_step", strict)
    settings = RUN | {"train__device": "cuda", "train__precision": "bf16"} | kernel
    run = run_here(tmp_path, store, data__rows=rows, **settings)
    assert seen == [None] * 5 and column(run, "step") == list(range(1, 10))
