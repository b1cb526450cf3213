"""`minilm export` as a user calls it: what is in the folder, what README.md says, errors as paragraphs."""

from __future__ import annotations

import json
import re

import pytest
import torch
from evaluation_checkpoint import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo_models import tiny

from minilm.__main__ import main
from minilm.data.tokenizer import Tokenizer
from minilm.export import export
from minilm.initial import open_source
from minilm.models import folder as model_folder
from minilm.track.metrics import encode


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("export"))


@pytest.fixture
def call(made, capsys):
    def run(*flags):
        code = main(["export", "--checkpoint", str(made.run_folder), *map(str, flags)])
        shown = capsys.readouterr()
        return code, shown.out, " ".join(shown.err.split())

    return run


def logged(made, kind, step, **values):
    with (made.run_folder / "metrics.jsonl").open("ab") as file:
        file.write(encode(kind, step, 0.0, values))


def test_original_is_a_llama_with_its_tokenizer(made, call, tmp_path):
    code, out, _ = call("--out", tmp_path / "out")
    assert code == 0 and "read again: the logits are those of the checkpoint" in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    text = "the cat 中 <|eos"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == made.tokenizer.prompt(text)  # begins as in training: with BOS
    assert tokenizer("a", "b")["input_ids"] == [*made.tokenizer.prompt("a"), *made.tokenizer.encode("b")]
    assert tokenizer.model_max_length == made.model.config.max_length
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, made.model(ids).logits, atol=1e-5, rtol=1e-6)
    ours = made.tokenizer
    wanted = (ours.bos_id, ours.eos_id, ours.pad_id)
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == wanted
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == made.model.config.rope_theta
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_an_export_comes_back_as_it_was(made, call, tmp_path):
    """From the folder a run can begin: weights bit for bit, and the same tokenizer."""
    call("--out", tmp_path / "out")
    source = open_source(str(tmp_path / "out"))
    assert source.tokenizer.fingerprint == made.tokenizer.fingerprint
    for (name, p), q in zip(made.model.named_parameters(), source.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_another_model_comes_with_its_code_and_the_tokenizer_asks_for_no_trust(made, tmp_path, monkeypatch):
    model = tiny("moe", vocab_size=made.tokenizer.num_tokens)
    kept = {path: path.read_bytes() for path in made.checkpoint.glob("model.*")}
    model_folder.save(model, made.checkpoint)
    try:
        folder = export(made.run_folder, tmp_path / "out", dtype="bfloat16")
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    assert Tokenizer.load(folder).fingerprint == made.tokenizer.fingerprint
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_minilm.MiniLMForCausalLM"
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", made.tokenizer.eos_id)
    page = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in page and "- custom_code" in page
    assert f"| parameters active for a token | {model.config.active_parameters():,} |" in page


def test_the_page_says_what_is_known_and_nothing_else(made, call, tmp_path):
    record = made.checkpoint / "trainer.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "total_tokens": 12345}))
    call("--out", tmp_path / "before")
    bare = (tmp_path / "before" / "README.md").read_text()
    assert "loss" not in bare and "| training tokens | 12,345 |" in bare
    assert f"`{made.store.fingerprint}`" in bare and f"`{made.tokenizer.fingerprint}`" in bare
    assert f"{made.model.config.num_parameters():,}" in bare and "| optimizer steps | 7 |" in bare
    logged(made, "train", 6, loss=3.0, step_tokens=100)
    logged(made, "train", 7, loss=2.0, step_tokens=300)
    logged(made, "train", 8, loss=99.0, step_tokens=300)  # after the checkpoint
    logged(made, "validation", 5, loss=2.75, ema_loss=2.5)
    logged(made, "validation", 9, loss=99.0)
    call("--out", tmp_path / "after")
    page = (tmp_path / "after" / "README.md").read_text()
    assert "| training loss, last 2 steps | 2.2500 nats per token |" in page  # by tokens, not by steps
    assert "| validation loss, step 5 | 2.7500 nats per token |" in page and "99" not in page
    assert re.search(r"^---\nlibrary_name: transformers\n(.+\n)+---\n", page)
    (made.run_folder / "metrics.jsonl").unlink()


def test_wrong_use_is_a_paragraph(made, call, tmp_path):
    (tmp_path / "there").mkdir()
    code, _, err = call("--out", tmp_path / "there")
    assert code == 2 and "exists. An export overwrites nothing" in err
    assert main(["export", "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    (tmp_path / "file").write_text("")
    code, _, err = call("--out", tmp_path / "file" / "out")
    assert code == 2 and "could not be written" in err
    with pytest.raises(SystemExit):
        call("--out", tmp_path / "out", "--format", "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}
