"""Text to token ids and back: our own byte-level BPE, or any fast Hugging Face tokenizer.

One function turns a document into tokens (`Tokenizer.document`) for training, evaluation and generation, so
none of them can begin a text differently from the others. Four things go wrong elsewhere and cannot here:

* Text that spells a special token (`<|eos|>` in a web page about language models) is encoded as the characters
  it consists of; special tokens enter only through `document` and `prompt`.
* A truncation length saved in a tokenizer folder is switched off: documents are never cut silently.
* PAD may be the same id as EOS, BOS may be missing: padding is known by its segment, never by its id.
* Bytes are counted from the bytes of each token, not by decoding it alone: a token that is a part of a character
  decodes to U+FFFD, which is 3 bytes and wrong.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm.errors import ConfigError, DataError

PAD, BOS, EOS = SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>")  # ids 0, 1, 2 in every tokenizer trained here
SMALLEST_VOCABULARY = len(SPECIAL) + 256  # all bytes: below this some text could not be written

# What BPE never merges across. As GPT-4's, with three changes: runs of Han characters are apart from letters of
# other scripts, combining marks belong to their letters (Hindi, decomposed accents), contractions in both quotes.
# Digits stand in groups of at most three. Nothing is dropped: the pieces put together are the text.
PIECES = (
    r"(?i:['’](?:s|t|re|ve|m|ll|d))"
    r"|[^\r\n\p{L}\p{N}]?(?:[\p{L}\p{M}&&[^\p{Han}]]+|\p{Han}+)"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Texts on which a tokenizer is asked whether it keeps every byte. Each has broken a real one: leading and double
# spaces, tabs and line ends, control characters, compatibility forms, decomposed accents, scripts, emoji, case.
_PROBES = (
    "a", " a", "  two  spaces ", "\ttab\nline\r\nend\n\n", "\x00\x01\x1f\x7f\x85", "ﬁ Å № Ｆｕｌｌ", "e\u0301 é",
    "中文字符，句号。", "नमस्ते عربى עברית", "👩‍👩‍👧‍👦 🏳️‍🌈", "\u00a0\u2028\u200b\ufeff",
    "CamelCASE under_score 1234567", "<|eos|></s>",
)  # fmt: skip


class Tokenizer:
    """A Hugging Face fast tokenizer with the rules above. Make one with `load` or `train`."""

    def __init__(self, hf: Any, name: str) -> None:
        import tokenizers

        self.hf = hf
        self.name = name
        if not getattr(hf, "is_fast", False):
            raise DataError(
                f"Tokenizer {name} ({type(hf).__name__}) is a slow one, without tokenizer.json. Convert it: "
                "transformers.AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(FOLDER)."
            )
        # A copy of our own: the Hugging Face object changes the settings of its backend at every call.
        self._backend = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        if hf.eos_token_id is None:
            raise DataError(
                f"Tokenizer {name} has no end-of-sequence token, so a model could not learn where documents end. "
                "Set `eos_token` in its tokenizer_config.json."
            )
        self.eos_id: int = hf.eos_token_id
        # GPT-2 calls one token BOS and EOS. It stands after documents; before them it would end nothing.
        self.bos_id: int | None = hf.bos_token_id if hf.bos_token_id != hf.eos_token_id else None
        self.pad_id: int = hf.eos_token_id if hf.pad_token_id is None else hf.pad_token_id
        self.num_tokens: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(hf.all_special_ids) | {i for i, token in added.items() if token.special}
        # With some models (Unigram) the whole piece "</s>" is an ordinary choice: such a text is refused.
        self._spelled = {
            i
            for s in self.special_ids
            for i in self._ids(str(self._backend.id_to_token(s)))
            if i in self.special_ids
        }

    @classmethod
    def load(cls, folder_or_name: str | Path) -> Tokenizer:
        """From a folder with tokenizer.json, or from the Hugging Face hub as `hf:NAME`. Raises DataError.

        The prefix keeps a mistyped folder from becoming a minute of network retries.
        """
        name = str(folder_or_name)
        is_name = name.startswith("hf:")
        path = Path(name)
        if not is_name and not path.is_dir():
            raise DataError(
                f"There is no tokenizer folder {path}. `minilm tokenizer train` makes one; a tokenizer of the "
                f"Hugging Face hub is written hf:{name}."
            )
        if not is_name and not (path / "tokenizer.json").exists():
            names = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise DataError(f"{path} is not a tokenizer folder: it has no tokenizer.json, but {names}.")
        try:
            if not is_name and _is_generic(path):
                from transformers import PreTrainedTokenizerFast

                hf = PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True)
            else:
                from transformers import AutoTokenizer

                hf = AutoTokenizer.from_pretrained(
                    name.removeprefix("hf:"),
                    local_files_only=not is_name,
                    trust_remote_code=False,  # left out, transformers asks on the terminal
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"The tokenizer {name} cannot be read: {_first_line(error)}") from error
        return cls(hf, str(folder_or_name))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 6400,
        *,
        min_frequency: int = 2,
        show_progress: bool = False,
    ) -> Tokenizer:
        """Byte-level BPE from `texts`. Smaller than `vocab_size` where the texts have no more pairs to merge.

        The same texts give the same tokenizer, in any order. Raises ConfigError, or DataError for no text.
        """
        import tokenizers
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        if vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"vocab_size is {vocab_size}, but {SMALLEST_VOCABULARY} are needed for 256 bytes and {len(SPECIAL)} "
                "special tokens: choose more."
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=show_progress,
        )
        count = 0

        def counted() -> Iterable[str]:
            nonlocal count
            for text in texts:
                _utf8(text)
                count += 1
                yield text

        backend.train_from_iterator(counted(), trainer)
        if count == 0:
            raise DataError("No text to train a tokenizer on: the corpus is empty.")
        hf = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            clean_up_tokenization_spaces=False,  # the default changes " ." to "." when decoding
        )
        return cls(hf, f"trained ({backend.get_vocab_size()} tokens)")

    def save(self, folder: str | Path) -> None:
        """A folder that `Tokenizer.load` and transformers' `AutoTokenizer.from_pretrained` read."""
        self.hf.save_pretrained(str(folder))

    # --- text -> ids

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without BOS and EOS. DataError for a lone surrogate, which UTF-8 cannot write."""
        _utf8(text)
        return self._checked(self._ids(text), text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(t) for t in texts]` on all cores (TOKENIZERS_PARALLELISM=false: on one)."""
        try:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                _utf8(text)  # names the text that is at fault
            raise
        ids = [e.ids for e in encoded]
        if self._spelled:
            for row, text in zip(ids, texts, strict=True):
                self._checked(row, text)
        return ids

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """As `encode_batch`, with the characters that each token stands for: first, and end (exclusive)."""
        for text in texts:
            _utf8(text)
        encoded = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(self._checked(e.ids, text), e.offsets) for e, text in zip(encoded, texts, strict=True)]

    def document(self, text: str) -> list[int]:
        """What the model is trained on: [BOS] + text + EOS; no BOS where the tokenizer has none."""
        return [*self.prompt(text), self.eos_id]

    def prompt(self, text: str) -> list[int]:
        """The beginning of a document, to be continued: [BOS] + text."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    # --- ids -> text

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of the ids; special tokens are left out, or written as their names with `special=True`."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def token_name(self, token: int) -> str:
        """The token as its vocabulary writes it (`<|eos|>`, `Ġthe`), for display."""
        name = self._backend.id_to_token(int(token))
        return f"<{token}>" if name is None else name

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, perhaps a part of a character; b"" for special tokens.

        Raises DataError for kinds of tokenizer whose tokens do not stand for fixed bytes (WordPiece).
        """
        return self._bytes_of_tokens[token]

    @functools.cached_property
    def byte_lengths(self) -> Tensor:
        """float32 [num_tokens]: bytes of text that each token stands for, special tokens 0.

        `byte_lengths[encode(text)].sum() == len(text.encode())` for every text; DataError where this tokenizer
        cannot promise it (it changes the text, or puts a space before it), for a wrong number of bits per byte
        looks like a right one.
        """
        lengths = torch.tensor([len(b) for b in self._bytes_of_tokens], dtype=torch.float32)
        for text in _PROBES:
            counted = float(lengths[self._ids(text)].sum())
            if counted != len(text.encode()):
                raise DataError(
                    f"Bits per byte cannot be given with tokenizer {self.name}: the tokens of {text!r} stand for "
                    f"{counted:.0f} bytes, the text has {len(text.encode())}, so it alters text before encoding it. "
                    "Use the loss per token, or a byte-level tokenizer (`minilm tokenizer train`)."
                )
        return lengths

    @functools.cached_property
    def lossless(self) -> bool:
        """Do all probe texts (scripts, spaces, control characters, emoji) come back unchanged?"""
        return all(self._backend.decode(self._ids(t), skip_special_tokens=True) == t for t in _PROBES)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a document becomes; equal after saving and loading."""
        config = json.loads(self._backend.to_str())
        decides = {key: config[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        merges = config["model"].get("merges")
        if merges:  # two spellings of the same list, depending on the version that wrote it
            decides["model"] = {
                **config["model"],
                "merges": [m.split(" ") if isinstance(m, str) else m for m in merges],
            }
        decides["special"] = [self.bos_id, self.eos_id, self.pad_id]
        return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {self.num_tokens} tokens)"

    # --- inside

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _checked(self, ids: list[int], text: str) -> list[int]:
        if self._spelled and not self._spelled.isdisjoint(ids):
            token = next(i for i in ids if i in self._spelled)
            at = text.find(str(self._backend.id_to_token(token)))
            raise DataError(
                f"The text spells the special token {self._backend.id_to_token(token)!r} at character {at}, and "
                f"tokenizer {self.name} cannot encode it as plain characters. Remove it from the text, or use a "
                "byte-level tokenizer."
            )
        return ids

    @functools.cached_property
    def _bytes_of_tokens(self) -> list[bytes]:
        config = json.loads(self._backend.to_str())
        kinds = _kinds(config.get("decoder"))
        added = self._backend.get_added_tokens_decoder()
        if "ByteLevel" in kinds:
            table = {char: byte for byte, char in _byte_characters().items()}
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            table = None
        else:
            raise DataError(
                f"The tokens of {self.name} ({config['model'].get('type')}) do not stand for fixed bytes of text, so "
                "its bytes cannot be counted or streamed. Use a byte-level tokenizer, or one with byte fallback."
            )
        found: list[bytes] = []
        for token in range(self.num_tokens):
            name = self._backend.id_to_token(token)
            if name is None or token in self.special_ids:
                found.append(b"")
            elif token in added:
                found.append(added[token].content.encode())
            elif table is not None:
                found.append(bytes(table[char] for char in name))
            elif "ByteFallback" in kinds and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
                found.append(bytes([int(name[3:5], 16)]))
            else:
                found.append(name.replace("▁", " ").encode())
        return found


def _is_generic(folder: Path) -> bool:
    """Does the folder name transformers' generic class, as those of `save` do: the one that AutoTokenizer would find?

    To import that alone takes half as long, and every run begins with it.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file() or (folder / "config.json").exists():
        return False
    config = json.loads(file.read_bytes())
    return (
        isinstance(config, dict)
        and config.get("tokenizer_class") == "TokenizersBackend"
        and "auto_map" not in config
    )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which is half "
            "of a character and cannot be written as UTF-8. Repair the text where it was made."
        ) from error


def _byte_characters() -> dict[int, str]:
    """The printable character by which byte-level tokenizers write each byte (the table of GPT-2)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def _kinds(part: dict[str, Any] | None) -> set[str]:
    """The types of a component of tokenizer.json and of those nested in it."""
    if part is None:
        return set()
    inner = [*part.get("decoders", []), *part.get("pretokenizers", []), *part.get("normalizers", [])]
    return {part["type"]}.union(*(_kinds(p) for p in inner))


def _first_line(error: Exception) -> str:
    with contextlib.suppress(IndexError):
        return str(error).strip().splitlines()[0][:300]
    return type(error).__name__
