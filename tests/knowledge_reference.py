"""What the tests of the knowledge model share: small models and stores, and a memory layer written a second time.

The reference knows the text of the design alone: every score of every cell, sorted, in float64; a reading in loops
over tokens, heads and entries, with each entry's tokens embedded and projected on their own.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import NamedTuple

import torch
from data_stores import WORDS, small_tokenizer
from torch import Tensor
from zoo_models import tiny

from minilm.knowledge.store import KnowledgeStore

SIDE, WIDTH, CODE = 16, 8, 16
NAMES = ("knowledge", "no_ffn_knowledge")


def model_of(name: str = "knowledge", *, seed: int = 0, std: float = 0.3, **changes):
    """The tiny size with every weight of its memory drawn: biases, gates and what starts at zero, too."""
    model = tiny(name, seed=seed, **changes)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for layer in memories(model):
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            layer.norm.weight.add_(1.0)
            layer.retriever.log_scale.add_(1.0)
        model.keys.keys.add_(torch.randn(model.keys.keys.shape, generator=generator) * std)
    return model


def exact(model, store: KnowledgeStore | None = None):
    """In float64, the table of the codes included, which a store otherwise has in float32."""
    model.store = replaced(model.store if store is None else store)
    model.store.__dict__["_token_codes"] = model.store.token_codes().double()
    return model.double()


def memories(model):
    return [model.blocks[number].memory for number in model.config.layers]


def store_of(num_entries: int | None = None, *, seed: int = 0, vocab_size: int = 256) -> KnowledgeStore:
    return KnowledgeStore.random(SIDE, WIDTH, vocab_size, num_entries, code_dim=CODE, seed=seed)


def replaced(store: KnowledgeStore, **tensors: Tensor) -> KnowledgeStore:
    """The store with other tensors in the places named, unchecked."""
    return KnowledgeStore(store.description, {**store.tensors(), **tensors})


def emptied(store: KnowledgeStore, empty: Tensor) -> KnowledgeStore:
    """The store without the entries of the slots [num_slots] bool."""
    held = ~empty
    return replaced(
        store,
        ids=store.ids * held[:, None],
        lengths=store.lengths * held,
        codes=store.codes * held[:, None],
        rows=torch.where(held, store.rows, -1),
    )


def facts_on_disk(folder: Path, number: int = 120) -> tuple[Path, Path]:
    """A store of training data whose answers name entries, and the knowledge store with these entries."""
    from minilm.data.build import build as build_data
    from minilm.knowledge.build import build as build_knowledge

    draw, names = random.Random(0), [a + b for a in WORDS[:9] for b in WORDS[9:]]
    facts = [{"subject": names[n % len(names)], "relation": WORDS[n % 4], "object": draw.choice(WORDS)}
             for n in range(number)]  # fmt: skip
    source = folder / "facts.jsonl"
    source.write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    lines = []
    for n in range(5 * number // 2):
        row = draw.randrange(number)
        before = f"{n} {' '.join(draw.choices(WORDS, k=draw.randint(0, 9)))} {' '.join(list(facts[row].values())[:2])} "
        spans = [[len(before), len(before) + len(facts[row]["object"]), row]]
        lines.append({"text": before + facts[row]["object"] + " " + draw.choice(WORDS), "entries": spans})
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tokenizer = small_tokenizer()
    build_data(folder / "data", [str(corpus)], tokenizer, validation_fraction=0.1)
    build_knowledge(source, tokenizer, folder / "knowledge", side=SIDE, width=WIDTH, code_dim=CODE, workers=1)
    return folder / "data", folder / "knowledge"


def window_code(store: KnowledgeStore, tokens: list[int], window: int, decay: float) -> Tensor:
    """[C] of the last of these tokens, which are one document up to there."""
    table = store.token_codes().double()
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    for back, token in enumerate(reversed(tokens[-window:])):
        total = total + decay**back * table[token]
    return total / max(float(total.norm()), 1e-12)


class Wanted(NamedTuple):
    """For one token: slots and biases of the m entries, best first, and the smaller gap at either border."""

    slots: list[int]
    biases: list[float]
    gap: float


def layer_normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def retrieved(layer, keys: Tensor, store: KnowledgeStore, state: Tensor, code: Tensor) -> Wanted:
    """What the retriever of a layer must find for a normed state [D] and a window code [C]."""
    own, shape = layer.retriever, layer.retriever.shape
    weight = {name: value.detach().double() for name, value in own.named_parameters()}
    state, code = state.detach().double(), code.double()
    pre = weight["hidden"] @ torch.cat((code, state))
    hidden = pre / (1 + torch.exp(-pre))
    query = weight["from_code"] @ code + weight["from_hidden"] @ hidden + weight["from_state"] @ state
    halves = [layer_normed(part) for part in query.chunk(2)]
    normed = layer_normed(keys.detach().double())
    scale = math.exp(float(weight["log_scale"][0])) / math.sqrt(shape.key_dim)
    rows, columns = (scale * normed[half] @ halves[half] for half in (0, 1))
    cells = (rows[:, None] + columns[None, :]).flatten()  # every one of them
    order = sorted(range(len(cells)), key=lambda cell: -float(cells[cell]))
    count = shape.num_candidates
    border = float(cells[order[count]])
    gap = float(cells[order[count - 1]]) - border
    second = code + weight["reread_hidden"] @ hidden + weight["reread_state"] @ state
    second = second * math.exp(float(weight["log_scale"][1]))
    scored = []
    for cell in order[:count]:
        if int(store.lengths[cell]) == 0:
            continue
        inside = math.log(-math.expm1(-max(float(cells[cell]) - border, 1e-6)))
        entry_code = store.codes[cell].double() * store.code_scale
        scored.append((float(second @ entry_code) + inside, cell))
    scored.sort(reverse=True)
    total = (
        math.log(sum(math.exp(score - scored[0][0]) for score, _ in scored)) + scored[0][0] if scored else 0.0
    )
    best = scored[: shape.num_read]
    if len(scored) > len(best):
        out = scored[len(best)][0]
        gap = min(gap, best[-1][0] - out)
        biases = [s - total + math.log(-math.expm1(-max(s - out, 1e-6))) for s, _ in best]
    else:
        biases = [s - total for s, _ in best]
    return Wanted([cell for _, cell in best], biases, gap)


def reading(model, layer, store: KnowledgeStore, state: Tensor, slots: list[int], biases: list[float]):
    """What a token adds to its stream [D], and its attention {(entry, token): mean over heads}, null at None."""
    table = model.embedding.weight.detach().double()
    state, heads, size = state.detach().double(), layer.heads, layer.head_dim
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    outputs, seen = [], {}
    for head in range(heads):
        query = p["query"][head * size : (head + 1) * size] @ state
        scores, values, names = [], [], []
        for number, (slot, bias) in enumerate(zip(slots, biases, strict=True)):
            for place in range(int(store.lengths[slot])):
                embedded = table[int(store.ids[slot, place])]
                embedded = embedded / torch.sqrt((embedded**2).mean() + model.config.norm_eps)
                key = p["key"] @ embedded + p["key_positions"][place]
                scores.append(query @ key / math.sqrt(size) + bias)
                values.append(p["value"] @ embedded + p["value_positions"][place])
                names.append((number, place))
        scores.append(query @ p["null_key"] / math.sqrt(size) + p["null_bias"][head])
        values.append(p["null_value"])
        names.append(None)
        exact = torch.stack(scores)
        shares = torch.exp(exact - exact.max())
        shares = shares / shares.sum()
        for name, share in zip(names, shares, strict=True):
            seen[name] = seen.get(name, 0.0) + float(share) / heads
        gate = 1 / (1 + torch.exp(-(p["gate"][head] @ state + p["gate_bias"][head])))
        outputs.append(gate * sum(share * value for share, value in zip(shares, values, strict=True)))
    return p["out"] @ torch.cat(outputs), seen


def normed_state(layer, x: Tensor) -> Tensor:
    x = x.double()
    return (
        x / torch.sqrt((x**2).mean(-1, keepdim=True) + layer.norm.eps) * layer.norm.weight.detach().double()
    )
