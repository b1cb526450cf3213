"""Generation and evaluation follow the weights: what was kept from earlier ones is not used again.

Why: keys and values of a prompt that are kept for the next call, a fused copy of a matrix that is made once, a loss
that is remembered by its batch: samples and evaluations during training show the model of an earlier step.

How: everything is asked once; then all matrices are drawn anew, the module goes through train() and eval(), as it would
in training, and the same is asked again, and another prompt of the same shape. Greedy text must be the argmax of the
whole forward pass with the new weights, up to a near tie of 1e-3 of the logits' deviation; the cached pass must be the
whole one; losses must be those of its logits within 5e-3. Only what was right the first time counts.

Cannot see: what is kept by a number of the step or a time; weights that are replaced by other tensors.

Sources: rows 148 and 162 of the catalogue; nanochat (tests of its cache); OLMo-core (order of an evaluator drifts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.greedy import NEW, SPREAD, TIE, gaps_below, room_for, texts_of
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import difference, quiet, redraw_weights, reference_nats, tokens_for
from minilm.doctor.subject import Rows, Subject

LENGTH, PROMPTS = 12, 6
CLOSE, OFF = (
    1e-3,
    2e-2,
)  # as near as it has to be with the first weights; further than that with the second is a failure
KEPT = ["eval-state-not-reset", "kv-cache-mismatch"]


@dataclass(frozen=True)
class Answer:
    """How far one way of asking is from the whole forward pass with the present weights, in units of its own limit."""

    name: str
    error: float
    value: Any


@check(
    group="evaluation",
    needs=("module", "forward", "vocab_size"),
    cost="3 generations of 8 tokens, 10 forwards, 24 single steps",
)
def follows_weights(subject: Subject) -> Finding:
    """Each way of asking, before and after a change of the weights."""
    module = subject.module
    assert module is not None and subject.forward is not None
    with quiet(subject, redraw=SPREAD), torch.no_grad():
        prompts = (
            tokens_for(subject, 2 * PROMPTS, room_for(subject, 7), seed=77).tolist()
            if subject.generate
            else []
        )
        rows = Rows.whole(tokens_for(subject, 2, LENGTH, seed=78))
        whole = subject.forward(rows.tokens)
        before = {a.name: a for a in _asked(subject, prompts[:PROMPTS], rows)}
        old = reference_nats(whole, rows)[0]
        for seed in range(1, 9):  # weights with another loss: most random ones are alike in theirs
            redraw_weights(module, SPREAD * (1 + seed / 8), seed)
            module.train()
            module.eval()
            if abs(reference_nats(subject.forward(rows.tokens), rows)[0] / old - 1) > 10 * OFF:
                break
        if difference(whole, subject.forward(rows.tokens)) < 0.05:
            raise NotApplicable("the logits do not depend on the weights of the module that was handed over")
        after = _asked(subject, prompts[:PROMPTS], rows)
        if prompts:
            after.append(_text(subject, prompts[PROMPTS:], "another prompt"))
    sure = [a for a in after if before.get(a.name, before.get("generation", a)).error <= 1]
    if not sure:
        raise NotApplicable("there is nothing else to ask than the forward pass" if not after else
                            "what it has is off with the first weights already: other checks say why")  # fmt: skip
    worst = max(sure, key=lambda a: a.error)
    names = ", ".join(dict.fromkeys(a.name for a in sure))
    if worst.error <= 1:
        return passed(f"{names}: with other weights, as the whole forward pass with them", worst.error, 1.0,
                      unit="of its limit")  # fmt: skip
    wrong = [a for a in sure if a.error > 1]
    return _failed(wrong, {a.name: a.value for a in before.values()}, worst.error)


def _failed(wrong: Sequence[Answer], before: dict[str, Any], error: float) -> Finding:
    first = wrong[0]
    same = first.value == before.get(first.name) if not isinstance(first.value, Tensor) else False
    bugs = KEPT[::-1] if first.name == "cached steps" else KEPT
    if first.name == "another prompt":
        what, bugs = "a prompt of the same shape gets what was kept from another one", KEPT[::-1]
    elif same:
        what = "its answer is the one of before"
    elif first.name == "generation" and [t[:1] for t in first.value] == [t[:1] for t in before["generation"]]:
        what = "it begins as before: what it knows of the prompt is of the former weights"
    else:
        what = "it is neither the answer of before nor that of the new weights: a part of it was kept"
    names = ", ".join(a.name for a in wrong)
    return failed(
        f"after a change of the weights the forward pass is no longer that of {names}: {what}", error, 1.0,
         unit="of its limit", bugs=bugs, component=f"{first.name}: what it keeps between calls",
        advice="keep nothing between calls, or throw it away whenever the weights change",
    )  # fmt: skip


def _asked(subject: Subject, prompts: list[list[int]], rows: Rows) -> list[Answer]:
    """Everything that the subject can be asked, against its forward pass."""
    assert subject.forward is not None
    found = [_text(subject, prompts, "generation")] if prompts else []
    logits = subject.forward(rows.tokens)
    if subject.incremental is not None:
        steps = subject.incremental(rows.tokens, LENGTH // 2)
        if steps.shape == logits.shape:
            found.append(Answer("cached steps", difference(logits, steps) / CLOSE, steps))
    nats, count = reference_nats(logits, rows)
    mean = nats / max(1, count)
    ids = rows.tokens[0].tolist()
    half = len(ids) // 2
    learn = torch.zeros_like(rows.tokens[:1], dtype=torch.bool)
    learn[:, half:] = True
    rest, targets = reference_nats(logits[:1], Rows(rows.tokens[:1], rows.segments[:1], learn))
    first, _ = reference_nats(logits[:1], rows.take(slice(0, 1)))
    asked: list[tuple[str, Callable[[], float] | None, float]] = [
        ("training loss", (lambda: float(subject.loss(rows))) if subject.loss else None, mean),
        ("evaluation", (lambda: float(subject.evaluate([rows]))) if subject.evaluate else None, mean),
        ("continuation", (lambda: float(subject.continuation(ids[:half], ids[half:])))
         if subject.continuation else None, rest / max(1, targets)),
        ("document", (lambda: subject.document(ids)[0]) if subject.document else None, first),
    ]  # fmt: skip
    for name, ask, expected in asked:
        if ask is not None:
            value = ask()
            off = abs(value - expected) / abs(expected) if math.isfinite(value) else math.inf
            found.append(Answer(name, off / OFF, value))
    return found


def _text(subject: Subject, prompts: list[list[int]], name: str) -> Answer:
    assert subject.generate is not None
    written = texts_of(subject, subject.generate(prompts, NEW, temperature=0.0, seed=0))
    gaps = [g for p, w in zip(prompts, written, strict=True) for g in gaps_below(subject, p, w)]
    return Answer(name, max(gaps, default=0.0) / TIE, written)


# ---------------------------------------------------------------- planted


def _copied(caches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [dict(cache) for cache in caches]


def _keeping(key: Callable[[Any, Tensor], Any]) -> type[specimens.Model]:
    """Keys, values and logits of a first call are kept, by `key`."""

    class Keeping(specimens.Model):
        def step(self, tokens: Tensor, segments: Tensor, positions: Tensor, caches: Any) -> Tensor:
            if any(caches) or tokens.shape[1] == 1:
                return super().step(tokens, segments, positions, caches)
            kept = self.__dict__.setdefault("prefills", {})
            name = key(self, tokens)
            if name not in kept:
                logits = super().step(tokens, segments, positions, caches)
                kept[name] = logits, _copied(caches)
                return logits
            logits, known = kept[name]
            for cache, value in zip(caches, _copied(known), strict=True):
                cache.update(value)
            return logits

    return Keeping


@follows_weights.plant(
    "eval-state-not-reset", component="generation", what="a prompt's keys and values are kept"
)
def _() -> Subject:
    return specimens.subject(model=_keeping(lambda _, tokens: str(tokens.tolist())))


@follows_weights.plant("eval-state-not-reset", component="generation", what="texts are kept by prompt")
def _() -> Subject:
    class Kept(specimens.Generator):
        def generate(self, prompts: Any, max_new_tokens: int, **how: Any) -> list[list[int]]:
            kept = self.__dict__.setdefault("texts", {})
            key = str((prompts, max_new_tokens, how))
            return (
                kept.setdefault(key, None)
                or kept.__setitem__(key, super().generate(prompts, max_new_tokens, **how))
                or kept[key]
            )

    return specimens.subject(generator=Kept)


@follows_weights.plant(
    "kv-cache-mismatch", component="another prompt", what="kept by the shape of the prompt"
)
def _() -> Subject:
    return specimens.subject(
        model=_keeping(lambda model, tokens: (*tokens.shape, float(model.head.weight.sum())))
    )


@follows_weights.plant(
    "kv-cache-mismatch", component="cached steps", what="a copy of a matrix for decoding, made once"
)
def _() -> Subject:
    class Fused(specimens.FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > 1:
                return super().forward(x)
            if not hasattr(self, "fused"):
                self.fused = torch.cat([self.gate.weight, self.up.weight]).detach().clone()
            gate, up = (x @ self.fused.t()).chunk(2, dim=-1)
            return self.down(torch.nn.functional.silu(gate) * up)

    subject = specimens.subject(ffn=Fused)
    return subject.but(generate=None)


@follows_weights.plant("eval-state-not-reset", component="evaluation", what="losses are kept by batch")
def _() -> Subject:
    class Kept(specimens.Evaluation):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            kept = self.__dict__.setdefault("losses", {})
            key = str(rows.tokens.tolist())
            if key not in kept:
                kept[key] = super().nats(rows)
            return kept[key]

    return specimens.subject(evaluation=Kept)


# ---------------------------------------------------------------- healthy


@follows_weights.healthy("a prompt's keys and values are kept, by prompt and weights")
def _() -> Subject:
    def key(model: Any, tokens: Tensor) -> Any:
        return str(tokens.tolist()), float(sum(p.double().sum() for p in model.parameters()))

    return specimens.subject(model=_keeping(key))


@follows_weights.healthy("a short context, tied, with dropout")
def _() -> Subject:
    return specimens.subject(size={"max_length": 16, "tied": True, "dropout": 0.2})
