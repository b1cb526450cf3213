"""What is drawn at random is trained.

Why: requires_grad=False in one place too many (a freeze that was meant for another module, a flag that is inherited by
a copy) leaves random weights random. The optimizer skips them without a word.

How: in a fresh model, a frozen parameter that two builds with different seeds draw differently was meant to be
trained; so was one whose counterpart in another block is. Tables that are computed may be frozen, and so may what the
owner names (`unused`). Loaded models are not asked: there, freezing is a way to work.

Cannot see: a freeze after the module was handed over.

Sources: mmpretrain issue 702; TrainCheck's study; row 96 of the catalogue.
"""

from __future__ import annotations

import fnmatch

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.checks.gradients_reach import BLOCK_NUMBER
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import described
from minilm.doctor.subject import Subject


@check(group="model", needs=("module", "build"), cost="2 builds, if anything is frozen", quick=True)
def frozen(subject: Subject) -> Finding:
    """Frozen parameters that are drawn at random, or that are trained in other blocks."""
    assert subject.module is not None and subject.build is not None
    if not subject.fresh:
        raise NotApplicable("its weights are not freshly drawn: what is frozen in it may be meant")
    names = [
        name
        for name, parameter in subject.module.named_parameters()
        if not parameter.requires_grad and not any(fnmatch.fnmatch(name, p) for p in subject.unused)
    ]
    if not names:
        return passed("nothing is frozen", 0.0, 0.0, unit="parameters")
    one, other = subject.build(1).module, subject.build(2).module
    if one is None or other is None:
        raise NotApplicable("what is built has no module")
    a, b = dict(one.named_parameters()), dict(other.named_parameters())
    trained = {BLOCK_NUMBER.sub(".*.", n) for n, p in subject.module.named_parameters() if p.requires_grad}
    wrong = [
        name
        for name in names
        if (name in a and name in b and not torch.equal(a[name], b[name]))
        or BLOCK_NUMBER.sub(".*.", name) in trained
    ]
    if not wrong:
        return passed(
            f"{len(names)} tables are frozen, nothing that is drawn at random", 0.0, 0.0, unit="parameters"
        )
    return failed(
        f"{len(wrong)} parameters are frozen (requires_grad=False) in a fresh model: {', '.join(wrong[:4])}",
        float(len(wrong)), 0.0, unit="parameters", bugs=["frozen-by-accident", "params-missing"],
        component=described(subject.module, wrong[0].rpartition(".")[0]),
        advice="look for requires_grad_(False) and requires_grad=False on the way to it, and for a copied flag",
    )  # fmt: skip


@frozen.plant("frozen-by-accident", component="layers.1", what="one block")
def _() -> Subject:
    class Frozen(specimens.model.Model):
        def initialise(self) -> None:
            super().initialise()
            self.layers[1].requires_grad_(False)

    return specimens.subject(model=Frozen)


@frozen.plant("frozen-by-accident", component="head", what="the output layer alone")
def _() -> Subject:
    class Frozen(specimens.model.Model):
        def initialise(self) -> None:
            super().initialise()
            self.head.requires_grad_(False)

    return specimens.subject(model=Frozen)


@frozen.healthy("a computed table that is a frozen parameter")
def _() -> Subject:
    class Table(specimens.model.Model):
        def initialise(self) -> None:
            super().initialise()
            self.places = nn.Parameter((torch.arange(64).unsqueeze(-1) / 10).sin(), requires_grad=False)

        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens) + self.places[: tokens.shape[1]]

    return specimens.subject(model=Table)
