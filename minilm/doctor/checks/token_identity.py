"""Every token is a token of its own.

Why: ids that are folded into a smaller range (a modulus, a number type that wraps, a clamp) give two words one vector.
Nothing fails: every id is valid. Rare and late tokens are what others are.

How: rows that differ in the last token alone. Ids are chosen so that a modulus, a clamp and a wrap at a power of two
would meet: pairs a power of two apart, and the last ids of the vocabulary. The logits of no two may be equal.

Cannot see: a table with two equal rows that were trained to be equal (the weights are drawn anew); folds that none of
the chosen pairs meets.

Sources: transformers issue 2825; open_lm pull request 77; rows 1 and 2 of the catalogue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.blocks import embedding_of
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, described, quiet, tokens_for
from minilm.doctor.subject import Subject

CONTEXT = 3


@check(
    group="model", needs=("forward", "vocab_size"), cost="1 forward of up to 64 rows of 4 tokens", quick=True
)
def token_identity(subject: Subject) -> Finding:
    """Logits after different last tokens differ."""
    assert subject.forward is not None and subject.vocab_size is not None
    ids = _ids(subject.vocab_size, set(subject.special_ids))
    if len(ids) < 2:
        raise NotApplicable("needs two ordinary token ids")
    with quiet(subject), torch.no_grad():
        context = tokens_for(subject, 1, CONTEXT).expand(len(ids), -1)
        tokens = torch.cat([context, torch.tensor(ids)[:, None]], dim=1)
        logits = subject.forward(tokens)[:, -1].double()
        apart = torch.cdist(logits, logits, p=float("inf")) / logits.std()
        apart.fill_diagonal_(float("inf"))
        least = float(apart.min())
        row, other = divmod(int(apart.argmin()), len(ids))
        found = embedding_of(subject, tokens)
    if float(apart[apart < float("inf")].max()) <= FLOAT32_NOISE:
        raise NotApplicable("no token changes the logits after it: the probe saw nothing")
    if least > FLOAT32_NOISE:
        return passed(f"of {len(ids)} token ids the nearest two are {least:.1e} std apart", least, FLOAT32_NOISE,
                      unit="logit std")  # fmt: skip
    pair = sorted((ids[row], ids[other]))
    merged = int((apart.min(1).values <= FLOAT32_NOISE).sum())
    where = (
        described(subject.module, found[0]) if found and subject.module is not None else "embedding of tokens"
    )
    return failed(
        f"tokens {pair[0]} and {pair[1]} have the same logits; {merged} of {len(ids)} ids share theirs with another",
        least, FLOAT32_NOISE, unit="logit std", bugs=["tok-id-mod-vocab", "tok-uint16-wrap"], component=where,
        advice="look for a modulus, a clamp or a narrow integer type on the way to the embedding",
    )  # fmt: skip


def _ids(vocab_size: int, special: set[int]) -> list[int]:
    """At most 64 ids: small ones, each a power of two further, and the last ones."""
    wanted = [3, 7, 11]
    wanted += [start + 2**power for start in (3, 7) for power in range(2, 24)]
    wanted += [vocab_size // 2 + 3, vocab_size // 3 + 3, *range(vocab_size - 6, vocab_size)]
    return [i for i in dict.fromkeys(wanted) if 0 <= i < vocab_size and i not in special][:64]


@token_identity.plant("tok-id-mod-vocab", component="embedding", what="ids modulo a smaller number")
def _() -> Subject:
    class Folded(specimens.model.Model):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens % 32)

    return specimens.subject(model=Folded)


@token_identity.plant("tok-id-mod-vocab", component="embedding", what="the last ids clamped to one")
def _() -> Subject:
    class Clamped(specimens.model.Model):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens.clamp(max=57))

    return specimens.subject(model=Clamped)


@token_identity.plant("tok-uint16-wrap", component="embedding", what="ids in eight bits, 300 tokens")
def _() -> Subject:
    class Narrow(specimens.model.Model):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens.to(torch.uint8).long())

    return specimens.subject(model=Narrow, size={"vocab_size": 300})


@token_identity.healthy("a vocabulary of 300")
def _() -> Subject:
    return specimens.subject(size={"vocab_size": 300})
