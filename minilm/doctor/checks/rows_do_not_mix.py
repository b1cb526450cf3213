"""The loss of a batch is the token-weighted mean of the losses of its rows, however it is computed in pieces.

Why: rows that are joined before the shift make the end of one predict the start of the next. Losses that are computed
in chunks, to save memory, are wrong when the means of unequal chunks are averaged.

How: rows of unequal length, alone and together and in another order; the loss must follow by arithmetic, up to
float32 rounding. For chunks, the loss of rows whose lengths and numbers of targets divide nothing, up to some 1,300
positions, against the double loop in float64; a wrong one is searched for the chunk size that explains it.

Cannot see: chunks larger than the probe (1,300 positions, or what 20 million logits allow).

Sources: K2 of the catalogue; transformers issue 47394 (flattened before the shift); litgpt 751 (corrected loss
computation with chunks).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.examples import logits_of, uneven
from minilm.doctor.checks.formulas import LOSS_NOISE, close, off_by, right
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, difference, num_targets, quiet, tokens_for
from minilm.doctor.specimens.loss import targets
from minilm.doctor.subject import Rows, Subject

NUMBERS = 2 * 10**7  # logits at once
SHAPES = ((1, 3), (3, 11), (5, 37), (4, 64), (2, 129), (5, 260))


@check(group="loss", needs=("loss", "vocab_size"), cost="7 forwards of at most 5 x 12 tokens")
def rows_do_not_mix(subject: Subject) -> Finding:
    """loss(batch) x targets == sum over rows of loss(row) x targets, in any order of the rows."""
    with quiet(subject), torch.no_grad():
        rows = uneven(subject)
        together = float(subject.loss(rows))
        turned = float(subject.loss(rows.take([3, 0, 4, 2, 1])))
        alone = [(float(subject.loss(rows.take([b]))), num_targets(rows.take([b]))) for b in range(len(rows))]
        model = _model_mixes(subject, rows)
    total = sum(count for _, count in alone)
    expected = sum(value * count for value, count in alone) / total
    off, order = off_by(together, expected), off_by(turned, together)
    worst = max(off, order)
    seen = f"together {together:.6g}, from the rows one by one {expected:.6g}, in another order {turned:.6g}"
    if worst <= LOSS_NOISE:
        return passed(seen, worst, LOSS_NOISE, unit="of the loss")
    bugs, where, why = ["flat-view-leak", "pad-in-loss"], "loss", "rows are joined before the shift"
    if close(together, sum(value for value, _ in alone) / len(alone)):
        bugs, why = ["mean-of-means-accum"], "it is the mean of the means of the rows"
    elif model > FLOAT32_NOISE:
        bugs, where, why = ["norm-over-time"], "model", "the logits of a row depend on the rows beside it"
    elif order <= LOSS_NOISE:
        bugs, why = (
            ["pad-in-loss", "denominator-unshifted", "flat-view-leak"],
            "what is counted depends on the batch",
        )
    return failed(
        f"{seen}: {why}",
        worst,
        LOSS_NOISE,
        unit="of the loss",
        bugs=bugs,
        component=where,
        advice="shift within each row ([:, :-1] and [:, 1:]) before flattening; sum over all targets, divide once",
    )


def _model_mixes(subject: Subject, rows: Rows) -> float:
    """How far the logits of the first row move when it is alone."""
    if subject.forward is None:
        return 0.0
    together = subject.forward(rows.tokens)
    return difference(together[:1], subject.forward(rows.tokens[:1]))


@check(group="loss", needs=("loss", "vocab_size"), cost="6 forwards, up to 1,300 tokens")
def chunked_loss(subject: Subject) -> Finding:
    """The loss of rows that divide into no chunk evenly == the double loop."""
    worst, seen, decisive, sizes = 0.0, "", None, []
    with quiet(subject), torch.no_grad():
        for shape in SHAPES:
            rows = _ragged(subject, *shape)
            if rows is None:
                continue
            logits = _logits(subject, rows)
            measured = float(_loss(subject, logits, rows))
            expected = right(logits, rows)
            sizes.append(rows.tokens.numel())
            if (off := off_by(measured, expected)) > worst or not seen:
                worst = off
                seen = f"{rows.tokens.numel()} positions: loss {measured:.6g}, double loop {expected:.6g}"
                decisive = measured, logits, rows
    if not sizes:
        raise NotApplicable(f"rows of {SHAPES[0][1]} tokens and a batch of their logits are too large here")
    if worst <= LOSS_NOISE:
        return passed(f"{seen} (tried {', '.join(map(str, sizes))})", worst, LOSS_NOISE, unit="of the loss")
    chunk = _chunk(*decisive) if decisive is not None else ""
    return failed(
        seen + (f": {chunk}" if chunk else ""),
        worst,
        LOSS_NOISE,
        unit="of the loss",
        bugs=["chunked-loss-wrong"] if chunk else ["chunked-loss-wrong", "no-shift", "pad-in-loss"],
        component="loss",
        advice="sum nats and targets over the chunks and divide once, the last, shorter chunk included",
    )


def _ragged(subject: Subject, count: int, length: int) -> Rows | None:
    """Rows of `length` in which every third token and a long run in the middle are not learnt."""
    assert subject.vocab_size is not None
    if length * subject.vocab_size > NUMBERS or (
        subject.criterion is None and length > (subject.max_length or length)
    ):
        return None
    count = max(1, min(count, NUMBERS // (length * subject.vocab_size)))
    plain = subject.but(max_length=None) if subject.criterion is not None else subject
    rows = Rows.whole(tokens_for(plain, count, length))
    rows.learn[:, 2::3] = False
    rows.learn[0, length // 3 : length // 2] = False
    return rows


def _logits(subject: Subject, rows: Rows) -> Tensor:
    if subject.criterion is None:
        return logits_of(subject, rows)
    assert subject.vocab_size is not None
    shape = (*rows.tokens.shape, subject.vocab_size)
    # harder and harder along the rows and from row to row, so that no chunk has the mean of another
    harder = torch.linspace(0.5, 4, shape[0] * shape[1]).view(*shape[:2], 1)
    return harder * torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _loss(subject: Subject, logits: Tensor, rows: Rows) -> Tensor:
    return subject.loss(rows) if subject.criterion is None else subject.criterion(logits, rows)


def _chunk(measured: float, logits: Tensor, rows: Rows) -> str:
    """The chunk size for which an average of averages, or leaving out the rest, gives the measured loss."""
    counted = targets(rows).double()
    log_p = logits[:, :-1].double().log_softmax(-1).gather(-1, rows.tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    nats = -log_p * counted
    found = []
    for name, n, w in (("joined rows", nats.flatten(), counted.flatten()), ("positions", nats.T, counted.T)):
        n, w = (x if x.dim() == 1 else x.sum(1) for x in (n, w))
        for size in range(1, len(n)):
            for how, value in _chunked(n, w, size).items():
                found.append((off_by(measured, value), f"{how} of {size} {name}"))
    off, says = min(found, default=(math.inf, ""))
    return f"it is {says}" if off < LOSS_NOISE / 10 else ""


def _chunked(nats: Tensor, counts: Tensor, size: int) -> dict[str, float]:
    """Wrong ways to put chunks together."""
    parts = math.ceil(len(nats) / size)
    a, b = (F.pad(x, (0, parts * size - len(x))).view(parts, size).sum(1) for x in (nats, counts))
    means, weights = a / b.clamp(min=1), torch.full((parts,), float(size), dtype=torch.float64)
    weights[-1] = len(nats) - (parts - 1) * size
    return {
        "the mean of the means of chunks": float(means.mean()),
        "the mean of the means of those chunks that have targets,": float(means[b > 0].mean()),
        "weighted by positions, not targets: chunks": float((means * weights).sum() / weights.sum()),
        "without the last, shorter chunk: chunks": float(a[:-1].sum() / b[:-1].sum().clamp(min=1)),
    }


# ---------------------------------------------------------------- planted


@rows_do_not_mix.plant("flat-view-leak", component="loss")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        labels = torch.where((rows.segments > 0) & rows.learn, rows.tokens, -100)
        return F.cross_entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:], ignore_index=-100)

    return specimens.subject(loss=loss)


@rows_do_not_mix.plant("mean-of-means-accum", component="loss", what="each row is averaged by itself")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        labels = torch.where(targets(rows), rows.tokens[:, 1:], -100)
        nats = F.cross_entropy(logits[:, :-1].mT, labels, ignore_index=-100, reduction="none")
        return (nats.sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()

    return specimens.subject(loss=loss)


def _chunks(logits: Tensor, rows: Rows, size: int) -> list[tuple[Tensor, Tensor]]:
    labels = torch.where(targets(rows), rows.tokens[:, 1:], -100).flatten()
    parts = zip(logits[:, :-1].flatten(0, 1).split(size), labels.split(size), strict=True)
    return [(F.cross_entropy(x, y, ignore_index=-100, reduction="sum"), (y != -100).sum()) for x, y in parts]


@chunked_loss.plant("chunked-loss-wrong", component="loss", what="mean of the means of 512 positions")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        return torch.stack([nats / count.clamp(min=1) for nats, count in _chunks(logits, rows, 512)]).mean()

    return specimens.subject(loss=loss)


@chunked_loss.plant("chunked-loss-wrong", component="loss", what="the last, shorter chunk is left out")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        parts = _chunks(logits, rows, 256)
        parts = parts[:-1] or parts
        return sum(nats for nats, _ in parts) / sum(count for _, count in parts).clamp(min=1)

    return specimens.subject(loss=loss)


@chunked_loss.healthy("chunks of 100 positions, summed")
def _() -> Subject:
    def loss(logits: Tensor, rows: Rows) -> Tensor:
        parts = _chunks(logits, rows, 100)
        return sum(nats for nats, _ in parts) / sum(count for _, count in parts).clamp(min=1)

    return specimens.subject(loss=loss)
