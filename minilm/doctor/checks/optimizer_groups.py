"""Every trainable parameter is in the optimizer exactly once, and decays as its owner meant.

Why: an optimizer that was built before a part was replaced trains what is no longer used; a tied matrix that is handed
over twice takes double steps; a norm that decays pulls its gain to zero. None of this raises an error.

How: identity of the parameters and of their storage against the groups of the optimizer; then one call of the
optimizer with gradients of zero and a known rate, on weights drawn at random: a weight p must become p (1 - rate x
decay), or stay. The policy is the owner's; without one, vectors must be treated alike wherever groups differ at all.

Cannot see: an optimizer that works on copies of its own (sharded master weights): the check `every_parameter_moves`
watches the outcome.

Sources: K13 of the catalogue; accelerate issue 2665; transformers pull request 35927; Loshchilov and Hutter (2019).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.stepping import even_rows, inner_optimizer, start, trainable, watched_step
from minilm.doctor.subject import Rows, Subject, Training


@check(group="training", needs=("training",), cost="one set-up", quick=True)
def optimizer_covers(subject: Subject) -> Finding:
    """Which trainable parameters are in no group, or in more than one."""
    training = start(subject)
    optimizer = inner_optimizer(training)
    if optimizer is None:
        raise NotApplicable("needs the torch optimizer")
    named = trainable(training.module)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    ids, places = [id(p) for p in held], [p.data_ptr() for p in held if p.numel()]
    missing = [name for name, p in named.items() if id(p) not in ids]
    if len(missing) == len(named) and held and _moves(subject, training):
        raise NotApplicable("the optimizer works on other tensors than the module's parameters")
    where = {p.data_ptr(): name for name, p in training.module.named_parameters()}
    twice = sorted(
        {where.get(place, "a tensor outside of the module") for place in places if places.count(place) > 1}
    )
    if missing:
        return failed(
            f"{len(missing)} of {len(named)} trainable parameters are in no group: {', '.join(missing[:4])}",
            float(len(missing)), 0.0, unit="parameters", bugs=["params-missing", "frozen-by-accident"],
            component=f"optimizer groups: {missing[0]}",
            advice="build the optimizer from the module that is trained, after its last part was replaced",
        )  # fmt: skip
    if twice:
        return failed(
            f"{len(twice)} parameters are in the optimizer more than once: {', '.join(twice[:4])}",
            float(len(twice)), 0.0, unit="parameters", bugs=["tie-double-step"],
            component=f"optimizer groups: {twice[0]}",
            advice="collect parameters with module.parameters(), which lists a tied one once",
        )  # fmt: skip
    return passed(
        f"each of {len(named)} trainable parameters is in the optimizer once", 0.0, 0.0, unit="parameters"
    )


def _moves(subject: Subject, training: Training) -> bool:
    seen = watched_step(training, even_rows(subject).split(2))
    return any(not torch.equal(seen.before[name], seen.after[name]) for name in seen.before)


RATE_TIMES_DECAY = 0.1  # of the strongest decay: far above any rounding
LIMIT = 0.01


@check(group="training", needs=("training",), cost="one set-up and one call of the optimizer", quick=True)
def decay_groups(subject: Subject) -> Finding:
    """Shrinkage of each parameter under a gradient of zero."""
    training = start(subject)
    optimizer = inner_optimizer(training)
    if optimizer is None:
        raise NotApplicable("needs the torch optimizer")
    decays = [float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
    if max(decays, default=0.0) == 0:
        raise NotApplicable("the weight decay is 0 in all groups")
    named = {n: p for n, p in trainable(training.module).items() if any(p is q for q in _held(optimizer))}
    if not named:
        raise NotApplicable("the optimizer works on other tensors than the module's parameters")
    rate = RATE_TIMES_DECAY / max(decays)
    shrunk, bent = _shrinkage(optimizer, named, rate)
    adaptive = any("betas" in group for group in optimizer.param_groups)
    crooked = max(bent, key=lambda name: bent[name])
    if adaptive and bent[crooked] > LIMIT:
        return failed(
            f"a gradient of zero changes {crooked} by more than a factor ({bent[crooked]:.2g} of it)",
            bent[crooked], LIMIT, unit="of the weights", bugs=["wd-coupled"],
            component=f"optimizer: decay of {crooked}",
            advice="use decoupled weight decay (AdamW)",
        )  # fmt: skip
    return _against_policy(training, named, shrunk)


def _held(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _shrinkage(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], rate: float
) -> tuple[dict[str, float], dict[str, float]]:
    """By name: 1 - the factor that a zero gradient multiplied it with, and what is no factor, relative."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in _held(optimizer):
            p.copy_(torch.randn(p.shape, generator=generator).to(p.device, p.dtype))
            p.grad = torch.zeros_like(p)
    before = {name: p.detach().double() for name, p in named.items()}
    before = {name: p.clone() for name, p in before.items()}
    for group in optimizer.param_groups:
        group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
    optimizer.step()
    shrunk, bent = {}, {}
    for name, p in named.items():
        old, new = before[name].flatten(), p.detach().double().flatten()
        factor = float(old @ new / (old @ old))
        shrunk[name] = 1 - factor
        bent[name] = float((new - factor * old).norm() / old.norm())
    return shrunk, bent


def _against_policy(training: Training, named: dict[str, nn.Parameter], shrunk: dict[str, float]) -> Finding:
    decayed = {name: value > LIMIT * RATE_TIMES_DECAY for name, value in shrunk.items()}
    if training.decays is not None:
        meant = {name: bool(training.decays(name, p)) for name, p in named.items()}
        whose = "the policy"
    elif all(decayed.values()):
        raise NotApplicable("all parameters decay alike, and no policy (Training.decays) says what was meant")
    else:
        meant = {name: decayed[name] and p.dim() >= 2 for name, p in named.items()}
        whose = "the other vectors"
    wrong = [name for name in named if decayed[name] and not meant[name]]
    spared = [name for name in named if meant[name] and not decayed[name]]
    if wrong:
        everything = all(decayed.values())
        return failed(
            f"{len(wrong)} of {len(named)} parameters decay against {whose}: {', '.join(wrong[:4])}",
            float(len(wrong)), 0.0, unit="parameters",
            bugs=["decay-everything", "decay-on-norm"] if everything else ["decay-on-norm", "decay-everything"],
            component=f"optimizer groups: {wrong[0]}",
            advice="sort parameters into groups by their dimensions, not by a list of class names",
        )  # fmt: skip
    if spared:
        return failed(
            f"{len(spared)} of {len(named)} parameters do not decay against {whose}: {', '.join(spared[:4])}",
            float(len(spared)), 0.0, unit="parameters", bugs=["decay-on-norm", "wd-coupled"],
            component=f"optimizer groups: {spared[0]}", advice="put them into the group that decays",
        )  # fmt: skip
    amounts = sorted(value for name, value in shrunk.items() if decayed[name])
    if amounts and abs(amounts[-1] - RATE_TIMES_DECAY) > LIMIT:
        return failed(
            f"rate x decay of {RATE_TIMES_DECAY} shrinks the weights by {amounts[-1]:.3g}", amounts[-1],
            RATE_TIMES_DECAY, unit="of the weights", bugs=["wd-coupled"], component="optimizer: amount of decay",
            advice="multiply the decay by the learning rate, once",
        )  # fmt: skip
    count = sum(decayed.values())
    return passed(f"{count} parameters decay and {len(named) - count} do not, in line with {whose}", 0.0, 0.0,
                  unit="parameters")  # fmt: skip


@optimizer_covers.plant(
    "params-missing", component="head", what="the head was replaced after the optimizer was built"
)
def _() -> Subject:
    class Broken(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            made = super().make_optimizer()
            self.model.head = copy.deepcopy(self.model.head)
            return made

    return specimens.subject(trainer=Broken)


@optimizer_covers.plant("params-missing", component="groups", what="the optimizer holds a copy of the model")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(copy.deepcopy(self.model).parameters())

    return specimens.subject(trainer=Broken)


@optimizer_covers.plant("tie-double-step", component="embedding")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            again = nn.Parameter(self.model.head.weight.data)  # the tied matrix under its other name
            return torch.optim.AdamW([*self.model.parameters(), again])

    return specimens.subject(trainer=Broken, size={"tied": True})


@optimizer_covers.healthy("tied, a frozen embedding, one group, SGD")
def _() -> Subject:
    class Plain(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            self.model.embedding.weight.requires_grad_(False)
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    return specimens.subject(trainer=Plain, size={"tied": True})


class _Grouped(specimens.Trainer):
    """Groups by another rule than the policy."""

    kind: type[torch.optim.Optimizer] = torch.optim.AdamW

    def make_optimizer(self) -> torch.optim.Optimizer:
        named = dict(self.model.named_parameters())
        groups: list[dict[str, Any]] = [
            {
                "params": [p for n, p in named.items() if self.spared(n, p) is bare],
                "weight_decay": 0.0 if bare else 0.1,
            }
            for bare in (False, True)
        ]
        return self.kind([group for group in groups if group["params"]], lr=self.learning_rate)

    def spared(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.dim() < 2


@decay_groups.plant("decay-on-norm", component="norm", what="spared by a list of names")
def _() -> Subject:
    class Broken(_Grouped):
        def spared(self, name: str, parameter: nn.Parameter) -> bool:
            return "attention_norm" in name or "ffn_norm" in name  # the last norm is called norm

    return specimens.subject(trainer=Broken)


@decay_groups.plant("decay-on-norm", component="norm", what="no policy is declared")
def _() -> Subject:
    class Broken(_Grouped):
        def spared(self, name: str, parameter: nn.Parameter) -> bool:
            return "attention_norm" in name or "ffn_norm" in name

        def handed_over(self) -> Training:
            training = super().handed_over()
            training.decays = None
            return training

    return specimens.subject(trainer=Broken)


@decay_groups.plant("decay-everything", component="groups")
def _() -> Subject:
    class Broken(_Grouped):
        def spared(self, name: str, parameter: nn.Parameter) -> bool:
            return False

    return specimens.subject(trainer=Broken)


@decay_groups.plant("wd-coupled", component="optimizer")
def _() -> Subject:
    class Broken(_Grouped):
        kind = torch.optim.Adam

    return specimens.subject(trainer=Broken)


@decay_groups.healthy("SGD with momentum")
def _() -> Subject:
    class Plain(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            groups = super().make_optimizer().param_groups
            kept = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
            return torch.optim.SGD(kept, lr=0.1, momentum=0.9)

    return specimens.subject(trainer=Plain)


@decay_groups.healthy("a policy of its own: the embedding is spared too")
def _() -> Subject:
    class Own(_Grouped):
        def spared(self, name: str, parameter: nn.Parameter) -> bool:
            return parameter.dim() < 2 or "embedding" in name

        def handed_over(self) -> Training:
            training = super().handed_over()
            training.decays = lambda name, p: p.dim() >= 2 and "embedding" not in name
            return training

    def step(self: Any, micro_batches: list[Rows]) -> dict[str, float]:
        raise AssertionError("this check takes no training step")

    Own.step = step  # type: ignore[method-assign]
    return specimens.subject(trainer=Own)
