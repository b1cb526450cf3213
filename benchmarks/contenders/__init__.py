"""Who takes part in `training_step.py`: one training step each of somebody's model in somebody's loop.

Each runs in a process of its own (`contender.py`), where its module's `build(shape, ...)` makes a `Contender`. All are
given the same tokens in the same order. What they have in common is here: the shape of the work, the plain loop, and
the count of floating point operations, which is the same formula for everybody.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minilm import models
from minilm.models.original import OriginalConfig

Loss = Tensor | float | Callable[[], float]
POOL = 16  # different batches, taken in turn


@dataclass(frozen=True)
class Shape:
    """The work of one step, the same for all contenders."""

    size: str  # of model original
    head_size: int
    batch: int  # rows
    length: int  # tokens of a row
    device: str  # cpu or cuda
    dtype: str  # fp32, or bf16: autocast over float32 weights
    threads: int | None  # of torch on a CPU
    peers: str | None = None  # folder with the code of others

    def config(self) -> OriginalConfig:
        """Model original of this size, its heads cut anew into `head_size`, as many to a key/value head as before."""
        known = models.preset("original", self.size)
        heads, shared = known.dim // self.head_size, known.num_heads // known.num_kv_heads
        changed = {"num_heads": heads, "num_kv_heads": max(1, heads // shared)}
        config: OriginalConfig = dataclasses.replace(
            known, **changed, max_length=max(known.max_length, self.length)
        )
        return config

    def tokens(self) -> list[Tensor]:
        """`POOL` batches [batch, length + 1] of random tokens: the time of a step does not depend on which they are."""
        generator = torch.Generator().manual_seed(1)
        shape, vocab_size = (self.batch, self.length + 1), self.config().vocab_size
        return [torch.randint(vocab_size, shape, generator=generator) for _ in range(POOL)]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The same as (inputs, targets) [batch, length] each: targets[b, i] is the token after inputs[b, i]."""
        return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in self.tokens()]

    def autocast(self) -> AbstractContextManager[Any]:
        """What a forward pass in this precision runs in."""
        if self.dtype == "bf16":
            return torch.autocast(self.device, torch.bfloat16)
        return contextlib.nullcontext()


class Gate(Protocol):
    """Where a contender waits for its turn."""

    step: int  # steps that were taken

    def wait(self) -> bool:
        """Until the next step may be taken; False: no more."""

    def done(self, loss: Loss) -> None:
        """The step was taken, with this loss, which is read when nobody is timed."""


@dataclass
class Contender:
    """Ready to train. `run(gate)` takes a step whenever the gate lets it."""

    about: str  # what is used: optimizer, loss, what is unlike the others
    parameters: int
    flops_per_token: float  # of a training step: forward and backward
    run: Callable[[Gate], None] = field(repr=False)


def plain_loop(
    shape: Shape,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    *,
    clip: float | None,
    autocast: bool = True,
) -> Callable[[Gate], None]:
    """The loop that most training scripts have: forward, backward, clip, optimizer, zero_grad.

    loss_of   (inputs, targets) on the device -> scalar loss
    autocast  False for a model that sees to its precision itself
    """
    pairs = shape.pairs()

    def run(gate: Gate) -> None:
        while gate.wait():
            inputs, targets = (x.to(shape.device, non_blocking=True) for x in pairs[gate.step % POOL])
            with shape.autocast() if autocast else contextlib.nullcontext():
                loss = loss_of(inputs, targets)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            gate.done(loss.detach())

    return run


def training_flops(model: nn.Module, *, num_layers: int, width: int, length: int) -> float:
    """Floating point operations of a training step per token, counted alike for every model.

    Six per weight of every linear layer (two for each of the three products with it; a tied output layer counts) and
    12 x `width` of the queries per layer and attended key, of which a causal row has (length + 1) / 2 on average.
    """
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    return 6.0 * weights + 12.0 * num_layers * width * (length + 1) / 2


def count(model: nn.Module) -> int:
    """Parameters; a tied matrix once."""
    return sum(p.numel() for p in model.parameters())


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """AdamW's usual two groups, as minilm has them: matrices decay by 0.1, norms and biases do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


@dataclass(frozen=True)
class Entry:
    """One line of the comparison."""

    label: str
    module: str  # of this package
    options: dict[str, Any] = field(default_factory=dict)  # for its `build`
    environment: dict[str, str] = field(default_factory=dict)
    folder: str | None = None  # within the user's folder of peers
    same_weights: bool = (
        False  # begins with the weights of minilm, on the same rows: its losses must be equal
    )


# glibc then keeps freed memory instead of handing it back and having every page of it cleared again.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
PLAIN = "transformers"  # what others are told as multiples of


def entries() -> dict[str, Entry]:
    """Name -> contender, in the order of the table."""
    return dict(_ours()) | dict(_transformers()) | dict(_peers())


def _ours() -> Iterator[tuple[str, Entry]]:
    for compiled in (False, True):
        how, tail = ("compiled", "-compiled") if compiled else ("eager", "")
        yield (
            f"minilm{tail}",
            Entry(f"minilm, {how}", "ours", {"compiled": compiled}, same_weights=True),
        )
    for compiled in (False, True):
        how, tail = ("compiled", "-compiled") if compiled else ("eager", "")
        yield (
            f"minilm-packed{tail}",
            Entry(
                f"minilm, {how}, rows of several documents", "ours", {"compiled": compiled, "packed": True}
            ),
        )


def _transformers() -> Iterator[tuple[str, Entry]]:
    module = "huggingface"
    yield PLAIN, Entry("transformers, plain loop, eager", module, same_weights=True)
    label = "transformers, plain loop, compiled"
    yield f"{PLAIN}-compiled", Entry(label, module, {"compiled": True}, same_weights=True)
    yield f"{PLAIN}-trainer", Entry("transformers, Trainer", module, {"trainer": True}, same_weights=True)
    label = "transformers, plain loop, eager, malloc settings"
    yield f"{PLAIN}-malloc", Entry(label, module, environment=MALLOC, same_weights=True)


def _peers() -> Iterator[tuple[str, Entry]]:
    for folder in ("nanoGPT", "nanochat", "litgpt", "minimind"):
        for compiled in (False, True):
            how, tail = ("compiled", "-compiled") if compiled else ("eager", "")
            options = {"name": folder, "compiled": compiled}
            yield folder.lower() + tail, Entry(f"{folder}, {how}", "peers", options, folder=folder)
    options = {"name": "litgpt", "compiled": False}
    yield "litgpt-malloc", Entry("litgpt, eager, malloc settings", "peers", options, MALLOC, "litgpt")
