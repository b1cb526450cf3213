"""`score_hidden`: the loss in chunks of positions, its gradients, its precision, and what it never holds."""

from __future__ import annotations

import pytest
import torch
from alignment_oracle import one_row, random_rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilm.alignment import align, score, score_hidden


class _Seen(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns, and number of matrix products."""

    elements = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.products += func._schema.name in ("aten::mm", "aten::matmul", "aten::linear")
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])
@pytest.mark.parametrize("leaves", ["both", "hidden", "head", "none"])
def test_gradients_do_not_depend_on_the_chunk_or_on_who_wants_one(chunk: int, leaves: str) -> None:
    torch.manual_seed(0)
    batch = align(*random_rows(3, 8, 11))
    hidden = torch.randn(3, 8, 5, dtype=torch.float64, requires_grad=leaves in ("both", "hidden"))
    head = torch.randn(11, 5, dtype=torch.float64, requires_grad=leaves in ("both", "head"))
    wanted = [x for x in (hidden, head) if x.requires_grad]
    got, plain = score_hidden(hidden, head, batch, chunk=chunk), score(hidden @ head.T, batch)
    torch.testing.assert_close(got.nats, plain.nats, rtol=1e-12, atol=0)
    assert got.nats.requires_grad == bool(wanted)
    if wanted:
        torch.testing.assert_close(
            torch.autograd.grad(got.share(3.0), wanted), torch.autograd.grad(plain.share(3.0), wanted)
        )


def test_gradients_against_finite_differences() -> None:
    batch = align(*random_rows(2, 4, 5))
    hidden = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: score_hidden(h, w, batch, chunk=3).nats, (hidden, head))


def test_no_gradient_is_made_where_none_can_be_asked_for() -> None:
    batch = align(*one_row(4, 4))
    hidden, head = torch.randn(1, 4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    with _Seen() as with_gradient:
        wanted = score_hidden(hidden, head, batch).mean
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet(), _Seen() as seen:
            total = score_hidden(hidden, head, batch)
        assert not total.nats.requires_grad and total.mean == wanted
        assert with_gradient.products == 3 and seen.products == 1  # logits, two gradients; logits


def test_a_tied_head_gets_the_gradient_of_both_its_uses() -> None:
    batch = align(*random_rows(3, 8, 11))
    table = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(loss.nats, table)[0]
        for loss in (
            score_hidden(table[batch.inputs], table, batch, chunk=5),
            score(table[batch.inputs] @ table.T, batch),
        )
    ]
    torch.testing.assert_close(*grads)


def test_under_bfloat16_autocast_it_is_a_linear_layer_and_its_loss_is_float32() -> None:
    """Same products, rounded to the same bfloat16 logits; the loss of these logits is not rounded."""
    torch.manual_seed(0)
    batch = align(*random_rows(4, 16, 50))
    linear = nn.Linear(32, 50, bias=False)
    hidden = torch.randn(4, 16, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = linear(hidden)
        plain = score(logits, batch)
        chunked = score_hidden(hidden, linear.weight, batch, chunk=9)
    assert logits.dtype == torch.bfloat16
    assert chunked.mean == pytest.approx(plain.mean, rel=1e-6)
    exact = score(logits.detach().double(), batch)
    assert chunked.mean == pytest.approx(exact.mean, rel=1e-6)
    wanted = (hidden, linear.weight)
    for a, b in zip(
        torch.autograd.grad(chunked.nats, wanted), torch.autograd.grad(plain.nats, wanted), strict=True
    ):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()


def test_a_gradient_over_many_chunks_is_not_added_up_in_bfloat16() -> None:
    """512 chunks of one position: a bfloat16 running sum stops growing after some 256 equal parts."""
    batch = align(torch.zeros(1, 513, dtype=torch.long), torch.ones(1, 513, dtype=torch.long))
    hidden, head = torch.ones(1, 512, 1), torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = score_hidden(hidden, head, batch, chunk=1)
    (grad,) = torch.autograd.grad(total.nats, head)
    assert grad.flatten().tolist() == [-256.0, 256.0]


def test_float64_stays_float64_under_autocast() -> None:
    batch = align(*random_rows(2, 6, 9))
    hidden, head = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = score_hidden(hidden, head, batch)
    assert inside.nats == score_hidden(hidden, head, batch).nats


def test_the_whole_logits_never_exist() -> None:
    batch = align(*random_rows(4, 32, 999))
    hidden, head = torch.randn(4, 32, 8, requires_grad=True), torch.randn(999, 8, requires_grad=True)
    with _Seen() as seen:
        score_hidden(hidden, head, batch, chunk=16).nats.backward()
    assert seen.elements == 16 * 999
    with _Seen() as seen:
        score(hidden @ head.T, batch).nats.backward()
    assert seen.elements == 128 * 999  # the probe sees them where they do exist


def test_strided_and_expanded_tensors_count_like_dense_ones() -> None:
    batch = align(*random_rows(3, 8, 11))
    hidden = torch.randn(8, 3, 5).transpose(0, 1)
    head = torch.randn(5, 11).T
    plain = score_hidden(hidden.contiguous(), head.contiguous(), batch)
    assert score_hidden(hidden, head, batch, chunk=5).mean == pytest.approx(plain.mean, rel=1e-6)
    logits = torch.randn(1, 1, 11).expand(3, 8, 11)
    assert score(logits, batch).mean == pytest.approx(score(logits.contiguous(), batch).mean)
