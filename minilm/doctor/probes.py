"""Measurements that checks share: quiet surroundings, differences, an independent loss, and finding the culprit."""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm.doctor.core import NotApplicable
from minilm.doctor.subject import Rows, Subject

# Healthy float32 noise is below 5e-6 of the logits' deviation over 499 pairs of class and version of transformers;
# the weakest confirmed bug there moved them by 0.05.
FLOAT32_NOISE = 1e-4
USUAL_STD = 0.1  # of redrawn weights
RANDOM_FLOATS = re.compile(r"drop|jitter|noise", re.IGNORECASE)  # what makes a training forward random


@contextlib.contextmanager
def random_states_kept(seed: int | None = None) -> Iterator[None]:
    """Random generators (torch, numpy, python) as before, afterwards; seeded with `seed` inside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def untouched(subject: Subject, seed: int = 0) -> Iterator[None]:
    """Whatever happens inside, the subject's weights, buffers, gradients, modes and all random states come back."""
    module = subject.module
    if module is None:
        with random_states_kept(seed):
            yield
        return
    modes = [(m, m.training) for m in module.modules()]
    tensors = [*module.parameters(), *module.buffers()]
    spare = subject.spare.setdefault(("copies", id(module)), [])
    kept = list(zip(tensors, _copied(tensors, spare.pop() if spare else None), strict=True))
    gradients = [(p, p.grad) for p in module.parameters()]
    types = [(t, t.dtype) for t, _ in kept]
    buffers = [(m, dict(m._buffers)) for m in module.modules()]  # a cast puts new tensors in their place
    try:
        with random_states_kept(seed):
            yield
    finally:
        for part, held in buffers:
            part._buffers.update(held)
        with torch.no_grad():
            for (tensor, value), (_, dtype) in zip(kept, types, strict=True):
                if tensor.dtype != dtype:
                    tensor.data = value
                elif not torch.equal(tensor, value):
                    tensor.data.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for part, training in modes:
            part.training = training
        if all(
            tensor.dtype == dtype for tensor, dtype in types
        ):  # else a copy is in use as the tensor itself
            spare.append([value for _, value in kept])


@torch.no_grad()
def _copied(tensors: list[Tensor], into: list[Tensor] | None) -> list[Tensor]:
    """Copies, in memory of an earlier time where it fits: fresh memory costs several times what copying does."""
    if into is None or [t.shape for t in into] != [t.shape for t in tensors]:
        return [t.detach().clone() for t in tensors]
    return [
        old.copy_(t) if old.dtype == t.dtype else t.detach().clone()
        for old, t in zip(into, tensors, strict=True)
    ]


@contextlib.contextmanager
def quiet(
    subject: Subject, *, redraw: float | None = USUAL_STD, train: bool = False, seed: int = 0
) -> Iterator[None]:
    """Surroundings for parity: float32, no dropout, one mode, the same seed, and weights that let bugs show.

    redraw  weights with two or more dimensions are drawn from N(0, redraw^2): at a usual initialisation (0.02) the
            logits are so small that real leaks hide in them. None: the weights as they are.
    train   the mode
    Everything is put back afterwards.
    """
    module = subject.module
    with untouched(subject, seed), no_randomness(module), torch.autocast("cpu", enabled=False):
        if module is not None:
            module.float()
            if redraw is not None:
                _redrawn(subject, module, redraw, seed)
            module.train(train)
        yield


@torch.no_grad()
def _redrawn(subject: Subject, module: nn.Module, std: float, seed: int) -> None:
    """`redraw_weights`, from what was drawn before with the same numbers: most checks use the same weights."""
    parameters = list(module.parameters())
    key = ("drawn", id(module), std, seed)
    known = subject.spare.get(key)
    if known is not None and [t.shape for t in known] == [p.shape for p in parameters]:
        for parameter, value in zip(parameters, known, strict=True):
            parameter.copy_(value)
        return
    redraw_weights(module, std, seed)
    if std == USUAL_STD:  # one set is kept, for the memory's sake
        subject.spare[key] = [p.detach().clone() for p in parameters]


def redraw_weights(module: nn.Module, std: float, seed: int = 0) -> None:
    """Draw each weight with two or more dimensions from N(0, std^2), in place; vectors are left alone, but those that
    are all zero: a gate that starts at zero hides what is behind it. A table that is kept as a parameter and not
    trained (sines of positions, in RoFormer, Marian and Pegasus) means what it holds, and keeps it."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in module.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained or module.parameters():
            if parameter.is_floating_point() and (parameter.dim() >= 2 or not bool(parameter.any())):
                values = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(values.to(parameter.device, parameter.dtype))


@contextlib.contextmanager
def no_randomness(module: nn.Module | None) -> Iterator[None]:
    """Every float attribute that is named like a dropout, jitter or noise is 0 inside."""
    changed: list[tuple[Any, str, float]] = []
    for part in module.modules() if module is not None else ():
        names = [n for n, v in vars(part).items() if isinstance(v, float) and v and RANDOM_FLOATS.search(n)]
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p:
            names.append("p")
        for name in dict.fromkeys(names):
            changed.append((part, name, getattr(part, name)))
            setattr(part, name, 0.0)
    try:
        yield
    finally:
        for part, name, value in changed:
            setattr(part, name, value)


def tokens_for(subject: Subject, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token rows [rows, at most length] without special ids. NotApplicable where it cannot be known which."""
    if subject.vocab_size is None:
        raise NotApplicable("needs the size of the vocabulary")
    if subject.max_length is not None:
        length = min(length, subject.max_length)
    ordinary = [i for i in range(subject.vocab_size) if i not in set(subject.special_ids)]
    if len(ordinary) < 2:
        raise NotApplicable(
            f"a vocabulary of {subject.vocab_size} ids with {len(subject.special_ids)} special ones"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (rows, length), generator=generator)]


def other_token(subject: Subject, token: int) -> int:
    """An ordinary id that is not `token`."""
    assert subject.vocab_size is not None
    step = max(1, subject.vocab_size // 2)
    for offset in range(step, step + subject.vocab_size):
        candidate = (token + offset) % subject.vocab_size
        if candidate != token and candidate not in subject.special_ids:
            return candidate
    raise NotApplicable("needs two ordinary token ids")


def difference(a: Tensor, b: Tensor, scale: Tensor | None = None) -> float:
    """max |a - b| in units of the standard deviation of `scale` (or a); inf where one of them is not finite."""
    if a.shape != b.shape:
        raise NotApplicable(f"the two results have shapes {list(a.shape)} and {list(b.shape)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    if a.numel() == 0:
        return 0.0
    unit = float((a if scale is None else scale).double().std())
    return float((a.double() - b.double()).abs().max()) / max(unit, 1e-12)


def reference_nats(logits: Tensor, rows: Rows) -> tuple[float, int]:
    """Summed nats and number of targets, restated from scratch: a slow double loop in float64.

    Token i + 1 of a row is a target of position i when both belong to the same document and it is to be learnt.
    """
    logits = logits.detach().double().cpu()
    nats, count = 0.0, 0
    num_rows, length = rows.tokens.shape
    for b in range(num_rows):
        for i in range(length - 1):
            same = int(rows.segments[b, i]) == int(rows.segments[b, i + 1]) > 0
            if same and bool(rows.learn[b, i + 1]):
                here = logits[b, i]
                nats += float(torch.logsumexp(here, 0) - here[int(rows.tokens[b, i + 1])])
                count += 1
    return nats, count


def reference_loss(logits: Tensor, rows: Rows) -> Tensor:
    """Summed nats as a differentiable float64 tensor: the same rule as `reference_nats`, position by position."""
    parts = []
    num_rows, length = rows.tokens.shape
    log_p = logits.double().log_softmax(-1)
    for b in range(num_rows):
        for i in range(length - 1):
            if int(rows.segments[b, i]) == int(rows.segments[b, i + 1]) > 0 and bool(rows.learn[b, i + 1]):
                parts.append(-log_p[b, i, int(rows.tokens[b, i + 1])])
    return torch.stack(parts).sum() if parts else logits.double().sum() * 0


def num_targets(rows: Rows) -> int:
    """How many tokens of the rows are targets, by the rule of `reference_nats`."""
    count = 0
    for segments, learn in zip(rows.segments.tolist(), rows.learn.tolist(), strict=True):
        count += sum(s == t > 0 and w for s, t, w in zip(segments, segments[1:], learn[1:], strict=False))
    return count


def record(module: nn.Module, run: Callable[[], Any]) -> list[tuple[str, Tensor | None, Tensor]]:
    """(name, first input, first output) of every submodule during `run`, in the order in which they finished."""
    seen: list[tuple[str, Tensor | None, Tensor]] = []

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, given: Any, output: Any) -> None:
            tensor, source = next(_tensors(output), None), next(_tensors(given), None)
            if tensor is not None:
                seen.append(
                    (name, None if source is None else source.detach().clone(), tensor.detach().clone())
                )

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in module.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def culprit(
    module: nn.Module | None,
    one: Callable[[], Any],
    other: Callable[[], Any],
    broken: Callable[[Tensor, Tensor], bool],
) -> str:
    """The first submodule, in the order of computation, whose outputs stand in a relation they must not, while its
    inputs do not: the defect is inside of it. "" where there is no module to look into, or none stands out.

    broken(a, b)  are these two tensors of the two runs (of equal shape) in a relation they must not be in
    """
    if module is None:
        return ""

    def wrong(a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None or a.shape != b.shape or not a.is_floating_point():
            return False
        return broken(a, b)

    for (name, given, made), (again, given_again, made_again) in zip(
        record(module, one), record(module, other), strict=False
    ):
        if name != again:
            return f"{described(module, name)}, after which the two runs take different ways"
        if wrong(made, made_again) and not wrong(given, given_again):
            return described(module, name)
    return ""


def described(module: nn.Module, name: str) -> str:
    """`layers.1.attention (Attention)`: a submodule's name with its class."""
    return f"{name or 'the whole model'} ({type(module.get_submodule(name)).__name__})"


def worst_name(values: dict[str, float]) -> str:
    """The key with the largest value."""
    return max(values, key=lambda name: values[name])


def factor_between(measured: float, expected: float, known: dict[str, float], rel: float = 1e-3) -> str:
    """Names the factor measured / expected if it is one of the `known` ones (name -> value), else empty."""
    if not expected:
        return ""
    for name, value in known.items():
        if math.isclose(measured / expected, value, rel_tol=rel) and not math.isclose(
            value, 1.0, rel_tol=rel
        ):
            return name
    return ""


def first_tensor(output: Any, least_dims: int = 0) -> Tensor | None:
    """The first floating-point tensor with that many dimensions in what a module returned or was given.

    Looked for in the thing itself, a tuple, a dict, or an object's fields; a loss may stand before the logits.
    """
    return next((t for t in _tensors(output) if t.is_floating_point() and t.dim() >= least_dims), None)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, dict):
        output = list(output.values())
    elif not isinstance(output, Sequence) and hasattr(output, "__dict__"):
        output = list(vars(output).values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        yield from (t for t in output if isinstance(t, Tensor))
