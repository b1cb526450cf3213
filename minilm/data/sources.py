"""What a corpus is made of: places of documents, written as strings or mappings.

    corpus.jsonl  corpus.jsonl.gz  corpus.jsonl.zst     one JSON object a line, the text in one of its fields
    corpus.parquet                                      the text in one of its columns
    notes.txt  docs/  'docs/**/*.md'                    text files, one document each; folders may hold all kinds
    hf:NAME[:CONFIG[:SPLIT]]                            a Hugging Face data set: a name (streamed) or a local folder
    builtin:python  builtin:python-docs                 see corpora.py
    synthetic:markov?vocab=256&documents=1000           see synthetic.py

Options follow behind commas, `wiki.jsonl,weight=2,field=content,name=wiki`, or are the keys of a mapping:

    name      in the store and its reports; by default from the place
    weight    passes over this source per epoch
    field     field or column that holds the text (default: text)
    entries   field of JSON Lines that holds labels (default: entries; empty: none are read), see labels.py
    suffixes  further suffixes of text files in a folder: suffixes=.tex+.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilm.data import corpora, readers
from minilm.data.documents import BadDocument, Document, Position, document_of
from minilm.data.labels import FIELD
from minilm.data.synthetic import Markov, MarkovSettings
from minilm.errors import ConfigError, DataError, listed

_OPTIONS = ("name", "weight", "field", "entries", "suffixes")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Source:
    """A place of documents that was found to exist."""

    place: str  # without options
    kind: str  # files | dataset | builtin | synthetic
    name: str
    weight: float = 1.0
    text_field: str = "text"
    entries_field: str = FIELD
    files: tuple[Path, ...] = ()

    def documents(self, limit: int, position: Position | None = None) -> Iterator[Document | BadDocument]:
        """All documents in an order that never changes; bad ones as values. Advances `position`."""
        position = position or Position()
        if self.kind == "synthetic":
            yield from Markov(self.markov_settings()).documents()
        elif self.kind == "dataset":
            yield from readers.read_dataset(*self._dataset(), self.text_field, limit)
        elif self.kind == "builtin":
            for text, where in corpora.python_documents(self.place.removeprefix("builtin:"), position):
                yield document_of(text, where, limit)
        else:
            for path in self.files:
                yield from readers.read_file(path, self.text_field, limit, position, self.entries_field)

    def markov_settings(self) -> MarkovSettings:
        return MarkovSettings.parse(self.place)

    @property
    def size_bytes(self) -> int:
        """Bytes that will be read, as far as that is known beforehand; else 0."""
        if self.kind == "synthetic":
            settings = self.markov_settings()
            return settings.documents * settings.length
        files = corpora.library_files() if self.kind == "builtin" else self.files
        return sum(path.stat().st_size for path in files)

    def identity(self) -> dict[str, Any]:
        """What tells this source from another, and from an earlier state of itself: sizes and times of its files."""
        files = corpora.library_files() if self.kind == "builtin" else list(self.files)
        if self.kind == "dataset" and (folder := Path(self._dataset()[0])).is_dir():
            files = sorted(p for p in folder.rglob("*") if p.is_file())
        stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        labels = {} if self.entries_field == FIELD else {"entries": self.entries_field}
        return {"place": self.place, "kind": self.kind, "field": self.text_field, "files": stats, **labels}

    def _dataset(self) -> tuple[str, str, str]:
        name, config, split = [*self.place.removeprefix("hf:").split(":"), "", ""][:3]
        return name, config, split or "train"


def parse_sources(specs: Sequence[str | Mapping[str, Any]]) -> list[Source]:
    """Sources with different names. All that is wrong with any of them is in one error."""
    problems, found = [], []
    for spec in specs:
        try:
            found.append(_parse(spec))
        except (ConfigError, DataError) as error:
            problems.append(str(error))
    if not specs:
        problems.append(
            "No sources are given: name at least one, for instance builtin:python or corpus.jsonl."
        )
    kinds = {source.kind == "synthetic" for source in found}
    if len(kinds) > 1 or (True in kinds and len(found) > 1):
        problems.append(
            "A synthetic source must stand alone: its token ids have no tokenizer, and its entropy is its own."
        )
    if problems:
        raise DataError(listed(problems))
    return _distinct(found)


def _parse(spec: str | Mapping[str, Any]) -> Source:
    place, options = _options(spec)
    weight = _weight(place, options.get("weight", 1.0))
    field = str(options.get("field", "text"))
    if place.startswith("synthetic:"):
        MarkovSettings.parse(place)
        source = Source(place, "synthetic", "markov")
    elif place.startswith("builtin:"):
        part = place.removeprefix("builtin:")
        if part not in corpora.PARTS:
            raise DataError(
                f"There is no {place}; there are {', '.join('builtin:' + p for p in corpora.PARTS)}."
            )
        corpora.standard_library()
        source = Source(place, "builtin", part)
    elif place.startswith("hf:") or readers.is_saved_dataset(Path(place)):
        place = place if place.startswith("hf:") else f"hf:{place}"
        source = Source(place, "dataset", place.removeprefix("hf:").rstrip("/:").split("/")[-1])
    else:
        files = _files(place, _suffixes(options.get("suffixes", ())))
        stem = Path(place.rstrip("/")).name.split(".")[0] if not _GLOB.search(place) else place
        source = Source(place, "files", stem, files=tuple(files))
    name = str(options.get("name", source.name))
    entries_field = str(options.get("entries", FIELD))
    return replace(
        source, name=_file_name(name), weight=weight, text_field=field, entries_field=entries_field
    )


def _options(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        place, options = spec, {}
        while (match := re.search(r",([a-z_]+)=([^,]*)$", place)) is not None:
            if match[1] not in _OPTIONS:
                raise ConfigError(
                    f"Source {spec}: {match[1]!r} is unknown; options are {', '.join(_OPTIONS)}."
                )
            options[match[1]] = match[2]
            place = place[: match.start()]
    else:
        options = dict(spec)
        place = str(options.pop("path", ""))
        options |= {"field": options.pop("text_field")} if "text_field" in options else {}
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise ConfigError(f"Source {place}: {unknown} are unknown; keys are path, {', '.join(_OPTIONS)}.")
    if not place:
        raise ConfigError(f"Source {spec!r} names no place (`path`).")
    return place, options


def _weight(place: str, value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < 1e6:
        raise ConfigError(
            f"Source {place}: the weight {value!r} must be a number of passes per epoch, 0 or more."
        )
    return weight


def _suffixes(value: Any) -> tuple[str, ...]:
    parts = value.split("+") if isinstance(value, str) else value
    return tuple("." + part.lower().lstrip(".") for part in parts if part)


def _files(place: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a place, sorted. Those named by hand or by a pattern may have any suffix, as texts."""
    path = Path(place).expanduser()
    known = (*readers.RECORDS, *readers.TEXTS, *suffixes)
    if path.is_file():
        if readers.kind_of(path) not in known:
            raise DataError(
                f"{path} has the suffix {path.suffix!r}; known are {', '.join(known)} (also .gz, .zst). To read it as "
                f"one text: {place},suffixes={path.suffix or '.SUFFIX'}"
            )
        return [path]
    if path.is_dir():
        everything = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        files = [p for p in everything if readers.kind_of(p) in known]
        if not files:
            others = sorted({p.suffix for p in everything}) or ["nothing"]
            raise DataError(
                f"The folder {path} has no files ending in {', '.join(known)}; it has {', '.join(others[:8])}. Name "
                f"further suffixes of text files: {place},suffixes=.tex+.html"
            )
        return files
    if _GLOB.search(place):
        base = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(p for p in base.glob(str(path.relative_to(path.anchor))) if p.is_file())
        if not files:
            raise DataError(f"No file matches {place}.")
        return files
    raise DataError(f"There is no file or folder {path} (looked in {Path.cwd()}).")


def _hidden(inside: Path) -> bool:
    return any(part.startswith(".") for part in inside.parts)


def _file_name(name: str) -> str:
    """A name that can stand in a file name: letters, digits, - and _."""
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "source"


def _distinct(sources: list[Source]) -> list[Source]:
    taken: set[str] = set()
    distinct = []
    for source in sources:
        name, number = source.name, 2
        while name in taken:
            name, number = f"{source.name}-{number}", number + 1
        taken.add(name)
        distinct.append(replace(source, name=name))
    return distinct
