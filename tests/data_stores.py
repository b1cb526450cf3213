"""Small corpora, tokenizers and stores for the tests of the data part."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import numpy as np

from minilm.data import store as stores
from minilm.data.output import Output
from minilm.data.store import Store
from minilm.data.tokenizer import Tokenizer

_TEXT = "the cat sat on a mat while 42 dogs ate naïve 中文 字符 soup 🙂 and def foo(self): return x_1"
WORDS = _TEXT.split()


def texts(number: int, *, seed: int = 0, longest: int = 60) -> list[str]:
    """Different texts of a few to some dozen words."""
    draw = random.Random(seed)
    return [f"{n} " + " ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for n in range(number)]


@functools.cache
def small_tokenizer(vocab_size: int = 400) -> Tokenizer:
    return Tokenizer.train(texts(200), vocab_size)


def write_jsonl(path: Path, lines: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: line}) + "\n" for line in lines), encoding="utf-8")
    return path


def random_documents(
    number: int, *, vocab_size: int = 50, longest: int = 30, seed: int = 0
) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(1, vocab_size, draw.integers(1, longest + 1)).tolist() for _ in range(number)]


def store_of(
    folder: Path,
    train: dict[str, list[list[int]]],
    *,
    validation: dict[str, list[list[int]]] | None = None,
    vocab_size: int = 50,
    weights: dict[str, float] | None = None,
) -> Store:
    """A store with these very token ids, written without the build: sources -> documents -> ids."""
    splits = {"train": train, "validation": validation or {}}
    names = sorted({name for of_split in splits.values() for name in of_split})
    folder.mkdir(parents=True)
    manifest = {
        "format": stores.FORMAT,
        "version": stores.VERSION,
        "vocab_size": vocab_size,
        "pad_id": 0,
        "tokenizer": None,
        "synthetic": None,
        "sources": {name: {"weight": (weights or {}).get(name, 1.0)} for name in names},
        "splits": {},
    }
    with Output(folder, names, vocab_size, {}) as output:
        for split, sources in splits.items():
            of_sources = {}
            for name in names:
                documents = sources.get(name, [])
                if documents:
                    lengths = [len(d) for d in documents]
                    where = [f"{name} {n}" for n in range(len(documents))]
                    output.write(split, name, np.concatenate(documents), lengths, where)
                of_sources[name] = {"documents": len(documents), **output.description(split, name)}
            total = sum(c["documents"] for c in of_sources.values())
            manifest["splits"][split] = {"documents": total, "sources": of_sources}
        output.sync()
    for file in stores.files_of(manifest):
        file["blake2b"] = stores.checksum(folder / file["path"])
    manifest["fingerprint"] = stores.content_fingerprint(manifest)
    (folder / stores.MANIFEST).write_text(json.dumps(manifest))
    return Store.open(folder)
