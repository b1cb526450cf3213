"""Whole updates on every layout: clipping, master weights, the bytes of the sharded state. See exactness_worker.

Every update goes through the real layout (Accelerate, DDP, DeepSpeed) and is compared with torch.optim.AdamW in
float64 on gradients that plain loops computed.
"""

from __future__ import annotations

import functools
import itertools

import torch
from exactness_worker import KINDS, backward_of_reference, fresh_model, micro_batches_of, new_layout, scaled
from torch import nn

from minilm.training import optim
from minilm.training.objective import Objective
from minilm.training.state import full_weights, optimizer_state
from minilm.training.step import optimizer_step

CLIPS = (0.05, 0.3, None)  # the norms of the gradients are between 0.4 and 2
# AdamW hides the size of a gradient in its first step. A large epsilon lets it through: the update is nearly the rate
# times the gradient, and three unlike steps make the moments matter, too.
BIG_STEPS = {"learning_rate": 0.05, "eps": 1.0, "weight_decay": 0.0}
# Weights near 1 lie 2^-8 or 2^-7 apart in bf16: twenty steps of 1e-5 together are less than half of that.
SMALL_STEPS = {"learning_rate": 1e-5, "eps": 1e-3, "weight_decay": 0.0, "clip_norm": None}
NUM_SMALL_STEPS = 20


def updates(kind):
    """Everything of this file for the layout that was launched."""
    return {
        "clipping": {str(clip): clipped(clip) for clip in CLIPS},
        "planted clipping": {
            "ignored": clipped(0.3, layout_clip=None),
            "each micro-batch": clipped(0.3, plant=clip_each_micro_batch),
            "each rank": clipped(
                0.3, micro_batch=None, plant=clip_each_micro_batch
            ),  # of one rank: not wrong
        },
        "masters": {"right": masters()},
        "planted masters": {
            "rounded": masters(plant=round_masters),
            "model.bfloat16()": masters_of_plain_bf16(),
        },
        "bytes": state_bytes() if kind == "zero" else {},
    }


# ------------------------------------------------------------------ clipping


@functools.cache
def expected_after_clipping(clip):
    """Weights after one step on each kind of rows: float64, torch's AdamW, torch's clip on the whole gradient."""
    model = fresh_model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
    for kind in KINDS:
        optimizer.zero_grad()
        backward_of_reference(model, kind)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def clipped(clip, *, layout_clip="the same", micro_batch=2, plant=None):
    """Three steps with this clip; relative distance of the whole update to what each clip should give."""
    layout = new_layout(micro_batch, clip=clip if layout_clip == "the same" else layout_clip)
    model = fresh_model()
    start = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    config = optim.OptimConfig(**BIG_STEPS)
    layout.prepare(Objective(model), optim.build(model, config))
    norms = []
    for kind in KINDS:
        micro_batches = micro_batches_of(layout, kind)
        if plant is not None:
            plant(layout, micro_batches, clip)
        norms.append(optimizer_step(layout, micro_batches).gradient_norm)
    weights = full_weights(layout)
    moved = {name: weights[name].double() - value for name, value in start.items()}
    expected = {
        str(other): {name: value - start[name] for name, value in expected_after_clipping(other).items()}
        for other in CLIPS
    }
    found = {f"from {other}": distance(moved, wanted) for other, wanted in expected.items()}
    return found | {"smallest_norm": min(norms)}


def clip_each_micro_batch(layout, micro_batches, clip):
    """Planted: every contribution is clipped on its own. With one micro-batch a rank: every rank on its own."""
    twin = fresh_model()  # looks at the gradients in advance, without touching the hooks of DDP and DeepSpeed
    twin.load_state_dict(full_weights(layout))
    total = layout.all_reduce([sum(float(b.num_targets()) for b in micro_batches)])[0]
    factors = []
    for batch in micro_batches:
        twin.zero_grad()
        (Objective(twin)(batch)[0].share(total) * layout.world_size).backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in twin.parameters()]))
        factors.append(min(1.0, clip / max(norm, 1e-12)))
    layout.backward = functools.partial(type(layout).backward, layout)
    scaled(layout, micro_batches, factors.__getitem__)


# ------------------------------------------------------------------ master weights


@functools.cache
def expected_small_steps():
    model = fresh_model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    for kind in itertools.islice(itertools.cycle(KINDS), NUM_SMALL_STEPS):
        optimizer.zero_grad()
        backward_of_reference(model, kind)
        optimizer.step()
    start = dict(fresh_model().double().named_parameters())
    return {name: (p - start[name]).detach() for name, p in model.named_parameters()}


def masters(plant=None):
    """Small steps under bf16: how much of the expected update of the weights that are 1 arrived, and the types."""
    layout = new_layout(4, "bf16", clip=None)
    model = fresh_model()
    config = optim.OptimConfig(**SMALL_STEPS)
    layout.prepare(Objective(model), optim.build(model, config))
    if plant is not None:
        plant(layout)
    for kind in itertools.islice(itertools.cycle(KINDS), NUM_SMALL_STEPS):
        optimizer_step(layout, micro_batches_of(layout, kind))
    weights, state = full_weights(layout), optimizer_state(layout)
    held = master_weights(layout)
    types = {str(x.dtype) for x in (*weights.values(), *state.tensors.values(), *held)}
    return arrived(weights) | {"types": sorted(types)}


def master_weights(layout):
    """The tensors that the optimizer updates."""
    if layout.engine is not None:
        return layout.engine.optimizer.single_partition_of_fp32_groups
    return [p for group in layout.optimizer.param_groups for p in group["params"]]


def arrived(weights):
    """Share of the expected update that the weights have made, and their distance from it; of the norms (all are 1
    at the start) and of all weights."""
    start = dict(fresh_model().double().named_parameters())
    wanted = expected_small_steps()
    moved = {name: weights[name].detach().double() - start[name].detach() for name in wanted}
    found = {}
    for group, names in (("ones", [n for n in wanted if "norm" in n]), ("all", list(wanted))):
        have = torch.cat([moved[name].flatten() for name in names])
        want = torch.cat([wanted[name].flatten() for name in names])
        found[f"share_{group}"] = float(have @ want / (want @ want))
        found[f"distance_{group}"] = float((have - want).norm() / want.norm())
    found["largest"] = max(float(value.abs().max()) for value in wanted.values())
    return found


def round_masters(layout):
    """Planted: what the optimizer updates is kept in bf16."""
    step = layout.step

    def planted(norm):
        step(norm)
        with torch.no_grad():
            for tensor in master_weights(layout):
                tensor.copy_(tensor.bfloat16())

    layout.step = planted


def masters_of_plain_bf16():
    """Planted: model.bfloat16() and an optimizer over its parameters, without any layout."""
    layout = new_layout(None, "bf16", clip=None)
    model = fresh_model().bfloat16()
    optimizer = optim.build(model, optim.OptimConfig(**SMALL_STEPS))
    objective = Objective(model)
    for kind in itertools.islice(itertools.cycle(KINDS), NUM_SMALL_STEPS):
        optimizer.zero_grad()
        parts = [objective(batch)[0] for batch in micro_batches_of(layout, kind)]
        total = layout.all_reduce([sum(float(part.tokens) for part in parts)])[0]
        sum(part.share(total) for part in parts).backward()
        for parameter in model.parameters():
            if layout.world_size > 1:
                torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
    return arrived({name: p.detach() for name, p in model.named_parameters()})


# ------------------------------------------------------------------ memory


def state_bytes():
    """Bytes of this rank's part of the state, added up from the engine's tensors, after a step."""
    layout = new_layout(2, "bf16")
    model = fresh_model()
    layout.prepare(Objective(model), optim.build(model, optim.OptimConfig()))
    found = {"num_parameters": sum(p.numel() for p in model.parameters())}

    def before_update():
        found["gradients"] = size(g for parts in shards(layout).values() for g in parts or ())

    optimizer_step(layout, micro_batches_of(layout, "packed"), before_update=before_update)
    found["weights"] = size(layout.model.parameters())
    found["masters"] = size(master_weights(layout))
    states = layout.engine.optimizer.optimizer.state.values()
    found["moments"] = size(x for state in states for name, x in state.items() if name != "step")
    return found


def shards(layout):
    return layout.engine.optimizer.averaged_gradients


def size(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def distance(found, wanted):
    """Relative, over all parameters together."""
    have = torch.cat([found[name].flatten() for name in wanted])
    want = torch.cat([value.flatten() for value in wanted.values()])
    return float((have - want).norm() / want.norm())
