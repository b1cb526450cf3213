"""oneDNN's products and the fused parts of a block against plain formulas in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm import onednn
from minilm.alignment import align, score_hidden
from minilm.models import fused, parts

needs_onednn = pytest.mark.skipif(
    not onednn.works(), reason="this torch has no oneDNN products that can be used"
)
SHAPES = [(3, 5, 512, 128), (1, 7, 128, 512), (2, 1, 256, 256)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(make, *inputs: Tensor, seed: int = 9) -> list[Tensor]:
    """make(*inputs) and the gradients of a fixed combination of its numbers."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = make(*leaves)
    weights = drawn(*out.shape, seed=seed).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for mine, exact in zip(got, want, strict=True):
        scale = float(exact.abs().max())
        torch.testing.assert_close(mine.double(), exact, atol=3e-6 * scale, rtol=0)


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_and_its_gradients(shape):
    rows, length, width, out = shape
    x, weight = drawn(rows, length, width), drawn(out, width, seed=1)
    assert onednn.suits(x, weight)
    want = gradients(lambda x, w: x @ w.T, x.double(), weight.double())
    close(gradients(onednn.product, x, weight), want)
    close(gradients(torch.compile(onednn.product, backend="aot_eager"), x, weight), want)


@needs_onednn
@pytest.mark.parametrize("frozen", ["inputs", "weight"])
def test_a_frozen_factor_gets_no_gradient(frozen, monkeypatch):
    unwanted = "to_inputs" if frozen == "inputs" else "to_weight"
    monkeypatch.setattr(onednn, unwanted, lambda *_: pytest.fail("computed for nobody"))
    x, weight = drawn(4, 256), drawn(256, 256, seed=1)
    wanted = weight if frozen == "inputs" else x
    wanted.requires_grad_()
    onednn.product(x, weight).sum().backward()
    want = torch.ones(4, 256).T @ x if frozen == "inputs" else torch.ones(4, 256) @ weight
    torch.testing.assert_close(wanted.grad, want.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (drawn(3, 16), drawn(8, 16)),  # too small to pay
        (drawn(3, 256).double(), drawn(256, 256).double()),
        (drawn(3, 256).bfloat16(), drawn(256, 256).bfloat16()),
        (drawn(3, 512), drawn(512, 256).T),  # not in rows
        (drawn(0, 256), drawn(256, 256)),  # no rows
    ],
)
def test_other_tensors_go_to_torch(x, weight, monkeypatch):
    monkeypatch.setattr(onednn, "linear", lambda *_: pytest.fail("oneDNN was called"))
    torch.testing.assert_close(onednn.product(x, weight), F.linear(x, weight), atol=0, rtol=0)


def test_a_product_of_no_rows_has_gradients():
    x, weight = drawn(0, 256).requires_grad_(), drawn(256, 256).requires_grad_()
    onednn.product(x, weight).sum().backward()
    assert x.grad.shape == (0, 256) and not weight.grad.any()
    assert not onednn.to_weight(drawn(0, 256), drawn(0, 512)).any()


def test_autocast_decides_the_precision():
    x, weight = drawn(3, 256), drawn(256, 256, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.product(x, weight).dtype == torch.bfloat16
        assert not fused.suits(x)


@needs_onednn
@pytest.mark.parametrize("broken", ["missing", "wrong", "refuses"])
def test_operators_that_do_not_do_what_they_should_are_not_used(broken, monkeypatch):
    right = onednn.linear

    def linear(weight, x, then="none", *, bias=None):
        if broken == "missing":
            raise AttributeError("no such operator")
        if broken == "refuses":
            raise RuntimeError("mkldnn: could not create a primitive")
        return right(weight, x, then).bfloat16().float()

    monkeypatch.setattr(onednn, "linear", linear)
    onednn._tried.cache_clear()
    try:
        assert not onednn.works()
        x, weight = drawn(3, 256), drawn(256, 256, seed=1)
        torch.testing.assert_close(onednn.product(x, weight), F.linear(x, weight), atol=0, rtol=0)
    finally:
        onednn._tried.cache_clear()


@pytest.mark.parametrize("rows", [3, fused.ROWS + 5])
def test_norm(rows):
    x, weight = drawn(rows, 2, 24) * 3, drawn(24, seed=1)
    x[0, 0] = 0.0  # a row of zeros has no direction, and a gradient all the same
    want = gradients(
        lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w, x.double(), weight.double()
    )
    assert fused.suits(x)
    got = gradients(lambda x, w: fused.rms_norm(x, w, 1e-6), x, weight)
    close([g[1:] if g.dim() == 3 else g for g in got], [w[1:] if w.dim() == 3 else w for w in want])
    torch.testing.assert_close(got[1][0, 0].double(), want[1][0, 0], rtol=1e-4, atol=1e-6)


def test_rotation():
    """Pair (i, i + d/2) is a complex number that is multiplied by exp(i angle)."""
    x, angles = drawn(2, 5, 3, 8), drawn(1, 5, 1, 4, seed=1).double()

    def by_complex_numbers(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    want = gradients(by_complex_numbers, x.double())
    cos, sin = angles.cos().float(), angles.sin().float()
    close(gradients(lambda x: parts.rotate(x, cos, sin), x), want)
    wide = torch.cat((x, x), dim=2)  # a part of a wider product, as queries and keys are
    close(gradients(lambda x: parts.rotate(x, cos, sin), wide)[:1], [torch.cat((want[0], want[0]), dim=2)])
    close(gradients(lambda x: parts.rotate(x[:, :, 1:3], cos, sin), wide)[:1], [want[0][:, :, 1:3]])


def test_feed_forward():
    layer = parts.SwiGLU(128, 512)
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = drawn(*parameter.shape, seed=number) * 0.1
    exact = parts.SwiGLU(128, 512).double()
    exact.load_state_dict(layer.state_dict())
    x = drawn(2, 3, 128, seed=7)

    def formula(x, gate, up, down):
        h = x @ gate.T
        return (h * torch.sigmoid(h) * (x @ up.T)) @ down.T

    def module(x, *weights):
        names = ("gate.weight", "up.weight", "down.weight")
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    weights = [layer.gate.weight.data, layer.up.weight.data, layer.down.weight.data]
    want = gradients(formula, x.double(), *(w.double() for w in weights))
    close(gradients(module, x, *weights), want)


@needs_onednn
def test_a_feed_forward_keeps_its_inner_products_and_nothing_else():
    layer, kept = parts.SwiGLU(128, 512), []
    x = drawn(2, 64, 128).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x)
    wide = [shape for shape in kept if shape == (2, 64, 512)]
    assert len(wide) == 2, kept  # of gate and of up; the formulas keep four


@needs_onednn
@pytest.mark.parametrize("hook", ["forward", "pre", "module"])
def test_who_listens_to_the_last_product_sees_it(hook):
    layer, seen = parts.SwiGLU(128, 512), []
    if hook == "forward":
        layer.down.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    elif hook == "pre":
        layer.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    else:

        class Listening(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(x.shape)
                return super().forward(x)

        layer.down = Listening(512, 128, bias=False)
    layer(drawn(1, 4, 128).requires_grad_())
    assert seen == [(1, 4, 512)]


@needs_onednn
@pytest.mark.parametrize("chunk", [3, 100])
def test_the_loss_head(chunk):
    """The largest product of all: value and gradients against whole logits in float64."""
    tokens = torch.randint(0, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = align(tokens, torch.ones_like(tokens))
    hidden, head = drawn(2, 8, 128), drawn(600, 128, seed=1) * 0.1

    def loops(hidden: Tensor, head: Tensor) -> Tensor:
        nats = [
            torch.logsumexp(hidden[b, i] @ head.T, 0) - hidden[b, i] @ head[tokens[b, i + 1]]
            for b in range(2)
            for i in range(8)
        ]
        return torch.stack(nats).sum()

    want = gradients(loops, hidden.double(), head.double())
    got = gradients(lambda h, w: score_hidden(h, w, batch, chunk=chunk).nats, hidden, head)
    close(got, want)
