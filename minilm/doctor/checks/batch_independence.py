"""A row's logits do not depend on the other rows of its batch.

Why: statistics over the batch, a sum over the wrong axis, an index that counts through all rows: examples see each
other, evaluation depends on the batch size, and what was measured in a batch is not what one user gets.

How: in eval mode and, with dropout off, in train mode: the first row's logits with other rows in the place of the
others, the row alone, and the batch in another order. Healthy models agree to 2e-6 of the logits' deviation in
float32. A difference must be seen with two different draws, because a single near-tie of a router may flip when a
matrix product is rounded differently. Two rows must differ from each other, else the probe saw nothing.

Cannot see: effects that need more than three rows, or rows of different lengths.

Sources: K5 of the catalogue; PEER-pytorch commit 7728229; product-key-memory commit 335c548.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, culprit, difference, quiet, tokens_for
from minilm.doctor.subject import Subject

ROWS, LENGTH = 3, 24
APART = 1e-3  # rows with other tokens must differ by this


@check(group="model", needs=("forward", "vocab_size"), cost="8 forwards of 3 rows", quick=True)
def batch_independence(subject: Subject) -> Finding:
    """The same row alone, among others, and in another place of the batch."""
    modes = (False, True) if subject.module is not None else (False,)
    worst, apart = 0.0, 0.0
    for train in modes:
        off, how, between = _worst(subject, train, 0)
        apart = max(apart, between)
        if off > FLOAT32_NOISE and (again := _worst(subject, train, 1))[0] > FLOAT32_NOISE:
            mode = "train" if train else "eval"
            where = _where(subject, train)
            return failed(
                f"in {mode} mode a row's logits moved by {min(off, again[0]):.1e} std {how}",
                off, FLOAT32_NOISE, unit="logit std", bugs=_likely(where, train), component=where or f"{mode} mode",
                advice="take no statistic over rows (a batch norm does; a norm over the features does not), and look "
                "for a sum or a reshape that mixes the rows of a batch",
            )  # fmt: skip
        worst = max(worst, 0.0 if off > FLOAT32_NOISE else off)
    if apart < APART:
        raise NotApplicable("rows of other tokens have the same logits: the probe saw nothing")
    return passed(
        f"other rows in the batch moved a row by {worst:.1e} std in "
        f"{' and '.join('train' if t else 'eval' for t in modes)} mode; rows differ from each other by {apart:.2g} std",
        worst, FLOAT32_NOISE, unit="logit std",
    )  # fmt: skip


def _worst(subject: Subject, train: bool, seed: int) -> tuple[float, str, float]:
    """(largest difference of a row, by what, difference between rows)."""
    assert subject.forward is not None
    with quiet(subject, train=train, seed=seed), torch.no_grad():
        tokens = tokens_for(subject, ROWS, LENGTH, seed)
        together = subject.forward(tokens)
        others = subject.forward(_others(subject, tokens, seed))
        alone = subject.forward(tokens[:1])
        order = torch.tensor([*range(1, ROWS), 0])
        moved = torch.empty_like(together)
        moved[order] = subject.forward(tokens[order])
    found = {
        "when the other rows were replaced": difference(together[:1], others[:1], scale=together),
        "when it was alone": difference(together[:1], alone, scale=together),
        "when the batch was in another order": difference(together, moved),
    }
    how = max(found, key=lambda name: found[name])
    return found[how], how, difference(together[0], together[1])


def _others(subject: Subject, tokens: Tensor, seed: int) -> Tensor:
    """The first row as it is, the others drawn anew."""
    return torch.cat([tokens[:1], tokens_for(subject, ROWS - 1, tokens.shape[1], seed + 17)])


def _where(subject: Subject, train: bool) -> str:
    assert subject.forward is not None
    forward = subject.forward
    with quiet(subject, train=train), torch.no_grad():
        tokens = tokens_for(subject, ROWS, LENGTH)
        others = _others(subject, tokens, 0)

        def moved(a: Tensor, b: Tensor) -> bool:
            if a.dim() < 2 or a.shape[0] not in (ROWS, tokens.numel()):
                return False
            first = a.shape[0] // ROWS
            return difference(a[:first], b[:first], scale=a) > FLOAT32_NOISE

        return culprit(subject.module, lambda: forward(tokens), lambda: forward(others), moved)


def _likely(where: str, train: bool) -> list[str]:
    statistics = ["norm-over-time", "mem-bn-eval"]
    sums = ["pk-einsum-drops-n"]
    return statistics + sums if train or "norm" in where.lower() else sums + statistics


@batch_independence.plant("norm-over-time", component="norm", what="BatchNorm in the query net, train mode")
def _() -> Subject:
    class Query(specimens.FeedForward):
        def __init__(self, size: specimens.model.Size) -> None:
            super().__init__(size)
            self.norm = nn.BatchNorm1d(size.dim)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x.flatten(0, 1)).view_as(x))

    return specimens.subject(ffn=Query)


class _Summed(specimens.FeedForward):
    """A memory whose values are weighted by all rows."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return torch.einsum("bth,cth,hd->btd", weights, self.up(x), self.down.weight.T)


@batch_independence.plant(
    "pk-einsum-drops-n", component="ffn", what="an index of einsum that sums over the rows"
)
def _() -> Subject:
    return specimens.subject(ffn=_Summed)


@batch_independence.plant(
    "pk-einsum-drops-n", component="attention", what="a reshape that mixes rows and heads"
)
def _() -> Subject:
    class Mixed(specimens.Attention):
        def heads(self, x: Tensor, count: int) -> Tensor:
            return (
                x.reshape(x.shape[0], count, x.shape[1], -1)
                if x.shape[0] == 1
                else x.reshape(count, x.shape[0], x.shape[1], -1).transpose(0, 1)
            )

    return specimens.subject(attention=Mixed)


@batch_independence.healthy("experts, chosen by token")
def _() -> Subject:
    class Experts(nn.Module):
        def __init__(self, size: specimens.model.Size) -> None:
            super().__init__()
            self.router = nn.Linear(size.dim, 4, bias=False)
            self.experts = nn.ModuleList(specimens.FeedForward(size) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            weights, chosen = self.router(flat).softmax(-1).topk(2)
            out = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                rows, slots = (chosen == number).nonzero(as_tuple=True)
                out.index_add_(0, rows, expert(flat[rows]) * weights[rows, slots, None])
            return out.view_as(x)

    return specimens.subject(ffn=Experts)
