"""`original` as model.gguf for llama.cpp, with its tokenizer.

Two things make a file that loads and talks nonsense. llama.cpp rotates neighbouring numbers of a head, our weights
(and Hugging Face's) its two halves: the rows of queries and keys are put in its order. And llama.cpp cuts text into
pieces by a rule of its own, chosen by name: the rule that cuts as the tokenizer does is found by trying, and where none
cuts every kind of text alike, README.md says which kinds come out as other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from minilm.errors import CheckpointError, ConfigError, listed
from minilm.export.card import card
from minilm.export.folder import aside, converted

if TYPE_CHECKING:
    from minilm.data.tokenizer import Tokenizer

FILE = "model.gguf"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name of the rule in llama.cpp -> (how it cuts; None is GPT-2's way, does a piece that is a token skip the merges).
RULES: dict[str, tuple[str | None, bool]] = {
    "smaug-bpe": (_LLAMA3, False),
    "llama-bpe": (_LLAMA3, True),
    "qwen2": (_LLAMA3.replace("{1,3}", ""), False),
    "gpt-2": (None, False),
}
# A rule that cuts these otherwise is the wrong one; the other kinds are rarer, and told about.
_PLAIN = {
    "English": "The cat's 12 mats aren't here, she'll say;  twice!\n\nIt costs 1,234.50 or 100000.\n",
    "code": "def f(x_1):\n    return {'a': [x_1 ** 2, 0xFF]}  # why?\n\tpass\n",
    "Western European letters": "Über naïve cafés à São Paulo – “très bien”",
}
_KINDS = {
    **_PLAIN,
    "Chinese": "中文字符，句号。第12章",
    "Chinese beside Latin letters": "用Python写的GPT模型",
    "contractions with a curved apostrophe": "it’s we’ll DON’T",
    "combining marks (decomposed accents)": "cafe\u0301 nai\u0308ve a\u0301e\u0301",
    "Indic scripts": "नमस्ते दुनिया হ্যালো",
    "Arabic and Hebrew": "مرحبا بالعالم שלום עולם",
    "Cyrillic and Greek": "Привет, мир! Γειά σου Κόσμε",
    "Japanese and Korean": "こんにちは世界 カタカナ 안녕하세요",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 ok 👍🏽",
}


def export_gguf(
    model: nn.Module,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None,
    facts: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `out`/model.gguf and README.md; returns the new folder `out`.

    dtype  float32 or bfloat16, of the matrices; norms are float32 in any case

    Raises ConfigError if `out` exists, the package gguf is missing, or the model or tokenizer cannot be written so;
    CheckpointError if the file, read again, does not hold the model's numbers or cannot be written.
    """
    _refuse(model, tokenizer)
    assert tokenizer is not None
    rule, unlike = cutting_rule(tokenizer)
    model = converted(model, dtype)
    with aside(Path(out)) as folder:
        path = folder / FILE
        _write(path, model, tokenizer, rule, dtype)
        _verify(path, model)
        name = str(dtype).removeprefix("torch.")
        told = dict(facts or {}) | {"text is cut by llama.cpp's rule": f"`{rule}`"}
        if unlike:
            told["cut into other tokens than in training"] = "; ".join(unlike)
        text = card(model.config, told, own_code=False, dtype=name, files="gguf")
        (folder / "README.md").write_text(text, encoding="utf-8")
    return Path(out)


def cutting_rule(tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """The name of llama.cpp's rule that cuts most like this tokenizer, and the kinds of text that it cuts otherwise.

    Raises ConfigError where plain text comes out as other tokens under every rule.
    """
    unlike = {}
    for name, (pattern, skips) in RULES.items():
        theirs = _under_rule(tokenizer, pattern, skips)
        unlike[name] = [
            kind
            for kind, text in _KINDS.items()
            if theirs.encode(text, add_special_tokens=False).ids != tokenizer.encode(text)
        ]
    best = min(unlike, key=lambda name: (len(set(unlike[name]) & set(_PLAIN)), len(unlike[name])))
    plain = [kind for kind in unlike[best] if kind in _PLAIN]
    if plain:
        raise ConfigError(
            f"{tokenizer!r} cannot be written for llama.cpp: none of its rules that cut text ({', '.join(RULES)}) "
            f"gives this tokenizer's tokens for {', '.join(plain)}. Export --format hf instead."
        )
    return best, unlike[best]


def llamacpp_tensors(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights by llama.cpp's names, float32, queries and keys in its order. Tied, the head is not repeated."""
    import gguf

    from minilm.models.hf import to_hf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    tensors = {}
    for name, value in to_hf(model).state_dict().items():  # type: ignore[arg-type]
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        array = value.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_heads if name.endswith("q_proj.weight") else config.num_kv_heads
            halves = array.reshape(heads, 2, config.head_dim // 2, config.dim)
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        tensors[names.get_name(name, try_suffixes=(".weight",))] = array
    return tensors


def _refuse(model: nn.Module, tokenizer: Tokenizer | None) -> None:
    problems = []
    if model.config.name != "original":
        problems.append(
            f"llama.cpp knows no model {model.config.name!r}: only `original`, a Llama, can be a GGUF file "
            "(--format hf exports every model)"
        )
    if tokenizer is None:
        problems.append("the checkpoint has no tokenizer, and a GGUF file needs one")
    else:
        kind = json.loads(tokenizer.hf.backend_tokenizer.to_str())
        if kind["model"]["type"] != "BPE" or (kind.get("decoder") or {}).get("type") != "ByteLevel":
            problems.append(f"{tokenizer!r} is no byte-level BPE")
    try:
        import gguf  # noqa: F401
    except ImportError:
        problems.append("the package gguf is not installed: pip install 'minilm[export]'")
    if problems:
        raise ConfigError(f"This checkpoint cannot be exported as GGUF: {listed(problems)}")


def _under_rule(tokenizer: Tokenizer, pattern: str | None, skips_merges: bool) -> Any:
    """The tokenizer as llama.cpp runs it: no normaliser, pieces by its own rule, then the same merges."""
    import tokenizers
    from tokenizers import Regex, pre_tokenizers

    settings = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    settings |= {"normalizer": None, "post_processor": None}
    settings["model"]["ignore_merges"] = skips_merges
    made = tokenizers.Tokenizer.from_str(json.dumps(settings))
    made.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if pattern is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    return made


def _write(path: Path, model: nn.Module, tokenizer: Tokenizer, rule: str, dtype: torch.dtype) -> None:
    import gguf

    kinds = gguf.GGMLQuantizationType
    matrix = kinds.BF16 if dtype == torch.bfloat16 else kinds.F32
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in _numbers(model.config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    types = gguf.LlamaFileType
    writer.add_file_type(types.MOSTLY_BF16 if dtype == torch.bfloat16 else types.ALL_F32)
    writer.add_name(f"minilm {model.config.name}")
    _add_tokenizer(writer, tokenizer, rule, model.config.vocab_size)
    for name, array in llamacpp_tensors(model).items():
        kind = matrix if array.ndim > 1 else kinds.F32  # norms: llama.cpp computes with them in float32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _numbers(config: Any) -> dict[str, int | float]:
    """What llama.cpp computes with, by its keys."""
    return {
        "llama.context_length": config.max_length,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
        "llama.vocab_size": config.vocab_size,
    }


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, rule: str, vocab_size: int) -> None:
    import gguf

    backend = tokenizer.hf.backend_tokenizer
    merges = json.loads(backend.to_str())["model"]["merges"]
    names, types = [], []
    for token in range(vocab_size):
        name = backend.id_to_token(token)
        special = token in tokenizer.special_ids
        # A model may have more rows than its tokenizer has tokens.
        names.append(f"<|unused {token}|>" if name is None else name)
        kind = gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL
        types.append(gguf.TokenType.UNUSED if name is None else kind)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)  # a document begins as in training
    writer.add_add_eos_token(False)


def _verify(path: Path, model: nn.Module) -> None:
    """Read the file again and hold it against the model. Raises CheckpointError naming what differs."""
    import gguf

    reader = gguf.GGUFReader(path)
    found = {key: field.contents() for key, field in reader.fields.items()}
    wrong = [
        f"{key} is {found.get(key)}, not {value}"
        for key, value in _numbers(model.config).items()
        if key not in found or not np.isclose(found[key], value, rtol=1e-6, atol=0)
    ]
    wanted = llamacpp_tensors(model)
    read = {tensor.name: tensor for tensor in reader.tensors}
    wrong += [
        f"tensor {name} is there in one of the two only" for name in sorted(wanted.keys() ^ read.keys())
    ]
    for name in sorted(wanted.keys() & read.keys()):
        values = gguf.quants.dequantize(read[name].data, read[name].tensor_type)
        if not np.array_equal(values.reshape(wanted[name].shape), wanted[name]):
            wrong.append(f"tensor {name} has other numbers")
    if wrong:
        raise CheckpointError(f"{path} was not written as the model is: {listed(wrong)}")
