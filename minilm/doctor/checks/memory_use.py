"""A memory must matter: many entries are read, their content reaches the logits, and the query learns.

Why: a memory can be dead without any sign in the loss. The gate is shut, the keys are all alike so that the same few
entries are read, the choice of entries passes no gradient to the query, or padding of the entries is averaged in.

How: random states must read far more entries than a dead index would (against the number expected of uniformly drawn
entries); taking the content away must move the logits; editing an entry must move what is read of it and of no other;
changing the embedding of the padding id must move nothing that is read; a gradient must arrive at queries and keys.

Cannot see: whether what is read is relevant.

Sources: XLM's product-key memory, whose evaluation logs usage; pioneerLu/ExplicitLM, which averages padding in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, difference, quiet, tokens_for
from minilm.doctor.specimens.memory import Memory, memory_subject
from minilm.doctor.subject import Subject
from minilm.doctor.views import MemoryView

MOST_ENTRIES = 1000  # whose contents are looked at

LEAST_USE = (
    0.05  # of the entries that as many uniform draws would reach; healthy fresh memories reach 0.2 to 0.9
)
LEAST_EFFECT = 1e-4  # std of the logits; healthy specimens: above 1e-2


@check(group="memory", needs=("memory", "forward", "vocab_size"), cost="5 forwards and a backward")
def memory_use(subject: Subject) -> Finding:
    """Usage, effect, edits, padding, gradients."""
    tokens = tokens_for(subject, 4, 48)
    with quiet(subject):
        for step in (_usage, _padding, _edits, _effect, _gradients):
            finding = step(subject, tokens)
            if finding is not None:
                return finding
        with torch.no_grad():
            used, expected = _counts(subject, tokens)
    return passed(f"{used} entries were read, uniform draws would reach {expected:.0f}", used / expected, LEAST_USE,
                  unit="of the expected use")  # fmt: skip


def _counts(subject: Subject, tokens: Tensor) -> tuple[int, float]:
    entries, _ = subject.memory.retrieve(subject.memory.states(tokens))
    total = subject.memory.total()
    expected = total * (1 - (1 - 1 / total) ** entries.numel())
    return len(entries.unique()), expected


def _some(view: MemoryView) -> Tensor:
    """Numbers of entries that hold something, in equal distances, and the neighbours of one that is edited."""
    total = view.total()
    held = torch.arange(total) if view.occupied is None else view.occupied().nonzero().flatten()
    if len(held) == 0:
        raise NotApplicable("no entry holds anything")
    step = max(1, len(held) // MOST_ENTRIES)
    chosen = held[::step]
    middle = len(held) // (3 * step) * step
    return torch.cat((chosen, held[max(0, middle - 2) : middle + 3])).unique()


@torch.no_grad()
def _usage(subject: Subject, tokens: Tensor) -> Finding | None:
    used, expected = _counts(subject, tokens)
    if used >= LEAST_USE * expected:
        return None
    return failed(
        f"{used} different entries were read, uniform draws would reach {expected:.0f}",
        used / expected, LEAST_USE, unit="of the expected use", bugs=["mem-dead-keys"], component="memory keys",
        advice="draw keys and queries so that scores differ between entries, and normalise the query",
    )  # fmt: skip


@torch.no_grad()
def _padding(subject: Subject, tokens: Tensor) -> Finding | None:
    view = subject.memory
    if view.values is None or view.pad_id is None or subject.module is None:
        return None
    entries = _some(view)
    before = view.values(entries)
    for name, part in subject.module.named_modules():
        if isinstance(part, nn.Embedding):
            part.weight[view.pad_id] += 3.0
            moved = difference(before, view.values(entries), scale=before)
            if moved > FLOAT32_NOISE:
                return failed(
                    f"changing the embedding of the padding id moved what is read of entries by {moved:.2g} std",
                    moved, FLOAT32_NOISE, unit="std of what is read", bugs=["mem-pad-attended"],
                    component=f"memory values: {name}", advice="leave an entry's padding out of mean and attention",
                )  # fmt: skip
    return None


@torch.no_grad()
def _edits(subject: Subject, tokens: Tensor) -> Finding | None:
    view = subject.memory
    if view.values is None or view.edit is None:
        return None
    entries = _some(view)
    before, ids = view.values(entries).clone(), tokens[0, :3].tolist()
    chosen = int(entries[len(entries) // 3])
    undo = view.edit(chosen, ids)
    try:
        moved = (view.values(entries) - before).abs().flatten(1).amax(1) > 0
    finally:
        if callable(undo):
            undo()
    changed = entries[moved].tolist()
    if changed == [chosen]:
        return None
    return failed(
        f"entry {chosen} was edited; what is read changed of {changed[:5] or 'none'}",
        len(changed), 1, unit="entries", bugs=["mem-index-off-by-one"], component="memory values: number of an entry",
        advice="write and read an entry under the same number",
    )  # fmt: skip


@torch.no_grad()
def _effect(subject: Subject, tokens: Tensor) -> Finding | None:
    if subject.memory.silenced is None:
        return None
    effect = difference(subject.forward(tokens), subject.memory.silenced(tokens))
    if effect > LEAST_EFFECT:
        return None
    return failed(
        f"taking the content of all entries away moved the logits by {effect:.1e} std",
        effect, LEAST_EFFECT, unit="logit std", bugs=["mem-gate-dead"], component="memory gate",
        advice="start the gate where it passes something, and see that its gradient is not 0",
    )  # fmt: skip


def _gradients(subject: Subject, tokens: Tensor) -> Finding | None:
    view = subject.memory
    with torch.enable_grad():
        queries = view.queries(view.states(tokens))
        _, scores = view.retrieve(view.states(tokens))
        sources = [t for t in (queries, view.keys() if view.scores is None else queries) if t.requires_grad]
        if not sources:
            return None
        reached = scores.requires_grad and _moves(subject, tokens)
    if reached:
        return None
    return failed(
        "no gradient of the logits arrives at the queries: which entries are read cannot be learnt",
        0.0, 0.0, unit="gradient", bugs=["mem-topk-detached"], component="memory queries",
        advice="weight what is read by the scores, with their graph",
    )  # fmt: skip


def _moves(subject: Subject, tokens: Tensor) -> bool:
    """Does a gradient of the logits reach the parameters that make the query."""
    assert subject.module is not None
    view = subject.memory
    states = view.states(tokens)
    parameters = [p for p in subject.module.parameters() if p.requires_grad]
    makers = torch.autograd.grad(view.queries(states).sum(), parameters, allow_unused=True)
    own = [p for p, g in zip(parameters, makers, strict=True) if g is not None]
    logits = subject.forward(tokens)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((logits * weights).sum(), own, allow_unused=True)
    return all(g is not None and bool(g.abs().sum() > 0) for g in found)


@memory_use.plant("mem-dead-keys", component="keys", what="keys that are all alike")
def _() -> Subject:
    class Alike(Memory):
        def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = super().halves(x)
            fixed = torch.arange(one.shape[-1], dtype=one.dtype)
            return one * 1e-6 + fixed, two * 1e-6 + fixed

    return memory_subject(Alike)


@memory_use.plant("mem-pad-attended", component="values")
def _() -> Subject:
    class PadsToo(Memory):
        def values(self, entries: Tensor) -> Tensor:
            return self.words(self.texts[entries]).mean(-2)

    return memory_subject(PadsToo)


@memory_use.plant("mem-index-off-by-one", component="values")
def _() -> Subject:
    class Next(Memory):
        def values(self, entries: Tensor) -> Tensor:
            return super().values((entries + 1) % len(self.texts))

    return memory_subject(Next)


@memory_use.plant("mem-gate-dead", component="gate")
def _() -> Subject:
    class Shut(Memory):
        def gated(self, x: Tensor) -> Tensor:
            return (self.gate(x) - 20).sigmoid()

    return memory_subject(Shut)


@memory_use.plant("mem-topk-detached", component="queries", what="scores without their graph")
def _() -> Subject:
    class Detached(Memory):
        def weights(self, scores: Tensor) -> Tensor:
            return super().weights(scores.detach())

    return memory_subject(Detached)


@memory_use.plant("mem-topk-detached", component="queries", what="entries counted, not weighted")
def _() -> Subject:
    class Counted(Memory):
        def weights(self, scores: Tensor) -> Tensor:
            return torch.full_like(scores, 1 / scores.shape[-1])

    return memory_subject(Counted)


@memory_use.healthy("a product-key memory")
def _() -> Subject:
    return memory_subject()
