"""What the free-text experiment measures: each held-out token under a model, and what its memory did there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm.alignment import Batch, align, nll
from minilm.data.documents import MAX_DOCUMENT_BYTES, Document
from minilm.data.sources import parse_sources
from minilm.data.store import Store
from minilm.data.tokenizer import Tokenizer
from minilm.doctor.ledger import gram_table
from minilm.errors import DataError
from minilm.evaluation.mode import eval_mode, random_states_kept
from minilm.evaluation.score import windows
from minilm.knowledge.codes import window_codes
from minilm.knowledge.store import KnowledgeStore
from minilm.models.product_keys import best_cells

GRAM = 13  # tokens; the length that contamination is usually looked for with
POSITIONS = 4096  # of a batch
KINDS = {
    "all": "all tokens",
    "overlap": "13-gram stands in the documents of the entries",
    "no_overlap": "it does not",
    "entry": "the teacher found an entry",
    "no_entry": "it did not",
    "entry_no_overlap": "an entry, and no overlap",
}


@dataclass(frozen=True)
class HeldOut:
    """Documents end to end. All arrays [n]; `counted` is False for the first token of each document."""

    tokens: np.ndarray
    documents: np.ndarray  # number of the document of each token
    counted: np.ndarray
    entries: np.ndarray  # source row that the teacher found, or -1
    overlap: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """First token of each document, and the end: [documents + 1]."""
        return np.flatnonzero(np.diff(self.documents, prepend=-1, append=-1))

    def kinds(self) -> dict[str, np.ndarray]:
        """Which tokens count for each of `KINDS`."""
        found = self.entries >= 0
        masks = {
            "all": np.ones_like(found),
            "overlap": self.overlap,
            "no_overlap": ~self.overlap,
            "entry": found,
            "no_entry": ~found,
            "entry_no_overlap": found & ~self.overlap,
        }
        return {name: mask & self.counted for name, mask in masks.items()}


@dataclass
class Scored:
    """One model on all held-out tokens: nats [n], and of each memory layer what it did there."""

    nats: np.ndarray
    read: dict[int, np.ndarray] = field(default_factory=dict)  # [n] bool: the teacher's entry was read
    candidate: dict[int, np.ndarray] = field(default_factory=dict)  # it was among the candidates
    null: dict[int, np.ndarray] = field(default_factory=dict)
    gate: dict[int, np.ndarray] = field(default_factory=dict)


def held_out(data: Store, tokenizer: Tokenizer, documents: str) -> HeldOut:
    """The validation split of a store, compared with the texts of `documents`. Raises DataError without labels."""
    shards = data.shards("validation")
    if not shards or any(shard.entries is None for shard in shards):
        raise DataError(
            f"The validation split of {data.path} has no labels: make them with `minilm knowledge align`."
        )
    tokens = np.concatenate([shard.tokens.astype(np.int64) for shard in shards])
    sizes = np.concatenate([np.diff(shard.offsets.astype(np.int64)) for shard in shards])
    number = np.repeat(np.arange(len(sizes)), sizes)
    first = np.diff(number, prepend=-1) > 0
    entries = np.concatenate([shard.entries for shard in shards if shard.entries is not None])
    return HeldOut(tokens, number, ~first, entries, overlapping(tokens, number, known(tokenizer, documents)))


def known(tokenizer: Tokenizer, place: str) -> list[list[int]]:
    """The tokens of the documents that the entries are from."""
    (source,) = parse_sources([place])
    read = (one for one in source.documents(MAX_DOCUMENT_BYTES) if isinstance(one, Document))
    return [tokenizer.document(document.text) for document in read]


def overlapping(tokens: np.ndarray, numbers: np.ndarray, others: Sequence[Sequence[int]]) -> np.ndarray:
    """[n] bool: do the `GRAM` tokens that end with this one, all of its document, stand in one of the others."""
    told = np.concatenate([np.asarray(other, dtype=np.int64) for other in others])
    runs = np.repeat(np.arange(len(others)), [len(other) for other in others]) + 1
    hashes, _ = gram_table(told[None], runs[None], GRAM)
    ours, places = gram_table(tokens[None], numbers[None] + 1, GRAM)
    found = np.zeros(len(tokens), dtype=bool)
    found[places[np.isin(ours, hashes)]] = True
    return found


@torch.no_grad()
def scored(model: Any, text: HeldOut, length: int) -> Scored:
    """Every counted token once, with at least `length` / 2 tokens before it, or all that its document has."""
    result = Scored(np.zeros(len(text.tokens)))
    rows = [  # of places in the text instead of tokens
        row
        for number, (start, stop) in enumerate(zip(text.starts, text.starts[1:], strict=False))
        for row in windows(number, range(int(start), int(stop)), length, max(1, length // 2))
    ]
    at_once = max(1, POSITIONS // length)
    with random_states_kept(), eval_mode(model), _candidates_of(model) as candidates:
        for begin in range(0, len(rows), at_once):
            batch = _batch(rows[begin : begin + at_once], text.tokens)
            candidates.clear()
            logits, read = _forward(model, batch)
            assert batch.entries is not None
            counts = batch.entries >= 0
            places = batch.entries[counts].numpy()
            result.nats[places] = nll(logits, batch)[counts].double().numpy()
            wanted = torch.from_numpy(text.entries[places]).long()[:, None]
            for layer, one in read.items():
                rows_of = model.store.rows
                found = {
                    "read": (rows_of[one.slots[counts]] == wanted).any(dim=1),
                    "candidate": (rows_of[candidates[layer][counts.flatten()]] == wanted).any(dim=1),
                    "null": one.null[counts],
                    "gate": one.gates[counts].mean(dim=-1),
                }
                for name, values in found.items():
                    kept = getattr(result, name).setdefault(layer, np.zeros(len(text.tokens)))
                    kept[places] = values.double().numpy()
    return result


def _batch(rows: Sequence[Any], tokens: np.ndarray) -> Batch:
    """The place in the text travels with its token as its label: it stands where that token is predicted."""
    width = max(2, *(len(row.tokens) for row in rows))
    shape = len(rows), width
    ids, segments = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    learn, places = torch.zeros(shape, dtype=torch.bool), torch.full(shape, -1)
    for number, row in enumerate(rows):
        size = len(row.tokens)
        places[number, :size] = torch.tensor(row.tokens)
        ids[number, :size] = torch.from_numpy(tokens[row.tokens.start : row.tokens.stop])
        segments[number, :size] = 1
        learn[number, row.learn_from : size] = True
    return align(ids, segments, learn, places)


def _forward(model: Any, batch: Batch) -> tuple[Tensor, dict[int, Any]]:
    given = {"segments": batch.segments, "positions": batch.positions}
    if getattr(model, "store", None) is None:
        return model(batch.inputs, **given).logits, {}
    output, read = model.reads(batch.inputs, **given)
    return output.logits, read


class _candidates_of:
    """{layer: slots [N, candidates]} of the forward pass that was last: what the product keys found."""

    def __init__(self, model: Any) -> None:
        self.model, self.found, self.hooks = model, dict[int, Tensor](), list[Any]()

    def __enter__(self) -> dict[int, Tensor]:
        for number, block in enumerate(getattr(self.model, "blocks", ())):
            if hasattr(block, "memory"):
                self.hooks.append(block.memory.retriever.register_forward_hook(self._hook(number)))
        return self.found

    def _hook(self, number: int) -> Any:
        def hook(_module: Any, _given: Any, output: Any) -> None:
            cells = output.rows.shape[1] ** 2
            count = min(self.model.config.num_candidates, cells)
            self.found[number] = best_cells(output.rows, output.columns, count)[1]

        return hook

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


# --- stores that a model was not trained with


def exchanged(store: KnowledgeStore, seed: int = 0) -> KnowledgeStore:
    """The same codes and places, with the text of another entry in each."""
    held = (store.lengths > 0).nonzero().flatten()
    others = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))]
    ids, lengths = store.ids.clone(), store.lengths.clone()
    ids[held], lengths[held] = store.ids[others], store.lengths[others]
    return KnowledgeStore(store.description, {**store.tensors(), "ids": ids, "lengths": lengths}, store.path)


def emptied(store: KnowledgeStore) -> KnowledgeStore:
    """All slots empty: every read is the null slot."""
    tensors = {**store.tensors(), "lengths": torch.zeros_like(store.lengths)}
    return KnowledgeStore(store.description, tensors, store.path)


def lexical(
    text: HeldOut, store: KnowledgeStore, counts: Sequence[int], window: int, decay: float
) -> list[float]:
    """Share of the labelled tokens whose entry is among the nearest `counts` to the window code alone: the retriever
    before any training, if it could compare all entries."""
    table, places = store.token_codes(), np.flatnonzero(text.kinds()["entry"])
    wanted = torch.from_numpy(text.entries[places]).long()[:, None]
    tokens, segments = torch.from_numpy(text.tokens)[None], torch.from_numpy(text.documents)[None] + 1
    asked = window_codes(table, tokens, segments, window, decay)[0, places - 1]  # up to the token before
    codes, hits = store.codes.float(), np.zeros(len(counts))
    for start in range(0, len(places), 256):
        some = slice(start, start + 256)
        scores = (asked[some] @ codes.T).masked_fill_(store.lengths == 0, -torch.inf)
        same = store.rows[scores.topk(max(counts), dim=1).indices] == wanted[some]
        hits += [float(same[:, :count].any(dim=1).sum()) for count in counts]
    return (hits / max(1, len(places))).tolist()
