"""Watchers: how checks and users' own code look at a step without touching the trainer.

A watcher is asked in each step whether it wants to see it. If so, it is called twice: when the whole gradient
is there and the weights are still the old ones, and after the update; what it returns then goes into the step's line
of metrics.jsonl. Every rank calls every watcher, so a watcher may use collectives.

A watcher that wants to see the forwards of the step has a method `around_forwards` besides (`SeesForwards`), and is
asked twice whether it wants a step. One that has a method `can_wait` (`CanWait`) does not always hold up the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from minilm.alignment import Batch
from minilm.training.layout import Layout


@dataclass(frozen=True)
class StepView:
    """One optimizer step, as a watcher sees it. `step` is the number that it will have in the log (from 1)."""

    step: int
    layout: Layout
    micro_batches: Sequence[Batch]  # of this rank, on the CPU

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        return self.layout.model

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole gradient of each parameter, averaged over the global batch, before clipping. Collective.

        There before the update only; a parameter without gradient is left out.
        """
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad if self.layout.engine is None else parameter.get_full_hp_grad()
            if gradient is not None:
                yield name, gradient

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 value of each parameter (ZeRO: the master copy). Collective."""
        for name, parameter in self.model.named_parameters():
            yield (
                name,
                parameter.detach() if self.layout.engine is None else parameter.get_full_hp_param().detach(),
            )


class Watcher(Protocol):
    """What the trainer calls. See the module's text."""

    def wants(self, step: int) -> bool: ...
    def before_update(self, view: StepView) -> None: ...
    def after_step(self, view: StepView, values: Mapping[str, Any]) -> Mapping[str, Any]: ...


@runtime_checkable
class SeesForwards(Protocol):
    """A watcher whose context is entered before the first forward of a step and left after its last backward."""

    def around_forwards(self, view: StepView) -> contextlib.AbstractContextManager[None]: ...


@runtime_checkable
class CanWait(Protocol):
    """A watcher with steps in which it reads nothing that the device computes: the device need not wait for it then.

    can_wait is asked after `wants`. Where it says so, after_step may come when the next step is under way: it gets the
    step's values, but must not look at weights, gradients or the model. Steps still come one after another.
    """

    def can_wait(self, step: int) -> bool: ...


@contextlib.contextmanager
def around_forwards(watchers: Sequence[Watcher], view: StepView) -> Iterator[None]:
    """The contexts of all watchers that have one and want the step, as one."""
    with contextlib.ExitStack() as stack:
        for watcher in watchers:
            if isinstance(watcher, SeesForwards) and watcher.wants(view.step):
                stack.enter_context(watcher.around_forwards(view))
        yield


class LayerNorms:
    """Norms of gradient, weights and update per layer, every `every` steps, from the first step on.

    Columns gradient_norm/LAYER, weight_norm/LAYER, update_norm/LAYER; a layer is a block or a part outside of the
    blocks. The update needs a copy of the weights for the time of the step.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._gradients: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}

    def wants(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    def before_update(self, view: StepView) -> None:
        self._gradients = _norms_by_layer(view.gradients())
        self._before = {name: value.clone() for name, value in view.weights()}

    def after_step(self, view: StepView, values: Mapping[str, Any]) -> Mapping[str, Any]:
        after = list(view.weights())
        update = ((name, value - self._before[name]) for name, value in after)
        columns = {
            "gradient_norm": self._gradients,
            "weight_norm": _norms_by_layer(after),
            "update_norm": _norms_by_layer(update),
        }
        self._before = {}
        return {f"{kind}/{layer}": norm for kind, norms in columns.items() for layer, norm in norms.items()}


def layer_of(name: str) -> str:
    """blocks.3.attention.qkv.weight -> blocks.3; embedding.weight -> embedding."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else parts[0]


def _norms_by_layer(tensors: Iterator[tuple[str, Tensor]] | Sequence[tuple[str, Tensor]]) -> dict[str, float]:
    squares: dict[str, Tensor] = {}
    for name, tensor in tensors:
        square = torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()
        layer = layer_of(name)
        squares[layer] = squares[layer] + square if layer in squares else square
    return {layer: float(total.sqrt()) for layer, total in squares.items()}
