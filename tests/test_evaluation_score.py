"""Losses against float64 loops over single rows, and the wrong ways of cutting logits that this replaces."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from evaluation_reference import Answer, Fixed, row_logits, tiny_model, token_losses
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.alignment import Sum, align
from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckFailed, ConfigError, DataError
from minilm.evaluation.intervals import DocumentSums, Scores, bootstrap
from minilm.evaluation.score import Row, continuation, documents, evaluate, measure, predictions, windows

TEXTS = ["the cat sat on the mat", "a", "", "中文 and é", "def f(x):\n    return x + 1\n" * 12, "dog " * 70]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat. " * 5, "def f(x):\n    return x\n" * 5], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer.num_tokens)


def packed_batch(rows: list[list[list[int]]], width: int):
    """[rows of documents] -> a batch, padded on the right."""
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    segments = torch.zeros_like(tokens)
    for r, row in enumerate(rows):
        flat = [(t, n) for n, document in enumerate(row, 1) for t in document]
        tokens[r, : len(flat)] = torch.tensor([t for t, _ in flat])
        segments[r, : len(flat)] = torch.tensor([n for _, n in flat])
    return align(tokens, segments)


ROWS = [
    [[1, 50, 60, 70, 2], [1, 80, 2], [1, 90, 91, 92, 93, 2]],
    [[1, 40, 41, 42, 2]],
    [[9], [1, 30, 31, 2]],
    [list(range(100, 120))],
]


def test_evaluate_is_the_token_mean_over_all_batches_however_they_are_cut(model):
    """The bug `ppl-mean-of-batches`: the loss must not depend on the batch size."""
    expected = [n for row in ROWS for document in row for n in token_losses(model, document)]
    batch = packed_batch(ROWS, 21)
    for sizes in ([4], [1, 1, 1, 1], [3, 1], [1, 3]):
        starts = np.cumsum([0, *sizes])
        found = evaluate(model, (batch.rows(a, b) for a, b in itertools.pairwise(starts)))
        assert float(found.tokens) == len(expected)
        assert found.mean == pytest.approx(math.fsum(expected) / len(expected), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(math.fsum(expected) / len(expected)), rel=1e-5)


def test_evaluate_counts_the_bytes_of_the_targets(model, tokenizer):
    text = "the cat sat on 中文"
    batch = packed_batch([[tokenizer.document(text)]], 40)
    found = evaluate(model, [batch], byte_lengths=tokenizer.byte_lengths)
    assert float(found.bytes) == len(text.encode())
    nats = math.fsum(token_losses(model, tokenizer.document(text)))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    for mixed in (found + evaluate(model, [batch]), evaluate(model, [batch]) + found):
        with pytest.raises(DataError, match="not given for all"):  # nats of both over the bytes of one
            _ = mixed.bits_per_byte


def test_evaluate_restores_the_mode_of_every_submodule_the_random_states_and_grad(model):
    """The bugs `eval-left-in-train-mode` and `eval-consumes-train-rng`."""
    noisy = tiny_model(vocab_size=300, dropout=0.5)
    quiet = evaluate(noisy, [packed_batch(ROWS, 21)])
    noisy.train()
    noisy.blocks[0].eval()
    modes = [m.training for m in noisy.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def batches():
        random.random(), np.random.rand(), torch.rand(3)  # a loader that draws
        yield packed_batch(ROWS, 21)

    assert evaluate(noisy, batches()).mean == quiet.mean
    assert [m.training for m in noisy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    with pytest.raises(RuntimeError, match="planted"):
        evaluate(noisy, _broken())
    assert [m.training for m in noisy.modules()] == modes
    noisy(torch.tensor([[1, 2, 3]])).logits.sum().backward()  # nothing of the evaluation is left in the graph


def _broken():
    yield packed_batch(ROWS, 21)
    raise RuntimeError("planted")


def test_evaluate_twice_is_bit_equal(model):
    batch = packed_batch(ROWS, 21)
    assert float(evaluate(model, [batch]).nats) == float(evaluate(model, [batch]).nats)


def test_nothing_to_evaluate_has_no_mean(model):
    empty = evaluate(model, [])
    assert float(empty.tokens) == 0
    with pytest.raises(DataError, match="no mean loss"):
        _ = empty.mean


def test_a_model_from_elsewhere_is_scored_from_its_logits():
    batch = packed_batch([[[0, 1, 2, 1]]], 4)
    found = evaluate(Fixed([1.0, 2.0, 3.0]), [batch])
    z = math.log(math.e + math.e**2 + math.e**3)
    assert found.mean == pytest.approx(z - (2 + 3 + 2) / 3, rel=1e-6)


def test_bf16_is_close_to_fp32_but_not_the_same(model):
    batch = packed_batch(ROWS, 21)
    full, half = (evaluate(model, [batch], precision=p).mean for p in ("fp32", "bf16"))
    assert full != half and half == pytest.approx(full, rel=0.02)
    with pytest.raises(ConfigError, match="fp16"):
        evaluate(model, [batch], precision="fp16")


def document_of_ranks(model, wanted: list[int]) -> list[int]:
    """A document whose tokens after the first have these ranks under the model."""
    tokens = [1]
    for rank in wanted:
        logits = row_logits(model, tokens)[len(tokens) - 1]
        tokens.append(sorted(range(len(logits)), key=lambda v: (-logits[v], v))[rank])
    return tokens


def test_predictions_are_those_of_single_tokens_also_in_chunks(model, monkeypatch):
    ranks = [[[0, 3, 1, 9], [4, 5, 6]], [[2] * 11], [[0]]]
    rows = [[document_of_ranks(model, wanted) for wanted in row] for row in ranks]
    batch = packed_batch(rows, 13)
    places = [
        (r, n, at) for r, row in enumerate(ranks) for n, w in enumerate(row, 1) for at in range(1, len(w) + 1)
    ]
    for most in (2**25, 1, 700):
        monkeypatch.setattr("minilm.evaluation.score.LOGITS_AT_ONCE", most)
        found = predictions(model, batch)
        assert [*zip(found.row, found.segment, found.context, strict=True)] == places
        assert found.nats == pytest.approx(
            [n for row in rows for d in row for n in token_losses(model, d)], rel=1e-4
        )
        assert found.rank.tolist() == [min(rank, 5) for row in ranks for wanted in row for rank in wanted]
        assert np.isnan(found.bytes).all()


def test_of_equally_probable_tokens_the_lower_id_stands_first():
    """All logits equal: only token 0 is right, and 0 to 4 are among five."""
    batch = packed_batch([[[9, 0, 1, 4, 5, 8]]], 6)
    assert predictions(Fixed([2.0] * 10), batch).rank.tolist() == [0, 1, 4, 5, 5]
    logits = [1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 2.0, 2.0, 0.0, 2.0]
    batch = packed_batch([[[9, 1, 3, 2, 4, 5, 6, 9, 0, 8]]], 10)
    assert predictions(Fixed(logits), batch).rank.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert predictions(Fixed([1.0, 2.0, 2.0]), packed_batch([[[0, 0, 1, 2]]], 4)).rank.tolist() == [2, 0, 1]


# --- documents


@settings(deadline=None, max_examples=200)
@given(num_tokens=st.integers(0, 60), length=st.integers(1, 20), data=st.data())
def test_windows_count_every_token_but_the_first_once_with_the_stated_context(num_tokens, length, data):
    """The bug `window-double-count`."""
    stride = data.draw(st.integers(1, length))
    counted: list[int] = []
    for row in windows(7, list(range(num_tokens)), length, stride):
        assert row.document == 7 and 1 <= len(row.tokens) <= length + 1
        for at in range(max(1, row.learn_from), len(row.tokens)):
            token = row.tokens[at]
            counted.append(token)
            assert at >= min(token, length - stride), "tokens before it in its window"
    assert counted == list(range(1, num_tokens))


def test_documents_equal_single_rows_where_they_fit(model, tokenizer):
    texts = [text for text in TEXTS if len(tokenizer.document(text)) <= 128]
    assert len(texts) >= 4
    flat = [n for text in texts for n in token_losses(model, tokenizer.document(text))]
    found = documents(model, tokenizer, texts, 128)
    assert found.num_tokens == len(flat) == sum(len(tokenizer.document(t)) - 1 for t in texts)
    assert found.num_bytes == sum(len(t.encode()) for t in texts)
    assert found.num_documents == len(texts) and found.num_excluded == 0
    assert found.loss == pytest.approx(math.fsum(flat) / len(flat), rel=1e-5)


@pytest.mark.parametrize("length, stride", [(32, None), (32, 32), (32, 1), (20, 7), (1, 1)])
def test_rolling_windows_equal_a_loop_over_windows(model, tokenizer, length, stride):
    used, expected = stride or length // 2, []
    for text in TEXTS:
        tokens = tokenizer.document(text)
        done = 1
        start = 0
        while done < len(tokens):
            start = max(0, min(start, len(tokens) - length - 1))
            logits = row_logits(model, tokens[start : start + length])
            for i in range(done, min(len(tokens), start + length + 1)):
                row = logits[i - 1 - start]
                expected.append(float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[i]]))
                done = i + 1
            start += used
    found = documents(model, tokenizer, TEXTS, length, stride=stride, batch_rows=3)
    assert found.num_tokens == len(expected)
    assert found.loss == pytest.approx(math.fsum(expected) / len(expected), rel=1e-5)
    assert (found.context_tokens, found.least_context_tokens) == (length, length - used)


def test_documents_do_not_depend_on_the_batch_size_and_read_the_texts_once(model, tokenizer):
    one, many = (documents(model, tokenizer, iter(TEXTS * 3), 40, batch_rows=n) for n in (1, 16))
    assert one.loss == pytest.approx(many.loss, rel=1e-6) and one.num_tokens == many.num_tokens
    assert one.interval == pytest.approx(many.interval, rel=1e-6)


def test_a_document_without_a_predicted_token_is_excluded_and_counted(model):
    class NoBos:
        byte_lengths = torch.ones(300)

        def document(self, text):
            return [*text.encode(), 2]

    found = documents(model, NoBos(), ["", "ab", ""], 16)
    assert (found.num_documents, found.num_excluded, found.num_tokens) == (1, 2, 2)
    assert found.num_bytes == 2, "a first token is not predicted, so its bytes do not count either"


def test_without_byte_lengths_there_are_no_bits_per_byte(model, tokenizer):
    class Inexact:
        document = staticmethod(tokenizer.document)

        @property
        def byte_lengths(self):
            raise DataError("alters text")

    found = documents(model, Inexact(), TEXTS, 64)
    assert found.bits_per_byte is None and found.as_dict()["bits_per_byte"] is None and found.loss > 0


def test_lengths_that_do_not_fit_are_refused(model, tokenizer):
    for wrong in ({"sequence_length": 129}, {"sequence_length": 0}, {"stride": 0}, {"stride": 129}):
        with pytest.raises(ConfigError, match=r"stride is|sequence length is"):
            documents(model, tokenizer, TEXTS, **wrong)


# --- continuations


def test_a_continuation_loss_is_the_full_loss_restricted_to_its_tokens(model, tokenizer):
    found = continuation(model, tokenizer, TEXTS, [1, 5, 30], 20)
    for p, scores in found.items():
        long_enough = [d for t in TEXTS if len(d := tokenizer.document(t)) >= p + 20]
        # token_losses(...)[i - 1] belongs to token i, so tokens p ... p + 19 are entries p - 1 ... p + 18
        expected = [n for d in long_enough for n in token_losses(model, d[:128])[p - 1 : p + 19]]
        assert scores.loss == pytest.approx(math.fsum(expected) / len(expected), rel=1e-5)
        assert scores.num_tokens == 20 * len(long_enough)
        assert scores.num_documents == len(long_enough) > 0
        assert scores.num_excluded == len(TEXTS) - len(long_enough)


def test_the_incident_of_the_wrong_slice_of_logits():
    """The bug `eval-slice-off-by-one`: 12.34 was reported for 2.26.

    A model that has learnt to count upward is right about every token. Scored with logits[-n:] against the last
    n tokens, each prediction is held against the token before the one that it predicts.
    """

    class Counts(Fixed):
        def forward(self, inputs, segments=None, positions=None):
            answer = super().forward(inputs)
            answer.logits.scatter_(2, ((inputs + 1) % 50).unsqueeze(2), 10.0)
            return answer

    model, tokens, n = Counts([0.0] * 50), list(range(30)), 8
    logits = torch.from_numpy(row_logits(model, tokens))
    tail = torch.tensor(tokens[-n:])
    wrong = -logits[-n:].log_softmax(-1)[torch.arange(n), tail].mean().item()
    right = -logits[-n - 1 : -1].log_softmax(-1)[torch.arange(n), tail].mean().item()
    assert wrong > 10 and right < 0.01

    class Numbers:
        byte_lengths = torch.ones(50)

        def document(self, text):
            return [int(word) for word in text.split()]

    text = " ".join(map(str, tokens))
    found = continuation(model, Numbers(), [text], [len(tokens) - n], n)
    assert found[len(tokens) - n].loss == pytest.approx(right, rel=1e-3)


def test_all_prompt_lengths_that_do_not_fit_are_listed(model, tokenizer):
    with pytest.raises(ConfigError) as caught:
        continuation(model, tokenizer, TEXTS, [0, 16, 120], 20)
    assert "a prompt length is 0" in str(caught.value)
    assert "prompt of 120 tokens and a continuation of 20 need a context of 139" in str(caught.value)
    assert "prompt of 16" not in str(caught.value)


def test_no_document_is_long_enough(model, tokenizer):
    scores = continuation(model, tokenizer, ["a", "b"], [10], 20)[10]
    assert (scores.num_documents, scores.num_excluded) == (0, 2)
    assert scores.as_dict()["loss"] is None


# --- intervals


def test_the_interval_covers_the_truth_about_95_times_in_100():
    random_, truth, hits = np.random.default_rng(0), 2.0, 0
    for trial in range(200):
        tokens = random_.integers(5, 50, 60).astype(float)
        difficulty = random_.normal(truth, 0.5, 60)  # of a whole document, the same for all its tokens
        low, high = bootstrap(np.stack([tokens * difficulty, tokens], 1), resamples=200, seed=trial)
        hits += low <= truth <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_the_interval_is_of_documents_not_of_tokens():
    """Ten times as many tokens in the same documents teach nothing new about other documents."""
    values = np.random.default_rng(1).uniform(1, 3, (100, 1)) * [1.0, 0.0] + [0.0, 1.0]
    assert bootstrap(values * 10) == pytest.approx(bootstrap(values))
    assert bootstrap(np.repeat(values, 10, axis=0)) != pytest.approx(bootstrap(values), rel=1e-3)


def test_many_documents_are_grouped_without_changing_the_width():
    values = np.random.default_rng(2).uniform(1, 3, (40_000, 1)) * [1.0, 0.0] + [0.0, 1.0]
    low, high = bootstrap(values, resamples=300)
    normal = 1.96 * values[:, 0].std() / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(normal, rel=0.15)


def test_few_documents_have_no_interval():
    assert bootstrap(np.ones((9, 2))) is None and bootstrap(np.ones((10, 2))) == (1.0, 1.0)


def test_a_loss_that_is_no_number_is_not_written_as_json():
    with pytest.raises(CheckFailed, match="not finite"):
        Scores(total=Sum.of(float("nan"), 3)).as_dict()
    assert Scores(total=Sum.of(5000.0, 1)).as_dict()["perplexity"] is None  # beyond a float: not Infinity


def test_pieces_of_a_document_are_added_up(model):
    sums = measure(model, [Row(4, [1, 5, 6]), Row(2, [1, 7]), Row(4, [6, 8, 9], 2)], batch_rows=2)
    assert isinstance(sums, DocumentSums)
    assert [values[1] for _, values in sorted(sums.totals.items())] == [1, 3]
    assert sums.totals[4][0] == pytest.approx(
        sum(token_losses(model, [1, 5, 6])) + token_losses(model, [6, 8, 9])[-1], rel=1e-5
    )


def test_a_hugging_face_model_scores_as_the_same_weights_do_here(model, tokenizer):
    from minilm.models.hf import HuggingFaceModel, to_hf

    batch = packed_batch(ROWS, 21)
    theirs = to_hf(model)
    assert evaluate(HuggingFaceModel(theirs), [batch]).mean == pytest.approx(
        evaluate(model, [batch]).mean, rel=1e-5
    )
    ids = torch.tensor([tokenizer.document(TEXTS[0])])
    with torch.no_grad():
        loss = theirs(input_ids=ids, labels=ids).loss.item()
    assert documents(model, tokenizer, TEXTS[:1]).loss == pytest.approx(loss, rel=1e-5)


def test_a_hugging_face_model_with_a_cap_on_its_logits_is_scored_from_them():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from minilm.models.hf import HuggingFaceModel

    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.0, initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    ids = torch.tensor([[2, 5, 6, 7, 50, 9]])
    with torch.no_grad():
        loss = gemma(input_ids=ids, labels=ids).loss.item()
    found = evaluate(HuggingFaceModel(gemma), [align(ids, torch.ones_like(ids))])
    assert found.mean == pytest.approx(loss, rel=1e-5)


def test_a_table_that_the_model_makes_during_evaluation_can_be_used_in_training_later():
    """Inference mode would make tensors that autograd refuses for ever."""

    class Lazy(torch.nn.Module):
        table = None

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(5))

        def forward(self, inputs, segments=None, positions=None):
            if self.table is None:
                self.table = torch.arange(5.0)
            return Answer((self.table * self.scale).expand(*inputs.shape, 5))

    model, batch = Lazy(), align(torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.long))
    evaluate(model, [batch])
    model(batch.inputs).logits.sum().backward()
    assert model.scale.grad.tolist() == [0, 2, 4, 6, 8]
