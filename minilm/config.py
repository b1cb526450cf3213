"""Settings: dataclasses owned by the parts they configure, one YAML file, dotted overrides.

    python train.py --config run.yaml --optim.learning_rate=3e-4 --train.steps 500

A settings class is a plain frozen dataclass of sections, each again a frozen dataclass; pydantic checks the
types and bounds written in the annotations. Every problem is reported in one go, each with the place it comes
from (file and line, or flag). The origin of every value is kept, so that a run can show who decided what.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from minilm.errors import ConfigError, listed

T = TypeVar("T")

# Picks the class of a section from what was written in it (model variants differ in their settings):
# raw values -> (class, the values that a named size stands for). It takes out what is no setting of the class.
Chooser = Callable[[dict[str, Any]], tuple[type, Mapping[str, Any]]]


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """Settings with the origin of each: `origins["optim.learning_rate"]` is "default" or where it was set."""

    value: T
    origins: dict[str, str]


def resolve(
    cls: type[T],
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    choose: Mapping[str, Chooser] | None = None,
) -> Resolved[T]:
    """Settings from defaults, then a YAML file, then flags; later ones win.

    cls        dataclass whose fields are sections (dataclasses with defaults)
    overrides  command line words: `--section.key=value` or `--section.key value`
    choose     for sections whose class depends on their content
    Raises ConfigError with all problems: unknown settings (with the nearest known ones), wrong types and
    bounds, and what the `problems()` methods of the sections and of `cls` report.
    """
    raw: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    if file is not None:
        for path, value, where in _from_file(file):
            _put(raw, origins, path, value, where, problems)
    for path, text in parse_flags(overrides):
        _put(raw, origins, path, text, f"--{path}", problems)

    hints = typing.get_type_hints(cls)
    classes: dict[str, type] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, chooser in (choose or {}).items():
        try:
            classes[name] = _chosen(name, chooser, raw, origins)
        except ConfigError as error:
            problems.append(str(error))
            raw.pop(name, None)
            classes.pop(name)

    known = [
        f"{name}.{field.name}" for name, section in classes.items() for field in dataclasses.fields(section)
    ]
    sections: dict[str, Any] = {}
    for name in raw.keys() - classes.keys() - (choose or {}).keys():
        problems.extend(_unknown(f"{name}.{key}", origins, known) for key in raw[name])
    for name, section in classes.items():
        checked = _section(name, section, raw.get(name, {}), origins, known, problems)
        if checked is not None:
            sections[name] = checked
    if problems:
        raise ConfigError(listed(problems))

    for path in known:
        origins.setdefault(path, "default")
    value = cls(**sections)
    problems = [f"{_where(path, origins)} {message}" for path, message in contradictions(value)]
    if problems:
        raise ConfigError(listed(problems))
    return Resolved(value, origins)


def contradictions(config: Any) -> Iterator[tuple[str, str]]:
    """(dotted setting, what is wrong with it) from the `problems()` methods of the sections and of the whole."""
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if hasattr(section, "problems"):
            yield from ((f"{field.name}.{key}", message) for key, message in section.problems())
    if hasattr(config, "problems"):
        yield from config.problems()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> plain value, in the order of definition."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def dump(config: Any) -> str:
    """YAML that `resolve` reads back to the same settings."""
    text: str = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)
    return text


def describe(section: type, name: str) -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, description) of every setting of a section, for --help."""
    hints = typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        annotation = hints[field.name]
        texts = [m.description for m in typing.get_args(annotation)[1:] if getattr(m, "description", None)]
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        yield f"{name}.{field.name}", _type_name(annotation), _default(field), " ".join(texts)


def parse_flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--a.b=c`, `--a.b c` and `--a.b` (true) -> ("a.b", "c"). Raises ConfigError for anything else."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(
                f"Do not know what to do with {word!r}. Settings are given as --section.key=value."
            )
        path, equals, text = word[2:].partition("=")
        if not equals:
            text = "true"
            if position < len(words) and not words[position].startswith("--"):
                text = words[position]
                position += 1
        yield path, text


def _from_file(file: Path) -> Iterator[tuple[str, Any, str]]:
    """(dotted path, value, "file:line") for each setting of a YAML file of sections."""
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"There is no settings file {file}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {file} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if node is None:
        return
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file} must consist of sections (`train:`, `optim:`, ...) with settings under each."
        )
    for problem in _repeated(file, node):
        raise ConfigError(problem)
    for section_node, body in node.value:
        section, where = str(section_node.value), f"{file}:{section_node.start_mark.line + 1}"
        if body.tag == "tag:yaml.org,2002:null":
            continue
        if not isinstance(body, yaml.MappingNode):
            yield section, content[section_node.value], where
            continue
        for key, _ in body.value:
            yield f"{section}.{key.value}", content[section][key.value], f"{file}:{key.start_mark.line + 1}"


def _repeated(file: Path, node: yaml.Node) -> Iterator[str]:
    """Keys given twice, of which YAML would silently take the last, and merge keys, whose origin would be lost."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            yield f"{file}:{line}: merge keys (<<) are not supported: write the settings out."
        if str(key.value) in seen:
            yield f"{file}:{line}: {key.value} was given before, in line {seen[str(key.value)]}. Give it once."
        seen[str(key.value)] = line
        yield from _repeated(file, value)


def _put(
    raw: dict[str, dict[str, Any]],
    origins: dict[str, str],
    path: str,
    value: Any,
    where: str,
    problems: list[str],
) -> None:
    section, _, key = path.partition(".")
    if not key:
        problems.append(f"{where}: `{path}` is a section or unknown; settings are written section.key.")
        return
    raw.setdefault(section, {})[key] = value
    origins[path] = where


def _chosen(name: str, chooser: Chooser, raw: dict[str, dict[str, Any]], origins: dict[str, str]) -> type:
    """The class of the section; what its named size stands for goes into `raw`, beside what was given."""
    given = raw.get(name, {})
    seen = _named_values(given, origins, name)
    section, preset = chooser(seen)
    # As it was given: "none" may be a choice of its own. What the chooser took out of the section is gone.
    raw[name] = {key: value for key, value in given.items() if key in seen}
    for key, value in preset.items():
        if f"{name}.{key}" not in origins:
            raw[name][key] = value
            origins[f"{name}.{key}"] = f"{name}.size"
    return section


def _named_values(section: Mapping[str, Any], origins: Mapping[str, str], name: str) -> dict[str, Any]:
    """Flags arrive as text: read the few that a chooser looks at as YAML would."""
    flag = {key for key in section if origins.get(f"{name}.{key}", "").startswith("--")}
    return {
        key: None if key in flag and str(value).lower() in ("none", "null") else value
        for key, value in section.items()
    }


def _section(
    name: str,
    section: type,
    raw: Mapping[str, Any],
    origins: Mapping[str, str],
    known: list[str],
    problems: list[str],
) -> Any:
    hints = typing.get_type_hints(section)
    fields = {field.name for field in dataclasses.fields(section)}
    problems.extend(_unknown(f"{name}.{key}", origins, known) for key in raw.keys() - fields)
    for key, value in raw.items():  # pydantic would read true as 1
        if isinstance(value, bool) and key in fields and not _takes_bool(hints[key]):
            problems.append(f"{_where(f'{name}.{key}', origins)} true and false mean nothing here.")
    values = {
        key: _from_text(value, hints[key]) if origins.get(f"{name}.{key}", "").startswith("--") else value
        for key, value in raw.items()
        if key in fields
    }
    try:
        return TypeAdapter(section).validate_python(values)
    except ValidationError as error:
        for item in error.errors():
            path = ".".join([name, *(str(part) for part in item["loc"] if str(part) in fields)])
            if item["type"] == "missing":
                problems.append(f"{path} must be given: it has no default.")
                continue
            message = item["msg"][0].lower() + item["msg"][1:]
            problems.append(f"{_where(path, origins)} {message}, not {item['input']!r}.")
        return None


def _where(path: str, origins: Mapping[str, str]) -> str:
    origin = origins.get(path, "default")
    if origin.startswith("--"):
        return f"{origin}:"
    return f"{path} (default):" if origin == "default" else f"{path} ({origin}):"


def _unknown(path: str, origins: Mapping[str, str], known: list[str]) -> str:
    leaf = path.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == leaf]  # right name, wrong section
    near += [
        k for k in known if len(leaf) > 1 and leaf == "".join(w[0] for w in k.rpartition(".")[2].split("_"))
    ]
    near += [k for k in difflib.get_close_matches(path, known, n=3, cutoff=0.6) if k not in near]
    leaves = {k.rpartition(".")[2]: k for k in known}
    near += [
        leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=2, cutoff=0.7) if leaves[m] not in near
    ]
    hint = f" Did you mean {' or '.join(near[:3])}?" if near else " `--help` lists all settings."
    origin = origins.get(path, "")
    place = "" if origin.startswith("--") else f" ({origin})"
    return f"Unknown setting {path}{place}.{hint}"


def _from_text(text: Any, annotation: Any) -> Any:
    """A flag's text as the value of its annotation: none/null for optional ones, lists as a,b or [a, b]."""
    if not isinstance(text, str):
        return text
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if type(None) in options and text.lower() in ("none", "null", ""):
        return None
    containers = [o for o in options if (typing.get_origin(o) or o) in (list, tuple, dict, Sequence, Mapping)]
    if not containers:
        return text
    if text.lstrip().startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r} is not a list or mapping in YAML: {error}") from error
    return [part.strip() for part in text.split(",")]


def _takes_bool(annotation: Any) -> bool:
    """Also where False is a word that YAML has read as no or off."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return any(option is bool or typing.get_origin(option) is typing.Literal for option in options)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(annotation))
    if _is_union(annotation):
        return " | ".join(_type_name(option) for option in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    return getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)  # type: ignore[return-value]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return "none" if field.default is None else str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return str(_plain(field.default_factory()))
    return "required"


def _plain(value: Any) -> Any:
    """Only what YAML and JSON know."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
