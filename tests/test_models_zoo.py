"""Who may influence whom, for every registered model: a new variant gets these tests unasked."""

from __future__ import annotations

import pytest
import torch
from zoo_models import EFFECT, NOISE, changed, difference, every_model, tiny, tokens

from minilm.alignment import positions_within

LENGTH = 12


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_no_position_sees_a_later_token(name, training):
    """mask-missing, mask-bool-inverted, norm-over-time: in training mode too, where batch statistics live."""
    model = tiny(name).train(training)
    ids = tokens(model, 2, LENGTH)
    base = model(ids).hidden
    for column in range(LENGTH):
        moved = difference(model(changed(model, ids, 0, column)).hidden, base)
        assert bool((moved[0, :column] <= NOISE).all())
        assert moved[0, column] > EFFECT  # the token itself
        assert moved[1].max() <= NOISE  # the other row


@every_model
def test_every_position_sees_all_earlier_tokens(name):
    model = tiny(name)
    ids = tokens(model, 1, LENGTH)
    base = model(ids).hidden
    for column in range(LENGTH):
        moved = difference(model(changed(model, ids, 0, column)).hidden, base)
        assert bool((moved[0, column:] > NOISE).all()), f"token {column} is lost"
        assert moved[0, column:].max() > EFFECT


@every_model
@pytest.mark.parametrize("segmented", [False, True])
def test_gradients_flow_to_the_past_of_the_document_only(name, segmented):
    model = tiny(name)
    ids = tokens(model, 1, LENGTH)
    segments = torch.ones_like(ids)
    if segmented:
        segments[:, LENGTH // 2 :] = 2
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    hidden = model(ids, segments).hidden
    # Not the sum of squares: behind a norm it is the same for all rows, and its gradient is rounding.
    direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(2))
    for i in range(LENGTH):
        (gradient,) = torch.autograd.grad(hidden[0, i] @ direction, embedded[0], retain_graph=True)
        reached = gradient[0].abs().amax(dim=-1) > 0
        expected = (torch.arange(LENGTH) <= i) & (segments[0] == segments[0, i])
        assert reached.tolist() == expected.tolist()


@every_model
def test_documents_packed_in_a_row_equal_documents_alone(name):
    """pack-cross-contam, pack-pos-not-reset, state-not-reset-at-doc."""
    model = tiny(name)
    lengths = (5, 1, 8, 3)
    ids = tokens(model, 2, sum(lengths))
    segments = torch.cat([torch.full((n,), k + 1) for k, n in enumerate(lengths)]).expand(2, -1)
    packed = model(ids, segments)
    start = 0
    for n in lengths:
        alone = model(ids[:, start : start + n])
        assert difference(packed.hidden[:, start : start + n], alone.hidden).max() <= NOISE
        assert difference(packed.logits[:, start : start + n], alone.logits).max() <= NOISE
        start += n
    # Two-sided: without segments the documents do see each other.
    assert difference(model(ids).hidden, packed.hidden)[:, lengths[0] :].max() > EFFECT


@every_model
def test_a_document_does_not_feel_its_neighbours(name):
    model = tiny(name)
    ids = tokens(model, 1, LENGTH)
    segments = torch.tensor([[1] * 4 + [2] * 5 + [0] * 3])
    base = model(ids, segments).hidden
    for column, felt in ((1, range(1, 4)), (5, range(5, 9))):
        moved = difference(model(changed(model, ids, 0, column), segments).hidden, base)[0]
        outside = [i for i in range(9) if i not in felt]
        assert moved[outside].max() <= NOISE
        assert moved[list(felt)].min() > NOISE


@every_model
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_any_side_changes_nothing(name, side):
    """pos-ids-leftpad, padmask-ignored-fastpath, ffn-skipped-on-pad-flag: rows of unequal length in one batch."""
    model = tiny(name)
    ids = tokens(model, 3, LENGTH)
    before = {"left": (0, 3, 7), "right": (0, 0, 0), "both": (0, 2, 4)}[side]
    after = {"left": (0, 0, 0), "right": (0, 3, 7), "both": (0, 1, 3)}[side]
    segments = torch.ones_like(ids)
    for row in range(3):
        segments[row, : before[row]] = 0
        segments[row, LENGTH - after[row] :] = 0
    output = model(ids, segments)
    for row in range(3):
        real = slice(before[row], LENGTH - after[row])
        alone = model(ids[row : row + 1, real])
        assert difference(output.hidden[row, real], alone.hidden[0]).max() <= NOISE
    assert bool(torch.isfinite(output.hidden).all())


@every_model
def test_rows_of_nothing_but_padding_stay_finite_with_their_gradients(name):
    """mask-zero-times-inf: a softmax over an empty row would be NaN, and its gradient would reach every weight."""
    model = tiny(name).train()
    ids = tokens(model, 2, LENGTH)
    segments = torch.ones_like(ids)
    segments[1] = 0
    output = model(ids, segments)
    output.logits.square().sum().backward()
    assert bool(torch.isfinite(output.hidden).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@every_model
def test_masks_hold_against_very_large_scores(name):
    """mask-additive-finite: -1e4 is not minus infinity when scores are large."""
    model = tiny(name, init_std=3.0)
    ids = tokens(model, 1, LENGTH)
    segments = torch.tensor([[1] * 6 + [2] * 6])
    base = model(ids, segments).hidden
    moved = difference(model(changed(model, ids, 0, 5), segments).hidden, base)[0]
    assert moved[:5].max() == 0
    assert moved[6:].max() == 0


@every_model
def test_a_row_does_not_depend_on_its_batch(name):
    model = tiny(name)
    ids = tokens(model, 4, LENGTH)
    together = model(ids).hidden
    for row in range(4):
        assert difference(together[row], model(ids[row : row + 1]).hidden[0]).max() <= NOISE


@every_model
def test_only_differences_of_positions_matter(name):
    """rope-not-relative; two-sided: the differences themselves do matter."""
    model = tiny(name)
    ids = tokens(model, 1, LENGTH)
    plain = torch.arange(LENGTH)[None]
    base = model(ids, positions=plain).hidden
    assert torch.equal(base, model(ids).hidden)
    assert difference(model(ids, positions=plain + 50).hidden, base).max() <= 10 * NOISE
    assert difference(model(ids, positions=plain * 3).hidden, base).max() > EFFECT


@every_model
def test_default_positions_are_those_of_the_alignment_layer(name):
    model = tiny(name)
    ids = tokens(model, 2, LENGTH)
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 0, 0, 0, 0], [1] * 7 + [2] * 5])
    explicit = model(ids, segments, positions_within(segments)).hidden
    assert torch.equal(model(ids, segments).hidden, explicit)


@every_model
def test_a_long_call_leaves_no_trace_in_later_calls(name):
    """rope-state-leak."""
    model = tiny(name)
    short, long = tokens(model, 1, LENGTH), tokens(model, 1, model.config.max_length)
    before = model(short).hidden
    model(long)
    assert torch.equal(model(short).hidden, before)
