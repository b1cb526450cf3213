"""The original Transformer written out for one position: the model's own forward without a cache is the reference."""

from __future__ import annotations

import pytest
import torch
from zoo_models import tiny

from minilm import onednn
from minilm.errors import CheckFailed
from minilm.evaluation import feeding, products, single
from minilm.evaluation.decoding import Decoder, plain
from minilm.evaluation.feeding import Cached
from minilm.evaluation.generate import generate, stream
from minilm.evaluation.single import Single

EQUAL = [[5, 9, 200, 31], [8, 8, 1, 30], [1, 2, 3, 4], [40, 2, 0, 7]]
PADDED = [[5, 9, 200, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 250, 13], [3, 3], [60, 1, 2]]
ROWS = {"one": EQUAL[:1], "two": EQUAL[1:3], "equal": EQUAL, "few padded": PADDED[:3], "padded": PADDED}
# How a step multiplies: by oneDNN with weights as they are or laid out anew; a row alone in numpy, too.
WAYS = [(ROWS[name], way) for name in ROWS for way in ("as they are", "laid out")] + [(ROWS["one"], "numpy")]
every_way = pytest.mark.parametrize(("prompts", "way"), WAYS, ids=lambda x: x if isinstance(x, str) else None)


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


def take(way, monkeypatch):
    if way == "numpy" and not single.available():
        pytest.skip("numpy has another linear algebra than OpenBLAS here")
    if way != "numpy" and not onednn.works():
        pytest.skip("this torch has no oneDNN linear operators")
    monkeypatch.setattr(products, "pays", lambda rows, steps: way == "laid out")
    monkeypatch.setattr(single, "available", lambda: way == "numpy")


def fed(model, prompts, steps):
    """Logits of each step, the tokens being given, not chosen; float32."""
    feed = Cached(model, prompts, steps + 1)
    found = []
    with feed.computing():
        found.append(feed.logits())
        for step in range(steps):
            feed.append(torch.tensor([(17 * step + 5 * row) % 2048 for row in range(len(prompts))]))
            found.append(feed.logits())
    assert feed.cache is None and feed.decoder.stored == max(map(len, prompts)) + steps
    return found, type(feed.decoder)


@every_way
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"num_kv_heads": 8}], ids=str)
def test_the_logits_of_every_step_are_those_of_the_whole_text(prompts, way, changes, monkeypatch):
    take(way, monkeypatch)
    model = large_enough(**changes)
    found, kind = fed(model, prompts, 5)
    assert kind is (Single if way == "numpy" else Decoder)
    for row, prompt in enumerate(prompts):
        text = prompt + [(17 * step + 5 * row) % 2048 for step in range(5)]
        with torch.no_grad():
            whole = model(torch.tensor([text])).logits[0]
        for step, logits in enumerate(found):
            want = whole[len(prompt) - 1 + step]
            torch.testing.assert_close(logits[row], want, rtol=1e-5, atol=2e-5 * float(want.abs().max()))


@every_way
def test_attention_that_is_sure_of_a_token_is_no_infinity(prompts, way, monkeypatch):
    take(way, monkeypatch)
    model = large_enough()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[: 12 * 32].mul_(8)  # queries and keys: scores in the hundreds
    found, _ = fed(model, prompts, 2)
    for row, prompt in enumerate(prompts):
        text = prompt + [(17 * step + 5 * row) % 2048 for step in range(2)]
        with torch.no_grad():
            want = model(torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(found[-1][row], want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@every_way
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 5}], ids=str
)
def test_the_text_is_that_of_the_general_way(prompts, way, options, monkeypatch):
    take(way, monkeypatch)
    model = large_enough()
    asked = {"max_new_tokens": 20, "repetition_penalty": 1.1, "eos_id": 9, "min_new_tokens": 4, **options}
    steps = []
    for kind in (Decoder, Single):

        def counted(self, tokens, real=kind.logits):
            steps.append(len(tokens))
            return real(self, tokens)

        monkeypatch.setattr(kind, "logits", counted)
    fast = generate(model, prompts, **asked)
    taken = list(steps)
    monkeypatch.setattr(feeding, "plain", lambda _: False)
    general = generate(model, prompts, **asked)
    longest = max(len(result.tokens) for result in general)
    assert taken == steps == [len(prompts)] * (longest - 1)
    for one, other in zip(fast, general, strict=True):
        assert (one.tokens, one.stopped) == (other.tokens, other.stopped)
        assert one.nats == pytest.approx(other.nats, rel=1e-4, abs=1e-5)


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
    assert plain(large_enough()) and plain(tiny("original"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not plain(large_enough())
    settings = {"vocab_size": 2048, "dim": 256, "num_layers": 3}
    others = [
        *(tiny(name, **settings) for name in ("moe", "knowledge", "no_ffn")),
        large_enough(attention="eager"),
        large_enough().double(),
        *(change(large_enough()) for change in (bent, heard, heard_before, biased, other_norm)),
    ]
    for model in others:
        assert not plain(model), type(model)


def test_dropout_and_the_models_mode_and_gradients_are_as_before():
    model = large_enough(dropout=0.5)
    want = [r.tokens for r in generate(model.eval(), EQUAL, max_new_tokens=12, temperature=0)]
    model.train()
    assert [r.tokens for r in generate(model, EQUAL, max_new_tokens=12, temperature=0)] == want
    assert model.training
    loss = model(torch.tensor(EQUAL)).logits.sum()
    loss.backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("way", ["numpy", "laid out"])
def test_a_stream_is_the_text_of_generate_and_the_model_may_be_asked_between_its_pieces(way, monkeypatch):
    from minilm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["the cat sat on the mat. " * 5], vocab_size=300)
    model = large_enough(vocab_size=tokenizer.num_tokens, hidden_dim=704, dropout=0.5).train()
    assert plain(model)
    asked = {"max_new_tokens": 6, "temperature": 0.9, "seed": 2}
    take(way, monkeypatch)
    (whole,) = generate(
        model, [tokenizer.prompt("the")], eos_id=tokenizer.eos_id, bos_id=tokenizer.bos_id, **asked
    )
    pieces = stream(model, tokenizer, "the", **asked)
    next(pieces)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    list(pieces)
    assert pieces.result.tokens == whole.tokens
    assert len(whole.tokens) > 3


def test_a_copy_is_made_where_it_pays():
    asked = (1, 63), (1, 64), (2, 15), (2, 16), (16, 16), (16, 1), (1, 0)
    assert [products.pays(*one) for one in asked] == [False, True, False, True, True, False, False]


def test_a_row_alone_copies_no_weights_and_several_rows_do(monkeypatch):
    if not single.available() or not onednn.works():
        pytest.skip("needs OpenBLAS in numpy and oneDNN in torch")
    copied = []
    real = products.laid_out
    monkeypatch.setattr(products, "laid_out", lambda w, rows: copied.append(w.shape) or real(w, rows))
    generate(large_enough(), EQUAL[:1], max_new_tokens=70)
    assert not copied
    generate(large_enough(), EQUAL[:2], max_new_tokens=16)
    assert len(copied) == 3 * 5 + 1  # the products of three blocks, and the head


# --- a row alone, in numpy


@pytest.fixture
def openblas():
    if not single.available():
        pytest.skip("numpy has another linear algebra than OpenBLAS here")
    return single.openblas()


@pytest.mark.parametrize(("torch_has", "numpy_has", "taken"), [(1, 2, 1), (2, 1, 1), (2, 2, 2)])
def test_a_step_takes_no_more_threads_than_torch_or_numpy_were_given(
    openblas, torch_has, numpy_has, taken, monkeypatch
):
    during = []
    real = single._gated

    def gated(*both):
        during.append({library["num_threads"] for library in openblas.info()})
        return real(*both)

    monkeypatch.setattr(single, "_gated", gated)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_has)
    with openblas.limit(limits=numpy_has):
        generate(large_enough(), EQUAL[:1], max_new_tokens=3, temperature=0)
        assert {library["num_threads"] for library in openblas.info()} == {numpy_has}
    assert during == [{taken}] * 2 * 3


def test_where_numpy_has_another_library_the_row_goes_the_way_of_several(openblas, monkeypatch):
    model = large_enough()
    assert fed(model, EQUAL[:1], 2)[1] is Single
    monkeypatch.setattr(
        single.np, "show_config", lambda mode: {"Build Dependencies": {"blas": {"name": "mkl"}}}
    )
    assert fed(model, EQUAL[:1], 2)[1] is Decoder
    monkeypatch.setattr(single.np, "show_config", lambda mode: {})
    assert fed(model, EQUAL[:1], 2)[1] is Decoder


def test_weights_that_change_between_two_steps_are_those_of_the_next(openblas):
    """A row alone reads the model's own weights, however they were changed."""
    model = large_enough()
    feed = Cached(model, EQUAL[:1], 3)
    with feed.computing():
        feed.logits()
        feed.append(torch.tensor([5]))
        feed.logits()
        with torch.inference_mode():
            model.embedding.weight.mul_(2)
        feed.append(torch.tensor([6]))
        doubled = feed.logits()
        with torch.inference_mode():
            model.embedding.weight.div_(2)
        feed.decoder.stored -= 1
        before = feed.logits()
    # The input is normed in each block, but not on its way past them; the output layer is the same weight.
    assert (doubled - before).abs().max() > 0.1 * before.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_told_as_everywhere_and_numpy_does_not_warn(openblas, value):
    model = large_enough(tie_embeddings=False)
    (right,) = generate(model, EQUAL[:1], max_new_tokens=2, temperature=0)
    with torch.no_grad():
        model.embedding.weight[right.tokens[0]] = value
    with pytest.raises(CheckFailed, match="logits for new token 2 of prompt 0 are not finite"):
        generate(model, EQUAL[:1], max_new_tokens=2, temperature=0)
