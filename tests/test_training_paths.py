"""Does a run take the ways that it names?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from minilm import models, onednn
from minilm.errors import ConfigError
from minilm.models import attention, fused, parts, reading
from minilm.training import paths

CPU = SimpleNamespace(device_type="cpu", device=torch.device("cpu"), bf16=False)
BF16 = SimpleNamespace(device_type="cpu", device=torch.device("cpu"), bf16=True)


@pytest.fixture
def kept(monkeypatch):
    """Whether the process was told to keep its memory; this one is not."""
    calls = []
    monkeypatch.setattr(paths, "keep_freed_memory", lambda: calls.append(1) or True)
    return calls


def large(**changes):
    """One layer with weights that are large enough for oneDNN."""
    fields = {"dim": 256, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "hidden_dim": 256}
    return models.preset("original", "tiny", **{**fields, **changes})


def taken(monkeypatch, config, *, bf16: bool) -> dict[str, bool]:
    """What really runs in a forward and backward of training."""
    seen = {"kernels": set(), "oneDNN": False, "fused": False}

    def noted(name, function):
        def wrapped(*args, **kwargs):
            seen[name] = True
            return function(*args, **kwargs)

        return wrapped

    for name, kernel in attention._KERNELS.items():

        def run(*args, name=name, kernel=kernel):
            seen["kernels"].add(name)
            return kernel(*args)

        monkeypatch.setitem(attention._KERNELS, name, run)
    monkeypatch.setattr(onednn, "linear", noted("oneDNN", onednn.linear))
    monkeypatch.setattr(parts, "rms_norm", noted("fused", fused.rms_norm))
    model = models.build(config).train()
    ids = torch.arange(12).view(2, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(ids, torch.ones_like(ids)).hidden.sum().backward()
    return seen


@pytest.mark.parametrize("layout", [CPU, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"attention": "eager"}], ids=str)
def test_what_is_named_is_what_runs(layout, changes, kept, monkeypatch):
    config = large(**changes)
    named = paths.take(config, layout, compiled=False)
    seen = taken(monkeypatch, config, bf16=layout.bf16)
    assert seen["kernels"] == {named["attention"]}
    assert named["products"] == ("oneDNN" if seen["oneDNN"] else "torch")
    assert named["norm, rotation, SwiGLU"] == ("fused" if seen["fused"] else "torch")
    assert named["freed memory"] == "kept" and kept == [1]


@pytest.mark.parametrize("layout", [CPU, BF16], ids=["fp32", "bf16"])
def test_how_a_memory_is_read_is_named(layout, kept, monkeypatch):
    config = models.preset("knowledge", "tiny", store="random")
    seen, formula = [], reading.formula
    monkeypatch.setattr(reading, "formula", lambda *given: seen.append(1) or formula(*given))
    taken(monkeypatch, config, bf16=layout.bf16)
    named = paths.take(config, layout, compiled=False)["reading of entries"]
    assert named == ("at once" if seen else "in parts")
    assert paths.take(config, layout, compiled=True)["reading of entries"] == "at once"
    without = models.preset("knowledge", "tiny", memory="none")
    assert "reading of entries" not in paths.take(without, layout, compiled=False)


def test_what_is_missing_is_not_named(kept, monkeypatch):
    monkeypatch.setattr(paths, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(onednn, "_tried", lambda: False)
    named = paths.take(large(), CPU, compiled=True)
    assert named["products"] == "torch" and named["freed memory"] == "given back"
    assert named["norm, rotation, SwiGLU"] == "compiled"
    assert not taken(monkeypatch, large(), bf16=False)["oneDNN"]


def test_a_kernel_that_cannot_run_is_refused_before_the_run(kept):
    with pytest.raises(ConfigError, match=r"attention is blockwise, but .*float32"):
        paths.take(large(attention="blockwise"), BF16, compiled=False)


def test_the_memory_of_a_gpu_run_is_not_touched(kept, monkeypatch):
    monkeypatch.setattr(attention, "refusal", lambda *_: None)
    cuda = SimpleNamespace(device_type="cuda", device=torch.device("cuda"), bf16=True)
    assert paths.take(large(), cuda, compiled=False) == {
        "attention": "flash",
        "products": "torch",
        "norm, rotation, SwiGLU": "torch",
    }
    assert kept == []
