"""How a knowledge memory learns: gradients, losses, and what it must leave alone."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from knowledge_reference import (
    CODE,
    NAMES,
    SIDE,
    exact,
    layer_normed,
    memories,
    model_of,
    normed_state,
    retrieved,
)
from zoo_models import tokens

from minilm import models
from minilm.alignment import align, score
from minilm.models import retrieval
from minilm.models.memory import MemoryPlan
from minilm.models.memory_rows import codes_of, uneven
from minilm.training import optim, passing

every_name = pytest.mark.parametrize("name", NAMES)


def fresh(name="knowledge", seed=0, **changes):
    torch.manual_seed(seed)
    return models.build(models.preset(name, "tiny", **changes))


def batch_of(model, rows=8, length=25, seed=3, labelled=True):
    ids = tokens(model, rows, length, seed)
    segments = torch.ones_like(ids)
    segments[:, length // 2 :] = 2
    segments[-1, length - 6 :] = 0
    draw = torch.Generator().manual_seed(seed)
    entries = torch.randint(0, model.config.vocab_size, ids.shape, generator=draw)
    entries[torch.rand(ids.shape, generator=draw) < 0.4] = -1
    return align(ids, segments, entries=entries if labelled else None)


def backward(model, batch):
    output = model(batch.inputs, batch.segments, batch.positions, entries=batch.entries)
    loss = score(output.logits, batch)
    total = loss.share(batch.num_targets()) + sum(output.auxiliary.values())
    total.backward()
    return float(total.detach())


def train(model, steps, batches):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(backward(model, batches(step)))
        optimizer.step()
    optimizer.zero_grad()
    return losses


# ------------------------------------------------------------------ gradients


@every_name
@pytest.mark.parametrize("retrieval_weight", [0.0, 0.2])
def test_two_steps_in_every_parameter_of_the_memory_learns(name, retrieval_weight):
    """M8: from the real initialisation, whose output is zero; the router from the language model's loss alone, too."""
    model = fresh(name, retrieval_weight=retrieval_weight, index_weight=0.0).train()
    train(model, 2, lambda step: batch_of(model, seed=step))
    backward(model, batch_of(model, seed=9))
    dead = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not dead
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    alive = model.keys.keys.grad.abs().amax(dim=-1) > 0  # [2, side]
    if retrieval_weight:
        assert bool(alive.all())


def test_every_sub_key_learns_from_one_label():
    """M8: mem-dead-keys. One labelled token reaches all 2 x side keys; without the label, those it chose from."""
    model = fresh().train()
    ids = tokens(model, 1, 6)
    output = model(ids, entries=torch.tensor([[-1, -1, -1, 77, -1, -1]]))
    output.auxiliary["retrieval"].backward()
    assert bool((model.keys.keys.grad.abs().amax(dim=-1) > 0).all())


@every_name
def test_frozen_keys_stay_as_they_were_made(name):
    model = fresh(name, freeze_keys=True).train()
    before, other = model.keys.keys.clone(), memories(model)[0].retriever.from_code.clone()
    optimizer = optim.build(model, optim.OptimConfig(learning_rate=1e-2))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    train(model, 3, lambda step: batch_of(model, seed=step))
    assert id(model.keys.keys) not in held or not model.keys.keys.requires_grad
    assert torch.equal(model.keys.keys, before) and model.keys.keys.grad is None
    assert not torch.equal(memories(model)[0].retriever.from_code, other)


def small_layer(**changes):
    """A layer in float64 whose choices have room, with its plan: a grid of 4 x 4, 6 candidates, 2 entries read."""
    sizes = {"store_side": 4, "num_candidates": 6, "num_read": 2, "store_width": 3, "store_code_dim": 6}
    sizes |= {"state_gradient": 1.0, **changes}
    model = model_of(dim=8, num_heads=2, num_kv_heads=1, key_dim=6, router_dim=5, memory_head_dim=4, **sizes)
    model = exact(model)
    ids = tokens(model, 1, 4)
    config, store = model.config, model.store
    plan = MemoryPlan(
        **{
            field.name: None
            for field in dataclasses.fields(MemoryPlan)
            if field.name not in ("oracle", "record")
        }
    )
    codes = codes_of(store.token_codes(), ids, None, config.window, config.window_decay)
    table = F.rms_norm(model.embedding.weight.detach(), (8,))
    return model, dataclasses.replace(plan, store=store, keys=model.keys, embedding=table, codes=codes)


def test_the_gradient_of_a_whole_memory_layer_is_right():
    """M9: mem-topk-detached. Input, embedding, sub-keys and every weight of the layer, in float64."""
    model, plan = small_layer()
    layer = memories(model)[0]
    x = torch.randn(1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for state, code in zip(normed_state(layer, x)[0], plan.codes[0], strict=True):
        assert retrieved(layer, model.keys.keys, plan.store, state, code).gap > 1e-3  # no border is near
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(x, table, keys, *weights):
        held = copy.copy(model.keys)
        held._parameters = {"keys": keys}
        moved = dataclasses.replace(plan, embedding=table, keys=held, needed=torch.tensor([[3, -1, 15, 6]]))
        found = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, moved))
        return found.x, found.losses

    given = (x, plan.embedding, model.keys.keys.detach(), *(v.detach() for v in values))
    assert torch.autograd.gradcheck(output, [t.clone().requires_grad_() for t in given], fast_mode=True)


def test_of_the_retrieval_losses_gradient_a_share_goes_on_and_of_the_readings_all():
    """What the layers below get; the numbers themselves are the same."""
    found = {}
    for share in (1.0, 0.25, 0.0):
        model, plan = small_layer(state_gradient=share)
        x = torch.randn(
            1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        ).requires_grad_()
        out = memories(model)[0](x, dataclasses.replace(plan, needed=torch.tensor([[3, -1, 15, 6]])))
        of_losses = torch.autograd.grad(out.losses.sum(), x, retain_graph=True, allow_unused=True)[0]
        of_reading = torch.autograd.grad(out.x.square().sum(), x)[0]
        found[share] = (
            torch.zeros_like(x) if of_losses is None else of_losses,
            of_reading,
            out.losses.detach(),
        )
    whole, reading, losses = found[1.0]
    assert whole.abs().max() > 1e-3 and reading.abs().max() > 1e-3
    for share, (of_losses, of_reading, same) in found.items():
        torch.testing.assert_close(of_losses, share * whole)
        torch.testing.assert_close(of_reading, reading)
        assert torch.equal(same, losses)


def largest_jump(steps):
    """Walk from one state to another; the largest change of the output in a step, and how often a choice changed."""
    model, plan = small_layer()
    layer = memories(model)[0]
    draw = torch.Generator().manual_seed(5)
    a, b = (torch.randn(1, 1, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    along = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None, None]
    codes = plan.codes[:, -1:].expand(steps, 1, -1)
    with torch.no_grad():
        found = layer(a + along * (b - a), dataclasses.replace(plan, codes=codes, record=True))
    added = found.x - (a + along * (b - a))
    chosen = found.read.slots[:, 0].sort(dim=-1).values
    changes = int((chosen.diff(dim=0) != 0).any(dim=-1).sum())
    return float(added.diff(dim=0).abs().max() / added.std()), changes


def test_entries_come_and_go_without_a_jump(monkeypatch):
    """M9: through every tie on the way. Planted: a plain top-k, at which the output jumps."""
    coarse, _ = largest_jump(6_000)
    smooth, changes = largest_jump(24_000)
    assert changes >= 5
    assert smooth < 0.2 and smooth < coarse / 2.5  # it falls with the length of the steps: no jump is in it
    monkeypatch.setattr(retrieval, "continuous", lambda scores, count: torch.zeros_like(scores[:, :count]))
    coarse, _ = largest_jump(6_000)
    plain, _ = largest_jump(24_000)
    assert plain > 10 * smooth and plain > coarse / 1.1


# ------------------------------------------------------------------ losses


@every_name
def test_the_retrieval_loss_is_three_cross_entropies(name):
    """Row, column, and the entry among the candidates, as means over the labelled tokens and the layers.

    Half of the labels are among the candidates, where they must stand once (E14), half are not.
    """
    model = exact(model_of(name)).train()
    config, store = model.config, model.store
    batch = batch_of(model, rows=2, length=12)
    read = next(iter(model.reads(batch.inputs, batch.segments)[1].values())).slots[..., -1]
    named = (batch.entries >= 0) & (torch.arange(12 - 1) % 2 == 0)
    batch = dataclasses.replace(batch, entries=torch.where(named, store.rows[read].long(), batch.entries))
    assert named.sum() > 3
    inputs = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: inputs.append(args[0].detach()))
        for layer in memories(model)
    ]
    found = model(batch.inputs, batch.segments, entries=batch.entries).auxiliary["retrieval"].detach()
    for handle in handles:
        handle.remove()
    codes = codes_of(store.token_codes(), batch.inputs, batch.segments, config.window, config.window_decay)
    total, count = 0.0, 0
    for layer, x in zip(memories(model), inputs, strict=True):
        for row, place in (batch.entries >= 0).nonzero().tolist():
            label = int(store.slots[int(batch.entries[row, place])])
            total += naive_loss(layer, model, normed_state(layer, x)[row, place], codes[row, place], label)
            count += 1
    assert float(found) == pytest.approx(config.retrieval_weight * total / count, rel=1e-9)


def naive_loss(layer, model, state, code, label):
    own, store, shape = layer.retriever, model.store, layer.retriever.shape
    with torch.no_grad():
        hidden = F.silu(own.hidden @ torch.cat((code, state)))
        query = own.from_code @ code + own.from_hidden @ hidden + own.from_state @ state
        keys = layer_normed(model.keys.keys)
        scale = own.log_scale[0].exp() / shape.key_dim**0.5
        rows, columns = (scale * keys[h] @ layer_normed(query.chunk(2)[h]) for h in (0, 1))
        cells = (rows[:, None] + columns[None, :]).flatten()
        second = own.log_scale[1].exp() * (code + own.reread_hidden @ hidden + own.reread_state @ state)
        logits = {}
        for cell in cells.topk(shape.num_candidates).indices.tolist():
            logits[cell] = second @ store.codes[cell].double() * store.code_scale
        logits[label] = second @ store.codes[label].double() * store.code_scale
        entry = torch.logsumexp(torch.stack(list(logits.values())), 0) - logits[label]
        row_loss = torch.logsumexp(rows, 0) - rows[label // SIDE]
        column_loss = torch.logsumexp(columns, 0) - columns[label % SIDE]
    return float(row_loss + column_loss + entry)


@every_name
def test_losses_are_counted_and_cuts_do_not_show(name):
    """Names of `counted` are those of `auxiliary`; rows one by one, weighted with the counts, give the whole."""
    model = exact(model_of(name, memory_balance_weight=0.3)).train()
    batch = batch_of(model)
    whole = model(batch.inputs, batch.segments, entries=batch.entries)
    counts = model.counted(batch.segments, batch.entries)
    assert whole.auxiliary.keys() == counts.keys() == {"retrieval", "memory_balance", "index"}
    parts = dict.fromkeys(counts, 0.0)
    for row in range(len(batch.inputs)):
        one = batch.rows(row, row + 1)
        output = model(one.inputs, one.segments, entries=one.entries)
        for loss, share in model.counted(one.segments, one.entries).items():
            parts[loss] += float(share / counts[loss] * output.auxiliary[loss].detach())
    for loss, value in whole.auxiliary.items():
        assert parts[loss] == pytest.approx(float(value.detach()), rel=1e-10)
    none = torch.full_like(batch.entries, -1)
    assert model.counted(batch.segments, none)["retrieval"] == 0
    assert not model(batch.inputs, batch.segments, entries=none).auxiliary["retrieval"].any()
    silent = model_of(name, retrieval_weight=0.0, index_weight=0.0).train()
    assert not silent.counted(batch.segments, batch.entries)
    assert not silent(batch.inputs, batch.segments, entries=batch.entries).auxiliary


def drawn_in(model, ids, segments):
    """Queries that a forward pass drew, and the slots that are right."""
    plans = []
    handle = memories(model)[0].register_forward_pre_hook(lambda module, args: plans.append(args[1]))
    auxiliary = model(ids, segments).auxiliary
    handle.remove()
    return plans[0].drawn, auxiliary


def test_the_index_loss_asks_for_entries_by_their_own_codes():
    """Drawn from the document's own tokens: packed or alone, in any batch; the right row and column are the entry's."""
    model = exact(model_of(index_weight=0.7)).train()
    batch, store, layer = batch_of(model), model.store, memories(model)[0]
    (codes, slots), auxiliary = drawn_in(model, batch.inputs, batch.segments)
    assert len(slots) == int(model.counted(batch.segments)["index"]) > 30
    assert len(slots.unique()) > 0.7 * len(slots)
    codes = codes.double()
    likeness = codes @ F.normalize(store.codes.double(), dim=-1).T
    assert torch.equal(likeness.argmax(dim=1), slots) and float(likeness.amax(dim=1).max()) < 0.9999
    alone, _ = drawn_in(model, batch.inputs[2:3, 12:], None)
    inside = batch.segments[:3, 12:] == batch.segments[2, 12]
    assert inside[2].all() and set(alone[1].tolist()) <= set(slots.tolist())
    own, total = layer.retriever, 0.0
    for code, slot in zip(codes, slots.tolist(), strict=True):
        with torch.no_grad():
            hidden = F.silu(own.hidden @ torch.cat((code, torch.zeros(model.config.dim, dtype=code.dtype))))
            query = own.from_code @ code + own.from_hidden @ hidden
            for half, place in ((0, slot // SIDE), (1, slot % SIDE)):
                scores = layer_normed(model.keys.keys[half]) @ layer_normed(query.chunk(2)[half])
                scores = scores * own.log_scale[0].exp() / own.shape.key_dim**0.5
                total += float(torch.logsumexp(scores, 0) - scores[place])
    assert float(auxiliary["index"].detach()) == pytest.approx(0.7 * total / len(slots), rel=1e-6)
    assert "index" not in model.eval()(batch.inputs, batch.segments).auxiliary
    assert "index" not in model.counted(batch.segments)


def test_the_balance_loss_spreads_the_choices():
    """1 where all choices are even, `side` where all fall on one key; padding does not count."""
    even = torch.eye(8).repeat(1, 1, 1) * 50
    one = torch.zeros(1, 8, 8)
    one[..., 3] = 50
    keep = torch.ones(1, 8)
    assert float(uneven(even, keep)) / 8 == pytest.approx(1)
    assert float(uneven(one, keep)) / 8 == pytest.approx(8)
    keep[0, 4:] = 0
    noisy = one.clone()
    noisy[0, 4:] = torch.randn(4, 8)
    assert float(uneven(noisy, keep)) == pytest.approx(float(uneven(one, keep)))
    assert float(uneven(torch.cat((even, one)), torch.ones(2, 8))) == pytest.approx(8 + 64)


@every_name
def test_recomputed_blocks_give_the_same_gradients(name):
    """train.activation_checkpointing=blocks, with dropout: bit for bit."""
    plain = model_of(name, dropout=0.2, memory_balance_weight=0.1).train()
    batch = batch_of(plain)
    again = copy.deepcopy(plain)
    passing.arrange(again, recompute="blocks", compiled=False)
    losses = []
    for model in (plain, again):
        torch.manual_seed(5)
        losses.append(backward(model, batch))
    assert losses[0] == losses[1]
    for (where, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), where


# ------------------------------------------------------------------ what it must leave alone


@pytest.mark.parametrize("pair", [("original", "knowledge"), ("no_ffn", "no_ffn_knowledge")])
def test_without_a_memory_it_is_the_plain_model_bit_for_bit(pair):
    """M12: weights, three training steps with dropout, optimizer state, random state; with it, the first logits are."""
    plain, off, on = (fresh(pair[0], dropout=0.1), fresh(pair[1], memory="none", store="", dropout=0.1), None)
    states = []
    for model in (plain, off):
        torch.manual_seed(11)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            batch = batch_of(plain, seed=step)
            known = {"entries": batch.entries} if model.takes_entries else {}
            output = model(batch.inputs, batch.segments, batch.positions, **known)
            assert not output.auxiliary
            score(output.logits, batch).share(batch.num_targets()).backward()
            optimizer.step()
        states.append((optimizer.state_dict(), torch.get_rng_state(), output.logits))
    assert list(plain.state_dict()) == list(off.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), off.parameters(), strict=True))
    for a, b in zip(states[0][0]["state"].values(), states[1][0]["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(states[0][1], states[1][1]) and torch.equal(states[0][2], states[1][2])

    plain = fresh(pair[0], dropout=0.1)
    random_state = torch.get_rng_state()
    on = fresh(pair[1], dropout=0.1)
    assert torch.equal(torch.get_rng_state(), random_state)  # the memory draws from a generator of its own
    state = on.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    ids = tokens(plain, 2, 20)
    for model in (plain, on):
        torch.manual_seed(7)
        model.train()
    logits = []
    for model in (plain, on):
        torch.manual_seed(7)
        logits.append((model(ids).logits, torch.get_rng_state()))
    assert torch.equal(logits[0][0], logits[1][0]) and torch.equal(logits[0][1], logits[1][1])


@every_name
def test_twenty_steps_leave_the_store_alone(name):
    """M13: E4, a table that is rewritten; no parameter, no buffer, no state: nothing can train, cast or save it."""
    model = fresh(name).train()
    store = model.store
    before, distinct = store.checksums(), distinct_tokens(store)
    train(model, 20, lambda step: batch_of(model, rows=2, seed=step))
    assert model.store is store and store.checksums() == before
    store.verify()
    assert distinct_tokens(store) == distinct > 1
    shapes = {tuple(t.shape) for t in (*model.parameters(), *model.buffers(), *model.state_dict().values())}
    assert not shapes & {(256, 8), (256, CODE), (256,), (1, 256, 8)}
    assert not any("store" in key for key in model.state_dict())
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert low.store is store and low.half().store.ids.dtype == torch.int16
    assert {p.dtype for p in low.parameters()} == {torch.float16}
    assert not any(t.requires_grad for t in store.tensors().values())


def distinct_tokens(store):
    rows = zip(store.ids.tolist(), store.lengths.tolist(), strict=True)
    return sum(len(set(ids[:length])) for ids, length in rows) / store.num_entries
