"""model.gguf: every number where llama.cpp looks for it, and the tokenizer with the rule that cuts as ours."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
import torch
from zoo_models import tiny

from minilm.data.tokenizer import Tokenizer
from minilm.errors import CheckpointError, ConfigError
from minilm.export import llamacpp
from minilm.export.folder import export_folder
from minilm.export.llamacpp import cutting_rule, export_gguf

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (pip install 'minilm[export]')")

TEXTS = [
    "The cat's 12 mats aren't here, she'll say; it costs 1,234.50 or 100000.\n",
    "def forward(self, x):\n    return {'a': [x_1 ** 2, 0xFF]}  # why?\n",
    "用Python写的GPT模型 中文字符，句号。", "it’s we’ll don’t", "Über naïve cafés à São Paulo", "नमस्ते दुनिया",
    "cafe\u0301 nai\u0308ve a\u0301e\u0301",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([text for text in TEXTS for _ in range(4)], vocab_size=600)


def model(tokenizer, **changes):
    shape = {"dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 96, "max_length": 128}
    shape |= {
        "rope_theta": 50_000.0,
        "norm_eps": 1e-5,
        "init_std": 0.15,
        "vocab_size": tokenizer.num_tokens + 5,
    }
    return tiny("original", **{**shape, **changes})


def numbers(tensor):
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def halves(rotated, heads):
    """llama.cpp's order of rows (pairs side by side) -> ours (first halves, then second), row by row."""
    size = rotated.shape[0] // heads
    order = [
        h * size + (2 * i if i < size // 2 else 2 * (i - size // 2) + 1)
        for h in range(heads)
        for i in range(size)
    ]
    return rotated[order]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_there_under_its_name_once(tokenizer, tmp_path, tied, dtype):
    ours = model(tokenizer, tie_embeddings=tied)
    reader = gguf.GGUFReader(
        export_gguf(ours, tmp_path / "out", tokenizer=tokenizer, dtype=dtype) / "model.gguf"
    )
    found = {tensor.name: tensor for tensor in reader.tensors}
    want = {"token_embd.weight": ours.embedding.weight, "output_norm.weight": ours.norm.weight}
    if not tied:
        want["output.weight"] = ours.head.weight
    for n, block in enumerate(ours.blocks):
        q, k, v = block.attention.qkv.weight.split([64, 32, 32])
        rows = {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": block.attention.out.weight}
        rows |= {"attn_norm": block.attention_norm.weight, "ffn_norm": block.ffn_norm.weight}
        rows |= {f"ffn_{part}": getattr(block.ffn, part).weight for part in ("gate", "up", "down")}
        want |= {f"blk.{n}.{name}.weight": value for name, value in rows.items()}
    assert found.keys() == want.keys()
    for name, value in want.items():
        got = numbers(found[name]).reshape(value.shape)
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
        assert torch.equal(halves(got, heads) if heads else got, value.to(dtype).float()), name
        low = dtype == torch.bfloat16 and value.dim() > 1
        assert found[name].tensor_type.name == ("BF16" if low else "F32")


def test_settings_and_tokens_are_what_llamacpp_reads(tokenizer, tmp_path):
    ours = model(tokenizer)
    reader = gguf.GGUFReader(export_gguf(ours, tmp_path / "out", tokenizer=tokenizer) / "model.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    wanted = {
        "general.architecture": "llama", "llama.context_length": 128, "llama.embedding_length": 64,
        "llama.block_count": 2, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16, "llama.rope.freq_base": 50_000.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smaug-bpe", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5, rel=1e-6)
    names, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    spare = tokenizer.num_tokens
    assert names[:spare] == [tokenizer.token_name(i) for i in range(spare)]
    assert kinds == [3] * 3 + [1] * (spare - 3) + [5] * 5 and len(names) == spare + 5
    merges = json.loads(tokenizer.hf.backend_tokenizer.to_str())["model"]["merges"]
    assert said["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_kinds_of_text_that_llamacpp_cuts_otherwise_are_told(tokenizer, tmp_path):
    """Ours keeps combining marks with their letters, and llama.cpp's rules of that kind do not."""
    rule, unlike = cutting_rule(tokenizer)
    assert rule == "smaug-bpe" and "combining marks (decomposed accents)" in unlike
    assert not {"English", "code", "Chinese beside Latin letters"} & set(unlike)
    page = (export_gguf(model(tokenizer), tmp_path / "out", tokenizer=tokenizer) / "README.md").read_text()
    assert "cut into other tokens than in training" in page and "combining marks" in page


def test_a_tokenizer_that_no_rule_cuts_like_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "RULES", {"qwen2": llamacpp.RULES["qwen2"]})  # each digit alone
    other = Tokenizer.train(["It costs 1,234.50 or 100000."] * 9 + TEXTS, vocab_size=600)
    with pytest.raises(ConfigError, match=r"none of its rules .* for English"):
        export_gguf(model(other), tmp_path / "out", tokenizer=other)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_a_gguf_file_is_refused_all_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*no model 'moe'.*no tokenizer"):
        export_gguf(tiny("moe"), tmp_path / "out", tokenizer=None)


@pytest.mark.parametrize("damage", ["a number", "a setting"])
def test_a_file_that_differs_from_the_model_is_not_written(tokenizer, tmp_path, monkeypatch, damage):
    ours = model(tokenizer)
    real = llamacpp._write

    def wrong(path, written, *rest):
        other = model(tokenizer, **({"rope_theta": 10_000.0} if damage == "a setting" else {}))
        if damage == "a number":
            with torch.no_grad():
                other.blocks[1].attention.qkv.weight[3, 3] += 1e-3
        real(path, other, *rest)

    monkeypatch.setattr(llamacpp, "_write", wrong)
    said = "freq_base is 10000" if damage == "a setting" else r"blk\.1\.attn_q\.weight has other numbers"
    with pytest.raises(CheckpointError, match=said):
        export_gguf(ours, tmp_path / "out", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_llamacpp_itself_writes_the_same_text(tokenizer, tmp_path):
    """The witness that shares no code with us. 34 MB, so it is not among the packages for tests."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
    ours = model(tokenizer)
    export_gguf(ours, tmp_path / "gguf", tokenizer=tokenizer)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(export_folder(ours, tmp_path / "hf", tokenizer=tokenizer))
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(tmp_path / "gguf" / "model.gguf"), 128, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)

    def ask(path, **body):
        request = urllib.request.Request(f"{server.listening_address}{path}", json.dumps(body).encode())
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    for text in TEXTS[:5]:
        assert ask("/tokenize", content=text, add_special=True)["tokens"] == theirs(text)["input_ids"], text
    ids = theirs("def forward(self, x):")["input_ids"]
    answer = ask("/completion", prompt=ids, n_predict=10, temperature=0, return_tokens=True, ignore_eos=True)
    text = list(ids)
    with torch.no_grad():
        for _ in range(10):
            logits = ours(torch.tensor([text])).logits[0, -1]
            logits[tokenizer.eos_id] = -torch.inf
            text.append(int(logits.argmax()))
    assert answer["tokens"] == text[len(ids) :]
