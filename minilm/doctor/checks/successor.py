"""After a little training, a model of the language "the token after x is f(x)" says f(x), not x and not f(f(x)).

Why: at random weights right and wrong alignment have equal losses, and a model that learns to copy has a better curve
than one that learns to predict. What a loss teaches is seen from what is learnt.

How: f runs through a cycle of at most eight ids, every row starts somewhere in it, so that each id is as frequent as
every other. A few steps on such rows, and the log-probabilities of x, f(x), f(f(x)), and of the id before x, are
compared with those before: the one that rose most is what is taught. Done with the subject's loss and a plain Adam on
its own module (the weights come back), and with the subject's training step, where there is one. A lead below 0.02
nats after 40 steps is no answer: NOT RUN.

Cannot see: masks and divisors (loss_identity), and what happens at the borders of documents.

Sources: K3 and K12 of the catalogue; transformers issues 35066 (no shift) and 47394 (two shifts).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.examples import LENGTH
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet, untouched
from minilm.doctor.specimens.loss import targets
from minilm.doctor.subject import Rows, Subject

STEPS = 40
CLEAR = 0.25  # nats of lead of the right answer after which no more steps are needed
LEAST = 0.02
RATE = 3e-3
AHEAD = {1: "the next token", 0: "the token that it was given", 2: "the token after the next",
         -1: "the token before", 3: "the token three ahead"}  # fmt: skip
BUGS = {0: "no-shift", -1: "no-shift", 2: "double-shift", 3: "double-shift"}


@check(group="loss", needs=("vocab_size",), cost="up to 40 steps of 8 x 12 tokens, twice")
def successor(subject: Subject) -> Finding:
    """What rises most in probability is f(x)."""
    cycle = _cycle(subject)
    said, leads, unclear = [], [], []
    for name, gains in (("loss", _by_loss), ("loss inside the training step", _by_training)):
        try:
            gained, steps = gains(subject, cycle)
        except NotApplicable as reason:
            unclear.append(str(reason))
            continue
        taught, lead = _first(gained)
        if lead < LEAST:
            unclear.append(f"the {name} taught too little in {steps} steps (a lead of {lead:.1e} nats)")
            continue
        text = f"{steps} steps of the {name} taught {AHEAD[taught]}, {lead:.2g} nats ahead of anything else"
        if taught != 1:
            return failed(
                text,
                gained[1] - gained[taught],
                LEAST,
                unit="nats",
                bugs=[BUGS[taught]],
                component=name,
                advice="shift once, in one place: logits[:, :-1] against tokens[:, 1:]; hand over labels that are not "
                "shifted where the model shifts them",
            )
        said.append(text)
        leads.append(lead)
    if not said:
        raise NotApplicable("; ".join(unclear))
    return passed("; ".join(said), min(leads), LEAST, unit="nats")


def _cycle(subject: Subject) -> list[int]:
    """At most eight ordinary ids, each followed by the next, the last by the first."""
    assert subject.vocab_size is not None
    ordinary = [i for i in range(subject.vocab_size) if i not in set(subject.special_ids)]
    if len(ordinary) < 5:
        raise NotApplicable("needs five ordinary token ids")
    stride = max(1, len(ordinary) // 8)
    return ordinary[::stride][:8]


def _rows(subject: Subject, cycle: list[int], start: int) -> Rows:
    length = min(LENGTH, subject.max_length or LENGTH)
    places = (torch.arange(length) + torch.arange(8).unsqueeze(1) + start) % len(cycle)
    return Rows.whole(torch.tensor(cycle)[places])


def _log_p(logits: Tensor, rows: Rows, cycle: list[int]) -> dict[int, float]:
    """Mean log-probability, among the ids of the cycle, of the id that is so many steps ahead in it."""
    ids = torch.tensor(cycle)
    log_p = logits.detach().double().cpu()[..., ids].log_softmax(-1)  # [B, T, ids of the cycle]
    place = (rows.tokens.unsqueeze(-1) == ids).long().argmax(-1)
    return {
        k: float(log_p.gather(-1, ((place + k) % len(cycle)).unsqueeze(-1)).mean())
        for k in AHEAD
        if k < 3 or len(cycle) > 4
    }


def _first(gained: dict[int, float]) -> tuple[int, float]:
    """What gained most, and its lead over the second."""
    order = sorted(gained, key=lambda k: -gained[k])
    return order[0], gained[order[0]] - gained[order[1]]


def _watch(
    step: Callable[[int], object], logits: Callable[[Rows], Tensor], rows: Rows, cycle: list[int]
) -> tuple[dict[int, float], int]:
    """Step until the right answer is clearly ahead, or all steps -> (what each gained, steps)."""

    def now() -> dict[int, float]:
        with torch.no_grad():
            return _log_p(logits(rows), rows, cycle)

    before = now()
    gained, done = dict.fromkeys(before, 0.0), 0
    for number in range(STEPS):
        step(number)
        done = number + 1
        if done % 4 == 0 or done == STEPS:
            after = now()
            gained = {k: after[k] - before[k] for k in before}
            taught, lead = _first(gained)
            # What was trained has habits: in the first steps another answer may gain by chance, none for long.
            if taught == 1 and lead > CLEAR:
                break
    return gained, done


def _by_loss(subject: Subject, cycle: list[int]) -> tuple[dict[int, float], int]:
    """The subject's loss, its module, and an Adam of our own."""
    if subject.loss is None or subject.module is None or subject.forward is None:
        raise NotApplicable("needs the loss, the forward pass and the torch module")
    with quiet(subject, redraw=0.05 if subject.fresh else None):
        parameters = [p for p in subject.module.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=RATE)

        def step(number: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            subject.loss(_rows(subject, cycle, number)).backward()
            optimizer.step()

        return _watch(step, lambda rows: subject.forward(rows.tokens), _rows(subject, cycle, 0), cycle)


def _by_training(subject: Subject, cycle: list[int]) -> tuple[dict[int, float], int]:
    """The subject's own training step."""
    if subject.training is None:
        raise NotApplicable("needs a training step")
    training = subject.training()
    if training.forward is None:
        raise NotApplicable("the training step shows no forward pass")
    rows, forward = _rows(subject, cycle, 0), training.forward

    def logits(some: Rows) -> Tensor:
        training.module.eval()
        return forward(training.module, some.tokens, some.segments)

    def step(number: int) -> None:
        training.module.train()
        training.step([_rows(subject, cycle, number)])

    planned = min(STEPS, training.num_steps or STEPS)
    with untouched(subject):
        return _watch(lambda n: step(n) if n < planned else None, logits, rows, cycle)


# ---------------------------------------------------------------- planted


def _copying(logits: Tensor, rows: Rows) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), rows.tokens.flatten())


def _skipping(logits: Tensor, rows: Rows) -> Tensor:
    labels = torch.where(targets(rows), rows.tokens[:, 1:], -100)[:, 1:]
    return F.cross_entropy(logits[:, :-2].flatten(0, 1), labels.flatten(), ignore_index=-100)


@successor.plant("no-shift", component="loss")
def _() -> Subject:
    return specimens.subject(loss=_copying)


@successor.plant("double-shift", component="loss")
def _() -> Subject:
    return specimens.subject(loss=_skipping)


@successor.plant("no-shift", component="loss", what="shifted the wrong way")
def _() -> Subject:
    return specimens.subject(
        loss=lambda logits, rows: F.cross_entropy(logits[:, 1:].flatten(0, 1), rows.tokens[:, :-1].flatten())
    )


@successor.plant("no-shift", component="training step")
def _() -> Subject:
    class Copying(specimens.Trainer):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            return _copying(self.model(rows.tokens), rows) * rows.tokens.numel(), rows.tokens.numel()

    return specimens.subject(trainer=Copying)


@successor.plant("double-shift", component="training step", what="only the training step is handed over")
def _() -> Subject:
    class Skipping(specimens.Trainer):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            count = rows.tokens[:, 2:].numel()
            return _skipping(self.model(rows.tokens), rows) * count, count

    return specimens.subject(trainer=Skipping).but(loss=None)


@successor.healthy("tied embeddings, which favour the token that was given")
def _() -> Subject:
    return specimens.subject(size={"tied": True})


@successor.healthy("dropout of 0.3")
def _() -> Subject:
    return specimens.subject(size={"dropout": 0.3})
