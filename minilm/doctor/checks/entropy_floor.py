"""Trained on a source whose entropy is known, the loss comes down towards it and never below.

Why: whether a loss is good cannot be seen on text. On a Markov chain with known probabilities it can: below
its entropy is a leak, and what the model has learnt shows which token it was asked for.

How: a chain over a few ids, two successors each, drawn by this check; its entropy rate is a closed form. The
subject's own trainer takes some steps, on fresh samples in each. The floor is exact: the loss of a step is
made before the step learns from it, so the product of p(model) / p(chain) over the tokens of a stretch of
steps has an expectation of at most 1 and exceeds e^20.7 with a probability below 1e-9 (1e-7 for all stretches
together); so the logged losses of no stretch may be 20.7 nats, summed, below what the chain itself gives to
these very tokens. Then the trained model's logits are scored against the token at hand, the next one and the
one after: the next one must be what it knows best. Where it learnt nothing the second half says so, and why.

Cannot see: how good the model could become (only the floor is exact); faults that a short run does not show.

Sources: Cover and Thomas, Elements of Information Theory, section 4.2; Ville 1939; K12 of the catalogue;
transformers issue 47394 (a double shift).
"""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.specimens.loss import targets
from minilm.doctor.subject import Rows, Subject, Training

STATES, STEPS, ROWS, LENGTH, MICRO = 12, 60, 8, 24, 2
GAIN = math.log(1e9)  # nats: by chance once in 1e9 for each step that a stretch could begin at
PATIENCE_SECONDS = 20.0  # then what was seen so far has to do: a step of a foreign trainer may take a second
LEARNT = 0.15  # nats per token below the stationary entropy: less is nothing, given some hundred tokens


@dataclass(frozen=True)
class Chain:
    """Order 1, over `ids`: each state has two successors, with probabilities 0.85 and 0.15."""

    ids: Tensor  # [S]
    matrix: Tensor  # [S, S] float64
    stationary: Tensor  # [S]

    @classmethod
    def drawn(cls, subject: Subject, seed: int = 0) -> Chain:
        generator = torch.Generator().manual_seed(seed)
        ordinary = [i for i in range(subject.vocab_size or 0) if i not in set(subject.special_ids)]
        if len(ordinary) < 4:
            raise NotApplicable(f"a vocabulary of {len(ordinary)} ordinary ids is too small for a chain")
        size = min(STATES, len(ordinary))
        ids = torch.tensor(ordinary)[torch.randperm(len(ordinary), generator=generator)[:size]]
        matrix = torch.zeros(size, size, dtype=torch.float64)
        cycle = torch.randperm(size, generator=generator)  # all states reach all others
        for k in range(size):
            here, likely = int(cycle[k]), int(cycle[(k + 1) % size])
            other = next(
                int(j) for j in torch.randperm(size, generator=generator) if int(j) not in (here, likely)
            )
            matrix[here, likely], matrix[here, other] = 0.85, 0.15
        stationary = torch.full((size,), 1 / size, dtype=torch.float64)
        for _ in range(3000):  # averaged with the state before: a periodic chain settles too
            stationary = 0.5 * (stationary + stationary @ matrix)
        return cls(ids, matrix, stationary)

    def entropy(self, ahead: int = 1) -> float:
        """Nats per token of the token `ahead` of the one at hand, given that one."""
        power = torch.linalg.matrix_power(self.matrix, ahead)
        return -float((self.stationary.unsqueeze(1) * torch.special.xlogy(power, power)).sum())

    @property
    def unigram(self) -> float:
        return -float(torch.special.xlogy(self.stationary, self.stationary).sum())

    def sample(self, rows: int, length: int, seed: int) -> tuple[Tensor, float]:
        """Token rows [rows, length], and the summed nats that the chain gives to them, without each first token."""
        generator = torch.Generator().manual_seed(seed)
        states = torch.empty(rows, length, dtype=torch.long)
        states[:, 0] = torch.multinomial(self.stationary, rows, replacement=True, generator=generator)
        nats = 0.0
        for t in range(1, length):
            p = self.matrix[states[:, t - 1]]
            states[:, t] = torch.multinomial(p, 1, generator=generator).squeeze(1)
            nats -= float(p.gather(1, states[:, t : t + 1]).log().sum())
        return self.ids[states], nats


@check(group="oracle", needs=("training", "vocab_size"), cost="60 training steps of [8, 24], 20 s at most")
def entropy_floor(subject: Subject) -> Finding:
    """Train on a chain: never below its entropy, and best at the next token."""
    chain, length = Chain.drawn(subject), min(LENGTH, subject.max_length or LENGTH)
    if length < 6:
        raise NotApplicable(f"needs rows of 6 tokens, the subject takes {length}")
    training = started(subject, STEPS)
    before = _scores(training, chain, length)
    below, worst, losses = 0.0, 0.0, []
    begun = time.perf_counter()
    for step in range(STEPS):
        if time.perf_counter() - begun > PATIENCE_SECONDS:
            break
        tokens, nats = chain.sample(ROWS, length, 77_000 + step)
        logged = training.step(Rows.whole(tokens).split(ROWS // MICRO)).get("loss")
        if logged is None or not math.isfinite(logged):
            raise NotApplicable(
                "the training step reports no loss" if logged is None else "the loss is not finite"
            )
        below = max(0.0, below) + nats - logged * ROWS * (length - 1)  # of the worst stretch that ends here
        worst = max(worst, below)
        losses.append(logged)
    floor, end = chain.entropy(), sum(losses[-8:]) / len(losses[-8:])
    said = f"entropy {floor:.3f} nats, loss {losses[0]:.3f} at first and {end:.3f} after {len(losses)} steps"
    if len(losses) < STEPS:
        said += f" (of {STEPS}: {PATIENCE_SECONDS:.0f} s were over)"
    scores = _scores(training, chain, length)
    if worst > GAIN:
        return _below(said, worst, end, floor, scores)
    return _best(said, worst, scores, before, chain, losses)


def started(subject: Subject, num_steps: int) -> Training:
    """A training set-up for so many steps, without clipping's help, as far as it can be asked for that."""
    assert subject.training is not None
    known = inspect.signature(subject.training).parameters
    wide = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return subject.training(**({"num_steps": num_steps} if wide or "num_steps" in known else {}))


@torch.no_grad()
def _scores(training: Training, chain: Chain, length: int) -> dict[int, float]:
    """Nats per token of the trained model's logits for the token at hand (0), the next (1), the one after (2)."""
    if training.forward is None:
        return {}
    tokens, _ = chain.sample(24, length, 99)
    was_training = training.module.training
    training.module.eval()
    log_p = training.forward(training.module, tokens, torch.ones_like(tokens)).double().log_softmax(-1)
    training.module.train(was_training)
    last = tokens.shape[1] - 2
    return {
        ahead: -float(log_p[:, 1:last].gather(-1, tokens[:, 1 + ahead : last + ahead].unsqueeze(-1)).mean())
        for ahead in (0, 1, 2)
    }


def _below(said: str, gain: float, end: float, floor: float, scores: dict[int, float]) -> Finding:
    copies = bool(scores) and scores[0] < scores[1]
    honest = bool(scores) and scores[1] > 0.5 * (floor + end) and not copies
    bugs = ["mask-missing", "no-shift", "flat-view-leak"]
    component = "model (it sees its targets)"
    if copies:
        bugs, component = ["no-shift", "mask-missing"], "loss (the token at hand is its target)"
    elif honest:
        bugs, component = ["pad-in-loss", "logged-loss-scaled", "no-shift"], "loss as it is logged"
    return failed(
        f"{said}: {gain:.0f} nats below what the source itself gives to these tokens",
        gain,
        GAIN,
        unit="nats below",
        bugs=bugs,
        component=component,
        advice="a model cannot beat the source: give it a causal mask, and position i the target i + 1",
        details={"nats per token, by how far ahead": scores},
    )


def _best(
    said: str,
    gain: float,
    scores: dict[int, float],
    before: dict[int, float],
    chain: Chain,
    losses: list[float],
) -> Finding:
    """Which token does the model know best, if it has learnt anything."""
    if not scores:
        raise NotApplicable(
            f"{said}; never below the floor, but the trained model's logits cannot be asked for"
        )
    best = min(scores, key=lambda k: scores[k])
    detail = ", ".join(f"{score:.3f} for the token {ahead} ahead" for ahead, score in scores.items())
    if scores[best] > chain.unigram - LEARNT:
        start, end = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
        if end > start - 0.05:
            raise NotApplicable(
                f"{said}: nothing was learnt (a small learning rate, or a fault: see overfit)"
            )
        raise NotApplicable(
            f"{said}: only frequencies were learnt ({detail}), too little to tell what is predicted"
        )
    if best != 1 and scores[best] > before[best] - LEARNT:
        raise NotApplicable(
            f"{said}: what it knows best, it knew before ({detail}); too little was learnt to tell"
        )
    if best != 1 and scores[best] > scores[1] - LEARNT:
        raise NotApplicable(f"{said}: the next token and another one are known about equally well ({detail})")
    if best == 1:
        return passed(f"{said}, never below; {detail}", gain, GAIN, unit="nats below")
    return failed(
        f"{said}; the model knows best what it was not asked for: {detail} (the source: {chain.entropy(1):.3f} for the "
        f"next, {chain.entropy(2):.3f} for the one after)",
        scores[best],
        scores[1],
        unit="nats per token",
        bugs=["double-shift"] if best == 2 else ["no-shift"],
        component="loss (shift of labels)",
        advice="shift labels once: either the collator or the model does it",
        details={"nats per token, by how far ahead": scores},
    )


class _WrongTarget(specimens.Trainer):
    """Position i is asked for token i + ahead."""

    ahead = 0

    def nats(self, rows: Rows) -> tuple[Tensor, int]:
        logits, length = self.model(rows.tokens, rows.segments), rows.tokens.shape[1]
        kept, wanted = logits[:, : length - self.ahead], rows.tokens[:, self.ahead :]
        return F.cross_entropy(kept.flatten(0, 1), wanted.flatten(), reduction="sum"), wanted.numel()

    def count(self, micro_batches: list[Rows]) -> float:
        return float(sum(rows.tokens[:, self.ahead :].numel() for rows in micro_batches))


@entropy_floor.plant("no-shift", component="loss")
def _() -> Subject:
    return specimens.subject(trainer=_WrongTarget)


@entropy_floor.plant("double-shift", component="loss")
def _() -> Subject:
    class Twice(_WrongTarget):
        ahead = 2

    return specimens.subject(trainer=Twice)


@entropy_floor.plant("mask-missing", component="model", what="as it is learnt")
def _() -> Subject:
    class Unmasked(specimens.Attention):
        def allowed(self, places: Any, key_places: Any, segments: Tensor, key_segments: Tensor) -> Tensor:
            return segments.unsqueeze(2) == key_segments.unsqueeze(1)

    return specimens.subject(attention=Unmasked, trainer=_Quick)


class _Quick(specimens.Trainer):
    """A larger learning rate."""

    def rate(self, step: int) -> float:
        return 3 * super().rate(step)


@entropy_floor.plant(
    "pad-in-loss", component="logged", what="positions that are no targets count in the denominator"
)
def _() -> Subject:
    class Diluted(_Quick):
        def logged(self, nats: float, total: float, micro_batches: list[Rows]) -> float:
            return nats / (total + 0.8 * sum(int(targets(rows).sum()) for rows in micro_batches))

    return specimens.subject(trainer=Diluted)


@entropy_floor.healthy("a larger learning rate")
def _() -> Subject:
    return specimens.subject(trainer=_Quick)


@entropy_floor.healthy("tied embeddings, a sliding window of 2")
def _() -> Subject:
    return specimens.subject(trainer=_Quick, size={"tied": True, "window": 2})


@entropy_floor.healthy("tied embeddings, so large that at first the token at hand is what it knows best")
def _() -> Subject:
    return specimens.subject(trainer=_Quick, size={"tied": True, "init_std": 0.4})
