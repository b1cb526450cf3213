"""What a memory reads must be spread: over sub-keys, over entries, between something and nothing.

Why: retrieval can be exact and yet useless. The keys have grown alike, or one entry fits everything; the null slot
takes all, so that the memory is never heard, or nothing, so that it speaks where it has nothing to say; the gate has
closed. The loss shows none of it: the rest of the model does the work.

How: the rows that evaluation sees (random tokens where there are none) go through the model as it is. Counted are the
different sub-keys of each half, against as many uniform draws; the share of the reads that went to one entry; the
attention on the null slot, of a model that was trained; and the gate. How many entries were read stands beside it,
against the same number of uniform draws: a few thousand tokens cannot cover a million entries.

Cannot see: whether the right entries are read (labels in the data tell: usage/.../hit in the log of a run).

Sources: Lample et al. 2019, whose health metrics are usage and KL to uniform; Kim and Jung 2020 (arXiv 2010.03881) on
slots that stay outdated; Rae et al. 2021 on gates that close.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet, tokens_for
from minilm.doctor.specimens.memory import Memory, memory_subject
from minilm.doctor.subject import Subject
from minilm.doctor.views import MemoryReads, MemoryView

TOKENS = 6000  # about, on which this is measured
LEAST_KEYS = 0.1  # of the sub-keys that as many uniform draws would reach; healthy memories reach 0.5 to 1
MOST_SHARE = 0.2  # of all reads to one entry; healthy ones: 0.002 to 0.08
FEW_ENTRIES = 25  # of so few, one may well get a fifth
LEAST_NULL = 1e-3  # of the attention on null, and on what is not null, once trained
LEAST_GATE = 1e-3  # on average; begins at 0.27 with a bias of -1


@check(group="memory", needs=("memory", "memory.reads", "vocab_size"), cost="about 6,000 tokens forward")
def memory_spread(subject: Subject) -> Finding:
    """Sub-keys, the busiest entry, null slot and gate, on the rows of evaluation."""
    view: MemoryView = subject.memory
    with quiet(subject, redraw=None), torch.no_grad():
        parts = [view.reads(tokens, segments) for tokens, segments in _rows(subject)]  # type: ignore[misc]
    read = _joined(parts)
    if read.entries.numel() == 0:
        raise NotApplicable("no token was read for")
    held = torch.arange(view.total()) if view.occupied is None else view.occupied().nonzero().flatten()
    if len(held) == 0:
        raise NotApplicable("no entry holds anything")
    where = {"unit": "of what is read", "details": _details(read, held)}
    findings = (
        _keys(view, read, held),
        _busiest(read, held, where),
        _null(subject, read, where),
        _gate(read, where),
    )
    found = next((f for f in findings if f is not None), None)
    if found is not None:
        return found
    share, number = _most(read)
    null = (
        "" if read.null is None else f", {float(read.null.double().mean()):.1%} of the attention on nothing"
    )
    text = f"{len(read.entries):,} tokens read {number:,} entries, the busiest {share:.1%} of the time{null}"
    return passed(text, share, MOST_SHARE, **where)


def _rows(subject: Subject) -> list[tuple[Tensor, Tensor]]:
    """Tokens and segments: validation, else training, else random."""
    found, count = [], 0
    data = subject.data
    give = data and (data.validation_batches and (lambda: data.validation_batches(0, 1)))
    give = give or (data and data.batches and (lambda: data.batches(0, 0, 0, 1)))
    for rows in give() if give else ():
        found.append((rows.tokens, rows.segments))
        count += int((rows.segments > 0).sum())
        if count >= TOKENS:
            break
    if not found:
        tokens = tokens_for(subject, 48, 128)
        found = [(part, torch.ones_like(part)) for part in tokens.split(8)]
    most = subject.max_length or found[0][0].shape[1]
    return [(tokens.narrow(1, 0, min(most, tokens.shape[1])), segments.narrow(1, 0, min(most, tokens.shape[1])))
            for tokens, segments in found]  # fmt: skip


def _joined(parts: list[MemoryReads]) -> MemoryReads:
    def together(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    entries, weights = together("entries"), together("weights")
    assert entries is not None and weights is not None
    return MemoryReads(entries, weights, together("null"), together("gates"))


def _taken(read: MemoryReads) -> Tensor:
    """The entry of every read of something, [reads]."""
    return read.entries[read.weights > 0]


def _most(read: MemoryReads) -> tuple[float, int]:
    """Share of the reads that went to the busiest entry, and how many different ones there were."""
    taken = _taken(read)
    if not len(taken):
        return 0.0, 0
    _, counts = taken.unique(return_counts=True)
    return float(counts.max()) / len(taken), len(counts)


def _expected(total: int, draws: int) -> float:
    """How many of `total` so many uniform draws reach."""
    return total * -math.expm1(draws * math.log1p(-1 / total)) if total > 1 else 1.0


def _details(read: MemoryReads, held: Tensor) -> dict[str, float]:
    taken, entries = _taken(read), len(held)
    _, counts = taken.unique(return_counts=True)
    share = counts.double() / max(1, len(taken))
    entropy = float(-(share * share.log()).sum())
    falling = share.sort(descending=True).values
    return {
        "entries": entries,
        "read": len(counts),
        "uniform_draws_would_reach": round(_expected(entries, len(taken)), 1),
        "usage_perplexity": math.exp(entropy),
        "unevenness": math.log(entries) - entropy,
        "top_percent_share": float(falling[: max(1, entries // 100)].sum()),
    }


def _keys(view: MemoryView, read: MemoryReads, held: Tensor) -> Finding | None:
    if view.columns is None:
        return None
    # Of what was chosen, weighty or not: keys that tie choose the same cells, to which nothing is then given.
    chosen = read.entries.flatten()
    for name, sub, there in (
        ("rows", chosen // view.columns, held // view.columns),
        ("columns", chosen % view.columns, held % view.columns),
    ):
        expected = _expected(len(there.unique()), len(chosen))
        share = len(sub.unique()) / expected
        if share < LEAST_KEYS:
            return failed(
                f"{len(sub.unique())} of the {len(there.unique())} {name} of the grid of keys were ever chosen, "
                f"uniform draws would reach {expected:.0f}",
                share, LEAST_KEYS, unit="of the expected sub-keys", bugs=["mem-dead-keys"],
                component=f"memory keys: {name}",
                advice="keys that are alike, or a query that hardly changes: normalise both, and give every sub-key a "
                "gradient (a cross entropy over the rows and columns of known entries)",
            )  # fmt: skip
    return None


def _busiest(read: MemoryReads, held: Tensor, where: dict[str, object]) -> Finding | None:
    share, _ = _most(read)
    if len(held) < FEW_ENTRIES or share <= MOST_SHARE:
        return None
    values, counts = _taken(read).unique(return_counts=True)
    return failed(
        f"{share:.0%} of all reads went to entry {int(values[counts.argmax()])}",
        share, MOST_SHARE, bugs=["mem-dead-keys"], component="memory keys: one entry",
        advice="one key outweighs the others, or many states are alike: normalise keys and queries", **where,
    )  # fmt: skip


def _null(subject: Subject, read: MemoryReads, where: dict[str, object]) -> Finding | None:
    if read.null is None or subject.fresh:
        return None
    mass = float(read.null.double().mean())
    if min(mass, 1 - mass) >= LEAST_NULL:
        return None
    said = "everything" if mass > 0.5 else "nothing"
    return failed(
        f"the null slot takes {said}: {mass:.3%} of the attention after training",
        min(mass, 1 - mass), LEAST_NULL, bugs=["mem-gate-dead"], component="memory gate: null slot",
        advice="see that the null slot's bias starts near that of an entry, and that retrieval learns before it is "
        "given up", **where,
    )  # fmt: skip


def _gate(read: MemoryReads, where: dict[str, object]) -> Finding | None:
    if read.gates is None:
        return None
    gate = float(read.gates.double().mean())
    if gate >= LEAST_GATE:
        return None
    return failed(
        f"the gate lets {gate:.1e} of what is read through",
        gate, LEAST_GATE, bugs=["mem-gate-dead"], component="memory gate",
        advice="start the gate where it passes something, and see that its gradient is not 0", **where,
    )  # fmt: skip


@memory_spread.plant("mem-dead-keys", component="memory keys", what="keys that are all alike")
def _() -> Subject:
    class Alike(Memory):
        def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = super().halves(x)
            return one * 1e-6 + torch.arange(one.shape[-1]), two * 1e-6 + torch.arange(one.shape[-1])

    return memory_subject(Alike)


@memory_spread.plant("mem-dead-keys", component="keys: columns", what="one half of the query is cut off")
def _() -> Subject:
    class Half(Memory):
        def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = super().halves(x)
            return one, two * 0 - torch.arange(two.shape[-1])

        def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = self.halves(x)
            scores, rows = one.topk(4)
            return self.entry(rows, two.argmax(-1, keepdim=True).expand_as(rows)), scores

    return memory_subject(Half)


@memory_spread.plant("mem-dead-keys", component="one entry", what="one entry is always among the best")
def _() -> Subject:
    class Loud(Memory):
        def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
            entries, scores = super().retrieve(x)
            first = torch.zeros_like(entries[..., :1]) + 77
            return torch.cat((first, entries[..., :3]), -1), scores

    return memory_subject(Loud)


@memory_spread.plant("mem-gate-dead", component="gate", what="a gate that has closed")
def _() -> Subject:
    class Shut(Memory):
        def gated(self, x: Tensor) -> Tensor:
            return (self.gate(x) - 20).sigmoid()

    return memory_subject(Shut)


@memory_spread.plant(
    "mem-gate-dead", component="null slot", what="a trained memory whose null slot takes everything"
)
def _() -> Subject:
    return _with_null(0.99999)


@memory_spread.plant(
    "mem-gate-dead", component="null slot", what="a trained memory whose null slot takes nothing"
)
def _() -> Subject:
    return _with_null(1e-5)


def _with_null(mass: float) -> Subject:
    subject = memory_subject().but(fresh=False)
    reads = subject.memory.reads

    def with_null(tokens: Tensor, segments: Tensor) -> MemoryReads:
        read: MemoryReads = reads(tokens, segments)
        null = torch.full(read.entries.shape[:1], mass)
        return MemoryReads(read.entries, read.weights * (1 - mass), null, read.gates)

    subject.memory.reads = with_null
    return subject


@memory_spread.healthy("a product-key memory, freshly drawn")
def _() -> Subject:
    return memory_subject()


@memory_spread.healthy("a trained memory that reads nothing for nine tokens of ten")
def _() -> Subject:
    return _with_null(0.9)
