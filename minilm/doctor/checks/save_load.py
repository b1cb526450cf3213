"""What was saved comes back, bit for bit.

Why: a load that ignores keys which do not fit leaves random weights behind and says so in a log line, if at all; a
prefix of a wrapper in the names loses everything; a tie that is cut in loading trains two matrices from then on.

How: weights, norms and lasting buffers are drawn anew, so that nothing is at a value that a fresh model has too; a
forward pass in train mode lets running state move. Then save, load, and compare: names, types, every value, which
tensors are one, which are trainable, and the logits. A tensor that is no parameter or buffer must come back too where
it differs between the two (it is then no mere table).

Cannot see: what a checkpoint of training holds besides the weights (the check `resume`).

Sources: K13 of the catalogue; transformers issues 29903, 35141 and pull request 43429; DeepSpeed issue 5489.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, difference, random_states_kept, redraw_weights, tokens_for
from minilm.doctor.subject import Subject

NARROW_NOISE = 0.2  # of the logits' deviation, where the model computes in 16 bits


@check(group="checkpoint", needs=("module", "save", "load", "vocab_size"), cost="1 save, 1 load, 3 forwards")
def save_load(subject: Subject) -> Finding:
    """The loaded module against the saved one."""
    module = subject.module
    assert module is not None and subject.save is not None and subject.load is not None
    tokens = tokens_for(subject, 2, 12)
    _make_it_unlike_a_fresh_one(subject, module, tokens)
    with tempfile.TemporaryDirectory() as folder:
        subject.save(module, Path(folder))
        with random_states_kept(99):
            loaded = subject.load(Path(folder))
    wrong = _names(module, loaded) or _values(module, loaded) or _ties(module, loaded)
    wrong = wrong or _logits(module, loaded, tokens)
    if isinstance(wrong, Finding):
        return wrong
    count = len(module.state_dict())
    return passed(
        f"{count} tensors with types and ties came back bit for bit, and with them the logits",
        0.0,
        0.0,
        unit="tensors",
    )


def _make_it_unlike_a_fresh_one(subject: Subject, module: nn.Module, tokens: Tensor) -> None:
    redraw_weights(module, 0.1, seed=5)
    generator = torch.Generator().manual_seed(6)
    lasting = set(module.state_dict().keys())
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            vector = tensor.dim() < 2 or not isinstance(tensor, nn.Parameter)
            if vector and tensor.is_floating_point() and name in lasting:
                noise = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
                tensor.add_(0.1 * noise)
        if subject.forward is not None:
            module.train()
            subject.forward(tokens)  # running state, if there is any


def _failed(text: str, bugs: list[str], component: str, advice: str, measured: float = 1.0) -> Finding:
    return failed(text, measured, 0.0, unit="tensors", bugs=bugs, component=component, advice=advice)


def _names(module: nn.Module, loaded: nn.Module) -> Finding | None:
    own, other = module.state_dict(), loaded.state_dict()
    gone, new = [n for n in own if n not in other], [n for n in other if n not in own]
    if gone or new:
        return _failed(
            f"names differ: {gone[:3]} are gone, {new[:3]} are new",
            ["ckpt-wrapped-prefix", "strict-false"],
            "checkpoint: names of tensors",
            "save the module without its wrapper",
            len(gone) + len(new),
        )
    shapes = [n for n in own if own[n].shape != other[n].shape]
    if shapes:
        return _failed(
            f"{shapes[0]} has shape {list(other[shapes[0]].shape)}, was {list(own[shapes[0]].shape)}",
            ["ckpt-corrupt"],
            f"checkpoint: {shapes[0]}",
            "save each tensor as it is",
            len(shapes),
        )
    return None


def _values(module: nn.Module, loaded: nn.Module) -> Finding | None:
    own = module.state_dict()
    other = {name: value.to(own[name].device) for name, value in loaded.state_dict().items()}
    types = [n for n in own if own[n].dtype != other[n].dtype]
    other = {name: value.to(own[name].dtype) for name, value in other.items()}
    unlike = [n for n in own if not torch.equal(own[n], other[n])]
    if not unlike and not types:
        return None
    text = f"{len(unlike)} of {len(own)} tensors came back with other values: {', '.join(unlike[:4])}"
    bugs, name, why, advice = _cause(module, own, other, unlike, types)
    return _failed(f"{text}: {why}", bugs, f"checkpoint: {name}", advice, len(unlike or types))


def _cause(
    module: nn.Module, own: dict[str, Tensor], other: dict[str, Tensor], unlike: list[str], types: list[str]
) -> tuple[list[str], str, str, str]:
    """(bugs, tensor, what it is, advice)."""
    if not unlike:
        return ["ckpt-dtype-change"], f"type of {types[0]}", "another type", "load in the type that was saved"
    for kind in (torch.float16, torch.bfloat16):
        if all(torch.equal(own[n].to(kind).to(own[n].dtype), other[n]) for n in unlike):
            return (
                ["ckpt-dtype-change"],
                f"type of {unlike[0]}",
                f"rounded to {kind}",
                "save in the type of training",
            )
    if len(unlike) == len(own):
        bugs = ["ckpt-wrapped-prefix", "strict-false", "init-overwrites-loaded"]
        return bugs, unlike[0], "nothing was loaded", "load with strict=True, without a wrapper's prefix"
    named = dict(module.named_parameters())
    if all(not bool(other[n][own[n] != other[n]].any()) for n in unlike):
        bugs = ["init-overwrites-loaded", "strict-false"]
        return (
            bugs,
            unlike[0],
            "what differs is zero now",
            "do not initialise (a padding row, for one) after loading",
        )
    strange = [n for n in unlike if float((own[n] == other[n]).float().mean()) > 0.05]
    strange += [
        n for n in unlike if any(own[n].shape == t.shape and torch.equal(other[n], t) for t in own.values())
    ]
    if strange:
        bugs = ["ckpt-corrupt", "tie-lost-on-load"]
        return (
            bugs,
            strange[0],
            f"{strange[0]} holds a part of another",
            "save copies, not views of one storage",
        )
    if all(n in named and not named[n].requires_grad for n in unlike):
        bugs = ["ckpt-incomplete-frozen", "strict-false"]
        return bugs, unlike[0], "those that are not trained", "save all parameters, frozen ones too"
    if all(n not in named for n in unlike):
        return ["mem-reset-not-saved", "strict-false"], unlike[0], "buffers", "save buffers too"
    bugs = ["strict-false", "init-overwrites-loaded", "ckpt-incomplete-frozen"]
    return (
        bugs,
        unlike[0],
        "they are not what was saved",
        "load with strict=True, and initialise before loading",
    )


def _shared(module: nn.Module) -> set[frozenset[str]]:
    places: dict[int, set[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        places.setdefault(p.data_ptr(), set()).add(name)
    return {frozenset(names) for names in places.values() if len(names) > 1}


def _ties(module: nn.Module, loaded: nn.Module) -> Finding | None:
    lost = _shared(module) - _shared(loaded)
    if not lost:
        return None
    names = " and ".join(sorted(next(iter(lost))))
    return _failed(
        f"{names} were one tensor and are two",
        ["tie-lost-on-load"],
        f"checkpoint: tie of {names}",
        "tie again after loading",
        len(lost),
    )


def _logits(module: nn.Module, loaded: nn.Module, tokens: Tensor) -> Finding | None:
    module.eval()
    loaded.eval()
    device = next(module.parameters()).device
    with torch.no_grad():
        before = [t for t in _tensors(module(tokens.to(device))) if t.is_floating_point()]
        after = [t for t in _tensors(loaded.to(device)(tokens.to(device))) if t.is_floating_point()]
    if not before:
        raise NotApplicable("its module cannot be called with tokens alone, so the logits cannot be compared")
    # The tensors are the same bits by now; a kernel may still add up in another order for another place in memory.
    limit = FLOAT32_NOISE if before[0].dtype == torch.float32 else NARROW_NOISE
    if difference(before[0], after[0]) <= limit:
        return None
    place = _hidden_state(module, loaded) or "state outside of state_dict"
    gap = float((before[0] - after[0]).abs().max())
    text = f"all tensors came back, and the logits differ by {gap:.2g}"
    return _failed(
        f"{text}: {place}",
        ["mem-reset-not-saved", "ckpt-corrupt"],
        f"checkpoint: {place}",
        "make it a parameter or a lasting buffer",
        gap,
    )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in _tensors(part)]
    return [
        t for part in (vars(output) if hasattr(output, "__dict__") else {}).values() for t in _tensors(part)
    ]


def _hidden_state(module: nn.Module, loaded: nn.Module) -> str:
    """The first plain tensor, or buffer that is not saved, that differs."""
    others = dict(loaded.named_modules())
    for name, part in module.named_modules():
        twin = others.get(name)
        for key, value in [*vars(part).items(), *part.named_buffers(recurse=False)]:
            same = getattr(twin, key, None)
            if isinstance(value, Tensor) and isinstance(same, Tensor) and not torch.equal(value, same):
                return f"{name}.{key}"
    return ""


def _with_files(change: Any, then: Any = None, **parts: Any) -> Subject:
    """change(state) before it is loaded, without looking at what does not fit; then(module) afterwards."""
    subject = specimens.subject(**parts)

    def load(folder: Path) -> nn.Module:
        assert subject.build is not None
        fresh = subject.build(1).module
        assert fresh is not None
        fresh.load_state_dict(change(torch.load(folder / "weights.pt", weights_only=True)), strict=False)
        if then is not None:
            then(fresh)
        return fresh

    return subject.but(load=load)


@save_load.plant("strict-false", component="ffn.gate", what="a part was renamed since")
def _() -> Subject:
    return _with_files(
        lambda state: {n.replace("layers.1.ffn.gate", "layers.1.mlp.gate"): t for n, t in state.items()}
    )


@save_load.plant("ckpt-wrapped-prefix", component="checkpoint")
def _() -> Subject:
    return _with_files(lambda state: {f"_orig_mod.{n}": t for n, t in state.items()})


@save_load.plant("ckpt-incomplete-frozen", component="embedding")
def _() -> Subject:
    class Frozen(specimens.Model):
        def initialise(self) -> None:
            super().initialise()
            self.embedding.weight.requires_grad_(False)

    return _with_files(
        lambda state: {n: t for n, t in state.items() if n != "embedding.weight"}, model=Frozen
    )


@save_load.plant("ckpt-corrupt", component="checkpoint", what="views of one storage")
def _() -> Subject:
    def one_storage(state: dict[str, Tensor]) -> dict[str, Tensor]:
        longest = max(state.values(), key=lambda t: t.numel())
        same = {n: longest.flatten()[: t.numel()].view(t.shape) for n, t in state.items() if "norm" not in n}
        return {**state, **same}

    return _with_files(one_storage)


@save_load.plant("ckpt-dtype-change", component="type")
def _() -> Subject:
    return _with_files(lambda state: {n: t.half() for n, t in state.items()})


@save_load.plant("init-overwrites-loaded", component="head")
def _() -> Subject:
    return _with_files(lambda state: state, lambda module: nn.init.normal_(module.head.weight, std=0.02))


@save_load.plant(
    "init-overwrites-loaded", component="embedding", what="the row of the padding is set to zero"
)
def _() -> Subject:
    def clear(module: Any) -> None:
        with torch.no_grad():
            module.embedding.weight[0].zero_()

    return _with_files(lambda state: state, clear)


@save_load.plant("tie-lost-on-load", component="tie")
def _() -> Subject:
    def cut(module: Any) -> None:
        module.head.weight = nn.Parameter(module.head.weight.detach().clone())

    return _with_files(lambda state: state, cut, size={"tied": True})


@save_load.plant("mem-reset-not-saved", component="entries")
def _() -> Subject:
    class Memory(specimens.FeedForward):
        def __init__(self, size: Any) -> None:
            super().__init__(size)
            self.entries = torch.randn(8, size.dim)  # no buffer: not in state_dict

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x @ self.entries.t()).softmax(-1) @ self.entries

    return specimens.subject(ffn=Memory)


@save_load.healthy("tied")
def _() -> Subject:
    return specimens.subject(size={"tied": True})


@save_load.healthy("weights in bfloat16, a frozen embedding")
def _() -> Subject:
    class Narrow(specimens.Model):
        def initialise(self) -> None:
            super().initialise()
            self.embedding.weight.requires_grad_(False)
            self.bfloat16()

    return specimens.subject(model=Narrow)
