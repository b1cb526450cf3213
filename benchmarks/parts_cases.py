"""What `parts.py` measures: each part of a step in several ways, with a formula that all must agree with and its floor.

A `Case` is one part at one shape. Its ways are minilm's public functions and modules as the trainer calls them, plain
torch, and where it is a candidate the plain formula compiled. The formula that they are held against is written here
and shares no code with them. What cannot run is not left out: it is named with its reason.

The floor counts, for arithmetic, the products that the mathematics asks for (a backward pass twice those of the
forward pass, nothing computed again), and for memory every input and every result once: whoever is faster than that
has left something out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm import models, onednn
from minilm.alignment import align, score_hidden
from minilm.errors import ConfigError
from minilm.models import parts
from minilm.models.base import ModelConfig

FORWARD, BOTH, STEP = "forward", "forward + backward", "step"
# Largest distance from the formula, as a share of its size: rounding, and sums in another order.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
CHUNKS = (256, 1024, 4096)
FAILURES = (RuntimeError, ImportError, ConfigError, NotImplementedError)

Way = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """Where and at which size: rows x length tokens, a model of this config, its width kept for every head size."""

    rows: int
    length: int
    config: ModelConfig
    head_sizes: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    compiled: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def randn(self, *sizes: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        """Drawn on the CPU from torch's generator, so that every device gets the same numbers."""
        drawn = (torch.randn(*sizes) * scale).to(self.device, self.dtype)
        return drawn.requires_grad_(grad)


@dataclass
class Case:
    """A part at one shape, ready to be timed.

    calls   pass -> way -> call
    work    pass -> (FLOPs, bytes that must move)
    errors  way -> {"value", "gradient"}: distance from the formula, as a share of its size
    absent  way -> why it cannot run here
    ours    the way that minilm takes by itself
    plain   the way that plain torch takes
    judged  ways that must agree; others compute something else, which their name says
    """

    part: str
    name: str
    work: dict[str, tuple[float, float]]
    ours: str
    plain: str
    tolerance: float
    calls: dict[str, dict[str, Callable[[], object]]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    unjudged: tuple[str, ...] = ()

    def disagreeing(self) -> list[str]:
        """Ways whose values or gradients are not those of the formula; a NaN disagrees, too."""
        judged = {way: found for way, found in self.errors.items() if way not in self.unjudged}
        return [way for way, found in judged.items() if not _all_within(found.values(), self.tolerance)]


def _all_within(distances: Iterable[float], limit: float) -> bool:
    return all(distance <= limit for distance in distances)  # a NaN is not


def differentiable(
    case: Case,
    inputs: Sequence[Tensor],
    ways: Mapping[str, Way],
    formula: Way,
    *,
    upstream: float | None = None,
) -> Case:
    """`case` with the calls of functions of `inputs`, which are leaves; each is held against the formula first.

    upstream  gradient of a scalar result; a tensor gets random numbers
    """
    wanted = formula(*inputs)
    if upstream is None:
        down = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).to(wanted.device)
    else:
        down = torch.full_like(wanted, upstream)
    right = (wanted, *torch.autograd.grad(wanted, inputs, down.to(wanted.dtype)))
    right = tuple(x.detach() for x in right)
    case.calls = {FORWARD: {}, BOTH: {}}
    for name, way in ways.items():
        forward, both = _forward(way, inputs), _both(way, inputs, down)
        try:
            # Without a graph, too: fast paths may be other ones there, and what compiles does it now.
            found, alone = both(), forward()
        except FAILURES as error:
            case.absent[name] = reason(error)
            continue
        value, *gradients = (distance(x, y) for x, y in zip(found, right, strict=True))
        values = torch.tensor([value, distance(alone, right[0])])
        case.errors[name] = {"value": float(values.max()), "gradient": float(torch.tensor(gradients).max())}
        case.calls[FORWARD][name], case.calls[BOTH][name] = forward, both
    return case


def _forward(way: Way, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return way(*inputs)

    return call


def _both(way: Way, inputs: Sequence[Tensor], down: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        found = way(*inputs)
        return found.detach(), *torch.autograd.grad(found, inputs, down.to(found.dtype))

    return call


def distance(found: Tensor, wanted: Tensor) -> float:
    """Of two tensors, as a share of the size of the second."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-300))


def reason(error: BaseException) -> str:
    """One line of an error; ours say what they are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else "no message"
    return (first if isinstance(error, ConfigError) else f"{type(error).__name__}: {first}")[:300]


def _compiled(shape: Shape, way: Way, case: Case, name: str) -> dict[str, Way]:
    if shape.compiled:
        return {name: torch.compile(way, dynamic=False)}
    case.absent[name] = "nothing is compiled with --no-compile or --quick"
    return {}


# ---------------------------------------------------------------- loss head


def head_cases(shape: Shape) -> Iterator[Case]:
    """The output layer with its loss, some positions at a time against the whole logits."""
    width, vocabulary = shape.config.dim, shape.config.vocab_size
    tokens = torch.randint(vocabulary, (shape.rows, shape.length + 1))
    batch = align(tokens, torch.ones_like(tokens)).to(shape.device)
    hidden = shape.randn(shape.rows, shape.length, width)
    table = shape.randn(vocabulary, width, scale=0.02)
    count = shape.tokens

    def whole(hidden: Tensor, table: Tensor) -> Tensor:
        logits = (hidden @ table.T).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")

    def formula(hidden: Tensor, table: Tensor) -> Tensor:
        logits = hidden.float() @ table.float().T
        wanted = logits.gather(2, batch.targets.unsqueeze(2)).squeeze(2)
        return (logits.logsumexp(dim=2) - wanted).sum()

    def chunked(hidden: Tensor, table: Tensor, **given: int) -> Tensor:
        return score_hidden(hidden, table, batch, **given).nats

    ways: dict[str, Way] = {"minilm": chunked}
    ways |= {f"minilm, {chunk} at a time": functools.partial(chunked, chunk=chunk) for chunk in CHUNKS}
    ways["torch, whole logits"] = whole
    once, read = 2.0 * count * width * vocabulary, hidden.nbytes + table.nbytes
    work = {FORWARD: (once, float(read)), BOTH: (3 * once, 2.0 * read)}
    name = f"{count} positions, vocabulary {vocabulary}"
    case = Case("loss head", name, work, "minilm", "torch, whole logits", TOLERANCES[shape.dtype])
    yield differentiable(case, (hidden, table), ways, formula, upstream=1 / count)


# ---------------------------------------------------------------- matrix products


def product_cases(shape: Shape) -> Iterator[Case]:
    """The shapes of the model's own products, by torch and by what minilm takes in its place on a CPU."""
    config = shape.config
    kv = 2 * config.num_kv_heads * config.head_dim
    sizes = {
        "queries, keys, values": (config.dim, config.dim + kv),
        "attention's output": (config.dim, config.dim),
        "gate or up": (config.dim, config.hidden_dim),
        "down": (config.hidden_dim, config.dim),
    }
    for name, (inner, outer) in sizes.items():
        x, weight = shape.randn(shape.tokens, inner), shape.randn(outer, inner, scale=0.02)
        moved = x.nbytes + weight.nbytes + shape.tokens * outer * x.element_size()
        once = 2.0 * shape.tokens * inner * outer
        work = {FORWARD: (once, float(moved)), BOTH: (3 * once, 3.0 * moved)}
        title = f"{name}: {shape.tokens} x {inner} x {outer}"
        case = Case("matrix product", title, work, "torch linear", "torch linear", TOLERANCES[shape.dtype])
        ways: dict[str, Way] = {"torch linear": F.linear}
        if onednn.suits(x, weight):
            ways["minilm oneDNN"], case.ours = onednn.product, "minilm oneDNN"
        else:
            case.absent["minilm oneDNN"] = _why_no_onednn(shape, weight)
        yield differentiable(case, (x, weight), ways, lambda x, w: torch.einsum("nk,mk->nm", x, w))


def _why_no_onednn(shape: Shape, weight: Tensor) -> str:
    if shape.device.type != "cpu":
        return "it is for the CPU"
    if shape.dtype != torch.float32:
        return f"it is for float32, this is {shape.dtype}"
    if not onednn.works():
        return "torch's operators of oneDNN are not there or fail"
    return f"a weight of {weight.numel()} numbers is below minilm's bound of {onednn.SMALLEST_WEIGHT}"


# ---------------------------------------------------------------- norm, rotary, feed-forward


def block_cases(shape: Shape) -> Iterator[Case]:
    """What a block computes beside attention: minilm's modules, the plain formulas, and these compiled."""
    yield _norm(shape)
    yield _rotary(shape)
    yield _feed_forward(shape)


def _three(
    shape: Shape,
    name: str,
    work: dict[str, tuple[float, float]],
    inputs: Sequence[Tensor],
    ours: Way,
    plain: Way,
) -> Case:
    case = Case("block", name, work, "minilm", "plain formula", TOLERANCES[shape.dtype])
    ways = {"minilm": ours, "plain formula": plain}
    ways |= _compiled(shape, plain, case, "plain formula, compiled")

    def precisely(*given: Tensor) -> Tensor:
        return plain(*(x.double() for x in given))

    return differentiable(case, inputs, ways, precisely)


def _norm(shape: Shape) -> Case:
    module = parts.RMSNorm(shape.config.dim, shape.config.norm_eps).to(shape.device, shape.dtype)
    x = shape.randn(shape.rows, shape.length, shape.config.dim)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + module.eps).rsqrt() * weight).to(x.dtype)

    work = {FORWARD: (0.0, 2.0 * x.nbytes), BOTH: (0.0, 5.0 * x.nbytes)}
    return _three(
        shape, f"norm, width {x.shape[-1]}", work, (x, module.weight), lambda x, _: module(x), plain
    )


def _rotary(shape: Shape) -> Case:
    config = shape.config
    cos, sin = parts.Rotary(config.head_dim, shape.length, config.rope_theta).to(shape.device)(shape.length)
    x = shape.randn(shape.rows, shape.length, config.num_heads + config.num_kv_heads, config.head_dim)

    def plain(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        turned = x * torch.cat((cos, cos), -1) + torch.cat((-b, a), -1) * torch.cat((sin, sin), -1)
        return turned.to(x.dtype)

    work = {FORWARD: (0.0, 2.0 * x.nbytes), BOTH: (0.0, 4.0 * x.nbytes)}
    name = f"rotary, {x.shape[2]} heads of {x.shape[3]}"
    return _three(shape, name, work, (x,), lambda x: parts.rotate(x, cos, sin), plain)


def _feed_forward(shape: Shape) -> Case:
    width, inner = shape.config.dim, shape.config.hidden_dim
    module = parts.SwiGLU(width, inner).to(shape.device, shape.dtype)
    weights = (module.gate.weight, module.up.weight, module.down.weight)
    x = shape.randn(shape.rows, shape.length, width)

    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    once, moved = 6.0 * shape.tokens * width * inner, 2.0 * x.nbytes + sum(w.nbytes for w in weights)
    work = {FORWARD: (once, moved), BOTH: (3 * once, 3 * moved)}
    name = f"feed-forward, {width} to {inner}"
    return _three(shape, name, work, (x, *weights), lambda x, *_: module(x), plain)


def reference_model(shape: Shape) -> torch.nn.Module:
    """A model whose parameters the optimizers update, the same at each call."""
    torch.manual_seed(0)
    return models.build(shape.config).to(shape.device)
