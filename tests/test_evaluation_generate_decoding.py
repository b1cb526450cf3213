"""The original Transformer written out for one position: the model's own forward without a cache is the reference."""

from __future__ import annotations

import pytest
import torch
from zoo_models import tiny

from minilm.evaluation import feeding, products
from minilm.evaluation.decoding import Decoder, decodes
from minilm.evaluation.feeding import Cached
from minilm.evaluation.generate import generate, stream
from minilm.evaluation.mode import head_of
from minilm.evaluation.products import Products

EQUAL = [[5, 9, 200, 31], [8, 8, 1, 30], [1, 2, 3, 4], [40, 2, 0, 7]]
PADDED = [[5, 9, 200, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 250, 13], [3, 3], [60, 1, 2]]
ROWS = {"one": EQUAL[:1], "two": EQUAL[1:3], "equal": EQUAL, "few padded": PADDED[:3], "padded": PADDED}
every_rows = pytest.mark.parametrize("prompts", list(ROWS.values()), ids=list(ROWS))


def large_enough(**changes):
    """Norms that are not one, a norm's eps that counts, and two query heads for each of four that share keys."""
    settings = {"vocab_size": 2048, "dim": 256, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4}
    model = tiny("original", **{**settings, "norm_eps": 0.05, "init_std": 0.08, **changes})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 1.7, generator=generator)
    return model


@pytest.fixture(autouse=True)
def operators():
    if not products._works():
        pytest.skip("this torch has no oneDNN linear operators")


def fed(model, prompts, steps):
    """Logits of each step, the tokens being given, not chosen; float32."""
    feed = Cached(model, prompts, steps + 1)
    found = []
    with feed.computing():
        found.append(feed.logits())
        for step in range(steps):
            feed.append(torch.tensor([(17 * step + 5 * row) % 2048 for row in range(len(prompts))]))
            found.append(feed.logits())
    assert feed.decoder is not None and feed.decoder.stored == max(map(len, prompts)) + steps
    return found


@every_rows
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"num_kv_heads": 8}], ids=str)
@pytest.mark.parametrize("laid_out", [False, True])
def test_the_logits_of_every_step_are_those_of_the_whole_text(prompts, changes, laid_out, monkeypatch):
    monkeypatch.setattr(products, "pays", lambda rows, steps: laid_out)
    model = large_enough(**changes)
    found = fed(model, prompts, 5)
    for row, prompt in enumerate(prompts):
        text = prompt + [(17 * step + 5 * row) % 2048 for step in range(5)]
        with torch.no_grad():
            whole = model(torch.tensor([text])).logits[0]
        for step, logits in enumerate(found):
            want = whole[len(prompt) - 1 + step]
            torch.testing.assert_close(logits[row], want, rtol=1e-5, atol=2e-5 * float(want.abs().max()))


@every_rows
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 5}], ids=str
)
def test_the_text_is_that_of_the_general_way(prompts, options, monkeypatch):
    model = large_enough()
    asked = {"max_new_tokens": 20, "repetition_penalty": 1.1, "eos_id": 9, "min_new_tokens": 4, **options}
    steps = []
    real = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, tokens: steps.append(1) or real(self, tokens))
    fast = generate(model, prompts, **asked)
    taken = len(steps)
    monkeypatch.setattr(feeding, "decodes", lambda *_: False)
    plain = generate(model, prompts, **asked)
    assert taken == len(steps) == max(len(result.tokens) for result in plain) - 1
    for one, other in zip(fast, plain, strict=True):
        assert (one.tokens, one.stopped) == (other.tokens, other.stopped)
        assert one.nats == pytest.approx(other.nats, rel=1e-4, abs=1e-5)


def products_of(model):
    return Products(model, head_of(model), rows=1, steps=2)


def bent(model):
    model.blocks[1].ffn.forward = lambda x: x
    return model


def heard(model):
    model.blocks[1].register_forward_hook(lambda *_: None)
    return model


def heard_before(model):
    model.norm.register_forward_pre_hook(lambda *_: None)
    return model


def biased(model):
    model.blocks[0].attention.out.bias = torch.nn.Parameter(torch.ones(model.config.dim))
    return model


def other_norm(model):
    model.norm.double()
    return model


def test_only_a_plain_original_model_is_decoded_so():
    assert decodes(large_enough(), products_of(large_enough()))
    settings = {"vocab_size": 2048, "dim": 256, "num_layers": 3}
    others = [
        *(tiny(name, **settings) for name in ("moe", "knowledge", "no_ffn")),
        large_enough(attention="eager"),
        tiny("original"),
        large_enough().double(),
        *(change(large_enough()) for change in (bent, heard, heard_before, biased, other_norm)),
    ]
    for model in others:
        assert not decodes(model, products_of(model)), type(model)


def test_dropout_and_the_models_mode_and_gradients_are_as_before():
    model = large_enough(dropout=0.5)
    want = [r.tokens for r in generate(model.eval(), EQUAL, max_new_tokens=12, temperature=0)]
    model.train()
    assert [r.tokens for r in generate(model, EQUAL, max_new_tokens=12, temperature=0)] == want
    assert model.training
    loss = model(torch.tensor(EQUAL)).logits.sum()
    loss.backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


def test_a_stream_is_the_text_of_generate_and_the_model_may_be_asked_between_its_pieces():
    from minilm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["the cat sat on the mat. " * 5], vocab_size=300)
    model = large_enough(vocab_size=tokenizer.num_tokens, hidden_dim=704, dropout=0.5).train()
    assert decodes(model, products_of(model))
    asked = {"max_new_tokens": 6, "temperature": 0.9, "seed": 2}
    (whole,) = generate(
        model, [tokenizer.prompt("the")], eos_id=tokenizer.eos_id, bos_id=tokenizer.bos_id, **asked
    )
    pieces = stream(model, tokenizer, "the", **asked)
    next(pieces)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    list(pieces)
    assert pieces.result.tokens == whole.tokens
    assert len(whole.tokens) > 3


def test_a_copy_is_made_where_it_pays(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [products.pays(*asked) for asked in ((1, 500), (3, 500), (4, 8), (16, 7))] == [
        False,
        False,
        True,
        False,
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [products.pays(*asked) for asked in ((1, 47), (1, 48), (4, 8))] == [False, True, True]
