"""Scores of small models on a store, on texts and on batches, by as many processes as it is started with.

    evaluation_worker.py STORE TEXTS.json OUT.json

Written to OUT.json by the first process: {model and data: everything that was found}; OUT.json.RANK has each loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from zoo_models import tiny

import minilm
from minilm.data.loader import validation_batches
from minilm.data.rows import Rows
from minilm.data.store import Store
from minilm.evaluation.heldout import TextList
from minilm.evaluation.overlap import overlap_with

MODELS, LENGTH = ("original", "knowledge"), 24


def everything(store: Store, texts: list[str], rank: int, world: int, batch_rows: int = 3) -> dict[str, Any]:
    """What one of `world` processes finds."""
    found: dict[str, Any] = {}
    tokenizer = store.tokenizer()
    assert tokenizer is not None
    options = {"tokenizer": tokenizer, "sequence_length": LENGTH, "batch_rows": batch_rows}
    for name in MODELS:
        model = tiny(name, vocab_size=tokenizer.num_tokens)
        batches = list(
            validation_batches(Rows(store, "validation", LENGTH), batch_rows, rank, world)
        ) or validation_batches(Rows(store, "validation", LENGTH), batch_rows)
        for what, data in (("store", str(store.path)), ("texts", texts), ("batches", batches)):
            scored = minilm.evaluate(model, data, **options)
            found[f"{name} {what}"] = scored.as_dict()
    shared = overlap_with(TextList(texts, tokenizer, LENGTH), store)
    found["overlap"] = {"words": shared.words.tolist(), "covered": shared.covered.tolist()}
    return found


def main() -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    store, texts, out = Store.open(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    found = everything(store, texts, state.process_index, state.num_processes)
    if state.is_main_process:
        out.write_text(json.dumps(found))
    Path(f"{out}.{state.process_index}").write_text(
        json.dumps({k: v["scores"]["loss"] for k, v in found.items() if "scores" in v})
    )
    state.destroy_process_group()


if __name__ == "__main__":
    main()
