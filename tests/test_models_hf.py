"""The border: the same logits on both sides, and any causal LM behind our interface."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from zoo_models import NOISE, difference, tiny, tokens

from minilm import models
from minilm.alignment import align, score
from minilm.errors import CheckpointError, ConfigError
from minilm.models.hf import HuggingFaceModel, from_hf, to_hf

# Head size 16, four query heads to a key head, a base that is not the default.
SHAPE = {
    "vocab_size": 97, "dim": 128, "num_layers": 3, "num_heads": 8, "num_kv_heads": 2, "hidden_dim": 160,
    "max_length": 64, "rope_theta": 50_000.0, "norm_eps": 1e-5,
}  # fmt: skip


def ours(**changes) -> torch.nn.Module:
    return tiny("original", **{**SHAPE, "init_std": 0.08, **changes})


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        **{
            "vocab_size": 97, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 2, "intermediate_size": 160, "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True, "initializer_range": 0.08, "attn_implementation": "eager",
            **changes,
        }
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_our_weights_give_llamas_logits(tied):
    """rope-interleave, rope-wrong-base, gqa-head-order, gelu-variant, embed-scale, norm-plus-one: golden logits."""
    model = ours(tie_embeddings=tied)
    theirs = to_hf(model)
    ids = tokens(model, 3, 64)
    with torch.no_grad():
        want = theirs(input_ids=ids).logits
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=0)
    assert want.std() > 0.3  # two-sided: there is something to differ in
    assert theirs.num_parameters() == model.config.num_parameters()


@pytest.mark.parametrize("tied", [True, False])
def test_llamas_weights_give_llamas_logits(tied, tmp_path):
    theirs = llama(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (3, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(input_ids=ids).logits
        for source in (theirs, tmp_path):
            got = from_hf(source)
            torch.testing.assert_close(got(ids).logits, want, atol=1e-5, rtol=0)
            assert got.config.rope_theta == 50_000.0 and got.config.tie_embeddings == tied
            back = to_hf(got)
            assert all(torch.equal(a, b) for a, b in zip(back.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_means_the_same_on_both_sides(side):
    model = ours()
    theirs = to_hf(model)
    ids = tokens(model, 3, 20)
    mask = torch.ones_like(ids)
    for row, n in ((1, 4), (2, 11)):
        mask[row, slice(0, n) if side == "left" else slice(20 - n, 20)] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        got = model(ids, mask).logits
    torch.testing.assert_close(got[mask > 0], want[mask > 0], atol=1e-5, rtol=0)


def test_greedy_generation_with_both_caches_is_the_same():
    model = ours()
    theirs = to_hf(model, bos_id=1, eos_id=None, pad_id=0)
    ids = tokens(model, 2, 10)
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, use_cache=True
    )
    text = ids
    with torch.no_grad():
        cache = model.new_cache(2, 22)
        new = ids
        for _ in range(12):
            new = model(new, cache=cache).logits[:, -1].argmax(dim=-1, keepdim=True)
            text = torch.cat([text, new], dim=1)
    assert text.tolist() == want.tolist()


def test_losses_and_gradients_agree():
    model = ours()
    theirs = to_hf(model).train()
    ids = tokens(model, 2, 33)
    batch = align(ids, torch.ones_like(ids))
    loss = score(model.train()(batch.inputs, batch.segments, batch.positions).logits, batch)
    loss.share(batch.num_targets()).backward()
    out = theirs(input_ids=ids, labels=ids)
    out.loss.backward()
    assert loss.mean == pytest.approx(out.loss.item(), rel=1e-6)
    copied = from_hf(theirs)
    for (name, p), q in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert torch.equal(p, q), name
    grads = theirs.model.layers[1].self_attn
    fused = torch.cat([getattr(grads, f"{x}_proj").weight.grad for x in "qkv"])
    assert difference(model.blocks[1].attention.qkv.weight.grad.flatten(), fused.flatten()) < 1e-4
    assert (
        difference(model.embedding.weight.grad.flatten(), theirs.model.embed_tokens.weight.grad.flatten())
        < 1e-4
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_dtype_is_kept(tied):
    model = ours(tie_embeddings=tied).to(torch.bfloat16)
    theirs = to_hf(model)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in from_hf(theirs).parameters()} == {torch.bfloat16}


SMALL = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 64, "head_dim": 16, "initializer_range": 0.1,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def family(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


# Families that are a Llama under these settings.
ALIKE = {"mistral": {"sliding_window": None}, "granite": {"attention_multiplier": 16**-0.5}}


@pytest.mark.parametrize("name", ALIKE)
def test_other_families_that_compute_the_same_come_in(name, tmp_path):
    theirs = family(name, **ALIKE[name])
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(from_hf(tmp_path)(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mistral", {"sliding_window": 16}, ["sliding_window is 16"]),
        ("qwen2", {}, ["self_attn.q_proj.bias (2) has no place", "self_attn.k_proj.bias", "self_attn.v_proj.bias"]),
        ("qwen3", {}, ["self_attn.q_norm.weight (2) has no place", "self_attn.k_norm.weight"]),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "attention_dropout": 0.1},
            ["layers of sliding_attention", "sliding_window is 16", "attention_dropout is 0.1", "q_proj.bias"],
        ),
        ("granite", {"attention_multiplier": 0.3}, ["its logits differ by"]),
        ("granite", {"attention_multiplier": 0.25, "logits_scaling": 1.1}, ["its logits differ by"]),
        ("helium", {}, ["its logits differ by"]),  # rotates neighbours, under the names of a Llama
        ("gemma", {}, ["hidden_act is 'gelu_pytorch_tanh'"]),
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "head_dim": 32},
            ["hidden_act is 'gelu'", "attention_bias is True", "mlp_bias is True", "head_dim is 32; original has 16"],
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}},
            ["rope_type is 'linear'"],
        ),
        ("phi3", {}, ["weight model.layers.*.mlp.gate_up_proj.weight (2) has no place", "there is no weight"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_original_does_not_have_is_refused_all_of_it(name, changes, said):
    with pytest.raises(CheckpointError) as refused:
        from_hf(family(name, **changes))
    text = str(refused.value)
    assert [part for part in said if part not in text] == []


def test_a_model_of_another_kind_is_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97, n_positions=32))
    with pytest.raises(CheckpointError) as refused:
        from_hf(gpt2)
    for part in (
        "gpt2 model",
        "no setting intermediate_size",
        "no rotary positions",
        "transformer.wpe.weight has no",
    ):
        assert part in str(refused.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_change_no_bit(tied, dtype, tmp_path):
    """Ours -> folder -> ours, and theirs -> ours -> folder -> theirs."""
    model = ours(tie_embeddings=tied).to(dtype)
    to_hf(model).save_pretrained(tmp_path / "a")
    again = from_hf(tmp_path / "a")
    assert {**vars(again.config), "init_std": 0} == {**vars(model.config), "init_std": 0}
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name
    theirs = llama(tie_word_embeddings=tied).to(dtype)
    to_hf(from_hf(theirs)).save_pretrained(tmp_path / "b")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "b").state_dict()
    for name, value in theirs.state_dict().items():
        assert value.dtype == back[name].dtype and torch.equal(value, back[name]), name


def test_a_deep_model_in_bfloat16_is_no_other_model():
    """Its logits differ by most of their spread from rounding alone; they are compared in float32."""
    model = ours(num_layers=16, init_std=0.2).to(torch.bfloat16)
    again = from_hf(to_hf(model))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="its logits differ by"):
        from_hf(family("granite", attention_multiplier=0.3).to(torch.bfloat16))


def test_settings_without_weights_can_be_changed_on_the_way_in():
    got = from_hf(llama(), max_length=32, dropout=0.1, attention="eager")
    assert (got.config.max_length, got.config.dropout, got.config.attention) == (32, 0.1, "eager")
    assert got.rotary.cos.shape[0] == 32


def test_a_folder_that_is_none_or_lacks_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        from_hf(tmp_path)
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        from_hf(tmp_path)


# ---- any causal LM behind our interface


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def capped() -> torch.nn.Module:
    """Logits with a cap: not hidden @ weight.T."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, head_dim=8, max_position_embeddings=64, final_logit_softcapping=2.0,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


FOREIGN = {"llama": llama, "gpt2": gpt2, "capped": capped}


@pytest.mark.parametrize("kind", FOREIGN)
def test_packed_rows_are_answered_as_documents_alone(kind):
    theirs = FOREIGN[kind]()
    model = HuggingFaceModel(theirs)
    ids = torch.randint(0, 97, (2, 14), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 5 + [2] * 1 + [3] * 8, [0] * 3 + [1] * 6 + [2] * 3 + [0] * 2])
    batch = align(torch.cat([ids, ids[:, :1]], dim=1), torch.cat([segments, segments[:, :1] * 0], dim=1))
    with torch.no_grad():
        output = model(batch.inputs, batch.segments, batch.positions)
        for row, start, stop in ((0, 0, 5), (0, 5, 6), (0, 6, 14), (1, 3, 9), (1, 9, 12)):
            want = theirs(input_ids=ids[row : row + 1, start:stop]).logits
            assert difference(output.logits[row, start:stop], want[0]).max() < NOISE
        plain = theirs(input_ids=ids).logits
        assert difference(model(ids).logits, plain).max() < NOISE
    assert output.hidden.shape == (2, 14, theirs.config.hidden_size)
    assert bool(torch.isfinite(output.logits).all())
    assert model(ids, torch.zeros_like(ids)).hidden.abs().max() == 0  # nothing but padding
    assert model.config.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("padded", [False, True])
def test_foreign_caches_equal_the_full_forward(kind, padded):
    model = HuggingFaceModel(FOREIGN[kind]())
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    segments = torch.ones_like(ids)
    if padded:
        segments[1, :4] = 0
    with torch.no_grad():
        full = model(ids, segments).logits
        cache = model.new_cache(2, 12)
        parts = [model(ids[:, :7], segments[:, :7], cache=cache).logits]
        parts += [model(ids[:, i : i + 1], cache=cache).logits for i in range(7, 12)]
        with pytest.raises(ConfigError, match="holds 12 tokens"):
            model(ids[:, :1], cache=cache)
    assert difference(torch.cat(parts, dim=1), full)[segments > 0].max() < NOISE


def test_head_weight_is_given_only_where_it_is_the_whole_head():
    plain = HuggingFaceModel(gpt2())
    ids = torch.randint(0, 97, (1, 6))
    output = plain(ids)
    assert torch.equal(output.logits, torch.nn.functional.linear(output.hidden, plain.head_weight))
    with pytest.raises(ConfigError, match=r"Gemma2ForCausalLM are not hidden @ weight"):
        _ = HuggingFaceModel(capped()).head_weight


def test_gradients_reach_a_foreign_model_through_packed_rows():
    model = HuggingFaceModel(gpt2()).train()
    ids = torch.randint(0, 97, (2, 9))
    batch = align(ids, torch.tensor([[1] * 4 + [2] * 5, [1] * 7 + [0] * 2]))
    score(model(batch.inputs, batch.segments, batch.positions).logits, batch).nats.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "wpe" not in n)


def test_packed_documents_in_a_foreign_cache_are_refused():
    model = HuggingFaceModel(gpt2())
    ids = torch.randint(0, 97, (1, 6))
    for segments in ([[1, 1, 1, 2, 2, 2]], [[1, 1, 1, 1, 0, 0]]):
        with pytest.raises(ConfigError, match="one document a row"), torch.no_grad():
            model(ids, torch.tensor(segments), cache=model.new_cache(1, 6))


def test_only_original_is_exported_as_a_llama():
    model = ours()
    other = models.preset("original", "tiny")
    object.__setattr__(other, "name", "another")
    model.config = other
    with pytest.raises(ConfigError, match="Only model original"):
        to_hf(model)
