"""Watchers see the gradient and weights of a step as they are; the norms in the log are recomputed here."""

from __future__ import annotations

import pytest
import torch
from training_runs import column, make_store, records, run_here

from minilm.training import columns, hardware, trainer
from minilm.training.watch import layer_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_norms_per_layer_are_those_of_a_separate_computation_and_of_the_weights_before_and_after(
    tmp_path, monkeypatch
):
    store = make_store(tmp_path / "store")
    real, seen = trainer.optimizer_step, []

    def spy(layout, batches, **keywords):
        before = {name: p.detach().clone() for name, p in layout.model.named_parameters()}
        hook = keywords["before_update"]

        def before_update():
            gradients = {name: p.grad.detach().clone() for name, p in layout.model.named_parameters()}
            seen.append((before, gradients))
            hook()

        result = real(layout, batches, **keywords | {"before_update": before_update})
        after = {name: p.detach().clone() for name, p in layout.model.named_parameters()}
        seen[-1] = (*seen[-1], after)
        return result

    monkeypatch.setattr(trainer, "optimizer_step", spy)
    run = run_here(tmp_path, store, train__steps=6, train__micro_batch=4, train__norms_every=3)
    rows = records(run)
    assert [r["step"] for r in rows if any(key.startswith("update_norm/") for key in r)] == [1, 3, 6]
    for record in (rows[0], rows[2], rows[5]):
        before, gradients, after = seen[record["step"] - 1]
        layers = {layer_of(name) for name in before}
        assert {"blocks.0", "blocks.1", "embedding"} <= layers
        for layer in layers:
            names = [name for name in before if layer_of(name) == layer]
            for column_name, tensors in (
                ("gradient_norm", [gradients[n] for n in names]),
                ("weight_norm", [after[n] for n in names]),
                ("update_norm", [after[n] - before[n] for n in names]),
            ):
                flat = torch.cat([t.double().flatten() for t in tensors])
                assert record[f"{column_name}/{layer}"] == pytest.approx(float(flat.norm()), rel=1e-5)
        # All layers together are the norm that was logged (before clipping).
        whole = sum(record[f"gradient_norm/{layer}"] ** 2 for layer in layers) ** 0.5
        assert record["gradient_norm"] == pytest.approx(whole, rel=1e-5)


def test_watching_changes_no_number(tmp_path):
    store = make_store(tmp_path / "store")
    plain = run_here(tmp_path, store, name="plain", train__steps=8)
    watched = run_here(tmp_path, store, name="watched", train__steps=8, train__norms_every=1)
    assert column(plain, "loss") == column(watched, "loss")


def test_mfu_is_absent_where_the_peak_is_unknown(tmp_path):
    assert hardware.peak_flops(torch.device("cpu"), bf16=True) is None
    run = run_here(tmp_path, make_store(tmp_path / "store"), train__steps=6)
    assert "mfu" not in records(run)[0]


def test_mfu_is_flops_per_second_over_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "peak_flops", lambda device, bf16: 1e12)
    run = run_here(tmp_path, make_store(tmp_path / "store"), train__steps=6)
    # Counted here from the shapes: 6 FLOP per weight of each product and position, 12 L d per layer and token pair.
    dim, kv, hidden, layers, vocab, length = 32, 16, 64, 2, 48, 24
    weights = layers * (2 * dim * dim + 2 * dim * kv + 3 * dim * hidden) + vocab * dim
    attention = layers * 3 * 4 * dim * (length + 1) / 2
    flops = 8 * length * (6 * weights + attention)
    for record in records(run):
        assert record["mfu"] == pytest.approx(flops / record["seconds/step"] / 1e12, rel=1e-6)
