"""Steps are taken in train mode, with other dropout each time, and what a seed decides is decided by it.

Why: a validation that leaves the model in eval mode switches dropout off for the rest of the run; a seed that is set
again at each step gives the same masks for ever; a seed that is ignored makes two runs incomparable, or all alike.

How: the mode is noted at each forward pass of three steps. Two set-ups of one seed must hold the same bits at first,
whatever other random numbers were drawn before; two of different seeds must not. From the same random states two steps
must end in the same bits (on a CPU; elsewhere within 1e-4). With all dropouts at 0.3, two forward passes in train mode
must differ, and so must the masks of two steps on the same rows.

Cannot see: random numbers drawn outside of torch, numpy and python's `random`.

Sources: K8 and K13 of the catalogue; Karpathy, A Recipe for Training Neural Networks (fix the random seed).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, difference, random_states_kept
from minilm.doctor.stepping import even_rows, logits_of, relative_error, start, takes, weights_of
from minilm.doctor.subject import Rows, Subject, Training

DROPOUT = 0.3


def with_dropout(module: nn.Module) -> bool:
    """Give every dropout of the module the same share; False where there is none."""
    found = False
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p, found = DROPOUT, True
        for name, value in list(vars(part).items()):
            if "dropout" in name.lower() and isinstance(value, float) and 0 <= value < 1:
                setattr(part, name, DROPOUT)
                found = True
    return found


@check(group="training", needs=("training", "vocab_size"), cost="3 steps")
def train_mode(subject: Subject) -> Finding:
    """Parts in eval mode during a step."""
    training = start(subject, seed=0)
    wrong: list[tuple[int, str]] = []
    calls = 0
    step = 0

    def note(part: nn.Module, *_: object) -> None:
        nonlocal calls
        if not torch.is_grad_enabled():  # a validation within the step may be in eval mode
            return
        calls += 1
        if not training.module.training:
            wrong.append((step, "the whole model"))
        elif not part.training and isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            wrong.append((step, names[part]))  # other parts may be frozen on purpose

    names = {part: name for name, part in training.module.named_modules()}
    handles = [part.register_forward_pre_hook(note) for part in names]
    try:
        for step in (1, 2, 3):
            training.step(even_rows(subject, seed=step).split(2))
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise NotApplicable("its step does not call the module that was handed over")
    if wrong:
        return failed(
            f"{wrong[0][1]} is in eval mode in step {wrong[0][0]}", float(len(wrong)), 0.0, unit="calls",
            bugs=["eval-left-in-train-mode"], component=f"mode of {wrong[0][1]}",
            advice="call train() before each step, or put the mode back after each evaluation",
        )  # fmt: skip
    return passed(f"all of {calls} calls of modules in 3 steps were in train mode", 0.0, 0.0, unit="calls")


@check(group="training", needs=("training", "vocab_size"), cost="6 set-ups, 4 steps")
def determinism(subject: Subject) -> Finding:
    """Same seed, same bits; other seed, other bits; other step, other dropout."""
    first = _begin(subject, seed=0, noise=1)
    if takes(subject, "seed"):
        again, other = _begin(subject, seed=0, noise=2), _begin(subject, seed=1, noise=1)
        if _unlike(first, again):
            return _failed("seed-not-applied", f"two set-ups of one seed begin unlike ({_unlike(first, again)})",
                           "draw the weights from a generator that the seed decides")  # fmt: skip
        given = {} if subject.module is None else weights_of(subject.module)
        copied = bool(given) and not _unlike(
            given, first
        )  # the set-up begins with the weights that it was given
        if subject.fresh and not copied and not _unlike(first, other):
            return _failed("seed-not-applied", "set-ups of two different seeds begin with the same weights",
                           "hand the seed on to where the weights are drawn")  # fmt: skip
    ends = []
    device = next(iter(first.values())).device.type
    for _ in range(2):
        with random_states_kept(5):
            training = start(subject, seed=0)
            with_dropout(training.module)
            for _ in (1, 2):
                training.step(even_rows(subject).split(2))
            ends.append(weights_of(training.module))
    gap = relative_error(ends[1], ends[0])
    limit = 0.0 if device == "cpu" else FLOAT32_NOISE
    if gap > limit:
        return _failed("nondeterministic-kernel", f"two steps from the same random states end {gap:.1e} apart, in "
                       f"{_unlike(ends[0], ends[1])}",
                       "find the operation that adds up in an order of chance", gap)  # fmt: skip
    stuck = _same_masks(subject)
    if stuck:
        return _failed("seed-not-applied", stuck, "seed once at the start, not at each step")
    return passed(
        "seeds decide the weights, equal random states give equal bits", gap, limit, unit="of the weights"
    )


def _begin(subject: Subject, *, seed: int, noise: int) -> Mapping[str, Tensor]:
    with random_states_kept(noise):
        return weights_of(start(subject, seed=seed).module)


def _unlike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str:
    """The first parameter that differs in any bit."""
    return next((name for name in a if name not in b or not torch.equal(a[name], b[name])), "")


def _failed(bug: str, text: str, advice: str, measured: float = 1.0) -> Finding:
    where = {"seed-not-applied": "random seeds", "nondeterministic-kernel": "an operation of the step"}[bug]
    return failed(text, measured, 0.0, unit="of the weights", bugs=[bug], component=where, advice=advice)


def _same_masks(subject: Subject) -> str:
    """Do two forward passes, or two steps, use the same dropout? What was seen, else empty."""
    with random_states_kept(3):
        training = start(subject, seed=0)
        if training.forward is None or not with_dropout(training.module):
            return ""
        training.module.train()
        rows = even_rows(subject)
        outputs = [_masked(training, rows), _masked(training, rows)]
        if difference(outputs[0], outputs[1]) == 0:
            return f"two forward passes in train mode with a dropout of {DROPOUT} are equal"
        states = []
        for _ in range(2):
            training.step(rows.split(2))
            states.append(torch.get_rng_state())
        device = next(training.module.parameters()).device.type
        drew = not torch.equal(outputs[0], outputs[1]) and device == "cpu"
        if drew and torch.equal(states[0], states[1]):
            return "the random state after each step is the same: every step uses the same dropout"
    return ""


def _masked(training: Training, rows: Rows) -> Tensor:
    with torch.no_grad():
        return logits_of(training, rows)


@train_mode.plant("eval-left-in-train-mode", component="whole model")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def step(self, micro_batches: list[Rows]) -> dict[str, float]:
            kept, self.model.train = self.model.train, lambda mode=True: self.model
            logged = super().step(micro_batches)
            self.model.train = kept
            self.model.eval()  # for a sample, and left so
            return logged

    return specimens.subject(trainer=Broken)


@train_mode.healthy("a validation in eval mode within the step, that is undone")
def _() -> Subject:
    class Validating(specimens.Trainer):
        def step(self, micro_batches: list[Rows]) -> dict[str, float]:
            logged = super().step(micro_batches)
            self.model.eval()
            with torch.no_grad():
                self.model(micro_batches[0].tokens)
            self.model.train()
            return logged

    return specimens.subject(trainer=Validating)


@determinism.plant("seed-not-applied", component="seed", what="the weights are drawn from the global state")
def _() -> Subject:
    subject = specimens.subject()
    assert subject.training is not None
    whole = subject.training
    return subject.but(training=lambda seed=0, **more: whole(seed=int(torch.randint(10**6, ())), **more))


@determinism.plant("seed-not-applied", component="seed", what="a fixed seed whatever is asked for")
def _() -> Subject:
    subject = specimens.subject()
    assert subject.training is not None
    whole = subject.training
    return subject.but(training=lambda seed=0, **more: whole(seed=42, **more))


@determinism.plant("seed-not-applied", component="seed", what="seeded again at each step")
def _() -> Subject:
    class Broken(specimens.Trainer):
        def step(self, micro_batches: list[Rows]) -> dict[str, float]:
            torch.manual_seed(0)
            return super().step(micro_batches)

    return specimens.subject(trainer=Broken)


@determinism.plant("nondeterministic-kernel", component="operation")
def _() -> Subject:
    class Chance(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            order = list(range(self.down.weight.shape[1]))
            random.SystemRandom().shuffle(order)  # as atomic additions do
            hidden = nn.functional.silu(self.gate(x)) * self.up(x)
            return hidden[..., order] @ self.down.weight[:, order].t()

    return specimens.subject(ffn=Chance)


@determinism.healthy("dropout 0.2, tied")
def _() -> Subject:
    return specimens.subject(size={"dropout": 0.2, "tied": True})


@determinism.healthy("every set-up begins with a copy of the module's weights")
def _() -> Subject:
    subject = specimens.subject(size={"dropout": 0.1})
    assert subject.training is not None and subject.module is not None
    whole, module = subject.training, subject.module

    def copying(seed: int = 0, **more: Any) -> Training:
        training = whole(seed=seed, **more)
        training.module.load_state_dict(module.state_dict())
        return training

    return subject.but(training=copying)


@determinism.healthy("loaded weights: every seed begins alike")
def _() -> Subject:
    subject = specimens.subject()
    assert subject.training is not None
    whole = subject.training
    return subject.but(fresh=False, training=lambda seed=0, **more: whole(seed=42, **more))
