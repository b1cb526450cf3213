"""Every micro-batch and every step drops other units.

Why: a generator that is seeded again before each micro-batch or step, for the sake of reproducibility, makes dropout
drop the same units all over the step, or for ever: the part that is dropped together is never averaged over.

How: every dropout at 0.3, four micro-batches with the same tokens, two steps, weights put back in between. What the
module returns in a training step is a function of its dropout alone then: as many different results are expected as
there are micro-batches, in each step and over both. A forward pass that is computed again on purpose (activation
checkpointing) repeats a result within its micro-batch; that makes results no fewer. Equal is what differs by less than
1e-5 of its deviation; other masks move it by tenths.

Cannot see: masks that are partly the same; a trainer that merges micro-batches into one pass; masks that repeat after
more than two steps.

Sources: rows 129 and 190 of the catalogue; Karpathy, A Recipe for Training Neural Networks (fix the random seed).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.checks.training_modes import DROPOUT, with_dropout
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import difference, first_tensor, no_randomness, random_states_kept
from minilm.doctor.stepping import even_rows, logits_of, start, weights_of
from minilm.doctor.subject import Rows, Subject, Training

MICRO_BATCHES, STEPS = 4, 2
BEGIN = 918_273  # the random state before: no seed that a trainer is likely to set by itself


@check(group="training", needs=("training", "vocab_size"), cost="2 steps of 4 micro-batches")
def dropout_masks(subject: Subject) -> Finding:
    """Results of the module on the same tokens, within a step and over two."""
    with random_states_kept(BEGIN):
        training = start(subject, seed=0)
        if not with_dropout(training.module):
            raise NotApplicable("it has no dropout")
        steps = _steps(training, even_rows(subject, rows=1))
    least = min(map(len, steps))
    if least < MICRO_BATCHES:
        raise NotApplicable(f"a step of {MICRO_BATCHES} micro-batches calls the module {least} times")
    kinds = [_different(made) for made in steps]
    over = _different([one for made in steps for one in made])
    if len(over) == 1 and _has_no_effect(training, subject):
        raise NotApplicable("its dropout changes nothing")
    fewest = min(map(len, kinds))
    said = f"at dropout {DROPOUT} {MICRO_BATCHES} micro-batches of the same tokens give {fewest} different results"
    if fewest < MICRO_BATCHES:
        return _failed(f"{said}: they drop the same units", fewest, MICRO_BATCHES, "before each micro-batch")
    if len(over) < sum(map(len, kinds)):
        return _failed(f"{said}, {len(over)} over {STEPS} steps: each step drops what the step before dropped",
                       len(over), MICRO_BATCHES * STEPS, "at each step")  # fmt: skip
    return passed(f"{said}, {len(over)} over {STEPS} steps", len(over), MICRO_BATCHES * STEPS, unit="results")


def _steps(training: Training, row: Rows) -> list[list[Tensor]]:
    """What the module returned in each step, weights and buffers put back after each."""
    module, found = training.module, []
    kept = weights_of(module)
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    for _ in range(STEPS):
        seen: list[Tensor] = []

        def note(part: nn.Module, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
            made = first_tensor(output, 2)
            if made is not None and made.requires_grad:  # a validation within the step has its own
                seen.append(made.detach().clone())

        handle = module.register_forward_hook(note)
        try:
            training.step([row] * MICRO_BATCHES)
        finally:
            handle.remove()
        found.append(seen)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
    return found


def _different(made: list[Tensor]) -> list[Tensor]:
    kinds: list[Tensor] = []
    for one in made:
        if not any(_near(one, other) for other in kinds):
            kinds.append(one)
    return kinds


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and difference(a, b) < 1e-5


def _has_no_effect(training: Training, subject: Subject) -> bool:
    """Does the module give the same with its dropout and without."""
    rows = even_rows(subject, rows=1)
    training.module.train()
    with torch.no_grad(), random_states_kept(BEGIN):
        with_it = logits_of(training, rows)
        with no_randomness(training.module):
            return _near(with_it, logits_of(training, rows))


def _failed(text: str, measured: int, expected: int, when: str) -> Finding:
    return failed(
        text, measured, expected, unit="results", bugs=["seed-not-applied"], component=f"random seeds, set {when}",
        advice="seed once at the start of the run and let the generator go on; save its state for a resume",
    )  # fmt: skip


# ---------------------------------------------------------------- planted


@dropout_masks.plant(
    "seed-not-applied", component="micro-batch", what="seeded with the step before each micro-batch"
)
def _() -> Subject:
    class Seeded(specimens.Trainer):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            torch.manual_seed(self.step_number)
            return super().nats(rows)

    return specimens.subject(trainer=Seeded)


@dropout_masks.plant(
    "seed-not-applied", component="step", what="the same random state at the start of each step"
)
def _() -> Subject:
    class Seeded(specimens.Trainer):
        def step(self, micro_batches: list[Rows]) -> dict[str, float]:
            torch.manual_seed(1)
            logged = super().step(micro_batches)
            torch.manual_seed(self.step_number)  # so that the state at the end tells nothing
            return logged

    return specimens.subject(trainer=Seeded)


@dropout_masks.plant(
    "seed-not-applied",
    component="micro-batch",
    what="a block seeds by itself",
)
def _() -> Subject:
    class Kept(specimens.model.Block):
        def forward(self, x: Tensor, *how: Any) -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return super().forward(x, *how)

    return specimens.subject(block=Kept)


# ---------------------------------------------------------------- healthy


class _Again(specimens.model.Block):
    """Computed again in backward, with the same masks."""

    def forward(self, x: Tensor, *how: Any) -> Tensor:
        again = torch.utils.checkpoint.checkpoint
        return (
            again(super().forward, x, *how, use_reentrant=False)
            if self.training
            else super().forward(x, *how)
        )


@dropout_masks.healthy("blocks that are computed again in backward")
def _() -> Subject:
    return specimens.subject(block=_Again, size={"dropout": 0.1})


@dropout_masks.healthy("the whole model is computed again in backward")
def _() -> Subject:
    class Whole(specimens.Trainer):
        def forward(self, module: nn.Module, tokens: Tensor, segments: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(module, tokens, segments, use_reentrant=False)

    return specimens.subject(trainer=Whole)


@dropout_masks.healthy("a generator that is seeded with step and micro-batch")
def _() -> Subject:
    class Seeded(specimens.Trainer):
        def backward(self, nats: Tensor, count: int, total: float, number: int, *rest: Any) -> None:
            super().backward(nats, count, total, number, *rest)
            torch.manual_seed(1000 * self.step_number + number)

    return specimens.subject(trainer=Seeded)
