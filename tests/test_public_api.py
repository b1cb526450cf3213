"""The public names and their signatures are a promise: a change of them is seen, and made on purpose.

Public is what the reference documents (docs/reference): the names that its modules define or list in `__all__`.

    python tests/test_public_api.py        write tests/public_api.txt anew
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import minilm

HERE = Path(__file__).parent
FROZEN = HERE / "public_api.txt"
REFERENCE = HERE.parent / "docs" / "reference"


def documented() -> list[str]:
    """The modules that the reference has a section of."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md")))
    return sorted(re.findall(r"^::: (\S+)", pages, re.M))


def names_of(module: ModuleType) -> list[str]:
    """Public names: `__all__`, or what is defined in the module itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    defined = (
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    )
    return sorted(name for name in defined if not name.startswith("_"))


def listing() -> str:
    """One line a name: `module.name(signature)`, and for classes one for each method and property."""
    lines = [f"minilm.{name}" for name in sorted(minilm.__all__)]
    for module_name in documented():
        module = importlib.import_module(module_name)
        for name in names_of(module):
            lines += described(f"{module_name}.{name}", getattr(module, name))
    return "\n".join(lines) + "\n"


def described(path: str, value: object) -> Iterator[str]:
    if not callable(value) or typing.get_origin(value) is not None:
        yield f"{path}: {'module' if inspect.ismodule(value) else 'value'}"
        return
    yield path + _signature(value)
    if not inspect.isclass(value):
        return
    for name, member in sorted(vars(value).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"{path}.{name}: property"
        elif inspect.isfunction(inspect.unwrap(getattr(member, "__func__", member))):
            yield f"{path}.{name}{_signature(getattr(member, '__func__', member))}"


class Bare(str):
    """An annotation as it is written: `Tensor`, not `'Tensor'`."""

    def __repr__(self) -> str:
        return str(self)


def _signature(value: object) -> str:
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except ValueError:  # built-in exceptions have none
        return "(...)"
    parameters = [p.replace(annotation=_bare(p.annotation)) for p in signature.parameters.values()]
    whole = signature.replace(parameters=parameters, return_annotation=_bare(signature.return_annotation))
    return re.sub(r" at 0x[0-9a-f]+", "", str(whole))  # defaults without a name of their own


def _bare(annotation: Any) -> Any:
    """Of a setting its type alone: ranges and help may be improved without a decision."""
    if not isinstance(annotation, str):
        return annotation
    if annotation.startswith("Annotated["):
        annotation = ast.unparse(ast.parse(annotation, mode="eval").body.slice.elts[0])  # type: ignore[attr-defined]
    return Bare(annotation)


def difference(frozen: str, now: str) -> str:
    lines = difflib.unified_diff(
        frozen.splitlines(), now.splitlines(), "public_api.txt", "now", lineterm="", n=0
    )
    return "\n".join(lines)


def test_the_public_names_and_signatures_are_those_that_were_decided() -> None:
    changed = difference(FROZEN.read_text(encoding="utf-8"), listing())
    assert not changed, (
        f"{changed}\n\nThe public API changed. If that is meant: python tests/test_public_api.py, and a line in "
        "CHANGELOG.md."
    )


def test_a_renamed_argument_is_a_difference() -> None:
    frozen = FROZEN.read_text(encoding="utf-8")
    line = next(line for line in frozen.splitlines() if line.startswith("minilm.alignment.align("))
    assert "segments" in line
    seen = difference(frozen, frozen.replace(line, line.replace("segments", "parts")))
    assert f"-{line}" in seen and "parts" in seen


def test_every_public_name_of_the_package_exists_and_is_documented() -> None:
    modules = {name.split(".")[1] for name in documented()}
    for name in minilm.__all__:
        value = getattr(minilm, name)
        home = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
        if home is not None:
            assert home.split(".")[1] in modules, (
                f"{name} is public, and docs/reference says nothing of {home}"
            )


def test_every_public_function_is_typed() -> None:
    bare = []
    for module_name in documented():
        module = importlib.import_module(module_name)
        for name in names_of(module):
            value = getattr(module, name)
            if inspect.isfunction(value):
                parameters = inspect.signature(value).parameters.values()
                untyped = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
                if untyped or "return" not in value.__annotations__:
                    bare.append(f"{module_name}.{name} {untyped}")
    assert not bare


if __name__ == "__main__":
    FROZEN.write_text(listing(), encoding="utf-8")
    print(f"wrote {FROZEN}")
