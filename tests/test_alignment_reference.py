"""The alignment layer against a slow float64 double loop (`alignment_oracle`), and its behaviour at the edges."""

from __future__ import annotations

import math
import random
from pathlib import Path

import alignment_oracle
import pytest
import torch
import torch.multiprocessing
from alignment_oracle import Case, one_row, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import minilm.alignment
from minilm.alignment import Batch, Sum, align, last, nll, score, score_hidden
from minilm.errors import DataError

INF, NAN = float("inf"), float("nan")


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Rows cut from runs of documents and padding in any order; ids at padding are any ids."""
    length, num_rows = draw(st.integers(2, 10)), draw(st.integers(1, 4))
    vocabulary = draw(st.sampled_from([2, 3, 5, 17]))
    pad = draw(st.integers(0, vocabulary - 1))
    tokens, segments = [], []
    for _ in range(num_rows):
        document: list[int] = []
        number = 0
        while len(document) < length:
            padding = draw(st.booleans()) and draw(st.booleans())
            number += 0 if padding else draw(st.integers(1, 3))
            document += [0 if padding else number] * draw(st.integers(1, length))
        document = document[:length]
        ids = draw(st.lists(st.integers(0, vocabulary - 1), min_size=length, max_size=length))
        tokens.append([token if number else pad for token, number in zip(ids, document, strict=True)])
        segments.append(document)
    masks = st.lists(st.booleans(), min_size=length, max_size=length)
    learn = draw(st.none() | st.lists(masks, min_size=num_rows, max_size=num_rows))
    sources = st.lists(st.integers(-1, 9), min_size=length, max_size=length)
    entries = draw(st.none() | st.lists(sources, min_size=num_rows, max_size=num_rows))
    return Case("drawn", tokens, segments, learn, vocabulary, seed=draw(st.integers(0, 999)), entries=entries)


@settings(deadline=None, max_examples=150)
@given(case=any_case())
def test_every_public_function_equals_the_double_loop(case: Case) -> None:
    assert alignment_oracle.compare(minilm.alignment, case) is None


def test_a_batch_in_which_nothing_counts_is_zero_nats_over_zero_tokens() -> None:
    batch = align(*one_row(4, 0))
    total = score(torch.randn(1, 4, 7), batch, torch.ones(7))
    assert [x.item() for x in total] == [0.0, 0.0, 0.0]
    for show in (lambda: total.mean, lambda: total.perplexity, lambda: total.bits_per_byte):
        with pytest.raises(DataError, match="no prediction in these rows counts"):
            show()


def test_adding_a_batch_in_which_nothing_counts_changes_nothing() -> None:
    some = score(torch.randn(1, 4, 7), align(*one_row(4, 3)), torch.arange(7))
    none = score(torch.randn(1, 4, 7), align(*one_row(4, 0)), torch.arange(7))
    assert [x.item() for x in some + none] == [x.item() for x in some]
    assert [x.item() for x in some + Sum.zero()] == [x.item() for x in some]
    assert (some + none).mean == some.mean


@pytest.mark.parametrize("total", [0.0, 0, torch.zeros((), dtype=torch.float64)])
def test_the_gradient_where_nothing_counts_is_zero_and_not_nan(total: float | Tensor) -> None:
    """Born from `all-ignored-nan`: cross_entropy over nothing is 0 / 0."""
    batch = align(*one_row(4, 0))
    hidden, head = torch.randn(1, 4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    for loss in (score_hidden(hidden, head, batch), score(hidden @ head.T, batch)):
        share = loss.share(total)
        assert share.item() == 0
        grads = torch.autograd.grad(share, (hidden, head))
        assert all(bool((g == 0).all()) for g in grads)


def test_a_batch_without_rows_is_zero_nats() -> None:
    batch = align(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5, dtype=torch.long))
    assert batch.shape == (0, 4)
    lengths = torch.ones(7)
    assert [x.item() for x in score(torch.zeros(0, 4, 7), batch, lengths)] == [0, 0, 0]
    hidden = torch.zeros(0, 4, 3, requires_grad=True)
    total = score_hidden(hidden, torch.zeros(7, 3, requires_grad=True), batch, lengths)
    assert [x.item() for x in total] == [0, 0, 0]
    assert torch.autograd.grad(total.nats, hidden)[0].shape == hidden.shape


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_values_that_are_not_finite_have_no_effect_where_nothing_counts(bad: float) -> None:
    """Fully masked attention rows may be NaN at padding: 0 * NaN must not reach the loss or a gradient."""
    batch = align(*one_row(5, 3))
    head = torch.randn(7, 3, requires_grad=True)
    clean = torch.randn(1, 5, 3)
    dirty = clean.clone()
    dirty[:, 3:] = bad
    results = []
    for values in (clean, dirty):
        hidden = values.clone().requires_grad_()
        total = score_hidden(hidden, head, batch, chunk=2)
        logits = (values @ head.detach().T).requires_grad_()
        grads = (
            *torch.autograd.grad(total.nats, (hidden, head)),
            *torch.autograd.grad(score(logits, batch).nats, logits),
        )
        results.append((total.nats.detach(), nll(logits.detach(), batch), *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert bool((results[1][4][:, 3:] == 0).all())


@pytest.mark.parametrize("bad", [INF, NAN])
def test_values_that_are_not_finite_are_shown_where_a_prediction_counts(bad: float) -> None:
    """Reporting never repairs."""
    batch = align(*one_row(5, 3))
    hidden = torch.randn(1, 5, 3)
    hidden[0, 1] = bad
    head = torch.randn(7, 3)
    assert not math.isfinite(score_hidden(hidden, head, batch).mean)
    assert not math.isfinite(score(hidden @ head.T, batch).mean)


def test_a_forbidden_target_costs_infinitely_many_nats_and_a_forbidden_other_token_none() -> None:
    batch = align(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.long))
    assert score(torch.tensor([[[0.0, 0.0, -INF]]]), batch).mean == pytest.approx(math.log(2))
    assert score(torch.tensor([[[0.0, -INF, 0.0]]]), batch).mean == INF


def test_huge_logits_lose_no_digits() -> None:
    """log_z - logit as a difference of two large float32 numbers would be wrong in the third digit."""
    batch = align(*one_row(64, 64, vocabulary=3))
    hidden = torch.full((1, 64, 1), 1e4)
    head = torch.tensor([[1.0], [1.0], [1.0]])
    total = score_hidden(hidden, head, batch)
    assert total.mean == pytest.approx(math.log(3), abs=1e-7)
    assert score(hidden @ head.T, batch).mean == pytest.approx(math.log(3), abs=1e-7)


def test_the_mean_of_a_sum_is_not_the_mean_of_means() -> None:
    """Born from `mean-of-means-accum`."""
    short, long = Sum.of(nats=10.0, tokens=2), Sum.of(nats=8.0, tokens=8)
    assert (short + long).mean == pytest.approx(1.8)
    assert (short.mean + long.mean) / 2 == pytest.approx(3.0)
    assert sum([short, long]).mean == pytest.approx(1.8)
    assert short.share(10.0).item() + long.share(10.0).item() == pytest.approx(1.8)


def test_properties_of_a_sum() -> None:
    total = Sum.of(nats=6.0, tokens=4, num_bytes=12)
    assert total.mean == 1.5
    assert total.perplexity == pytest.approx(math.exp(1.5))
    assert total.bits_per_byte == pytest.approx(0.5 / math.log(2))
    assert Sum.of(1e6, 1).perplexity == INF
    with pytest.raises(DataError, match="byte lengths of the tokens were not given"):
        _ = Sum.of(6.0, 4).bits_per_byte
    for mixed in (total + Sum.of(6.0, 4), Sum.of(6.0, 4) + total, sum([total, Sum.of(6.0, 4), total])):
        assert mixed.tokens in (8, 12)
        with pytest.raises(DataError, match="not given for all"):
            _ = mixed.bits_per_byte
    assert (Sum.zero() + total).bits_per_byte == total.bits_per_byte
    with pytest.raises(TypeError):
        _ = total + 1.0


def test_the_fields_of_a_sum_are_float64_and_keep_the_graph_until_detached() -> None:
    hidden = torch.randn(2, 5, 3, requires_grad=True)
    total = score_hidden(hidden, torch.randn(7, 3), align(*random_rows(2, 5, 7)), torch.ones(7))
    assert all(x.dtype == torch.float64 and x.dim() == 0 for x in total)
    assert total.nats.requires_grad and not total.detach().nats.requires_grad
    assert not total.all_reduce().nats.requires_grad
    assert total.detach().mean == total.mean


def test_counts_beyond_the_integers_of_float32_stay_exact() -> None:
    """2**24 + 1 tokens: a float32 counter stands still there."""
    total = Sum.of(2.0**24, 2.0**24, 2.0**24) + Sum.of(1.0, 1.0, 1.0)
    assert total.tokens.item() == 2**24 + 1 and total.mean == 1.0


def _rank(rank: int, folder: str, rows: list[Batch]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(rows)
    )
    hidden = torch.zeros(*rows[rank].shape, 3, requires_grad=True)
    mine = score_hidden(hidden, torch.zeros(7, 3), rows[rank], torch.ones(7))
    before, total = [x.item() for x in mine], mine.all_reduce()
    assert before == [x.item() for x in mine]  # the rank's own numbers are left alone
    assert mine.nats.requires_grad and not total.nats.requires_grad
    Path(folder, f"rank{rank}").write_text(" ".join(repr(x.item()) for x in total))
    torch.distributed.destroy_process_group()


def test_a_sum_over_two_processes_is_the_sum_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Born from `ddp-mean-of-rank-means`: 1 token on one rank, 7 on the other. The batches travel there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [align(*one_row(9, 1)), align(*one_row(9, 7))]
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path), rows), nprocs=2)
    for rank in range(2):
        nats, tokens, num_bytes = map(float, (tmp_path / f"rank{rank}").read_text().split())
        assert (tokens, num_bytes) == (8, 8)
        assert nats == pytest.approx(8 * math.log(7), rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_last_takes_the_position_of_the_last_real_token(rows: int, length: int, seed: int) -> None:
    dice = random.Random(seed)
    lengths = [dice.randint(1, length) for _ in range(rows)]
    x = torch.randn(rows, length, 2)
    got = last(x, torch.tensor(lengths))
    assert got.tolist() == [x[b, n - 1].tolist() for b, n in enumerate(lengths)]
    assert last(x[..., 0], torch.tensor(lengths)).shape == (rows,)


@pytest.mark.parametrize("lengths", [[0, 1], [1, 5], [1], [1, 1, 1], [[1, 1]]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(DataError, match="do not fit"):
        last(torch.zeros(2, 4, 3), torch.tensor(lengths))


def test_last_of_logits_predicts_what_the_next_target_would_be() -> None:
    """Generation and loss agree about which position predicts which token."""
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    table = torch.randn(7, 7)
    batch = align(tokens, torch.ones_like(tokens))
    loss_of_last_token = nll(table[batch.inputs], batch)[0, -1]
    prompt = table[torch.tensor([[3, 1, 4, 1, 0, 0]])]  # the same row without its last token, right-padded
    step = -last(prompt, torch.tensor([4])).log_softmax(-1)[0, 5]
    torch.testing.assert_close(loss_of_last_token, step)


def test_a_row_is_scored_alike_alone_and_among_others() -> None:
    """Born from `flat-view-leak`: the first token of the next row is nobody's target."""
    batch = align(*random_rows(4, 9, 11))
    logits = torch.randn(4, 9, 11, dtype=torch.float64)
    together = nll(logits, batch)
    for b in range(4):
        torch.testing.assert_close(nll(logits[b : b + 1], batch.rows(b, b + 1)), together[b : b + 1])


def test_the_loss_of_a_continuation_is_the_loss_of_all_less_the_loss_of_the_prompt() -> None:
    """Born from `eval-slice-off-by-one`: the chain rule, with `learn` instead of a slice of logits."""
    tokens = torch.tensor([[3, 1, 4, 1, 5, 2, 6]])
    table = torch.randn(7, 7, dtype=torch.float64)
    segments = torch.ones_like(tokens)
    for prompt in range(1, 6):
        parts = [
            score(table[batch.inputs], batch)
            for batch in (
                align(tokens, segments, torch.arange(7)[None] < prompt),
                align(tokens, segments, torch.arange(7)[None] >= prompt),
                align(tokens, segments),
            )
        ]
        assert parts[1].tokens.item() == 7 - prompt
        torch.testing.assert_close(parts[0].nats + parts[1].nats, parts[2].nats)
