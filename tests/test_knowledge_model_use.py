"""Does a knowledge model use what it reads: a small one is taught to look up, and then its entries are changed."""

from __future__ import annotations

import pytest
import torch
from knowledge_reference import SIDE, replaced

from minilm import models
from minilm.alignment import align, score
from minilm.knowledge.store import KnowledgeStore


def lookup_task():
    """Entries of two key words and a value; rows [key, key, ask, value], each asking for one entry."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.cartesian_prod(torch.arange(16), torch.arange(16, 32))  # 256 pairs
    values = torch.randint(40, 56, (256,), generator=draw)
    ids = torch.cat((keys, values[:, None]), dim=1)
    store = KnowledgeStore.assemble(
        {
            "side": SIDE, "width": 3, "code_dim": 32, "vocab_size": 64, "seed": 0, "source": None,
            "tokenizer": {"name": "none", "fingerprint": "none"},
        },
        ids=ids, lengths=torch.full((256,), 3), keys=keys.flatten(), key_starts=torch.arange(256) * 2,
        offsets=torch.zeros(256, dtype=torch.int64), classes=torch.arange(64),
    )  # fmt: skip
    return store, keys, values


def asked(keys, values, rows):
    ids = torch.cat((keys[rows], torch.full((len(rows), 1), 33), values[rows, None]), dim=1)
    entries = torch.full_like(ids, -1)
    entries[:, 3] = rows  # the label stands with the token that needs it
    learn = torch.zeros_like(ids, dtype=torch.bool)
    learn[:, 3] = True
    return align(ids, torch.ones_like(ids), learn, entries)


@pytest.fixture(scope="module")
def taught():
    store, keys, values = lookup_task()
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "store_width": 3, "num_read": 2, "memory_head_dim": 16}
    sizes |= {
        "store_code_dim": 32,
        "key_dim": 32,
        "router_dim": 32,
        "num_candidates": 64,
        "memory_layers": [1],
    }
    model = models.build(models.preset("knowledge", "tiny", retrieval_weight=1.0, **sizes))
    model.store = store
    model.initialise()  # the keys from this store
    model.train()
    draw = torch.Generator().manual_seed(1)
    known = torch.randperm(256, generator=draw)[:192]  # the other 64 are never asked for in training
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(160):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / 160)
        optimizer.zero_grad()
        batch = asked(keys, values, known[torch.randint(192, (48,), generator=draw)])
        output = model(batch.inputs, batch.segments, batch.positions, entries=batch.entries)
        loss = score(output.logits, batch).share(batch.num_targets())
        (loss + sum(output.auxiliary.values())).backward()
        optimizer.step()
    unseen = torch.tensor(sorted(set(range(256)) - set(known.tolist())))
    return model.eval(), keys, values, unseen


@torch.no_grad()
def answers(model, keys, values, rows):
    batch = asked(keys, values, rows)
    output, reads = model.reads(batch.inputs, batch.segments)
    p = output.logits[:, 2].softmax(dim=-1)
    return p, reads[1].slots[:, 2]


def test_the_answer_is_read_from_the_entry(taught):
    """M16: entries that were in the store only are found and answered from; the answer follows the entry's value."""
    model, keys, values, unseen = taught
    store = model.store
    p, slots = answers(model, keys, values, unseen)
    wanted = store.slots[unseen].long()
    hit = (slots == wanted[:, None]).any(dim=1)
    right = p.gather(1, values[unseen, None])[:, 0]
    assert float(hit.float().mean()) >= 0.95
    assert float((p.argmax(dim=-1) == values[unseen]).float().mean()) >= 0.9
    try:
        other = 40 + (values[unseen] - 40 + 5) % 16
        ids = store.ids.clone()
        ids[wanted, 2] = other.to(ids.dtype)
        model.store = replaced(store, ids=ids)
        edited, _ = answers(model, keys, values, unseen)
        assert float((edited.argmax(dim=-1) == other).float().mean()) >= 0.9

        lengths = store.lengths.clone()
        lengths[wanted] = 0
        model.store = replaced(store, lengths=lengths)
        deleted, _ = answers(model, keys, values, unseen)
        assert float(deleted.gather(1, values[unseen, None]).mean()) < 0.3 < float(right.mean())

        model.store = replaced(store, ids=store.ids.roll(1, dims=0))  # the text of another slot
        shifted, _ = answers(model, keys, values, unseen)
        assert float((shifted.argmax(dim=-1) == values[unseen]).float().mean()) < 0.3
    finally:
        model.store = store


def test_an_entry_that_is_not_read_changes_nothing(taught):
    """M16: the other side: bit for bit."""
    model, keys, values, unseen = taught
    store = model.store
    row = unseen[:1]
    base, _ = answers(model, keys, values, row)
    batch = asked(keys, values, row)
    reads = model.reads(batch.inputs, batch.segments)[1]
    read = set(reads[1].slots.flatten().tolist())
    try:
        free = torch.tensor([slot for slot in range(256) if slot not in read])
        ids = store.ids.clone()
        ids[free, 2] = 41
        model.store = replaced(store, ids=ids)
        assert torch.equal(answers(model, keys, values, row)[0], base)
    finally:
        model.store = store
    assert len(free) > 200
