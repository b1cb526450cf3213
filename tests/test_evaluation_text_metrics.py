"""Text metrics against slow restatements and sacrebleu's own totals; intervals over documents."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.errors import ConfigError
from minilm.evaluation import text_metrics
from minilm.evaluation.text_metrics import (
    Written,
    accuracy_by_position,
    across_samples,
    against_truth,
    copies_prompt,
    edit_distance,
    longest_repeat,
    of_one_text,
    rouge_l,
    words,
)

SMALL = settings(deadline=None, max_examples=60)
tokens_of_few = st.lists(st.integers(0, 2), max_size=9)


def written(text, truth, *, document=0, prompt=(7,), ended=False):
    """A prediction of words, each its own token."""
    number = [[zlib.crc32(word.encode()) for word in t.split()] for t in (text, truth)]
    return Written(
        document=document, prompt=prompt, tokens=number[0], truth=number[1], text=text, true_text=truth,
        ended=ended, truth_ended=False,
    )  # fmt: skip


def value(found, name):
    return found[name].value


# ---------------------------------------------------------------- against the truth


def slow_distance(a, b):
    """Levenshtein by its recursive definition, as a table."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        change = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
        table[i, j] = min(change, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return table[len(a), len(b)]


def longest_common(a, b):
    """Length of the longest common subsequence, by trying all."""

    def within(some, whole):
        rest = iter(whole)
        return all(x in rest for x in some)

    return max(n for n in range(len(a) + 1) for some in itertools.combinations(a, n) if within(some, b))  # fmt: skip


@SMALL
@given(tokens_of_few, tokens_of_few)
def test_edit_distance_is_the_recursive_one_over_the_longer_length(a, b):
    assert edit_distance(a, b) == pytest.approx(slow_distance(a, b) / max(len(a), len(b), 1))


@SMALL
@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(a, b):
    common = longest_common(a, b)
    if not a and not b:
        expected = 1.0
    elif not common:
        expected = 0.0
    else:
        precision, recall = common / len(a), common / len(b)
        expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_words_are_also_found_where_no_spaces_are():
    assert words("The cat's 中文, café3!") == ["the", "cat", "'", "s", "中", "文", ",", "café3", "!"]
    assert rouge_l("中文好", "中文坏") == pytest.approx(2 / 3)


def slow_bleu(pairs):
    """Corpus BLEU of Papineni et al. (2002) by its formula; n-grams of all orders must occur."""
    precisions = []
    for order in range(1, 5):
        matches = total = 0
        for text, truth in pairs:
            ours, theirs = (
                Counter(zip(*(t.split()[k:] for k in range(order)), strict=False)) for t in (text, truth)
            )
            matches += sum((ours & theirs).values())
            total += sum(ours.values())
        precisions.append(matches / total)
    lengths = [sum(len(t.split()) for t in side) for side in zip(*pairs, strict=True)]
    brevity = min(1.0, math.exp(1 - lengths[1] / lengths[0]))
    return 100 * brevity * math.exp(sum(map(math.log, precisions)) / 4)


PAIRS = [
    ("the cat sat on the mat today", "the cat sat on a mat"),
    ("a dog ran far away", "the dog ran far away from here"),
    ("one two three four five", "one two three four five"),
]


def test_bleu_and_chrf_are_those_of_all_texts_together():
    from sacrebleu import corpus_chrf

    found = against_truth([written(*pair, document=n) for n, pair in enumerate(PAIRS)])
    texts, truths = zip(*PAIRS, strict=True)
    assert value(found, "bleu") == pytest.approx(slow_bleu(PAIRS), abs=1e-9)
    assert value(found, "chrf") == pytest.approx(corpus_chrf(texts, [truths]).score, abs=1e-9)
    samples = against_truth([written(*pair) for pair in PAIRS])  # all of one document
    assert value(samples, "bleu") == pytest.approx(slow_bleu(PAIRS), abs=1e-9)
    assert (found["bleu"].count, found["bleu"].num_documents, found["bleu"].interval) == (3, 3, None)


def test_bleu_of_text_without_spaces_follows_the_way_of_finding_words():
    some = [written("今天天气很好", "今天天气不好")]
    assert value(against_truth(some), "bleu") < 1e-9 < value(against_truth(some, bleu_tokenize="zh"), "bleu")
    with pytest.raises(ConfigError, match=r"13a.*not 'words'"):
        against_truth(some, bleu_tokenize="words")


def test_places_count_and_what_is_missing_is_wrong():
    some = [
        written("a b x d", "a b c d"),
        written("a b", "a b c d", document=1),
        written("b a", "a b", document=2),
    ]
    found = against_truth(some)
    assert value(found, "token_accuracy") == pytest.approx((3 + 2 + 0) / 10)
    assert found["token_accuracy"].count == 10
    assert value(found, "exact_match") == 0
    assert accuracy_by_position(some) == pytest.approx([2 / 3, 2 / 3, 0, 1 / 2])
    assert value(against_truth([written("a b", "a b")]), "exact_match") == 1


def test_a_text_that_goes_on_after_the_truth_is_no_exact_match():
    assert value(against_truth([written("a b c", "a b")]), "exact_match") == 0


# ---------------------------------------------------------------- one text


@SMALL
@given(tokens_of_few)
def test_the_longest_repeat_is_found(tokens):
    size = len(tokens)
    repeats = [
        n for n in range(size) for i in range(size - n) for j in range(i + 1, size - n + 1)
        if n and tokens[i : i + n] == tokens[j : j + n]
    ]  # fmt: skip
    assert longest_repeat(tokens) == max(repeats, default=0)


def test_distinct_runs_are_counted_over_all_texts():
    some = [written("a b a b a b", "x"), written("a a a", "x", document=1)]
    found = of_one_text(some)
    assert value(found, "distinct_1") == pytest.approx((2 + 1) / 9)
    assert value(found, "distinct_2") == pytest.approx((2 + 1) / 7)
    assert value(found, "distinct_3") == pytest.approx((2 + 1) / 5)
    assert value(found, "repeated_4") == pytest.approx(1 / 3)  # abab baba abab
    assert value(found, "longest_repeat_tokens") == pytest.approx((4 + 2) / 2)


@pytest.mark.parametrize(
    ("prompt", "tokens", "copied"),
    [
        ([1, 2, 3, 4, 5, 6], [3, 4, 5, 6], True),  # its end once more
        ([1, 2, 3], [1, 2, 3, 1, 2], True),  # all of it, and again
        ([9, 9, 5], [5, 5, 5, 5], True),
        ([1, 2, 3, 4, 5, 6], [3, 4, 5, 7], False),
        ([1, 2, 3], [4, 1, 2, 3], False),
    ],
)  # fmt: skip
def test_a_copy_of_the_prompt_is_told_from_text(prompt, tokens, copied):
    assert copies_prompt(prompt, tokens) is copied


def test_short_texts_are_neither_copies_nor_of_one_token():
    found = of_one_text(
        [written("a a a", "x", prompt=(0,)), written("b b b b", "x", prompt=(5,), ended=True)]
    )
    assert (value(found, "one_token"), found["one_token"].count) == (1.0, 1)
    assert (value(found, "copies_prompt"), found["copies_prompt"].count) == (0.0, 1)
    assert value(found, "ended") == 0.5


def test_nothing_written_gives_no_numbers_instead_of_nan():
    found = {**against_truth([]), **of_one_text([written("", "a b")]), **across_samples([])}
    assert value(found, "bleu") is None and value(found, "exact_match") is None
    assert value(found, "distinct_1") is None and value(found, "longest_repeat_tokens") == 0


# ---------------------------------------------------------------- samples and intervals


def test_samples_of_a_prompt_are_compared_with_each_other_only():
    same = [written("the cat sat on the mat", "x")] * 2
    other = [written(text, "x", document=1) for text in ("a b c d e", "v w x y z")]
    assert value(across_samples(same), "self_bleu") == pytest.approx(100)
    assert value(across_samples(other), "self_bleu") < 25
    found = across_samples([*same, *other, written("alone", "x", document=2)])
    assert (found["different"].value, found["different"].count) == (3 / 4, 4)
    assert found["distinct_2"].num_documents == 2


def scattered(samples):
    """20 documents of which every third is right, `samples` equal texts each."""
    return [
        written("a b c d e f", "a b c d e f" if d % 3 else "a x y z v w", document=d)
        for d in range(20) for _ in range(samples)
    ]  # fmt: skip


def test_the_interval_is_over_documents_however_many_samples_each_has():
    one, many = against_truth(scattered(1)), against_truth(scattered(25))
    for name in ("exact_match", "token_accuracy", "rouge_l", "bleu", "chrf"):
        assert one[name].interval == pytest.approx(many[name].interval), name
        assert many[name].count == 25 * one[name].count and many[name].num_documents == 20
        low, high = one[name].interval
        assert low < one[name].value < high


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution():
    low, high = against_truth(scattered(1))["exact_match"].interval
    half = 1.96 * np.sqrt(13 / 20 * 7 / 20 / 20)
    assert (low, high) == pytest.approx((13 / 20 - half, 13 / 20 + half), abs=0.06)


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(text_metrics, "missing_packages", lambda: ["sacrebleu"])
    with pytest.raises(ConfigError, match=r'sacrebleu: pip install "minilm\[evaluation\]"'):
        against_truth([])
