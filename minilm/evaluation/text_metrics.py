"""Written text beside the true one: how alike they are, how often the writing repeats itself, how it ends.

Every number is (a sum over predictions) / (a sum over predictions), or BLEU or chrF of all of them together, and
comes with what it is a mean over and a 95 % interval by bootstrap over documents: the samples of one prompt are
not independent of each other.

BLEU and chrF are those of sacrebleu (Post 2018, A Call for Clarity in Reporting BLEU Scores), edit distances and
common subsequences those of rapidfuzz. ROUGE-L is the F1 of the longest common subsequence of words (Lin 2004);
words are runs of letters and digits, single Chinese or Japanese characters, and single signs, since the usual
package drops everything but a-z and 0-9.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilm.errors import ConfigError
from minilm.evaluation.intervals import bootstrap, resampled

INSTALL = 'pip install "minilm[evaluation]"'
FEWEST_TOKENS = 4  # a shorter prediction is a copy, or of one token, too easily to say so
ONE_TOKEN = 0.9  # share of a prediction that one token makes up
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")

DEFINITIONS = {
    "exact_match": "share of predictions that are the truth, token for token",
    "token_accuracy": "share of the truth's tokens at whose place the prediction has the same token",
    "bleu": "sacrebleu, all predictions together, 0 to 100",
    "chrf": "sacrebleu, all predictions together, 0 to 100",
    "rouge_l": "F1 of the longest common subsequence of words",
    "edit_distance_tokens": "Levenshtein distance over the longer one's tokens: 0 the same, 1 nothing in common",
    "edit_distance_characters": "the same of characters",
    "distinct_1": "different tokens of a prediction / its tokens",
    "distinct_2": "different pairs of neighbours / pairs",
    "distinct_3": "different triples / triples",
    "repeated_4": "share of runs of 4 tokens that stood in the same text before",
    "longest_repeat_tokens": "length of the longest run of tokens that stands twice in a text",
    "ended": "share of texts that end with EOS",
    "copies_prompt": f"share of texts (of at least {FEWEST_TOKENS} tokens) that go on as the prompt went k tokens "
    "before, for one k: its end, or all of it, again",
    "one_token": f"share of texts (of at least {FEWEST_TOKENS} tokens) of which one token is at least {ONE_TOKEN:.0%}",
}
OF_ONE_TEXT = (
    "distinct_1", "distinct_2", "distinct_3", "repeated_4", "longest_repeat_tokens", "ended", "copies_prompt",
    "one_token",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Written:
    """A prediction, what it continues, and the truth. Tokens with EOS where it stopped there; texts without."""

    document: int
    prompt: Sequence[int]
    tokens: Sequence[int]
    truth: Sequence[int]
    text: str
    true_text: str
    ended: bool
    truth_ended: bool

    def of_truth(self) -> Written:
        """The truth as if it were the prediction: what real text measures."""
        return Written(
            document=self.document,
            prompt=self.prompt,
            tokens=self.truth,
            truth=self.truth,
            text=self.true_text,
            true_text=self.true_text,
            ended=self.truth_ended,
            truth_ended=self.truth_ended,
        )


@dataclass(frozen=True)
class Measured:
    """A number, its 95 % interval (None from fewer than 10 documents), and over how many `of` it is a mean.

    `value` is None where there was nothing to measure.
    """

    value: float | None
    interval: tuple[float, float] | None
    count: int
    of: str
    num_documents: int

    def as_dict(self) -> dict[str, Any]:
        interval = None if self.interval is None else list(self.interval)
        return {
            "value": self.value,
            "value_95": interval,
            "count": self.count,
            "of": self.of,
            "num_documents": self.num_documents,
        }


def missing_packages() -> list[str]:
    """Names of packages that text metrics need and that are not installed."""
    import importlib.util

    return [name for name in ("sacrebleu", "rapidfuzz") if importlib.util.find_spec(name) is None]


def require_packages() -> None:
    """Raises ConfigError, with the command that installs them, for missing packages."""
    if missing := missing_packages():
        raise ConfigError(f"Text metrics need {' and '.join(missing)}: {INSTALL}")


def against_truth(written: Sequence[Written], *, bleu_tokenize: str = "13a") -> dict[str, Measured]:
    """exact_match ... edit_distance_characters of `DEFINITIONS`, by name.

    bleu_tokenize  how sacrebleu finds words ("13a"; "zh" and "char" for Chinese and other texts without spaces)
    """
    require_packages()
    bleu, chrf = _sacrebleu(bleu_tokenize)
    return {
        "exact_match": ratio(written, _exact_match, "predictions"),
        "token_accuracy": ratio(written, lambda w: (sum(_matches(w)), len(w.truth)), "tokens of the truth"),
        "bleu": _of_all(written, bleu),
        "chrf": _of_all(written, chrf),
        "rouge_l": ratio(written, lambda w: (rouge_l(w.text, w.true_text), 1), "predictions"),
        "edit_distance_tokens": ratio(
            written, lambda w: (edit_distance(list(w.tokens), list(w.truth)), 1), "predictions"
        ),
        "edit_distance_characters": ratio(
            written, lambda w: (edit_distance(w.text, w.true_text), 1), "predictions"
        ),
    }


def of_one_text(written: Sequence[Written]) -> dict[str, Measured]:
    """distinct_1 ... one_token of `DEFINITIONS`: what needs no truth. For the truth itself see `Written.of_truth`."""

    def distinct(size: int) -> Callable[[Written], tuple[float, float]]:
        return lambda w: (len(set(runs(w.tokens, size))), len(runs(w.tokens, size)))

    def long_enough(found: Callable[[Written], bool]) -> Callable[[Written], tuple[float, float]]:
        return lambda w: (float(found(w)), 1) if len(w.tokens) >= FEWEST_TOKENS else (0, 0)

    def repeated(w: Written) -> tuple[float, float]:
        return len(runs(w.tokens, 4)) - len(set(runs(w.tokens, 4))), len(runs(w.tokens, 4))

    return {
        "distinct_1": ratio(written, distinct(1), "tokens"),
        "distinct_2": ratio(written, distinct(2), "pairs"),
        "distinct_3": ratio(written, distinct(3), "triples"),
        "repeated_4": ratio(written, repeated, "runs of 4 tokens"),
        "longest_repeat_tokens": ratio(written, lambda w: (longest_repeat(w.tokens), 1), "texts"),
        "ended": ratio(written, lambda w: (float(w.ended), 1), "texts"),
        "copies_prompt": ratio(written, long_enough(lambda w: copies_prompt(w.prompt, w.tokens)), "texts"),
        "one_token": ratio(written, long_enough(lambda w: one_token(w.tokens)), "texts"),
    }


def across_samples(written: Sequence[Written], *, bleu_tokenize: str = "13a") -> dict[str, Measured]:
    """How different the samples of one prompt are; nothing where no prompt has two.

    self_bleu   mean BLEU (0 to 100) of a sample against the other ones of its prompt: 100 are copies of each other
    distinct_2  different pairs of neighbouring tokens in all samples of a prompt / pairs
    different   different texts / texts
    """
    require_packages()
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize=bleu_tokenize, effective_order=True)  # short texts have no runs of 4 words
    by_document: dict[int, list[Written]] = {}
    for one in written:
        by_document.setdefault(one.document, []).append(one)
    groups = {document: some for document, some in by_document.items() if len(some) > 1}
    if not groups:
        return {}
    pairs = {d: [run for w in some for run in runs(w.tokens, 2)] for d, some in groups.items()}
    likeness = {d: (_self_bleu(some, bleu), len(some)) for d, some in groups.items()}
    different = {d: (len({tuple(w.tokens) for w in some}), len(some)) for d, some in groups.items()}
    return {
        "self_bleu": _of_sums(likeness, "samples"),
        "distinct_2": _of_sums({d: (len(set(some)), len(some)) for d, some in pairs.items()}, "pairs"),
        "different": _of_sums(different, "samples"),
    }


def accuracy_by_position(written: Sequence[Written]) -> list[float]:
    """For each place of the continuation, from the first: share of predictions with the true token there."""
    places = max((len(w.truth) for w in written), default=0)
    found = np.zeros((2, places))
    for one in written:
        found[0, : len(one.truth)] += _matches(one)
        found[1, : len(one.truth)] += 1
    return (found[0] / np.maximum(found[1], 1)).tolist()


# ---------------------------------------------------------------- one text


def runs(tokens: Sequence[Any], size: int) -> list[tuple[Any, ...]]:
    """All runs of `size` neighbours, in order."""
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def longest_repeat(tokens: Sequence[int]) -> int:
    """Length of the longest run of tokens that stands twice (it may overlap itself); 0 where none does."""
    low, high = 0, max(0, len(tokens) - 1)
    while low < high:  # if a run of n stands twice, so does one of n - 1
        size = (low + high + 1) // 2
        some = runs(tokens, size)
        low, high = (size, high) if len(set(some)) < len(some) else (low, size - 1)
    return low


def copies_prompt(prompt: Sequence[int], tokens: Sequence[int]) -> bool:
    """Does every token equal the one k places before it, for one k up to the prompt's length?"""
    whole, start = [*prompt, *tokens], len(prompt)
    return any(
        all(whole[i] == whole[i - k] for i in range(start, len(whole))) for k in range(1, len(prompt) + 1)
    )


def one_token(tokens: Sequence[int]) -> bool:
    """Is most of the text one and the same token?"""
    return max(Counter(tokens).values(), default=0) >= ONE_TOKEN * len(tokens)


def words(text: str) -> list[str]:
    """Lower-case words, characters of scripts without spaces, and signs."""
    return _WORDS.findall(text.lower())


def rouge_l(text: str, truth: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1; 1 for two texts without words."""
    from rapidfuzz.distance import LCSseq

    ours, theirs = words(text), words(truth)
    if not ours and not theirs:
        return 1.0
    return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))  # = 2 P R / (P + R)


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Insertions, deletions and replacements / length of the longer one: 0 to 1; 0 for two empty ones."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_distance(one, other))


# ---------------------------------------------------------------- all texts


def ratio(written: Iterable[Written], parts: Callable[[Written], tuple[float, float]], of: str) -> Measured:
    """(sum of the first parts) / (sum of the second), and how it scatters over documents."""
    sums: dict[int, tuple[float, float]] = {}
    for one in written:
        above, below = parts(one)
        before = sums.get(one.document, (0.0, 0.0))
        sums[one.document] = before[0] + above, before[1] + below
    return _of_sums(sums, of)


def _of_sums(sums: dict[int, tuple[float, float]], of: str) -> Measured:
    """Of {document: (sum, count)}."""
    table = np.array([sums[d] for d in sorted(sums)], dtype=np.float64).reshape(-1, 2)
    table = table[table[:, 1] > 0]
    count = round(float(table[:, 1].sum()))
    value = float(table[:, 0].sum()) / count if count else None
    return Measured(value, bootstrap(table), count, of, len(table))


def _matches(one: Written) -> list[bool]:
    """Of each token of the truth: does the prediction have it at the same place? What is missing is wrong."""
    return [k < len(one.tokens) and one.tokens[k] == token for k, token in enumerate(one.truth)]


def _exact_match(one: Written) -> tuple[float, float]:
    return float(list(one.tokens) == list(one.truth)), 1


def _sacrebleu(tokenize: str) -> tuple[Any, Any]:
    """(BLEU, chrF) of sacrebleu. Raises ConfigError for a way of finding words that it does not have."""
    from sacrebleu.metrics import BLEU, CHRF

    if tokenize not in BLEU.TOKENIZERS:
        raise ConfigError(f"BLEU words are found by one of {', '.join(BLEU.TOKENIZERS)}, not {tokenize!r}.")
    return BLEU(tokenize=tokenize), CHRF()


def _of_all(written: Sequence[Written], metric: Any) -> Measured:
    """A corpus metric, from its counts per document: for the interval they are added up anew for each drawing."""
    if not written:
        return Measured(None, None, 0, "predictions", 0)
    statistics = metric._extract_corpus_statistics(
        [w.text for w in written], [[w.true_text for w in written]]
    )
    documents = sorted({w.document for w in written})
    place = {document: number for number, document in enumerate(documents)}
    table = np.zeros((len(documents), len(statistics[0])))
    for one, row in zip(written, statistics, strict=True):
        table[place[one.document]] += np.asarray(row)

    def value(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(sums.round().astype(int).tolist()).score)

    sums = resampled(table)
    interval = None
    if sums is not None:
        low, high = np.quantile([value(row) for row in sums], [0.025, 0.975])
        interval = (float(low), float(high))
    return Measured(value(table.sum(axis=0)), interval, len(written), "predictions", len(documents))


def _self_bleu(some: Sequence[Written], bleu: Any) -> float:
    """Sum over the samples of a prompt of BLEU against the others; equal texts count 100, also empty ones."""
    total = 0.0
    for number, one in enumerate(some):
        others = [w.text for k, w in enumerate(some) if k != number]
        total += 100.0 if one.text in others else float(bleu.sentence_score(one.text, others).score)
    return total
