"""What a model with a knowledge memory read for each token of a text, and whether the answer hangs on it.

The attention on an entry says what was looked at, not that it mattered. So the report comes with interventions: the
entry that was read most at the end of the prompt is taken out of the store, and another one that was not read; the
probability of the model's answer must follow the first and not the second.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError
from minilm.knowledge.store import KnowledgeStore
from minilm.knowledge.texts import Texts
from minilm.models.memory import Read


@dataclass(frozen=True)
class Entry:
    """An entry that a token read."""

    row: int  # of the source
    slot: int
    text: str
    weight: float  # share of the attention, mean over heads
    token: str  # of the entry, with the largest share


@dataclass(frozen=True)
class LayerReading:
    """What one memory layer read for one token; null and the entries' weights add up to 1."""

    layer: int
    gate: float  # how far it was let through, mean over heads
    null: float
    entries: list[Entry]


@dataclass(frozen=True)
class TokenReading:
    """A token, what the model expects after it, and what its memory layers read to say so."""

    token: str
    next_token: str
    probability: float
    generated: bool  # not of the prompt
    layers: list[LayerReading]


@dataclass(frozen=True)
class Intervention:
    """The probability of the model's next token after the prompt, before and after a change of the store."""

    what: str
    row: int
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Inspection:
    """Everything about one text. `note` says why entries are shown as decoded tokens, if they are."""

    prompt: str
    answer: str
    store: str
    note: str | None
    tokens: list[TokenReading]
    interventions: list[Intervention]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def inspect(model: nn.Module, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int = 8) -> Inspection:
    """Continue `prompt` greedily and tell what was read.

    model  in evaluation mode, with a knowledge memory; else ConfigError
    """
    store = getattr(model, "store", None)
    if store is None:
        raise ConfigError(
            f"Model {model.config.name!r} has no knowledge memory here: there is nothing to inspect."
        )
    device = model.embedding.weight.device
    ids = tokenizer.prompt(prompt)
    if not ids:
        raise ConfigError(
            "The prompt is empty, and this tokenizer has no token that begins a document: give a text."
        )
    length = len(ids)
    ids = _continued(model, ids, max_new_tokens, tokenizer.eos_id, device)
    output, reads = model.reads(torch.tensor([ids], device=device))
    probabilities = output.logits[0].float().softmax(dim=-1)  # [T, V]
    texts = Texts(store, tokenizer)
    tokens = [
        _token(t, ids, length, probabilities[t], reads, store, texts, tokenizer) for t in range(len(ids))
    ]
    return Inspection(
        prompt=prompt,
        answer=tokenizer.decode(ids[length:]),
        store=str(store.path) if store.path else "random entries",
        note=texts.note,
        tokens=tokens,
        interventions=_interventions(model, ids[:length], probabilities[length - 1], reads, texts),
    )


def _continued(
    model: nn.Module, ids: list[int], count: int, eos: int | None, device: torch.device
) -> list[int]:
    ids = list(ids)
    for _ in range(min(count, model.config.max_length - len(ids))):
        following = int(model(torch.tensor([ids], device=device)).logits[0, len(ids) - 1].argmax())
        if following == eos:
            break
        ids.append(following)
    return ids


def _token(
    t: int,
    ids: list[int],
    length: int,
    probabilities: Tensor,
    reads: dict[int, Read],
    store: KnowledgeStore,
    texts: Texts,
    tokenizer: Tokenizer,
) -> TokenReading:
    best = int(probabilities.argmax())
    layers = [
        LayerReading(
            layer=number,
            gate=float(read.gates[0, t].mean()),
            null=float(read.null[0, t]),
            entries=_entries(read, t, store, texts, tokenizer),
        )
        for number, read in sorted(reads.items())
    ]
    return TokenReading(
        token=tokenizer.decode([ids[t]], special=True),
        next_token=tokenizer.decode([best], special=True),
        probability=float(probabilities[best]),
        generated=t >= length,
        layers=layers,
    )


def _entries(read: Read, t: int, store: KnowledgeStore, texts: Texts, tokenizer: Tokenizer) -> list[Entry]:
    """The entries that token number t read, the one read most first."""
    slots = [int(slot) for slot in read.slots[0, t] if int(store.lengths[slot])]
    rows = {slot: int(store.rows[slot]) for slot in slots}
    words = texts.of(rows.values())
    places = {int(slot): place for place, slot in enumerate(read.slots[0, t])}
    found = []
    for slot in slots:
        shares = read.tokens[0, t, places[slot]]
        most = int(store.ids[slot, int(shares.argmax())])
        weight = float(read.weights[0, t, places[slot]])
        found.append(Entry(rows[slot], slot, words[rows[slot]], weight, tokenizer.decode([most])))
    return sorted(found, key=lambda entry: -entry.weight)


def _interventions(
    model: nn.Module, ids: list[int], before: Tensor, reads: dict[int, Read], texts: Texts
) -> list[Intervention]:
    """Without the entry read most at the end of the prompt, and without one that was not read."""
    store, last = model.store, len(ids) - 1
    shares: dict[int, float] = {}
    for read in reads.values():
        for slot, weight in zip(read.slots[0, last].tolist(), read.weights[0, last].tolist(), strict=True):
            if int(store.lengths[slot]):
                shares[slot] = shares.get(slot, 0.0) + weight
    if not shares:
        return []
    answer = int(before.argmax())
    read_anywhere = {slot for read in reads.values() for slot in read.slots[0].flatten().tolist()}
    unread = next((s for s in store.slots.tolist() if s not in read_anywhere), None)
    planned = [("without the entry read most", max(shares, key=lambda slot: shares[slot]))]
    planned += [("without an entry that was not read", unread)] if unread is not None else []
    found = []
    for what, slot in planned:
        after = _probabilities_without(model, ids, slot)
        row = int(store.rows[slot])
        found.append(
            Intervention(what, row, texts.of([row])[row], float(before[answer]), float(after[answer]))
        )
    return found


def _probabilities_without(model: nn.Module, ids: list[int], slot: int) -> Tensor:
    """[V] after the prompt, with a store in which this slot is empty."""
    store = model.store
    lengths = store.lengths.clone()
    lengths[slot] = 0
    model.store = KnowledgeStore(store.description, {**store.tensors(), "lengths": lengths}, store.path)
    try:
        device = model.embedding.weight.device
        return model(torch.tensor([ids], device=device)).logits[0, len(ids) - 1].float().softmax(dim=-1)
    finally:
        model.store = store
