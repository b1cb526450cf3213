"""Bugs in data, loss, update, schedule and checkpoint."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from unseen.bug import bug
from unseen.plain import IGNORED, Kit


@bug(
    "stride-plus-one",
    part="data rows",
    severity="low",
    mistake="The stream is cut with stride length + 1, the size of a row, instead of length.",
    symptom="No two rows share a token, so one pair of neighbours in length + 1 is never trained on.",
    when="rows cut from something longer than a row",
)
def stride_plus_one(kit: Kit) -> Kit:
    class Rows(kit.rows):
        def cut(self, piece):
            size = self.length + 1
            return [piece[i : i + size] for i in range(0, len(piece) - 1, size)]

    return replace(kit, rows=Rows)


@bug(
    "split-two-orders",
    part="data split",
    severity="high",
    mistake="Training takes the first part of the shuffled documents, validation the end of the unshuffled list.",
    symptom="Most validation documents are trained on; the validation loss is too good.",
    when="always, seen when the model begins to memorise",
)
def split_two_orders(kit: Kit) -> Kit:
    def split(documents, share=0.1, seed=0):
        kept = len(documents) - int(len(documents) * share)
        shuffled = random.Random(seed).sample(documents, len(documents))
        return shuffled[:kept], documents[kept:]

    return replace(kit, split=split)


@bug(
    "seed-times-epoch",
    part="data order",
    severity="low",
    mistake="The order of an epoch is seeded with seed * epoch.",
    symptom="The first epoch is the same for every seed, and with seed 0 every epoch is the same.",
    when="seed 0 from the second epoch on, or comparing seeds",
)
def seed_times_epoch(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def order(self, epoch):
            rows = range(len(self.train))
            return random.Random(self.settings.seed * epoch).sample(rows, len(rows))

    return replace(kit, trainer=Trainer)


@bug(
    "rank-in-seed",
    part="data order (ranks)",
    severity="high",
    mistake="Each rank adds its number to the seed of the order, then takes its own stripe of it.",
    symptom="In an epoch some rows are seen by several ranks and others by none.",
    when="more than one rank",
    settings={"world": 2},
)
def rank_in_seed(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def order(self, epoch):
            rows, s = range(len(self.train)), self.settings
            return random.Random(f"{s.seed + s.rank} {epoch}").sample(rows, len(rows))

    return replace(kit, trainer=Trainer)


@bug(
    "counted-by-input",
    part="loss",
    severity="low",
    mistake="A target is counted where its input is a token, instead of where the target is one.",
    symptom="After each end of document the model learns padding, or in packed rows the first token "
    "of an unrelated document. The easy extra targets lower the loss in training and evaluation.",
    when="padding or several documents in a row",
    packed=False,
)
def counted_by_input(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def align(self, ids, segments):
            inputs, kept, _ = super().align(ids, segments)
            return inputs, kept, ids[:, 1:].masked_fill(kept == 0, IGNORED)

    return replace(kit, trainer=Trainer)


@bug(
    "capped-token-loss",
    part="loss",
    severity="medium",
    mistake="The loss of a token is clamped at 5 nats in training, 'against outliers'.",
    symptom="Tokens the model finds very unlikely get no gradient at all, so rare ones stay unlearnt; "
    "the training loss is below the validation loss.",
    when="tokens with more than 5 nats, after the first steps",
)
def capped_token_loss(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def losses(self, logits, targets):
            if not self.model.training:
                return super().losses(logits, targets)
            each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            return {"loss": each.clamp(max=5.0).sum()}

    return replace(kit, trainer=Trainer)


@bug(
    "tokens-of-first-micro",
    part="accumulation",
    severity="medium",
    mistake="The gradient is divided by the tokens of the first micro-batch times the number of micro-batches.",
    symptom="The logged loss is right, but the size of the gradient depends on which rows came first.",
    when="several micro-batches with unequal numbers of tokens",
    packed=False,
)
def tokens_of_first_micro(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def accumulate(self, batches, tokens):
            return super().accumulate(batches, self.count(batches[:1]) * len(batches))

    return replace(kit, trainer=Trainer)


@bug(
    "same-dropout-in-step",
    part="dropout",
    severity="low",
    mistake="The generator is seeded with the step before each micro-batch, 'to be reproducible'.",
    symptom="All micro-batches of a step drop the same units, and the seed of the run has no part in it.",
    when="dropout above 0 and more than one micro-batch",
    settings={"dropout": 0.2},
)
def same_dropout_in_step(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def micro_losses(self, *batch):
            torch.manual_seed(self.step)
            return super().micro_losses(*batch)

    return replace(kit, trainer=Trainer)


@bug(
    "clip-always-rescales",
    part="clipping",
    severity="medium",
    mistake="The gradient is multiplied by clip / norm without the upper limit of 1.",
    symptom="Gradients smaller than the limit are blown up to it; the logged norm is right.",
    when="gradients smaller than `clip`, that is late in training",
)
def clip_always_rescales(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def clip(self):
            gradients = [weight.grad for weight in self.model.parameters()]
            norm = nn.utils.get_total_norm(gradients)
            for gradient in gradients:
                gradient.mul_(self.settings.clip / (norm + 1e-6))
            return float(norm)

    return replace(kit, trainer=Trainer)


class TensorCountingAdamW(torch.optim.Optimizer):
    """AdamW whose step counter stands one loop too deep."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float = 1e-8):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "t": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for weight in group["params"]:
                group["t"] += 1
                state = self.state[weight]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(weight), torch.zeros_like(weight)
                m = state["m"].lerp_(weight.grad, 1 - b1) / (1 - b1 ** group["t"])
                v = state["v"].lerp_(weight.grad**2, 1 - b2) / (1 - b2 ** group["t"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.addcdiv_(m, v.sqrt() + group["eps"], value=-group["lr"])


@bug(
    "step-counted-per-tensor",
    part="optimizer",
    severity="low",
    mistake="A hand-written AdamW advances its step counter once for each tensor instead of once a step.",
    symptom="The correction of the moments fades too soon: the first updates of most tensors are too small.",
    when="the first twenty steps or so",
)
def step_counted_per_tensor(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def build_optimizer(self):
            right = super().build_optimizer()
            groups = [{k: group[k] for k in ("params", "weight_decay")} for group in right.param_groups]
            return TensorCountingAdamW(groups, lr=self.settings.lr, betas=(0.9, 0.95))

    return replace(kit, trainer=Trainer)


@bug(
    "lr-first-group-only",
    part="schedule",
    severity="medium",
    mistake="The learning rate is written into param_groups[0] only.",
    symptom="Matrices follow the schedule; embeddings, norms and biases stay at the peak rate, "
    "without warm-up and without decay. The logged rate is right.",
    when="more than one group of parameters",
)
def lr_first_group_only(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def set_lr(self, lr):
            self.optimizer.param_groups[0]["lr"] = lr

    return replace(kit, trainer=Trainer)


@bug(
    "schedule-restarts",
    part="schedule",
    severity="medium",
    mistake="The schedule is asked with the number of the batch within the epoch (`for step, batch in enumerate`).",
    symptom="Warm-up starts again with each epoch and the low end of the cosine is never reached.",
    when="from the second epoch on",
)
def schedule_restarts(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def current_lr(self):
            return self.lr_at(self.step % self.steps_per_epoch)

    return replace(kit, trainer=Trainer)


@bug(
    "resume-forgets-epoch",
    part="checkpoint",
    severity="medium",
    mistake="A checkpoint keeps the place within the epoch; the number of the epoch starts again at 0.",
    symptom="After a resume the order of the first epoch is used: some rows of the broken epoch "
    "come twice and others never. Step and learning rate are right.",
    when="a resume in the second epoch or later",
)
def resume_forgets_epoch(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        lost = 0

        def load(self, path):
            super().load(path)
            self.lost = self.step // self.steps_per_epoch

        def rows_of_step(self, step):
            return super().rows_of_step(step - self.lost * self.steps_per_epoch)

    return replace(kit, trainer=Trainer)


@bug(
    "moments-saved-in-half",
    part="checkpoint",
    severity="low",
    mistake="The moments of the optimizer are saved as float16 to make the checkpoint smaller.",
    symptom="A resumed run is not the run that was broken off. Second moments below 3e-8 become 0, "
    "so weights with small gradients take a far too large first step.",
    when="a resume",
)
def moments_saved_in_half(kit: Kit) -> Kit:
    class Trainer(kit.trainer):
        def state(self):
            state = super().state()
            moments = state["optimizer"]["state"].items()
            halves = {i: {k: v if k == "step" else v.half() for k, v in kept.items()} for i, kept in moments}
            return {**state, "optimizer": {**state["optimizer"], "state": halves}}

    return replace(kit, trainer=Trainer)
