"""No large part of a matrix is left out of the gradient.

Why: heads that are computed and dropped, half of a hidden layer that is sliced away, a key/value head that no query
reads: the parameters are there, are counted, are stored, and do nothing. Their matrix does get a gradient, so that
looking at whole parameters shows nothing.

How: one backward with weights drawn large. The rows and columns of each linear layer's gradient that are exactly zero
are counted; an eighth of them is the limit. A healthy layer has none: a unit that no token of 192 switches on is rare.
Embeddings and tables (rows of tokens that were not there) and experts (that few tokens chose) are left out.

Cannot see: parts that get a gradient and are cancelled later.

Sources: rows 84 and 96 of the catalogue; Karpathy, A Recipe for Training Neural Networks (use backprop to chart
dependencies).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.checks.gradients_reach import gradients_of
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import described, quiet, worst_name
from minilm.doctor.subject import Subject

LIMIT = 1 / 8


@check(group="model", needs=("module", "forward", "vocab_size"), cost="1 forward and backward")
def dead_slices(subject: Subject) -> Finding:
    """Rows and columns of linear layers without any gradient."""
    module = subject.module
    assert module is not None
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    linear = {
        f"{name}.weight"
        for name, part in module.named_modules()
        if (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D")
        and id(part.weight) not in tables
        and "expert" not in name.lower()
    }
    with quiet(subject, train=True):
        gradients, _ = gradients_of(subject, None)
        dead = {
            name: _dead(gradient)
            for name, gradient in gradients.items()
            if name in linear and gradient is not None and gradient.dim() == 2 and bool(gradient.any())
        }
    if not dead:
        raise NotApplicable("it has no linear layer with a gradient")
    name = worst_name(dead)
    if dead[name] <= LIMIT:
        return passed(
            f"of {len(dead)} linear layers the most that is without gradient is {dead[name]:.0%} of {name}",
            dead[name], LIMIT, unit="of rows or columns",
        )  # fmt: skip
    alike = [n for n in dead if dead[n] > LIMIT]
    likely = ["frozen-by-accident", "gqa-head-order"]
    if all(re.search(r"\.(k|v|wk|wv|k_proj|v_proj|key|value)\.weight$", n) for n in alike):
        likely.reverse()  # queries are all read, keys and values are not
    return failed(
        f"{dead[name]:.0%} of the rows or columns of {name} get no gradient ({', '.join(alike[:4])})",
        dead[name], LIMIT, unit="of rows or columns", bugs=likely,
        component=described(module, name.rpartition(".")[0]),
        advice="see which heads or units are computed and not used: a slice, a reshape to fewer heads, an index that "
        "stays below the number of heads",
    )  # fmt: skip


def _dead(gradient: Tensor) -> float:
    """The larger share of rows or of columns that are exactly zero."""
    used = gradient != 0
    return max(float((~used.any(axis)).double().mean()) for axis in (0, 1))


@dead_slices.plant("frozen-by-accident", component="attention", what="half of the heads are dropped")
def _() -> Subject:
    class Half(specimens.Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
            made = super().attend(q, k, v, allowed)
            keep = torch.arange(made.shape[1]) < made.shape[1] // 2
            return made * keep[:, None, None]

    return specimens.subject(attention=Half)


@dead_slices.plant(
    "gqa-head-order", component="attention", what="every query head reads the first key/value head"
)
def _() -> Subject:
    class First(specimens.Attention):
        def shared(self, x: Tensor) -> Tensor:
            return x[:, :1].expand(-1, self.size.num_heads, -1, -1)

    return specimens.subject(attention=First)


@dead_slices.plant("frozen-by-accident", component="ffn", what="half of the hidden layer is sliced away")
def _() -> Subject:
    class Sliced(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.silu(self.gate(x)) * self.up(x)
            used = hidden.shape[-1] // 2
            return hidden[..., :used] @ self.down.weight[:, :used].T

    return specimens.subject(ffn=Sliced)


@dead_slices.healthy("ReLU units")
def _() -> Subject:
    class Relu(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gate(x).relu() * self.up(x).relu())

    return specimens.subject(ffn=Relu)
