"""A knowledge model on two ranks: the same store, keys and reads on both, and the gradient of one process.

    accelerate launch --config_file run_file/accelerate/cpu2_zero2.yaml tests/knowledge_worker.py OUT.json

Written to OUT.json: a hash of the store, of the sub-keys and of what is read, from each rank, before and after five
steps; the largest relative deviation of the first step's losses and gradients from one forward over all rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from knowledge_reference import model_of

from minilm.alignment import align, score
from minilm.training import optim
from minilm.training.layout import Asked, Layout
from minilm.training.objective import Objective
from minilm.training.step import optimizer_step
from minilm.training.watch import StepView

ROWS, LENGTH, STEPS, MICRO_BATCH = 8, 20, 5, 2


def batch_of(seed):
    """Packed rows; the labels are in the last rows alone, so that one rank has most of them."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (ROWS, LENGTH), generator=draw)
    segments = torch.ones_like(ids)
    for row in range(ROWS):
        segments[row, 4 + row :] = 2
        segments[row, LENGTH - row :] = 0
    entries = torch.randint(0, 256, ids.shape, generator=draw)
    entries[torch.rand(ids.shape, generator=draw) < 0.5] = -1
    entries[: ROWS - 3] = -1
    return align(ids, segments, entries=entries)


def fresh():
    return model_of(memory_balance_weight=0.1, retrieval_weight=0.5).train()


def reference():
    """Loss, auxiliary losses and gradients of the first step, from one forward over all rows in float64."""
    model, batch = fresh().double(), batch_of(0)
    output = model(batch.inputs, batch.segments, batch.positions, entries=batch.entries)
    loss = score(output.logits, batch).share(batch.num_targets())
    (loss + sum(output.auxiliary.values())).backward()
    values = {name: float(value.detach()) for name, value in output.auxiliary.items()}
    return float(loss.detach()), values, {name: p.grad for name, p in model.named_parameters()}


def digest(*tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()[:16]


@torch.no_grad()
def state_of(model):
    """Hashes of what all ranks must have in common."""
    ids = torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(77))
    output, reads = model.reads(ids)
    read = [part for read in reads.values() for part in (read.slots, read.weights)]
    tensors = model.store.tensors()
    return {
        "store": digest(*(tensors[name] for name in sorted(tensors))),
        "keys": digest(model.keys.keys),
        "reads": digest(*read),
        "answer": digest(output.hidden),
    }


def train():
    """This rank's part of the report."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    layout = Layout(Asked(ROWS, MICRO_BATCH, "fp32", "cpu", None, None))
    model = fresh()
    layout.prepare(
        Objective(model), optim.build(model, optim.OptimConfig(learning_rate=1e-2, warmup_steps=0))
    )
    states, share, seen, first = [state_of(layout.model)], ROWS // layout.world_size, {}, None
    for step in range(STEPS):
        mine = batch_of(step).rows(layout.rank * share, (layout.rank + 1) * share)
        pieces = [mine.rows(i, i + MICRO_BATCH) for i in range(0, share, MICRO_BATCH)]
        view = StepView(step, layout, pieces)

        def look(view=view):
            if not seen:
                seen.update({name: gradient.detach().double() for name, gradient in view.gradients()})

        optim.set_rate(layout.optimizer, 1e-2)
        result = optimizer_step(layout, pieces, before_update=look)
        first = first or result
    states.append(state_of(layout.model))
    loss, values, gradients = reference()
    assert seen.keys() == gradients.keys() and first.auxiliary.keys() == values.keys()
    errors = {name: float((seen[name] - g).norm() / g.norm()) for name, g in gradients.items()}
    errors |= {name: abs(first.auxiliary[name] / value - 1) for name, value in values.items()}
    errors["loss"] = abs(first.loss.mean / loss - 1)
    return {"layout": str(layout), "states": states, "errors": errors, "last": result.loss.mean}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for kind in ("DeepSpeed ZeRO-2", "DDP"):  # one launch for both: it is the slow part
        reports = [None] * 2
        report = train()
        dist.all_gather_object(reports, report)
        found[kind] = reports
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
