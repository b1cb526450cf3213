"""Pure attention, all-attention and the mixture of experts, against their formulas written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from test_models_original import show
from torch import Tensor
from zoo_models import tiny, tokens

from minilm import models
from minilm.alignment import align, score
from minilm.doctor.checks.balance import balance as balance_check
from minilm.doctor.checks.routing import routing
from minilm.doctor.targets.our_model import config_subject
from minilm.doctor.targets.our_router import router_view
from minilm.errors import ConfigError
from minilm.models.moe import Experts, MoEConfig, at_once, balance, one_by_one, predicting, router_z
from minilm.training.passing import arrange

# ---- counts


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("no_ffn", 8_524_288),
        ("no_ffn_matched", 25_576_960),
        ("persistent", 25_825_792),
        ("moe", 77_767_168),
    ],
)
def test_reference_sizes_have_exactly_these_parameters(name, count):
    config = models.preset(name, "26m")
    assert config.num_parameters() == count
    assert config == models.config_class(name)()  # the defaults are the reference
    with torch.device("meta"):
        assert sum(p.numel() for p in models.build(config).parameters()) == count


@pytest.mark.parametrize("size", models.sizes("original"))
def test_what_is_called_matched_is_matched_at_every_size(size):
    original = models.preset("original", size)
    for name in ("no_ffn_matched", "persistent"):
        assert models.preset(name, size).num_parameters() == pytest.approx(
            original.num_parameters(), rel=0.02
        )
    mixture = models.preset("moe", size)
    router = mixture.num_layers * mixture.num_experts * mixture.dim
    assert mixture.active_parameters() == original.num_parameters() + router
    assert mixture.flops_per_token(100) == original.flops_per_token(100) + 2 * router
    assert models.preset("moe", size, tie_embeddings=False).flops_per_token(100) == mixture.flops_per_token(
        100
    )
    norm = original.num_layers * original.dim
    assert models.preset("persistent", size).num_parameters() == original.num_parameters() - norm
    assert models.preset("persistent", size).flops_per_token(100) == original.flops_per_token(100)


def test_shared_experts_are_counted_as_active():
    plain, shared = (models.preset("moe", "tiny", num_shared_experts=n) for n in (0, 3))
    more = 3 * 2 * 3 * 32 * 48
    assert shared.num_parameters() - plain.num_parameters() == more
    assert shared.active_parameters() - plain.active_parameters() == more
    assert shared.flops_per_token(9) - plain.flops_per_token(9) == 2 * more
    assert sum(p.numel() for p in models.build(shared).parameters()) == shared.num_parameters()


def test_params_tells_active_from_all_parameters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    show("original:26m", "moe:26m")
    text = capsys.readouterr().out
    assert "77,767,168" in text and "25,862,656" in text
    matched = (
        "parameters NOT matched (x 3.01), active parameters matched (x 1), training FLOPs per token matched"
    )
    assert matched in text
    show("original:26m", "no_ffn:26m")
    assert "active" not in capsys.readouterr().out


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"top_k: 5 experts a token, but there are only 4"):
        models.preset("moe", "tiny", top_k=5)
    with pytest.raises(ConfigError, match=r"all 4 experts work on every token.*original with hidden_dim 192"):
        models.preset("moe", "tiny", top_k=4)
    with pytest.raises(ConfigError, match="num_experts"):
        models.preset("moe", "tiny", num_experts=1)
    with pytest.raises(ConfigError, match=r"attention: model persistent needs a mask.*Choose auto or sdpa"):
        models.preset("persistent", "tiny", attention="flash")
    assert models.preset("persistent", "tiny").kernel == "sdpa"
    assert models.preset("persistent", "tiny", attention="eager").kernel == "eager"
    assert models.preset("original", "tiny").kernel == "auto"


# ---- pure attention


def test_without_feed_forward_is_original_with_feed_forwards_that_add_nothing():
    original, pure = tiny("original"), tiny("no_ffn", qk_norm=False)
    assert not [name for name, _ in pure.named_parameters() if "ffn" in name]
    pure.load_state_dict({n: p for n, p in original.state_dict().items() if "ffn" not in n})
    with torch.no_grad():
        for block in original.blocks:
            block.ffn.down.weight.zero_()
    ids = tokens(pure, 2, 9)
    torch.testing.assert_close(pure(ids).hidden, original(ids).hidden)


def test_normed_queries_and_keys_do_not_feel_their_length():
    for normed in (True, False):
        model = tiny("no_ffn", qk_norm=normed)
        ids = tokens(model, 1, 9)
        before = model(ids).hidden
        with torch.no_grad():
            for block in model.blocks:
                queries_and_keys = block.attention.stacked["qkv.weight"][:2]
                block.attention.qkv.weight[: sum(queries_and_keys)] *= 3
        moved = (model(ids).hidden - before).detach().abs().max()
        assert (moved < 1e-4) == normed, moved


# ---- all-attention


def written_out(model, ids: Tensor, segments: Tensor) -> Tensor:
    """Hidden states [B, L, D] of a model of one layer: loops over rows, positions and heads."""
    config, attention = model.config, model.blocks[0].attention
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    stored_keys, values_known = attention.persistent_keys, attention.persistent_values

    def norm(x):
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + config.norm_eps).sqrt()

    def turned(x, position):  # x [d]
        half = size // 2
        angles = position * config.rope_theta ** (-torch.arange(half, dtype=x.dtype) / half)
        whole = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((whole.real, whole.imag))

    rows = []
    for row in range(ids.shape[0]):
        x = model.embedding.weight[ids[row]]  # [L, D]
        states = norm(x) @ attention.qkv.weight.T
        positions, seen = [], {}
        for segment in segments[row].tolist():
            positions.append(seen.get(segment, 0) if segment else 0)
            seen[segment] = positions[-1] + 1
        out = []
        for i in range(len(x)):
            mixed = []
            for h in range(heads):
                g = h // (heads // kv_heads)
                q = states[i, h * size : (h + 1) * size]
                scores, values = [], []
                for j in range(i + 1):
                    if segments[row, j] != segments[row, i]:
                        continue
                    first = (heads + g) * size
                    k = states[j, first : first + size]
                    scores.append(turned(q, positions[i]) @ turned(k, positions[j]))
                    values.append(states[j, first + kv_heads * size : first + (kv_heads + 1) * size])
                for n in range(config.num_persistent):
                    scores.append(q @ stored_keys[h, n] * math.sqrt(config.dim))
                    values.append(values_known[h, n] * math.sqrt(config.num_persistent))
                weights = (torch.stack(scores) / math.sqrt(size)).softmax(dim=0)
                mixed.append(weights @ torch.stack(values))
            out.append(x[i] + attention.out.weight @ torch.cat(mixed))
        rows.append(norm(torch.stack(out)))
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_attention_is_its_formula_in_loops_with_its_gradients(attention):
    model = tiny("persistent", num_layers=1, num_persistent=5, attention=attention).double()
    ids = tokens(model, 2, 7)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 2, 0]])
    real = (segments > 0).unsqueeze(-1)
    parameters = list(model.parameters())
    probe = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * real
    got, want = model(ids, segments).hidden, written_out(model, ids, segments)
    torch.testing.assert_close(got * real, want * real, rtol=1e-10, atol=1e-10)
    parameters = [p for n, p in model.named_parameters() if "norm" not in n]  # the reference has none
    for mine, theirs in zip(
        torch.autograd.grad((got * probe).sum(), parameters),
        torch.autograd.grad((want * probe).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_no_mask_hides_persistent_vectors():
    """is-causal-on-concatenation: the first token of a document reaches every one of them."""
    model = tiny("persistent")
    ids = tokens(model, 1, 6)
    for segments in (None, torch.tensor([[1, 1, 1, 2, 2, 2]]), torch.tensor([[0, 0, 0, 1, 1, 1]])):
        for place in (0, 3):
            if segments is not None and segments[0, place] == 0:
                continue
            model.zero_grad()
            model(ids, segments).hidden[0, place].square().sum().backward()
            for block in model.blocks:
                for vectors in (block.attention.persistent_keys, block.attention.persistent_values):
                    assert bool((vectors.grad.abs().amax(dim=-1) > 0).all())


def test_a_cache_holds_tokens_only():
    model = tiny("persistent")
    with torch.no_grad():
        cache = model.new_cache(1, 8)
        model(tokens(model, 1, 5), cache=cache)
    assert cache.keys.shape == (2, 1, 8, 2, 8) and cache.length == 5


# ---- mixture of experts


def experts(**changes) -> Experts:
    """One layer in float64 with weights that matter."""
    torch.manual_seed(0)
    config = models.preset("moe", "tiny", dim=8, hidden_dim=6, num_heads=2, num_kv_heads=2, **changes)
    layer = Experts(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def one_token(layer: Experts, x: Tensor) -> Tensor:
    """x [D] through its experts, by the formula."""

    def swiglu(x, gate, up, down):
        opened = gate @ x
        return down @ (opened / (1 + (-opened).exp()) * (up @ x))

    logits = layer.router.weight @ x
    best = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: layer.top_k]
    total = sum(logits[e].exp() for e in best)
    out = sum(logits[e].exp() / total * swiglu(x, layer.gate[e], layer.up[e], layer.down[e]) for e in best)
    if layer.shared is not None:
        out = out + swiglu(x, layer.shared.gate.weight, layer.shared.up.weight, layer.shared.down.weight)
    return out


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("shared", [0, 1])
def test_experts_are_their_formula_token_by_token_with_gradients(top_k, shared):
    layer = experts(top_k=top_k, num_shared_experts=shared)
    x = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    got, logits = layer(x)
    want = torch.stack([one_token(layer, token) for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(logits, x @ layer.router.weight.T)
    probe = torch.randn_like(got)
    inputs = [x, *layer.parameters()]
    mine = torch.autograd.grad((got * probe).sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad((want * probe).sum(), inputs, allow_unused=True)
    for a, b, wanted in zip(mine, theirs, inputs, strict=True):
        zero = torch.zeros_like(wanted)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


@pytest.mark.parametrize("crowd", [False, True])
def test_the_product_over_all_groups_is_the_loop_over_experts_with_gradients(crowd):
    """torch has it for a CPU in float32: in its own loop, behind the same call."""
    torch.manual_seed(0)
    layer = Experts(models.preset("moe", "tiny", num_experts=6, top_k=2))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = (
        torch.randn(1 if crowd else 40, 32).expand(40, 32).contiguous()
    )  # a crowd leaves experts without a token
    order, ends = layer.groups(layer.route(layer.logits(x))[0])
    assert ends.dtype == torch.int32 and (len(ends.unique()) < 6) == crowd
    probe, found = torch.randn(80, 32), []
    for through in (one_by_one, at_once):
        inputs = [x.repeat_interleave(2, dim=0)[order].requires_grad_(), layer.gate, layer.up, layer.down]
        out = through(inputs[0], ends, *inputs[1:])
        found.append((out, *torch.autograd.grad((out * probe).sum(), inputs)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_token_is_dropped_when_all_want_one_expert():
    layer = experts(top_k=1)
    x = torch.randn(1, 1, 8, dtype=torch.float64) + 0.01 * torch.randn(1, 50, 8, dtype=torch.float64)
    chosen, weights = layer.route(layer.logits(x[0]))
    assert len(chosen.unique()) == 1 and torch.equal(weights, torch.ones_like(weights))
    want = torch.stack([one_token(layer, token) for token in x[0]])
    torch.testing.assert_close(layer(x)[0][0], want)


def test_an_expert_that_nobody_chose_has_a_gradient_of_zeros():
    """Not None: every rank must hand the same parameters to a reduction."""
    layer = experts(top_k=1)
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 5, 8)
    (chosen,) = layer.route(layer.logits(x[0]))[0].unique().tolist()
    layer(x)[0].sum().backward()
    for stack in (layer.gate, layer.up, layer.down):
        reached = stack.grad.abs().amax(dim=(1, 2)) > 0
        assert reached.tolist() == [e == chosen for e in range(4)]


def test_a_token_comes_out_the_same_bit_for_bit_whoever_else_is_in_the_batch():
    """moe-batch-dependence: capacity, or a matrix product that is rounded otherwise for a group of one."""
    model = tiny("moe", dim=64, hidden_dim=48)
    generator = torch.Generator().manual_seed(3)
    ids = tokens(model, 6, 16)
    base = model(ids).hidden
    for _ in range(20):
        others = torch.randint(0, 256, ids.shape, generator=generator)
        others[2] = ids[2]
        if torch.rand((), generator=generator) < 0.5:
            others[:2] = others[0, 0]  # crowds on few experts
        assert torch.equal(model(others).hidden[2], base[2])


def test_routing_is_in_float32_under_autocast_and_in_16_bit_models():
    """moe-bf16-router."""
    layer = tiny("moe").blocks[0].ffn
    x = torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = x.bfloat16()
        out, logits = layer(rounded)
    assert out.dtype == torch.bfloat16 and logits.dtype == torch.float32
    exact = rounded.double() @ layer.router.weight.double().T
    assert (logits - exact).abs().max().item() < 1e-5
    narrow = tiny("moe").bfloat16().blocks[0].ffn
    exact = rounded.double() @ narrow.router.weight.double().T
    assert (narrow(rounded)[1] - exact).abs().max().item() < 1e-5
    _, weights = narrow.route(narrow(rounded)[1].flatten(0, 1))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(18))


def balance_in_loops(logits: Tensor, keep: Tensor, top_k: int) -> Tensor:
    """Rows [B, L, experts]: each row's own unevenness, as often as it has tokens that count."""
    total = logits.new_zeros(())
    for row, row_keep in zip(logits, keep, strict=True):
        kept = [row[i] for i in range(len(row)) if row_keep[i]]
        for e in range(logits.shape[-1]) if kept else ():
            votes = sum(e in sorted(range(len(t)), key=lambda n: -t[n].item())[:top_k] for t in kept)
            mean = sum(t.exp()[e] / t.exp().sum() for t in kept) / len(kept)
            total = total + logits.shape[-1] * votes / (top_k * len(kept)) * mean * len(kept)
    return total / keep.sum()


def test_balance_and_z_are_their_formulas_with_gradients():
    generator = torch.Generator().manual_seed(1)
    shape = 3, 6, 5
    layers = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    keep = torch.tensor([[True] * 6, [True, True, False, False, True, False], [False] * 6])
    want = sum(balance_in_loops(logits, keep, 2) for logits in layers) / 3
    squares = [torch.log(t.exp().sum()) ** 2 for logits in layers for t in logits[keep]]
    for got, wanted in ((balance(layers, keep, 2), want), (router_z(layers, keep), sum(squares) / 27)):
        torch.testing.assert_close(got, wanted)
        for a, b in zip(torch.autograd.grad(got, layers), torch.autograd.grad(wanted, layers), strict=True):
            torch.testing.assert_close(a, b)
            assert bool((a[keep] != 0).all()) and bool((a[~keep] == 0).all())
    nothing = torch.zeros_like(keep)
    assert balance(layers, nothing, 2).item() == 0 and router_z(layers, nothing).item() == 0


def test_balance_is_one_when_even_and_experts_over_k_when_collapsed():
    turns = torch.arange(8)[:, None] % 4
    even = torch.zeros(8, 4).scatter(1, turns, 1.0).unsqueeze(0)
    keep = torch.ones(1, 8, dtype=torch.bool)
    assert balance([even], keep, 1) == pytest.approx(1.0, abs=1e-6)
    collapsed = torch.tensor([[50.0, 49.99, 0.0, 0.0]]).expand(1, 8, 4)
    assert balance([collapsed], keep, 2) == pytest.approx(2.0, abs=1e-5)  # 4 experts / top 2
    assert balance([collapsed, collapsed.roll(1, 2)], keep, 2) == pytest.approx(2.0, abs=1e-5)


def test_auxiliary_losses_are_weighted_and_know_nothing_of_padding():
    """aux-counts-pads."""
    model = tiny("moe", balance_weight=0.3, router_z_weight=0.2)
    ids = tokens(model, 2, 10)
    first = model(ids)
    assert set(first.auxiliary) == {"balance", "router_z"}
    logits = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda module, args, out: logits.append(out[1]))
    assert torch.equal(model(ids).auxiliary["balance"], first.auxiliary["balance"])
    every = torch.ones(2, 10, dtype=torch.bool)
    want = sum(balance_in_loops(layer, every, 2) for layer in logits) / 2
    torch.testing.assert_close(first.auxiliary["balance"], 0.3 * want)
    torch.testing.assert_close(first.auxiliary["router_z"], 0.2 * router_z(logits, every))

    def padded(left, right, filler):
        longer = torch.cat([torch.full((2, left), filler), ids, torch.full((2, right), filler)], dim=1)
        batch = align(longer, torch.tensor([[0] * left + [1] * 10 + [0] * right] * 2))
        return model(batch.inputs, batch.segments).auxiliary

    bare = padded(0, 0, 0)
    for other in (padded(0, 6, 9), padded(0, 2, 3), padded(5, 0, 9), padded(2, 3, 100)):
        for name, value in bare.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)
    segments = torch.tensor([[0, 1, 1, 2, 0, 0, 3, 3]])
    assert predicting(segments).tolist() == [[False, True, False, False, False, False, True, True]]
    assert tiny("moe", balance_weight=0.0)(ids).auxiliary == {}
    with torch.no_grad():
        assert model(ids, cache=model.new_cache(2, 10)).auxiliary == {}


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, compiling
@pytest.mark.parametrize(("recompute", "compiled"), [("blocks", False), ("none", True)])
def test_blocks_recomputed_or_compiled_give_the_same_losses_and_gradients(recompute, compiled):
    gradients = []
    for arranged in (False, True):
        model = tiny("moe", router_z_weight=0.1).train()
        if arranged:
            arrange(model, recompute=recompute, compiled=compiled, backend="eager")
        ids = tokens(model, 3, 13)
        batch = align(ids, torch.ones_like(ids))
        output = model(batch.inputs, batch.segments, batch.positions)
        (score(output.logits, batch).nats + sum(output.auxiliary.values())).backward()
        gradients.append([output.auxiliary["balance"], *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):  # compiled, norms and activations are formulas
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_doctor_looks_at_our_router():
    assert router_view(tiny("original")) is None
    subject = config_subject(MoEConfig(**MoEConfig.sizes["tiny"]))
    assert subject.router is not None
    for check in (routing, balance_check):
        assert check(subject).status == "PASS"
