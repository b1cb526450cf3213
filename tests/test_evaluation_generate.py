"""Generation against a generator without cache that puts the whole text through the model at every step."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from evaluation_reference import Fixed, Scripted, row_logits, slow_generate, tiny_model, token_losses

from minilm.errors import CheckFailed, ConfigError, DataError
from minilm.evaluation.generate import Sampling, choose, generate

PROMPTS = [[5, 9, 200, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 250, 13]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


OPTIONS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 100_000},
    {"top_p": 0.5},
    {"top_p": 1e-9},
    {"top_p": 1.0},
    {"top_p": 0.999},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.3, "top_k": 3, "top_p": 0.95},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_the_slow_reference(model, options):
    results = generate(model, PROMPTS, max_new_tokens=12, seed=11, **options)
    for number, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        assert result.tokens == slow_generate(model, prompt, 12, seed=11 + number, **options)
        assert result.prompt == prompt
        assert result.stopped == "length"


def test_greedy_is_the_argmax_of_the_full_forward_at_every_step(model):
    """The bug `generator-repeats-prompt`, and a cache that gives other logits than the text itself."""
    for result in generate(model, PROMPTS, max_new_tokens=40, temperature=0):
        text = result.prompt + result.tokens
        logits = row_logits(model, text)
        for i in range(len(result.prompt), len(text)):
            assert text[i] == int(np.argmax(logits[i - 1]))
    assert len(set(result.tokens)) > 3, "the model must say different things for this to mean something"


def test_nats_are_the_teacher_forced_loss_of_the_new_tokens_whatever_the_temperature(model):
    for result in generate(model, PROMPTS, max_new_tokens=10, temperature=2.0, top_k=50, seed=3):
        losses = token_losses(model, result.prompt + result.tokens)[-len(result.tokens) :]
        assert result.nats == pytest.approx(losses, rel=1e-4, abs=1e-5)


def test_what_else_is_in_the_batch_does_not_change_a_sample(model):
    together = generate(model, PROMPTS, max_new_tokens=15, seed=40, eos_id=9)
    for number, prompt in enumerate(PROMPTS):
        (alone,) = generate(model, [prompt], max_new_tokens=15, seed=40 + number, eos_id=9)
        assert (alone.tokens, alone.stopped) == (together[number].tokens, together[number].stopped)
        assert alone.nats == pytest.approx(together[number].nats, rel=1e-4, abs=1e-5)


def test_samples_of_one_prompt_differ_from_the_first_token_on(model):
    """The bug `batch-first-token-shared`: one draw for all samples."""
    first = [r.tokens[0] for r in generate(model, [PROMPTS[0]] * 30, max_new_tokens=1, temperature=2.0)]
    assert len(set(first)) > 10


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model):
    one, two, other = (generate(model, PROMPTS, max_new_tokens=12, seed=s) for s in (5, 5, 105))
    assert [r.tokens for r in one] == [r.tokens for r in two] != [r.tokens for r in other]


def test_stops_at_eos_which_is_the_last_token_while_other_rows_go_on(model):
    """The bug `stop-not-at-eos`."""
    free = generate(model, PROMPTS, max_new_tokens=20, seed=1)
    eos = free[0].tokens[4]
    stopped = generate(model, PROMPTS, max_new_tokens=20, seed=1, eos_id=eos)
    for with_eos, without in zip(stopped, free, strict=True):
        end = without.tokens.index(eos) + 1 if eos in without.tokens else 20
        assert with_eos.tokens == without.tokens[:end]
        assert with_eos.stopped == ("eos" if eos in without.tokens else "length")
        assert len(with_eos.nats) == len(with_eos.tokens)
    assert len(stopped[0].tokens) <= 5
    assert {r.stopped for r in stopped} == {"eos", "length"}


def test_a_model_that_only_says_eos_stops_after_one_token():
    (result,) = generate(Fixed([0.0, 0.0, 50.0, 0.0]), [[1]], max_new_tokens=9, eos_id=2)
    assert (result.tokens, result.stopped) == ([2], "eos")


def test_eos_in_the_prompt_does_not_stop(model):
    (result,) = generate(model, [[2, 5, 2]], max_new_tokens=4, eos_id=2, temperature=0)
    assert len(result.tokens) == 4 or result.tokens[-1] == 2


@pytest.mark.parametrize("prompt_tokens, new", [(1, 128), (127, 2), (128, 1), (100, 29)])
def test_the_context_can_be_filled_to_the_last_place(model, prompt_tokens, new):
    """The bug `max-new-tokens-exceeded`, for prompts of 1, T - 1 and T tokens."""
    prompt = [3 + i % 200 for i in range(prompt_tokens)]
    (result,) = generate(model, [prompt], max_new_tokens=new, temperature=0)
    assert len(result.tokens) == new


def test_too_long_for_the_context_is_refused_with_the_numbers_before_computing():
    model = Fixed([0.0] * 8, max_length=64)
    model.forward = lambda *a, **k: pytest.fail("computed before checking")
    with pytest.raises(
        ConfigError, match=r"Prompt 1 has 60 tokens.*max_new_tokens 6.*65 tokens.*has 64.*at most 5 new"
    ):
        generate(model, [[1], [1] * 60], max_new_tokens=6)


def test_a_model_without_cache_gives_the_same_as_with(model):
    class Uncached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, inputs, segments=None, positions=None):
            return self.inner(inputs, segments=segments, positions=positions)

    options = {"max_new_tokens": 15, "temperature": 0.9, "top_k": 40, "seed": 2, "eos_id": 17}
    for a, b in zip(
        generate(model, PROMPTS, **options), generate(Uncached(), PROMPTS, **options), strict=True
    ):
        assert a.tokens == b.tokens


def test_mode_of_every_submodule_gradients_and_random_states_are_as_before():
    model = tiny_model(dropout=0.5)
    expected = [r.tokens for r in generate(model, PROMPTS, max_new_tokens=8)]
    model.train()
    model.blocks[1].eval()  # a part frozen on purpose
    modes = [m.training for m in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    prompts = copy.deepcopy(PROMPTS)
    assert [r.tokens for r in generate(model, prompts, max_new_tokens=8)] == expected
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert prompts == PROMPTS
    assert torch.is_grad_enabled()


def test_no_prompts_give_no_results(model):
    assert generate(model, [], max_new_tokens=5) == []


def test_an_empty_prompt_starts_from_bos_or_is_refused(model):
    (result,) = generate(model, [[]], max_new_tokens=4, bos_id=1, temperature=0)
    assert result == generate(model, [[1]], max_new_tokens=4, temperature=0)[0]
    with pytest.raises(DataError, match="Prompt 0 is empty"):
        generate(model, [[]], max_new_tokens=4)


def test_a_token_outside_the_vocabulary_is_named(model):
    for token in (300, -1):
        with pytest.raises(DataError, match=f"Prompt 1 has token {token}, but the model knows 0 to 299"):
            generate(model, [[1], [5, token]], max_new_tokens=4)


def test_all_invalid_settings_are_listed_at_once(model):
    with pytest.raises(ConfigError) as caught:
        generate(model, [[1]], max_new_tokens=0, temperature=-1, top_k=0, top_p=1.5, seed=-3)
    for name in (
        "5 problems",
        "max_new_tokens is 0",
        "temperature is -1",
        "top_k is 0",
        "top_p is 1.5",
        "seed is -3",
    ):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": float("nan")},
    ],
)
def test_values_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError):
        Sampling(max_new_tokens=1, **wrong)


@pytest.mark.parametrize("bad", [[0.0, float("nan")], [0.0, float("inf")], [-float("inf")] * 2], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_not_token_0(bad, temperature):
    with pytest.raises(CheckFailed, match="new token 1 of prompt 0 are not finite"):
        generate(Fixed(bad), [[1]], max_new_tokens=3, temperature=temperature)


def test_a_row_that_ended_may_become_nan_without_stopping_the_others():
    class Poisoned(Scripted):
        """Row 0 says EOS (2) first; a row with EOS in it is NaN from then on."""

        def forward(self, inputs, segments=None, positions=None):
            answer = super().forward(inputs)
            answer.logits[0, 0, 2] = 200.0
            answer.logits[(inputs == 2).any(dim=1)] = float("nan")
            return answer

    results = generate(Poisoned([4, 5, 6, 7], vocab_size=8), [[1], [1]], max_new_tokens=4, eos_id=2)
    assert [r.tokens for r in results] == [[2], [4, 5, 6, 7]]


def test_tokens_that_the_model_rules_out_are_never_drawn():
    results = generate(Fixed([0.0, -float("inf"), 0.0]), [[0]] * 20, max_new_tokens=10, temperature=5.0)
    assert {token for r in results for token in r.tokens} == {0, 2}


# --- the sampler alone


def shares(logits: list[float], **options) -> np.ndarray:
    """How much of the unit interval each token gets, by a fine grid of uniform numbers."""
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    sampling = Sampling(max_new_tokens=1, **options)
    chosen = choose(torch.tensor(logits).expand(len(grid), -1), sampling, grid)
    return np.bincount(chosen.numpy(), minlength=len(logits)) / 20_000


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_each_token_is_drawn_as_often_as_the_softmax_says(temperature):
    logits = np.array([1.0, -2.0, 0.5, 3.0, 2.9])
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    assert shares(logits.tolist(), temperature=temperature) == pytest.approx(expected, abs=2e-4)


def test_top_k_keeps_exactly_k_also_among_equals():
    """The bug `topk-collision`: a threshold by value keeps all that are equal to it."""
    assert shares([1.0] * 6, top_k=3) == pytest.approx([1 / 3] * 3 + [0] * 3, abs=2e-4)
    many = torch.zeros(1, 5000)  # an unstable sort keeps the order of few
    for u in (0.1, 0.5, 0.9):
        drawn = choose(many, Sampling(max_new_tokens=1, top_k=3), torch.tensor([u], dtype=torch.float64))
        assert drawn.item() == int(3 * u)
    assert shares([0.0, 2.0, 2.0, 2.0], top_k=2) == pytest.approx([0, 0.5, 0.5, 0], abs=2e-4)


def test_top_p_keeps_the_fewest_that_reach_it_also_among_equals():
    logits = np.log([0.1, 0.4, 0.3, 0.2]).tolist()
    assert shares(logits, top_p=0.65) == pytest.approx([0, 4 / 7, 3 / 7, 0], abs=2e-4)
    assert shares(logits, top_p=0.75) == pytest.approx([0, 4 / 9, 3 / 9, 2 / 9], abs=2e-4)
    assert shares([0.0] * 4, top_p=0.5) == pytest.approx([0.5, 0.5, 0, 0], abs=2e-4)
    assert shares([0.0] * 4, top_p=0.51) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=2e-4)


def test_top_p_counts_what_top_k_left_as_one():
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    # Of 0.4, 0.3 the first is 0.571: it alone reaches 0.55 (it would not without renormalising: 0.4).
    assert shares(logits, top_k=2, top_p=0.55) == pytest.approx([1, 0, 0, 0], abs=2e-4)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-12}])
def test_the_limits_of_every_option_are_greedy_and_the_lowest_id_wins_a_tie(options):
    assert shares([1.0, 3.0, 3.0, -1.0], **options).tolist() == [0, 1, 0, 0]
    assert shares([1.0, 3.0, 3.5, -1.0], **options).tolist() == [0, 0, 1, 0]


def test_a_temperature_close_to_0_neither_overflows_nor_decides_a_tie():
    assert shares([1.0, 3.0, 3.5, -1.0], temperature=1e-310).tolist() == [0, 0, 1, 0]
    assert shares([1.0, 3.0, 3.0, -1.0], temperature=1e-310) == pytest.approx([0, 0.5, 0.5, 0], abs=2e-4)


def test_the_largest_number_below_1_draws_a_token_that_is_kept():
    almost = torch.tensor([np.nextafter(1.0, 0.0)], dtype=torch.float64)
    logits = torch.tensor([[0.0, -1.0, -2.0, -float("inf")]])
    for options, expected in (({}, 2), ({"top_k": 2}, 1), ({"top_p": 0.5}, 0)):
        assert choose(logits, Sampling(max_new_tokens=1, **options), almost).item() == expected


# --- against transformers


@pytest.mark.parametrize("tie", [True, False])
def test_greedy_equals_transformers_generate_with_the_same_weights(tie):
    from minilm.models.hf import HuggingFaceModel, to_hf

    ours = tiny_model(tie_embeddings=tie)
    theirs = to_hf(ours, pad_id=0)
    free = generate(ours, PROMPTS, max_new_tokens=25, temperature=0)
    eos = free[1].tokens[6]
    for stop, results in (
        (None, free),
        (eos, generate(ours, PROMPTS, max_new_tokens=25, temperature=0, eos_id=eos)),
    ):
        for prompt, result in zip(PROMPTS, results, strict=True):
            whole = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=25,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=0,
            )
            assert result.tokens == whole[0, len(prompt) :].tolist()
    wrapped = generate(HuggingFaceModel(theirs), PROMPTS, max_new_tokens=25, temperature=0)
    assert [r.tokens for r in wrapped] == [r.tokens for r in free]


def test_a_hugging_face_model_that_counts_positions_itself_streams_one_prompt():
    from transformers import BloomConfig, BloomForCausalLM

    from minilm.models.hf import HuggingFaceModel

    torch.manual_seed(0)
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5)
    ).eval()
    (result,) = generate(HuggingFaceModel(bloom), [[5, 6, 7]], max_new_tokens=10, temperature=0)
    tokens = [5, 6, 7]
    for _ in range(10):
        with torch.no_grad():
            tokens.append(int(bloom(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert result.tokens == tokens[3:]
