"""Every trainable parameter gets a gradient.

Why: a detach too many, a gate that is shut for good, a choice of entries that is not weighted by its score: the
parameter keeps its first value, and the rest learns around it.

How: one backward of the loss with weights drawn large. A parameter whose module took part must have a gradient that is
finite and not zero; a matrix whose gradient is a million times smaller than its peers' is as good as shut off (an
open gate in a healthy model is not below a thousandth). Vectors are held against zero alone: a key's bias has none by
mathematics. Parameters of a module that was never called are named, and are a failure if the same module of another
block was called; so are those that move nothing when they are moved (a pooler whose result nobody uses).

Cannot see: gradients that are wrong but not zero.

Sources: Karpathy, A Recipe for Training Neural Networks; TrainCheck's study (frozen modules); rows 96, 171 and 175 of
the catalogue.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import described, quiet, redraw_weights, tokens_for, untouched
from minilm.doctor.subject import Rows, Subject

ROWS, LENGTH = 4, 48
MOST_ASKED = 64  # parameters without gradient that are asked, by moving them, whether they matter
SHUT = 1e-6  # of the median matrix's gradient
BLOCK_NUMBER = re.compile(r"\.\d+\.")


@check(group="model", needs=("module", "forward", "vocab_size"), cost="1 forward and backward", quick=True)
def gradients_reach(subject: Subject) -> Finding:
    """One backward; every parameter's gradient, by name."""
    module = subject.module
    assert module is not None
    if not any(p.requires_grad for p in module.parameters()):
        raise NotApplicable("nothing in it is trainable")
    with quiet(subject, train=True):
        gradients, called = gradients_of(subject, None)
        sizes = _sizes(gradients)
        if not any(sizes.values()):
            return _missing(subject, list(sizes), sizes, ["frozen-by-accident"])
        matrices = [sizes[n] for n, p in module.named_parameters() if p.dim() >= 2 and sizes.get(n)]
        usual = float(torch.tensor(matrices).median()) if matrices else 1.0
        silent, idle = _silent(subject, gradients, sizes, called, usual)
    if silent:  # without the noise that is off here, a router that is trained through it may get none
        with untouched(subject), torch.no_grad():
            redraw_weights(module.float().train(), 0.1)
            noisy = _sizes(gradients_of(subject, None)[0])
        silent = [n for n in silent if not noisy[n] > SHUT * usual]
        if silent:
            return _missing(subject, silent, sizes, _likely(silent, sizes))
    least = min(matrices, default=usual) / usual
    note = f"; {len(idle)} take no part: {', '.join(idle[:3])}" if idle else ""
    return passed(
        f"{len(sizes) - len(idle)} parameters have gradients, a matrix at least {least:.1e} of the usual{note}",
        least, SHUT, unit="of the median gradient", details={"take no part": idle},
    )  # fmt: skip


def gradients_of(
    subject: Subject, forward: Callable[[Tensor], Tensor] | None
) -> tuple[dict[str, Tensor | None], set[str]]:
    """(gradient by parameter name, names of the modules that were called)."""
    module = subject.module
    assert module is not None and subject.forward is not None
    called: set[str] = set()
    handles = [
        part.register_forward_pre_hook(lambda _m, _a, name=name: called.add(name))  # type: ignore[misc]
        for name, part in module.named_modules()
    ]
    for parameter in module.parameters():
        parameter.grad = None
    tokens = tokens_for(subject, ROWS, LENGTH, seed=4)
    try:
        with torch.enable_grad():
            if forward is None and subject.total_loss is not None:
                subject.total_loss(Rows.whole(tokens)).backward()
            else:
                logits = (forward or subject.forward)(tokens)
                direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
                (logits.float().log_softmax(-1) * direction.to(logits.device)).mean().backward()
    finally:
        for handle in handles:
            handle.remove()
    return {n: p.grad for n, p in module.named_parameters() if p.requires_grad}, called


def _silent(
    subject: Subject,
    gradients: dict[str, Tensor | None],
    sizes: dict[str, float],
    called: set[str],
    usual: float,
) -> tuple[list[str], list[str]]:
    """(parameters that take part and get no gradient, parameters that take no part)."""
    assert subject.module is not None
    silent, idle = [], []
    for name, parameter in subject.module.named_parameters():
        if not parameter.requires_grad or any(fnmatch.fnmatch(name, p) for p in subject.unused):
            continue
        limit = SHUT * usual if parameter.dim() >= 2 else 0.0
        if sizes[name] > limit:  # NaN is not
            continue
        (silent if _took_part(name, called, sizes) else idle).append(name)
    role = {BLOCK_NUMBER.sub(".*.", name) for name, size in sizes.items() if size}
    unconnected = [n for n in silent if gradients[n] is None and BLOCK_NUMBER.sub(".*.", n) not in role]
    without = [
        n for n in unconnected[:MOST_ASKED] if not _matters(subject, n)
    ]  # a pooler whose result nobody uses
    return [n for n in silent if n not in without], idle + without


@torch.no_grad()
def _matters(subject: Subject, name: str) -> bool:
    """Do the logits move when this parameter does."""
    assert subject.module is not None and subject.forward is not None
    parameter = subject.module.get_parameter(name)
    kept, tokens = parameter.detach().clone(), tokens_for(subject, 1, LENGTH)
    before = subject.forward(tokens)
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    parameter.add_(noise.to(parameter.device, parameter.dtype))
    after = subject.forward(tokens)
    parameter.copy_(kept)
    return not torch.equal(before, after)


def _sizes(gradients: dict[str, Tensor | None]) -> dict[str, float]:
    """Root mean square of each gradient; 0 where there is none, NaN where it is not finite."""
    return {
        name: 0.0 if g is None else float(g.detach().double().square().mean().sqrt())
        for name, g in gradients.items()
    }


def _took_part(name: str, called: set[str], sizes: dict[str, float]) -> bool:
    """Was the parameter's module called, or is it one of a row of alike modules of which others have gradients."""
    owner = name.rpartition(".")[0]
    if owner in called:
        return True
    if "expert" in name.lower():  # an expert that no token chose
        return False
    role = BLOCK_NUMBER.sub(".*.", name)
    return any(size and n != name and BLOCK_NUMBER.sub(".*.", n) == role for n, size in sizes.items())


def _likely(silent: list[str], sizes: dict[str, float]) -> list[str]:
    if any(size != size for size in (sizes[n] for n in silent)):
        return ["nan-grad-poisons-clip", "mask-zero-times-inf"]
    names = " ".join(silent).lower()
    if any(sizes[n] > 0 for n in silent):
        return ["mem-gate-dead", "mem-topk-detached", "frozen-by-accident"]
    choosing = [n for n in silent if re.search(r"quer|key|router|score|memory|select", n.lower())]
    if choosing:  # what is chosen from learns, what chooses does not; or the whole of it is shut off
        owner = choosing[0].rpartition(".")[0]
        learns = any(n.startswith(f"{owner}.") and n not in silent for n in sizes)
        gate = "gate" in names
        first = (
            ["mem-topk-detached", "mem-gate-dead"]
            if learns and not gate
            else ["mem-gate-dead", "mem-topk-detached"]
        )
        return [*first, "frozen-by-accident"]
    return ["frozen-by-accident", "grad-none-ckpt", "mem-topk-detached", "mem-gate-dead"]


def _missing(subject: Subject, names: list[str], sizes: dict[str, float], bugs: list[str]) -> Finding:
    assert subject.module is not None
    block = BLOCK_NUMBER.search(names[0])
    same = [n for n in names if block is not None and n.startswith(names[0][: block.end()])]
    owner = (same or names)[-1].rpartition(".")[0]  # the last on the way: what is before it is cut off too
    worst = max(sizes[n] for n in names)
    said = f"{len(names)} of {len(sizes)} parameters get no gradient: {', '.join(names[:4])}"
    return failed(
        said, worst, SHUT, unit="root mean square of the gradient", bugs=bugs,
        component=described(subject.module, owner),
        advice="look for detach(), .data, no_grad() or a hard choice on the way to the parameter, for a gate that is "
        "saturated, and for requires_grad=False",
    )  # fmt: skip


@gradients_reach.plant("frozen-by-accident", component="ffn", what="a detach on the way")
def _() -> Subject:
    class Detached(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    return specimens.subject(ffn=Detached)


@gradients_reach.plant("frozen-by-accident", component="layers.1", what="a block that is never called")
def _() -> Subject:
    class Skipped(specimens.model.Block):
        def forward(self, x: Tensor, *others: Tensor) -> Tensor:
            return super().forward(x, *others) if self.attention.size.num_layers != 2 or self.first else x

    subject = specimens.subject(block=Skipped)
    for number, layer in enumerate(subject.module.layers):  # type: ignore[union-attr]
        layer.first = number == 0
    return subject


class _Memory(nn.Module):
    """Sixteen entries, the best four by a query's scores, weighted by them."""

    gate = 0.0

    def __init__(self, size: specimens.model.Size) -> None:
        super().__init__()
        self.query = nn.Linear(size.dim, size.dim, bias=False)
        self.keys = nn.Parameter(torch.randn(16, size.dim) * 0.02)
        self.values = nn.Parameter(torch.randn(16, size.dim) * 0.02)
        self.gate_bias = nn.Parameter(torch.full((1,), self.gate))

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = (self.query(x) @ self.keys.T).topk(4)
        return (self.weighted(scores).unsqueeze(-1) * self.values[chosen]).sum(-2) * self.gate_bias.sigmoid()

    def weighted(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


@gradients_reach.plant("mem-topk-detached", component="ffn", what="scores detached")
def _() -> Subject:
    class Detached(_Memory):
        def weighted(self, scores: Tensor) -> Tensor:
            return scores.detach().softmax(-1)

    return specimens.subject(ffn=Detached)


@gradients_reach.plant("mem-topk-detached", component="ffn", what="entries chosen, not weighted")
def _() -> Subject:
    class Unweighted(_Memory):
        def weighted(self, scores: Tensor) -> Tensor:
            return torch.full_like(scores, 0.25)

    return specimens.subject(ffn=Unweighted)


@gradients_reach.plant("mem-gate-dead", component="ffn", what="a bias of -20")
def _() -> Subject:
    class Shut(_Memory):
        gate = -20.0

    return specimens.subject(ffn=Shut)


@gradients_reach.plant("mem-gate-dead", component="ffn", what="a ReLU gate that is never open")
def _() -> Subject:
    class Closed(_Memory):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (x.mean(-1, keepdim=True).abs() - 50).relu()

    return specimens.subject(ffn=Closed)


@gradients_reach.healthy("a pooler whose result nobody uses")
def _() -> Subject:
    class Pooled(specimens.model.Model):
        def initialise(self) -> None:
            self.pooler = nn.Linear(self.size.dim, self.size.dim)
            super().initialise()

        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            self.pooler(x[:, 0])
            return x

    return specimens.subject(model=Pooled)


@gradients_reach.healthy("a memory")
def _() -> Subject:
    return specimens.subject(ffn=_Memory)


@gradients_reach.healthy("keys with a bias, whose gradient is zero by mathematics, and a frozen table")
def _() -> Subject:
    class Biased(specimens.Attention):
        def __init__(self, size: specimens.model.Size, rotary: specimens.Rotary) -> None:
            super().__init__(size, rotary)
            self.k = nn.Linear(size.dim, size.num_kv_heads * size.head_dim)
            self.places = nn.Parameter(torch.arange(8).float().sin(), requires_grad=False)

        def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
            return x + self.places * positions[:, None, :, None].float().cos()

    return specimens.subject(attention=Biased)
