"""Tokenizers: nothing is lost, nothing is injected, bytes are counted right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from data_stores import small_tokenizer, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minilm.data.tokenizer import SMALLEST_VOCABULARY, SPECIAL, Tokenizer
from minilm.errors import ConfigError, DataError

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
awkward_text = st.lists(
    st.sampled_from(
        [
            *SPECIAL,
            "<|",
            "eos|>",
            "</s>",
            "中文",
            "字",
            "🙂",
            "👩‍👩‍👧‍👦",
            "e\u0301",
            "\x00",
            "\x7f",
            "\r\n",
            "  ",
            "\t",
            "don't",
            "12345",
        ]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.one_of(any_text, awkward_text))
def test_round_trip_is_lossless_on_any_utf8(text: str) -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.special_ids.isdisjoint(ids)


@settings(max_examples=200, deadline=None)
@given(st.one_of(any_text, awkward_text))
def test_bytes_of_tokens_add_up_to_bytes_of_text(text: str) -> None:
    """The bug bpb-bytes-wrong: tokens that are parts of characters, counted as U+FFFD."""
    tokenizer = small_tokenizer()
    assert int(tokenizer.byte_lengths[tokenizer.encode(text)].sum()) == len(text.encode())


def test_byte_lengths_of_partial_characters_and_special_tokens() -> None:
    tokenizer = small_tokenizer()
    assert [float(tokenizer.byte_lengths[i]) for i in (0, 1, 2)] == [0, 0, 0]
    assert [tokenizer.token_bytes(i) for i in (0, 1, 2)] == [b"", b"", b""]
    ids = tokenizer.encode("龘")  # not in the training text: three tokens of one byte
    assert [tokenizer.token_bytes(i) for i in ids] == [bytes([b]) for b in "龘".encode()]


def test_lone_surrogates_are_refused_with_their_place() -> None:
    for call in (
        small_tokenizer().encode,
        small_tokenizer().document,
        lambda t: small_tokenizer().encode_batch([t]),
    ):
        with pytest.raises(DataError, match=r"lone surrogate \(U\+D800\) at character 2"):
            call("ab\ud800c")


def test_text_that_spells_a_special_token_cannot_inject_it() -> None:
    tokenizer = small_tokenizer()
    for text in ("<|eos|>", "a<|pad|>b", "<|bos|><|eos|>"):
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode_batch([text])[0])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_document_is_bos_text_eos_once_each() -> None:
    """The bugs eos-not-added, bos-missing-eval and bos-double."""
    tokenizer = small_tokenizer()
    assert tokenizer.document("the cat") == [1, *tokenizer.encode("the cat"), 2]
    assert tokenizer.prompt("the cat") == tokenizer.document("the cat")[:-1]
    assert tokenizer.document("the <|eos|>").count(2) == 1


def test_encode_batch_equals_encode() -> None:
    tokenizer, lines = small_tokenizer(), texts(50, seed=3)
    assert tokenizer.encode_batch(lines) == [tokenizer.encode(line) for line in lines]


def test_training_gives_fixed_special_ids_and_the_same_tokenizer_in_any_order() -> None:
    lines = texts(100)
    one, other = Tokenizer.train(lines, 310), Tokenizer.train(reversed(lines), 310)
    assert one.fingerprint == other.fingerprint
    assert (one.pad_id, one.bos_id, one.eos_id, one.num_tokens) == (0, 1, 2, 310)
    assert one.fingerprint != Tokenizer.train(lines, 309).fingerprint


def test_training_refuses_too_small_a_vocabulary_and_no_text() -> None:
    with pytest.raises(ConfigError, match=f"{SMALLEST_VOCABULARY} are needed"):
        Tokenizer.train(["a"], SMALLEST_VOCABULARY - 1)
    with pytest.raises(DataError, match="empty"):
        Tokenizer.train([], 300)


def test_the_saved_folder_is_read_by_autotokenizer_and_by_us(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    for text in texts(20, seed=5):
        assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)


def test_chinese_and_digits_are_cut_sensibly() -> None:
    tokenizer = Tokenizer.train(["中文字符 model模型 123456 x_1"] * 20, 345)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(" model模型 123456")]
    assert pieces == [" model", "模型", " ", "123", "456"]


# --- tokenizers of others


def gpt2_like(folder: Path, **names: str) -> Tokenizer:
    """Byte-level, with <|endoftext|> as its only special token, as GPT-2 has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: n for n, c in enumerate([*alphabet, "th", "the", "Ġthe", "<|endoftext|>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("Ġ", "the")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = names or {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return Tokenizer.load(folder)


def llama_like(folder: Path, *, prefix: bool, unigram: bool = False) -> Tokenizer:
    """SentencePiece's way: ▁ for a space, bytes as <0x..> where there is no piece, perhaps a space put before."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyz",
        "th",
    ]
    vocabulary = {piece: n for n, piece in enumerate(pieces)}
    if unigram:
        model = models.Unigram([(p, -1.0) for p in pieces], unk_id=0, byte_fallback=True)
    else:
        model = models.BPE(vocabulary, [("t", "h")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    hf.save_pretrained(folder)
    return Tokenizer.load(folder)


def test_gpt2_like_tokenizer_where_bos_is_eos_and_pad_is_missing(tmp_path: Path) -> None:
    """The bug eos-masked-pad-eq-eos begins with such a tokenizer; BOS = EOS would end a document before it begins."""
    tokenizer = gpt2_like(tmp_path)
    assert tokenizer.bos_id is None
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.num_tokens - 1
    text = "the <|endoftext|> 中"
    assert tokenizer.document(text) == [*tokenizer.encode(text), tokenizer.eos_id]
    assert tokenizer.document(text).count(tokenizer.eos_id) == 1
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert int(tokenizer.byte_lengths[tokenizer.encode(text)].sum()) == len(text.encode())


def test_byte_fallback_tokenizer_without_prefix_counts_bytes(tmp_path: Path) -> None:
    tokenizer = llama_like(tmp_path, prefix=False)
    text = " the 中\n</s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert int(tokenizer.byte_lengths[tokenizer.encode(text)].sum()) == len(text.encode())
    assert tokenizer.document("a")[0] == 1 and tokenizer.document("a")[-1] == 2


def test_a_tokenizer_that_adds_a_space_refuses_bits_per_byte_but_encodes(tmp_path: Path) -> None:
    tokenizer = llama_like(tmp_path, prefix=True)
    assert tokenizer.decode(tokenizer.encode("the 中")) == "the 中"
    with pytest.raises(DataError, match="Bits per byte cannot be given"):
        _ = tokenizer.byte_lengths


def test_a_model_whose_pieces_include_special_tokens_refuses_the_text(tmp_path: Path) -> None:
    tokenizer = llama_like(tmp_path, prefix=False, unigram=True)
    assert tokenizer.encode("abc")
    with pytest.raises(DataError, match=r"spells the special token '</s>' at character 1"):
        tokenizer.encode("a</s>")
    with pytest.raises(DataError, match="spells the special token"):
        tokenizer.encode_batch(["abc", "a</s>"])


def test_a_saved_truncation_does_not_cut_documents(tmp_path: Path) -> None:
    """The bug truncation-silent: tokenizer.json may carry the maximum length of someone's fine-tuning."""
    small_tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>",
    }  # fmt: skip
    file.write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the cat sat on a mat") == small_tokenizer().encode("the cat sat on a mat")
    assert tokenizer.fingerprint == small_tokenizer().fingerprint


def test_missing_and_unsuitable_tokenizers_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer folder .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"no tokenizer\.json, but config\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        gpt2_like(tmp_path / "no_eos", unk_token="<|endoftext|>")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "broken")
