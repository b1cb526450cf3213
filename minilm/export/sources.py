"""The source files that a model consists of, as flat files that need nothing of minilm.

Found by following imports from the file of the model; each is copied as it is, but for its imports: those of
minilm become relative, pydantic and the registry are replaced by stand-ins of a few lines, a package that not
everybody has (flash-attn) is imported in a way that transformers does not take for a requirement.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minilm.errors import ConfigError, listed

REMOTE = "minilm.export.remote"
VARIANT = f"{REMOTE}.variant"
STAND_INS = {"pydantic": f"{REMOTE}.fields", "minilm.models": f"{REMOTE}.registry"}
# What everybody has who has transformers with torch.
ALWAYS_THERE = {*sys.stdlib_module_names, "torch", "transformers", "safetensors", "numpy"}


def collect(config_class: type) -> dict[str, str]:
    """File name -> text of everything that the model of a config class needs, modeling_minilm.py included.

    Raises ConfigError naming every import that cannot be taken along.
    """
    found = _Collected()
    variant = (
        f'"""Names the config class of this model."""\n\n'
        f"from {config_class.__module__} import {config_class.__qualname__} as VariantConfig\n\n"
        f'__all__ = ["VariantConfig"]\n'
    )
    found.visit(f"{REMOTE}.modeling_minilm", variant)
    if found.problems:
        raise ConfigError(
            f"{config_class.__name__} cannot be exported with its code: {listed(found.problems)}"
        )
    return found.with_all_named()


def file_name(module: str) -> str:
    """minilm.models.moe -> moe.py, minilm.knowledge.store -> knowledge_store.py, minilm.errors -> errors.py."""
    for prefix in (f"{REMOTE}.", "minilm.models.", "minilm."):
        if module.startswith(prefix):
            return module.removeprefix(prefix).replace(".", "_") + ".py"
    raise ConfigError(
        f"{module} is not a part of minilm: put the file of the model into minilm/models to export it."
    )


@dataclass
class _Collected:
    files: dict[str, str] = field(default_factory=dict)  # file name -> text
    owners: dict[str, str] = field(default_factory=dict)  # file name -> module
    unseen: set[str] = field(
        default_factory=set
    )  # imported as `from . import x`, which transformers overlooks
    problems: list[str] = field(default_factory=list)

    def visit(self, start: str, variant: str) -> None:
        """Take `start` and everything that it needs; `variant` is the text of the file that names the model."""
        waiting = [start]
        while waiting:
            module = waiting.pop()
            name = file_name(module)
            owner = self.owners.setdefault(name, module)
            if owner != module:
                self.problems.append(f"{module} and {owner} would both be {name}")
            if owner != module or name in self.files:
                continue
            text, is_package = (variant, False) if module == VARIANT else _source(module)
            rewriting = _Rewriting(module, is_package, text)
            self.files[name] = rewriting.text()
            self.problems += rewriting.problems
            self.unseen |= rewriting.unseen
            waiting += rewriting.needed

    def with_all_named(self) -> dict[str, str]:
        """transformers copies the files that it sees in `from .x import`: the others are named so in one place."""
        named = "".join(f"from .{stem} import __name__ as _{stem}\n" for stem in sorted(self.unseen))
        name = file_name(VARIANT)
        return {**self.files, name: self.files[name].replace("\n\nfrom", f"\n\n{named}from", 1)}


def _source(module: str) -> tuple[str, bool]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"The source of {module} cannot be found, so a model that needs it cannot be exported."
        )
    return Path(spec.origin).read_text(encoding="utf-8"), spec.submodule_search_locations is not None


class _Rewriting:
    """One file: its text with other imports, and what those need."""

    def __init__(self, module: str, is_package: bool, text: str) -> None:
        self.module, self.given = module, text
        self.package = module if is_package else module.rpartition(".")[0]
        self.needed: list[str] = []
        self.unseen: set[str] = set()
        self.problems: list[str] = []

    def text(self) -> str:
        """The file as it will be in the folder."""
        lines = self.given.splitlines(keepends=True)
        replaced = [(node, self._instead(node, inside)) for node, inside in _imports(ast.parse(self.given))]
        for node, instead in sorted(replaced, key=lambda pair: -pair[0].lineno):
            if instead is not None:
                indent = " " * node.col_offset
                lines[node.lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in instead]
        made = "".join(lines)
        ast.parse(made)  # ours to get right: a file that does not parse must not leave the house
        return made

    def _instead(self, node: ast.stmt, inside: bool) -> list[str] | None:
        """Lines in place of an import; None leaves it."""
        if isinstance(node, ast.If):  # for type checkers only
            return []
        if isinstance(node, ast.Import):
            return self._plain(node, inside)
        assert isinstance(node, ast.ImportFrom)
        source = node.module or ""
        if node.level:
            base = self.package.split(".")
            source = ".".join([*base[: len(base) - node.level + 1], *([source] if source else [])])
        if source.partition(".")[0] == "minilm" or source in STAND_INS:
            return self._own(node, source)
        return self._foreign(node, source.partition(".")[0], inside)

    def _own(self, node: ast.ImportFrom, source: str) -> list[str]:
        lines, names = [], []
        for alias in node.names:
            written = alias.name + (f" as {alias.asname}" if alias.asname else "")
            part = f"{source}.{alias.name}"
            if source.startswith("minilm") and _is_module(part):
                stem = self._take(part)
                self.unseen.add(stem)
                lines.append(f"from . import {stem} as {alias.asname or alias.name}")
            else:
                names.append((alias.name, written))
        if names:
            target = STAND_INS.get(source, source)
            if target != source:
                offered = vars(importlib.import_module(target))
                self.problems += [
                    f"{self.module}, line {node.lineno}: {name} of {source} is not there in an exported folder"
                    for name, _ in names
                    if name not in offered
                ]
            lines.append(f"from .{self._take(target)} import {', '.join(text for _, text in names)}")
        return lines

    def _take(self, module: str) -> str:
        self.needed.append(module)
        return file_name(module).removesuffix(".py")

    def _plain(self, node: ast.Import, inside: bool) -> list[str] | None:
        tops = {alias.name.partition(".")[0] for alias in node.names}
        if tops & {"minilm", *STAND_INS}:
            self.problems.append(
                f"{self.module}, line {node.lineno}: `{ast.unparse(node)}`; write `from ... import ...`"
            )
            return None
        return next((lines for top in tops if (lines := self._foreign(node, top, inside))), None)

    def _foreign(self, node: ast.Import | ast.ImportFrom, top: str, inside: bool) -> list[str] | None:
        if top in ALWAYS_THERE:
            return None
        if not inside:
            self.problems.append(
                f"{self.module}, line {node.lineno}: it needs the package {top}, which not every user of "
                "transformers has; import it in the function that uses it"
            )
        # Inside of `try`, transformers does not take it for something that must be installed.
        return ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"]


def _imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, bool]]:
    """(import statement, is it inside of a function); a block `if TYPE_CHECKING:` counts as one statement."""
    waiting: list[tuple[ast.AST, bool]] = [(tree, False)]
    while waiting:
        parent, inside = waiting.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.Import | ast.ImportFrom) or _for_type_checkers(node):
                yield node, inside  # type: ignore[misc]
            else:
                deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                waiting.append((node, deeper))


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, so it is a name in it
        return False
