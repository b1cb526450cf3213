"""What a knowledge memory retrieves and reads, held against a second implementation and against itself."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from knowledge_reference import (
    NAMES,
    emptied,
    exact,
    memories,
    model_of,
    normed_state,
    reading,
    replaced,
    retrieved,
    store_of,
    window_code,
)
from zoo_models import NOISE, difference, tokens

from minilm.errors import DataError
from minilm.models import retrieval
from minilm.models.memory_rows import cached_codes, codes_of

LENGTH = 40  # longer than the window of 16
GAP = 1e-4
every_name = pytest.mark.parametrize("name", NAMES)


def layer_calls(model, *given, **named):
    """What went into each memory layer of a forward pass, and came out: [(layer, x, MemoryOutput)]; what was read."""
    calls, handles = [], []
    for layer in memories(model):
        handles.append(
            layer.register_forward_hook(
                lambda module, args, out: calls.append((module, args[0].detach(), out))
            )
        )
    _, reads = model.reads(*given, **named)
    for handle in handles:
        handle.remove()
    return calls, reads


def packed(rows=2):
    ids = torch.randint(0, 256, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[1] * 13 + [2] * 20 + [3] * 3 + [0] * 4]).expand(rows, -1)
    return ids, segments


# ------------------------------------------------------------------ the second implementation


@every_name
@pytest.mark.parametrize("entries", [None, 90, 3])
def test_a_memory_layer_is_the_reference_written_in_loops(name, entries):
    """M1, M10: retrieval, null slot, gate, positions, biases; with a full store, with empty slots, with hardly any."""
    model = exact(model_of(name), store_of(entries))
    store = model.store
    ids, segments = packed(1)
    calls, reads = layer_calls(model, ids, segments)
    config, ties = model.config, 0
    for (layer, x, out), read in zip(calls, reads.values(), strict=True):
        states = normed_state(layer, x)[0]
        for place in (0, 1, 12, 13, 14, 31, 32, 35):  # at borders of documents, and beyond the window
            begin = {1: 0, 2: 13, 3: 33}[int(segments[0, place])]
            code = window_code(store, ids[0, begin : place + 1].tolist(), config.window, config.window_decay)
            wanted = retrieved(layer, model.keys.keys, store, states[place], code)
            ties += wanted.gap < 1e-7
            real = store.lengths[read.slots[0, place]] > 0
            assert read.slots[0, place][real].tolist() == wanted.slots
            assert len(wanted.slots) == min(config.num_read, len(wanted.slots))
            added, seen = reading(model, layer, store, states[place], wanted.slots, wanted.biases)
            torch.testing.assert_close(out.x[0, place] - x[0, place], added.detach(), rtol=1e-6, atol=1e-9)
            assert float(read.null[0, place]) == pytest.approx(seen.pop(None), abs=1e-6)
            for (number, token), share in seen.items():
                assert float(read.tokens[0, place, number, token]) == pytest.approx(share, abs=1e-6)
            total = float(read.weights[0, place].sum() + read.null[0, place])
            assert total == pytest.approx(1, abs=1e-6)
    assert ties == 0
    assert out.x.std() > 0.1 and (out.x - x).std() > 0.01  # two-sided: the memory does something


def test_projecting_the_vocabulary_is_projecting_the_entries():
    """M10: the identity that the reading stands on, and after an optimizer step: nothing may be kept from before."""
    model = model_of()
    table, weight = model.embedding.weight, memories(model)[0].key
    ids = model.store.ids[:7].long()
    assert torch.equal(F.embedding(ids, F.linear(table, weight)), F.linear(F.embedding(ids, table), weight))
    given = tokens(model, 1, LENGTH)
    before = model(given).hidden.detach()
    with torch.no_grad():
        table += 0.05 * torch.randn_like(table)
        weight += 0.05 * torch.randn_like(weight)
    fresh = copy.deepcopy(model)
    assert torch.equal(model(given).hidden, fresh(given).hidden)
    assert not torch.equal(model(given).hidden, before)


def test_window_codes_are_the_reference_in_every_document_and_padding_anywhere():
    store = store_of()
    ids = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(4))
    segments = torch.tensor([[0, 0, 1, 1, 0, 0, 1] + [1] * 15 + [2] * 5 + [0] * 3])
    codes = codes_of(store.token_codes(), ids, segments, 16, 0.9)[0]
    for place in range(30):
        number = int(segments[0, place])
        before = [int(ids[0, i]) for i in range(place + 1) if int(segments[0, i]) == number]
        wanted = window_code(store, before, 16, 0.9) if number else torch.zeros(16, dtype=torch.float64)
        torch.testing.assert_close(codes[place].double(), wanted, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ who may influence what is read


@every_name
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows_are", ["whole", "packed"])
def test_no_later_token_and_no_other_document_changes_what_is_read(name, training, rows_are):
    """M3, M4: mem-future-retrieval, a window across the border; in float64 bit for bit."""
    model = exact(model_of(name)).train(training)
    ids, segments = packed()
    segments = segments if rows_are == "packed" else torch.ones_like(segments)
    base, reads = model.reads(ids, segments)
    felt = 0
    for column in (0, 5, 12, 13, 25, 33, 35):
        other = ids.clone()
        other[0, column] = (other[0, column] + 7) % 256
        output, now = model.reads(other, segments)
        document = segments[0] == segments[0, column]
        free = ~document | (torch.arange(LENGTH) < column)
        assert torch.equal(output.hidden[0, free], base.hidden[0, free])
        assert torch.equal(output.hidden[1], base.hidden[1])
        for layer, read in reads.items():
            assert torch.equal(now[layer].slots[0, free], read.slots[0, free])
            assert torch.equal(now[layer].weights[0, free], read.weights[0, free])
            felt += int((now[layer].slots[0, ~free] != read.slots[0, ~free]).any(dim=-1).sum())
    assert felt > 20  # two-sided: the tokens do choose what is read after them


@every_name
def test_labels_teach_and_tell_nothing(name):
    """M3: an entry is named by looking at the target. Hidden states must not know it."""
    model = model_of(name).train()
    ids, segments = packed()
    base, reads = model.reads(ids, segments)
    assert "retrieval" not in base.auxiliary
    for seed in (0, 1):
        draw = torch.Generator().manual_seed(seed)
        entries = torch.randint(-1, 256, ids.shape, generator=draw)
        output, now = model.reads(ids, segments, entries=entries)
        assert torch.equal(output.hidden, base.hidden)
        assert all(torch.equal(now[layer].slots, reads[layer].slots) for layer in reads)
        assert output.auxiliary["retrieval"] > 0


@every_name
def test_modes_agree_and_passes_repeat(name):
    """M5, M19: mem-bn-eval, noise in evaluation; no result is overwritten by the next call."""
    model = model_of(name)
    first_ids, second_ids = tokens(model, 2, LENGTH, 1), tokens(model, 2, LENGTH, 2)
    first, reads = model.reads(first_ids)
    kept = [t.clone() for t in (first.hidden, first.logits, *(r.slots for r in reads.values()))]
    second, _ = model.reads(second_ids)
    assert second.hidden.data_ptr() != first.hidden.data_ptr()
    now = [first.hidden, first.logits, *(r.slots for r in reads.values())]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    assert model.recorded is None  # nothing of a call stays in the model
    for mode in (False, True):
        again, again_reads = model.train(mode).reads(first_ids)
        assert torch.equal(again.hidden, first.hidden)
        assert all(torch.equal(again_reads[n].weights, reads[n].weights) for n in reads)


def near_ties(model, calls, codes):
    """[tokens] bool of each layer: is a choice within GAP of the border, so that rounding may make it."""
    found = []
    for layer, x, _ in calls:
        states = normed_state(layer, x).flatten(0, 1)
        gaps = [
            retrieved(layer, model.keys.keys, model.store, state, code).gap
            for state, code in zip(states, codes.flatten(0, 1), strict=True)
        ]
        found.append((torch.tensor(gaps) < GAP).view(x.shape[:2]))
    return found


@every_name
def test_a_row_reads_the_same_alone_in_a_batch_and_padded(name):
    """M6: by the gap rule, with the share that it skips."""
    model = model_of(name)
    ids = tokens(model, 8, 20)
    base, reads = model.reads(ids)
    found = near_ties(model, layer_calls(model, ids[:2])[0], _codes(model, ids[:2]))
    near = dict(zip(reads, found, strict=True))
    assert float(torch.stack(found).float().mean()) <= 0.02
    for row in range(2):
        for more in (0, 9):
            given = torch.cat((ids[row : row + 1], torch.zeros(1, more, dtype=torch.long)), dim=1)
            segments = (torch.arange(20 + more) < 20).long()[None]
            alone, now = model.reads(given, segments)
            assert difference(alone.hidden[0, :20], base.hidden[row]).max() <= 10 * NOISE
            for layer, read in reads.items():
                clear = ~near[layer][row]
                assert torch.equal(now[layer].slots[0, :20][clear], read.slots[row][clear])
    assert bool(torch.isfinite(alone.hidden).all())


def _codes(model, ids, segments=None):
    config = model.config
    return codes_of(model.store.token_codes(), ids, segments, config.window, config.window_decay)


@every_name
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cuts", [(7, 8, 9, 22), (18, 25), (1, 2, 3, 4, 39)])
def test_cached_decoding_reads_what_the_whole_pass_reads(name, side, cuts):
    """M7: the window reaches back over the border of the chunks, and over padding that stands between."""
    model = exact(model_of(name))
    ids = tokens(model, 3, LENGTH)
    prompt, segments = cuts[0], torch.ones(3, LENGTH, dtype=torch.long)
    if side != "none" and prompt > 5:
        where = slice(0, 3) if side == "left" else slice(prompt - 3, prompt)
        segments[1, where] = 0
    positions = (segments.cumsum(dim=1) - 1).clamp(min=0) * segments
    full, reads = model.reads(ids, segments, positions)
    with torch.no_grad():
        cache, parts, slots = model.new_cache(3, LENGTH), [], {n: [] for n in reads}
        borders = [0, *cuts, LENGTH]
        for begin, end in itertools.pairwise(borders):
            given = segments[:, begin:end] if begin == 0 else None
            output, now = model.reads(ids[:, begin:end], given, cache=cache)
            parts.append(output.hidden)
            for layer, read in now.items():
                slots[layer].append(read.slots)
    real = segments > 0
    assert difference(torch.cat(parts, dim=1), full.hidden)[real].max() <= 1e-9
    for layer, read in reads.items():
        assert torch.equal(torch.cat(slots[layer], dim=1)[real], read.slots[real])


def test_a_window_of_the_last_token_alone_would_be_seen():
    """M7, two-sided: cached decoding with a window cut at the chunk reads something else."""
    model = model_of()
    ids = tokens(model, 1, LENGTH)
    whole = _codes(model, ids)[:, -1:]
    cache = model.new_cache(1, LENGTH)
    cache.begin(ids[:, :-1], None, None)
    cache.commit()
    cache.begin(ids[:, -1:], None, None)
    found = cached_codes(model.store.token_codes(), cache, 1, model.config.window, model.config.window_decay)
    torch.testing.assert_close(found, whole)
    assert (_codes(model, ids[:, -1:]) - whole).abs().max() > 0.1


# ------------------------------------------------------------------ empty slots and padding of entries


@every_name
def test_what_stands_behind_an_entrys_length_is_nowhere_seen(name):
    """M11: mem-pad-attended."""
    model = model_of(name)
    ids, store = tokens(model, 2, LENGTH), model.store
    base = model(ids).hidden
    behind = torch.arange(store.width) >= store.lengths[:, None]
    assert behind.any()
    noise = torch.randint(1, 256, store.ids.shape, dtype=store.ids.dtype)
    model.store = replaced(store, ids=torch.where(behind, noise, store.ids))
    assert torch.equal(model(ids).hidden, base)
    model.store = replaced(store, ids=torch.where(behind, store.ids, noise))
    assert not torch.equal(model(ids).hidden, base)  # two-sided: what is read does matter


def test_an_empty_slot_never_weighs_anything():
    """M11: 10,000 queries over a store with nine slots of ten empty, whose codes would be the best of all."""
    model = model_of()
    layer = memories(model)[0]
    held = torch.arange(256) % 10 == 0
    store = emptied(store_of(), ~held)
    store = replaced(store, codes=torch.where(held[:, None], store.codes, 127).to(torch.int8))
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(10_000, model.config.dim, generator=draw)
    codes = F.normalize(torch.randn(10_000, 16, generator=draw), dim=-1)
    with torch.no_grad():
        found = layer.retriever(states, codes, model.keys, store, None)
    real = store.lengths[found.slots] > 0
    assert bool(found.scores[~real].isneginf().all()) and bool(found.scores[real].isfinite().all())
    assert 0.1 < float(real.float().mean()) < 0.95
    assert bool((found.slots.sort(dim=1).values.diff(dim=1) > 0).all())


@every_name
def test_a_store_without_entries_is_the_null_slot_alone(name):
    """M11: no NaN in value or gradient."""
    model = model_of(name).train()
    model.store = emptied(store_of(), torch.ones(256, dtype=torch.bool))
    ids, segments = packed()
    output, reads = model.reads(ids, segments)
    output.logits.square().mean().backward()
    assert all(torch.equal(read.null, torch.ones_like(read.null)) for read in reads.values())
    assert bool(torch.isfinite(output.hidden).all())
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    layer = memories(model)[0]
    assert layer.null_value.grad.abs().max() > 0


# ------------------------------------------------------------------ precision


def test_bfloat16_around_it_changes_no_choice():
    """M20: same states in, same entries out; scores in bfloat16 would choose others."""
    model = model_of()
    layer, store = memories(model)[0], model.store
    states = torch.randn(2000, model.config.dim, generator=torch.Generator().manual_seed(0))
    codes = F.normalize(torch.randn(2000, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    with torch.no_grad():
        plain = layer.retriever(states, codes, model.keys, store, None)
        with torch.autocast("cpu", torch.bfloat16):
            under = layer.retriever(states, codes, model.keys, store, None)
            low = states @ states.T  # autocast is on here
        candidates = retrieval.best_cells(plain.rows, plain.columns, 16)[1]
        rounded = retrieval.best_cells(plain.rows.bfloat16(), plain.columns.bfloat16(), 16)[1]
    assert low.dtype == torch.bfloat16 and under.scores.dtype == torch.float32
    assert torch.equal(plain.slots, under.slots) and torch.equal(plain.scores, under.scores)
    others = (
        sum(len(set(a) - set(b)) for a, b in zip(candidates.tolist(), rounded.tolist(), strict=True))
        / candidates.numel()
    )
    assert 0.005 < others < 0.2


def test_a_model_in_bfloat16_still_scores_in_float32():
    """M20: weights are rounded then, scores are not."""
    model = model_of().to(torch.bfloat16)
    calls, _ = layer_calls(model, tokens(model, 2, LENGTH))
    assert all(out.rows.dtype == out.columns.dtype == torch.float32 for _, _, out in calls)
    assert all(x.dtype == torch.bfloat16 for _, x, _ in calls)


# ------------------------------------------------------------------ oracle


@every_name
def test_the_oracle_reads_the_named_entry_and_nothing_else(name):
    model = exact(model_of(name, retrieval="oracle"))
    ids, segments = packed(1)
    entries = torch.full_like(ids, -1)
    entries[0, 5], entries[0, 20] = 17, 3
    calls, reads = layer_calls(model, ids, segments, entries=entries)
    for (layer, x, out), read in zip(calls, reads.values(), strict=True):
        for place in (4, 5, 20):
            row = int(entries[0, place])
            slots = [] if row < 0 else [int(model.store.slots[row])]
            state = normed_state(layer, x)[0, place]
            added, seen = reading(model, layer, model.store, state, slots, [0.0] * len(slots))
            torch.testing.assert_close(out.x[0, place] - x[0, place], added, rtol=1e-6, atol=1e-9)
            assert float(read.null[0, place]) == pytest.approx(seen[None], abs=1e-6)
            assert math.isclose(float(read.weights[0, place].sum()), 1 - seen[None], abs_tol=1e-6)
            assert row < 0 or int(read.slots[0, place, 0]) == slots[0]
    assert all(torch.equal(read.null[0, :5], torch.ones(5)) for read in reads.values())
    without = model.reads(ids, segments)[1]
    assert all(torch.equal(read.null, torch.ones_like(read.null)) for read in without.values())


def test_labels_of_another_store_are_refused():
    model = model_of()
    ids = tokens(model, 1, 4)
    with pytest.raises(DataError, match=r"entry 256 of the knowledge store, which has 256 entries"):
        model(ids, entries=torch.tensor([[-1, 0, 256, 3]]))
