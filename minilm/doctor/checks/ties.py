"""Weights that are tied stay tied: through saving and loading, copies, casts and another size of vocabulary.

Why: a tie is one parameter with two names. Code that sets one of the names anew leaves an output layer that nobody
trained (random after a load) or that nobody trains further (after a copy). Both run.

How: the names of each shared parameter, before and after: deepcopy, a cast to float64 and back, save and load, and a
resize where it is handed over; then the values and the logits. After a resize the first rows must be as they were. A
loaded subject is also held against one that is built afresh: what is tied there must be tied here.

Cannot see: two equal copies that were never tied in this subject nor in a fresh one.

Sources: transformers issue 35141 and pull requests 43429, 42362, 46456, 45079; lingua commit ded5ebf.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, difference, quiet
from minilm.doctor.subject import Subject

ADVICE = "after anything that sets one of the names anew, point the other one at it again (tie_weights), and test it"


@check(group="model", needs=("module",), cost="a copy, two casts, a save and a load")
def ties(subject: Subject) -> Finding:
    """Which names share a parameter, before and after each operation."""
    module = subject.module
    assert module is not None
    tied, done = shared_names(module), []
    expected = tied
    if subject.build is not None and (other := subject.build(1).module) is not None:
        expected = shared_names(other)
        if missing := expected - tied:
            return _untied(missing, "in this subject, though they are in a fresh one", "tie-lost-on-load")
    if not expected and subject.resize is None and subject.save is None:
        raise NotApplicable("no parameter of it is shared, nothing can be saved or resized")
    with quiet(subject):
        for name, operation in _operations(subject).items():
            after = operation(module)
            done.append(name)
            if missing := tied - shared_names(after):
                return _untied(missing, f"after {name}", "tie-lost-on-load")
            if name == "save and load" and (finding := _other_values(module, after)):
                return finding
        if subject.resize is not None:
            done.append("resize")
            if finding := _resized(subject, tied):
                return finding
    what = "; ".join(" = ".join(sorted(names)) for names in tied) or "nothing is tied"
    return passed(f"{what}; kept through {', '.join(done)}", 0.0, 0.0, unit="ties lost")


def shared_names(module: nn.Module) -> set[frozenset[str]]:
    """Names that mean one parameter, for each parameter with more than one."""
    names: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(found) for found in names.values() if len(found) > 1}


def _operations(subject: Subject) -> dict[str, Callable[[nn.Module], nn.Module]]:
    found: dict[str, Callable[[nn.Module], nn.Module]] = {
        "deepcopy": copy.deepcopy,
        "a cast to float64 and back": lambda module: copy.deepcopy(module).double().float(),
    }
    save, load = subject.save, subject.load
    if save is not None and load is not None:

        def saved_and_loaded(module: nn.Module) -> nn.Module:
            with tempfile.TemporaryDirectory() as folder:
                save(module, Path(folder))
                return load(Path(folder))

        found["save and load"] = saved_and_loaded
    return found


def _untied(missing: set[frozenset[str]], when: str, bug: str) -> Finding:
    names = " = ".join(sorted(next(iter(missing))))
    others = [b for b in ("tie-lost-on-load", "tie-lost-on-resize") if b != bug]
    return failed(
        f"{names} are no longer one parameter {when}", float(len(missing)), 0.0, unit="ties lost",
        bugs=[bug, *others], component=f"{names} {when}", advice=ADVICE,
    )  # fmt: skip


def _other_values(module: nn.Module, after: nn.Module) -> Finding | None:
    """A shared parameter whose loaded value is another one."""
    mine, theirs = dict(module.named_parameters()), dict(after.named_parameters())
    for name in sorted(n for names in shared_names(module) for n in names if n in mine and n in theirs):
        off = difference(mine[name].detach().cpu().float(), theirs[name].detach().cpu().float())
        if off > FLOAT32_NOISE:
            return failed(
                f"{name} has another value after save and load", off, FLOAT32_NOISE, unit="std of the weight",
                bugs=["tie-lost-on-load", "init-overwrites-loaded"], component=f"{name} after save and load",
                advice="save a shared parameter under one name and load it under that name; initialise before loading",
            )  # fmt: skip
    return None


def _resized(subject: Subject, tied: set[frozenset[str]]) -> Finding | None:
    """Eight more tokens: ties kept, logits of the old ones as before."""
    assert subject.module is not None and subject.resize is not None and subject.vocab_size is not None
    size = subject.vocab_size
    before = copy.deepcopy(subject.module)
    rows = {
        n: p.detach().clone()
        for n, p in before.named_parameters(remove_duplicate=False)
        if _is_table(p, size)
    }
    after = subject.resize(copy.deepcopy(subject.module), size + 8)
    if missing := tied - shared_names(after):
        return _untied(missing, "after a resize of the vocabulary", "tie-lost-on-resize")
    for name, parameter in after.named_parameters(remove_duplicate=False):
        if name in rows and not torch.equal(parameter[:size].detach(), rows[name]):
            off = difference(rows[name], parameter[:size].detach())
            return failed(
                f"the first {size} rows of {name} are not what they were before the resize", off, 0.0,
                unit="std of the weight", bugs=["tie-lost-on-resize", "init-overwrites-loaded"],
                component=f"{name} after a resize of the vocabulary",
                advice="copy the old rows into the new table, of the output layer too",
            )  # fmt: skip
    return None


def _is_table(parameter: nn.Parameter, size: int) -> bool:
    return parameter.dim() == 2 and parameter.shape[0] == size


def _tied() -> Subject:
    return specimens.subject(size={"tied": True})


def _resize(module: nn.Module, size: int, *, head: bool = True, tied: bool = True) -> nn.Module:
    assert isinstance(module, specimens.Model)
    old, dim = module.embedding.weight, module.size.dim
    module.embedding = nn.Embedding(size, dim)
    output = nn.Linear(dim, size, bias=False)
    with torch.no_grad():
        module.embedding.weight[: len(old)] = old
        if head:
            output.weight[: len(old)] = module.head.weight
    module.head = output
    if tied:
        module.head.weight = module.embedding.weight
    return module


@ties.plant(
    "tie-lost-on-load", component="head.weight", what="a new parameter under one of the names, random"
)
def _() -> Subject:
    subject = _tied()

    def load(folder: Path) -> nn.Module:
        module = subject.build(5).module  # type: ignore[misc]
        state = torch.load(folder / "weights.pt", weights_only=True)
        module.head.weight = nn.Parameter(torch.randn_like(module.head.weight) * 0.02)
        module.load_state_dict({k: v for k, v in state.items() if k != "head.weight"}, strict=False)
        return module

    return subject.but(load=load)


@ties.plant("tie-lost-on-load", component="head.weight", what="assign=True: equal values, two parameters")
def _() -> Subject:
    subject = _tied()

    def load(folder: Path) -> nn.Module:
        module = subject.build(5).module  # type: ignore[misc]
        state = torch.load(folder / "weights.pt", weights_only=True)
        module.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
        return module

    return subject.but(load=load)


@ties.plant("tie-lost-on-load", component="head.weight", what="a subject that came untied from its file")
def _() -> Subject:
    subject = _tied()
    module = subject.module
    module.head.weight = nn.Parameter(module.head.weight.detach().clone())  # type: ignore[union-attr]
    return subject.but(fresh=False)


@ties.plant("tie-lost-on-load", component="head.weight", what="a cast that copies")
def _() -> Subject:
    class Casting(specimens.model.Model):
        def double(self) -> specimens.model.Model:
            super().double()
            self.head.weight = nn.Parameter(self.head.weight.detach().clone())
            return self

    return specimens.subject(model=Casting, size={"tied": True})


@ties.plant("tie-lost-on-resize", component="head.weight", what="an output layer of its own")
def _() -> Subject:
    return _tied().but(resize=lambda module, size: _resize(module, size, tied=False))


@ties.plant("tie-lost-on-resize", component="head.weight", what="untied models: the output layer drawn anew")
def _() -> Subject:
    return specimens.subject().but(resize=lambda module, size: _resize(module, size, head=False, tied=False))


@ties.healthy("tied, resized rightly")
def _() -> Subject:
    return _tied().but(resize=_resize)


@ties.healthy("untied, resized rightly")
def _() -> Subject:
    return specimens.subject().but(resize=lambda module, size: _resize(module, size, tied=False))
