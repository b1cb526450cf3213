"""From a JSON Lines file to a store: what stands where, what is refused, and that nothing half-made is left."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_stores import small_tokenizer

from minilm import cli
from minilm.cli import knowledge as knowledge_command
from minilm.data.tokenizer import Tokenizer
from minilm.errors import ConfigError, DataError
from minilm.knowledge import build as build_module
from minilm.knowledge import files, records
from minilm.knowledge.build import build
from minilm.knowledge.records import Fields
from minilm.knowledge.store import DESCRIPTION, KnowledgeStore
from minilm.knowledge.texts import Texts, statistics, tokenizer_of


def facts(number: int) -> list[dict[str, str]]:
    return [
        {
            "subject": f"cat {n // 4}",
            "relation": ("sat on", "ate", "saw", "is")[n % 4],
            "object": f"dog {n * 7 % 97}",
        }
        for n in range(number)
    ]


def write(path: Path, values: list[dict[str, str]]) -> Path:
    text = "".join(json.dumps(value) + "\n" for value in values)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*words: object) -> int:
    frame = cli.parser("test")
    knowledge_command.add(frame.add_subparsers(required=True))
    arguments: argparse.Namespace = frame.parse_args(["knowledge", *(str(word) for word in words)])
    return cli.guarded(lambda: arguments.run(arguments), debug=arguments.debug)


# ---------------------------------------------------------------- what a store holds


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_rows_decode_to_the_text_of_their_records_cut_to_the_width(name: str, tmp_path: Path) -> None:
    values = [{"text": f"{n} the cat sat {' naïve 中文 soup' * (n % 9)}"} for n in range(150)]
    source, tokenizer = write(tmp_path / name, values), small_tokenizer()
    store = build(source, tokenizer, tmp_path / "s", side=16, width=12).store
    assert torch.equal(store.rows[store.slots.long()], torch.arange(150, dtype=torch.int32))
    texts, cut = Texts(store, tokenizer), 0
    assert texts.note is None
    whole = texts.of(range(150))
    for row, value in enumerate(values):
        ids = tokenizer.encode(value["text"])
        assert store.tokens_of(row) == ids[:12]
        assert texts.decoded(row) == tokenizer.decode(ids[:12])
        assert whole[row] == value["text"]
        cut += len(ids) > 12
    assert 0 < cut < 150 and store.description["counts"]["truncated"] == cut


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_offsets_and_lines_are_those_of_the_file_also_over_many_pieces(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records.pieces, "__defaults__", (100,))
    source = tmp_path / name
    lines = [f'{{"text": "ß {n % 39}"}}\n' for n in range(40)]
    lines[5:5] = ["\n", "  \r\n"]
    lines[-1] = lines[-1].rstrip("\n")
    data = "".join(lines).encode("utf-8-sig")
    source.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    store = build(source, small_tokenizer(), tmp_path / "s", side=8).store
    counts = store.description["counts"]
    assert (store.num_entries, counts["blank_lines"], counts["duplicate_lines"]) == (40, 2, [[1, 42]])
    for row, offset in enumerate(store.offsets.tolist()):
        line = data[offset:].split(b"\n")[0].decode("utf-8-sig")
        assert json.loads(line) == {"text": f"ß {row % 39}"}
    assert Texts(store, small_tokenizer()).records([39, 0, 20]).keys() == {39, 0, 20}
    assert Texts(store, small_tokenizer()).of([39, 0, 20]) == {0: "ß 0", 20: "ß 20", 39: "ß 0"}


def test_the_text_of_a_fact_is_its_parts_and_its_key_the_first_two(tmp_path: Path) -> None:
    zebra = {"subject": "Zebra", "relation": "ate", "object": "soup"}  # " Z" and "Z" are not one token each
    values = [
        *facts(30),
        zebra,
        {"text": "dogs ate soup"},
        {"text": "a cat", "subject": "mat", "object": "dogs"},
    ]
    tokenizer = small_tokenizer()
    store = build(write(tmp_path / "a.jsonl", values), tokenizer, tmp_path / "s", side=8).store
    keys = [tokenizer.encode(f" {v['subject']} {v['relation']}") for v in [*facts(30), zebra]]
    keys += [tokenizer.encode("dogs ate soup"), tokenizer.encode(" mat")]
    texts = [f"{v['subject']} {v['relation']} {v['object']}" for v in [*facts(30), zebra]] + [
        "dogs ate soup",
        "a cat",
    ]
    table = store.token_codes()
    for row, (key, text) in enumerate(zip(keys, texts, strict=True)):
        assert store.tokens_of(row) == tokenizer.encode(text)
        code = table[key].sum(0)
        held = store.codes[int(store.slots[row])] * store.code_scale
        torch.testing.assert_close(held, code / code.norm(), rtol=0, atol=store.code_scale / 2 + 1e-6)
    # Values are in no key part: a query made of them finds nothing.
    values_only = set(tokenizer.encode(" dog 96")) - {token for key in keys for token in key}
    alike = {int(store.classes[token]) for key in keys for token in key}
    for token in values_only:
        assert bool(table[token].any()) == (int(store.classes[token]) in alike)


def test_tokens_that_differ_in_space_or_case_have_one_vector(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    classes = records.token_classes(tokenizer)
    groups: dict[bytes, set[int]] = {}
    for token in range(tokenizer.num_tokens):
        groups.setdefault(tokenizer.token_bytes(token).lower().removeprefix(b" "), set()).add(
            int(classes[token])
        )
    assert all(len(of_word) == 1 for word, of_word in groups.items() if word.isascii() and word)
    named = {tokenizer.token_bytes(token): int(classes[token]) for token in range(3, tokenizer.num_tokens)}
    assert named[b"A"] == named[b"a"] and named[b"a"] != named[b"b"]
    assert named[b" "] not in (named[b"a"], classes[0])
    assert len({int(classes[special]) for special in (0, 1, 2)}) == 3


def test_other_field_names(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"s": "cat", "r": "ate", "o": "soup", "subject": "x"}])
    fields = Fields(subject="s", relation="r", object="o")
    store = build(source, small_tokenizer(), tmp_path / "s", side=1, fields=fields).store
    assert Texts(store, small_tokenizer()).of([0]) == {0: "cat ate soup"}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(6_400, torch.int16), (40_000, torch.int32)])
def test_ids_take_two_bytes_where_they_fit(
    vocab_size: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(small_tokenizer().hf, "wide")
    tokenizer.num_tokens = vocab_size
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [[vocab_size - 1, 3] for _ in texts])
    store = build(write(tmp_path / "a.jsonl", [{"text": "x"}]), tokenizer, tmp_path / "s", side=2).store
    assert store.ids.dtype == dtype and store.tokens_of(0) == [vocab_size - 1, 3]


def test_numbers_of_a_store(tmp_path: Path) -> None:
    values = [{"text": "a a a a"}, {"text": "the cat sat on a mat"}, {"text": "a a a a"}]
    store = build(
        write(tmp_path / "a.jsonl", values), small_tokenizer(), tmp_path / "s", side=4, width=5
    ).store
    lengths = [len(store.tokens_of(row)) for row in range(3)]
    distinct = [len(set(store.tokens_of(row))) for row in range(3)]
    numbers = statistics(store)
    assert (numbers["entries"], numbers["slots"], numbers["occupied"]) == (3, 16, 3)
    assert numbers["tokens_per_entry"] == sum(lengths) / 3 and numbers["longest"] == max(lengths)
    assert numbers["distinct_tokens_per_entry"] == pytest.approx(sum(distinct) / 3)
    assert store.description["counts"]["duplicate_lines"] == [[1, 3]]


# ---------------------------------------------------------------- once, and the same however it is made


def test_processes_make_the_same_store_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records.pieces, "__defaults__", (2000,))
    source = write(tmp_path / "a.jsonl", [*facts(200), {"text": "cat " * 40}])
    serial = build(source, small_tokenizer(), tmp_path / "one", side=16, workers=1)
    parallel = build(source, small_tokenizer(), tmp_path / "two", side=16, workers=2)
    assert content(serial.store.path) == content(parallel.store.path)  # type: ignore[arg-type]
    whole = records.encode_piece(source.read_bytes(), True, small_tokenizer(), 32, Fields())
    assert whole.num_lines == 201 and serial.store.offsets.tolist() == whole.offsets.tolist()


def test_a_second_build_finds_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", facts(50))
    first = build(source, small_tokenizer(), tmp_path / "s", side=8)
    before = content(tmp_path / "s")
    second = build(source.rename(tmp_path / "b.jsonl"), small_tokenizer(), tmp_path / "s", side=8)
    assert not first.reused and second.reused
    assert second.store.fingerprint == first.store.fingerprint and content(tmp_path / "s") == before
    tokenizer_of(second.store)
    words = (
        "--source",
        tmp_path / "b.jsonl",
        "--tokenizer",
        tmp_path / "s/tokenizer",
        "--out",
        tmp_path / "s",
    )
    assert run("build", *words, "--side", 8) == 0
    said = capsys.readouterr().out
    assert "is there already" in said and "50 entries" in said


def test_a_store_made_from_something_else_is_not_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", facts(50))
    build(source, small_tokenizer(), tmp_path / "s", side=8)
    before = content(tmp_path / "s")
    with pytest.raises(DataError, match=r"(?s)2 problems.*side is 8 there, 16 now.*width is 32 there, 9 now"):
        build(source, small_tokenizer(), tmp_path / "s", side=16, width=9)
    with pytest.raises(DataError, match=r"tokenizer is .* there, .* now"):
        build(source, small_tokenizer(300), tmp_path / "s", side=8)
    write(source, facts(51))
    with pytest.raises(DataError, match=r"source_sha256 is .* there, .* now"):
        build(source, small_tokenizer(), tmp_path / "s", side=8)
    assert content(tmp_path / "s") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").write_text("mine")
    with pytest.raises(DataError, match="exists and is not a knowledge store"):
        build(source, small_tokenizer(), tmp_path / "other", side=8)
    assert content(tmp_path / "other") == {"x": b"mine"}


def test_a_source_that_is_gone_or_changed_is_said_and_tokens_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "the cat sat on a mat"}])
    store = build(source, small_tokenizer(), tmp_path / "s", side=1, width=4).store
    cut = small_tokenizer().decode(store.tokens_of(0))
    assert Texts(store, small_tokenizer()).of([0]) == {0: "the cat sat on a mat"}
    source.write_text('{"text": "the cat sat on a hat"}\n')
    changed = Texts(store, small_tokenizer())
    assert changed.of([0]) == {0: cut} and "was changed since the build" in str(changed.note)
    source.unlink()
    gone = Texts(store, small_tokenizer())
    assert gone.of([0]) == {0: cut} and "not there any more" in str(gone.note)
    assert run("info", "--store", tmp_path / "s", "--verify") == 0
    said = capsys.readouterr().out
    assert "not there any more" in said and cut in said and "all checksums are right" in said


# ---------------------------------------------------------------- what is refused


BAD = {
    b'{"text": ""}': "field 'text' is empty",
    b'{"text": " \\n"}': "field 'text' is empty",
    b'{"text": 3}': "field 'text' is a number, not a string",
    b'{"text": ["a"]}': "field 'text' is a list, not a string",
    b"[1]": "a JSON object is needed, not a list",
    b"cat": "not JSON",
    b'{"text": "a"': "not JSON",
    b"\xff": "not UTF-8 (byte 0 of the line)",
    b'{"subject": "a", "relation": "b"}': "no field 'text', and not both 'subject' and 'object'; its fields: "
    "'subject', 'relation'",
    b'{"subject": "", "object": true}': "field 'object' is a truth value, not a string; field 'subject' is empty",
    b'{"text": "\\ud800"}': "a lone surrogate at character 0",
}


def test_all_bad_records_are_told_by_line(tmp_path: Path) -> None:
    source, lines = tmp_path / "a.jsonl", []
    for line in BAD:
        lines += [line, b"", b'{"text": "good"}']
    source.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        build(source, small_tokenizer(), tmp_path / "s", side=8)
    said = str(caught.value)
    assert f"{len(BAD)} problems" in said
    for number, problem in enumerate(BAD.values()):
        assert f"{source}:{3 * number + 1}: {problem}" in said, said
    assert list(tmp_path.iterdir()) == [source]


def test_only_the_first_bad_records_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": ""}\n' * 50 + '{"text": "a"}\n')
    with pytest.raises(DataError, match=r"(?s)a.jsonl:20: .*and 30 more bad records of 51"):
        build(source, small_tokenizer(), tmp_path / "s", side=8)


@pytest.mark.parametrize(("number", "side", "need"), [(5, 2, 4), (65, 8, 16), (17, 4, 8), (1025, 4, 64)])
def test_too_many_entries_name_the_side_that_is_enough(
    number: int, side: int, need: int, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a"}] * number)
    with pytest.raises(
        DataError, match=rf"has {number:,} records.*{side * side:,} slots: choose side {need} "
    ):
        build(source, small_tokenizer(), tmp_path / "s", side=side)


def test_wrong_settings_are_told_together(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", facts(3))
    with pytest.raises(
        ConfigError, match=r"(?s)5 problems.*side is 12.*width is 256.*code_dim is 1.*workers.*field"
    ):
        build(
            source,
            small_tokenizer(),
            tmp_path / "s",
            side=12,
            width=256,
            code_dim=1,
            workers=0,
            fields=Fields(text="object"),
        )


def test_a_source_that_is_missing_empty_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: No such file"):
        build(tmp_path / "b.jsonl", small_tokenizer(), tmp_path / "s")
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="has no records"):
        build(tmp_path / "a.jsonl", small_tokenizer(), tmp_path / "s")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-9])
    with pytest.raises(DataError, match="damaged or cut off"):
        build(tmp_path / "a.jsonl.gz", small_tokenizer(), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * (3 << 20))
    with pytest.raises(DataError, match=r"a.jsonl:2: the line has more than 1 MB"):
        build(tmp_path / "a.jsonl", small_tokenizer(), tmp_path / "s")


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = write(tmp_path / "a.jsonl", facts(3)), records.pieces

    def appended(path: Path) -> object:
        yield from real(path)
        write(path, facts(4))

    monkeypatch.setattr(records, "pieces", appended)
    with pytest.raises(DataError, match="was changed while it was read"):
        build(source, small_tokenizer(), tmp_path / "s")
    assert list(tmp_path.iterdir()) == [source]


def test_a_disk_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", facts(3))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "publish", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        build(source, small_tokenizer(), tmp_path / "s", side=2)
    assert list(tmp_path.iterdir()) == [source]


def test_two_builds_of_one_store_at_a_time_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, real = write(tmp_path / "a.jsonl", facts(3)), records.pieces

    def second(path: Path) -> object:
        monkeypatch.setattr(records, "pieces", real)
        with pytest.raises(DataError, match="Another process is making"):
            build(source, small_tokenizer(), tmp_path / "s", side=2)
        yield from real(path)

    monkeypatch.setattr(records, "pieces", second)
    assert not build(source, small_tokenizer(), tmp_path / "s", side=2).reused


_SLOW = """
import os, sys, time
from pathlib import Path
from minilm.data.tokenizer import Tokenizer
from minilm.knowledge import build as module, records
if __name__ == "__main__":
    real = records.pieces
    def slow(path):
        for number, piece in enumerate(real(path, 2000)):
            yield piece
            if number == 3:
                print("under way", flush=True)
                time.sleep(60)
    records.pieces = slow
    folder = Path(sys.argv[1])
    module.build(folder / "a.jsonl", Tokenizer.load(folder / "t"), folder / "s", workers=2)
"""


def test_ctrl_c_leaves_nothing_and_processes_say_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", facts(400))
    small_tokenizer().save(tmp_path / "t")
    (tmp_path / "slow.py").write_text(_SLOW)
    words = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "under way\n"
        assert (tmp_path / "s.building").is_dir()
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does it: to all processes
        _, said = child.communicate(timeout=120)
    assert child.returncode != 0 and said.count("Traceback") == 1 and "KeyboardInterrupt" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "slow.py", "t"]


@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_an_interrupt_leaves_nothing(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", facts(3))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if moment == "reading":
        monkeypatch.setattr(records, "encode_piece", interrupted)
    else:
        monkeypatch.setattr(files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(source, small_tokenizer(), tmp_path / "s", side=2)
    assert list(tmp_path.iterdir()) == [source]


def test_what_a_killed_build_left_is_in_nobodys_way(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", facts(3))
    (tmp_path / "s.building").mkdir()
    (tmp_path / "s.building" / DESCRIPTION).write_text("{")
    store = build(source, small_tokenizer(), tmp_path / "s", side=2).store
    assert KnowledgeStore.open(tmp_path / "s").fingerprint == store.fingerprint
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert names == {"knowledge.json", "knowledge.safetensors", "tokenizer"}


def test_errors_are_a_paragraph_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", facts(3))
    small_tokenizer().save(tmp_path / "t")
    words = ("build", "--source", source, "--tokenizer", tmp_path / "t", "--out", tmp_path / "s")
    assert run(*words, "--side", "1") == 2
    assert "choose side 2 (4 slots)" in " ".join(capsys.readouterr().err.split())
    assert run("info", "--store", tmp_path / "s") == 2
    assert "There is no knowledge store" in capsys.readouterr().err
    assert run(*words, "--side", 2) == 0 and "built in" in capsys.readouterr().out
    assert run("info", "--store", tmp_path / "s", "--show", -1) == 2
    assert run("info", "--store", tmp_path / "s", "--show", 2) == 0
    assert "row 1, slot" in capsys.readouterr().out
