"""minilm: the step that a run takes (`optimizer_step`), over the objects that `minilm.launch` puts together."""

from __future__ import annotations

import functools

import torch

from contenders import POOL, Contender, Gate, Shape
from minilm import models
from minilm.alignment import Batch, align
from minilm.training import optim, passing, paths
from minilm.training.layout import Asked, Layout
from minilm.training.objective import Objective
from minilm.training.step import Unread, optimizer_step


def build(shape: Shape, *, compiled: bool = False, packed: bool = False) -> Contender:
    """compiled: train.compile; packed: rows of several documents, cut elsewhere in every batch."""
    settings = optim.OptimConfig()
    layout = Layout(Asked(shape.batch, None, shape.dtype, shape.device, settings.clip_norm, 1))  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = shape.config()
    model = models.build(config).to(layout.device)
    optimizer = optim.build(model, settings)
    chosen = paths.take(config, layout, compiled=compiled)
    passing.arrange(model, recompute="none", compiled=compiled)
    layout.prepare(Objective(model).train(), optimizer)
    rows, before = batches(shape, packed), list[Unread]()

    def may_wait() -> bool:
        """As the trainer: the numbers of a step are read when the next one is in the device's queue."""
        for unread in before:
            unread.read()
        before.clear()
        return layout.can_wait

    def run(gate: Gate) -> None:
        while gate.wait():
            found = optimizer_step(layout, [rows[gate.step % POOL]], may_wait=may_wait)
            if isinstance(found, Unread):
                before.append(found)
                gate.done(functools.partial(_loss, found))
            else:
                gate.done(found.loss.mean)

    about = "the step of a run: AdamW, matrices decay, clipped at 1.0, loss of every step read; "
    about += ", ".join(f"{part}: {way}" for part, way in chosen.items())
    if packed:
        about += "; a row holds 4 documents, which do not see each other"
    return Contender(about, config.num_parameters(), flops_per_token(shape, rows), run)


def flops_per_token(shape: Shape, rows: list[Batch]) -> float:
    """As the model's config counts them for a row of one document, less the keys that documents do not share."""
    config = shape.config()
    unseen = (shape.length + 1) / 2 - torch.cat([batch.positions for batch in rows]).add(
        1
    ).double().mean().item()
    return config.training_flops_per_token(shape.length) - 12 * config.num_layers * config.dim * unseen


def _loss(unread: Unread) -> float:
    return unread.read().loss.mean


def batches(shape: Shape, packed: bool) -> list[Batch]:
    """The rows of all contenders, as the loader would hand them over."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for tokens in shape.tokens():
        segments = torch.ones_like(tokens)
        if packed:
            borders = torch.randint(1, shape.length, (shape.batch, 3), generator=generator)
            places = torch.arange(shape.length + 1)
            segments = 1 + (places >= borders.unsqueeze(-1)).sum(1)  # [batch, length + 1]
        found.append(align(tokens, segments))
    return found
