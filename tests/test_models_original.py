"""The original Transformer: its reference size, its parts against their formulas, its registry and its command."""

from __future__ import annotations

import argparse
import dataclasses
import math

import pytest
import torch
from zoo_models import tiny, tokens

from minilm import models
from minilm.alignment import align, score
from minilm.cli import params
from minilm.errors import CheckpointError, ConfigError, DataError
from minilm.models import folder
from minilm.models.original import OriginalConfig
from minilm.models.parts import RMSNorm, Rotary, SwiGLU, rotate


def test_reference_size_has_exactly_25_829_888_parameters():
    config = models.preset("original", "26m")
    assert config.num_parameters() == 25_829_888
    assert config == OriginalConfig()  # the defaults are the reference
    assert (config.vocab_size, config.dim, config.num_layers) == (6400, 512, 8)
    assert (config.num_heads, config.num_kv_heads, config.hidden_dim) == (32, 8, 1408)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("tiny", 32_928),
        ("6m", 6_065_408),
        ("100m", 100_092_672),
        ("350m", 348_447_744),
        ("1b", 1_057_581_056),
    ],
)
def test_other_sizes_are_what_the_documentation_says(size, count):
    config = models.preset("original", size)
    assert config.num_parameters() == count
    assert size == "tiny" or config.head_dim == 64


def test_initial_loss_of_the_reference_is_ln_v_and_half_the_variance():
    """no-shift, init-wrong-scale: about 8.87; with tied embeddings, unshifted labels would be far below ln V."""
    torch.manual_seed(0)
    model = models.build(models.preset("original", "26m")).eval()
    ids = tokens(model, 4, 129)
    batch = align(ids, torch.ones_like(ids))
    with torch.no_grad():
        logits = model(batch.inputs, batch.segments, batch.positions).logits
    variance = logits.var().item()
    assert variance == pytest.approx(512 * 0.02**2, rel=0.05)
    loss = score(logits, batch).mean
    sampling = math.sqrt(variance / 512)
    assert loss == pytest.approx(math.log(6400) + variance / 2, abs=3 * sampling)
    assert loss == pytest.approx(8.87, abs=0.06)
    unshifted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.inputs.flatten()).item()
    assert unshifted < math.log(6400) - 0.15 < loss - 0.2


def test_flops_at_the_reference_size():
    """By hand: 25,821,184 weights in products, 8 layers x 4 x 512 x 256.5 keys for attention."""
    config = models.preset("original", "26m")
    assert config.flops_per_token(512) == 2 * 25_821_184 + 8 * 4 * 512 * 513 // 2
    assert config.training_flops_per_token(512) == 3 * config.flops_per_token(512)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_norm_is_its_formula_in_float32(scale, dtype, error):
    """norm-eps-dtype: computed in 16 bits the mean of squares would lose two digits."""
    norm = RMSNorm(96, 1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
    x = (torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    exact = x.double()
    want = exact / (exact.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    got = norm(x)
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= error * want.abs()).all()


def test_rotation_is_that_of_complex_numbers():
    rotary = Rotary(8, 50, 100.0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 49], [7, 7, 0, 1, 2]])
    got = rotate(x, *rotary.double()(positions))
    frequencies = torch.tensor([100.0 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    turn = torch.polar(torch.ones(2, 5, 1, 4, dtype=torch.float64), positions[..., None, None] * frequencies)
    want = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(got, torch.cat([want.real, want.imag], dim=-1))


def test_table_is_exact_far_out():
    """rope-bf16: positions, frequencies or angles in few bits are right near 0 and wrong far out."""
    cos, sin = Rotary(16, 8192, 10_000.0)(8192)
    for position in (255, 257, 4097, 8191):
        for i in range(8):
            angle = position * 10_000.0 ** (-i / 8)
            assert cos[0, position, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[0, position, 0, i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_two_tables_with_other_bases_stay_apart():
    """rope-cache-shared."""
    a, b = Rotary(8, 20, 100.0), Rotary(8, 20, 10_000.0)
    assert not torch.equal(a(20)[0], b(20)[0])
    assert torch.equal(a(20)[0], Rotary(8, 20, 100.0)(20)[0])


def test_feed_forward_is_its_formula():
    torch.manual_seed(0)
    ffn = SwiGLU(6, 10)
    x = torch.randn(3, 6)
    gate, up = x @ ffn.gate.weight.T, x @ ffn.up.weight.T
    torch.testing.assert_close(ffn(x), (gate / (1 + (-gate).exp()) * up) @ ffn.down.weight.T)


def test_zeroed_blocks_leave_the_embedding():
    """residual-missing: the stream passes through blocks that add nothing."""
    model = tiny("original")
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.ffn.down.weight.zero_()
    ids = tokens(model, 1, 5)
    torch.testing.assert_close(model(ids).hidden, model.norm(model.embedding(ids)))


def test_logits_are_the_product_with_the_head():
    model = tiny("original", tie_embeddings=False)
    output = model(tokens(model, 2, 5))
    assert output.logits.shape == (2, 5, 256) and output.auxiliary == {}
    torch.testing.assert_close(output.logits, output.hidden @ model.head_weight.T)


def test_shapes_that_do_not_fit_are_refused():
    model = tiny("original")
    ids = tokens(model, 2, 5)
    with pytest.raises(DataError, match=r"inputs must be \[rows, at least 1 token\], not \[5\]"):
        model(ids[0])
    with pytest.raises(DataError, match="not \\[2, 0\\]"):
        model(ids[:, :0])
    with pytest.raises(DataError, match=r"segments has shape \[2, 4\], inputs \[2, 5\]"):
        model(ids, ids[:, :4])
    with pytest.raises(ConfigError, match="The cache has 1 rows, the inputs 2"), torch.no_grad():
        model(ids, cache=model.new_cache(1, 8))
    with pytest.raises(ConfigError, match="holds no gradients"):
        model(ids, cache=model.new_cache(2, 8))
    with (
        pytest.raises(ConfigError, match=r"made for torch\.float64, the model computes in torch\.float32"),
        torch.no_grad(),
    ):
        model(ids, cache=model.new_cache(2, 8, dtype=torch.float64))


# ---- registry


def test_unknown_names_get_a_suggestion():
    for call, message in (
        (lambda: models.preset("orignal", "26m"), r"no model 'orignal'; did you mean 'original'\?"),
        (
            lambda: models.preset("original", "27m"),
            r"no size '27m' of model 'original'; did you mean '26m'\?",
        ),
        (
            lambda: models.preset("original", "26m", num_layer=3),
            r"no setting 'num_layer'; did you mean 'num_layers'",
        ),
        (lambda: models.sizes("xyz"), r"no model 'xyz'\. Models: "),
        (lambda: models.from_dict({"size": "26m"}), "has no name"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as error:
        models.build(OriginalConfig(dim=100, num_heads=7, num_kv_heads=3))
    assert "1. num_heads: 7 heads do not divide dim 100" in str(error.value)
    assert "2. num_kv_heads: 3 does not divide num_heads 7" in str(error.value)
    with pytest.raises(ConfigError, match=r"head size dim / num_heads = 5 must be even"):
        models.build(OriginalConfig(dim=20, num_heads=4, num_kv_heads=4))
    with pytest.raises(ConfigError) as error:
        models.preset(
            "original", "tiny", dim="32", dropout=1.5, attention="flesh", vocab_size=0, rope_theta=1
        )
    text = str(error.value)
    assert "4 problems" in text and all(
        f"{f}: " in text for f in ("dim", "dropout", "attention", "vocab_size")
    )


def test_a_config_that_predicts_wrongly_cannot_be_built(monkeypatch):
    monkeypatch.setattr(OriginalConfig, "num_parameters", lambda self: 1)
    with pytest.raises(AssertionError, match="32,928 parameters, but its config predicts 1"):
        models.build(models.preset("original", "tiny"))


def test_a_variant_is_one_new_file(monkeypatch, tmp_path):
    (tmp_path / "one_more.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Literal\n"
        "from minilm.models import register\nfrom minilm.models.original import OriginalConfig\n"
        "@register('one_more')\n@dataclass(frozen=True, kw_only=True)\n"
        "class Config(OriginalConfig):\n    name: Literal['one_more'] = 'one_more'\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setattr(models, "_CONFIG_CLASSES", dict(models._CONFIG_CLASSES))
    assert "one_more" in models.names()
    assert models.build(models.preset("one_more", "tiny")).config.name == "one_more"
    with pytest.raises(RuntimeError, match="registered by"):
        models.register("original")(models.config_class("one_more"))


# ---- minilm params


def show(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    params.add(parser.add_subparsers())
    parsed = parser.parse_args(["params", *arguments])
    return parsed.run(parsed)


def test_params_shows_groups_flops_and_state(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert show("original:26m", "original:100m") == 0
    text = capsys.readouterr().out
    for expected in ("3,276,800", "25,829,888", "100,092,672", "55.84 MFLOP", "167.5 MFLOP", "394.1 MiB"):
        assert expected in text
    assert "original:100m against original:26m: parameters NOT matched (x 3.88)" in text


def test_params_reads_folders_and_yaml(capsys, tmp_path):
    folder.save(tiny("original"), tmp_path / "m")
    plain, section = tmp_path / "plain.yaml", tmp_path / "section.yml"
    plain.write_text("name: original\nsize: tiny\nhidden_dim: 97\n")
    section.write_text("train: {steps: 3}\nmodel: {size: tiny}\n")
    assert show(str(tmp_path / "m"), str(tmp_path / "m" / "model.json"), str(plain), str(section)) == 0
    assert capsys.readouterr().out.count("parameters matched") == 6
    assert params.read(str(plain)) == dataclasses.replace(
        tiny("original").config, hidden_dim=97, init_std=0.02
    )


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("original", ConfigError, "names no size.*original:26m"),
        ("original:25m", ConfigError, "did you mean '26m'"),
        ("no/such/folder", ConfigError, "There is no such file or folder"),
        ("missing.yaml", ConfigError, r"missing\.yaml does not exist"),
        (".", CheckpointError, "not a saved model"),
    ],
)
def test_params_explains_what_is_wrong(argument, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"(?s){message}"):
        show(argument)


@pytest.mark.parametrize("content", ["model: 3", "- 1", "a: [", "name: original\nsiez: tiny"])
def test_params_explains_a_yaml_that_is_no_model(content, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        show(str(path))
    with pytest.raises(ConfigError, match="at least 1"):
        show("original:26m", "--sequence-length", "0")
