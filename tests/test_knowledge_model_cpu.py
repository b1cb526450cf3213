"""The reading of training on a CPU in float32 against the formula in float64: values, gradients, what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from knowledge_reference import model_of

from minilm.models import reading

TOKENS, HEADS, SIZE, ENTRIES, WIDTH, VOCAB = 23, 3, 8, 4, 5, 40
NAMES = ("queries", "table", "bias", "positions", "null")


def given(seed=0, tokens=TOKENS):
    """Entries of all lengths; token 0 reads an empty slot, token 1 nothing but such, token 2 one id again and again."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    ids = torch.randint(VOCAB, (tokens, ENTRIES, WIDTH), generator=draw)
    lengths = torch.randint(1, WIDTH + 1, (tokens, ENTRIES, 1), generator=draw)
    bias = normal(tokens, ENTRIES, 1).masked_fill(torch.arange(WIDTH) >= lengths, -torch.inf)
    if tokens > 2:
        bias[0, 2], bias[1], ids[2, 1:3] = -torch.inf, -torch.inf, 7
    return {
        "queries": normal(tokens, HEADS, SIZE),
        "table": normal(VOCAB, 2 * SIZE),
        "ids": ids,
        "bias": bias,
        "positions": normal(tokens, HEADS, WIDTH),
        "null": normal(tokens, HEADS),
    }


def passed(read, inputs, dtype, used=(0, 1, 2)):
    """Results, and gradients of a sum in which each number of each result that is used weighs differently."""
    inputs = {
        name: x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    results = read(**inputs)
    draw = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(dtype) for x in results[:3]]
    sum((results[i] * weights[i]).sum() for i in used).backward()
    zero = {name: torch.zeros_like(inputs[name]) for name in NAMES}
    gradients = {name: zero[name] if inputs[name].grad is None else inputs[name].grad for name in NAMES}
    return dict(zip(("mixed", "of_positions", "of_null", "attended"), results, strict=True)) | gradients


def compared(found, wanted):
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32 and value.isfinite().all(), name
        torch.testing.assert_close(
            found[name].double(), value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def at_once(monkeypatch, tokens):
    monkeypatch.setattr(reading, "AT_ONCE", tokens * ENTRIES * WIDTH * 2 * SIZE * 4)


# 23 tokens in one part, in parts that do not go up, one by one, and where not even one fits.
@pytest.mark.parametrize("part", [1000, 23, 8, 1, 0])
def test_values_and_gradients_are_those_of_the_formula(monkeypatch, part):
    at_once(monkeypatch, part)
    inputs = given()
    found = passed(reading.read, inputs, torch.float32)
    compared(found, passed(reading.formula, inputs, torch.float64))
    assert (found["attended"][1, :, :-1] == 0).all() and (found["attended"][1, :, -1] == 1).all()
    assert (found["bias"][inputs["bias"].isneginf()] == 0).all()


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_a_result_that_nothing_came_of_has_no_gradient(monkeypatch, used):
    at_once(monkeypatch, 8)
    inputs = given()
    wanted = passed(reading.formula, inputs, torch.float64, used)
    compared(passed(reading.read, inputs, torch.float32, used), wanted)


@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens(tokens):
    inputs = given(tokens=tokens)
    compared(passed(reading.read, inputs, torch.float32), passed(reading.formula, inputs, torch.float64))


def test_views_of_other_tensors_are_read_as_they_are(monkeypatch):
    """Strides that are not those of rows, and a gradient that is one number everywhere."""
    at_once(monkeypatch, 8)
    inputs = given()
    compact = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    strided = {name: x.mT.contiguous().mT for name, x in compact.items()}
    found = []
    for some in (compact, strided):
        some = {name: x.clone(memory_format=torch.preserve_format) for name, x in some.items()}
        leaves = [some[name].requires_grad_() for name in NAMES]
        mixed, of_positions, of_null, _ = reading.read(**some)
        found.append(torch.autograd.grad(mixed.sum() + of_positions.sum() + of_null.sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_bits_without_a_graph_are_those_with_one(monkeypatch):
    at_once(monkeypatch, 8)
    inputs = given()
    found = passed(reading.read, inputs, torch.float32)
    with torch.no_grad():
        again = reading.read(**{n: x.float() if x.is_floating_point() else x for n, x in inputs.items()})
    assert not any(x.requires_grad for x in again)
    for name, value in zip(("mixed", "of_positions", "of_null", "attended"), again, strict=True):
        assert torch.equal(found[name], value)
    assert not found["attended"].requires_grad


def kept_by(inputs):
    """Largest tensor that autograd keeps beside the inputs, and the name of what made the result."""
    sizes, own = [0], {x.data_ptr() for x in inputs.values()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(0 if x.data_ptr() in own else x.numel()) or x, lambda x: x
    ):
        mixed = reading.read(**inputs)[0]
    return max(sizes), type(mixed.grad_fn).__name__


@pytest.mark.parametrize("way", ["float32", "float64", "bfloat16", "autocast", "meta"])
def test_what_is_taken_depends_on_the_tensors(way):
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(way, torch.float32)
    device = "meta" if way == "meta" else "cpu"
    inputs = {n: x.to(device, dtype if x.is_floating_point() else None) for n, x in given().items()}
    for name in NAMES:
        inputs[name].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        largest, made_by = kept_by(inputs)
    gathered = TOKENS * ENTRIES * WIDTH * 2 * SIZE
    if way == "float32":
        assert made_by == "_ReadingBackward"
        assert largest == TOKENS * HEADS * (ENTRIES * WIDTH + 1)  # the attention
    else:
        assert made_by != "_ReadingBackward"
        assert largest == gathered // 2  # keys, or values


@pytest.mark.parametrize("width", [6, 512])  # too small a weight for oneDNN, and large enough
def test_the_projected_table_is_the_product_of_its_normed_rows(width):
    draw, eps = torch.Generator().manual_seed(3), 0.05
    table = (
        torch.randn(VOCAB, width, generator=draw, dtype=torch.float64) * torch.linspace(0, 2, VOCAB)[:, None]
    )
    weights = [torch.randn(32, width, generator=draw, dtype=torch.float64) for _ in range(4)]
    upon = [torch.randn(VOCAB, 64, generator=draw, dtype=torch.float64) for _ in range(2)]
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (table, *weights)]
        if dtype == torch.float32:
            found = reading.projected(leaves[0], leaves[1:], 2, eps)
        else:
            assert reading.projected(leaves[0], leaves[1:], 2, eps) is None
            normed = F.rms_norm(leaves[0], (width,), eps=eps)
            found = [normed @ torch.cat(pair).T for pair in (leaves[1:3], leaves[3:])]
        assert len(found) == 2 and all(x.is_contiguous() for x in found)
        of = torch.autograd.grad(
            sum((x * y.to(dtype)).sum() for x, y in zip(found, upon, strict=True)), leaves
        )
        gradients.append([*found, *of])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_model_takes_this_way_and_its_gradients_are_those_of_the_formulas(monkeypatch):
    """Both memory layers, each with keys and values of its own."""
    found = []
    for suits in (None, lambda x: False):
        if suits is not None:
            monkeypatch.setattr(reading, "suits", suits)
        model = model_of(num_layers=3, memory_layers=[1, 2]).train()
        ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
        output = model(ids)
        (output.hidden * torch.linspace(-1, 1, output.hidden.numel()).view_as(output.hidden)).sum().backward()
        found.append({"hidden": output.hidden.detach()} | {n: p.grad for n, p in model.named_parameters()})
        ways = set()
        pending = [output.hidden.grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and node not in ways:
                ways.add(node)
                pending += [before for before, _ in node.next_functions]
        names = [type(node).__name__ for node in ways]
        counts = names.count("_ReadingBackward"), names.count("_ProjectedBackward")
        assert counts == ((2, 1) if suits is None else (0, 0))
    for name, value in found[1].items():
        if value is not None:
            scale = float(value.abs().max())
            torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
