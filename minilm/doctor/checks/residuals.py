"""What goes into a block comes out of it again: the residual path is there.

Why: a deep model with a lost residual trains, worse. Nothing says why.

How: every weight matrix of a block set to zero: attention and feed-forward then return nothing (or a constant), and
the block's output must still follow its input. For all blocks at once, changing the last token must move the last
logits; where it does not, each block is asked in turn. A block that normalises its sum passes as well.

Cannot see: a residual that is scaled wrongly; models without a stack of blocks.

Sources: row 79 of the catalogue; He et al., 2016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.blocks import blocks
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import described, difference, other_token, quiet, tokens_for
from minilm.doctor.subject import Subject

LENGTH = 8
ALIVE = 1e-3  # of the logits' deviation; healthy: above 0.5


@check(group="model", needs=("forward", "module", "vocab_size"), cost="4 forwards", quick=True)
def residuals(subject: Subject) -> Finding:
    """With the blocks' matrices at zero the last token still reaches the last logits."""
    parts = blocks(subject.module)
    if not parts:
        raise NotApplicable("no stack of blocks was found in the module")
    with quiet(subject), torch.no_grad():
        usual, _ = _effect(subject, [])
        if usual < ALIVE:
            raise NotApplicable(
                "changing the last token does not move the last logits: the probe saw nothing"
            )
        left, any_zeroed = _effect(subject, [part for _, part in parts])
        if not any_zeroed:
            raise NotApplicable("the blocks have no weight matrices of their own")
        if left > ALIVE:
            return passed(f"with every block's matrices at zero a token still moves its own logits by {left:.1e} std",
                          left, ALIVE, unit="logit std")  # fmt: skip
        dead = [name for name, part in parts if _effect(subject, [part])[0] <= ALIVE]
        where = described(subject.module, _within(subject, dead[0] if dead else parts[0][0]))  # type: ignore[arg-type]
    return failed(
        f"with every block's matrices at zero nothing of a token reaches its own logits ({left:.1e} std); "
        f"lost in {', '.join(dead) or 'all blocks together'}",
        left, ALIVE, unit="logit std", bugs=["residual-missing"], component=where,
        advice="add each part's output to what went into it: x = x + part(norm(x))",
    )  # fmt: skip


def _effect(subject: Subject, zeroed: list[nn.Module]) -> tuple[float, bool]:
    """(what changing the last token does to the last logits, was anything set to zero)."""
    assert subject.forward is not None
    weights = {id(p): p for part in zeroed for p in part.parameters() if p.dim() >= 2}
    kept = [(p, p.detach().clone()) for p in weights.values()]
    try:
        for parameter, _ in kept:
            parameter.zero_()
        tokens = tokens_for(subject, 1, LENGTH)
        changed = tokens.clone()
        changed[0, -1] = other_token(subject, int(tokens[0, -1]))
        before, after = subject.forward(tokens)[:, -1], subject.forward(changed)[:, -1]
        return difference(before, after), bool(kept)
    finally:
        for parameter, value in kept:
            parameter.copy_(value)


def _within(subject: Subject, name: str) -> str:
    """The first child of a block that, with its matrices at zero, cuts the last token off alone; else the block."""
    assert subject.module is not None
    block = subject.module.get_submodule(name)
    for inside, child in block.named_children():
        if any(p.dim() >= 2 for p in child.parameters()) and _effect(subject, [child])[0] <= ALIVE:
            return f"{name}.{inside}"
    return name


@residuals.plant("residual-missing", component="layers.1.ffn", what="around the feed-forward of one block")
def _() -> Subject:
    subject = specimens.subject()
    block = subject.module.layers[1]  # type: ignore[union-attr]

    def forward(x: Tensor, *others: Any) -> Tensor:
        x = x + block.attention(block.attention_norm(x), *others)
        return block.ffn(block.ffn_norm(x))

    block.forward = forward
    return subject


@residuals.plant("residual-missing", component="attention", what="around attention, everywhere")
def _() -> Subject:
    class Cut(specimens.model.Block):
        def forward(self, x: Tensor, *others: Any) -> Tensor:
            x = self.attention(self.attention_norm(x), *others)
            return x + self.ffn(self.ffn_norm(x))

    return specimens.subject(block=Cut)


@residuals.healthy("norms after the sum")
def _() -> Subject:
    class Post(specimens.model.Block):
        def forward(self, x: Tensor, *others: Any) -> Tensor:
            x = self.attention_norm(x + self.attention(x, *others))
            return self.ffn_norm(x + self.ffn(x))

    return specimens.subject(block=Post)


@residuals.healthy("attention and feed-forward side by side, scaled")
def _() -> Subject:
    class Parallel(specimens.model.Block):
        def forward(self, x: Tensor, *others: Any) -> Tensor:
            normed = self.attention_norm(x)
            return x + 0.2 * (self.attention(normed, *others) + self.ffn(normed))

    return specimens.subject(block=Parallel)
