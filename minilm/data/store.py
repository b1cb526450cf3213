"""A store: documents as token ids on disk, memory-mapped, with a manifest that says what they are.

    STORE/manifest.json                       what is inside: counts, checksums, tokenizer, settings
    STORE/tokenizer/                          the tokenizer that made it (absent where the source gives token ids)
    STORE/train/NAME.tokens.bin               token ids of the documents of source NAME, end to end
    STORE/train/NAME.offsets.bin              uint64 [documents + 1]: where each document begins; the last is the end
    STORE/train/NAME.entries.bin              int32 for each token: from which entry of a knowledge source it can be
                                              known, or -1; only where the source has such labels (see labels.py)
    STORE/validation/...

Ids are stored in the smallest unsigned type that holds the whole vocabulary, never narrower: an id that does
not fit would come back as another token, and the loss would still fall. The manifest is written last, and the
folder gets its name only then, so a folder with this name is a whole store (see build.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilm.data.mapped import MappedFile
from minilm.data.tokenizer import Tokenizer
from minilm.errors import DataError, listed

FORMAT, VERSION = "minilm store", 1
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"

# Reading 1 GiB for its checksum takes about a second: below that every opening does it, and so a flipped bit
# never trains a model. Above it the build's own final check and the sizes must do; `minilm data info --verify`.
VERIFY_UP_TO_BYTES = 2**30


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type for ids 0 .. vocab_size - 1. Raises DataError where there is none."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if 1 <= vocab_size <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype).newbyteorder("<")
    raise DataError(f"A vocabulary of {vocab_size} tokens cannot be stored: 1 to {2**32} are possible.")


def checked_ids(ids: np.ndarray, vocab_size: int, where: Callable[[int], str]) -> np.ndarray:
    """`ids` in the store's type; DataError naming the first id outside the vocabulary and `where(index)` it is."""
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"Token id {int(ids[index])} {where(index)} is outside the vocabulary 0 .. {vocab_size - 1}. "
            "Data and vocabulary do not belong together."
        )
    return ids.astype(smallest_dtype(vocab_size))


def checksum(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """blake2b of a file (as fast as the disk, and in the standard library)."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if advance:
                advance(len(block))
    return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """The documents of one source in one split."""

    source: str
    tokens: np.ndarray  # [num_tokens] of the store's type, memory-mapped
    offsets: np.ndarray  # [num_documents + 1] uint64, memory-mapped
    weight: float  # passes over this source per epoch
    files: tuple[MappedFile, ...] = ()  # that these arrays lie in
    entries: np.ndarray | None = (
        None  # [num_tokens] int32, memory-mapped; None where the source has no labels
    )

    def check(self) -> None:
        """DataError if a file was cut off or altered since it was opened; for readers, before and after they read."""
        for file in self.files:
            file.check()

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Tokens that can be predicted: all but the first of each document."""
        return self.num_tokens - self.num_documents

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document. Raises IndexError."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.source}")
        self.check()
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]


class Store:
    """A store opened for reading. Safe to share between threads; opening holds no more than file handles."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.pad_id: int = manifest["pad_id"]
        self.fingerprint: str = manifest["fingerprint"]
        self.dtype = smallest_dtype(self.vocab_size)
        self._shards = {split: self._open_split(split) for split in SPLITS}

    @classmethod
    def open(
        cls, path: str | Path, tokenizer: Tokenizer | None = None, *, verify: bool | None = None
    ) -> Store:
        """Open a store; every defect found is in one DataError.

        tokenizer  refuse the store if another one made it
        verify     compare checksums of all files (True), only their sizes (False); by default checksums for
                   stores up to 1 GiB
        """
        path = Path(path)
        manifest = read_manifest(path)
        problems = []
        total = 0
        for file in files_of(manifest):
            actual = (path / file["path"]).stat().st_size if (path / file["path"]).is_file() else None
            if actual is None:
                problems.append(f"{file['path']} is missing")
            elif actual != file["size_bytes"]:
                problems.append(f"{file['path']} has {actual} bytes, but {file['size_bytes']} were written")
            total += file["size_bytes"]
        if not problems and (total <= VERIFY_UP_TO_BYTES if verify is None else verify):
            problems = [
                f"{file['path']} was altered after it was written (its checksum differs)"
                for file in files_of(manifest)
                if checksum(path / file["path"]) != file["blake2b"]
            ]
        if problems:
            raise DataError(
                f"The store {path} is damaged: {listed(problems)}\nBuild it again (`minilm data build --force`) or "
                "copy it again."
            )
        store = cls(path, manifest)
        if tokenizer is not None:
            store.require_tokenizer(tokenizer)
        return store

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """DataError unless this very tokenizer made the store."""
        made = self.manifest["tokenizer"]
        if made is None:
            raise DataError(
                f"The store {self.path} has token ids without a tokenizer (a synthetic source), but the tokenizer "
                f"{tokenizer.name} was given. Train without a tokenizer, or build a store from text."
            )
        if made["fingerprint"] != tokenizer.fingerprint:
            raise DataError(
                f"The store {self.path} was built with another tokenizer ({made['name']}, {made['num_tokens']} tokens, "
                f"fingerprint {made['fingerprint'][:8]}) than {tokenizer.name} ({tokenizer.num_tokens} tokens, "
                f"fingerprint {tokenizer.fingerprint[:8]}): the same ids would mean other texts. Use "
                f"{self.path / 'tokenizer'}, or build the store again."
            )

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the store; None for a store of token ids without text."""
        if self.manifest["tokenizer"] is None:
            return None
        tokenizer = Tokenizer.load(self.path / "tokenizer")
        self.require_tokenizer(tokenizer)
        return tokenizer

    def shards(self, split: str) -> list[Shard]:
        """The non-empty sources of a split. Raises DataError for an unknown or empty split."""
        if split not in SPLITS:
            raise DataError(f"There is no split {split!r}: {' and '.join(SPLITS)} exist.")
        if not self._shards[split]:
            raise DataError(
                f"The store {self.path} has no {split} documents. Build it with a validation fraction "
                "(`--validation-fraction 0.01`) or validation sources (`--validation-source`)."
                if split == "validation"
                else f"The store {self.path} has no training documents: it can only serve as a validation store."
            )
        return self._shards[split]

    @property
    def entropy(self) -> dict[str, Any] | None:
        """Of a synthetic source: its entropy rate in nats per token (`rate_nats`), the floor of any loss; or None."""
        return self.manifest["synthetic"]

    @property
    def entries_of(self) -> str | None:
        """sha256 of the knowledge source whose rows the labels name; None where it was not said."""
        named = self.manifest.get("entries_of")
        return None if named is None else str(named["sha256"])

    def _open_split(self, split: str) -> list[Shard]:
        shards = []
        for name, counts in self.manifest["splits"][split]["sources"].items():
            if counts["documents"] == 0:
                continue
            kinds = {"tokens_file": self.dtype, "offsets_file": "<u8", "entries_file": "<i4"}
            files = tuple(
                MappedFile(
                    self.path / file["path"], dtype, size_bytes=file["size_bytes"], blake2b=file["blake2b"]
                )
                for file, dtype in ((counts[kind], dtype) for kind, dtype in kinds.items() if kind in counts)
            )
            tokens, offsets, *labels = (file.array for file in files)
            if (
                len(offsets) != counts["documents"] + 1
                or int(offsets[-1]) != len(tokens)
                or int(offsets[0]) != 0
                or any(len(entries) != len(tokens) for entries in labels)
            ):
                raise DataError(
                    f"The store {self.path} contradicts itself: offsets, tokens and labels of {name} do not fit."
                )
            weight = self.manifest["sources"][name]["weight"]
            shards.append(Shard(name, tokens, offsets, weight, files, labels[0] if labels else None))
        return shards


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The files that the manifest vouches for: `path`, `size_bytes`, `blake2b` of each."""
    of_splits = [
        counts[kind]
        for split in SPLITS
        for counts in manifest["splits"][split]["sources"].values()
        for kind in ("tokens_file", "offsets_file", "entries_file")
        if counts["documents"] and kind in counts
    ]
    return of_splits


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """A hash of what would be trained on: equal for equal contents, wherever and whenever they were built."""
    tokenizer = manifest["tokenizer"]
    content = {
        "format": [manifest["format"], manifest["version"]],
        "tokenizer": None if tokenizer is None else tokenizer["fingerprint"],
        "vocabulary": [manifest["vocab_size"], manifest["pad_id"]],
        "splits": manifest["splits"],
        "weights": {name: source["weight"] for name, source in manifest["sources"].items()},
        "synthetic": manifest["synthetic"],
    }
    if "entries_of" in manifest:
        content["entries_of"] = manifest["entries_of"]["sha256"]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store folder, checked against its own fingerprint. Raises DataError."""
    file = path / MANIFEST
    if not file.is_file():
        building = path.with_name(path.name + ".building")
        if building.exists():
            hint = f"Its build was interrupted ({building} is there): run the same `minilm data build` again to go on."
        elif path.exists():
            hint = f"{path} exists, but has no {MANIFEST}."
        else:
            hint = "Make it with `minilm data build`."
        raise DataError(f"There is no store {path}. {hint}")
    try:
        manifest = json.loads(file.read_bytes())
        if manifest.get("format") != FORMAT:
            raise DataError(f"{file} is not the manifest of a store.")
        if manifest["version"] != VERSION:
            raise DataError(
                f"The store {path} has format version {manifest['version']}, this minilm reads {VERSION}: build "
                "it again."
            )
        intact = content_fingerprint(manifest) == manifest["fingerprint"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {error}): build the store again."
        ) from error
    if not intact:
        raise DataError(f"{file} was altered after it was written: build the store again.")
    return manifest
