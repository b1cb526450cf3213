"""Cache, modes, dtypes, files, gradients and learning, for every registered model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from zoo_models import NOISE, difference, every_model, tiny, tokens

from minilm import models
from minilm.alignment import align, score
from minilm.errors import ConfigError
from minilm.models import folder
from minilm.models.parts import Rotary

LENGTH = 12


@every_model
def test_every_size_has_the_parameters_that_its_config_predicts(name):
    """`build` asserts it; here for all sizes, on a device without memory."""
    for size in models.sizes(name):
        config = models.preset(name, size)
        with torch.device("meta"):
            model = models.build(config)
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters(), size


@every_model
def test_untied_models_are_predicted_too(name):
    tied, untied = (models.preset(name, "tiny", tie_embeddings=t) for t in (True, False))
    assert untied.num_parameters() - tied.num_parameters() == tied.vocab_size * tied.dim
    model = models.build(untied)
    assert model.head_weight is not model.embedding.weight


@every_model
def test_the_same_seed_builds_the_same_weights(name):
    a, b, other = tiny(name, seed=3), tiny(name, seed=3), tiny(name, seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), other.parameters(), strict=True))


@every_model
def test_initialise_reaches_every_parameter(name):
    """init-uninitialised-meta: memory is poisoned first, so a forgotten parameter shows."""
    model = tiny(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.initialise()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@every_model
def test_freshly_drawn_matrices_have_the_spread_of_the_config(name):
    """init-wrong-scale, init-rescale-noop."""
    model = models.build(models.preset(name, "tiny", init_std=0.02, dim=64, hidden_dim=128))
    for parameter_name, p in model.named_parameters():
        made_from_the_store = parameter_name.endswith("retriever.from_code")
        if p.dim() == 2 and p.any() and not made_from_the_store:
            assert p.std().item() == pytest.approx(0.02, rel=0.06), parameter_name
            assert abs(p.mean().item()) < 4 * 0.02 / math.sqrt(p.numel()), parameter_name


@every_model
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefill_and_steps_equal_the_full_forward(name, side, attention):
    """sdpa-topleft, decoder-flag-ignored, pos-offset-generate, use-cache-false-garbage."""
    model = tiny(name, attention=attention)
    ids, prompt = tokens(model, 3, LENGTH), 6
    segments = torch.ones_like(ids)
    if side == "left":
        segments[1, :2] = 0
        segments[2, :5] = 0
    if side == "right":  # the prompt is padded on its right: generated tokens still go on with the text
        segments[1, prompt - 2 : prompt] = 0
        segments[2, prompt - 4 : prompt] = 0
    positions = (segments.cumsum(dim=1) - 1).clamp(min=0) * segments
    full = model(ids, segments, positions).hidden
    with torch.no_grad():
        cache = model.new_cache(3, LENGTH)
        parts = [model(ids[:, :prompt], segments[:, :prompt], cache=cache).hidden]
        parts += [model(ids[:, i : i + 1], cache=cache).hidden for i in range(prompt, LENGTH - 3)]
        parts += [model(ids[:, LENGTH - 3 :], cache=cache).hidden]  # several tokens at once
    assert cache.length == LENGTH
    real = segments > 0
    assert difference(torch.cat(parts, dim=1), full)[real].max() <= NOISE


@every_model
def test_a_cache_keeps_packed_documents_apart(name):
    model = tiny(name)
    ids = tokens(model, 1, LENGTH)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]])
    full = model(ids, segments).hidden
    with torch.no_grad():
        cache = model.new_cache(1, LENGTH)
        cuts = [(0, 3), (3, 6), (6, 7), (7, 12)]
        parts = [model(ids[:, a:b], segments[:, a:b], cache=cache).hidden for a, b in cuts]
    assert difference(torch.cat(parts, dim=1), full).max() <= NOISE


@every_model
def test_tokens_without_segments_go_on_with_the_latest_document_of_their_row(name):
    model = tiny(name)
    ids = tokens(model, 2, LENGTH)
    segments = torch.tensor([[1] * 3 + [2] * 9, [0] * 2 + [1] * 10])
    full = model(ids, segments).hidden
    with torch.no_grad():
        cache = model.new_cache(2, LENGTH)
        model(ids[:, :6], segments[:, :6], cache=cache)
        steps = model(ids[:, 6:], cache=cache).hidden
    assert difference(steps, full[:, 6:]).max() <= NOISE


@every_model
def test_a_full_cache_says_so_and_is_left_as_it_was(name):
    model = tiny(name)
    ids = tokens(model, 1, LENGTH)
    with torch.no_grad():
        cache = model.new_cache(1, 8)
        model(ids[:, :6], cache=cache)
        with pytest.raises(ConfigError, match=r"holds 8 tokens a row: 6 are stored and 3 more"):
            model(ids[:, 6:9], cache=cache)
        after = model(ids[:, 6:8], cache=cache).hidden
        assert difference(after, model(ids[:, :8]).hidden[:, 6:]).max() <= NOISE
        cache.reset()
        again = model(ids[:, :8], cache=cache).hidden
        assert difference(again, model(ids[:, :8]).hidden).max() <= NOISE


@every_model
def test_training_and_evaluation_mode_agree_without_dropout(name):
    """train-eval-diverge, no-grad-other-path."""
    model = tiny(name)
    ids = tokens(model, 2, LENGTH)
    with_grad = model(ids).hidden
    with torch.no_grad():
        assert torch.equal(model(ids).hidden, with_grad)
    assert torch.equal(model.train()(ids).hidden, with_grad)


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_acts_in_training_and_never_in_evaluation(name, attention):
    """dropout-in-eval: a kernel that is handed its probability unconditionally."""
    dropped, plain = tiny(name, dropout=0.5, attention=attention), tiny(name, attention=attention)
    dropped.load_state_dict(plain.state_dict())
    ids = tokens(plain, 2, LENGTH)
    assert torch.equal(dropped(ids).hidden, plain(ids).hidden)
    dropped.train()
    assert not torch.equal(dropped(ids).hidden, dropped(ids).hidden)


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_weights_are_dropped_too(name, attention):
    """With all other dropout off, two passes in training mode still differ."""
    model = tiny(name, dropout=0.5, attention=attention).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = tokens(model, 1, LENGTH)
    assert not torch.equal(model(ids).hidden, model(ids).hidden)


@every_model
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_is_bit_equal_and_still_tied(name, tied, tmp_path):
    """tie-lost-on-load, init-overwrites-loaded, rng-stolen-by-lib."""
    model = tiny(name, tie_embeddings=tied)
    folder.save(model, tmp_path)
    state = torch.get_rng_state()
    loaded = folder.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.config == model.config and not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert (loaded.head_weight is loaded.embedding.weight) == tied
    assert torch.equal(loaded(ids := tokens(model, 1, LENGTH)).logits, model(ids).logits)


@every_model
def test_the_tie_survives_copies_and_casts(name):
    model = copy.deepcopy(tiny(name)).to(torch.bfloat16).float()
    assert model.head_weight is model.embedding.weight
    assert sum(p is model.head_weight for p in model.parameters()) == 1  # tie-double-step


@every_model
@pytest.mark.parametrize("cast", ["to", "bfloat16", "buffers", "empty"])
def test_the_rotary_table_stays_exact_under_every_cast(name, cast):
    """rope-bf16, rope-buffer-downcast: the last is an engine that casts buffers behind the module's back."""
    model = tiny(name)
    if cast == "to":
        model = model.to(torch.bfloat16)
    elif cast == "bfloat16":
        model = model.bfloat16().half()
    elif cast == "empty":
        model = model.to("meta").to_empty(device="cpu")
    else:
        for buffer in model.buffers():
            buffer.data = buffer.data.to(torch.bfloat16)
    tables = [m for m in model.modules() if isinstance(m, Rotary)]
    assert tables
    for table in tables:
        cos, sin = table(model.config.max_length)
        assert cos.dtype == sin.dtype == torch.float32
        half = model.config.head_dim // 2
        for position in (0, 1, 100, model.config.max_length - 1):
            for i in range(half):
                angle = position * model.config.rope_theta ** (-i / half)
                assert cos[0, position, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
                assert sin[0, position, 0, i].item() == pytest.approx(math.sin(angle), abs=1e-7)


@every_model
def test_bfloat16_is_near_float32(name):
    """Norms and softmax are computed in float32 inside: the error is that of rounding the states, not more.

    Where a router chooses, rounded states send a few tokens to another expert or entry of nearly equal weight: there
    the error is that of the token in the middle.
    """
    model = tiny(name)
    ids = tokens(model, 2, 100)
    want = model(ids).hidden

    def error(got):
        wrong = (got.float() - want) / want.std()
        chooses = any(hasattr(model.config, setting) for setting in ("top_k", "num_read", "top_values"))
        return wrong.std(dim=-1).median() if chooses else wrong.std()

    rounded = copy.deepcopy(model).to(torch.bfloat16)
    assert rounded(ids).hidden.dtype == torch.bfloat16
    assert error(rounded(ids).hidden) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert error(model(ids).hidden) < 0.03
        cache = model.new_cache(2, 100)
        with torch.no_grad():
            cached = model(ids, cache=cache).hidden
        assert cache.keys.dtype == torch.bfloat16
        assert error(cached) < 0.03


@every_model
def test_double_precision_is_double_all_the_way(name):
    model = tiny(name)
    ids = tokens(model, 1, LENGTH)
    single, double = model(ids).hidden, copy.deepcopy(model).double()(ids).hidden
    assert double.dtype == torch.float64
    assert difference(single.double(), double).max() < NOISE


@every_model
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(name, tied):
    model = tiny(name, tie_embeddings=tied).train()
    ids = tokens(model, 4, LENGTH + 1)
    output = model(align(ids, torch.ones_like(ids)).inputs)
    loss = score(output.logits, align(ids, torch.ones_like(ids))).nats
    (loss + sum(output.auxiliary.values())).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not dead


@every_model
def test_initial_loss_is_that_of_an_unlearned_model(name):
    """ln V + s^2 / 2, s^2 the variance of the logits: 10 or more is a wrong scale, less is a leak or no shift."""
    model = tiny(name, init_std=0.02, dim=64)
    ids = tokens(model, 32, 65)
    batch = align(ids, torch.ones_like(ids))
    with torch.no_grad():
        logits = model(batch.inputs, batch.segments, batch.positions).logits
    expected = math.log(model.config.vocab_size) + logits.var().item() / 2
    error = logits.std().item() / math.sqrt(batch.weights.numel())
    assert score(logits, batch).mean == pytest.approx(expected, abs=5 * error + 0.002)


@every_model
def test_one_batch_can_be_learnt_by_heart(name):
    torch.manual_seed(0)
    model = models.build(models.preset(name, "tiny")).train()
    ids = tokens(model, 4, 17)
    batch = align(ids, torch.tensor([[1] * 17, [1] * 9 + [2] * 8, [1] * 12 + [0] * 5, [0] * 3 + [1] * 14]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(120):
        output = model(batch.inputs, batch.segments, batch.positions)
        loss = score(output.logits, batch)
        optimizer.zero_grad()
        (loss.share(batch.num_targets()) + sum(output.auxiliary.values())).backward()
        optimizer.step()
    # First tokens of documents cannot be foretold, but they are nobody's target.
    assert loss.mean < 0.05


@every_model
def test_sequences_longer_than_the_context_are_refused(name):
    model = tiny(name)
    length = model.config.max_length
    model(tokens(model, 1, length))
    with pytest.raises(ConfigError, match=rf"has {length + 1} tokens, the model at most {length}"):
        model(tokens(model, 1, length + 1))
    with pytest.raises(ConfigError, match="the model knows 0 to"):
        model(tokens(model, 1, 2), positions=torch.tensor([[0, length]]))
    with pytest.raises(ConfigError, match="at most"):
        model.new_cache(1, length + 1)


@every_model
def test_flops_grow_with_the_sequence_and_training_is_three_forwards(name):
    config = models.preset(name, "tiny")
    a, b, c = (config.flops_per_token(n) for n in (1, 101, 201))
    assert c - b == b - a > 0
    assert config.training_flops_per_token(101) == 3 * b
