"""One generator for every model: all variants, and models from elsewhere with and without a cache of their own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from evaluation_reference import Scripted, tiny_model
from generation_reference import slow_text
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_models import every_model, tiny

import minilm.evaluation.feeding as feeding
from minilm import onednn
from minilm.evaluation import products, sampling, single
from minilm.evaluation.generate import generate
from minilm.models.cache import KVCache
from minilm.models.hf import HuggingFaceModel, to_hf

PROMPTS = [[5, 9, 200, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 250, 13]]


@every_model
@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[0], [8, 8, 1, 30]]], ids=["padded", "equal"])
def test_every_variant_gives_the_text_of_the_loop_without_cache(name, prompts):
    model = tiny(name)
    results = generate(model, prompts, max_new_tokens=8, temperature=0.8, top_k=50, seed=4)
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        slow = slow_text(model, prompt, 8, temperature=0.8, top_k=50, seed=4 + number)
        assert result.tokens == [token for token, _, _ in slow]
        assert result.nats == pytest.approx([nats for _, nats, _ in slow], rel=1e-3, abs=1e-4)


@every_model
def test_the_cache_is_made_once_and_never_grows(name, monkeypatch):
    model, made, places = tiny(name), [], set()
    real = KVCache.extend

    def extend(cache, layer, k, v):
        if cache not in made:
            made.append(cache)
        places.add(
            (cache.keys.data_ptr(), cache.values.data_ptr(), cache.tokens.data_ptr(), cache.keys.shape[2])
        )
        return real(cache, layer, k, v)

    monkeypatch.setattr(KVCache, "extend", extend)
    generate(model, PROMPTS, max_new_tokens=9, temperature=0)
    assert len(made) == len(places) == 1
    assert made[0].max_length == made[0].length == 13 + 9 - 1


class Waits(TorchDispatchMode):
    """Counts what would make a host wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += any(
            part in name for part in ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal.")
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "equal"])
def test_no_step_waits_for_a_number_but_for_the_tokens_themselves(prompts, monkeypatch):
    # The way of an accelerator.
    monkeypatch.setattr(feeding, "plain", lambda _: False)
    monkeypatch.setattr(sampling, "_for_numpy", lambda _: False)
    model = tiny("original")
    counts = []
    for new in (3, 13):
        with Waits() as waits:
            generate(model, prompts, max_new_tokens=new, temperature=0, repetition_penalty=1.1, eos_id=255)
        counts.append(waits.count)
    assert counts[0] == counts[1]


# --- models from elsewhere


def gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    config.eos_token_id = config.bos_token_id = None
    return GPT2LMHeadModel(config).eval()


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers_generate_in_a_left_padded_batch(kind, penalty, tmp_path):
    if kind == "gpt2":
        theirs = gpt2()
        ours = HuggingFaceModel(theirs)
    else:  # through the exported folder
        from transformers import AutoModelForCausalLM

        ours = tiny_model(260)
        to_hf(ours, pad_id=0).save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, mask = left_padded(PROMPTS)
    free = [r.tokens for r in generate(ours, PROMPTS, max_new_tokens=20, temperature=0)]
    if penalty == 1:
        want = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert free == want[:, ids.shape[1] :].tolist()
        return
    # transformers penalises the padding's token, too: without padding both mean the same.
    got = generate(ours, PROMPTS, max_new_tokens=20, temperature=0, repetition_penalty=penalty)
    for prompt, result in zip(PROMPTS, got, strict=True):
        one = torch.tensor([prompt])
        want = theirs.generate(
            one,
            attention_mask=torch.ones_like(one),
            max_new_tokens=20,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        assert result.tokens == want[0, len(prompt) :].tolist()
    assert [r.tokens for r in got] != free


def lengths_seen(model):
    """How many tokens a row each forward pass is given."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True)
    return seen


def test_a_hugging_face_model_with_a_cache_is_fed_one_token_a_step():
    model = HuggingFaceModel(gpt2())
    seen = lengths_seen(model)
    generate(model, PROMPTS, max_new_tokens=5, temperature=0)
    assert seen == [13, 1, 1, 1, 1]


def test_a_model_that_keeps_nothing_or_cannot_be_told_positions_gets_the_whole_text_again():
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=260, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5)
    )
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=260, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.5)
    )
    for theirs, even in ((bloom, [4, 1, 1]), (mamba, [4, 5, 6])):
        model = HuggingFaceModel(theirs.eval())
        seen = lengths_seen(model)
        padded = generate(model, PROMPTS, max_new_tokens=3, temperature=0)
        assert seen == [13, 14, 15]
        seen.clear()
        alone = generate(model, PROMPTS[:1], max_new_tokens=3, temperature=0)
        assert seen == even
        for prompt, result in zip(PROMPTS, padded, strict=True):
            assert result.tokens == [t for t, _, _ in slow_text(model, prompt, 3, temperature=0)]
        assert alone[0].tokens == padded[0].tokens


# --- faster products on a CPU


def large_enough(name="original", **changes):
    return tiny(name, vocab_size=2048, dim=256, num_layers=4, **changes)


@pytest.fixture
def used(monkeypatch):
    """How often a product of oneDNN was taken."""
    if not onednn.works():
        pytest.skip("this torch has no oneDNN linear operator")
    calls = []
    real = products.linear

    def linear(weight, x, *then, **bias):
        calls.append(weight.is_mkldnn)
        return real(weight, x, *then, **bias)

    monkeypatch.setattr(products, "linear", linear)
    return calls


@pytest.mark.parametrize("name", ["original", "moe", "knowledge"])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_faster_products_give_the_same_text(name, rows, used, monkeypatch):
    model = large_enough(name)
    prompts = (PROMPTS * 2)[:rows]
    asked = {"max_new_tokens": products.STEPS_TO_PAY, "temperature": 0.7, "seed": 3}
    fast = generate(model, prompts, **asked)
    assert used and set(used) == {rows > 1}
    used.clear()
    monkeypatch.setattr(products, "fits", lambda _: False)
    monkeypatch.setattr(single, "available", lambda: False)
    plain = generate(model, prompts, **asked)
    assert not used
    for one, other in zip(fast, plain, strict=True):
        assert one.tokens == other.tokens
        assert one.nats == pytest.approx(other.nats, rel=1e-3, abs=1e-4)


def test_the_model_is_as_it_was_after_them_also_after_an_error(used, monkeypatch):
    model = large_enough()
    before = {name: module.forward for name, module in model.named_modules()}
    generate(model, PROMPTS * 2, max_new_tokens=9)
    monkeypatch.setattr(feeding.Cached, "append", lambda *_: (_ for _ in ()).throw(RuntimeError("stop here")))
    with pytest.raises(RuntimeError, match="stop here"):
        generate(model, PROMPTS * 2, max_new_tokens=9)
    assert used
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert before == {name: module.forward for name, module in model.named_modules()}
    loss = model(torch.tensor([PROMPTS[0]])).logits.sum()
    loss.backward()
    assert model.blocks[0].ffn.up.weight.grad is not None


def test_they_are_not_taken_in_other_types_under_autocast_in_small_models_or_where_they_are_wrong(
    used, monkeypatch
):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(large_enough(), PROMPTS, max_new_tokens=3)
    for other in (tiny("original"), large_enough().double(), large_enough().to(torch.bfloat16)):
        generate(other, PROMPTS, max_new_tokens=3)
    assert not used
    generate(large_enough(), PROMPTS, max_new_tokens=3, temperature=0)
    assert used
    used.clear()
    monkeypatch.setattr(products, "works", lambda: False)
    generate(large_enough(), PROMPTS, max_new_tokens=3, temperature=0)
    assert not used


def test_a_cancelled_text_frees_its_cache_and_restores_the_model():
    from minilm.data.tokenizer import Tokenizer
    from minilm.evaluation.generate import stream

    tokenizer = Tokenizer.train(["the cat sat on the mat. " * 5], vocab_size=300)
    model = tiny_model(tokenizer.num_tokens, dropout=0.5).train()
    pieces = stream(model, tokenizer, "the", max_new_tokens=50, temperature=0)
    next(pieces)
    cache = weakref.ref(pieces._writer.feed.cache)
    pieces.close()
    gc.collect()
    assert cache() is None
    assert model.training and list(pieces) == []
    assert pieces.result.stopped == "cancelled" and len(pieces.result.tokens) >= 1


def test_a_model_without_a_cache_streams_as_it_generates():
    (result,) = generate(Scripted([4, 5, 6], vocab_size=8), [[1]], max_new_tokens=3, temperature=0)
    assert result.tokens == [4, 5, 6]
