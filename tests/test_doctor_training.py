"""The checks of training and checkpoints: silent on our trainer and on a plain torch loop, loud when ours is broken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from minilm import models
from minilm.doctor import specimens
from minilm.doctor.core import Finding, run_checks, select
from minilm.doctor.subject import Rows, Subject, Training
from minilm.doctor.targets.our_training import training_of
from minilm.training import ema, optim, step
from minilm.training.layout import Layout
from minilm.training.optim import OptimConfig
from minilm.training.settings import TrainConfig

VOCAB = 61
NAMES = [c.name for c in select(only=["training"])] + ["resume"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def our_subject(optimizer: str = "adamw", precision: str = "fp32", **train: Any) -> Subject:
    config = models.config_class("original")(
        vocab_size=VOCAB, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=64, max_length=64
    )

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return models.build(config)

    settings = TrainConfig(steps=20, batch_size=8, precision=precision, device="cpu", ema_decay=0.9, **train)
    training = training_of(make, OptimConfig(name=optimizer, warmup_steps=3), settings)
    return Subject(name="ours", vocab_size=VOCAB, max_length=64, special_ids=(0, 1, 2), training=training)


class Loop:
    """What people write: a few lines around a module and a torch optimizer, no code of ours."""

    def __init__(
        self, kind: Callable[..., torch.optim.Optimizer], clip_norm: float | None, seed: int
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
            body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.model = nn.ModuleDict(
                {"embed": nn.Embedding(VOCAB, 32), "body": body, "head": nn.Linear(32, VOCAB)}
            )
        self.optimizer, self.clip_norm = kind(self.model.parameters()), clip_norm

    def forward(self, module: nn.Module, tokens: Tensor, segments: Tensor) -> Tensor:
        parts: Any = module
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return parts["head"](parts["body"](parts["embed"](tokens), mask=mask, is_causal=True))

    def step(self, micro_batches: list[Rows]) -> dict[str, float]:
        labels = [torch.where(rows.segments > 0, rows.tokens, -100)[:, 1:] for rows in micro_batches]
        total = sum(int((part != -100).sum()) for part in labels)
        self.optimizer.zero_grad()
        loss = 0.0
        for rows, label in zip(micro_batches, labels, strict=True):
            logits = self.forward(self.model, rows.tokens, rows.segments)[:, :-1]
            part = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="sum") / total
            part.backward()
            loss += float(part.detach())
        limit = self.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit, error_if_nonfinite=True)
        self.optimizer.step()
        return {"loss": loss, "gradient_norm": float(norm)}


def loop_subject(kind: Callable[..., torch.optim.Optimizer]) -> Subject:
    def training(clip_norm: float | None = 1.0, seed: int = 0) -> Training:
        loop = Loop(kind, clip_norm, seed)
        return Training(
            module=loop.model.train(), step=loop.step, forward=loop.forward, optimizer=loop.optimizer
        )

    return Subject(name="a loop", vocab_size=VOCAB, max_length=64, training=training)


def findings(subject: Subject, names: list[str] = NAMES) -> dict[str, Finding]:
    return {finding.check: finding for finding in run_checks(subject, select(only=names))}


def healthy(found: dict[str, Finding], *, may_not_run: set[str]) -> None:
    """Every check passed, but for those that are known to lack something here; none fell over."""
    assert {n: f.message for n, f in found.items() if f.status == "FAIL"} == {}
    assert {n: f.message for n, f in found.items() if f.status == "NOT RUN" and n not in may_not_run} == {}
    assert not [n for n, f in found.items() if "traceback" in f.details]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_our_trainer_passes_every_check_of_training(optimizer: str) -> None:
    healthy(findings(our_subject(optimizer)), may_not_run={"recompute"})


def test_our_trainer_passes_with_recomputed_blocks() -> None:
    subject = our_subject(activation_checkpointing="blocks")
    healthy(findings(subject, ["recompute", "golden_step", "clipping", "logged_loss"]), may_not_run=set())


def test_bfloat16_autocast_is_no_alarm() -> None:
    subject = our_subject(precision="bf16")
    names = ["golden_step", "clipping", "logged_loss", "master_weights", "real_updates"]
    healthy(findings(subject, names), may_not_run=set())


@pytest.mark.parametrize(
    "kind",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    ],
    ids=["sgd", "adamw"],
)
def test_a_plain_torch_loop_is_no_alarm(kind: Callable[..., torch.optim.Optimizer]) -> None:
    lacks = {"schedule", "average", "resume", "recompute", "decay_groups", "optimizer_math", "dropout_masks"}
    healthy(findings(loop_subject(kind)), may_not_run=lacks)


# ---------------------------------------------------------------- our trainer, broken


def _per_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """Each micro-batch divides by its own targets."""
    original = step.accumulate

    def accumulate(layout: Layout, batches: Any, total: float, *more: Any, **options: Any) -> Any:
        parts = [
            original(layout, [b], float(b.num_targets()) * len(batches), *more, **options) for b in batches
        ]
        return sum((p[0] for p in parts[1:]), parts[0][0]), parts[0][1]

    patch.setattr(step, "accumulate", accumulate)


def _last_lost(patch: pytest.MonkeyPatch) -> None:
    original = step.accumulate
    patch.setattr(step, "accumulate", lambda layout, b, *more, **o: original(layout, b[:-1] or b, *more, **o))


def _clipped_twice(patch: pytest.MonkeyPatch) -> None:
    """Once per micro-batch, and at the end."""
    original = Layout.backward

    def backward(self: Layout, contribution: Tensor, *, last: bool) -> None:
        original(self, contribution, last=last)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip_norm)

    patch.setattr(Layout, "backward", backward)


def _never_clipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.utils, "clip_grads_with_norm_", lambda *given, **more: None)


def _kept_gradients(patch: pytest.MonkeyPatch) -> None:
    original = Layout.prepare

    def prepare(self: Layout, *given: Any, **more: Any) -> None:
        original(self, *given, **more)
        self.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]

    patch.setattr(Layout, "prepare", prepare)


def _everything_decays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        optim, "groups", lambda parameters, decay: [{"params": list(parameters), "weight_decay": decay}]
    )


def _half_optimized(patch: pytest.MonkeyPatch) -> None:
    original = optim.groups
    patch.setattr(optim, "groups", lambda parameters, decay: original(list(parameters)[3:], decay))


def _rate_of_one_group(patch: pytest.MonkeyPatch) -> None:
    def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate

    patch.setattr(optim, "set_rate", set_rate)


def _average_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ema, "get_ema_multi_avg_fn", lambda d: lambda s, live, _: torch._foreach_lerp_(s, live, d))


def _nothing_is_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step.StepResult, "is_finite", property(lambda self: True))


BROKEN = [
    (_per_micro_batch, "golden_step", "mean-of-means-accum"),
    (_last_lost, "golden_step", "last-partial-dropped"),
    (_clipped_twice, "clipping", "clip-per-micro"),
    (_never_clipped, "clipping", "clip-disabled-bf16"),
    (_kept_gradients, "golden_step", "zero-grad-missing"),
    (_everything_decays, "decay_groups", "decay-everything"),
    (_half_optimized, "optimizer_covers", "params-missing"),
    (_rate_of_one_group, "schedule", "lr-tensor-alias"),
    (_average_swapped, "average", "ema-beta-swapped"),
    (_nothing_is_checked, "nonfinite", "nan-grad-poisons-clip"),
]


@pytest.mark.parametrize(("break_it", "check", "bug"), BROKEN, ids=lambda x: getattr(x, "__name__", x))
def test_a_defect_of_our_trainer_is_found_and_named(
    break_it: Callable[[pytest.MonkeyPatch], None], check: str, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    found = findings(our_subject(), [check])[check]
    assert found.status == "FAIL", found.message
    assert found.bugs[0] == bug


def test_a_resume_that_forgets_the_moments_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from minilm.doctor.targets import our_training

    def load(layout: Layout, found: Any) -> dict[str, Any]:
        return found.trainer

    monkeypatch.setattr(our_training.checkpoint, "load", load)
    found = findings(our_subject(), ["resume"])["resume"]
    assert found.status == "FAIL" and "opt-state-lost" in found.bugs, found.message


def test_a_rank_that_fails_is_said_and_the_next_question_is_answered() -> None:
    subject = specimens.subject()
    assert subject.ranks is not None
    with pytest.raises(RuntimeError, match="on a rank"):
        subject.ranks(Path, 2)
    with contextlib.closing(iter(run_checks(subject, select(only=["rank_state"])))) as found:
        assert next(found).status == "PASS"
