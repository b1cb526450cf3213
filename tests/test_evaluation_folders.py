"""Hugging Face folders: exported models and those from elsewhere, against transformers alone."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from data_stores import small_tokenizer, texts, write_jsonl
from evaluation_checkpoint import make_run

import minilm
from minilm.errors import CheckpointError, ConfigError
from minilm.export.folder import export_folder
from minilm.models.hf import HuggingFaceModel, to_hf
from minilm.opening import open_model

DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    return export_folder(made.model, tmp_path_factory.mktemp("exported") / "llama", tokenizer=made.tokenizer)


@torch.no_grad()
def losses_of(model, tokenizer, lines: list[str]) -> tuple[float, int]:
    """By transformers: one text at a time, its own loss."""
    nats, count = 0.0, 0
    for line in lines:
        ids = torch.tensor([tokenizer.document(line)])
        nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return nats / count, count


def test_the_script_of_the_documentation_gives_our_loss(made, exported, tmp_path, monkeypatch, capsys):
    """An independent recomputation: transformers alone, on the exported folder."""
    (script,) = re.findall(r"```python\n(# recompute\.py.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    assert len(script.splitlines()) <= 35 and "minilm" not in script
    (tmp_path / "recompute.py").write_text(script)
    lines = [t for t in made.texts if len(made.tokenizer.document(t)) <= 128]
    data = write_jsonl(tmp_path / "texts.jsonl", lines)
    monkeypatch.setattr(sys, "argv", ["recompute.py", str(exported), str(data)])
    runpy.run_path(str(tmp_path / "recompute.py"), run_name="__main__")
    theirs = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours = minilm.evaluate(
        made.checkpoint, str(data), sequence_length=128
    )  # that of the model, not of the run
    assert theirs["tokens"] == ours.scores.num_tokens
    assert theirs["loss"] == pytest.approx(ours.loss, rel=1e-5)
    folder = minilm.evaluate(exported, str(data))
    assert folder.loss == pytest.approx(ours.loss, rel=1e-6)
    assert folder.bits_per_byte == pytest.approx(ours.bits_per_byte, rel=1e-6)


def test_a_model_that_is_no_llama_runs_as_it_is(made, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer, lines = small_tokenizer(), texts(12, longest=20)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.num_tokens, n_positions=96, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save(tmp_path / "gpt2")
    loaded = open_model(tmp_path / "gpt2")
    assert isinstance(loaded.model, HuggingFaceModel)
    loss, count = losses_of(model, tokenizer, lines)
    for found in (
        minilm.evaluate(tmp_path / "gpt2", lines),
        minilm.evaluate(model, lines, tokenizer=tokenizer, batch_rows=5),
    ):
        assert found.loss == pytest.approx(loss, rel=1e-5) and found.scores.num_tokens == count
        assert found.bits_per_byte is not None


def test_a_model_with_its_own_code_is_loaded_when_it_is_trusted(made, tmp_path):
    from zoo_models import tiny

    model = tiny("no_ffn", vocab_size=made.tokenizer.num_tokens)
    folder = export_folder(model, tmp_path / "own", tokenizer=made.tokenizer)
    with pytest.raises(ConfigError, match="trust-remote-code"):
        open_model(folder)
    loaded = open_model(folder, trust_remote_code=True)
    ours = minilm.evaluate(model, made.texts[:10], tokenizer=made.tokenizer, sequence_length=64)
    theirs = minilm.evaluate(loaded.model, made.texts[:10], tokenizer=loaded.tokenizer, sequence_length=64)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5)


def test_folders_that_cannot_be_scored_are_refused(made, tmp_path):
    llama = to_hf(made.model)
    llama.save_pretrained(tmp_path / "folder")
    state = {k: v for k, v in llama.state_dict().items() if "layers.0.mlp.up" not in k}
    llama.save_pretrained(tmp_path / "torn", state_dict=state)
    with pytest.raises(CheckpointError, match="missing keys"):
        open_model(tmp_path / "torn")
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*no average.*no knowledge store"):
        open_model(tmp_path / "folder", weights="ema", knowledge="somewhere")
    assert open_model(tmp_path / "folder").tokenizer is None
    (tmp_path / "folder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_model(tmp_path / "folder")
