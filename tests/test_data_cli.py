"""`minilm data` and `minilm tokenizer`, as a user meets them."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pytest
from data_stores import small_tokenizer, store_of, texts, write_jsonl
from rich.console import Console

from minilm import cli
from minilm.cli import data as data_command
from minilm.cli import tokenizer as tokenizer_command
from minilm.data.build import build
from minilm.data.loader import Loader
from minilm.data.rows import Rows
from minilm.data.show import row_text, show


def run(*words: object) -> int:
    frame = cli.parser("test")
    subparsers = frame.add_subparsers(required=True)
    data_command.add(subparsers)
    tokenizer_command.add(subparsers)
    arguments: argparse.Namespace = frame.parse_args([str(word) for word in words])
    return cli.guarded(lambda: arguments.run(arguments), debug=arguments.debug)


def test_from_text_to_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts(300))
    tokenizer, store = tmp_path / "tokenizer", tmp_path / "store"
    assert run("tokenizer", "train", "--source", corpus, "--vocab-size", 320, "--out", tokenizer) == 0
    assert "320 tokens from" in capsys.readouterr().out
    assert run("tokenizer", "info", tokenizer, "--source", corpus, "--text", "the cat") == 0
    assert "bytes per token" in capsys.readouterr().out
    build_words = ("data", "build", "--source", corpus, "--tokenizer", tokenizer, "--out", store)
    assert run(*build_words) == 0
    assert "built in" in capsys.readouterr().out
    assert run(*build_words) == 0
    assert "is there already" in capsys.readouterr().out
    assert run("data", "info", store, "--verify") == 0
    assert "all checksums are right" in capsys.readouterr().out
    assert run("data", "show", store, "--sequence-length", 16, "--rows", 1, "--positions", 3) == 0
    shown = capsys.readouterr().out
    assert "16 targets" in shown or "15 targets" in shown or "14 targets" in shown
    assert "->" in shown


def test_errors_are_a_paragraph_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_tokenizer().save(tmp_path / "tokenizer")
    corpus = write_jsonl(tmp_path / "c.jsonl", texts(5))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 1}\n')
    folder, out = tmp_path / "tokenizer", ("--out", tmp_path / "s")
    build, train = (
        ("data", "build", *out, "--source"),
        ("tokenizer", "train", "--out", tmp_path / "t", "--source"),
    )
    cases = [
        ((*build, "nowhere", "--tokenizer", folder), "nowhere"),
        ((*build, bad, "--tokenizer", folder), "bad.jsonl:1"),
        ((*build, corpus, "--tokenizer", tmp_path / "none"), "no tokenizer folder"),
        ((*build, corpus), "--tokenizer DIR"),
        (("data", "show", tmp_path / "nothing"), "name a store"),
        (("data", "info", tmp_path), "has no manifest.json"),
        ((*train, corpus, "--vocab-size", 10), "vocab_size is 10"),
        ((*train, corpus, "--out", folder), "--force"),
        ((*train, bad), "bad.jsonl:1"),
        ((*train, "synthetic:markov"), "no text"),
    ]
    for words, expected in cases:
        assert run(*words) == 2, words
        message = " ".join(capsys.readouterr().err.split())
        assert expected in message and "Traceback" not in message, message


def test_the_same_tokenizer_is_trained_once_and_another_one_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", texts(60))
    words = ("tokenizer", "train", "--out", tmp_path / "t", "--source", corpus, "--vocab-size")
    assert run(*words, 300) == 0
    before = (tmp_path / "t" / "tokenizer.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(*words, 300) == 0
    assert "there already" in capsys.readouterr().out
    assert (tmp_path / "t" / "tokenizer.json").stat().st_mtime_ns == before
    assert run(*words, 310) == 2
    write_jsonl(corpus, texts(61))
    assert run(*words, 300) == 2
    assert (tmp_path / "t" / "tokenizer.json").stat().st_mtime_ns == before
    assert run(*words, 300, "--force") == 0
    assert (tmp_path / "t" / "tokenizer.json").stat().st_mtime_ns != before


def test_skipped_lines_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_tokenizer().save(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "a.jsonl", texts(100))
    with path.open("a") as file:
        file.write('{"text": 1}\nnonsense\n')
    words = (
        "data",
        "build",
        "--source",
        path,
        "--tokenizer",
        tmp_path / "tokenizer",
        "--out",
        tmp_path / "s",
    )
    assert run(*words, "--on-bad-line", "skip") == 0
    shown = capsys.readouterr().out
    assert "2 bad documents passed over (1 text is not a string, 1 not JSON)" in shown
    assert f"{path}:101" in shown and f"{path}:102" in shown


def test_a_trained_tokenizer_has_not_seen_the_validation_documents(tmp_path: Path) -> None:
    lines = texts(200)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", lines)
    used = tokenizer_command._Texts(data_sources(corpus), 0.1, 1e9, skip_bad=False)
    store = build(tmp_path / "s", [str(corpus)], small_tokenizer(), validation_fraction=0.1).store
    held_out = {
        small_tokenizer().decode(s.document(n))
        for s in store.shards("validation")
        for n in range(s.num_documents)
    }
    assert set(used) | held_out == set(lines) and not set(used) & held_out
    half = tokenizer_command._Texts(data_sources(corpus), 0.0, corpus.stat().st_size / 2, skip_bad=False)
    assert 60 < len(list(half)) < 140


def data_sources(path: Path) -> list:
    from minilm.data.sources import parse_sources

    return parse_sources([str(path)])


def test_shown_rows_are_the_batch_itself(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", ["the [bold]cat[/bold] sat", "a mat <|eos|>", "dogs"])
    store = build(tmp_path / "s", [str(tmp_path / "c.jsonl")], small_tokenizer(), validation_fraction=0).store
    loader = Loader(Rows(store, "train", 40), batch_rows=1, micro_batch=1)
    (batch,) = loader.step(0)
    text = row_text(batch, 0, small_tokenizer()).plain
    # Borders, what opens a document as context only, everything else a target: EOS too.
    assert text.startswith(
        "┃[<|bos|>]the [bold]cat[/bold] sat<|eos|>┃[<|bos|>]a mat <|eos|><|eos|>┃[<|bos|>]dogs<|eos|>"
    )
    assert "positions of padding" in text
    console = Console(record=True, width=160, file=io.StringIO())
    show(console, "title", [batch], loader.where(0).rows, small_tokenizer(), num_rows=1, num_positions=40)
    shown = console.export_text()
    lines = [line.split() for line in shown.splitlines() if "->" in line]
    assert len(lines) == int(batch.num_targets())
    first = next(line for line in lines if line[0] == "0")
    assert first[1:3] == ["1", "<|bos|>"] and first[4] == str(int(batch.targets[0, 0]))


def test_validation_is_shown_in_the_order_of_the_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_of(tmp_path / "s", {"a": [[1, 2]]}, validation={"a": [[11, 12, 13, 14, 15, 16]]})
    words = ("data", "show", tmp_path / "s", "--split", "validation", "--sequence-length", 2, "--rows", 2)
    assert run(*words) == 0
    shown = capsys.readouterr().out
    assert "row 0: a document 0 · 2 targets" in shown and "┃[13 ]14 15" in shown
    assert run(*words, "--step", 1) == 0
    assert "row 2: a document 0 · 1 targets" in capsys.readouterr().out
    assert run(*words, "--step", 2) == 2


def test_token_ids_are_shown_where_there_is_no_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_of(tmp_path / "s", {"a": [[11, 12, 13, 14, 15]]})
    assert run("data", "show", tmp_path / "s", "--sequence-length", 4, "--rows", 1) == 0
    shown = capsys.readouterr().out
    assert "┃[11 ]12 13 14 15" in shown


def test_interrupting_a_build_says_that_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tokenizer().save(tmp_path / "tokenizer")
    corpus = write_jsonl(tmp_path / "c.jsonl", texts(50))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minilm.data.encoding.Corpus.flush", interrupted)
    words = (
        "data",
        "build",
        "--source",
        corpus,
        "--tokenizer",
        tmp_path / "tokenizer",
        "--out",
        tmp_path / "s",
    )
    assert run(*words) == 130
    assert "goes on from here" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(*words) == 0
