"""Rules of the house that a reader of one file cannot see, read from the source text of all files.

Each rule is a function from a `File` to the places that break it; `test_policy.py` proves that each can fire.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = ("train.py", "eval.py")

Place = tuple[int, str]  # line, what is wrong there


@dataclass(frozen=True)
class File:
    """A Python file by its path from the root of the repository."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def in_package(self) -> bool:
        return self.path.startswith("minilm/")

    @property
    def product(self) -> bool:
        """Part of what users run, as opposed to tests and benchmarks."""
        return self.in_package or self.path in ENTRY_POINTS

    @property
    def room(self) -> str:
        """`training` for minilm/training/step.py, `errors` for minilm/errors.py, `train` for train.py."""
        parts = Path(self.path).with_suffix("").parts
        return parts[1] if self.in_package else parts[0]


def files() -> list[File]:
    found = [ROOT / name for name in ENTRY_POINTS if (ROOT / name).is_file()]
    for folder in ("minilm", "tests", "benchmarks"):
        found += sorted((ROOT / folder).rglob("*.py"))
    return [File(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in found]


# ---------------------------------------------------------------- imports go down only

FLOORS = {
    "errors": 0,
    "onednn": 0,
    "alignment": 1,
    "ranking": 1,
    "config": 1,
    "processes": 1,
    "data": 2,
    "knowledge": 2,
    "models": 2,
    "training": 3,
    "evaluation": 3,
    "track": 3,
    "manifest": 3,
    "doctor": 4,
    "experiments": 4,
    # entry points and what puts the parts together for them
    **dict.fromkeys(
        (
            "run",
            "books",
            "preview",
            "examination",
            "assessment",
            "opening",
            "agreement",
            "checked",
            "initial",
            "effect",
            "start",
            "launch",
            "sweeping",
            "export",
            "cli",
            "__main__",
            "__init__",
            "train",
            "eval",
        ),
        5,
    ),
}
STRANGERS = {  # rooms that may not know each other although their floors would allow it
    frozenset({"alignment", "config"}),
    frozenset({"models", "data"}),
    frozenset({"models", "alignment"}),
    frozenset({"training", "evaluation"}),
}


def imported_rooms(file: File) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of a part of minilm or of an entry point, wherever it stands."""
    for line, name in _imported_names(file):
        room, *rest = name.split(".")
        if room == "minilm" and rest and not rest[0].startswith("__version"):
            yield line, rest[0]
        elif name in ("train", "eval"):
            yield line, name


def _imported_names(file: File) -> Iterator[tuple[int, str]]:
    """(line, dotted name of the module) of every import; of `from minilm import x` it is minilm.x."""
    package = Path(file.path).with_suffix("").parts[:-1]
    for node in ast.walk(file.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            packages = ("minilm", "minilm.knowledge")
            names = [f"{module}.{a.name}" for a in node.names] if module in packages else [module]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            first = node.args[0]
            names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        for name in names:
            yield node.lineno, name


def imports_go_down_only(file: File) -> Iterator[Place]:
    """errors < alignment, config < data, models < training, evaluation, track, manifest < doctor < entry points."""
    if not file.product:
        return
    if file.room not in FLOORS:
        yield 1, f"minilm/{file.room} has no floor: add it to FLOORS"
        return
    for line, room in imported_rooms(file):
        if room == file.room:
            continue
        if room not in FLOORS:
            yield line, f"imports {room}, which has no floor"
        elif FLOORS[room] > FLOORS[file.room]:
            yield line, f"{file.room} imports {room}, which stands above it"
        elif frozenset({room, file.room}) in STRANGERS:
            yield line, f"{file.room} imports {room}: they do not know each other"


READING_SIDE = {f"minilm.knowledge.{name}" for name in ("store", "codes", "layout")}


def models_read_a_store_without_the_data(file: File) -> Iterator[Place]:
    """models and data do not know each other, so what models import of the knowledge store may not know data."""
    module = file.path.removesuffix(".py").replace("/", ".")
    if module in READING_SIDE:
        allowed, reader = READING_SIDE | {"minilm.errors"}, "the reading side of the store"
    elif file.path.startswith("minilm/models/"):
        allowed, reader = READING_SIDE, "models"
    else:
        return
    for line, name in _imported_names(file):
        inside = name.startswith("minilm." if module in READING_SIDE else "minilm.knowledge")
        if inside and not any(f"{name}.".startswith(f"{one}.") for one in allowed):
            yield line, f"{reader} imports {name}"


# ---------------------------------------------------------------- one alignment layer

SHIFTED = {"ids", "labels", "label", "targets", "logits", "tokens", "inputs", "learn", "weights"}
LOSSES = {"loss", "losses", "nll", "nlls", "nats"}
LOSS_FUNCTIONS = {"cross_entropy", "nll_loss", "CrossEntropyLoss", "NLLLoss", "ForCausalLMLoss"}
MEANS = {"mean", "nanmean", "fmean", "average"}

DOCTORED = "minilm/doctor/"

# file -> passage of its line -> why it is right there. Keep it short: each entry is a second place that shifts.
ALLOWED: dict[str, dict[str, str]] = {
    "minilm/data/synthetic.py": {
        "state, following = tokens[:-1], tokens[1:]": "the probability that a Markov chain gives to its own "
        "document: the truth that a loss is held against, so it may not come from the alignment layer",
    },
}


def losses_are_made_in_alignment_only(file: File) -> Iterator[Place]:
    """Nobody else shifts, masks or averages: a second place would have to agree with the first about positions."""
    if not file.product or file.path == "minilm/alignment.py":
        return
    if file.path.startswith(
        DOCTORED
    ):  # restates losses on its own, and plants the bugs that others may not have
        return
    lines = file.text.splitlines()
    for line, problem in _shifts_and_means(file.tree):
        if not any(passage in lines[line - 1] for passage in ALLOWED.get(file.path, {})):
            yield line, problem


def _shifts_and_means(tree: ast.Module) -> Iterator[Place]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Subscript)
            and _words(node.value) & SHIFTED
            and any(map(_shifts, _cuts(node.slice)))
        ):
            yield node.lineno, f"a shift: {ast.unparse(node)}"
        elif isinstance(node, (ast.Name, ast.Attribute, ast.alias)) and _last_name(node) in LOSS_FUNCTIONS:
            yield node.lineno, f"a loss of its own: {ast.unparse(node)}"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and _is_sum_of_losses(node.left):
            yield node.lineno, f"a mean of losses: {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            yield from _suspicious_call(node)


def _suspicious_call(node: ast.Call) -> Iterator[Place]:
    called = _called(node)
    if called == "roll" or (called == "narrow" and _words(node) & SHIFTED):
        yield node.lineno, f"a shift: {ast.unparse(node)}"
    if any(keyword.arg == "labels" for keyword in node.keywords):
        yield node.lineno, f"labels given to somebody who shifts and averages them: {ast.unparse(node)}"
    if called in MEANS and any(_words(part) & LOSSES for part in _subjects(node)):
        yield node.lineno, f"a mean of losses: {ast.unparse(node)}"


def _called(node: ast.Call) -> str:
    """`roll` for torch.roll(x) and x.roll(1)."""
    return _last_name(node.func)


def _last_name(node: ast.expr | ast.alias) -> str:
    names = (getattr(node, field, "") for field in ("id", "attr", "name"))  # of Name, Attribute, alias
    return next((name for name in names if isinstance(name, str) and name), "")


def _subjects(node: ast.Call) -> list[ast.expr]:
    """What a function is applied to: x of x.mean(), and of torch.mean(x)."""
    owner = [node.func.value] if isinstance(node.func, ast.Attribute) else []
    return [*owner, *node.args[:1]]


def _words(node: ast.expr) -> set[str]:
    """The words of the name of a value: {input, ids} for `self.input_ids`, `input_ids[0].long()`, `f(input_ids)`.

    Attributes that are not called end the search: `logits.shape` is not logits.
    """
    if isinstance(node, ast.Subscript):
        return _words(node.value)
    if isinstance(node, ast.Call):
        return set(_last_name(node.func).split("_")).union(*map(_words, _subjects(node)))
    if isinstance(node, (ast.BinOp, ast.UnaryOp)):
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return set().union(*map(_words, parts))
    return set(_last_name(node).lower().split("_"))


def _cuts(index: ast.expr) -> list[ast.expr]:
    return index.elts if isinstance(index, ast.Tuple) else [index]


def _shifts(cut: ast.expr) -> bool:
    """`1:`, `1:n`, `:-1`, `0:-1`; but not `:1`, `-1:`, `:n`, `::2`."""
    return isinstance(cut, ast.Slice) and (_number(cut.lower) == 1 or _number(cut.upper) == -1)


def _number(node: ast.expr | None) -> int | None:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _is_sum_of_losses(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and _called(node) in ("sum", "fsum", "nansum")
        and bool(_words(node) & LOSSES)
    )


# ---------------------------------------------------------------- nothing is swallowed, nothing is unpickled


def no_exception_is_swallowed(file: File) -> Iterator[Place]:
    """A bare except also catches Ctrl-C; one that passes hides a wrong number."""
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        everything = node.type is not None and ast.unparse(node.type) in ("Exception", "BaseException")
        silent = all(
            isinstance(x, (ast.Pass, ast.Continue))
            or (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))
            for x in node.body
        )
        if node.type is None:
            yield node.lineno, "a bare except"
        elif everything and silent:
            yield node.lineno, f"except {ast.unparse(node.type)} that does nothing"


def nothing_is_loaded_loosely(file: File) -> Iterator[Place]:
    """No strict=False, no pickle: a checkpoint fits exactly, and a downloaded one cannot run code."""
    for node in ast.walk(file.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = {module.split(".")[0], *(a.name.split(".")[0] for a in node.names if not module)}
            for name in names & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}:
                yield node.lineno, f"imports {name}"
        elif isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            planted = file.path.startswith(DOCTORED)  # strict=False is one of the bugs
            if given.get("strict") is False and _called(node) != "zip" and not planted:
                yield node.lineno, "strict=False"
            if ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True:
                yield node.lineno, "torch.load without weights_only=True"
            if given.get("allow_pickle") is True:
                yield node.lineno, "allow_pickle=True"
            if ast.unparse(node.func) in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield node.lineno, "yaml.safe_load is the one that cannot run code"


# ---------------------------------------------------------------- files, imports, documentation


def names_say_something(file: File) -> Iterator[Place]:
    """A file called utils takes everything and is found by nobody."""
    for part in Path(file.path).with_suffix("").parts:
        if set(part.lower().split("_")) & {"util", "utils", "helper", "helpers", "common", "misc"}:
            yield 1, f"a name that says nothing: {part}"


def files_are_readable_in_one_sitting(file: File) -> Iterator[Place]:
    """At most 400 lines."""
    lines = len(file.text.splitlines())
    if file.product and lines > 400:
        yield lines, f"{lines} lines, more than 400"


CHANGES_OF_THE_PROCESS = re.compile(
    r"(torch\.(set_|manual_seed|use_deterministic|(backends|multiprocessing)\..*set)|os\.(environ\.(?!get$)|putenv|chdir)"
    r"|random\.seed|(np|numpy)\.random\.seed|warnings\.(filter|simplefilter)|logging\.(basicConfig|disable)|matplotlib\.use)"
)


def importing_changes_nothing(file: File) -> Iterator[Place]:
    """Importing minilm sets no thread count, no seed, no environment variable, no warning filter."""
    if not file.in_package:
        return
    for statement in _at_import(file.tree.body):
        for node in ast.walk(statement):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if CHANGES_OF_THE_PROCESS.match(called):
                yield node.lineno, f"{called} while importing"
        if isinstance(statement, (ast.Assign, ast.AugAssign, ast.Delete)):
            targets = [statement.target] if isinstance(statement, ast.AugAssign) else statement.targets
            for target in map(ast.unparse, targets):
                if target.startswith(("os.environ[", "torch.", "sys.")):
                    yield statement.lineno, f"{target} changed while importing"


def _at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Simple statements that run when a module is imported."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        inner = [
            child
            for child in ast.iter_child_nodes(statement)
            if isinstance(child, (ast.stmt, ast.ExceptHandler))
        ]
        if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
            continue
        if not inner:
            yield statement
        for child in inner:
            yield from _at_import(child.body if isinstance(child, ast.ExceptHandler) else [child])


def public_names_are_documented(file: File) -> Iterator[Place]:
    """Every module, public function and public class of the package says what it is for."""
    if not file.in_package:
        return
    tree = file.tree
    if tree.body and ast.get_docstring(tree) is None:
        yield 1, "the module has no docstring"
    for node in tree.body:
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if named and not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield node.lineno, f"{node.name} has no docstring"


def tests_assert_something(file: File) -> Iterator[Place]:
    """A test function asserts, expects an exception or warning, or calls a function of its file that does."""
    if not Path(file.path).name.startswith("test_"):
        return
    functions = {
        n.name: n for n in ast.walk(file.tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    asserting = {name for name, node in functions.items() if _asserts(node, set())}
    while more := {n for n, node in functions.items() if n not in asserting and _asserts(node, asserting)}:
        asserting |= more
    for name, node in functions.items():
        if name.startswith("test_") and name not in asserting:
            yield node.lineno, f"{name} asserts nothing"


def _asserts(function: ast.AST, others: set[str]) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = _called(node)
            if called in others or called in ("raises", "warns", "fail", "gradcheck"):
                return True
            if re.match(r"_?(assert|check|expect|verify)_|assert", called):
                return True
    return False


RULES: list[Callable[[File], Iterator[Place]]] = [
    imports_go_down_only,
    models_read_a_store_without_the_data,
    losses_are_made_in_alignment_only,
    no_exception_is_swallowed,
    nothing_is_loaded_loosely,
    names_say_something,
    files_are_readable_in_one_sitting,
    importing_changes_nothing,
    public_names_are_documented,
    tests_assert_something,
]
