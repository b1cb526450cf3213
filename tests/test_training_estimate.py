"""The memory estimate against measurements: tensors that autograd keeps, and the allocator's record of a whole step."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from minilm import models
from minilm.alignment import align
from minilm.models import attention
from minilm.training import estimate, optim, passing
from minilm.training.estimate import Spread
from minilm.training.objective import Objective


def a_batch(config, rows, length, labelled=False):
    tokens = torch.randint(0, config.vocab_size, (rows, length + 1))
    segments = torch.ones_like(tokens)
    segments[:, length // 2 :] = 2
    entries = torch.randint(0, config.store_side**2, tokens.shape) if labelled else None
    return align(tokens, segments, entries=entries)


def bytes_kept(config, rows, length, *, autocast, cast, labelled=False):
    """Storages, each once, that autograd keeps between forward and backward, without what lies there anyway."""
    objective = Objective(models.build(config)).train()
    if cast:
        objective = objective.bfloat16()
    batch = a_batch(config, rows, length, labelled)
    store = getattr(objective.model, "store", None)
    tables = [] if store is None else store.tensors().values()
    there = [*objective.parameters(), *objective.buffers(), *tables]
    own = {tensor.untyped_storage().data_ptr() for tensor in there}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # kept alive: an address is not used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        objective(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bf16 weights"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": 0.1}, {"num_kv_heads": 4}, {"tie_embeddings": False}],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_activations_are_what_autograd_keeps(kernel, precision, changes):
    config = dataclasses.replace(
        models.preset("original", "6m"), attention=kernel, num_layers=2, vocab_size=700, **changes
    )
    autocast, cast = precision == "autocast", precision == "bf16 weights"
    kept = bytes_kept(config, 2, 120, autocast=autocast, cast=cast)
    kind = "zero" if cast else "single"
    spread = Spread(kind=kind, ranks=1, bf16=autocast or cast, device="cpu", rows=2)
    parts = estimate.activations(config, spread, length=120, backend=kernel)
    assert sum(parts.values()) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bf16 weights"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("no_ffn", {"dropout": 0.1}),
        ("no_ffn", {"qk_norm": False}),
        ("no_ffn_matched", {}),
        ("persistent", {}),
        ("persistent", {"dropout": 0.1, "num_persistent": 300}),
        ("moe", {}),
        ("moe", {"dropout": 0.1, "num_shared_experts": 2, "top_k": 3}),
    ],
)
def test_activations_of_the_variants_are_what_autograd_keeps(name, changes, kernel, precision):
    """Experts to 3 %: groups of tokens too few for a product are filled up, and routing is as drawn."""
    changes = {"attention": kernel, "num_layers": 2, "vocab_size": 700, **changes}
    config = dataclasses.replace(models.preset(name, "6m"), **changes)
    autocast, cast = precision == "autocast", precision == "bf16 weights"
    kept = bytes_kept(config, 2, 60, autocast=autocast, cast=cast)
    kind = "zero" if cast else "single"
    spread = Spread(kind=kind, ranks=1, bf16=autocast or cast, device="cpu", rows=2)
    parts = estimate.activations(config, spread, length=60, backend=kernel)
    assert sum(parts.values()) == pytest.approx(kept, rel=0.03 if name == "moe" else 0.01)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bf16 weights"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pkm", {}),
        ("pkm", {"value_place": "add", "value_heads": 3, "top_values": 5, "dropout": 0.1}),
        ("knowledge", {}),
        ("knowledge", {"index_weight": 0.0, "num_candidates": 20, "key_dim": 32, "router_dim": 48}),
        ("knowledge", {"memory": "none"}),
        ("no_ffn_knowledge", {"num_layers": 3, "memory_layers": [0, 2], "num_read": 3, "memory_heads": 3}),
    ],
)
def test_activations_of_tables_are_what_autograd_keeps(name, changes, precision):
    """Without labels, and where every token has one that predicts: all but the last of each row's first document."""
    if name != "pkm":
        changes = {"store": "random", "store_side": 128, **changes}
    changes = {"attention": "sdpa", "num_layers": 2, "vocab_size": 700, **changes}
    config = dataclasses.replace(models.preset(name, "6m"), **changes)
    autocast, cast = precision == "autocast", precision == "bf16 weights"
    spread = Spread(kind="zero" if cast else "single", ranks=1, bf16=autocast or cast, device="cpu", rows=2)
    for labelled in (False, True)[: 1 if name == "pkm" or config.memory == "none" else 2]:
        parts = estimate.activations(config, spread, length=60, backend="sdpa", labelled=labelled * 59 / 60)
        kept = bytes_kept(config, 2, 60, autocast=autocast, cast=cast, labelled=labelled)
        assert sum(parts.values()) == pytest.approx(kept, rel=0.005)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("original", {"num_kv_heads": 4}),
        ("original", {"hidden_dim": 200}),  # products too small for oneDNN are written in torch's operations
        ("no_ffn", {}),
        ("no_ffn", {"qk_norm": False}),
        ("moe", {"num_shared_experts": 2}),
        ("pkm", {}),
    ],
)
def test_activations_of_attention_by_documents_are_what_autograd_keeps(name, changes):
    config = models.preset(name, "6m", **{"num_layers": 2, "vocab_size": 700, **changes})
    kept = bytes_kept(config, 2, 120, autocast=False, cast=False)
    spread = Spread(kind="single", ranks=1, bf16=False, device="cpu", rows=2)
    parts = estimate.activations(config, spread, length=120, backend="blockwise")
    assert sum(parts.values()) == pytest.approx(kept, rel=0.03 if name == "moe" else 0.005)


def test_a_memory_at_its_own_size_is_within_the_promised_15_percent_and_its_store_is_counted_once():
    sizes = {"num_layers": 3, "vocab_size": 700, "store": "random", "attention": "sdpa"}
    config = models.preset("knowledge", "6m", **sizes, memory_layers=[1, 2], store_side=128)
    kept = bytes_kept(config, 2, 128, autocast=False, cast=False, labelled=True)
    spread = Spread(kind="single", ranks=1, bf16=False, device="cpu", rows=2)
    found = estimate.memory(config, spread, length=128, backend="sdpa", num_moments=0, labelled=1.0)
    assert found.activations == pytest.approx(kept, rel=0.005)
    assert found.tables == 16_384 * (2 * 32 + 64 + 1 + 4 + 4)
    without = dataclasses.replace(config, memory="none")
    plain = estimate.memory(without, spread, length=128, backend="sdpa", num_moments=0)
    assert plain.tables == 0
    assert found.peak - dataclasses.replace(found, tables=0).peak == found.tables
    # Recomputed, one memory layer's inside is there at once, not two.
    again = dataclasses.replace(spread, recompute="blocks")
    inside = [estimate.activations(config, s, length=128, backend="sdpa")["memory"] for s in (spread, again)]
    assert inside[0] == pytest.approx(2 * inside[1], abs=1)


def test_activations_at_a_middle_size_are_within_the_promised_15_percent():
    config = models.preset("original", "6m")
    kept = bytes_kept(config, 4, 256, autocast=False, cast=False)
    spread = Spread(kind="single", ranks=1, bf16=False, device="cpu", rows=4)
    found = estimate.memory(config, spread, length=256, backend="sdpa", num_moments=2 * 6_065_408)
    assert found.activations == pytest.approx(kept, rel=0.15)
    assert found.weights == found.gradients == 4 * 6_065_408


@pytest.mark.parametrize(
    ("name", "micro_batches", "recompute"),
    [
        ("original", 1, "none"),
        ("original", 3, "none"),
        ("original", 1, "half"),
        ("original", 1, "blocks"),
        ("no_ffn", 1, "none"),
        ("no_ffn", 1, "half"),
        ("moe", 1, "blocks"),
        ("persistent", 1, "none"),
        ("persistent", 1, "blocks"),
        ("knowledge", 1, "none"),
        ("knowledge", 1, "half"),
        ("knowledge", 1, "blocks"),
        ("pkm", 1, "none"),
    ],
)
def test_the_peak_is_that_of_the_allocator_over_whole_steps(name, micro_batches, recompute):
    memory = {"store": "random", "store_side": 32} if name == "knowledge" else {}
    config = models.preset(name, "6m", num_layers=4, vocab_size=2000, **memory)
    rows = 4 if memory else 6
    # A small first step: what stays from then on, the moments, is there in the second one.
    steps = [[a_batch(config, 1, 8)], [a_batch(config, rows, 200) for _ in range(micro_batches)]]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        model = models.build(config)
        passing.arrange(model, recompute=recompute, compiled=False)
        optimizer = optim.build(model, optim.OptimConfig())
        objective = Objective(model).train()
        for batches in steps:
            for batch in batches:
                objective(batch)[0].nats.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    measured = max(itertools.accumulate(event.nbytes() for event in events))
    spread = Spread(
        kind="single",
        ranks=1,
        bf16=False,
        device="cpu",
        rows=rows,
        accumulation=micro_batches,
        recompute=recompute,
    )
    moments, (cpu, float32) = 2 * config.num_parameters(), (torch.device("cpu"), torch.float32)
    kernel = attention.resolve(config.kernel, cpu, float32, config.head_dim)
    found = estimate.memory(config, spread, length=200, backend=kernel, num_moments=moments)
    assert found.peak == pytest.approx(measured, rel=0.1)


def test_the_block_that_has_most_on_the_way_back_decides_where_blocks_are_recomputed():
    """Memory layers 1 and 5 of 6, by hand. With half of the blocks: 1, 3 and 5 are kept, 0, 2 and 4 made again."""
    config = models.preset("knowledge", "6m", store="random", store_side=32, memory_layers=[1, 5])
    spread = Spread(kind="single", ranks=1, bf16=False, device="cpu", rows=2)
    found = {
        policy: estimate.memory(
            config, dataclasses.replace(spread, recompute=policy), length=128, backend="sdpa", num_moments=0
        )
        for policy in ("none", "half", "blocks")
    }
    parts = {
        policy: estimate.activations(
            config, dataclasses.replace(spread, recompute=policy), length=128, backend="sdpa"
        )
        for policy in found
    }
    for name, counts in {"attention": (6, 3, 1), "memory": (2, 2, 1)}.items():
        one = parts["blocks"][name]
        assert [parts[policy][name] for policy in found] == pytest.approx([n * one for n in counts], rel=1e-6)
    stream, mask = 2 * 128 * 256 * 4, 2 * 128 * 128
    assert [parts[policy]["borders of blocks"] for policy in found] == [
        0,
        3 * stream + mask,
        6 * stream + mask,
    ]
    inside = sum(parts["blocks"][part] for part in ("norms", "attention", "feed-forward", "memory"))
    assert [found[policy].recomputed for policy in found] == pytest.approx([0, 0, inside], abs=3)


def test_with_many_positions_gradients_on_the_way_back_weigh_more_than_the_logits():
    config = models.preset("original", "26m")
    spread = Spread(kind="single", ranks=1, bf16=True, device="cuda", rows=128)
    found = estimate.memory(config, spread, length=512, backend="flash", num_moments=0)
    assert found.logits < 200e6 < 3 * 2 * 128 * 512 * 1408 - 2 * 128 * 512 * 512 == found.passing
    assert found.peak == found.weights + found.activations + found.passing


def test_optimizer_state_is_what_the_optimizers_hold():
    config = models.preset("original", "tiny")
    for name in ("adamw", "muon"):
        model = models.build(config)
        optimizer = optim.build(model, optim.OptimConfig(name=name))
        Objective(model)(a_batch(config, 2, 20))[0].nats.backward()
        optimizer.step()
        held = sum(
            value.nbytes
            for state in optimizer.state.values()
            for key, value in state.items()
            if key != "step" and torch.is_tensor(value)
        )
        moments = sum(
            (1 if group.get("muon") else 2) * sum(p.numel() for p in group["params"])
            for group in optimizer.param_groups
        )
        spread = Spread(kind="single", ranks=1, bf16=False, device="cpu", rows=2)
        found = estimate.memory(config, spread, length=20, backend="sdpa", num_moments=moments)
        assert found.optimizer == held


def test_zero_shards_master_weights_moments_and_gradients_over_the_ranks():
    config = models.preset("original", "26m")
    n = 25_829_888

    def on(ranks, **changes):
        told = {"kind": "zero", "ranks": ranks, "bf16": True, "device": "cuda", "rows": 4} | changes
        return estimate.memory(
            config, Spread(**told), length=512, backend="flash", num_moments=2 * n, averages=True
        )

    for ranks in (1, 2, 8):
        found = on(ranks)
        assert found.weights == 2 * n  # bfloat16, whole on every rank
        assert found.gradients == found.average == 4 * n // ranks
        assert found.optimizer == 12 * n // ranks  # float32 weights and two moments
    assert on(4, zero_stage=1).gradients == 4 * n
    assert on(2).buckets == on(2, device="cpu").buckets == 2 * n  # not the 500 million of the default
    single = on(1, kind="single")
    assert (single.weights, single.gradients, single.optimizer, single.buckets) == (4 * n, 4 * n, 8 * n, 0)
    assert on(2, kind="ddp").buckets == 4 * n


def test_a_model_without_a_derivation_gets_no_number():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(type(models.preset("original", "tiny"))):
        name: str = "other"

    spread = Spread(kind="single", ranks=1, bf16=False, device="cpu", rows=2)
    found = estimate.memory(Other(), spread, length=20, backend="sdpa", num_moments=10)
    assert found.activations is None and found.peak is None
