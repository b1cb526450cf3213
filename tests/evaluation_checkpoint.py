"""A run folder with a checkpoint and a store, made without training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from evaluation_reference import tiny_model
from torch import nn

from minilm.data.build import build
from minilm.data.store import Store
from minilm.data.tokenizer import Tokenizer
from minilm.models import folder

TEXT = "the cat sat on a mat and the dog ran under café 中文 tree def return import x y z"
WORDS = TEXT.split(" ")
CONFIG = """\
data: {{store: {store}, sequence_length: 48}}
model: {{name: original, size: tiny, vocab_size: {vocab_size}}}
train: {{steps: 1000}}
"""


@dataclass
class Made:
    run_folder: Path
    checkpoint: Path
    corpus: Path
    store: Store
    tokenizer: Tokenizer
    model: nn.Module
    texts: list[str]


def make_run(root: Path) -> Made:
    texts = [
        " ".join(WORDS[(n * 7 + k * k * (n % 5 + 1)) % len(WORDS)] for k in range(4 + (n * 13) % 40))
        for n in range(60)
    ]
    corpus = root / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{n} {t}"}) + "\n" for n, t in enumerate(texts)), "utf-8")
    texts = [f"{n} {t}" for n, t in enumerate(texts)]
    tokenizer = Tokenizer.train(texts, vocab_size=290)
    build(root / "store", [str(corpus)], tokenizer, validation_fraction=0.5)
    model = tiny_model(tokenizer.num_tokens)
    checkpoint = root / "run" / "checkpoints" / "step-00000007"
    folder.save(model, checkpoint)
    tokenizer.save(checkpoint / "tokenizer")
    state = {"step": 7, "loader": {"store": Store.open(root / "store").fingerprint}}
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    (checkpoint / "files.json").write_text(json.dumps({"files": {}}))
    (root / "run" / "config.yaml").write_text(
        CONFIG.format(store=root / "store", vocab_size=tokenizer.num_tokens)
    )
    return Made(root / "run", checkpoint, corpus, Store.open(root / "store"), tokenizer, model, texts)
