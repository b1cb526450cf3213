"""The file of a sweep, read into the runs that it asks for.

    config: quickstart_cpu.yaml           # base settings, beside this file; optional
    folder: runs/sweep_lr                 # of the runs; default: runs/NAME OF THIS FILE
    seeds: [0, 1, 2]                      # train.seed; default: the one of the settings
    set: {train.steps: 200}               # the same in every run
    grid:                                 # every combination of these, or
      optim.learning_rate: [1.0e-3, 3.0e-3]
      model.name: [original, no_ffn]
    list:                                 # one after the other
      - {optim.learning_rate: 1.0e-3, train.batch_size: 8}

Every combination is resolved as `train.py` would do it, before anything starts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minilm.config import flatten
from minilm.data.loader import Data, open_data
from minilm.errors import ConfigError, MinilmError, listed
from minilm.run import RunConfig, load_config, with_vocabulary

SEED = "train.seed"
_KEYS = ("config", "folder", "seeds", "set", "grid", "list")
_OURS = ("run.folder", "run.name")
_MOST_NAME = 100  # characters; file systems take 255 bytes
_NUMBERED = re.compile(r"^  \d+\. ", re.MULTILINE)


@dataclass(frozen=True)
class Planned:
    """One run: what differs from its neighbours (the seed apart), the words for train.py, the resolved settings."""

    name: str
    point: dict[str, Any]
    seed: int | None
    flags: tuple[str, ...]
    settings: dict[str, Any]
    data_fingerprint: str
    folder: Path


@dataclass(frozen=True)
class Sweep:
    """A file and its runs; config is the base settings file."""

    file: Path
    folder: Path
    config: Path | None
    runs: tuple[Planned, ...]

    @property
    def points(self) -> list[dict[str, Any]]:
        """What is compared, each once, in the order of the file."""
        return [dict(pairs) for pairs in dict.fromkeys(_key(run.point) for run in self.runs)]

    def of(self, point: Mapping[str, Any]) -> list[Planned]:
        """The runs of a point: one for each seed."""
        return [run for run in self.runs if _key(run.point) == _key(point)]


def read(file: Path) -> Sweep:
    """Read and check a sweep. Raises ConfigError with every problem of the file and of all its runs.

    The data of each run are opened too: a store that is missing is better found now than at night.
    """
    asked = _Asked(file)
    if asked.problems:
        raise ConfigError(listed(asked.problems))
    combinations = [
        (point, seed)
        for point in asked.points
        for seed in (asked.seeds or [None])  # type: ignore[list-item]
    ]
    names = _names(asked.points)
    runs: list[Planned] = []
    problems: dict[str, None] = {}
    opened: dict[tuple[Any, ...], Data] = {}
    for point, seed in combinations:
        values = {**asked.fixed, **point} | ({} if seed is None else {SEED: seed})
        name = names[_key(point)] + (f",seed={seed}" if seed is not None and names[_key(point)] else "")
        name = name or ("run" if seed is None else f"seed={seed}")
        folder = asked.folder / name
        flags = (*_flags(values), f"--run.folder={asked.folder}", f"--run.name={name}")
        try:
            settings, fingerprint = _settings(asked.config, flags, opened)
        except MinilmError as error:
            problems |= dict.fromkeys(asked.placed(text, point) for text in _texts(error))
            continue
        runs.append(Planned(name, point, seed, flags, settings, fingerprint, folder))
    if problems:
        raise ConfigError(listed(list(problems)))
    return Sweep(file, asked.folder, asked.config, tuple(runs))


class _Asked:
    """What stands in the file. `problems` are those of its form; values are checked with the settings."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.problems: list[str] = []
        self.lines: dict[tuple[str, int], int] = {}  # (setting, which of the list) -> line; -1: everywhere
        found = self._top(_node(file))
        self.config = self._config(found.get("config"))
        self.folder = Path(str(self._value(found, "folder", str, f"runs/{file.stem}")))
        self.seeds = self._seeds(found.get("seeds"))
        self.fixed = {name: value for name, (value, _) in self._settings(found.get("set"), -1).items()}
        self.points = self._points(found.get("grid"), found.get("list"))
        repeated = self.fixed.keys() & {name for point in self.points for name in point}
        for name in sorted(repeated):
            self._problem(self.lines[name, -1], f"{name} is set for all runs and differs too: give it once.")
        for name, line in [(key, line) for (key, _), line in self.lines.items()]:
            if name in _OURS:
                self._problem(line, f"{name} is decided by the sweep: `folder` says where its runs are made.")
            if name == SEED and self.seeds:
                self._problem(line, f"{SEED} is what `seeds` sets: give one of them.")
        for number, point in enumerate(self.points):
            if point in self.points[:number]:
                self.problems.append(f"{self.file}: {point} stands there twice: give it once.")

    def placed(self, text: str, point: Mapping[str, Any]) -> str:
        """A problem of the settings with the line of this file that caused it."""
        number = next((n for n, other in enumerate(self.points) if other == point), -1)
        values = {**self.fixed, **point}
        for (name, which), line in self.lines.items():
            named = re.search(rf"(--|setting ){re.escape(name)}\b", text)
            quoted = name.startswith("data.") and f" {values.get(name)}. " in text  # There is no store X.
            if which in (-1, number) and (named or quoted):
                return f"{self.file}:{line}: {text.replace(f'--{name}', name)}"
        return text

    def _problem(self, line: int, text: str) -> None:
        self.problems.append(f"{self.file}:{line}: {text}")

    def _top(self, node: yaml.MappingNode) -> dict[str, yaml.Node]:
        found = self._mapping(node)
        for name, (_, line) in found.items():
            if name not in _KEYS:
                self._problem(line, f"unknown key {name}; a sweep has {', '.join(_KEYS)}.")
        return {name: value for name, (value, _) in found.items()}

    def _mapping(self, node: yaml.Node | None) -> dict[str, tuple[yaml.Node, int]]:
        """{key: (node, line)}; YAML itself would silently take the last of two equal keys."""
        found: dict[str, tuple[yaml.Node, int]] = {}
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return found
        if not isinstance(node, yaml.MappingNode):
            self._problem(node.start_mark.line + 1, "this must be settings with values, `name: value`.")
            return found
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in found:
                self._problem(line, f"{name} was given before, in line {found[name][1]}. Give it once.")
            found[name] = value, line
        return found

    def _value(self, found: Mapping[str, yaml.Node], key: str, kind: type, default: Any) -> Any:
        if key not in found:
            return default
        value = _plain(found[key])
        if not isinstance(value, kind) or value == "":
            self._problem(found[key].start_mark.line + 1, f"{key} must be a text, not {value!r}.")
            return default
        return value

    def _config(self, node: yaml.Node | None) -> Path | None:
        name = self._value({"config": node} if node else {}, "config", str, None)
        if name is None:
            return None
        path: Path = self.file.parent / name
        if not path.exists() and node is not None:
            self._problem(node.start_mark.line + 1, f"there is no settings file {path}.")
        return path

    def _seeds(self, node: yaml.Node | None) -> list[int]:
        if node is None:
            return []
        seeds = _plain(node)
        whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
        if not whole or not seeds or len(set(seeds)) < len(seeds):
            self._problem(node.start_mark.line + 1, "seeds must be a list of different integers from 0.")
            return []
        return list(seeds)

    def _settings(self, node: yaml.Node | None, which: int) -> dict[str, tuple[Any, int]]:
        """{dotted name: (value, line)} of a mapping, whose lines are remembered."""
        found = {}
        for name, (value, line) in self._mapping(node).items():
            self.lines[name, which] = line
            if "." not in name:
                self._problem(
                    line, f"{name} is no setting: they are written section.key, as in train.py --help."
                )
            found[name] = _plain(value), line
        return found

    def _points(self, grid: yaml.Node | None, listing: yaml.Node | None) -> list[dict[str, Any]]:
        if grid is not None and listing is not None:
            self._problem(
                listing.start_mark.line + 1, "give `grid` or `list`, not both: a list can hold every point."
            )
            return [{}]
        if listing is not None:
            if not isinstance(listing, yaml.SequenceNode) or not listing.value:
                self._problem(listing.start_mark.line + 1, "list must be a list of settings with values.")
                return [{}]
            return [
                {name: value for name, (value, _) in self._settings(item, number).items()}
                for number, item in enumerate(listing.value)
            ]
        asked = self._settings(grid, -1)
        for name, (values, line) in asked.items():
            if not isinstance(values, list) or not values:
                self._problem(line, f"{name} must have a list of values to try, not {values!r}.")
                return [{}]
        values = [[(name, value) for value in values] for name, (values, _) in asked.items()]
        return [dict(point) for point in itertools.product(*values)]


def _node(file: Path) -> yaml.MappingNode:
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The sweep {file} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{file} is not a sweep: it must have some of {', '.join(_KEYS)}.")
    return node


def _plain(node: yaml.Node) -> Any:
    return yaml.safe_load(yaml.serialize(node))


def _settings(
    config: Path | None, flags: tuple[str, ...], opened: dict[tuple[Any, ...], Data]
) -> tuple[dict[str, Any], str]:
    """The settings as the run will have them, and the fingerprint of its data, each set of which is opened once."""
    resolved = load_config(config, flags)
    value: RunConfig = resolved.value
    key = tuple(str(item) for item in flatten(value.data).values())
    if key not in opened:
        opened[key] = open_data(value.data)
    store = opened[key].train.store
    return flatten(with_vocabulary(resolved, store)), store.fingerprint


def _texts(error: MinilmError) -> list[str]:
    """The problems of an error, one by one, whatever their numbers: several runs share most of theirs."""
    text = str(error)
    return [part.strip() for part in _NUMBERED.split(text)[1:]] or [text]


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield f"--{name}={_word(value)}"


def _word(value: Any) -> str:
    """A value of YAML as train.py reads it from its command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _key(point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _hashable(value)) for name, value in point.items())


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _names(points: list[dict[str, Any]]) -> dict[tuple[tuple[str, Any], ...], str]:
    """`learning_rate=0.001,name=no_ffn`: the settings that differ, by their last word where that is clear."""
    settings = list(dict.fromkeys(name for point in points for name in point))
    leaves = Counter(name.rpartition(".")[2] for name in settings)
    short = {n: leaf if leaves[leaf := n.rpartition(".")[2]] == 1 else n for n in settings}
    names = {
        _key(point): ",".join(f"{short[name]}={_in_a_name(value)}" for name, value in point.items())
        for point in points
    }
    taken = Counter(names.values())
    for key, name in names.items():
        if len(name) > _MOST_NAME or taken[name] > 1:  # two paths with the same last part, for instance
            names[key] = f"{name[:_MOST_NAME]}-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"
    return names


def _in_a_name(value: Any) -> str:
    last = _word(value).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.+-]+", "-", last).strip("-") or "empty"
