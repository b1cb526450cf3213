"""Optimizer steps on every layout, held against plain float64 loops. Run by accelerate on two ranks, or alone.

    accelerate launch --config_file run_file/accelerate/cpu2_zero2.yaml tests/exactness_worker.py OUT.json

Three parts, each written to OUT.json:

    grid      micro-batch x kind of rows x precision: largest relative error of the logged loss, of the gradient norm
              and of the gradient of any parameter. In bf16 beside it the floor: what plain bf16 loops that know
              nothing of minilm's step get, over permutations of the rows and cuts of the batch.
    planted   the same numbers with a mistake built into the layout: what the grid would show if it were there.
    updates   whole updates instead of gradients: `tests/update_worker.py`.

The reference knows nothing of minilm's loss: it walks over the unshifted rows of the global batch, one document at
a time, and adds up -log softmax of the tokens that are to be learnt. Weights start on values that bf16 can hold, so
that every precision has the same reference.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from minilm import models
from minilm.alignment import align
from minilm.training import optim
from minilm.training.layout import Asked, Layout
from minilm.training.objective import Objective
from minilm.training.step import optimizer_step
from minilm.training.watch import StepView

ROWS, LENGTH, VOCAB = 16, 24, 40
KINDS = ("packed", "uneven", "masked")
MICRO_BATCHES = (1, 2, 4, 8)
CLIP = 0.05  # far below the norms here: the gradient that is seen must be the one before clipping
MEASURED = ("loss", "gradient_norm", "gradient")


def global_batch(kind):
    """tokens, segments, learn [ROWS, LENGTH + 1]: packed documents, one very uneven document a row, or a learn mask
    that leaves whole micro-batches without a target."""
    draw = torch.Generator().manual_seed(len(kind))
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=draw)
    segments = torch.ones_like(tokens)
    learn = torch.ones_like(tokens, dtype=torch.bool)
    for row in range(ROWS):
        if kind == "packed":
            cuts = sorted(torch.randint(1, LENGTH, (3,), generator=draw).tolist())
            for cut in cuts:
                segments[row, cut:] += 1
        else:
            segments[row, [2, 25, 3, 9][row % 4] + row // 8 :] = 0
        if kind == "masked":
            learn[row] = torch.rand(LENGTH + 1, generator=draw) < 0.3
            learn[row] &= row % 8 > 2  # rows 0 to 2 and 8 to 10: micro-batches of 1 and 2 rows are empty
    return tokens, segments, learn


def fresh_model():
    """The same small model each time, with weights that bf16 can hold."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = models.build(models.preset("original", "tiny", init_std=0.2, hidden_dim=48, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def backward_of_reference(model, kind):
    """Mean nats of a float64 model, by a plain loop over documents; the gradient is in .grad."""
    tokens, segments, learn = global_batch(kind)
    nats, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(ROWS):
        starts = [
            0,
            *(i for i in range(1, LENGTH + 1) if segments[row, i] != segments[row, i - 1]),
            LENGTH + 1,
        ]
        for begin, end in itertools.pairwise(starts):
            if segments[row, begin] == 0 or end - begin < 2:
                continue
            document = tokens[row, begin:end]  # alone: no other document, no padding, no position but its own
            table = torch.log_softmax(model(document[None]).logits[0], dim=-1)
            for place in range(1, end - begin):
                if learn[row, begin + place]:
                    nats = nats - table[place - 1, document[place]]
                    count += 1
    (nats / count).backward()
    return float(nats.detach() / count)


@functools.cache
def reference(kind):
    """Mean nats and the gradient of each parameter in float64."""
    model = fresh_model().double()
    loss = backward_of_reference(model, kind)
    return loss, {name: p.grad for name, p in model.named_parameters()}


def errors_of(loss, gradients, kind, norm=None):
    """Relative deviations from the reference; norm: the one that was logged, if one was."""
    true_loss, true = reference(kind)
    assert gradients.keys() == true.keys()
    true_norm = float(torch.cat([g.flatten() for g in true.values()]).norm())
    if norm is None:
        norm = float(torch.cat([g.double().flatten() for g in gradients.values()]).norm())
    each = [float((gradients[name].double() - g).norm() / g.norm()) for name, g in true.items()]
    return {
        "loss": abs(loss / true_loss - 1),
        "gradient_norm": abs(norm / true_norm - 1),
        "gradient": max(each),
    }


def new_layout(micro_batch, precision="fp32", clip=CLIP, device="cpu"):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Layout(Asked(ROWS, micro_batch, precision, device, clip, None))


def micro_batches_of(layout, kind):
    """This rank's part of the global batch, cut."""
    share = ROWS // layout.world_size
    mine = align(*global_batch(kind)).rows(layout.rank * share, (layout.rank + 1) * share)
    return [mine.rows(i, i + layout.micro_batch) for i in range(0, share, layout.micro_batch)]


def one_case(kind, micro_batch, precision="fp32", plant=None, device="cpu"):
    layout = new_layout(micro_batch, precision, device=device)
    model = fresh_model().to(layout.device)
    layout.prepare(Objective(model), optim.build(model, optim.OptimConfig(clip_norm=CLIP)))
    micro_batches = micro_batches_of(layout, kind)
    if plant is not None:
        micro_batches = PLANTS[plant](layout, micro_batches)
    seen = {}

    def before_update():
        view = StepView(1, layout, micro_batches)
        seen.update({name: gradient.detach().cpu().double() for name, gradient in view.gradients()})

    result = optimizer_step(layout, micro_batches, before_update=before_update)
    errors = errors_of(result.loss.mean, seen, kind, result.gradient_norm)
    errors["empty_micro_batches"] = sum(float(b.num_targets()) == 0 for b in micro_batches)
    return str(layout), errors


# ------------------------------------------------------------------ what bf16 itself does to these numbers


def plain_bf16(kind, *, rounded, order, cut, device):
    """Loss and gradients of a plain bf16 loop, float32 sums: `rounded` weights, as DeepSpeed has them, or autocast."""
    model = fresh_model().to(device)
    if rounded:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    tokens, segments, learn = (x[order].to(device) for x in global_batch(kind))
    counts = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0) & learn[:, 1:]
    total, loss = int(counts.sum()), 0.0
    gradients = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    for first in range(0, ROWS, cut):
        rows = slice(first, first + cut)
        autocast = contextlib.nullcontext() if rounded else torch.autocast(device, torch.bfloat16)
        with autocast:
            logits = model(tokens[rows, :-1], segments=segments[rows, :-1]).logits
        table = torch.log_softmax(logits.float(), dim=-1)
        picked = table.gather(2, tokens[rows, 1:, None])[:, :, 0]
        nats = -(picked * counts[rows]).sum()
        (nats / total).backward()
        loss += float(nats.detach()) / total
        for name, parameter in model.named_parameters():
            gradients[name] += parameter.grad.float()
            parameter.grad = None
    return loss, {name: gradient.cpu() for name, gradient in gradients.items()}


def bf16_floor(kind, *, rounded, device="cpu"):
    """Largest deviations from the reference that bf16 itself brings, over permutations and cuts."""
    worst = dict.fromkeys(MEASURED, 0.0)
    for seed, cut in enumerate((1, 2, 4, 8, 16, 1, 4, 16)):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
        errors = errors_of(*plain_bf16(kind, rounded=rounded, order=order, cut=cut, device=device), kind)
        worst = {name: max(worst[name], errors[name]) for name in MEASURED}
    return worst


# ------------------------------------------------------------------ planted mistakes


def times_accumulation(layout, micro_batches):
    """The historical one: every micro-batch counts as if it were the whole batch of its rank."""
    return scaled(layout, micro_batches, lambda number: layout.accumulation)


def over_ranks(layout, micro_batches):
    """DDP and ZeRO average over the ranks: who forgets to multiply has a gradient that is too small."""
    return scaled(layout, micro_batches, lambda number: 1 / layout.world_size)


def first_not_learnt(layout, micro_batches):
    """The gradient of one micro-batch is lost, its loss is logged."""
    return scaled(layout, micro_batches, lambda number: 0.0 if number == 0 else 1.0)


def last_row_not_seen(layout, micro_batches):
    """The last micro-batch of each rank never arrives; DeepSpeed and DDP still see the end of the step."""
    return micro_batches[:-1]


def each_by_its_own_count(layout, micro_batches):
    """The mean of the means of the micro-batches, in place of the mean over all targets."""
    counts = [max(1.0, float(batch.num_targets())) for batch in micro_batches]
    whole = sum(layout.all_reduce([sum(float(b.num_targets()) for b in micro_batches)]))
    pieces = layout.accumulation * layout.world_size
    return scaled(layout, micro_batches, lambda number: whole / counts[number] / pieces)


def scaled(layout, micro_batches, factor):
    backward, calls = layout.backward, itertools.count()

    def planted(contribution, *, last):
        backward(contribution * factor(next(calls)), last=last)

    layout.backward = planted
    return micro_batches


PLANTS = {
    plant.__name__: plant
    for plant in (times_accumulation, over_ranks, first_not_learnt, last_row_not_seen, each_by_its_own_count)
}


def grid(precision, device="cpu"):
    found = {}
    for kind in KINDS:
        for micro_batch in MICRO_BATCHES:
            layout, errors = one_case(kind, micro_batch, precision, device=device)
            found[f"{kind}, micro-batch {micro_batch}, {layout}"] = errors
    return found


def planted(precision):
    """Each mistake on uneven rows in micro-batches of two: accumulation on one rank 8, on two 4."""
    return {name: one_case("uneven", 2, precision, name)[1] for name in PLANTS}


def main(out, *parts):
    """Measure on this layout and write OUT.json; parts: "updates", and "cuda" to compute on a GPU."""
    torch.set_num_threads(1)
    device = "cuda" if "cuda" in parts else "cpu"
    layout = new_layout(1, device=device)
    found = {"world_size": layout.world_size}
    for precision in ("fp32", "bf16"):
        found[precision] = grid(precision, device)
        if device == "cpu":
            found[f"planted {precision}"] = planted(precision)
    rounded = layout.kind == "zero"  # as DeepSpeed has its weights
    found["floor"] = {kind: bf16_floor(kind, rounded=rounded, device=device) for kind in KINDS}
    if "updates" in parts:
        from update_worker import updates

        found |= updates(layout.kind)
    if layout.rank == 0:
        Path(out).write_text(json.dumps(found, indent=1), encoding="utf-8")
    layout.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
