"""Each source is taken as often per epoch as its weight says.

Why: weights that are rounded down, or a source that is cut where it should be sampled, give another mixture
than the one that was configured and is written in the paper. The loss of a mixture shows neither.

How: each run of tokens in a row belongs to the source in which alone its pieces of five tokens stand. Targets
of each source are counted over two epochs and held against weight x targets of its documents. The limit is
one row per source and epoch, the targets that stand in several sources, and for broken weights 6 standard
deviations of drawing that many rows. Of a source with a weight below 1, the two epochs must not take the same
rows.

Cannot see: sources that share most of their text; weights that are wrong as they were configured.

Sources: OLMo-core releases 1.8.0 (sources truncated instead of sampled) and 2.3.0 (rounding, samples
repeated).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

import numpy as np

from minilm.doctor import ledger, specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.subject import DataView, Rows, Subject

PIECE, EPOCHS = 5, 2


@check(
    group="data", needs=("data.sources", "data.documents", "data.batches"), cost="two epochs of the excerpt"
)
def mixture_shares(subject: Subject) -> Finding:
    """Targets per source against its weight."""
    view = subject.data
    assert view is not None and view.sources is not None
    truth = ledger.documents(view, "train")
    names = list(view.sources("train"))
    epochs = [ledger.epoch(view, number, 0) for number in range(EPOCHS)]
    if not truth.whole or not all(e.whole for e in epochs) or len(names) != len(truth):
        raise NotApplicable("an epoch is longer than what one look takes in")
    order = sorted(set(names))
    if len(order) < 2:
        raise NotApplicable("there is one source")
    of_document = np.array([order.index(name) for name in names])
    counted = [_per_source(rows, truth, of_document, len(order)) for rows in epochs]
    every = sum(int(e.targets.sum()) for e in epochs)
    unknown = every - sum(int(c.sum()) for c, _ in counted)
    if unknown > 0.2 * every:
        raise NotApplicable("sources share too much of their text to be told apart")
    worst = (0.0, 0.0, 1.0, "")
    said: list[str] = []
    cut: list[Finding] = []
    for k, name in enumerate(order):
        targets = int(sum(len(truth[d]) - 1 for d in np.flatnonzero(of_document == k).tolist()))
        weight = float(view.weights.get(name, 1.0))
        seen = sum(int(c[k]) for c, _ in counted)
        limit = _limit(weight, targets, epochs[0].tokens.shape[1]) + unknown
        if weight < 1 and (found := _same_rows(name, weight, [rows[k] for _, rows in counted])):
            cut.append(found)
        said.append(f"{name} {seen / EPOCHS / max(1, targets):.3f} of {weight:g}")
        worst = max(
            worst,
            (
                abs(seen - EPOCHS * weight * targets) / limit,
                abs(seen - EPOCHS * weight * targets),
                limit,
                name,
            ),
        )
    message = f"passes over each source per epoch: {', '.join(said)}"
    if worst[0] <= 1 and cut:
        return cut[0]
    if worst[0] <= 1:
        return passed(message, worst[1], worst[2], unit="targets")
    return failed(
        f"{message}; {worst[3]} is off by {worst[1]:.0f} targets",
        worst[1],
        worst[2],
        unit="targets",
        bugs=["mixture-rounding"],
        component=f"mixture (weight of {worst[3]})",
        advice="take round(weight x rows) rows of each source per epoch, and go on through its rows in the next one",
    )


def _limit(weight: float, targets: int, width: int) -> float:
    """In targets: one row per epoch and source; broken weights take some of the rows, which have unequal targets."""
    drawn = 0.0 if weight == round(weight) else 6 * math.sqrt(targets * width) / 4
    return EPOCHS * width + drawn


def _per_source(
    rows: ledger.Epoch, truth: ledger.Documents, of_document: np.ndarray, count: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Targets of each source, and the hashes of the rows that are of one source alone, for each."""
    hashes, ends = ledger.gram_table(truth.tokens[None], truth.numbers[None], PIECE)
    owner = of_document[truth.numbers[ends] - 1]
    pieces = [np.unique(hashes[owner == k]) for k in range(count)]
    found, at = ledger.gram_table(rows.tokens, rows.runs, PIECE)
    inside = np.stack([np.isin(found, own) for own in pieces])  # [sources, pieces]
    only = inside.sum(axis=0) == 1
    run = rows.runs.max(initial=0) + 1
    label = np.arange(len(rows))[:, None] * run + rows.runs  # one number for each run
    source_of = np.full(len(rows) * run, -1)
    source_of[label.flat[at[only]]] = inside[:, only].argmax(axis=0)
    of_target = source_of[label[rows.targets]]
    targets = np.array([(of_target == k).sum() for k in range(count)])
    main = np.array([source_of[row[row % run > 0]].max(initial=-1) for row in label])
    return targets, [rows.hashes[main == k] for k in range(count)]


def _same_rows(name: str, weight: float, hashes: list[np.ndarray]) -> Finding | None:
    one, other = (set(h.tolist()) for h in hashes)
    if min(len(one), len(other)) < 8 or len(one & other) < 0.9 * min(len(one), len(other)) or weight > 0.8:
        return None
    return failed(
        f"{name} (weight {weight:g}): {len(one & other)} of its {len(one)} rows in epoch 0 are those of epoch 1: the "
        "others are never seen",
        len(one & other) / len(one),
        0.9,
        unit="share of rows",
        bugs=["mixture-rounding", "truncation-silent"],
        component=f"mixture (weight of {name})",
        advice="take other rows of a source in each epoch, not its first ones again",
    )


class _Mixed(specimens.Pipeline):
    """Two sources; each goes on through its own rows from epoch to epoch."""

    weights = (("a", 1.5), ("b", 0.5))
    num_train = 90

    def names(self, split: str) -> list[str]:
        return ["a" if k % 3 else "b" for k in range(len(self.texts[split]))]

    def taken(self, weight: float, count: int) -> int:
        return round(weight * count)

    def walked(self, count: int, taken: int, epoch: int) -> Iterator[int]:
        for step in range(epoch * taken, (epoch + 1) * taken):
            turn = list(range(count))
            random.Random(step // count).shuffle(turn)
            yield turn[step % count]

    def batches(self, epoch: int, seed: int, rank: int, world: int) -> Iterator[Rows]:
        every, names = self.texts["train"], self.names("train")
        chosen: list[Rows] = []
        for name, weight in self.weights:
            self.texts["train"] = [t for t, n in zip(every, names, strict=True) if n == name]
            rows = self.rows("train")
            chosen += [rows[i] for i in self.walked(len(rows), self.taken(weight, len(rows)), epoch)]
        self.texts["train"] = every
        return self.cut(chosen, self.shard(self.order(len(chosen), epoch, seed), rank, world))

    def handed_over(self) -> DataView:
        return dataclasses.replace(
            super().handed_over(), sources=self.names, weights=dict(_Mixed.weights), lost_targets=None
        )


@mixture_shares.plant("mixture-rounding", component="weight", what="weights rounded down to whole passes")
def _() -> Subject:
    class Floor(_Mixed):
        def taken(self, weight: float, count: int) -> int:
            return max(1, math.floor(weight)) * count

    return specimens.subject(pipeline=Floor)


@mixture_shares.plant(
    "mixture-rounding", component="weight", what="a source cut, not sampled: always its first half"
)
def _() -> Subject:
    class First(_Mixed):
        def walked(self, count: int, taken: int, epoch: int) -> Iterator[int]:
            return (step % count for step in range(taken))

    return specimens.subject(pipeline=First)


@mixture_shares.healthy("one pass and a half of one source, half a pass of the other")
def _() -> Subject:
    return specimens.subject(pipeline=_Mixed)
