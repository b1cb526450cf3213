"""The order of earlier tokens matters; where positions are relative, only differences of positions matter.

Why: a model whose positions got lost (a table that is zero, a rotation that is not called, of the query alone) still
learns: from how often words occur. It ends a little worse, and nobody knows why.

How: order: the inputs of a block are reversed, all but the last, then only their later half. A block without positions
returns the same for the last one, to the last bits, since attention is a sum. Whole models are not that clear: two
layers of causal attention without positions do know something of order. A subject passes if any block, or the
embedding, knows the order. Relative: all positions plus a constant; the logits must stay (asked only where
`shifted_forward` is handed over).

Cannot see: positions that are there but wrong for all alike (a wrong base: see reference_agrees).

Sources: K6 of the catalogue; Su et al., 2021 (rotary positions depend on differences alone).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.blocks import blocks, leaves, replaced, stream
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, culprit, difference, quiet, tokens_for
from minilm.doctor.subject import Subject

LENGTH = 24
ORDERED = 96  # where the order is asked for: a table that ends, or is clamped, ends within a longer row
STD = 0.2


@check(group="model", needs=("forward", "vocab_size"), cost="7 forwards of 96 tokens", quick=True)
def position_sensitivity(subject: Subject) -> Finding:
    """Reverse what is before the last position, then its later half; a block, or the embedding, must notice."""
    assert subject.forward is not None
    with quiet(subject, redraw=STD), torch.no_grad():
        tokens = tokens_for(subject, 1, ORDERED)
        length = tokens.shape[1]
        if length < 8:
            raise NotApplicable(f"needs rows of at least 8 tokens, the subject takes {length}")
        plain = _inputs_and_outputs(subject, tokens)
        before = subject.forward(tokens)[:, -1]
        seen = []
        for start in (0, length // 2):
            order = torch.arange(length)
            order[start:-1] = order[start:-1].flip(0)
            whole = difference(before, subject.forward(tokens[:, order])[:, -1])
            found = _noticed(subject, plain, tokens, order) if plain else {"the model": whole}
            name = max(found, key=lambda n: found[n])
            seen.append((found[name], whole, name, start))
    least, whole, name, start = seen[0] if seen[0][0] <= FLOAT32_NOISE else min(seen)
    where = f"positions from {start} on" if start else "the tokens before it"
    said = (
        f"another order of {where} moved the output of {name} by {least:.1e} std, the logits by {whole:.1e}"
    )
    if min(least, whole) > FLOAT32_NOISE:
        return passed(said, least, FLOAT32_NOISE, unit="std")
    return failed(
        said, min(least, whole), FLOAT32_NOISE, unit="std", bugs=["rope-not-relative", "rope-bf16"],
        component=f"position embedding of {where}: no block knows the order, nor does the embedding",
        advice="call the rotary embedding on queries and keys (or add the learnt positions), and see that its table is "
        "not zero and does not end before the row does",
    )  # fmt: skip


Plain = dict[str, tuple[Tensor, Tensor]]


def _inputs_and_outputs(subject: Subject, tokens: Tensor) -> Plain:
    """What goes into and comes out of each block [1, T, D]; empty where that cannot be seen."""
    assert subject.forward is not None
    parts = blocks(subject.module)
    with leaves(parts) as seen:
        subject.forward(tokens)
    plain = {n: (g, m) for n, (g, m) in seen.items() if g.shape[:2] == m.shape[:2] == tokens.shape}
    return plain if len(plain) == len(parts) else {}


def _noticed(subject: Subject, plain: Plain, tokens: Tensor, order: Tensor) -> dict[str, float]:
    """How far each block's last output moves when its other inputs are permuted; the embedding: when tokens are."""
    assert subject.module is not None and subject.forward is not None
    names = list(plain)
    with leaves([(names[0], subject.module.get_submodule(names[0]))]) as again:
        subject.forward(tokens[:, order])
    given = plain[names[0]][0]
    found = {"the embedding": difference(given[:, order], again[names[0]][0], scale=given)}
    handles = []
    made: dict[str, Tensor] = {}
    for name in names:

        def permute(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
            old = stream(args)
            old = stream(kwargs) if old is None else old
            new = plain[name][0][:, order]
            return None if old is None else (replaced(args, old, new), replaced(kwargs, old, new))

        def keep(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if (result := stream(output)) is not None:
                made[name] = result

        part = subject.module.get_submodule(name)
        handles += [
            part.register_forward_pre_hook(permute, with_kwargs=True),
            part.register_forward_hook(keep),
        ]
    try:
        subject.forward(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found | {n: difference(plain[n][1][:, -1], made[n][:, -1], scale=plain[n][1]) for n in names}


@check(group="model", needs=("shifted_forward", "vocab_size"), cost="4 forwards", quick=True)
def relative_positions(subject: Subject) -> Finding:
    """All positions plus a constant: the logits stay."""
    assert subject.shifted_forward is not None
    shifted = subject.shifted_forward
    with quiet(subject), torch.no_grad():
        tokens = tokens_for(subject, 1, LENGTH)
        length = tokens.shape[1]
        most = min(2048, (subject.max_length or 4 * length) - length)  # beyond, float32 angles lose digits
        if most < 1:
            raise NotApplicable("no room for another offset within the longest sequence")
        before = shifted(tokens, 0)
        offsets = sorted({1, max(1, most // 2), most})
        moved = {offset: difference(before, shifted(tokens, offset), scale=before) for offset in offsets}
        offset = max(moved, key=lambda o: moved[o])
        worst = moved[offset]
        if worst <= 5 * FLOAT32_NOISE:  # angles of 2048 have an error of 1e-4
            return passed(f"positions counted from {offset} moved the logits by {worst:.1e} std",
                          worst, 5 * FLOAT32_NOISE, unit="logit std")  # fmt: skip

        def broken(a: Tensor, b: Tensor) -> bool:
            return a.dim() == 3 and difference(a, b) > 5 * FLOAT32_NOISE

        where = culprit(subject.module, lambda: shifted(tokens, 0), lambda: shifted(tokens, offset), broken)
    return failed(
        f"positions counted from {offset} instead of 0 moved the logits by {worst:.1e} std",
        worst, 5 * FLOAT32_NOISE, unit="logit std", bugs=["rope-not-relative", "rope-bf16", "rope-state-leak"],
        component=where or "rotary positions",
        advice="rotate queries and keys alike, by the same table, computed in float32",
    )  # fmt: skip


@position_sensitivity.plant("rope-not-relative", component="position", what="the rotation is not called")
def _() -> Subject:
    class Unrotated(specimens.Attention):
        def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
            return x

    return specimens.subject(attention=Unrotated)


@position_sensitivity.plant("rope-not-relative", component="position", what="a table of zeros")
def _() -> Subject:
    class Zero(specimens.Rotary):
        def angles(self, size: specimens.model.Size) -> Tensor:
            return super().angles(size) * 0

    return specimens.subject(rotary=Zero)


@relative_positions.plant("rope-not-relative", component="attention", what="queries alone are rotated")
def _() -> Subject:
    class Query(specimens.Attention):
        def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
            return super().rotate(x, positions) if x.shape[1] == self.size.num_heads else x

    return specimens.subject(attention=Query)


@relative_positions.plant("rope-not-relative", component="attention", what="one half turns the other way")
def _() -> Subject:
    class Sign(specimens.Rotary):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            angles = self.table[positions].unsqueeze(1)
            first, second = x.chunk(2, dim=-1)
            sine, cosine = angles.sin(), angles.cos()
            return torch.cat([first * cosine + second * sine, second * cosine + first * sine], dim=-1)

    return specimens.subject(rotary=Sign)


@position_sensitivity.plant(
    "rope-not-relative", component="positions from", what="a table that ends after 16"
)
def _() -> Subject:
    class Clamped(specimens.Rotary):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return super().forward(x, positions.clamp(max=16))

    return specimens.subject(rotary=Clamped)


@position_sensitivity.healthy("learnt positions, added to the embedding")
def _() -> Subject:
    class Added(specimens.model.Model):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens) + (torch.arange(tokens.shape[1]).unsqueeze(-1) / 10).sin()

    class Unrotated(specimens.Attention):
        def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
            return x

    return specimens.subject(model=Added, attention=Unrotated)


@position_sensitivity.healthy("a layer without positions among others")
def _() -> Subject:
    subject = specimens.subject()
    subject.module.layers[0].attention.rotate = lambda x, positions: x  # type: ignore[union-attr]
    return subject
