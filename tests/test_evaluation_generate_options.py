"""Every option of the generator against plain loops in float64, and against the processors of transformers."""

from __future__ import annotations

import math

import pytest
import torch
from evaluation_reference import Fixed, Scripted, tiny_model
from generation_reference import log_sum, slow_draw, slow_text
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.errors import ConfigError
from minilm.evaluation import sampling
from minilm.evaluation.generate import Sampling, generate
from minilm.evaluation.sampling import Drawn, draw, told

PROMPTS = [[5, 9, 200, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 250, 13]]
OPTIONS = [
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 0.8},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"min_p": 0.0, "top_p": 1.0},
    {"temperature": 2.0, "repetition_penalty": 1.5},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.2, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_the_loop_in_tokens_and_in_both_log_probabilities(model, options):
    results = generate(model, PROMPTS, max_new_tokens=12, seed=11, **options)
    for number, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        slow = slow_text(model, prompt, 12, seed=11 + number, **options)
        assert result.tokens == [token for token, _, _ in slow]
        assert result.nats == pytest.approx([nats for _, nats, _ in slow], rel=1e-4, abs=1e-5)
        assert result.drawn_nats == pytest.approx([drawn for _, _, drawn in slow], rel=1e-4, abs=1e-5)


# Next to 20, float64 does not tell 1e-38 from 0: where the maximum is taken off these are equals.
NUMBERS = st.floats(-20, 20, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0)
LOGITS = st.lists(st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2.5]), NUMBERS), min_size=1, max_size=40)


@settings(deadline=None, max_examples=300)
@given(
    logits=LOGITS,
    uniform=st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.one_of(st.none(), st.integers(1, 50)),
    top_p=st.one_of(st.none(), st.sampled_from([1e-6, 0.313, 0.777, 0.99, 1.0])),
    min_p=st.one_of(st.none(), st.sampled_from([0.0, 0.117, 0.61, 1.0])),
)
def test_any_logits_are_drawn_from_as_the_loop_draws(logits, uniform, **options):
    """Ties, too: of equals the lower id comes first."""
    sampling = Sampling(max_new_tokens=1, **options)
    found = draw(torch.tensor([logits]), sampling, torch.tensor([uniform], dtype=torch.float64))
    token, nats = slow_draw(torch.tensor(logits).double().tolist(), uniform, **options)
    # At a border between two tokens, or at the edge of top-p, rounding may decide: then the next ones are right, too.
    near = {
        slow_draw(torch.tensor(logits).double().tolist(), u, **options)[0]
        for u in (max(0.0, uniform - 1e-12), min(uniform + 1e-12, math.nextafter(1.0, 0.0)))
    }
    assert int(found.tokens) in near | {token}
    if int(found.tokens) == token:
        assert float(found.nats) == pytest.approx(nats, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("width", [600, 5000])
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.95}, {"min_p": 0.01}, {"top_p": 0.6, "min_p": 0.05}, {"top_k": 200}], ids=str
)
def test_looking_at_the_most_probable_first_changes_nothing(width, spread, options):
    """Wide vocabularies: numbers that fall among the first tokens, among the next, and far behind, with ties."""
    torch.manual_seed(width)
    logits = (torch.randn(24, width) * spread).mul(8).round().div(8)
    uniform = torch.linspace(0, 1 - 1e-9, 24, dtype=torch.float64)
    found = draw(logits, Sampling(max_new_tokens=1, temperature=0.9, **options), uniform)
    for row in range(24):
        token, nats = slow_draw(
            logits[row].double().tolist(), float(uniform[row]), temperature=0.9, **options
        )
        assert int(found.tokens[row]) == token
        assert float(found.nats[row]) == pytest.approx(nats, rel=1e-9)


def test_the_filters_and_their_order_are_those_of_transformers():
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    how = {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.15, "repetition_penalty": 1.4}
    config = GenerationConfig(do_sample=True, num_beams=1, **how)
    processors = tiny._get_logits_processor(config, input_ids_seq_length=6, device="cpu")
    assert len(processors) == 5
    for case in range(30):
        text = torch.randint(0, 50, (1, 6))
        logits = torch.randn(1, 50) * 3
        theirs = processors(text, logits.clone()).double().softmax(dim=-1)[0]
        for uniform in torch.linspace(0.01, 0.99, 25).tolist():
            token, nats = slow_draw(logits[0].double().tolist(), uniform, text=tuple(text[0].tolist()), **how)
            assert math.exp(-nats) == pytest.approx(float(theirs[token]), rel=1e-4)
        assert int((theirs > 0).sum()) > 1 or case, (
            "more than one token must be left for this to mean something"
        )


def test_padding_is_not_penalised_and_the_own_prompt_is():
    """Token 0 fills the padding of the short prompt; only rows that have a token in their text pay for it."""
    logits = [2.0, 1.9, 1.8, -3.0]
    rows = generate(Fixed(logits), [[3], [0, 3, 3]], max_new_tokens=1, temperature=0, repetition_penalty=1.2)
    assert [row.tokens for row in rows] == [[0], [1]]


def test_each_of_several_ending_tokens_ends_a_text_and_none_does_before_its_time(model):
    free = generate(model, PROMPTS, max_new_tokens=20, seed=1)
    eos = (free[0].tokens[3], free[1].tokens[6], free[2].tokens[9])
    for least in (0, 5):
        for number, result in enumerate(
            generate(model, PROMPTS, max_new_tokens=20, seed=1, eos_id=eos, min_new_tokens=least)
        ):
            slow = slow_text(model, PROMPTS[number], 20, seed=1 + number, eos=eos, min_new_tokens=least)
            assert result.tokens == [token for token, _, _ in slow]
            assert len(result.tokens) > least and not set(result.tokens[:least]) & set(eos)
            assert result.stopped == ("eos" if result.tokens[-1] in eos else "length")


def test_seeds_may_be_given_one_by_one(model):
    rows = generate(model, [PROMPTS[0]] * 3, max_new_tokens=9, seeds=[8, 3, 8])
    assert rows[0].tokens == rows[2].tokens != rows[1].tokens
    assert rows[1].tokens == generate(model, [PROMPTS[0]], max_new_tokens=9, seed=3)[0].tokens
    for wrong in ([1, 2], [1, 2, -3], [1, 2, 3.0]):
        with pytest.raises(ConfigError, match="seeds must be 3 integers"):
            generate(model, [PROMPTS[0]] * 3, max_new_tokens=9, seeds=wrong)


def test_cancelling_is_asked_before_each_step_and_keeps_what_is_there(model):
    whole = generate(model, PROMPTS, max_new_tokens=9)
    asked = []
    rows = generate(model, PROMPTS, max_new_tokens=9, cancel=lambda: bool(asked.append(1)) or len(asked) == 5)
    for cut, full in zip(rows, whole, strict=True):
        assert (cut.tokens, cut.stopped) == (full.tokens[:4], "cancelled")
    (nothing,) = generate(Fixed([0.0, 1.0]), [[1]], max_new_tokens=9, cancel=lambda: True)
    assert (nothing.tokens, nothing.nats, nothing.stopped) == ([], [], "cancelled")


def test_a_row_that_ended_is_not_cancelled():
    rows = generate(
        Scripted([4, 2, 5, 6], vocab_size=8),
        [[1], [1, 1]],
        max_new_tokens=3,
        temperature=0,
        eos_id=2,
        cancel=iter([False, False, True]).__next__,
    )
    assert [row.stopped for row in rows] == ["eos", "eos"]
    rows = generate(
        Scripted([4, 2, 5, 6], vocab_size=8),
        [[1], [1, 1, 1]],
        max_new_tokens=3,
        temperature=0,
        eos_id=2,
        cancel=iter([False, False, True]).__next__,
    )
    assert [(row.stopped, len(row.tokens)) for row in rows] == [("eos", 2), ("cancelled", 2)]


def test_wrong_values_of_every_option_are_listed_at_once(model):
    with pytest.raises(ConfigError) as caught:
        generate(
            model, [[1]], max_new_tokens=4, min_new_tokens=5, min_p=1.5, repetition_penalty=0, temperature=-1
        )
    for part in (
        "4 problems",
        "min_new_tokens is 5",
        "min_p is 1.5",
        "repetition_penalty is 0",
        "temperature is -1",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="stop string is ''"):
        generate(model, [[1]], max_new_tokens=4, tokenizer=object(), stop=["a", ""])
    with pytest.raises(ConfigError, match="give the tokenizer"):
        generate(model, [[1]], max_new_tokens=4, stop="a")


# --- what the host is told of a step, by numpy or by torch


@pytest.fixture(params=["few numbers", "many", "accelerator"])
def told_by(request, monkeypatch):
    if request.param == "many":
        monkeypatch.setattr(sampling, "FEW", 0)
    if request.param == "accelerator":
        monkeypatch.setattr(sampling, "_for_numpy", lambda _: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_is_told_with_the_nats_of_its_token_and_its_highest_logit(told_by, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator, dtype=dtype) * 8
    logits[1, 3] = -math.inf
    logits[2] += 1000  # a sum of exponentials would overflow
    tokens, drawn_nats = torch.tensor([0, 7, 39, 2, 11]), torch.arange(5, dtype=torch.float64) / 3
    rows = told(logits, Drawn(tokens, drawn_nats))
    for row, (token, nats, drawn, highest) in enumerate(rows):
        values = logits[row].tolist()
        right = log_sum(values) - values[tokens[row]]
        assert (token, drawn, highest) == (tokens[row], drawn_nats[row], max(values))
        assert nats == pytest.approx(right, rel=1e-6, abs=1e-6)


def test_a_sure_token_keeps_the_digits_of_its_nats(told_by):
    """The sum of all less the logit, both near 300, would leave no digit of it."""
    logits = torch.full((1, 8), 290.0)
    logits[0, 2] = 300.0
    ((_, nats, _, _),) = told(logits, Drawn(torch.tensor([2]), torch.zeros(1, dtype=torch.float64)))
    assert nats == pytest.approx(math.log1p(7 * math.exp(-10)), rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_numbers_is_told_by_its_highest_without_a_warning(told_by, bad):
    logits = torch.zeros(3, 6)
    logits[1, 4], logits[2] = bad, -math.inf
    greedy = Sampling(max_new_tokens=1, temperature=0)
    highest = [row[3] for row in told(logits, draw(logits, greedy, torch.zeros(3, dtype=torch.float64)))]
    assert [math.isfinite(value) for value in highest] == [True, False, False]


def test_of_several_highest_logits_greedy_takes_the_first(told_by):
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [7.0, 7.0, 7.0, 7.0], [0.0, 1.0, 2.0, 2.0]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        greedy = Sampling(max_new_tokens=1, temperature=0)
        found = draw(logits.to(dtype), greedy, torch.zeros(3, dtype=torch.float64))
        assert found.tokens.tolist() == [1, 0, 2]
        assert found.nats.tolist() == [0, 0, 0]
