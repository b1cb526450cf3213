"""One optimizer step on every layout, held against a plain float64 loop. Run by accelerate on two ranks, or alone.

    accelerate launch --config_file run_file/accelerate/cpu2_zero2.yaml tests/exactness_worker.py OUT.json

Writes, per case, the largest relative error of the logged loss, of the gradient norm and of the gradient of any
parameter. The reference knows nothing of minilm's loss: it walks over the unshifted rows of the global batch, one
row at a time, and adds up -log softmax of the tokens that are to be learnt.
"""

from __future__ import annotations

import copy
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
CLIP = 0.05  # far below the norms here: the gradient that is seen must be the one before clipping


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


def reference(model, kind):
    """Mean nats and its gradient in float64, by a plain loop."""
    tokens, segments, learn = global_batch(kind)
    model = copy.deepcopy(model).double()
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
    return float(nats.detach() / count), {name: p.grad for name, p in model.named_parameters()}


def one_case(kind, micro_batch, precision):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    layout = Layout(Asked(ROWS, micro_batch, precision, "cpu", CLIP, None))
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim": 48,
    }
    model = models.build(models.preset("original", "tiny", init_std=0.2, **sizes))
    loss, gradients = reference(model, kind)
    layout.prepare(Objective(model), optim.build(model, optim.OptimConfig(clip_norm=CLIP)))
    share = ROWS // layout.world_size
    mine = align(*global_batch(kind)).rows(layout.rank * share, (layout.rank + 1) * share)
    micro_batches = [mine.rows(i, i + micro_batch) for i in range(0, share, micro_batch)]
    seen = {}

    def before_update():
        view = StepView(1, layout, micro_batches)
        seen.update({name: gradient.detach().double().clone() for name, gradient in view.gradients()})

    result = optimizer_step(layout, micro_batches, before_update=before_update)
    assert seen.keys() == gradients.keys()
    norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
    errors = {name: float((seen[name] - g).norm() / g.norm()) for name, g in gradients.items()}
    return str(layout), {
        "loss": abs(result.loss.mean / loss - 1),
        "gradient_norm": abs(result.gradient_norm / norm - 1),
        "gradient": max(errors.values()),
        "empty_micro_batches": sum(float(b.num_targets()) == 0 for b in micro_batches),
    }


def main(out, precision="fp32"):
    torch.set_num_threads(1)
    found = {}
    for kind in KINDS:
        for micro_batch in (1, 2, 4, 8):
            layout, errors = one_case(kind, micro_batch, precision)
            found[f"{kind}, micro-batch {micro_batch}, {layout}"] = errors
    rank = AcceleratorState().process_index
    world = AcceleratorState().num_processes
    if rank == 0:
        Path(out).write_text(json.dumps({"world_size": world, "cases": found}, indent=1), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
