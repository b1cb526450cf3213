"""What is said to run in float32 does.

Why: a cast to sixteen bits in the middle of a float32 model, matrix products that the backend rounds to ten bits, a
sum in bfloat16: results are a thousand times less exact than everybody believes, and parity checks of others fail.

How: weights in float64 (on an accelerator in float32, whose products are in question), moved by a ten-thousandth up
and down. The second difference of a smooth function is then of the order of 1e-8 of the logits' deviation (measured in
healthy models: below 7.5e-6 where norms compute in float32, 2e-5 where all does); steps of sixteen bits make it 1e-4
and more. A quarter of the positions must be beyond the limit, since a unit or a router that switches is no defect.
What is beyond it is measured again with a tenth of the movement: curvature falls a hundredfold (Gemma 4: 3e-5 to 3e-6,
its own rounding) and a switch is no longer crossed (Nemotron-H: 1.9e-4 to 3e-6); steps fall to a third or a half only
(measured: 1.5e-4 for ten bits, 1.5e-3 for bfloat16).
Modules are compared in the same way to find the first that makes steps.

Cannot see: fewer bits than float32 in what is asked for on another device than the one where this runs.

Sources: rows 182 and 183 of the catalogue; torch's settings of matrix product precision; DeepSpeed issue 1800.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import described, quiet, record, tokens_for
from minilm.doctor.subject import Subject

LENGTH = 32
AMOUNTS = (-1e-4, 0.0, 1e-4)  # of each weight
LESS = 0.1  # of these amounts, where they were too much
LIMIT = 2e-5  # second difference in std of the result
TEN_BITS = 2e-3  # a rounding to ten bits makes 4e-4, one to seven bits 5e-3
LIMIT_IN_FLOAT32 = 5e-5  # where float64 cannot be had; float32 itself makes 5e-6


@check(group="model", needs=("forward", "module", "vocab_size"), cost="up to 9 forwards in float64")
def float32_kept(subject: Subject) -> Finding:
    """The second difference of the logits, and of each module, for weights that move by very little."""
    assert subject.forward is not None and subject.module is not None
    forward, module = subject.forward, subject.module
    with quiet(subject), torch.no_grad():
        tokens = tokens_for(subject, 1, LENGTH)
        limit = LIMIT
        if all(p.device.type == "cpu" for p in module.parameters()):
            module.double()
        else:  # an accelerator's short products are those of float32
            limit = LIMIT_IN_FLOAT32
        kept = [(p, p.detach().clone(), _signs(p)) for p in module.parameters() if p.dim() >= 2]

        def moved_by(amount: float) -> Tensor:
            for parameter, value, signs in kept:
                parameter.copy_(value * (1 + amount * signs))
            return forward(tokens)

        try:
            results = [moved_by(amount) for amount in AMOUNTS]
        except RuntimeError:  # it casts to float32 itself, or its kernels know no float64
            module.float()
            limit = LIMIT_IN_FLOAT32
            results = [moved_by(amount) for amount in AMOUNTS]
        off = _steps(*results)
        less = off if off <= limit else _steps(*(moved_by(LESS * amount) for amount in AMOUNTS))
        if less <= limit:
            return passed(
                f"its second difference is {less:.1e} std: no rounding to few bits", less, limit, unit="std"
            )
        seen = [record(module, lambda amount=amount: moved_by(amount)) for amount in AMOUNTS]  # type: ignore[misc]
        rough = (
            one[0][0] for one in zip(*seen, strict=False) if _steps(*(made for _, _, made in one)) > limit
        )
        where = next(rough, None)
    likely = ["bf16-reduction", "tf32-silent", "norm-eps-dtype"]
    if off < TEN_BITS:
        likely[:2] = ["tf32-silent", "bf16-reduction"]
    return failed(
        f"its second difference is {off:.1e} std: somewhere a result is rounded to few bits", off, limit, unit="std",
        bugs=likely,
        component="matrix products" if where is None else described(module, where),
        advice="look for .half(), .bfloat16() or autocast within the model, and for "
        'torch.set_float32_matmul_precision ("highest" keeps float32)',
    )  # fmt: skip


def _signs(parameter: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(parameter.numel())
    return (torch.randint(2, parameter.shape, generator=generator) * 2 - 1).to(parameter)


def _steps(low: Tensor, middle: Tensor, high: Tensor) -> float:
    """The second difference that a quarter of the positions reach, in std of the result."""
    if not (low.shape == middle.shape == high.shape and middle.is_floating_point() and middle.dim() >= 2):
        return 0.0
    off = (low.double() + high.double() - 2 * middle.double()).abs().amax(-1).flatten()
    return float(off.quantile(0.75)) / max(float(middle.double().std()), 1e-12)


@float32_kept.plant("bf16-reduction", component="ffn", what="a sum in bfloat16")
def _() -> Subject:
    class Narrow(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).bfloat16().to(x.dtype)

    return specimens.subject(ffn=Narrow)


@float32_kept.plant(
    "tf32-silent", component="attention", what="products of ten bits, as a backend makes them"
)
def _() -> Subject:
    class TenBits(specimens.Attention):
        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            return super().scores(q.half().to(q.dtype), k.half().to(k.dtype))

    return specimens.subject(attention=TenBits)


@float32_kept.healthy("norms and softmax in float32")
def _() -> Subject:
    return specimens.subject(norm=torch.nn.LayerNorm)
