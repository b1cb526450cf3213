"""The benchmark of the parts: all ways compute the same, a wrong one is found, and floors are what they say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from benchmark_modules import imported
from torch.utils.flop_counter import FlopCounterMode

from minilm import models, onednn
from minilm.models import parts as model_parts
from minilm.models.attention import resolve

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def bench(monkeypatch):
    """The script, with a machine that makes a billion operations and moves a billion bytes a second."""
    with imported("parts") as module:
        monkeypatch.setattr(module.measuring, "ceiling", lambda *a, **k: 1e9)
        monkeypatch.setattr(module.measuring, "bandwidth", lambda *a, **k: 1e9)
        yield module


def shape(*, size="6m", rows=2, length=24, dtype=torch.float32, head_sizes=(16,)):
    from parts_cases import Shape

    config = models.preset("original", size)
    return Shape(rows, length, config, head_sizes, torch.device("cpu"), dtype, False)


def recorded(bench, tmp_path, *given):
    """(exit code, record) of a quick run."""
    file = tmp_path / "parts.json"
    code = bench.main(["--quick", "--json", str(file), *given])
    return code, json.loads(file.read_text(encoding="utf-8"))


def test_the_quick_way_measures_every_part_and_all_ways_agree(bench, tmp_path, capsys):
    state = torch.get_rng_state()
    code, record = recorded(bench, tmp_path)
    assert code == 0
    assert torch.equal(torch.get_rng_state(), state)  # whoever calls it keeps his generator
    cases = record["results"]["cases"]
    assert {case["part"] for case in cases} == {
        "attention",
        "loss head",
        "matrix product",
        "block",
        "optimizer",
    }
    attention = {case["case"] for case in cases if case["part"] == "attention"}
    assert len(attention) == 4  # two head sizes, one document a row and packed
    taken = resolve("auto", torch.device("cpu"), torch.float32, 16)
    assert {case["ours"] for case in cases if case["part"] == "attention"} == {f"minilm {taken}"}
    for case in cases:
        assert case["disagreeing"] == []
        assert case["passes"].keys() == case["floors"].keys() == case["work"].keys()
        for name, ways in case["passes"].items():
            assert case["ours"] in ways and case["plain"] in ways, case["case"]
            work, floor = case["work"][name], case["floors"][name]
            assert floor["seconds"] == max(work["flops"] / _best(record), work["bytes"] / 1e9) > 0
            for way, found in ways.items():
                spread = found["seconds"]
                assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"], way
                assert (found["peak_megabytes"] is None) == (name == "forward")
    flash = next(case for case in cases if case["part"] == "attention")["absent"]
    assert "CUDA" in flash["minilm flash"] and "CUDA" in flash["minilm varlen"]
    page = capsys.readouterr().out
    assert page.startswith(bench.section(record))
    for case in cases:
        assert case["case"] in page
        assert all(why.rstrip(".") in page for why in case["absent"].values())
    assert "agree with a formula" in page and record["command"] in page and str(tmp_path) not in page


def _best(record):
    """The products that were measured themselves are faster than the machine of the stand-in."""
    limit = record["results"]["limits"]["product_flops"]
    rates = [
        case["work"][name]["flops"] / found["seconds"]["lowest"]
        for case in record["results"]["cases"]
        if case["part"] == "matrix product"
        for name, ways in case["passes"].items()
        for found in ways.values()
    ]
    assert limit == max([1e9, *rates])
    return limit


def test_a_part_of_ours_that_computes_something_else_is_found(bench, tmp_path, monkeypatch, capsys):
    right = model_parts.rotate
    monkeypatch.setattr(model_parts, "rotate", lambda x, cos, sin: right(x, cos, -sin))
    code, record = recorded(bench, tmp_path, "--only", "block")
    assert code == 1
    wrong = {case["case"]: case["disagreeing"] for case in record["results"]["cases"]}
    assert [ways for ways in wrong.values() if ways] == [["minilm"]]
    out, err = capsys.readouterr()
    assert "Not the formula's values or gradients: minilm in rotary" in out
    assert "rotary" in err and "not the formula's" in err


def test_a_way_that_cannot_run_is_told_with_its_reason(bench, tmp_path, monkeypatch, capsys):
    def breaks(self, x):
        raise RuntimeError("no kernel for this shape\nand more")

    monkeypatch.setattr(model_parts.SwiGLU, "forward", breaks)
    code, record = recorded(bench, tmp_path, "--only", "block")
    broken = record["results"]["cases"][-1]
    assert broken["absent"]["minilm"] == "RuntimeError: no kernel for this shape"
    assert "minilm" not in broken["passes"]["forward"]
    assert code == 1  # ours: a table without it answers nothing
    out, err = capsys.readouterr()
    assert "- minilm (feed-forward, 32 to 96): not run, RuntimeError: no kernel for this shape." in out
    assert "minilm did not run" in err


def test_a_wrong_gradient_or_a_nan_disagrees_though_the_value_is_right(bench):
    from parts_cases import Case, differentiable

    x = torch.randn(3, requires_grad=True)
    case = Case("p", "n", {}, "a", "b", 1e-6)
    ways = {
        "right": lambda x: x * x,
        "half": lambda x: x * x.detach(),
        "nan": lambda x: x * x + (x - x.detach()).sqrt() * 0,
    }
    differentiable(case, (x,), ways, lambda x: x.square())
    assert case.errors["half"]["value"] == 0 and case.errors["half"]["gradient"] == pytest.approx(0.5)
    assert math.isnan(case.errors["nan"]["gradient"])
    assert case.disagreeing() == ["half", "nan"]


def test_a_value_that_is_wrong_without_a_graph_alone_disagrees(bench):
    from parts_cases import Case, differentiable

    x = torch.ones(3, requires_grad=True)
    case = Case("p", "n", {}, "a", "b", 1e-6)
    ways = {"forward": lambda x: x * (2 if torch.is_grad_enabled() else 3)}
    differentiable(case, (x,), ways, lambda x: 2 * x)
    assert case.errors["forward"] == {"value": pytest.approx(0.5), "gradient": 0}
    assert case.disagreeing() == ["forward"]


def test_ours_is_onednn_where_it_may_be_and_the_reason_stands_where_not(bench):
    from parts_cases import product_cases

    if not onednn.works():
        pytest.skip("torch's operators of oneDNN are not there")
    for case in product_cases(shape()):
        assert case.ours == "minilm oneDNN" and case.disagreeing() == [], case.errors
    for case in product_cases(shape(dtype=torch.bfloat16)):
        assert case.ours == "torch linear"
        assert case.absent["minilm oneDNN"] == "it is for float32, this is torch.bfloat16"
        assert case.disagreeing() == []


def test_all_parts_agree_in_bfloat16_too(bench):
    from parts_attention import attention_cases
    from parts_cases import block_cases, head_cases

    some = shape(size="tiny", dtype=torch.bfloat16)
    for make in (attention_cases, head_cases, block_cases):
        for case in make(some):
            assert case.disagreeing() == [], (case.name, case.errors)
            assert case.ours not in case.absent


def test_the_formula_of_attention_is_the_definition(bench):
    from parts_attention import _written_out, documents

    segments = documents(1, 40, 8)
    q, k, v = (torch.randn(1, 40, heads, 4) for heads in (4, 2, 2))
    mask = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    for i in range(40):
        for j in range(i + 1):
            mask[0, 0, i, j] = segments[0, i] == segments[0, j]
    found = _written_out(q, k, v, mask)
    for head in range(4):
        for i in range(40):
            seen = [j for j in range(i + 1) if segments[0, j] == segments[0, i]]
            scores = [float(q[0, i, head] @ k[0, j, head // 2]) / 2 for j in seen]  # sqrt(4)
            parts = [math.exp(score) for score in scores]
            wanted = sum(w * v[0, j, head // 2] for w, j in zip(parts, seen, strict=True)) / sum(parts)
            assert torch.allclose(found[0, i, head], wanted, atol=1e-5)


def test_packed_rows_have_documents_of_the_mean_that_is_told(bench):
    from parts_attention import PACKED_MEAN, documents

    segments = documents(64, 4096, PACKED_MEAN)
    steps = segments.diff(dim=1)
    assert set(steps.unique().tolist()) == {0, 1} and int(segments.min()) == 1
    assert segments.numel() / int(segments.amax(1).sum()) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(("part", "way"), [("head", "torch, whole logits"), ("product", "torch linear"),
                                           ("block", "plain formula")])  # fmt: skip
def test_the_arithmetic_on_paper_is_what_torch_counts(bench, part, way):
    import parts_cases

    for case in getattr(parts_cases, f"{part}_cases")(shape()):
        for name, (flops, _) in case.work.items():
            with FlopCounterMode(display=False) as counter:
                case.calls[name][way]()
            assert counter.get_total_flops() == flops, (case.name, name)


def test_the_arithmetic_of_attention_counts_what_is_seen(bench):
    from parts_attention import PACKED_MEAN, attention_cases, documents

    whole, packed = attention_cases(shape(rows=2, length=150, head_sizes=(32,)))
    seen = 2 * 150 * 151 / 2
    assert whole.work["forward"][0] == 4 * 256 * seen  # two products of the width 256 a pair
    lengths = [
        n for row in documents(2, 150, PACKED_MEAN) for n in row.unique(return_counts=True)[1].tolist()
    ]
    assert packed.work["forward"][0] == 4 * 256 * sum(n * (n + 1) / 2 for n in lengths)
    assert packed.work["forward + backward"][0] == 3 * packed.work["forward"][0]


def test_the_loss_head_in_chunks_needs_less_memory_than_the_logits(bench):
    from parts_cases import CHUNKS, head_cases
    from peak import peak_bytes

    (case,) = head_cases(shape(rows=4, length=256))
    both = case.calls["forward + backward"]
    logits = 4 * 1024 * 6400
    whole = peak_bytes(both["torch, whole logits"], "cpu")
    assert whole >= 2 * logits  # and their gradient
    assert peak_bytes(both[f"minilm, {CHUNKS[0]} at a time"], "cpu") < 0.6 * whole
    held = torch.ones(1000)
    assert peak_bytes(lambda: torch.ones(5000) + torch.ones(5000), "cpu") == 3 * 20_000 and held.sum() == 1000


def test_the_formulas_of_the_optimizers_are_theirs(bench):
    from parts_optimizers import CLIP, _formula, _orthogonal, gradients_of, reference_model

    from minilm.training.muon import COEFFICIENTS
    from minilm.training.optim import OptimConfig

    some = shape(size="tiny")
    gradients = gradients_of(reference_model(some))
    steps = [[factor * g for g in gradients] for factor in (1, -2, 0.1)]
    wanted = _formula(reference_model(some), steps, OptimConfig(), set(), clip=CLIP)
    model = reference_model(some).double()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    parts = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parts, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in steps:
        for p, g in zip(model.parameters(), step, strict=True):
            p.grad = g.double()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    for p, w in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(p, w, rtol=1e-9, atol=1e-6 * 1e-3)
    matrix = torch.randn(12, 5, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    for _ in range(5):
        values = sum(c * values**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    wanted = math.sqrt(12 / 5) * (left * values) @ right
    assert torch.allclose(_orthogonal(matrix), wanted, atol=1e-10)


def test_the_answer_counts_and_names_the_farthest(bench):
    def case(name, ours, plain, floor):
        found = {
            "minilm": ours,
            "minilm, slowly": 0.1,
            "torch": plain,
            "torch, another thing": 0.1,
            "compiled": 2.5,
        }
        ways = {way: {"seconds": {"median": s}} for way, s in found.items()}
        errors = {way: {"value": 1.0 if way == "torch, another thing" else 1e-6} for way in ways}
        return {"part": "block", "case": name, "ours": "minilm", "errors": errors, "tolerance": 1e-3,
                "passes": {"forward + backward": ways},
                "floors": {"forward + backward": {"seconds": floor}}}  # fmt: skip

    said = bench._answer(
        [case("one", 1.0, 2.0, 0.5), case("two", 3.0, 2.0, 0.1), case("three", 1.0, 9.0, 1.0)]
    )
    assert said.startswith("In 2 of 3 cases") and "block (two), at 30.0 times" in said
    assert "(not: two: torch, 0.67 of the time)" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "atention"], "invalid choice: 'atention'"),
        (["--head-sizes", "15"], "a head size is even"),
        (["--repeats", "0"], "at least 1"),
        (["--size", "27m"], "invalid choice: '27m'"),
        (["--device", "cuda"], "no CUDA device is visible"),
    ],
)
def test_what_is_not_there_is_named(bench, capsys, monkeypatch, given, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(given)
    assert said in capsys.readouterr().err
