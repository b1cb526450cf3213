"""The alignment layer against the loss that `transformers.LlamaForCausalLM` computes by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minilm.alignment import IGNORED, Sum, align, from_labels, last, nll, score, score_hidden
from minilm.errors import DataError

ROWS, LENGTH, VOCABULARY = 4, 12, 31
LENGTHS = torch.tensor([12, 7, 3, 1])  # the last row has one token: nothing to predict


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,  # logits far from 0, so that every position has a loss of its own
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask() -> Tensor:
    return (torch.arange(LENGTH) < LENGTHS[:, None]).long()


def ours(llama: Any, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Sum, Sum]:
    """The same loss from logits and from hidden states."""
    batch = from_labels(ids, labels, mask)
    attention = None if mask is None else mask[:, :-1]
    hidden = llama.model(input_ids=batch.inputs, attention_mask=attention).last_hidden_state
    return score(llama.lm_head(hidden), batch), score_hidden(hidden, llama.lm_head.weight, batch, chunk=5)


def layouts() -> dict[str, Tensor]:
    """Which tokens are labels, [ROWS, LENGTH]."""
    place = torch.arange(LENGTH).expand(ROWS, -1)
    return {
        "every token": place >= 0,
        "an answer after a prompt": place >= torch.tensor([[3], [5], [0], [11]]),
        "a hole in the middle": (place < 3) | (place > 8),
        "only the first token, which nobody predicts": place == 0,
        "only the last token": place == LENGTH - 1,
        "one row alone": torch.arange(ROWS)[:, None].expand(-1, LENGTH) == 2,
    }


@pytest.mark.parametrize("layout", layouts())
def test_the_loss_is_llamas_own(llama: Any, ids: Tensor, layout: str) -> None:
    labels = torch.where(layouts()[layout], ids, IGNORED)
    with torch.no_grad():
        theirs = llama(input_ids=ids, labels=labels).loss.item()
        totals = ours(llama, ids, labels)
    for total in totals:
        if layout.startswith("only the first"):
            assert theirs != theirs  # NaN: what must never be shown
            assert total.tokens == 0
            with pytest.raises(DataError, match="no prediction"):
                _ = total.mean
        else:
            assert total.mean == pytest.approx(theirs, rel=2e-6)


def test_the_loss_of_right_padded_rows_is_llamas_own(llama: Any, ids: Tensor, mask: Tensor) -> None:
    labels = torch.where(mask.bool(), ids, IGNORED)
    with torch.no_grad():
        theirs = llama(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
        totals = ours(llama, ids, labels, mask)
    for total in totals:
        assert total.mean == pytest.approx(theirs, rel=2e-6)
        assert total.tokens.item() == (LENGTHS - 1).sum().item()


def test_labels_that_stand_on_padding_do_not_count(llama: Any, ids: Tensor, mask: Tensor) -> None:
    """Born from `pad-in-loss`: `labels = input_ids` with padded rows makes Llama learn the padding."""
    with torch.no_grad():
        theirs = llama(input_ids=ids, attention_mask=mask, labels=ids).loss.item()
        careless = ours(llama, ids, ids, mask)[0]
        careful = ours(llama, ids, torch.where(mask.bool(), ids, IGNORED), mask)[0]
    assert careless.mean == careful.mean
    assert abs(careless.mean - theirs) > 0.01


def test_shares_of_micro_batches_are_llamas_loss_and_gradient_with_num_items(
    llama: Any, ids: Tensor, mask: Tensor
) -> None:
    """One row a micro-batch, unequal counts: `num_items_in_batch` on their side, `share(total)` on ours."""
    labels = torch.where(mask.bool(), ids, IGNORED)
    total = from_labels(ids, labels, mask).num_targets()
    parameters = list(llama.parameters())
    losses, grads = [], []
    for row in (slice(b, b + 1) for b in range(ROWS)):
        theirs = llama(
            input_ids=ids[row], attention_mask=mask[row], labels=labels[row], num_items_in_batch=int(total)
        ).loss
        part = ours(llama, ids[row], labels[row], mask[row])[1].share(total)
        assert part.item() == pytest.approx(theirs.item(), rel=2e-6)
        losses.append((theirs, part))
    for side in (0, 1):
        loss = torch.stack([pair[side].double() for pair in losses]).sum()
        grads.append(torch.autograd.grad(loss, parameters))
    whole = llama(input_ids=ids, attention_mask=mask, labels=labels).loss
    grads.append(torch.autograd.grad(whole, parameters))
    for others in grads[1:]:
        torch.testing.assert_close(others, grads[0], rtol=1e-4, atol=1e-7)


def test_packed_rows_are_llamas_loss_with_the_first_token_of_each_document_ignored(
    llama: Any, ids: Tensor
) -> None:
    """Same logits on both sides: only the labels say where a document begins."""
    segments = torch.tensor([[1] * 5 + [2] * 7, [1] * 12, [1] * 3 + [2] * 4 + [3] * 5, [1] * 1 + [2] * 11])
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    batch = align(ids, segments)
    with torch.no_grad():
        theirs = llama(input_ids=ids, labels=torch.where(first, IGNORED, ids)).loss.item()
        total = score(llama(input_ids=batch.inputs).logits, batch)
    assert total.mean == pytest.approx(theirs, rel=2e-6)
    assert total.tokens.item() == (~first).sum().item()


def test_each_token_costs_what_the_log_probabilities_of_llama_say(llama: Any, ids: Tensor) -> None:
    with torch.no_grad():
        log_p = llama(input_ids=ids).logits.double().log_softmax(-1)
        each = nll(llama(input_ids=ids[:, :-1]).logits, from_labels(ids, ids))
    for b in range(ROWS):
        for i in range(LENGTH - 1):
            assert each[b, i].item() == pytest.approx(-log_p[b, i, ids[b, i + 1]].item(), rel=1e-4, abs=1e-5)


def test_last_is_where_llama_generates_from(llama: Any, ids: Tensor, mask: Tensor) -> None:
    with torch.no_grad():
        together = last(llama(input_ids=ids, attention_mask=mask).logits, LENGTHS)
        alone = [llama(input_ids=ids[b : b + 1, : LENGTHS[b]]).logits[0, -1] for b in range(ROWS)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", [IGNORED, 0])
def test_labels_that_were_shifted_beforehand_are_refused(ids: Tensor, end: int) -> None:
    """Born from `double-shift`."""
    shifted = torch.cat([ids[:, 1:], torch.full((ROWS, 1), end)], dim=1)
    with pytest.raises(DataError, match=r"labels\[0, 0\].*must be the unshifted input_ids"):
        from_labels(ids, shifted)


def test_one_wrong_label_is_named_by_row_and_column(ids: Tensor) -> None:
    labels = ids.clone()
    labels[2, 5] = (labels[2, 5] + 1) % VOCABULARY
    with pytest.raises(DataError, match=r"labels\[2, 5\] is \d+ but input_ids\[2, 5\] is \d+"):
        from_labels(ids, labels)


def test_masks_of_any_type_mean_the_same(ids: Tensor, mask: Tensor) -> None:
    wanted = from_labels(ids, ids, mask).weights
    for kind in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(from_labels(ids, ids, mask.to(kind)).weights, wanted)


def test_left_padding_neither_predicts_nor_is_predicted(ids: Tensor, mask: Tensor) -> None:
    """Llama itself counts the first token after the padding, predicted from a PAD."""
    batch = from_labels(ids, ids, mask.flip(1))
    assert batch.weights.sum(1).tolist() == (LENGTHS - 1).tolist()
    assert batch.positions[1].tolist() == [0] * 5 + list(range(6))
