"""Built-in corpora: what every Python has on its disk, so that the whole path runs without a network.

builtin:python-docs    documentation: for each module its docstrings, as `module.function(arguments)` and the text
                       below, and the chapters of the language reference that `help()` shows
builtin:python-source  the source text of the modules, without their docstrings
builtin:python         both

The source text comes without docstrings so that no text is in two documents: else a docstring held out in one
could be learnt from the other. Files are parsed, never imported. Tests, generated tables and build settings (which
name folders of the machine) are left out. For Python 3.11: 2.7 MB of documentation in 540 documents, 7.7 MB of
source in 570.
"""

from __future__ import annotations

import ast
import inspect
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from minilm.data.documents import Position
from minilm.errors import DataError

PARTS = ("python", "python-docs", "python-source")

_FOLDERS_LEFT_OUT = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "__phello__", "ensurepip",
    "encodings",  # tables of characters
}  # fmt: skip
_NAMES_LEFT_OUT = ("_sysconfigdata", "test_", "__hello__")
_TOPICS = Path("pydoc_data/topics.py")
_TABLES = {
    _TOPICS,
    Path("html/entities.py"),
    Path("msilib/schema.py"),
    Path("msilib/sequence.py"),
    Path("stringprep.py"),
}
_SHORTEST_DOCUMENT = 200  # characters; a shorter module or chapter says too little to be a document


def standard_library() -> Path:
    """The folder of the standard library of the running Python. Raises DataError where it is not one of files."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "os.py").is_file():
        raise DataError(
            f"The standard library is not in {folder} as files: builtin:python cannot be used with this Python."
        )
    return folder


def library_files() -> list[Path]:
    """The files read, in a fixed order."""
    root = standard_library()
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [f for f in inner if f not in _FOLDERS_LEFT_OUT and not f.startswith("config-")]
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith(_NAMES_LEFT_OUT)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def python_documents(part: str, position: Position | None = None) -> Iterator[tuple[str, str]]:
    """(text, where) of each document. Docstrings that occur twice (inherited, copied) are given once."""
    position = position or Position()
    root, seen = standard_library(), set()
    for path in library_files():
        inside = path.relative_to(root)
        position.done_bytes += path.stat().st_size
        try:
            source = path.read_text("utf-8").replace("\f", "")  # form feeds part pages of old files
            with warnings.catch_warnings():  # of the code that is read: invalid escapes and the like
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # files for other Python versions and encodings (lib2to3)
        if inside == _TOPICS:
            if part != "python-source":
                yield from _topics(tree, inside)
            continue
        module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
        if part != "python-source":
            text = "\n\n".join(_docs(tree, module, seen))
            if len(text) >= _SHORTEST_DOCUMENT:
                yield text + "\n", f"{inside} (documentation)"
        if part != "python-docs" and inside not in _TABLES:
            text = _without_docstrings(source, tree)
            if len(text) >= _SHORTEST_DOCUMENT:
                yield text, f"{inside} (source)"


def _docs(tree: ast.Module, module: str, seen: set[str]) -> Iterator[str]:
    """A heading and the docstring below it, for the module and everything in it, in the order of the file."""
    if (text := ast.get_docstring(tree)) and text not in seen:
        seen.add(text)
        yield f"{module}\n\n{textwrap.indent(text, '    ', _written)}"
    for node, name in _definitions(tree, module):
        if (text := ast.get_docstring(node)) and text not in seen:
            seen.add(text)
            heading = f"class {name}" if isinstance(node, ast.ClassDef) else f"{name}({_arguments(node)})"
            yield f"{heading}\n\n{textwrap.indent(text, '    ', _written)}"


def _written(line: str) -> bool:
    return bool(line.strip())


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[_Definition, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield child, f"{name}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, name)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements below a node. `ast.walk` would visit every expression too, which takes four times as long."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, field, ()):
            yield child
            yield from _statements(child)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = ast.unparse(node.args)
    for first in ("self", "cls"):
        text = text.removeprefix(f"{first}, ") if text != first else ""
    return text


def _topics(tree: ast.Module, inside: Path) -> Iterator[tuple[str, str]]:
    """The chapters of the language reference: a dictionary of texts in pydoc_data/topics.py."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and isinstance(value, ast.Constant)
                    and isinstance(value.value, str)
                ):
                    text = inspect.cleandoc(value.value)
                    if len(text) >= _SHORTEST_DOCUMENT:
                        yield text + "\n", f"{inside} ({key.value})"


def _without_docstrings(source: str, tree: ast.Module) -> str:
    """The source with each docstring cut out, and `...` in its place where nothing else would be left."""
    lines = source.splitlines(keepends=True)
    for node in [tree, *(n for n in _statements(tree) if isinstance(n, _Definition))]:
        if ast.get_docstring(node, clean=False) is None:
            continue
        doc = node.body[0]
        first, last = doc.lineno - 1, (doc.end_lineno or doc.lineno) - 1
        head = lines[first].encode()[: doc.col_offset].decode()
        tail = lines[last].encode()[doc.end_col_offset :].decode()
        only = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first : last + 1] = [""] * (last - first + 1)  # line numbers of the others stay
        lines[last] = (
            f"{head}...{tail}" if only else f"{head}{tail.lstrip('; ')}" if (head + tail).strip() else ""
        )
    return "".join(lines).strip() + "\n"
