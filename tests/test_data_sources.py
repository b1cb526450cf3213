"""Sources: every kind gives its documents, every defect is named with its place."""

from __future__ import annotations

import ast
import gzip
import itertools
import json
from pathlib import Path

import pytest
import zstandard
from data_stores import texts, write_jsonl

from minilm.data import corpora
from minilm.data.documents import (
    MAX_DOCUMENT_BYTES,
    BadDocument,
    Document,
    Position,
    Seen,
    document_of,
    in_validation,
)
from minilm.data.sources import parse_sources
from minilm.errors import DataError

LINES = texts(30, seed=1)


def read(*specs: object, limit: int = MAX_DOCUMENT_BYTES) -> list[Document | BadDocument]:
    return [item for source in parse_sources(specs) for item in source.documents(limit)]


def good(*specs: object) -> list[str]:
    items = read(*specs)
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


def test_json_lines_plain_and_compressed(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    packer = zstandard.ZstdCompressor()
    whole = plain.read_bytes()  # two frames, as `zstd a b > c` or a parallel writer makes them
    (tmp_path / "c.jsonl.zst").write_bytes(packer.compress(whole[:500]) + packer.compress(whole[500:]))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert good(str(tmp_path / name)) == LINES
    assert good(str(tmp_path)) == 3 * LINES
    assert [d.where for d in read(str(plain))][:2] == [f"{plain}:1", f"{plain}:2"]


def test_other_field_last_line_without_end_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"body": "one"}\n\n   \n{"body": "two"}')
    assert good(f"{path},field=body") == ["one", "two"]
    assert good({"path": str(path), "text_field": "body"}) == ["one", "two"]


def test_bad_lines_are_values_with_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}', b'{"text": ', b'{"content": "x", "url": "y"}', b'{"text": 5}', b'{"text": "  "}',
        b'{"text": null}', b'["text"]', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": "' + b"x" * 200 + b'"}',
        b"[" * 100_000, b'{"text": "also good"}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    items = read(str(path), limit=100)
    assert [item.text for item in items if isinstance(item, Document)] == ["good", "also good"]
    bad = {item.where.rsplit(":", 1)[1]: item.reason for item in items if isinstance(item, BadDocument)}
    assert bad == {
        "2": "not JSON", "3": "no field 'text'", "4": "text is not a string", "5": "text is empty",
        "6": "text is not a string", "7": "not a JSON object", "8": "not UTF-8", "9": "text has a lone surrogate",
        "10": "document is too long", "11": "line is too long",
    }  # fmt: skip
    assert "it has 'content', 'url'" in str(next(i for i in items if str(i.where).endswith(":3")))


def test_a_very_long_line_does_not_hide_the_next_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = json.dumps({"text": "x" * 400_000})
    path.write_text(f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n{long}')
    items = read(str(path), limit=1000)
    assert [i.text if isinstance(i, Document) else (i.where[-2:], i.reason) for i in items] == [
        "a",
        (":2", "line is too long"),
        "b",
        (":4", "line is too long"),
    ]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_was_cut_off_or_damaged_is_noticed(tmp_path: Path, suffix: str) -> None:
    """A cut zstd file otherwise ends silently: the rest of the corpus is missing, nobody knows."""
    content = write_jsonl(tmp_path / "a.jsonl", texts(3000, seed=2)).read_bytes()
    packed = gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor().compress(content)
    path = tmp_path / f"cut.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    items = read(str(path))
    assert isinstance(items[-1], BadDocument) and items[-1].reason == "compressed file is damaged or cut off"
    middle = len(packed) // 2
    path.write_bytes(packed[:middle] + bytes(50) + packed[middle + 50 :])
    assert any(isinstance(item, BadDocument) for item in read(str(path)))
    path.write_bytes(b"this is not compressed at all\n")
    assert [i.reason for i in read(str(path))] == ["compressed file is damaged or cut off"]


def test_folders_patterns_and_suffixes_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / ".git").mkdir()
    for name, text in (("d/b.txt", "B"), ("d/a.md", "A\r\n"), ("d/e/c.tex", "C"), ("d/.git/x.txt", "no")):
        (tmp_path / name).write_bytes(text.encode())
    assert good(str(tmp_path / "d")) == ["A\r\n", "B"]
    assert good(f"{tmp_path}/d,suffixes=.tex+rst") == ["A\r\n", "B", "C"]
    assert good(f"{tmp_path}/**/*.t*") == ["B", "C"] or good(f"{tmp_path}/**/*.t*") == ["no", "B", "C"]
    (tmp_path / "latin.txt").write_bytes("line\nnaïve".encode("latin-1"))
    (bad,) = read(str(tmp_path / "latin.txt"))
    assert str(bad) == f"{tmp_path}/latin.txt:2: not UTF-8 (byte 7)"


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [*LINES, None], "id": list(range(31))})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    items = read(str(path))
    assert [i.text for i in items[:-1]] == LINES and items[3].where == f"{path} row 4"
    assert str(items[-1]) == f"{path} row 31: text is not a string (NoneType)"
    with pytest.raises(DataError, match="no column 'body'; it has 'text', 'id'"):
        read(f"{path},field=body")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert [i.reason for i in read(str(path))] == ["parquet file is damaged"]


def test_hugging_face_data_sets_on_disk(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": LINES})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select(range(3))}).save_to_disk(tmp_path / "two")
    assert good(str(tmp_path / "one")) == good(f"hf:{tmp_path}/one") == LINES
    assert good(f"hf:{tmp_path}/two") == LINES
    assert good(f"hf:{tmp_path}/two::test") == LINES[:3]
    with pytest.raises(DataError, match="no split 'dev', but train, test"):
        read(f"hf:{tmp_path}/two::dev")
    with pytest.raises(DataError, match="no column 'body'"):
        read(f"hf:{tmp_path}/one,field=body")
    (tmp_path / "three").mkdir()
    write_jsonl(tmp_path / "three" / "train.jsonl", LINES)
    assert good(f"hf:{tmp_path}/three") == LINES


def test_all_that_is_wrong_with_any_source_is_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    specs = [
        "nowhere.jsonl",
        str(tmp_path / "a.csv"),
        str(tmp_path / "empty"),
        "builtin:perl",
        "synthetic:markov?size=3",
    ]
    with pytest.raises(DataError) as caught:
        parse_sources([*specs, "x.jsonl,weigth=2", {"path": "builtin:python", "weight": -1}, "*.nothing"])
    message = str(caught.value)
    for part in (
        "8 problems", "no file or folder nowhere.jsonl", "suffix '.csv'", "has no files ending in", "no builtin:perl",
        "'size' is unknown", "'weigth' is unknown", "weight -1 must be", "No file matches *.nothing",
    ):  # fmt: skip
        assert part in message
    with pytest.raises(DataError, match="No sources"):
        parse_sources([])


def test_names_and_weights(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "wiki.jsonl", LINES)
    sources = parse_sources(
        [f"{path},weight=2.5", str(path), f"{path},name=my wiki/1", "builtin:python-docs"]
    )
    assert [(s.name, s.weight) for s in sources] == [
        ("wiki", 2.5),
        ("wiki-2", 1),
        ("my-wiki-1", 1),
        ("python-docs", 1),
    ]


def test_the_identity_of_a_source_changes_with_its_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", LINES)
    (before,) = parse_sources([str(path)])
    assert before.identity() == parse_sources([str(path)])[0].identity()
    old = before.identity()
    write_jsonl(path, [*LINES, "more"])
    assert before.identity() != old


def test_position_reaches_the_size_of_the_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", LINES)
    write_jsonl(tmp_path / "b.jsonl", LINES)
    (source,) = parse_sources([str(tmp_path)])
    position = Position()
    list(source.documents(MAX_DOCUMENT_BYTES, position))
    assert position.done_bytes == source.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


# --- documents


def test_the_split_of_a_document_depends_on_its_text_alone() -> None:
    documents = [document_of(text, "here") for text in texts(4000, seed=7)]
    assert all(isinstance(d, Document) for d in documents)
    held_out = [d for d in documents if in_validation(d.key, 0.1)]
    assert abs(len(held_out) - 400) < 4 * 19  # binomial: sd 19
    assert {d.key for d in held_out} <= {d.key for d in documents if in_validation(d.key, 0.2)}
    assert not any(in_validation(d.key, 0) for d in documents)


def test_seen_equals_a_set() -> None:
    import numpy as np

    draw, seen, reference = np.random.default_rng(0), Seen(), set()
    for _ in range(40):
        keys = draw.integers(1, 30_000, 700).astype(np.uint64)
        keys[:100] = keys[0] + np.arange(100, dtype=np.uint64) * np.uint64(1 << 40)  # all want the same slot
        expected = []
        for key in keys.tolist():
            expected.append(key not in reference)
            reference.add(key)
        assert seen.add(keys).tolist() == expected
        assert len(seen) == len(reference)
    assert seen.memory_bytes <= 40 * len(seen)


# --- the standard library


@pytest.fixture(scope="module")
def library() -> list[tuple[str, str]]:
    """The documents of some of its files: parsing all of them takes several seconds."""
    everything = corpora.library_files()
    assert len(everything) > 400
    root = corpora.standard_library()
    some = [
        p for p in everything if str(p.relative_to(root)).startswith(("a", "j", "pydoc_data", "te", "tk"))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "library_files", lambda: some)
        return list(corpora.python_documents("python"))


def test_the_standard_library_gives_a_corpus_of_documentation_and_source(
    library: list[tuple[str, str]],
) -> None:
    docs = {where: text for text, where in library if not where.endswith("(source)")}
    source = {where: text for text, where in library if where.endswith("(source)")}
    assert sum(map(len, docs.values())) > 5e5 and sum(map(len, source.values())) > 5e5
    assert not [w for w in [*docs, *source] if w.startswith(("test/", "site-packages")) or "/tests/" in w]
    text = docs["textwrap.py (documentation)"]
    assert text.startswith("textwrap\n\n    Text wrapping and filling.\n")
    assert "textwrap.dedent(text)\n\n    Remove any common leading whitespace" in text
    assert any("pydoc_data" in w for w in docs)


def test_source_text_has_no_docstrings_and_still_parses(library: list[tuple[str, str]]) -> None:
    """A docstring held out in one document must not be learnt from another."""
    docs = "\n".join(text for text, where in library if not where.endswith("(source)"))
    for text, where in library:
        if where.endswith("(source)"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
                    left = ast.get_docstring(node)
                    assert left is None or left.splitlines()[0] not in docs or len(left) < 80, (where, left)


def test_no_docstring_is_given_twice(library: list[tuple[str, str]]) -> None:
    blocks = [b for text, where in library if where.endswith("(documentation)") for b in text.split("\n\n")]
    twice = "    Internal: raise an AssertionError"
    assert len(blocks) > 1000 and sum(b.startswith(twice) for b in blocks) <= 1
    headed = [(h, d) for h, d in itertools.pairwise(blocks) if not h.startswith(" ") and d.startswith(" ")]
    assert len(headed) == len(set(headed))


def test_the_parts_of_the_library_make_up_the_whole(library: list[tuple[str, str]], monkeypatch) -> None:
    root = corpora.standard_library()
    monkeypatch.setattr(corpora, "library_files", lambda: [root / "abc.py", root / "textwrap.py"])
    parts = [list(corpora.python_documents(part)) for part in ("python-docs", "python-source")]
    assert sorted(parts[0] + parts[1]) == sorted(corpora.python_documents("python"))
    assert len(parts[0]) == len(parts[1]) == 2
