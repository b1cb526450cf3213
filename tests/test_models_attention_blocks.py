"""The kernels that go document by document: blockwise on a CPU, and torch's varlen by its documentation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models_attention import DIRECTION, layouts, loops, planned, qkv, slow_varlen
from torch import Tensor
from torch._dynamo.utils import counters
from zoo_models import NOISE, difference, tiny, tokens

from minilm import models, onednn
from minilm.errors import ConfigError
from minilm.models import attention, blockwise
from minilm.models.attention import attend
from minilm.training.passing import arrange

CPU = torch.device("cpu")


@pytest.fixture(params=["batched", "by head"])
def way(request, monkeypatch):
    """Both ways through small examples, with blocks of a few queries."""
    monkeypatch.setattr(blockwise, "LARGE", 3)
    monkeypatch.setattr(blockwise, "SMALL", 2)
    if request.param == "by head":
        if not onednn.works():
            pytest.skip("this torch has no oneDNN products that can be used")
        monkeypatch.setattr(blockwise, "LARGE_FROM", 0)
    return request.param


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_blockwise_equals_the_loops(heads, way):
    """Also at padding, which attends to padding in the other kernels of a CPU."""

    @given(segments=st.none() | layouts(), seed=st.integers(0, 99))
    @settings(deadline=None, max_examples=15)
    def run(segments, seed):
        shape = (2, 7) if segments is None else tuple(segments.shape)
        q, k, v = qkv(*shape, *heads, 8, seed)
        got = attend(q, k, v, planned("blockwise", q, segments)).double()
        real = torch.ones(shape, dtype=torch.bool) if segments is None else segments > 0
        torch.testing.assert_close(got[real], loops(q, k, v, segments)[real], atol=1e-6, rtol=1e-5)
        assert bool(torch.isfinite(got).all())

    run()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_blockwise_gradients_equal_those_of_the_written_out_kernel_in_float64(heads, compiled, way):
    segments = torch.tensor([[1] * 4 + [2] * 9 + [0] * 2, [0] + [1] * 14])
    real = (segments > 0)[..., None, None]
    weights = torch.randn(2, 15, heads[0], 8, generator=torch.Generator().manual_seed(5)) * real
    q, k, v = qkv(2, 15, *heads, 8)

    def gradients(backend: str, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        plan = planned(backend, leaves[0], segments)
        kernel = torch.compile(attend, backend="aot_eager") if compiled and backend == "blockwise" else attend
        out = kernel(*leaves, plan)
        return list(torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves))

    for mine, exact in zip(
        gradients("blockwise", q, k, v), gradients("eager", q.double(), k.double(), v.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), exact, atol=2e-6, rtol=1e-5)


def test_hidden_tokens_cost_nothing(monkeypatch):
    """No score is computed between documents: work is counted, not timed."""
    scores = []
    right = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: scores.append(x.numel()) or right(x, dim=dim))
    q, k, v = qkv(1, 256, 2, 2, 8)
    packed = torch.arange(256)[None] // 16 + 1
    attend(q, k, v, planned("blockwise", q, packed))
    documents, block = sum(scores), blockwise.SMALL
    assert documents <= 2 * 16 * 16 * 16
    scores.clear()
    attend(q, k, v, planned("blockwise", q, None))
    assert documents < sum(scores) / 4
    assert sum(scores) <= 2 * 256 * (256 + block) // 2  # and none of a later block


def test_whole_models_agree_in_states_and_gradients():
    """eager-sdpa-differ, one kernel more."""
    ids = tokens(tiny("original"), 2, 16)
    segments = torch.tensor([[1] * 5 + [2] * 8 + [0] * 3, [1] * 16])
    real = segments > 0
    states, gradients = {}, {}
    for backend in ("eager", "blockwise"):
        model = tiny("original", attention=backend)
        hidden = model(ids, segments).hidden
        (hidden * real[..., None] @ DIRECTION).sum().backward()
        states[backend] = hidden.detach()
        gradients[backend] = torch.cat([p.grad.flatten() for p in model.parameters()])
        with (
            torch.no_grad()
        ):  # a cache has a buffer that is longer than its rows: another kernel, the same states
            cached = model(ids, segments, cache=model.new_cache(2, 20)).hidden
        assert difference(cached, states["eager"])[real].max() < NOISE
    assert difference(states["blockwise"], states["eager"])[real].max() < NOISE
    assert difference(gradients["blockwise"], gradients["eager"]) < 10 * NOISE


@pytest.mark.parametrize(
    ("device", "dtype", "dropout", "reason"),
    [
        ("cpu", torch.float32, 0.0, None),
        ("cpu", torch.float64, 0.0, "float32"),
        ("cpu", torch.bfloat16, 0.0, "float32"),
        ("cpu", torch.float32, 0.1, "dropout"),
        ("cuda", torch.float32, 0.0, "CPU only"),
    ],
)
def test_auto_takes_blockwise_exactly_where_it_can_run(device, dtype, dropout, reason):
    where = torch.device(device)
    assert attention.resolve("auto", where, dtype, 16, dropout) == ("sdpa" if reason else "blockwise")
    if reason:
        with pytest.raises(ConfigError, match=reason):
            attention.resolve("blockwise", where, dtype, 16, dropout)


def test_a_model_with_dropout_trains_with_it():
    model = tiny("original", dropout=0.5).train()
    ids = tokens(model, 1, 6)
    assert not torch.equal(model(ids).hidden, model(ids).hidden)
    with pytest.raises(ConfigError, match=r"attention is blockwise, but .*model\.dropout is 0\.5"):
        tiny("original", dropout=0.5, attention="blockwise")(ids)


def test_dropout_that_is_turned_on_afterwards_acts_within_documents():
    """Weights of one are dropped or doubled: what is left of a document is never of another one."""
    segments = torch.tensor([[1, 1, 2, 2, 2, 3]])
    q = torch.zeros(1, 6, 2, 8)
    v = torch.nn.functional.one_hot(segments, 8)[:, :, None].float().expand(1, 6, 2, 8)
    torch.manual_seed(0)
    out = attend(q, q, v, planned("blockwise", q, segments), 0.5)
    hidden = torch.nn.functional.one_hot(segments, 8)[:, :, None] == 0
    assert not bool((out * hidden).any())
    seen = {round(float(x), 4) for x in out[0, :, :, :].amax(-1).flatten()}
    assert seen <= {0.0, 0.6667, 1.0, 1.3333, 2.0} and len(seen) > 1
    without = attend(q, q, v, planned("blockwise", q, segments))
    torch.testing.assert_close(without, v)


@pytest.mark.parametrize("kernel", ["flash", "varlen", "blockwise"])
def test_a_variant_that_needs_a_mask_refuses_kernels_that_take_none(kernel):
    with pytest.raises(ConfigError, match=f"kernel {kernel} takes none"):
        models.build(models.preset("persistent", "tiny", attention=kernel))
    assert models.preset("persistent", "tiny").kernel == "sdpa"


def by_its_documentation(version: str):
    """torch.nn.attention.varlen.varlen_attn as each version's documentation has it, slow and on a CPU."""

    def causal_only(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal):
        assert causal
        return slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=True)

    if version == "2.10":

        def varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
        ):
            assert query.shape[1] == key.shape[1], "no grouped heads"
            return causal_only(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)
    else:

        def varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
            window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
        ):  # fmt: skip
            assert enable_gqa or query.shape[1] == key.shape[1], "grouped heads must be announced"
            return causal_only(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))

    return varlen_attn


@pytest.mark.parametrize("version", ["2.10", "2.13"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_varlen_equals_the_loops(version, heads, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_its_documentation(version))
    monkeypatch.setattr(attention, "varlen_refusal", lambda *_: None)
    attention._parameters_of_varlen.cache_clear()
    try:
        segments = torch.tensor([[1] * 4 + [2] * 3 + [0] * 2, [0] + [1] * 8])
        q, k, v = qkv(2, 9, *heads, 8)
        got = attend(q, k, v, planned("varlen", q, segments)).double()
        torch.testing.assert_close(
            got[segments > 0], loops(q, k, v, segments)[segments > 0], atol=1e-6, rtol=1e-5
        )
    finally:
        attention._parameters_of_varlen.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "size", "capability", "reason"),
    [
        ("cuda", torch.bfloat16, 16, (9, 0), None),
        ("cuda", torch.bfloat16, 64, (8, 9), None),
        ("cpu", torch.bfloat16, 64, (9, 0), "CUDA only"),
        ("cuda", torch.float32, 64, (9, 0), "float16 or bfloat16"),
        ("cuda", torch.bfloat16, 20, (9, 0), "multiple of 8"),
        ("cuda", torch.bfloat16, 512, (9, 0), "multiple of 8"),
        ("cuda", torch.bfloat16, 64, (7, 5), "capability 8.0"),
    ],
)
def test_auto_takes_varlen_exactly_where_it_can_run(device, dtype, size, capability, reason, monkeypatch):
    monkeypatch.setattr(attention, "flash_missing", lambda: "the package flash-attn is not installed.")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    where = torch.device(device)
    assert attention.resolve("auto", where, dtype, size) == ("sdpa" if reason else "varlen")
    if reason:
        with pytest.raises(ConfigError, match=reason):
            attention.resolve("varlen", where, dtype, size)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, compiling
def test_compiled_blocks_are_compiled_once_for_any_documents():
    """torch.compile makes a graph per shape that it meets; the number of documents changes with every batch."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny("original", attention="blockwise").train()
    arrange(model, recompute="none", compiled=True, backend="aot_eager")
    ids = tokens(model, 2, 24)
    for ends in ([24], [5, 24], [1, 2, 3, 24], [12, 13, 24], [24]):
        segments = torch.bucketize(torch.arange(24), torch.tensor(ends), right=True).add(1).expand(2, 24)
        plain = tiny("original", attention="blockwise")(ids, segments).hidden
        hidden = model(ids, segments).hidden
        torch.testing.assert_close(hidden, plain, atol=1e-5, rtol=1e-5)
        (hidden @ DIRECTION).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_long_and_wide_documents_go_by_head_and_the_others_in_one_product():
    """The rule that chooses, and that both ways give the same numbers at real sizes."""
    if not onednn.works():
        pytest.skip("this torch has no oneDNN products that can be used")
    for heads, size, length, by_head in ((8, 64, 256, True), (8, 16, 64, False)):
        q, k, v = (x.flatten(0, 1) for x in qkv(1, length, heads, 2, size))
        work = blockwise._Work(q, k, v)
        ends = torch.tensor([0, length])
        assert all(isinstance(block.head, int) == by_head for block in work.blocks(ends))
        scores = torch.einsum("lgd,sgd->gls", q.double(), k.double().repeat_interleave(heads // 2, 1))
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (scores / math.sqrt(size)).masked_fill(hidden, -math.inf).softmax(-1)
        want = torch.einsum("gls,sgd->lgd", weights, v.double().repeat_interleave(heads // 2, 1))
        torch.testing.assert_close(blockwise.attend(q, k, v, ends).double(), want, atol=2e-6, rtol=1e-5)
