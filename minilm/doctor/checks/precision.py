"""What must be computed in float32 is computed in float32, whatever the model runs in.

Why: positions above 256 are not numbers of bfloat16, so that rotary angles computed in it collide; a cast of the whole
module rounds the tables that were computed rightly; a square overflows float16 at 256. The model runs, and forgets
where it is.

How: every module without children is called again with its own inputs, rounded to bfloat16, under autocast and, where
it is handed over, in the subject as it was brought to bfloat16 (`lowered`). Against the same module in float32, with
the same rounded weights and inputs, a healthy one is off by the rounding of its result, 0.4 % of the largest value; 3 %
is the limit. Norms are also given inputs a thousand times larger and smaller, in bfloat16 and float16. In the end the
logits: healthy noise is 0.007 of their deviation, 0.1 is the limit.

Cannot see: what is computed outside of modules (a rotation that is a plain function shows in the logits only where it
is gross); precision within fused kernels. Whether a router may run in bfloat16 is a choice, not measured here.

Sources: transformers pull request 29285; DeepSpeed pull request 8066; NeMo Automodel issue 2549; gpt-neox issue 1003.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import described, quiet, tokens_for, worst_name
from minilm.doctor.subject import Subject

LENGTH = 512  # positions beyond 256 are not numbers of bfloat16
MODULE_LIMIT = 0.03  # of the largest value of the module's result
LOGIT_LIMIT = 0.1  # median over positions, in std of the logits
LOW = torch.bfloat16
ROTARY = re.compile(r"rot|rope|pos|freq", re.IGNORECASE)
NORM = re.compile(r"norm", re.IGNORECASE)

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@check(
    group="model",
    needs=("forward", "module", "vocab_size"),
    cost="3 forwards of 512 tokens, each module again",
)
def precision(subject: Subject) -> Finding:
    """Modules and logits in bfloat16 against float32, from the same rounded weights."""
    assert subject.forward is not None and subject.module is not None
    with quiet(subject), torch.no_grad():
        for parameter in subject.module.parameters():
            parameter.copy_(parameter.to(LOW))
        tokens = tokens_for(subject, 1, LENGTH)
        calls = _calls(subject, tokens)
        plain = subject.forward(tokens)
        off: dict[tuple[str, str], float] = {}
        logits: dict[str, float] = {}
        downcast: set[str] = set()
        for way, low, surroundings in _ways(subject):
            assert low.module is not None and low.forward is not None
            parts = dict(low.module.named_modules())
            for name, call in calls.items():
                if name in parts:
                    for value in _replayed(call, parts[name], surroundings):
                        off[way, name] = value
                    if any(b.is_floating_point() and b.dtype != torch.float32 for b in parts[name].buffers()):
                        downcast.add(name)
            with surroundings():
                made = low.forward(tokens)
            apart = (made.double() - plain.double()).square().mean((0, 2)).sqrt() / plain.double().std()
            logits[way] = float(apart.median())
        for name, call in calls.items():
            if _is_norm(name, call[0]) and (values := _scaled(call)):
                off["larger and smaller inputs", name] = max(values)
    if not off:
        raise NotApplicable("no module could be called again on its own")
    way, name = max(off, key=lambda key: _nan_last(off[key]))
    gross = worst_name(logits)
    if not off[way, name] <= MODULE_LIMIT:
        return _imprecise(subject, way, name, off[way, name], name in downcast)
    if not logits[gross] <= LOGIT_LIMIT:
        return failed(
            f"in {gross} the logits are off by {logits[gross]:.2f} std", logits[gross], LOGIT_LIMIT, unit="logit std",
            bugs=["rope-bf16", "bf16-reduction", "norm-eps-dtype"], component=f"{gross}, outside of single modules",
            advice="compute positions, norms and softmax in float32",
        )  # fmt: skip
    return passed(
        f"of {len({n for _, n in off})} modules {name} is off the most, by {off[way, name]:.1%} ({way}); "
        f"the logits by {logits[gross]:.3f} std", off[way, name], MODULE_LIMIT, unit="of the largest value",
    )  # fmt: skip


def _imprecise(subject: Subject, way: str, name: str, off: float, downcast: bool) -> Finding:
    assert subject.module is not None
    said = described(subject.module, name)
    if NORM.search(said):
        likely, advice = (
            ["norm-eps-dtype"],
            "square and average in float32, cast the result back; no epsilon below 1e-6",
        )
    elif ROTARY.search(said):
        likely = ["rope-buffer-downcast", "rope-bf16"] if downcast else ["rope-bf16", "rope-buffer-downcast"]
        advice = "compute angles in float32 with autocast off, and keep their table from being cast with the module"
    else:
        likely, advice = ["bf16-reduction", "rope-bf16"], "sum in float32"
    return failed(
        f"{said} is off by {off:.1%} of its largest value ({way})", off, MODULE_LIMIT, unit="of the largest value",
        bugs=likely, component=said, advice=advice,
    )  # fmt: skip


def _nan_last(value: float) -> float:
    return value if value == value else float("inf")


def _ways(
    subject: Subject,
) -> Iterator[tuple[str, Subject, Callable[[], contextlib.AbstractContextManager[Any]]]]:
    device = next((p.device.type for p in subject.module.parameters()), "cpu") if subject.module else "cpu"
    yield "autocast", subject, lambda: torch.autocast(device, LOW)
    if subject.lowered is not None:
        low = subject.lowered()
        if low.module is not None and low.forward is not None:
            low.module.eval()
            yield "bfloat16", low, contextlib.nullcontext


def _calls(subject: Subject, tokens: Tensor) -> dict[str, Call]:
    """The first call of each module without children: module, arguments."""
    assert subject.module is not None and subject.forward is not None
    found: dict[str, Call] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(part: nn.Module, args: Any, kwargs: Any) -> None:
            values = [*args, *kwargs.values()]
            if name not in found and values and all(v is None or isinstance(v, Tensor) for v in values):
                found[name] = (part, _copied(args), _copied(kwargs))

        return hook

    leaves = [(n, m) for n, m in subject.module.named_modules() if n and not list(m.children())]
    handles = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in leaves]
    try:
        subject.forward(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _copied(values: Any, change: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    if isinstance(values, dict):
        return {k: v if v is None else change(v) for k, v in values.items()}
    return tuple(v if v is None else change(v) for v in values)


def _floats(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: change(x) if x.is_floating_point() else x.clone()


def _first(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list):
        output = next((o for o in output if isinstance(o, Tensor)), None)
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _replayed(call: Call, low: nn.Module, surroundings: Callable[[], Any]) -> list[float]:
    """[largest difference over largest value] of one module in float32 and in bfloat16; [] if it cannot be told."""
    part, args, kwargs = call
    rounded = _floats(lambda x: x.to(LOW))
    widened = _floats(lambda x: x.to(LOW).float())
    expected = _first(part(*_copied(args, widened), **_copied(kwargs, widened)))
    with surroundings():
        made = _first(low(*_copied(args, rounded), **_copied(kwargs, rounded)))
    return _relative(expected, made)


def _relative(expected: Tensor | None, made: Tensor | None) -> list[float]:
    if (
        expected is None
        or made is None
        or made.shape != expected.shape
        or not bool(torch.isfinite(expected).all())
    ):
        return []
    largest = float(expected.abs().max())
    if largest == 0:
        return []
    return [float((made.double() - expected.double()).abs().max()) / largest]


def _is_norm(name: str, part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return (
        bool(NORM.search(f"{name} {type(part).__name__}"))
        and isinstance(weight, Tensor)
        and weight.dim() == 1
    )


def _scaled(call: Call) -> list[float]:
    """A norm in bfloat16 and float16, its input a thousand times larger and smaller."""
    part, args, kwargs = call
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return []
    x = args[0] / args[0].abs().max()
    found: list[float] = []
    for dtype in (LOW, torch.float16):
        low = copy.deepcopy(part).to(dtype)
        for scale in (1e-3, 1.0, 1e3):
            given = (x * scale).to(dtype)
            found += _relative(_first(part(given.float())), _first(low(given)))
    return found if all(value == value for value in found) else [float("inf")]


class _NotKept(specimens.Rotary):
    """A table that is rounded with the module."""

    def _apply(self, fn: Any, recurse: bool = True) -> specimens.Rotary:
        nn.Module._apply(self, fn, recurse)
        return self


@precision.plant("rope-buffer-downcast", component="rotary")
def _() -> Subject:
    return specimens.subject(rotary=_NotKept, size={"max_length": 512})


@precision.plant("rope-bf16", component="rotary", what="angles in the dtype of the activations")
def _() -> Subject:
    class Low(specimens.Rotary):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            angles = (positions.to(x.dtype).unsqueeze(-1) * self.table[1].to(x.dtype)).unsqueeze(1)
            first, second = x.chunk(2, dim=-1)
            sine, cosine = angles.sin(), angles.cos()
            return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    return specimens.subject(rotary=Low, size={"max_length": 512})


@precision.plant("rope-bf16", component="rotary", what="a matrix product that autocast takes over")
def _() -> Subject:
    class Product(specimens.Rotary):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            angles = (positions.float().unsqueeze(-1) @ self.table[1:2]).float().unsqueeze(1)
            first, second = x.float().chunk(2, dim=-1)
            sine, cosine = angles.sin(), angles.cos()
            return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(
                x.dtype
            )

    return specimens.subject(rotary=Product, size={"max_length": 512})


@precision.plant(
    "norm-eps-dtype", component="norm", what="squares in the dtype of the activations, epsilon 1e-12"
)
def _() -> Subject:
    class Low(specimens.Norm):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12) * self.weight

    return specimens.subject(norm=Low)


@precision.healthy("layer norms of torch and an exact GELU")
def _() -> Subject:
    class Gelu(specimens.FeedForward):
        def __init__(self, size: specimens.model.Size) -> None:
            super().__init__(size)
            self.activation = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.activation(self.up(x)))

    return specimens.subject(norm=nn.LayerNorm, ffn=Gelu)
