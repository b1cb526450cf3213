"""Auxiliary losses are added once, are learnt from, and know nothing of padding; the cross entropy stays apart.

Why: a router whose balancing loss is computed and never added collapses; one that is added twice is too strong, and
no curve shows either. A z-loss inside the reported cross entropy makes it incomparable.

How: what backward is called on, minus the cross entropy of the subject's own logits in float64, must be the sum of
the auxiliary losses: 0 times it is forgotten, 2 times is counted twice, and the remainder names a term that was put
into the loss. Its gradient must be that of the sum as well. Then padding is added to the rows: no auxiliary loss may
move. Exact relations, to float32 rounding.

Cannot see: whether an auxiliary loss is computed rightly (the checks of routers do), or is well chosen.

Sources: transformers issues 44242 and 28505 (balancing loss left out; padding steers it), OLMo-core 2.2.0 (z-loss in
the reported cross entropy).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.checks.examples import logits_of, marks, uneven
from minilm.doctor.checks.formulas import LOSS_NOISE, off_by, right
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import num_targets, quiet, reference_loss, tokens_for
from minilm.doctor.specimens.loss import mean_loss
from minilm.doctor.subject import Rows, Subject

SHORT = 5
ROUNDING = 2e-6  # of a float32 loss, computed twice in the same way
ADVICE = "add every auxiliary loss to the total exactly once, with its graph, and report the cross entropy without it"


@check(group="loss", needs=("auxiliary", "total_loss", "loss", "vocab_size"), cost="6 forwards, 2 backwards")
def auxiliary_losses(subject: Subject) -> Finding:
    """total == cross entropy + each auxiliary loss once, value and gradient; padding moves none of them."""
    with quiet(subject):
        rows = uneven(subject)
        parts = dict(subject.auxiliary(rows))
        extra = float(sum(value.detach() for value in parts.values()))
        total, loss = float(subject.total_loss(rows).detach()), float(subject.loss(rows).detach())
        with torch.no_grad():
            clean = right(logits_of(subject, rows), rows)
            padded = _moved_by_padding(subject)
        if not math.isfinite(extra) or abs(extra) < 50 * ROUNDING * max(1.0, abs(clean)):
            raise NotApplicable(
                f"the auxiliary losses add up to {extra:.2g}, too little to be told from rounding"
            )
        taught = _taught(subject, rows)
    seen = f"total {total:.6g}, cross entropy {clean:.6g} (reported {loss:.6g}), auxiliary {extra:.6g}"
    problems = _problems(total, loss, clean, extra, taught)
    if padded[1] > 5 * ROUNDING:
        problems.append(("aux-counts-pads", f"added padding moved {padded[0]} by {padded[1]:.1e}", padded[0]))
    if not problems:
        worst = max(off_by(total, clean + extra), off_by(loss, clean), padded[1])
        return passed(
            seen + f"; padding moves none of {', '.join(parts)}", worst, LOSS_NOISE, unit="of the loss"
        )
    return failed(
        f"{seen}: {'; '.join(says for _, says, _ in problems)}",
        max(off_by(total, clean + extra), off_by(loss, clean), padded[1], 0.0 if taught is None else taught),
        LOSS_NOISE,
        unit="of the loss",
        bugs=list(dict.fromkeys(bug for bug, _, _ in problems)),
        component=problems[0][2],
        advice=ADVICE,
    )


def _problems(
    total: float, loss: float, clean: float, extra: float, taught: float | None
) -> list[tuple[str, str, str]]:
    """(bug, what is wrong, where) of the sums."""
    found, base = [], loss
    if off_by(loss, clean) > LOSS_NOISE:
        inside, base = (loss - clean) / extra, clean
        found.append(
            ("zloss-in-ce", f"{inside:.3g} times the auxiliary losses are in the reported loss", "loss")
        )
    share = (total - base) / extra
    if abs(share - 1) > 0.01 + ROUNDING * max(1.0, abs(clean)) / abs(extra):
        twice = (
            "counted twice" if abs(share - 2) < 0.01 else "left out" if abs(share) < 0.01 else "added wrongly"
        )
        found.append(
            (
                "aux-loss-omitted",
                f"the total has {share:.3g} times the auxiliary losses ({twice})",
                "total loss",
            )
        )
    elif taught is not None and taught > 0.01:
        found.append(("aux-loss-omitted", "their gradient is not that of the total (a value without its graph, or "
                      f"another weight): off by {taught:.1e} of it", "total loss"))  # fmt: skip
    return found


def _taught(subject: Subject, rows: Rows) -> float | None:
    """How far the total's gradient, less the cross entropy's, is from that of the auxiliary losses, relatively."""
    if subject.module is None:
        return None
    parameters = [p for p in subject.module.parameters() if p.requires_grad]

    def gradient(loss: Tensor) -> list[Tensor]:
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]

    total = gradient(subject.total_loss(rows))
    loss = gradient(reference_loss(logits_of(subject, rows), rows) / num_targets(rows))
    extra = gradient(sum(subject.auxiliary(rows).values()))  # type: ignore[arg-type]
    rest = [t - c for t, c in zip(total, loss, strict=True)]
    size = math.sqrt(sum(float(e.double().square().sum()) for e in extra))
    whole = math.sqrt(sum(float(t.double().square().sum()) for t in total))
    off = math.sqrt(sum(float((r - e).double().square().sum()) for r, e in zip(rest, extra, strict=True)))
    if size == 0:
        return 1.0 if all(not v.requires_grad for v in subject.auxiliary(rows).values()) else 0.0
    return 0.0 if off < 1e-5 * whole else off / size


def _moved_by_padding(subject: Subject) -> tuple[str, float]:
    """(name of the auxiliary loss that moves most, by how much of its size)."""
    rows = Rows.whole(tokens_for(subject, 2, SHORT))
    more = SHORT if subject.max_length is None else max(1, min(SHORT, subject.max_length - SHORT))
    longer = Rows(F.pad(rows.tokens, (0, more), value=marks(subject)[0]), F.pad(rows.segments, (0, more)),
                  F.pad(rows.learn, (0, more)))  # fmt: skip
    before, after = subject.auxiliary(rows), subject.auxiliary(longer)
    moved = {
        name: abs(float(after[name]) - float(value)) / max(abs(float(value)), 1e-12)
        for name, value in before.items()
    }
    return max(moved.items(), key=lambda item: item[1])


# ---------------------------------------------------------------- planted


class _Balanced(specimens.Model):
    """With a router whose shares are to be even."""

    def initialise(self) -> None:
        self.router = nn.Linear(self.size.dim, 4, bias=False)
        super().initialise()

    def balance(self, rows: Rows, counted: Tensor) -> Tensor:
        shares = (20 * self.router(self.embed(rows.tokens))).softmax(-1)[counted].mean(0)
        return 4 * shares.square().sum()


def _balanced(
    *,
    count: Callable[[Rows], Tensor] = lambda rows: rows.segments > 0,
    loss: Callable[[Tensor, Tensor], Tensor] = lambda ce, aux: ce,
    total: Callable[[Tensor, Tensor], Tensor] = lambda ce, aux: ce + aux,
) -> Subject:
    subject = specimens.subject(model=_Balanced)
    module = subject.module

    def both(rows: Rows) -> tuple[Tensor, Tensor]:
        return mean_loss(module(rows.tokens, rows.segments), rows), module.balance(rows, count(rows))

    return subject.but(
        auxiliary=lambda rows: {"balance": both(rows)[1]},
        loss=lambda rows: loss(*both(rows)),
        total_loss=lambda rows: total(*both(rows)),
        criterion=None,
    )


@auxiliary_losses.plant("aux-loss-omitted", component="total loss")
def _() -> Subject:
    return _balanced(total=lambda ce, aux: ce)


@auxiliary_losses.plant(
    "aux-loss-omitted", component="total loss", what="added as a number, without its graph"
)
def _() -> Subject:
    return _balanced(total=lambda ce, aux: ce + aux.detach())


@auxiliary_losses.plant("zloss-in-ce", component="loss", what="and so counted twice in the total")
def _() -> Subject:
    return _balanced(loss=lambda ce, aux: ce + aux, total=lambda ce, aux: ce + 2 * aux)


@auxiliary_losses.plant("zloss-in-ce", component="loss")
def _() -> Subject:
    return _balanced(loss=lambda ce, aux: ce + aux)


@auxiliary_losses.plant("aux-counts-pads", component="balance")
def _() -> Subject:
    return _balanced(count=lambda rows: torch.ones_like(rows.learn))


@auxiliary_losses.healthy("a balancing loss over real tokens")
def _() -> Subject:
    return _balanced()
