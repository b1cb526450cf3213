"""A memory must return the entries that fit best, all of them, and each under its own number.

Why: product keys find the best of a million entries from a few thousand products. A shortcut too many returns entries
that are merely good, or the right scores under wrong numbers; the model then learns to live with noise.

How: queries and keys are asked for, every score is computed (query . key, float32), and the best k are compared with
what was retrieved: the same scores, and at each returned number the score that was returned with it. Equal scores may
come in any order. One query at a time must give what all at once gave.

Cannot see: whether the entries are useful (memory_use), or whether scores are a good idea.

Sources: Lample et al., Large Memory Layers with Product Keys, 2019; lucidrains/PEER-pytorch commits c4a189d, 7728229.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilm.doctor.core import Finding, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, difference, quiet, tokens_for
from minilm.doctor.specimens.memory import HALF, TOP, Memory, memory_subject
from minilm.doctor.subject import Subject

MOST_SCORES = 10_000_000  # 40 MB: of a million entries the scores of ten queries


@check(
    group="memory",
    needs=("memory", "vocab_size"),
    cost="2 forwards, all scores of up to 96 queries",
    quick=True,
)
def retrieval(subject: Subject) -> Finding:
    """What is retrieved is the brute-force top k."""
    view = subject.memory
    with quiet(subject), torch.no_grad():
        states = view.states(tokens_for(subject, 2, 48))
        states = states[: max(8, MOST_SCORES // view.total())]
        entries, scores = view.retrieve(states)
        brute = view.every_score(states)  # [N, E]
        single = [view.retrieve(state.unsqueeze(0)) for state in states[:8]]
    num_entries, top = brute.shape[1], entries.shape[1]
    more = {"unit": "score std", "details": {"entries": num_entries, "retrieved": top}}
    alone = difference(torch.cat([s for _, s in single]), scores[:8], scale=brute)
    if alone > FLOAT32_NOISE:
        return failed(
            f"a query alone and among others gets scores that differ by {alone:.2g} std",
            alone, FLOAT32_NOISE, bugs=["pk-einsum-drops-n"], component="retrieval: queries are mixed",
            advice="score each query on its own: keep the position's axis in the product", **more,
        )  # fmt: skip
    if int(entries.min()) < 0 or int(entries.max()) >= num_entries:
        return failed(
            f"entry {int(entries.max())} was retrieved, there are {num_entries}",
            float(entries.max()), num_entries, unit="entry", bugs=["pk-index-not-gathered"],
            component="retrieval: numbers of entries", advice="an index into candidates is not yet an entry: gather",
        )  # fmt: skip
    best = brute.topk(top).values
    own = brute.gather(1, entries)
    numbering = difference(own, scores, scale=brute)
    missed = difference(best, own.sort(1, descending=True).values, scale=brute)
    if numbering > FLOAT32_NOISE:
        return failed(
            f"the returned numbers stand for entries whose scores differ by {numbering:.2g} std from those returned",
            numbering, FLOAT32_NOISE, bugs=_numbering_bugs(scores, best, brute),
            component="retrieval: numbers of entries",
            advice="gather the halves' indices by the place in the list of candidates, then entry = i * n + j", **more,
        )  # fmt: skip
    if missed > FLOAT32_NOISE:
        share = float((best - own.sort(1, descending=True).values > FLOAT32_NOISE).float().mean())
        return failed(
            f"{share:.0%} of the retrieved entries are not among the best {top}; the worst is {missed:.2g} std below",
            missed, FLOAT32_NOISE, bugs=["pk-topk-not-exact", "mem-dead-keys"], component="retrieval: candidates",
            advice=f"take the best {top} of each half before adding: fewer candidates can miss the best pair", **more,
        )  # fmt: skip
    worst = max(numbering, missed, alone)
    return passed(
        f"{len(states)} queries: the best {top} of {num_entries} entries", worst, FLOAT32_NOISE, **more
    )


def _numbering_bugs(scores: Tensor, best: Tensor, brute: Tensor) -> list[str]:
    """Right scores under wrong numbers; or scores that are nobody's."""
    right = difference(scores.sort(1, descending=True).values, best, scale=brute) < FLOAT32_NOISE
    return (
        ["pk-index-not-gathered", "mem-index-off-by-one"]
        if right
        else ["pk-einsum-drops-n", "pk-topk-not-exact"]
    )


@retrieval.plant(
    "pk-topk-not-exact", component="candidates", what="two candidates of each half for four entries"
)
def _() -> Subject:
    class Few(Memory):
        def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = self.halves(x)
            (a, i), (b, j) = one.topk(TOP // 2), two.topk(TOP // 2)
            scores, place = (a.unsqueeze(-1) + b.unsqueeze(-2)).flatten(-2).sort(descending=True)
            return self.entry(i.gather(-1, place // (TOP // 2)), j.gather(-1, place % (TOP // 2))), scores

    return memory_subject(Few)


@retrieval.plant("pk-index-not-gathered", component="numbers of entries")
def _() -> Subject:
    class Ungathered(Memory):
        def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = self.halves(x)
            (a, _), (b, _) = one.topk(TOP), two.topk(TOP)
            scores, place = (a.unsqueeze(-1) + b.unsqueeze(-2)).flatten(-2).topk(TOP)
            return place, scores

    return memory_subject(Ungathered)


@retrieval.plant("mem-index-off-by-one", component="numbers of entries", what="rows and columns exchanged")
def _() -> Subject:
    class Exchanged(Memory):
        def entry(self, i: Tensor, j: Tensor) -> Tensor:
            return j * HALF + i

    return memory_subject(Exchanged)


@retrieval.plant("pk-einsum-drops-n", component="queries are mixed")
def _() -> Subject:
    class Summed(Memory):
        def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two = super().halves(x)
            return one.sum(-2, keepdim=True).expand_as(one), two.sum(-2, keepdim=True).expand_as(two)

    return memory_subject(Summed)


@retrieval.healthy("all scores computed, no product keys")
def _() -> Subject:
    class Brute(Memory):
        def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores, entries = (self.queries(x) @ self.all_keys().T).topk(TOP)
            return entries, scores

    return memory_subject(Brute)


@retrieval.healthy("a product-key memory")
def _() -> Subject:
    return memory_subject()
