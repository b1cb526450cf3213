"""Auxiliary losses under any cut, held against one batch of the whole step. Run by accelerate on two ranks, or alone.

    accelerate launch --config_file run_file/accelerate/cpu2.yaml tests/auxiliary_worker.py OUT.json

The reference knows nothing of minilm's step: it takes the states of one forward over all rows and adds the losses up
token by token, row by row.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from exactness_worker import LENGTH, MICRO_BATCHES, ROWS, VOCAB, global_batch

from minilm import models
from minilm.alignment import align
from minilm.models.original import Original
from minilm.training import optim
from minilm.training.layout import Asked, Layout
from minilm.training.objective import Objective
from minilm.training.step import optimizer_step
from minilm.training.usage import Usage
from minilm.training.watch import StepView, around_forwards

WEIGHTS = {"balance": 0.7, "router_z": 0.3}
SIZES = {"vocab_size": VOCAB, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.2}


class Recalling(Original):
    """Two losses of its own: over the tokens that need an entry, which most rows lack, and over all real ones."""

    takes_entries = True

    def forward(self, inputs, segments=None, positions=None, cache=None, entries=None):
        output = super().forward(inputs, segments, positions, cache)
        squares = output.hidden.square().sum(dim=-1)
        for name, keep in self.kept(segments, entries).items():
            output.auxiliary[name] = 0.1 * (squares * keep).sum() / keep.sum().clamp(min=1)
        return output

    def counted(self, segments, entries=None):
        return {name: keep.sum(dtype=torch.float64) for name, keep in self.kept(segments, entries).items()}

    @staticmethod
    def kept(segments, entries):
        return {"recall": entries >= 0, "everywhere": segments > 0}


def entries_of(segments):
    """[ROWS, LENGTH + 1]: every third token of the last rows has one; the other rows have none."""
    every = torch.arange(LENGTH + 1).expand_as(segments)
    rows = torch.arange(len(segments)).unsqueeze(1)
    return torch.where((every % 3 == 0) & (rows >= ROWS - 3), every + rows, -1)


def whole_batch(kind):
    tokens, segments, learn = global_batch(kind)
    return align(tokens, segments, learn, entries_of(segments))


def fresh_model(name, dtype):
    torch.manual_seed(0)
    if name == "moe":
        weights = {f"{loss}_weight": weight for loss, weight in WEIGHTS.items()}
        config = models.preset("moe", "tiny", hidden_dim=24, num_experts=5, **SIZES, **weights)
        return models.build(config).to(dtype)
    return Recalling(models.preset("original", "tiny", hidden_dim=48, **SIZES)).to(dtype)


def reference(name, kind):
    """Loss, auxiliary losses and gradients of the step, in float64, from one forward over all rows."""
    model, batch = fresh_model(name, torch.float64), whole_batch(kind)
    logits = []
    for block in model.blocks if name == "moe" else ():
        block.ffn.register_forward_hook(lambda module, args, out: logits.append(out[1]))
    known = {"entries": batch.entries} if name != "moe" else {}
    output = model(batch.inputs, batch.segments, batch.positions, **known)
    table = torch.log_softmax(output.logits, dim=-1)
    picked = table.gather(2, batch.targets.unsqueeze(2))[:, :, 0]
    loss = -(picked * batch.weights).sum() / batch.weights.sum()
    parts = of_routers(logits, batch) if name == "moe" else of_states(output.hidden, batch)
    (loss + sum(parts.values())).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return float(loss.detach()), {n: float(v.detach()) for n, v in parts.items()}, gradients


def of_states(hidden, batch):
    found = {"recall": [], "everywhere": []}
    for row in range(ROWS):
        for place in range(LENGTH):
            square = (hidden[row, place] ** 2).sum()
            if batch.segments[row, place] > 0:
                found["everywhere"].append(square)
            if batch.entries[row, place] >= 0:
                found["recall"].append(square)
    return {name: 0.1 * sum(squares) / len(squares) for name, squares in found.items()}


def of_routers(layers, batch):
    """DeepSeek-V3's sequence-wise balance and ST-MoE's z, in loops; a token counts if its document goes on."""
    totals, count = dict.fromkeys(WEIGHTS, 0.0), 0
    for row in range(ROWS):
        segments = batch.segments[row].tolist()
        following = [
            *segments[1:],
            segments[-1],
        ]  # what comes after the row is not known: its last token counts
        kept = [i for i, (s, t) in enumerate(zip(segments, following, strict=True)) if s == t > 0]
        count += len(kept)
        for logits in layers:
            tokens = [logits[row, i] for i in kept]
            for expert in range(logits.shape[-1]):
                votes = sum(expert in sorted(range(5), key=lambda e: -t[e].item())[:2] for t in tokens)
                mass = sum(torch.exp(t[expert]) / torch.exp(t).sum() for t in tokens)
                if kept:
                    totals["balance"] += 5 * votes / (2 * len(kept)) * mass / len(layers)
            totals["router_z"] += sum(torch.log(torch.exp(t).sum()) ** 2 for t in tokens) / len(layers)
    return {name: WEIGHTS[name] * total / count for name, total in totals.items()}


def one_case(name, kind, micro_batch, dtype, wanted):
    """Largest relative deviation of what was logged and of any gradient; the columns of the model."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    layout = Layout(Asked(ROWS, micro_batch, "fp32", "cpu", None, None))
    model = fresh_model(name, dtype)
    layout.prepare(Objective(model), optim.build(model, optim.OptimConfig()))
    share = ROWS // layout.world_size
    mine = whole_batch(kind).rows(layout.rank * share, (layout.rank + 1) * share)
    micro_batches = [mine.rows(i, i + micro_batch) for i in range(0, share, micro_batch)]
    view, usage, seen = StepView(1, layout, micro_batches), Usage(1), {}

    def before_update():
        seen.update({n: gradient.detach().double() for n, gradient in view.gradients()})

    forwards = around_forwards([usage], view)
    result = optimizer_step(layout, micro_batches, before_update=before_update, forwards=forwards)
    loss, parts, gradients = wanted
    assert result.auxiliary.keys() == parts.keys() and seen.keys() == gradients.keys()
    errors = [abs(result.loss.mean / loss - 1)]
    errors += [abs(result.auxiliary[n] / value - 1) for n, value in parts.items()]
    errors += [float((seen[n] - g).norm() / g.norm()) for n, g in gradients.items()]
    return str(layout), max(errors), dict(usage.after_step(view, {}))


def grid(names=("moe", "recalling"), kinds=("packed", "masked"), micro_batches=MICRO_BATCHES):
    """[{case, layout, float64, float32, columns}]; masked rows are uneven as well."""
    found = []
    for name in names:
        for kind in kinds:
            wanted = reference(name, kind)
            for micro_batch in micro_batches:
                layout, double, columns = one_case(name, kind, micro_batch, torch.float64, wanted)
                _, single, _ = one_case(name, kind, micro_batch, torch.float32, wanted)
                case = {"case": f"{name}, {kind}, micro-batch {micro_batch}", "layout": layout}
                found.append(case | {"float64": double, "float32": single, "columns": columns})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = grid(micro_batches=(1, 4))
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(cases), encoding="utf-8")
    torch.distributed.destroy_process_group()
