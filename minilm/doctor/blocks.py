"""The blocks of a model, found from outside: where they are, what goes in, what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilm.doctor.subject import Subject


def blocks(module: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """(name, block) of the layers that a decoder is a stack of: the outermost list of modules with most parameters."""
    if module is None:
        return []
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    outermost = [
        (name, part)
        for name, part in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists if other)
    ]
    if not outermost:
        return []
    name, found = max(outermost, key=lambda one: sum(p.numel() for p in one[1].parameters()))
    return [(f"{name}.{number}" if name else str(number), block) for number, block in enumerate(found)]


def stream(values: Any) -> Tensor | None:
    """The first floating tensor with three dimensions [B, T, D] among arguments or results."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() and values.dim() == 3 else None
    if isinstance(values, Mapping):
        values = list(values.values())
    elif not isinstance(values, Sequence) and hasattr(values, "__dict__"):
        values = list(vars(values).values())
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    return next((found for found in map(stream, values) if found is not None), None)


def replaced(values: Any, old: Tensor, new: Tensor) -> Any:
    """`values` (a tensor, tuple, list or dict of arguments) with one tensor in another's place."""
    if values is old:
        return new
    if isinstance(values, dict):
        return {key: replaced(value, old, new) for key, value in values.items()}
    if isinstance(values, list | tuple) and type(values) in (list, tuple):
        return type(values)(replaced(value, old, new) for value in values)
    return values


@contextlib.contextmanager
def leaves(parts: Sequence[tuple[str, nn.Module]]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What goes into and comes out of each part while inside, as name -> (input, output), with a fresh leaf as each
    input: the gradient of an output then ends at its own part."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    given: dict[str, Tensor] = {}
    handles = []
    for name, part in parts:

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
            old = stream(args)
            old = stream(kwargs) if old is None else old
            if old is None:
                return None
            given[name] = old.detach().clone().requires_grad_()
            new = given[name].clone()  # a block may write into what it is given
            return replaced(args, old, new), replaced(kwargs, old, new)

        def after(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            made = stream(output)
            if made is not None and name in given and name not in seen:
                seen[name] = (given[name], made)

        handles += [
            part.register_forward_pre_hook(before, with_kwargs=True),
            part.register_forward_hook(after),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def embedding_of(subject: Subject, tokens: Tensor) -> tuple[str, nn.Module] | None:
    """The submodule that turns `tokens` into vectors; None if there is none that can be seen."""
    found: list[tuple[str, nn.Module]] = []
    if subject.module is None or subject.forward is None:
        return None

    def look(name: str, part: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            is_it = bool(args) and isinstance(args[0], Tensor) and torch.equal(args[0], tokens)
            if is_it and isinstance(output, Tensor) and output.shape[: tokens.dim()] == tokens.shape:
                found.append((name, part))

        return part.register_forward_hook(hook)

    embeddings = [(n, m) for n, m in subject.module.named_modules() if isinstance(m, nn.Embedding)]
    handles = [look(name, part) for name, part in embeddings]
    try:
        with torch.no_grad():
            subject.forward(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if len(found) == 1 else None
