"""Evaluation and generation leave no trace.

Why: a model that stays in eval mode after its first validation trains on without dropout. An evaluation that draws
from the generators of training, or seeds them, changes the run that it watches. None of this raises an error.

How: in train mode, in the midst of a step, with gradients in place: weights, buffers, gradients, the mode of every
submodule, grad mode and the random states of torch, Python and numpy are compared before and after, bit by bit.

Cannot see: traces outside of torch (files, the position of the owner's data stream).

Sources: K8 of the catalogue; torchtune 1049 (mode of evaluation); the tests of nanochat and OLMo-core on random states.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.checks.examples import uneven
from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import random_states_kept, tokens_for, untouched
from minilm.doctor.subject import Subject

BUGS = {
    "modes": "eval-left-in-train-mode",
    "random states": "eval-consumes-train-rng",
    "weights": "train-eval-leak",
    "gradients": "zero-grad-each-micro",
    "grad mode": "eval-left-in-train-mode",
}


@check(
    group="evaluation",
    needs=("evaluate", "module", "vocab_size"),
    cost="4 forwards of 3 x 12 tokens",
    quick=True,
)
def evaluation_leaves_no_trace(subject: Subject) -> Finding:
    """Weights, gradients, modes and random states are the same after evaluation as before."""
    rows = uneven(subject, 4)

    def everything() -> None:
        subject.evaluate(rows.split(2))
        if subject.perplexity is not None:
            subject.perplexity(rows.split(2))
        if subject.continuation is not None:
            ids = rows.tokens[-1].tolist()
            subject.continuation(ids[:3], ids[3:5])

    return _traces(subject, everything, "evaluation")


@check(group="evaluation", needs=("generate", "module", "vocab_size"), cost="2 generations of 4 tokens")
def generation_leaves_no_trace(subject: Subject) -> Finding:
    """Weights, gradients, modes and random states are the same after generating, greedily and sampled."""
    prompts = tokens_for(subject, 2, 4).tolist()

    def everything() -> None:
        subject.generate(prompts, 3, temperature=0.0)
        subject.generate(prompts, 3, temperature=1.0, seed=1)

    return _traces(subject, everything, "generation")


def _traces(subject: Subject, run: Callable[[], None], what: str) -> Finding:
    module = subject.module
    assert module is not None
    with untouched(subject), random_states_kept(3):
        module.train()
        for number, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + number) if parameter.requires_grad else None
        before = _state(module)
        run()
        after = _state(module)
    changed = {kind: _changed(before[kind], after[kind]) for kind in before}
    traces = {kind: names for kind, names in changed.items() if names}
    total = sum(map(len, traces.values()))
    if not traces:
        kinds = ", ".join(before)
        return passed(
            f"{what} left {kinds} as they were ({len(before['weights'])} tensors)", 0.0, 0.0, unit="traces"
        )
    told = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in traces.items())
    return failed(
        f"{what} changed {told}",
        float(total),
        0.0,
        unit="traces",
        bugs=[BUGS[kind] for kind in traces],
        component=f"{what} ({next(iter(traces))})",
        advice="note every module's mode and the random states before, and put them back in a finally clause",
    )


def _state(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that may be left changed, by kind and name."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    numbers = np.random.get_state()
    return {
        "modes": {name or "the whole model": part.training for name, part in module.named_modules()},
        "random states": {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": (numbers[1].tobytes(), numbers[2:]),
        },
        "weights": {name: value.detach().clone() for name, value in tensors},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "grad mode": {"torch.is_grad_enabled": torch.is_grad_enabled(), "dtype": torch.get_default_dtype()},
    }


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        return type(a) is type(b) and a == b

    return [name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name))]


# ---------------------------------------------------------------- planted


@evaluation_leaves_no_trace.plant("eval-left-in-train-mode", component="modes", what="stays in eval mode")
def _() -> Subject:
    class Staying(specimens.Evaluation):
        def leave(self, was_training: bool) -> None:
            return None

    return specimens.subject(evaluation=Staying)


@evaluation_leaves_no_trace.plant("eval-consumes-train-rng", component="random states")
def _() -> Subject:
    class Shuffling(specimens.Evaluation):
        def evaluate(self, batches: Any) -> float:
            return super().evaluate([batches[i] for i in torch.randperm(len(batches)).tolist()])

    return specimens.subject(evaluation=Shuffling)


@evaluation_leaves_no_trace.plant(
    "eval-consumes-train-rng", component="random states", what="seeds them anew"
)
def _() -> Subject:
    class Seeding(specimens.Evaluation):
        def enter(self) -> bool:
            random.seed(0)
            return super().enter()

    return specimens.subject(evaluation=Seeding)


@generation_leaves_no_trace.plant("eval-left-in-train-mode", component="modes")
def _() -> Subject:
    class Staying(specimens.Generator):
        def leave(self, was_training: bool) -> None:
            return None

    return specimens.subject(generator=Staying)


@generation_leaves_no_trace.plant("eval-consumes-train-rng", component="random states")
def _() -> Subject:
    class Global(specimens.Generator):
        def generator(self, seed: int) -> torch.Generator:
            return torch.default_generator.manual_seed(seed)

    return specimens.subject(generator=Global)


@evaluation_leaves_no_trace.healthy("dropout in the model")
def _() -> Subject:
    return specimens.subject(size={"dropout": 0.3})
