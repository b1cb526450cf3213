"""Recomputing activations in the backward pass leaves the gradient as it is.

Why: reentrant checkpointing gives no gradient to a part whose inputs need none (a frozen embedding, an adapter): the
part silently stays as it was. A recomputation that draws other dropout masks gives the gradient of another function.

How: the gradient of a few rows with checkpointing on and off, by the model's own switch where it has one
(gradient_checkpointing_enable), else with torch's checkpoint function exchanged for a plain call. Both must have the
same parameters and, within 1e-4, the same values, without dropout and with it (from the same random state).

Cannot see: a recomputation that does not go through torch.utils.checkpoint.

Sources: K8 and K13 of the catalogue; torch.utils.checkpoint, the parameter use_reentrant.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.training_modes import with_dropout
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, no_randomness, random_states_kept, reference_loss
from minilm.doctor.stepping import even_rows, gradients_of, logits_of, relative_error, start, trainable
from minilm.doctor.subject import Subject, Training


@check(group="training", needs=("training", "vocab_size"), cost="4 forwards and backwards")
def recompute(subject: Subject) -> Finding:
    """Gradients with and without checkpointing."""
    training = start(subject, seed=0)
    with no_randomness(training.module):
        plain, checked, calls = _both(subject, training)
    if not calls:
        raise NotApplicable("needs a forward pass that goes through torch.utils.checkpoint")
    lost = [name for name in plain if name not in checked and bool(plain[name].any())]
    if lost:
        return failed(
            f"{len(lost)} of {len(plain)} parameters get no gradient when recomputed: {', '.join(lost[:4])}",
            float(len(lost)), 0.0, unit="parameters", bugs=["grad-none-ckpt"], component=f"recomputation of {lost[0]}",
            advice="checkpoint(..., use_reentrant=False)",
        )  # fmt: skip
    error = relative_error(checked, plain)
    if with_dropout(training.module):
        plain, checked, _ = _both(subject, training)
        error = max(error, relative_error(checked, plain))
    text = f"recomputing changes the gradient by {error:.1e}"
    if error <= FLOAT32_NOISE:
        return passed(text, error, FLOAT32_NOISE, unit="of the gradient")
    return failed(text, error, FLOAT32_NOISE, unit="of the gradient", bugs=["grad-none-ckpt"],
                  component="recomputation of activations",
                  advice="recompute the same function: preserve_rng_state=True")  # fmt: skip


def _both(subject: Subject, training: Training) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Gradients without and with, and how often something was recomputed."""
    module, rows, calls = training.module, even_rows(subject, rows=2, length=8), 0
    module.train()
    on, off = (getattr(module, f"gradient_checkpointing_{way}", None) for way in ("enable", "disable"))

    def gradients() -> dict[str, Tensor]:
        with random_states_kept(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch may say what is wrong; nobody reads it in a log
            loss = reference_loss(logits_of(training, rows), rows)
            return gradients_of(loss, trainable(module)) if loss.requires_grad else {}

    if on is not None and off is not None and not _in_use(gradients):
        off()
        plain = gradients()
        try:
            on()
            return plain, gradients(), 1
        finally:
            off()

    def direct(function: Callable[..., Any], *given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        own = (
            "use_reentrant",
            "preserve_rng_state",
            "context_fn",
            "determinism_check",
            "debug",
            "early_stop",
        )
        return function(*given, **{name: value for name, value in more.items() if name not in own})

    with _exchanged(direct):
        plain = gradients()
    return plain, gradients(), calls


def _in_use(gradients: Callable[[], Any]) -> bool:
    """Is something checkpointed as it is?"""
    calls: list[int] = []
    original = torch.utils.checkpoint.checkpoint

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(1)
        return original(*given, **more)

    with _exchanged(counted):
        gradients()
    return bool(calls)


@contextlib.contextmanager
def _exchanged(other: Callable[..., Any]) -> Iterator[None]:
    """torch's checkpoint function is `other`, under every name that a loaded module has for it."""
    original = torch.utils.checkpoint.checkpoint
    places = [
        (module, name)
        for module in list(sys.modules.values())
        for name, value in list(getattr(module, "__dict__", {}).items())
        if value is original
    ]
    for module, name in places:
        setattr(module, name, other)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, original)


def _checkpointed(**how: Any) -> type[torch.nn.Module]:
    class Checkpointed(specimens.Block):
        def forward(self, x: Tensor, positions: Tensor, segments: Tensor, cache: Any) -> Tensor:
            if not (self.training and torch.is_grad_enabled()):
                return super().forward(x, positions, segments, cache)
            call = super().forward
            return torch.utils.checkpoint.checkpoint(call, x, positions, segments, cache, **how)

    return Checkpointed


@recompute.plant("grad-none-ckpt", component="layers.0", what="reentrant, over a frozen embedding")
def _() -> Subject:
    class Frozen(specimens.Trainer):
        def make_optimizer(self) -> torch.optim.Optimizer:
            self.model.embedding.weight.requires_grad_(False)
            return super().make_optimizer()

    return specimens.subject(trainer=Frozen, block=_checkpointed(use_reentrant=True))


@recompute.plant("grad-none-ckpt", component="recomputation", what="other dropout when recomputed")
def _() -> Subject:
    return specimens.subject(
        block=_checkpointed(use_reentrant=False, preserve_rng_state=False), size={"dropout": 0.1}
    )


@recompute.healthy("non-reentrant, with dropout")
def _() -> Subject:
    return specimens.subject(block=_checkpointed(use_reentrant=False), size={"dropout": 0.1})


@recompute.healthy("reentrant, where all inputs need gradients")
def _() -> Subject:
    return specimens.subject(block=_checkpointed(use_reentrant=True))
