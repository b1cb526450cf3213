"""Batches for a CUDA device lie in pinned memory, made by the thread that fetches ahead; on a CPU nothing changes."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from data_stores import random_documents, store_of

from minilm.alignment import Batch
from minilm.data.loader import Loader
from minilm.data.rows import Rows


@pytest.fixture
def rows(tmp_path):
    return Rows(store_of(tmp_path / "store", {"a": random_documents(120)}), "train", 8)


@pytest.fixture
def pins(monkeypatch):
    """A stand-in for torch's pinning, which needs CUDA: (thread, memory that was pinned, the pinned copy)."""
    made = []

    def pin_memory(tensor):
        copy = tensor.clone()
        made.append((threading.current_thread().name, tensor.data_ptr(), copy))
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return made


@pytest.fixture
def chosen(monkeypatch):
    """(thread, device) of each call of torch.cuda.set_device."""
    calls = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, device))
    )
    return calls


def fields(batch):
    return {f.name: v for f in dataclasses.fields(Batch) if (v := getattr(batch, f.name)) is not None}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_every_field_of_every_batch_is_pinned_where_it_is_fetched(rows, pins, chosen, prefetch, device):
    expected = Loader(rows, batch_rows=8, micro_batch=4)
    with Loader(rows, batch_rows=8, micro_batch=4, prefetch=prefetch, device=torch.device(device)) as loader:
        found = [next(loader) for _ in range(3)]
    copies = {id(copy): (thread, copy) for thread, _, copy in pins}
    for step, batches in enumerate(found):
        for batch, plain in zip(batches, expected.step(step), strict=True):
            assert fields(batch).keys() == fields(plain).keys()
            for name, value in fields(batch).items():
                assert torch.equal(value, fields(plain)[name])
                thread, copy = copies[id(value)]
                assert copy is value and thread == ("minilm-data" if prefetch else "MainThread")
    # A thread begins on device 0: it must not open it beside its own. Without a number it is the right one.
    assert chosen == ([("minilm-data", torch.device("cuda:1"))] if prefetch and device == "cuda:1" else [])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_on_a_cpu_nothing_is_pinned(rows, pins, chosen, prefetch):
    for device in (None, torch.device("cpu")):
        with Loader(rows, batch_rows=8, micro_batch=4, prefetch=prefetch, device=device) as loader:
            next(loader)
    assert pins == [] and chosen == []


def test_a_batch_asked_for_by_its_number_is_not_pinned(rows, pins):
    Loader(rows, batch_rows=8, micro_batch=4, device=torch.device("cuda")).step(3)
    assert pins == []


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_tells_its_loader_the_device(tmp_path, monkeypatch):
    """From the settings to the loader: else the pinning would be there and never happen."""
    from training_runs import make_store, run_here

    from minilm import start

    seen, real = [], start.Loader

    def noted(*arguments, **keywords):
        seen.append(keywords["device"])
        return real(*arguments, **keywords)

    monkeypatch.setattr(start, "Loader", noted)
    run_here(tmp_path, make_store(tmp_path / "store"), train__steps=6)
    assert seen == [torch.device("cpu")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to pin memory for")
def test_pinned_memory_is_pinned(rows):
    with Loader(rows, batch_rows=8, micro_batch=4, device=torch.device("cuda")) as loader:
        assert all(value.is_pinned() for batch in next(loader) for value in fields(batch).values())
