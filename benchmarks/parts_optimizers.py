"""What `parts.py` measures of the end of a step: the norm of the gradient, clipping and the update of all weights.

As in `parts_cases.py` every way is held against a formula that is written here: over three steps whose gradients differ
in size and sign, as a share of how far the formula moves the weights. Each way has a model of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from parts_cases import FAILURES, STEP, Case, Shape, distance, reason, reference_model
from torch import Tensor, nn

from minilm.training import optim
from minilm.training.layout import Asked, Layout
from minilm.training.muon import COEFFICIENTS, ITERATIONS, matrices_of, stacked_in
from minilm.training.objective import Objective

CLIP = 1.0
_STEPS = (1.0, -0.5, 2.0)  # multiples of the gradient in the steps that are compared
# Of the distance that the weights move. AdamW divides small numbers by small numbers. Muon's iterations raise what
# rounding leaves in directions without a gradient by 3.4 each; on CUDA they run in bfloat16.
_ADAMW, _MUON, _MUON_CUDA = 1e-3, 1e-2, 0.2

Start = Callable[
    [nn.Module], Callable[[], None]
]  # a model -> one step with the gradients that its weights have


def optimizer_cases(shape: Shape) -> Iterator[Case]:
    """AdamW, Muon, the norm with clipping, and all that a step does after the backward pass."""
    model = reference_model(shape)
    count = sum(p.numel() for p in model.parameters())
    config = optim.OptimConfig()
    # AdamW reads weight, gradient and two moments and writes all but the gradient; clipping reads twice, writes once.
    update, clip = 28.0 * count, 12.0 * count
    ways: dict[str, Start] = {
        "minilm": functools.partial(_ours, config=config),
        "torch fused": functools.partial(_adamw, config=config, fused=True),
        "torch foreach": functools.partial(_adamw, config=config, foreach=True),
        "torch loop": functools.partial(_adamw, config=config, foreach=False, fused=False),
    }
    adamw = functools.partial(_formula, config=config, matrices=set())
    yield _case(shape, f"AdamW, {count} weights", ways, adamw, (0.0, update), "torch loop", _ADAMW)

    muon = optim.OptimConfig(name="muon")
    flops, own = _muon_work(model)
    ways = {
        "minilm": functools.partial(_ours, config=muon),
        "torch Muon, stacked matrices as one, bfloat16": functools.partial(_torch_muon, config=muon),
    }
    names = {name for name, p in model.named_parameters() if any(p is m for m in matrices_of(model))}
    wanted = functools.partial(_formula, config=muon, matrices=names)
    moved = 20.0 * own + 28.0 * (count - own)
    limit = _MUON_CUDA if shape.device.type == "cuda" else _MUON
    name = f"Muon, {own} of {count} weights"
    yield _case(shape, name, ways, wanted, (flops, moved), list(ways)[1], limit, unjudged=(list(ways)[1],))

    ways = {
        "minilm": functools.partial(_whole, config=config),
        "torch clip_grad_norm_, fused": functools.partial(_clipped, config=config, fused=True),
        "torch clip_grad_norm_, loop": functools.partial(_clipped, config=config, foreach=False, fused=False),
    }
    adamw = functools.partial(_formula, config=config, matrices=set(), clip=CLIP)
    name, plain = f"norm, clipping and AdamW, {count} weights", "torch clip_grad_norm_, loop"
    yield _case(shape, name, ways, adamw, (0.0, clip + update), plain, _ADAMW)


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Random gradients, the same for each model of a shape, with a norm of 3 to be clipped."""
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randn(p.shape, generator=generator).to(p.device) for p in model.parameters()]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in drawn))
    return [g * (3 / norm) for g in drawn]


def _case(
    shape: Shape,
    name: str,
    ways: dict[str, Start],
    formula: Callable[[nn.Module, Sequence[Sequence[Tensor]]], list[Tensor]],
    work: tuple[float, float],
    plain: str,
    tolerance: float,
    unjudged: tuple[str, ...] = (),
) -> Case:
    case = Case("optimizer", name, {STEP: work}, "minilm", plain, tolerance, unjudged=unjudged)
    case.calls = {STEP: {}}
    start = [p.detach().clone() for p in reference_model(shape).parameters()]
    gradients = gradients_of(reference_model(shape))
    wanted = formula(reference_model(shape), [[g * factor for g in gradients] for factor in _STEPS])
    far = torch.cat([(a - b.double()).flatten() for a, b in zip(wanted, start, strict=True)])
    for way, begin in ways.items():
        model = reference_model(shape)
        try:
            step = begin(model)
            for factor in _STEPS:
                _give(model, [g * factor for g in gradients])
                step()
        except FAILURES as error:
            case.absent[way] = reason(error)
            continue
        moved = [(p.detach().double() - b).flatten() for p, b in zip(model.parameters(), start, strict=True)]
        case.errors[way] = {"value": distance(torch.cat(moved), far)}
        # Clipping works in place: each way its own, and after the first call there is as much to do as before.
        case.calls[STEP][way] = functools.partial(_again, model, [g.clone() for g in gradients], step)
    return case


def _again(model: nn.Module, gradients: Sequence[Tensor], step: Callable[[], None]) -> None:
    _give(model, gradients)
    step()


def _give(model: nn.Module, gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient


# ---------------------------------------------------------------- the ways


def _ours(model: nn.Module, config: optim.OptimConfig) -> Callable[[], None]:
    optimizer = optim.build(model, config)
    return lambda: optimizer.step()


def _adamw(model: nn.Module, config: optim.OptimConfig, **how: bool) -> Callable[[], None]:
    parts = optim.groups(model.parameters(), config.weight_decay)
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(parts, lr=config.learning_rate, betas=betas, eps=config.eps, **how)
    return lambda: optimizer.step()


def _torch_muon(model: nn.Module, config: optim.OptimConfig) -> Callable[[], None]:
    matrices = matrices_of(model)
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(
        matrices,
        lr=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
    )
    betas = (config.beta1, config.beta2)
    parts = optim.groups(rest, config.weight_decay)
    adamw = torch.optim.AdamW(parts, lr=config.learning_rate, betas=betas, eps=config.eps)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def _whole(model: nn.Module, config: optim.OptimConfig) -> Callable[[], None]:
    """As the trainer does it, through its layout."""
    device = next(model.parameters()).device.type
    layout = Layout(Asked(1, None, "fp32", device, CLIP, 1))  # type: ignore[arg-type]
    layout.prepare(Objective(model), optim.build(model, config))
    return lambda: layout.step(layout.gradient_norm())


def _clipped(model: nn.Module, config: optim.OptimConfig, **how: bool) -> Callable[[], None]:
    update = _adamw(model, config, **how)

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=how.get("foreach"))
        update()

    return step


# ---------------------------------------------------------------- the formula and its floor


def _formula(
    model: nn.Module,
    steps: Sequence[Sequence[Tensor]],
    config: optim.OptimConfig,
    matrices: set[str],
    clip: float | None = None,
) -> list[Tensor]:
    """Weights in float64 after AdamW's or Muon's steps with these gradients, written as in the papers."""
    weights = [p.detach().double() for p in model.parameters()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    stacked = dict(stacked_in(model))
    for number, given in enumerate(steps, 1):
        gradients = [g.double() for g in given]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        gradients = [g * min(1.0, clip / norm) for g in gradients] if clip else gradients
        for at, (name, parameter) in enumerate(model.named_parameters()):
            gradient, decay = gradients[at], config.weight_decay if parameter.dim() >= 2 else 0.0
            if name in matrices:
                momentum, rate = config.muon_momentum, config.muon_learning_rate
                first[at] = momentum * first[at] + (1 - momentum) * gradient
                ahead = momentum * first[at] + (1 - momentum) * gradient
                rows = stacked.get(parameter, (parameter.shape[0],))
                change = torch.cat([_orthogonal(part) for part in ahead.split(rows)])
            else:
                rate = config.learning_rate
                first[at] = config.beta1 * first[at] + (1 - config.beta1) * gradient
                second[at] = config.beta2 * second[at] + (1 - config.beta2) * gradient.square()
                mean = first[at] / (1 - config.beta1**number)
                change = mean / ((second[at] / (1 - config.beta2**number)).sqrt() + config.eps)
            weights[at] = weights[at] * (1 - rate * decay) - rate * change
    return weights


def _orthogonal(matrix: Tensor) -> Tensor:
    """Muon's direction by eigenvalues: the iterations multiply each singular value by a number of its own."""
    rows, columns = matrix.shape
    x = matrix if rows <= columns else matrix.T
    x = x / x.norm()
    squares, vectors = torch.linalg.eigh(x @ x.T)
    a, b, c = COEFFICIENTS
    factors = torch.ones_like(squares)
    for _ in range(ITERATIONS):
        now = squares * factors.square()
        factors = factors * (a + b * now + c * now.square())
    x = (vectors * factors) @ vectors.T @ x
    return math.sqrt(max(1.0, rows / columns)) * (x if rows <= columns else x.T)


def _muon_work(model: nn.Module) -> tuple[float, int]:
    """(FLOPs, weights that are Muon's): five times two products of m x m x n and one of m x m x m."""
    stacked, flops, count = dict(stacked_in(model)), 0.0, 0
    for parameter in matrices_of(model):
        count += parameter.numel()
        for rows in stacked.get(parameter, (parameter.shape[0],)):
            m, n = sorted((rows, parameter.shape[1]))
            flops += ITERATIONS * (4.0 * m * m * n + 2.0 * m**3)
    return flops, count
