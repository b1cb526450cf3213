"""The logged losses and gradient norms are those of an independent trainer, and of any cut of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from training_runs import SETTINGS, column, final_weights, flags, make_store, run_here

from minilm import models
from minilm.data.rows import Rows
from minilm.data.store import Store
from minilm.models.hf import to_hf
from minilm.run import load_config

STEPS = 50


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def independent_trainer(store, num_steps):
    """A plain loop around transformers.LlamaForCausalLM: its shift, its loss, torch's AdamW, own schedule, own clip.

    Shares with minilm only the initial weights, the rows of each step and the numbers in the settings.
    """
    config = load_config(None, flags(SETTINGS | {"data.store": store, "train.steps": num_steps})).value
    torch.manual_seed(config.train.seed)
    llama = to_hf(models.build(config.model)).train()
    decayed = [p for p in llama.parameters() if p.dim() > 1]
    free = [p for p in llama.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    rows = Rows(Store.open(store), "train", 24, "document")
    per_epoch = rows.rows_per_epoch // 8
    losses, norms = [], []
    for step in range(num_steps):
        if step < 5:
            rate = 5e-3 * (step + 1) / 5
        else:
            turned = math.pi * (step - 5 + 1) / (num_steps - 5)
            rate = 5e-4 + 4.5e-3 * (1 + math.cos(turned)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        epoch, place = divmod(step, per_epoch)
        numbers = rows.order(epoch, 0)[place * 8 : place * 8 + 8]
        tokens, segments = (torch.from_numpy(np.array(x)) for x in rows.batch(numbers))
        real = segments > 0
        labels = torch.where(real, tokens, -100)
        count = (labels[:, 1:] != -100).sum()
        loss = llama(tokens, attention_mask=real.long(), labels=labels, num_items_in_batch=count).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(llama.parameters(), 0.5)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, llama


@pytest.fixture(scope="module")
def reference(store):
    return independent_trainer(store, STEPS)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("micro_batch", [8, 2, 1])
def test_every_logged_loss_and_gradient_norm_equals_an_independent_trainer(
    tmp_path, store, reference, micro_batch
):
    run = run_here(tmp_path, store, train__steps=STEPS, train__micro_batch=micro_batch)
    losses, norms, llama = reference
    assert (
        len(set(losses)) == STEPS and losses[-1] < losses[0] - 0.7
    )  # it learns: the comparison means something
    assert column(run, "loss") == pytest.approx(losses, rel=1e-4)
    assert column(run, "gradient_norm") == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.5 * 0.2 and max(norms) > 0.5  # and clipping was at work
    embedding = final_weights(run)["embedding.weight"]
    torch.testing.assert_close(embedding, llama.model.embed_tokens.weight.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_historical_213_a_loss_times_the_accumulation_steps_is_not_logged(tmp_path, store):
    whole = run_here(tmp_path, store, name="whole", train__steps=3, optim__warmup_steps=0)
    cut = run_here(tmp_path, store, name="cut", train__steps=3, optim__warmup_steps=0, train__micro_batch=1)
    assert column(cut, "loss") == pytest.approx(column(whole, "loss"), rel=1e-5)
    assert column(cut, "loss")[0] == pytest.approx(math.log(48), abs=0.2)


@pytest.mark.usefixtures("fresh_accelerate")
def test_rate_tokens_and_epoch_in_the_log_are_the_true_ones(tmp_path, store):
    run = run_here(tmp_path, store, train__steps=30)
    rows = Rows(Store.open(store), "train", 24, "document")
    targets = []
    for step in range(30):
        epoch, place = divmod(step, rows.rows_per_epoch // 8)
        _, segments = rows.batch(rows.order(epoch, 0)[place * 8 : place * 8 + 8])
        targets.append(int(((segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])).sum()))
    assert column(run, "step_tokens") == targets
    assert column(run, "total_tokens") == np.cumsum(targets).tolist()
    assert column(run, "learning_rate")[0] == pytest.approx(1e-3)
    assert column(run, "learning_rate")[-1] == pytest.approx(5e-4)
    assert column(run, "epoch")[-1] == pytest.approx(30 / (rows.rows_per_epoch // 8))
    for record_time, data, forward, backward, optimizer in zip(
        *(column(run, f"seconds/{part}") for part in ("step", "data", "forward", "backward", "optimizer")),
        strict=True,
    ):
        assert 0.5 * record_time < data + forward + backward + optimizer <= record_time * 1.001
