"""Watching a training step from outside: what enters the optimizer, and what should have.

The reference gradient is restated from scratch: one row at a time through the module, each target found by the double
loop of `probes.reference_loss`, the sum divided once by the number of targets of the whole step.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor.core import NotApplicable
from minilm.doctor.probes import (
    no_randomness,
    num_targets,
    quiet,
    random_states_kept,
    reference_loss,
    tokens_for,
)
from minilm.doctor.subject import Rows, Subject, Training

Vector = Mapping[str, Tensor]  # parameter name -> gradient (or weights)

NO_LIMIT = 1e9  # a clip norm that no gradient reaches
# Very uneven: whoever weights rows, micro-batches or ranks alike instead of targets is far off.
LENGTHS = (3, 2, 5, 4, 23, 11, 17, 24)


def takes(subject: Subject, keyword: str) -> bool:
    """May `subject.training` be called with this keyword?"""
    assert subject.training is not None
    parameters = inspect.signature(subject.training).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def start(subject: Subject, **asked: Any) -> Training:
    """A new training set-up, with those of the keywords that its owner takes."""
    assert subject.training is not None
    return subject.training(**{name: value for name, value in asked.items() if takes(subject, name)})


def inner_optimizer(training: Training) -> torch.optim.Optimizer | None:
    """The torch optimizer itself, out of the wrapper that a launcher may have put around it."""
    optimizer: Any = training.optimizer
    while optimizer is not None and not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are to be trained, by name, a tied one once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def uneven_rows(subject: Subject, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> Rows:
    """Eight rows of very different lengths, one document each, padded on the right."""
    longest = max(lengths)
    tokens = tokens_for(subject, len(lengths), longest, seed)
    if tokens.shape[1] < longest:
        raise NotApplicable(f"needs rows of {longest} tokens, the subject takes {tokens.shape[1]}")
    assert subject.vocab_size is not None
    known = [getattr(subject.tokenizer, "pad_id", None), *subject.special_ids, 0]
    pad = next(i for i in known if i is not None and 0 <= i < subject.vocab_size)
    return Rows.documents(
        [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)], pad, length=longest
    )


def even_rows(subject: Subject, rows: int = 4, length: int = 12, seed: int = 0) -> Rows:
    """Full rows of random tokens."""
    return Rows.whole(tokens_for(subject, rows, length, seed))


@dataclass(frozen=True)
class Update:
    """One call of the optimizer, as it came in."""

    gradients: dict[str, Tensor]  # float32 copies; a parameter without one is left out
    rates: list[float]  # of each parameter group


@dataclass(frozen=True)
class Step:
    """One training step, seen from outside."""

    logged: Mapping[str, float]
    updates: list[Update]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters."""
    return {name: p.detach().clone() for name, p in trainable(module).items()}


def watched_step(training: Training, micro_batches: list[Rows], *, weights: bool = True) -> Step:
    """Take a step, noting every call of the optimizer (its step hook) and the weights before and after."""
    updates: list[Update] = []
    named = trainable(training.module)

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = {n: p.grad.detach().float().clone() for n, p in named.items() if p.grad is not None}
        updates.append(Update(gradients, [float(group["lr"]) for group in optimizer.param_groups]))

    optimizer = inner_optimizer(training)
    handle = optimizer.register_step_pre_hook(note) if optimizer is not None else None
    before = weights_of(training.module) if weights else {}
    try:
        logged = training.step(micro_batches)
    finally:
        if handle is not None:
            handle.remove()
    return Step(logged or {}, updates, before, weights_of(training.module) if weights else {})


def logits_of(training: Training, rows: Rows) -> Tensor:
    """Through the training path; on the module's device."""
    if training.forward is None:
        raise NotApplicable("needs the forward pass of the training path (Training.forward)")
    device = next(training.module.parameters()).device
    return training.forward(training.module, rows.tokens.to(device), rows.segments.to(device))


def gradients_of(loss: Tensor, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """By name, float32; `.grad` is as before. Parameters that the loss does not depend on are left out."""
    try:
        parts = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        return {n: g.detach().float() for n, g in zip(named, parts, strict=True) if g is not None}
    except RuntimeError as error:
        if "heckpoint" not in str(error):  # reentrant checkpointing works with backward() only
            raise
    kept = {name: p.grad for name, p in named.items()}
    try:
        for p in named.values():
            p.grad = None
        loss.backward()
        return {n: p.grad.detach().float() for n, p in named.items() if p.grad is not None}
    finally:
        for name, p in named.items():
            p.grad = kept[name]


def reference_gradients(training: Training, rows: Rows) -> list[dict[str, Tensor]]:
    """The gradient of each row's summed nats at the present weights; `.grad` and random states are left alone."""
    named = trainable(training.module)
    found = []
    training.module.train()
    with random_states_kept(), no_randomness(training.module):
        for row in range(len(rows)):
            one = rows.take(slice(row, row + 1))
            found.append(gradients_of(reference_loss(logits_of(training, one), one), named))
    return found


def reference_gradient(training: Training, rows: Rows) -> dict[str, Tensor]:
    """The gradient of the mean over all targets of the rows, at once, at the present weights."""
    named = trainable(training.module)
    training.module.train()
    with random_states_kept(), no_randomness(training.module):
        loss = reference_loss(logits_of(training, rows), rows) / num_targets(rows)
        return gradients_of(loss, named)


def reference_mean(training: Training, rows: Rows) -> float:
    """Mean nats per target at the present weights, without dropout."""
    training.module.train()
    with torch.no_grad(), random_states_kept(), no_randomness(training.module):
        parts = [rows.take(slice(i, i + 1)) for i in range(len(rows))]
        nats = sum(float(reference_loss(logits_of(training, one), one)) for one in parts)
    return nats / num_targets(rows)


def mixture(weights: Sequence[float], parts: Sequence[Vector]) -> dict[str, Tensor]:
    """Sum of weights[k] * parts[k]."""
    total: dict[str, Tensor] = {}
    for weight, part in zip(weights, parts, strict=True):
        for name, value in part.items():
            term = value.double() * weight
            total[name] = total[name] + term if name in total else term
    return {name: value.float() for name, value in total.items()}


def dot(a: Vector, b: Vector) -> float:
    """Inner product in float64; what is missing on one side counts as zero."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a.keys() & b.keys())


def norm(a: Vector) -> float:
    """Length of the whole vector."""
    return math.sqrt(max(dot(a, a), 0.0))


def relative_error(a: Vector, expected: Vector) -> float:
    """|a - expected| / |expected|; inf where something is not finite."""
    names = a.keys() | expected.keys()
    square = 0.0
    for name in names:
        x, y = a.get(name), expected.get(name)
        gap = x.double() - y.double() if x is not None and y is not None else (x if y is None else y).double()
        square += float((gap * gap).sum())
    error = math.sqrt(square) / max(norm(expected), 1e-30) if math.isfinite(square) else math.inf
    return error


def shares(gradient: Vector, parts: Sequence[Vector]) -> tuple[list[float], float]:
    """The weights with which `parts` make up `gradient` best, and how much of it they leave unexplained (0 to 1)."""
    gram = torch.tensor([[dot(a, b) for b in parts] for a in parts], dtype=torch.float64)
    right = torch.tensor([dot(a, gradient) for a in parts], dtype=torch.float64)
    if not (torch.isfinite(gram).all() and torch.isfinite(right).all()):
        return [math.nan] * len(parts), math.inf
    weights = torch.linalg.lstsq(gram, right.unsqueeze(1), driver="gelsd").solution.squeeze(1).tolist()
    rest = mixture([1.0, *(-w for w in weights)], [gradient, *parts])
    return weights, norm(rest) / max(norm(gradient), 1e-30)


def fingerprint(*tensors: Tensor) -> str:
    """A hash of bits: equal for equal tensors only."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(str((value.dtype, tuple(value.shape))).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def fingerprint_of_rows(micro_batches: Sequence[Rows]) -> str:
    """A hash of what a step is given, however it is cut into micro-batches."""
    rows = [row for part in micro_batches for row in zip(part.tokens, part.segments, strict=True)]
    return fingerprint(*(tensor[segment > 0] for tensor, segment in rows))


def refuse_further_terms(subject: Subject, rows: Rows) -> None:
    """NotApplicable where training adds losses of the model's own: their gradient is in no row's cross entropy."""
    if subject.auxiliary is None:
        return
    with quiet(subject, redraw=None, train=True), torch.no_grad():
        further = [name for name, value in subject.auxiliary(rows).items() if bool(value.any())]
    if further:
        raise NotApplicable(
            f"its training loss has further terms ({', '.join(further)}), whose gradient is added"
        )
