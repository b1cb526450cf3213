"""Editing: the entry says something else, everything else stays, and the new store knows where it comes from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from data_stores import small_tokenizer
from test_knowledge_build import content, facts, run, write

from minilm.errors import ConfigError, DataError
from minilm.knowledge.build import build
from minilm.knowledge.editing import Edit, edit, read_edits
from minilm.knowledge.store import KnowledgeStore
from minilm.knowledge.texts import Texts


def made(folder: Path, side: int = 8, number: int = 40) -> KnowledgeStore:
    values = [
        *facts(number - 2),
        {"text": "the mat ate soup"},
        {"text": "cat 7 saw 42", "subject": "cat 7", "object": "42"},
    ]
    return build(write(folder / "a.jsonl", values), small_tokenizer(), folder / "s", side=side).store


def edited(store: KnowledgeStore, folder: Path, *edits: Edit, move: bool = False) -> KnowledgeStore:
    return edit(store, small_tokenizer(), list(edits), folder, move=move)[0]


def test_a_new_object_changes_the_tokens_of_that_entry_and_nothing_else(tmp_path: Path) -> None:
    store = made(tmp_path)
    before = content(tmp_path / "s")
    new = edited(store, tmp_path / "e", Edit(row=5, object="naïve soup"))
    assert Texts(new, small_tokenizer()).decoded(5) == "cat 1 ate naïve soup"
    assert Texts(new, small_tokenizer()).of([5, 4]) == {5: "cat 1 ate naïve soup", 4: "cat 1 sat on dog 28"}
    slot = int(store.slots[5])
    others = torch.arange(store.num_slots) != slot
    assert torch.equal(new.ids[others], store.ids[others])
    assert torch.equal(new.lengths[others], store.lengths[others])
    for name in ("codes", "rows", "slots", "idf", "classes", "offsets", "row_means", "column_means"):
        assert torch.equal(getattr(new, name), getattr(store, name)), name  # the key part is the same
    assert new.fingerprint != store.fingerprint and content(tmp_path / "s") == before
    KnowledgeStore.open(tmp_path / "e").verify()


def test_a_store_knows_its_ancestors(tmp_path: Path) -> None:
    store = made(tmp_path)
    child = edited(store, tmp_path / "e1", Edit(row=5, object="x"))
    grandchild = edited(child, tmp_path / "e2", Edit(row=6, text="the mat"), Edit(row=5, object="y"))
    for old in (store, child, grandchild):
        assert grandchild.descends_from(old.fingerprint)
    assert not store.descends_from(child.fingerprint) and not child.descends_from(grandchild.fingerprint)
    log = [
        (step["parent"], [(e["row"], e["old_text"], e["new_text"]) for e in step["edits"]])
        for step in grandchild.description["lineage"]
    ]
    assert log == [
        (store.fingerprint, [(5, "cat 1 ate dog 35", "cat 1 ate x")]),
        (child.fingerprint, [(6, "cat 1 saw dog 42", "the mat"), (5, "cat 1 ate x", "cat 1 ate y")]),
    ]
    assert Texts(grandchild, small_tokenizer()).of([5, 6, 7]) == {
        5: "cat 1 ate y",
        6: "the mat",
        7: "cat 1 is dog 49",
    }
    # Edited back, the entries are what they were, but for the line of descent.
    back = edited(child, tmp_path / "e3", Edit(row=5, object="dog 35"))
    assert back.fingerprint == store.fingerprint and torch.equal(back.ids, store.ids)


def test_a_new_text_gets_a_new_code_in_the_old_slot(tmp_path: Path) -> None:
    store, tokenizer = made(tmp_path), small_tokenizer()
    text = "字符 soup zebra"  # words that no key part had
    new = edited(store, tmp_path / "e", Edit(row=3, text=text))
    slot = int(store.slots[3])
    assert int(new.slots[3]) == slot
    fresh = [t for t in tokenizer.encode(text) if store.idf[t] == 0]
    assert fresh and all(float(new.idf[t]) == pytest.approx(math.log(41)) for t in fresh)
    had = store.idf > 0
    assert torch.equal(new.token_codes()[had], store.token_codes()[had])
    code = new.token_codes()[tokenizer.encode(text)].sum(0)
    held = new.codes[slot] * new.code_scale
    torch.testing.assert_close(held, code / code.norm(), rtol=0, atol=new.code_scale / 2 + 1e-6)
    row, column = divmod(slot, 8)
    grid = (new.codes.float() * new.code_scale).view(8, 8, -1)
    there = (new.lengths > 0).view(8, 8)
    torch.testing.assert_close(new.row_means[row], grid[row].sum(0) / there[row].sum())
    torch.testing.assert_close(new.column_means[column], grid[:, column].sum(0) / there[:, column].sum())


def test_a_moved_entry_goes_to_the_empty_slot_nearest_to_its_code(tmp_path: Path) -> None:
    store, tokenizer = made(tmp_path), small_tokenizer()
    new, done = edit(
        store,
        tokenizer,
        [Edit(row=3, text="cat 8 saw dog"), Edit(row=9, text="cat 8 saw dog")],
        tmp_path / "e",
        move=True,
    )
    new.verify()
    empty = set(torch.nonzero(store.lengths == 0).flatten().tolist())
    for one in done:
        code = new.codes[one.slot].float() * new.code_scale
        distance = {
            slot: float(
                ((code - store.row_means[slot // 8]) ** 2).sum()
                + ((code - store.column_means[slot % 8]) ** 2).sum()
            )
            for slot in empty
        }
        assert distance[one.slot] <= min(distance.values()) + 1e-3
        assert int(new.slots[one.row]) == one.slot and int(new.rows[one.old_slot]) == -1
        assert (
            not new.ids[one.old_slot].any()
            and not new.codes[one.old_slot].any()
            and not new.lengths[one.old_slot]
        )
        empty = empty - {one.slot} | {one.old_slot}
    assert new.num_entries == store.num_entries


def test_a_text_that_is_too_long_is_cut(tmp_path: Path) -> None:
    new, done = edit(made(tmp_path), small_tokenizer(), [Edit(row=0, text="soup " * 50)], tmp_path / "e")
    assert new.tokens_of(0) == small_tokenizer().encode("soup " * 50)[:32]
    assert done[0].num_tokens == len(small_tokenizer().encode("soup " * 50))


def test_parts_of_a_record_with_a_text_of_its_own(tmp_path: Path) -> None:
    store = made(tmp_path)
    new = edited(store, tmp_path / "e", Edit(row=39, object="99"))
    assert Texts(new, small_tokenizer()).of([39]) == {39: "cat 7 saw 99"}
    assert torch.equal(new.codes, store.codes)  # the key part is its subject
    with pytest.raises(DataError, match=r"does not hold its subject 'a' exactly once"):
        write(tmp_path / "b.jsonl", [{"text": "a cat saw a dog", "subject": "a", "object": "dog"}])
        other = build(tmp_path / "b.jsonl", small_tokenizer(), tmp_path / "s2", side=1).store
        edited(other, tmp_path / "e2", Edit(row=0, subject="the"))


def test_all_impossible_edits_are_told(tmp_path: Path) -> None:
    store = made(tmp_path)
    edits = [
        Edit(row=40, text="x", where="1"),
        Edit(row=1, where="2"),
        Edit(text="x", where="3"),
        Edit(row=2, find="cat", text="x", where="4"),
        Edit(find="no such words", text="x", where="5"),
        Edit(find="cat 9 ", text="x", where="6"),
        Edit(row=7, text="x", where="7"),
        Edit(row=7, text="y", where="8"),
        Edit(row=8, text=" ", where="9"),
        Edit(row=38, object="x", where="10"),
    ]
    with pytest.raises(DataError) as caught:
        edited(store, tmp_path / "e", *edits)
    said = str(caught.value)
    for problem in (
        "9 problems",
        "1: there is no row 40: the store has rows 0 to 39",
        "2: say what shall stand there",
        "3: say which entry",
        "4: say which entry",
        "5: no entry contains 'no such words'",
        "6: 2 entries contain 'cat 9 '; name the row:\n     row 36: cat 9 sat on dog 58\n     row 37",
        "8: row 7 is also replaced by 7",
        "9: field 'text' is empty",
        "10: the record has a text and no object: give the whole `text`",
    ):
        assert problem in said, said
    assert not (tmp_path / "e").exists()


def test_without_its_source_an_entry_is_replaced_by_a_whole_text_only(tmp_path: Path) -> None:
    store = made(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"give the whole `text` \(The source .* is not there any more"):
        edited(store, tmp_path / "e", Edit(row=5, object="x"))
    new = edited(store, tmp_path / "e", Edit(row=5, text="cat 1 ate x", subject="cat 1"))
    again = edited(new, tmp_path / "e2", Edit(row=5, object="x", relation="ate", text="y"))
    assert Texts(again, small_tokenizer()).of([5]) == {5: "y"}


def test_a_full_store_has_no_slot_to_move_to_and_an_old_folder_stays(tmp_path: Path) -> None:
    store = made(tmp_path, side=4, number=16)
    with pytest.raises(ConfigError, match="no empty slot"):
        edited(store, tmp_path / "e", Edit(row=5, text="x"), move=True)
    with pytest.raises(DataError, match="exists: an edited store is a new one"):
        edited(store, tmp_path / "s", Edit(row=5, text="x"))
    assert KnowledgeStore.open(tmp_path / "s").fingerprint == store.fingerprint


def test_an_edited_store_is_not_what_a_build_would_make(tmp_path: Path) -> None:
    edited(made(tmp_path), tmp_path / "e", Edit(row=5, text="x"))
    with pytest.raises(DataError, match="It was edited since it was built"):
        build(tmp_path / "a.jsonl", small_tokenizer(), tmp_path / "e", side=8)


def test_edits_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path)
    path = tmp_path / "edits.jsonl"
    path.write_text('{"row": 5, "object": "x"}\n\n{"find": "the mat ate", "text": "the mat"}\n')
    assert [(one.row, one.find, one.where) for one in read_edits(path)] == [
        (5, None, f"{path}:1"),
        (None, "the mat ate", f"{path}:3"),
    ]
    words = ("edit", "--store", tmp_path / "s")
    assert run(*words, "--edits", path, "--out", tmp_path / "e") == 0
    said = capsys.readouterr().out
    assert "2 entries replaced" in said and "now: cat 1 ate x" in said and "keeps slot" in said
    assert run(*words, "--row", 5, "--text", "mat", "--move", "--out", tmp_path / "e2") == 0
    assert "moved from slot" in capsys.readouterr().out
    assert run("info", "--store", tmp_path / "e") == 0
    said = capsys.readouterr().out
    assert "edit 1, of the store" in said and "row 38: the mat ate soup" in said
    assert run(*words, "--edits", path, "--row", 5, "--out", tmp_path / "e3") == 2
    assert "not both" in capsys.readouterr().err


def test_bad_edits_are_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(
        "x\n" + json.dumps({"rwo": 1, "text": 3}) + "\n" + json.dumps({"row": True, "text": "a"}) + "\n[]\n"
    )
    with pytest.raises(DataError) as caught:
        read_edits(path)
    said = str(caught.value)
    for problem in (
        ":1: not JSON",
        ":2: 'rwo' is not one of",
        ":2: 'text' must be of type str",
        ":3: 'row' must be of type int",
        ":4: a JSON object",
    ):
        assert problem in said, said
    path.write_text("\n")
    with pytest.raises(DataError, match="has no edits"):
        read_edits(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_edits(tmp_path / "none")
