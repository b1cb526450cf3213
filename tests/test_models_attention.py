"""The kernels against attention written as loops in float64, and the flash wrapper against its documentation."""

from __future__ import annotations

import importlib.machinery
import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo_models import NOISE, difference, tiny, tokens

from minilm import models
from minilm.errors import ConfigError
from minilm.models import attention
from minilm.models.attention import Plan, attend

# What is looked at of a hidden state. Its square would be the same for all rows: a norm comes last.
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(3))


def loops(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
    """q [B, L, H, d], k and v [B, L, Hkv, d]: one query, one head, one key at a time, in float64."""
    rows, length, heads, size = q.shape
    group = heads // k.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(rows):
        for i in range(length):
            seen = [j for j in range(i + 1) if segments is None or segments[b, j] == segments[b, i]]
            for h in range(heads):
                scores = [
                    float((q[b, i, h].double() * k[b, j, h // group].double()).sum()) / math.sqrt(size)
                    for j in seen
                ]
                weights = [math.exp(s - max(scores)) for s in scores]
                for j, w in zip(seen, weights, strict=True):
                    out[b, i, h] += w / sum(weights) * v[b, j, h // group].double()
    return out


def slow_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    """What the documentation of flash_attn_varlen_func (2.8) says, written from that text alone.

    q (total_q, nheads, headdim), k and v (total_k, nheads_k, headdim), cu_seqlens (batch + 1) int32; query heads
    0 .. n-1 share key head 0; the causal mask is aligned to the bottom right; an empty row gives 0.
    """
    for x in (q, k, v):
        assert x.dim() == 3 and x.stride(-1) == 1
    for cumulated, x, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert cumulated.dtype == torch.int32 and cumulated.dim() == 1 and cumulated.is_contiguous()
        assert int(cumulated[0]) == 0 and int(cumulated[-1]) == x.shape[0]
        assert type(longest) is int and bool((cumulated.diff() <= longest).all())
    assert q.shape[1] % k.shape[1] == 0
    assert window_size == (-1, -1) and softcap == 0.0 and alibi_slopes is None and block_table is None
    assert not return_attn_probs
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    pieces = []
    for (q0, q1), (k0, k1) in zip(
        zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True),
        zip(cu_seqlens_k[:-1].tolist(), cu_seqlens_k[1:].tolist(), strict=True),
        strict=True,
    ):
        heads = []
        for h in range(q.shape[1]):
            scores = q[q0:q1, h] @ k[k0:k1, h // group].T * scale
            if causal:
                rows, columns = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)[None, :]
                scores = scores.masked_fill(columns > rows + (k1 - k0) - (q1 - q0), -math.inf)
            weights = torch.nan_to_num(scores.float().softmax(dim=-1)).to(q.dtype)
            weights = torch.nn.functional.dropout(weights, dropout_p, training=dropout_p > 0)
            heads.append(weights @ v[k0:k1, h // group])
        pieces.append(torch.stack(heads, dim=1))
    return torch.cat(pieces)


@pytest.fixture
def flash_package(monkeypatch):
    """A package `flash_attn` whose kernel is slow and right, allowed to run on the CPU."""
    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", loader=None)
    package.flash_attn_varlen_func = slow_varlen
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "flash_refusal", lambda device, dtype, head_dim: None)
    attention.flash_missing.cache_clear()
    yield package
    attention.flash_missing.cache_clear()


def qkv(rows: int, length: int, heads: int, kv_heads: int, size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, h, size, generator=generator) for h in (heads, kv_heads, kv_heads)]


def planned(backend: str, q: Tensor, segments: Tensor | None) -> Plan:
    ids = torch.zeros(q.shape[:2], dtype=torch.long)
    none = torch.empty(0)
    return attention.plan(
        backend, none, none, inputs=ids, segments=segments, dtype=q.dtype, head_dim=q.shape[-1], cache=None
    )


@st.composite
def layouts(draw):
    """Rows of documents with padding before, between and after them, as `align` allows."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    segments = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        at, number = 0, 0
        while at < length:
            n = draw(st.integers(1, length))
            number += 1
            segments[row, at : at + n] = 0 if draw(st.integers(0, 3)) == 0 else number
            at += n
    return segments


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@given(segments=st.none() | layouts(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_eager_and_sdpa_equal_the_loops(heads, segments, seed):
    """gqa-head-order, scale-missing, softmax over the right keys: also at padding."""
    shape = (2, 6) if segments is None else tuple(segments.shape)
    q, k, v = qkv(*shape, *heads, 8, seed)
    want = loops(q, k, v, segments)
    for backend in ("eager", "sdpa"):
        torch.testing.assert_close(
            attend(q, k, v, planned(backend, q, segments), 0.0).double(), want, atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_flash_equals_the_loops_at_every_real_position(heads, flash_package):
    @given(segments=st.none() | layouts(), seed=st.integers(0, 99))
    @settings(deadline=None, max_examples=15)
    def run(segments, seed):
        shape = (2, 6) if segments is None else tuple(segments.shape)
        q, k, v = qkv(*shape, *heads, 8, seed)
        got = attend(q, k, v, planned("flash", q, segments), 0.0)
        real = torch.ones(shape, dtype=torch.bool) if segments is None else segments > 0
        torch.testing.assert_close(got.double()[real], loops(q, k, v, segments)[real], atol=1e-6, rtol=1e-5)
        assert bool(torch.isfinite(got).all())

    run()


def test_sdpa_needs_no_mask_where_plain_causal_attention_says_it_all():
    q, *_ = qkv(2, 6, 4, 2, 8)
    assert planned("sdpa", q, None).mask is None
    assert planned("sdpa", q, torch.ones(2, 6, dtype=torch.long)).mask.shape == (2, 1, 6, 6)


def test_grouped_heads_equal_full_heads_with_repeated_weights():
    """gqa-head-order: head h uses key head h // group, not h % kv_heads."""
    q, k, v = qkv(1, 5, 6, 2, 8)
    wide = [x.repeat_interleave(3, dim=2) for x in (k, v)]
    for backend in ("eager", "sdpa"):
        shared = planned(backend, q, None)
        torch.testing.assert_close(attend(q, k, v, shared), attend(q, *wide, shared), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
def test_whole_models_agree_in_states_and_gradients(flash_package, segmented, cached):
    """eager-sdpa-differ."""
    ids = tokens(tiny("original"), 2, 16)
    segments = torch.tensor([[1] * 5 + [2] * 8 + [0] * 3, [1] * 16]) if segmented else None
    states, gradients = {}, {}
    for backend in ("eager", "sdpa", "flash"):
        model = tiny("original", attention=backend)
        if cached:
            with torch.no_grad():
                states[backend] = model(ids, segments, cache=model.new_cache(2, 16)).hidden
            continue
        hidden = model(ids, segments).hidden
        real = torch.ones(2, 16, 1) if segments is None else (segments > 0)[..., None]
        (hidden * real @ DIRECTION).sum().backward()
        states[backend] = hidden.detach()
        gradients[backend] = torch.cat([p.grad.flatten() for p in model.parameters()])
    real = slice(None) if segments is None else segments > 0
    for backend in ("sdpa", "flash"):
        assert difference(states[backend], states["eager"])[real].max() < NOISE
        if not cached:
            assert difference(gradients[backend], gradients["eager"]) < 10 * NOISE


def test_flash_gets_the_dropout_of_training_only(flash_package):
    model = tiny("original", attention="flash", dropout=0.3)
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs["dropout_p"])
        return slow_varlen(*args, **kwargs)

    flash_package.flash_attn_varlen_func = spy
    ids = tokens(model, 1, 4)
    model(ids)
    model.train()(ids)
    assert seen == [0.0, 0.0, 0.3, 0.3]


def test_flash_without_the_package_says_what_to_install():
    with pytest.raises(ConfigError, match=r"flash-attn is not installed.*pip install flash-attn --no-build"):
        models.build(models.preset("original", "tiny", attention="flash"))


def test_a_broken_flash_package_is_named_and_auto_goes_on(monkeypatch):
    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", loader=None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)

    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(attention.importlib, "import_module", broken)
    monkeypatch.setattr(attention, "flash_refusal", lambda *args: None)
    attention.flash_missing.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"cannot be imported \(undefined symbol"):
            assert attention.resolve("auto", torch.device("cuda"), torch.bfloat16, 64) == "sdpa"
        with pytest.raises(ConfigError, match="undefined symbol"):
            attention.resolve("flash", torch.device("cuda"), torch.bfloat16, 64)
    finally:
        attention.flash_missing.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "CUDA only"),
        ("cuda", torch.float32, 64, "float16 or bfloat16"),
        ("cuda", torch.bfloat16, 20, "multiple of 8"),
        ("cuda", torch.bfloat16, 264, "multiple of 8"),
        ("cuda", torch.bfloat16, 16, None),
    ],
)
def test_auto_takes_flash_exactly_where_it_can_run(monkeypatch, device, dtype, head_dim, reason):

    monkeypatch.setattr(attention, "flash_missing", lambda: None)
    device = torch.device(device)
    assert attention.resolve("auto", device, dtype, head_dim) == ("sdpa" if reason else "flash")
    assert attention.resolve("eager", device, dtype, head_dim) == "eager"
    if reason:
        with pytest.raises(ConfigError, match=reason):
            attention.resolve("flash", device, dtype, head_dim)


def test_borders_are_cumulated_lengths_over_all_rows():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1]])
    got = attention.borders(segments, 2, 6, torch.device("cpu"))
    assert got.dtype == torch.int32
    assert got.tolist() == [0, 2, 5, 6, 8, 12]
    assert attention.borders(None, 3, 4, torch.device("cpu")).tolist() == [0, 4, 8, 12]
    known = attention.borders(segments, 2, 6, torch.device("cpu"), 5)
    assert known.dtype == torch.int32 and known.is_contiguous()
    assert known.tolist() == [0, 2, 5, 6, 8, 12]


@pytest.mark.parametrize("wrong", [0, 1, 4, 6, 13])
def test_a_wrong_number_of_documents_is_no_attention_without_the_last_tokens(wrong):
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1]])
    with pytest.raises(RuntimeError, match="number of documents given is not that of the segments"):
        attention.borders(segments, 2, 6, torch.device("cpu"), wrong)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4))
def test_borders_are_the_same_where_the_number_of_documents_is_known(rows):
    ends = [i for i in range(7 * len(rows)) if i % 7 == 0 or rows[i // 7][i % 7] != rows[i // 7][i % 7 - 1]]
    got = attention.borders(torch.tensor(rows), len(rows), 7, torch.device("cpu"), len(ends))
    assert got.tolist() == [*ends, 7 * len(rows)]
