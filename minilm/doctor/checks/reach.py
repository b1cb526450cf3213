"""A position is influenced by every token before it, or by exactly the declared window.

Why: a window that is one too wide or too narrow, a window that is lost on one code path, a context that ends
earlier than configured: the loss moves by a little, and the model cannot use what it was built to use.

How: by gradient. Each block's input is made a leaf; the positions where the gradient of the block's last output is
not exactly zero are those that the block sees. That number must be the declared window of the layer, or all. For the
model as a whole the last logits are differentiated by the embeddings. Without a module each token is changed in turn.
An influence that fades below what float32 can hold (a recurrence that forgets) is told from a window, which ends
abruptly. Where no window is declared, an abrupt end is reported as not known, a hole as a failure.

Cannot see: windows longer than the probe; how strong an influence is; attention that leaves out the position itself.

Sources: transformers issues 29623, 39408 and 35896; pull requests 35681 and 40163; nanochat commit 3ba42e8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.blocks import blocks, embedding_of, leaves
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import described, difference, other_token, quiet, tokens_for
from minilm.doctor.subject import Subject

SHORT, LONG = 48, 160
FADED = 1e-12  # of the largest influence: a recurrence that forgets comes to zero gradually
STD = 0.1

ADVICE = (
    "compare the mask's limit with the configured window on each code path: the query itself counts as one"
)


@check(group="model", needs=("forward", "vocab_size"), cost="3 forwards and backwards", quick=True)
def reach(subject: Subject) -> Finding:
    """Count the positions that each layer, and the model, can see."""
    windows = [w for w in subject.windows or () if w is not None]
    length = SHORT if not windows or max(windows) * 2 + 2 > LONG else max(SHORT, max(windows) * 2 + 2)
    with quiet(subject, redraw=STD):
        tokens = tokens_for(subject, 1, length)
        if tokens.shape[1] < 4:
            raise NotApplicable(f"needs rows of at least 4 tokens, the subject takes {tokens.shape[1]}")
        layers = _layers(subject, tokens)
        if finding := _against_windows(subject, layers, tokens.shape[1]):
            return finding
        whole = _whole(subject, tokens)
    return _whole_finding(subject, whole, len(layers))


def _layers(subject: Subject, tokens: Tensor) -> list[tuple[str, Tensor]]:
    """(name, influence [T] on the block's last output) of each block; empty where blocks cannot be found."""
    found = blocks(subject.module)
    with torch.enable_grad(), leaves(found) as seen:
        subject.forward(tokens)
        influences = []
        for name, (given, made) in seen.items():
            if given.shape[:2] == made.shape[:2] == tokens.shape and made.requires_grad:
                influences.append((name, _influence(made[0, -1], given)))
    complete = len(influences) == len(found) and all(float(i.max()) > 0 for _, i in influences)
    return influences if complete else []


def _influence(made: Tensor, given: Tensor) -> Tensor:
    """[T]: how much each position of `given` [1, T, D] moves a random projection of `made`."""
    direction = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(made)
    (gradient,) = torch.autograd.grad((made * direction).sum(), given, retain_graph=True, allow_unused=True)
    return torch.zeros(given.shape[1]) if gradient is None else gradient[0].detach().double().norm(dim=-1)


def _seen(influence: Tensor) -> int:
    """How far back the influence goes without a gap, itself included; all where it fades instead of ending."""
    length = len(influence)
    missing = (influence == 0).nonzero().flatten().tolist()
    if not missing:
        return length
    kept = influence[influence > 0]
    return length if float(kept.min()) < FADED * float(kept.max()) else length - 1 - missing[-1]


def _against_windows(subject: Subject, layers: list[tuple[str, Tensor]], length: int) -> Finding | None:
    if subject.windows is None or len(subject.windows) != len(layers):
        return None
    for (name, influence), window in zip(layers, subject.windows, strict=True):
        expected = length if window is None else min(window, length)
        holes = int((influence[length - expected :] == 0).sum()) if _seen(influence) < expected else 0
        beyond = int((influence[: length - expected] > 0).sum())
        seen = expected + beyond - holes
        if beyond or holes:
            likely = ["swa-lost", "swa-off-by-one"] if seen == length else ["swa-off-by-one", "swa-lost"]
            off = seen - expected
            return failed(
                f"a position of {name} sees {seen} of {length} positions where {expected} are declared ({off:+d})",
                float(seen), float(expected), unit="positions",
                bugs=likely, component=_where(subject, name, length, expected), advice=ADVICE,
            )  # fmt: skip
    return None


def _where(subject: Subject, name: str, length: int, expected: int) -> str:
    """The first submodule of the block that sees other positions than the block should."""
    assert subject.module is not None
    block = subject.module.get_submodule(name)
    inner: list[tuple[str, Tensor]] = []
    handles = [
        part.register_forward_hook(lambda _m, _a, out, n=inside: inner.append((n, out)))  # type: ignore[misc]
        for inside, part in block.named_modules()
        if inside
    ]
    try:
        with torch.enable_grad(), leaves([(name, block)]) as seen:
            subject.forward(tokens_for(subject, 1, length))
        for inside, out in inner:
            out = out[0] if isinstance(out, tuple) else out
            if not (
                isinstance(out, Tensor) and out.dim() == 3 and out.shape[1] == length and out.requires_grad
            ):
                continue
            influence = _influence(out[0, -1], seen[name][0])
            if int((influence > 0).sum()) not in (0, 1, expected):
                return described(subject.module, f"{name}.{inside}")
    finally:
        for handle in handles:
            handle.remove()
    return described(subject.module, name)


def _whole(subject: Subject, tokens: Tensor) -> Tensor:
    """[T]: the influence of each token on the last logits."""
    found = embedding_of(subject, tokens)
    made: list[Tensor] = []
    if found is not None:

        def leaf(_m: object, _a: object, output: Tensor) -> Tensor:
            made.append(output.detach().clone().requires_grad_())
            return made[-1].clone()  # what follows may write into it

        handle = found[1].register_forward_hook(leaf)
        try:
            with torch.enable_grad():
                logits = subject.forward(tokens)
        finally:
            handle.remove()
        if logits.requires_grad and float((influence := _influence(logits[0, -1], made[0])).max()) > 0:
            return influence
    with torch.no_grad():
        tokens = tokens[:, -24:]
        before, moved = subject.forward(tokens)[:, -1], []
        for p in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[0, p] = other_token(subject, int(tokens[0, p]))
            moved.append(difference(before, subject.forward(changed)[:, -1]))
    return torch.tensor(moved, dtype=torch.float64)


def _whole_finding(subject: Subject, influence: Tensor, num_layers: int) -> Finding:
    length = len(influence)
    if float(influence.max()) == 0:
        raise NotApplicable("no token influences the last logits: the probe saw nothing")
    windows = subject.windows
    expected = length
    if windows and all(w is not None for w in windows):
        expected = min(length, 1 + sum(w - 1 for w in windows if w is not None))
    seen, num = _seen(influence), int((influence > 0).sum())
    if seen < expected and windows is None and num == seen:
        raise NotApplicable(
            f"the last position sees {seen} tokens of {length}, and no window is declared: whether that is meant is "
            "not known"
        )
    by = f"{num_layers} layers each, and the model" if num_layers and windows else "the model"
    note = f"the last position sees {min(seen, length)} of {length} tokens ({by} as a whole)"
    beyond = int((influence[: length - expected] > 0).sum())
    if seen >= expected and not beyond:
        return passed(note, float(seen), float(expected), unit="positions")
    likely = (
        ["swa-off-by-one", "swa-lost"] if seen < expected or num < length else ["swa-lost", "swa-off-by-one"]
    )
    return failed(
        f"{note}; {expected} are declared", float(num), float(expected), unit="positions",
        bugs=likely, component="attention mask", advice=ADVICE,
    )  # fmt: skip


class _OneMore(specimens.Attention):
    def allowed(self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor) -> Tensor:
        back = places.unsqueeze(2) - key_places.unsqueeze(1)
        assert self.size.window is not None
        return (back >= 0) & (back <= self.size.window)


class _Lost(specimens.Attention):
    def allowed(self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor) -> Tensor:
        return places.unsqueeze(2) >= key_places.unsqueeze(1)


@reach.plant("swa-off-by-one", component="attention", what="<= in place of <")
def _() -> Subject:
    return specimens.subject(attention=_OneMore, size={"window": 8})


@reach.plant(
    "swa-off-by-one", component="attention", what="as a plain function, without a module to look into"
)
def _() -> Subject:
    return specimens.subject(attention=_OneMore, size={"window": 8}).but(module=None)


@reach.plant("swa-lost", component="layers.0.attention")
def _() -> Subject:
    return specimens.subject(attention=_Lost, size={"window": 8})


@reach.plant("swa-lost", component="layers.1.attention", what="in every second layer")
def _() -> Subject:
    subject = specimens.subject(size={"window": 8})
    attention = subject.module.layers[1].attention  # type: ignore[union-attr]
    attention.allowed = _Lost.allowed.__get__(attention)
    return subject


@reach.healthy("local and global layers in turn")
def _() -> Subject:
    subject = specimens.subject(size={"window": 8})
    attention = subject.module.layers[1].attention  # type: ignore[union-attr]
    attention.allowed = _Lost.allowed.__get__(attention)
    return subject.but(windows=(8, None))


@reach.healthy("window of 8, declared")
def _() -> Subject:
    return specimens.subject(size={"window": 8})
