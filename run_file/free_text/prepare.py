"""The texts of the free-text experiment: entries of one sentence, documents to train on, documents held out.

    python run_file/free_text/prepare.py --out data/free_text/cpu/texts
    python run_file/free_text/prepare.py --source wiki.jsonl --out texts --same-documents

A hash of its content puts each document in one of three parts, so that neither order nor other sources matter:

    entries    its sentences are the entries of the knowledge store; the model never trains on it
    training   the model trains on it
    held out   both models are scored on it

Entries come from other documents than those that are trained on, because a sentence of a training document is there
when that document is read: a model would learn to find its own text and copy it, which lowers the loss of training,
and is never possible on a new text. `--same-documents` makes the entries of the training documents all the same, to
show what that does. Parts and their documents stay what they are, so the runs can be compared.

Written: sentences.jsonl {"text": ...}, a record for each entry; sources.jsonl, the documents that they are from;
train.jsonl; held_out.jsonl; free_text.json, what was asked for and the counts.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from minilm import cli
from minilm.data.documents import MAX_DOCUMENT_BYTES, BadDocument, Document, content_key
from minilm.data.sources import parse_sources
from minilm.errors import ConfigError, DataError, listed

SOURCES = ("builtin:python-docs",)
ENTRIES, HELD_OUT = 0.45, 0.1  # shares of the documents; the rest is trained on
MOST_CHARACTERS = 96  # of an entry: about 30 tokens of a small vocabulary, and the store keeps 32
FEWEST_WORDS = 4
PROSE = 0.93  # share of letters, spaces and plain punctuation from which on a paragraph is prose
PARTS = ("entries", "train", "held_out")

_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(*]*[A-Z])")
_PLAIN = re.compile(r"[A-Za-z ,.;:'-]")
_WORD = re.compile(r"[A-Za-z]{2,}")


def part_of(key: int, entries: float = ENTRIES, held_out: float = HELD_OUT) -> str:
    """Where a document with this key (64 bits of a hash of its content) belongs; one of `PARTS`."""
    place = key / 2**64
    if place < held_out:
        return "held_out"
    return "entries" if place < held_out + entries else "train"


def pieces(text: str, most: int = MOST_CHARACTERS) -> Iterator[str]:
    """The sentences of prose and groups of lines of anything else, each of at most `most` characters.

    Lines of a paragraph of prose are joined first: where a sentence is wrapped says nothing. Elsewhere a line is what
    belongs together, so lines are joined as long as they fit. A piece of fewer than `FEWEST_WORDS` words is left out.
    """
    for paragraph in _PARAGRAPH.split(text):
        lines = [line for line in (" ".join(line.split()) for line in paragraph.splitlines()) if line]
        joined = " ".join(lines)
        if len(_PLAIN.findall(joined)) >= PROSE * len(joined):
            found = [cut for sentence in _SENTENCE.split(joined) for cut in _cut(sentence, most)]
        else:
            found = _grouped((cut for line in lines for cut in _cut(line, most)), most)
        yield from (piece for piece in found if len(_WORD.findall(piece)) >= FEWEST_WORDS)


def _cut(text: str, most: int) -> list[str]:
    """A text in pieces of at most `most` characters, cut between words and of about equal length."""
    number = -(-len(text) // most)
    if number < 2:
        return [text] if text else []
    found, words = [""], text.split(" ")
    even = len(text) / number
    for word in words:
        longer = f"{found[-1]} {word}" if found[-1] else word
        if found[-1] and (len(longer) > most or len(found[-1]) >= even):
            found.append(word)
        else:
            found[-1] = longer
    return [piece[start : start + most] for piece in found for start in range(0, len(piece), most)]


def _grouped(lines: Iterable[str], most: int) -> list[str]:
    found: list[str] = []
    for line in lines:
        if found and len(found[-1]) + 1 + len(line) <= most:
            found[-1] = f"{found[-1]}\n{line}"
        else:
            found.append(line)
    return found


def entries_of(texts: Iterable[str], most: int | None = None) -> list[str]:
    """The pieces of all texts, each once. `most`: so many of them, those with the smallest hashes (a fair draw)."""
    found = list(dict.fromkeys(piece for text in texts for piece in pieces(text)))
    if most is None or len(found) <= most:
        return found
    smallest = sorted(range(len(found)), key=lambda n: content_key(found[n].encode()))[:most]
    return [found[n] for n in sorted(smallest)]


def read(sources: list[str]) -> list[Document]:
    """All documents with texts, each once. Raises DataError for bad ones, with where they are."""
    found: dict[int, Document] = {}
    bad: list[str] = []
    for source in parse_sources(sources):
        if source.kind == "synthetic":
            raise DataError(f"{source.place} gives token ids without text: it has no sentences.")
        for document in source.documents(MAX_DOCUMENT_BYTES):
            if isinstance(document, BadDocument):
                bad.append(str(document))
            else:
                found.setdefault(document.key, document)
    if bad:
        raise DataError(f"{len(bad)} documents cannot be used: {listed(bad[:5])}")
    return list(found.values())


def prepare(
    sources: list[str], out: Path, *, same_documents: bool, most_entries: int | None, fewest: int = 10
) -> dict[str, int]:
    """Write the files (see above); returns the counts. Raises DataError where a part has fewer than `fewest`."""
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for document in read(sources):
        parts[part_of(document.key)].append(document.text)
    small = [f"{name}: {len(texts)}" for name, texts in parts.items() if len(texts) < fewest]
    if small:
        raise DataError(
            f"{', '.join(sources)} give too few documents; each part needs {fewest}, but there are {listed(small)}. "
            "Name more sources, or cut long documents into more records."
        )
    known = parts["train"] if same_documents else parts["entries"]
    sentences = entries_of(known, most_entries)
    out.mkdir(parents=True, exist_ok=True)
    written = {
        "sentences": sentences,
        "sources": known,
        "train": parts["train"],
        "held_out": parts["held_out"],
    }
    for name, texts in written.items():
        _write(out / f"{name}.jsonl", texts)
    counts = {name: len(texts) for name, texts in written.items()}
    counts |= {f"{name}_bytes": sum(len(t.encode()) for t in texts) for name, texts in written.items()}
    asked = {"source": sources, "same_documents": same_documents, "most_entries": most_entries}
    (out / "free_text.json").write_text(json.dumps({**asked, **counts}, indent=1) + "\n")
    return counts


def _write(path: Path, texts: Iterable[str]) -> None:
    """Unless it is there already: an equal file that was written anew would make `minilm data build` start again."""
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if not path.is_file() or path.read_text(encoding="utf-8") != lines:
        path.write_text(lines, encoding="utf-8")


def main(argv: list[str]) -> int:
    parser = cli.parser(__doc__ or "", prog="prepare.py")
    add = parser.add_argument
    add("--source", action="append", metavar="SOURCE", help=f"default: {' and '.join(SOURCES)}")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the files")
    add("--most-entries", type=int, metavar="N", help="keep so many, drawn by their hashes (default: all)")
    add("--same-documents", action="store_true", help="entries from the training documents, as a control")
    asked = parser.parse_args(argv)

    def run() -> int:
        if asked.most_entries is not None and asked.most_entries < 1:
            raise ConfigError(f"--most-entries is {asked.most_entries}; it must be at least 1.")
        counts = prepare(
            asked.source or list(SOURCES),
            asked.out,
            same_documents=asked.same_documents,
            most_entries=asked.most_entries,
        )
        for name in ("sentences", "sources", "train", "held_out"):
            print(f"{name}.jsonl: {counts[name]:,} records, {counts[name + '_bytes']:,} bytes")
        return 0

    return cli.guarded(run, debug=asked.debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
