"""Codes against a slow loop; a store that nobody changes, and none that was changed is opened."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minilm.errors import CheckpointError, ConfigError
from minilm.knowledge import codes as code_functions
from minilm.knowledge.codes import entry_codes, inverse_frequencies, random_table, window_codes
from minilm.knowledge.store import DECIDE, DESCRIPTION, FOLLOW, TENSORS, KnowledgeStore


def write(store: KnowledgeStore, folder: Path) -> Path:
    """The two files of a store, without the build."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: getattr(store, name) for name in (*DECIDE, *FOLLOW)}, folder / TENSORS)
    (folder / DESCRIPTION).write_text(json.dumps(store.description))
    return folder


def slow_window(table: Tensor, tokens: Tensor, segments: Tensor, window: int, decay: float) -> Tensor:
    """Position by position, token by token."""
    out = torch.zeros(*tokens.shape, table.shape[1], dtype=torch.float64)
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            if segments[b, t] == 0:
                continue
            for j in range(window):
                if t - j >= 0 and segments[b, t - j] == segments[b, t]:
                    out[b, t] += decay**j * table[tokens[b, t - j]].double()
            norm = out[b, t].norm()
            out[b, t] /= norm if norm > 0 else 1.0
    return out


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize(("window", "decay"), [(16, 0.95), (3, 1.0), (1, 0.5), (50, 0.9)])
def test_window_codes_are_those_of_a_slow_loop(window: int, decay: float) -> None:
    table = torch.randn(30, 8)
    table[:3] = 0.0  # tokens that are in no key part
    tokens = torch.randint(30, (4, 25))
    segments = torch.tensor([[0] * 4 + [1] * 9 + [2] * 12, [1] * 25, [1, 2] * 12 + [0], [3] * 5 + [0] * 20])
    fast = window_codes(table, tokens, segments, window, decay)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(
        fast.double(), slow_window(table, tokens, segments, window, decay), rtol=0, atol=2e-6
    )
    everywhere = window_codes(table, tokens, None, window, decay)
    torch.testing.assert_close(
        everywhere, window_codes(table, tokens, torch.ones_like(tokens), window, decay)
    )


def test_a_code_sees_no_later_token_and_no_other_document() -> None:
    table, tokens = torch.randn(30, 8), torch.randint(30, (2, 20))
    segments = torch.tensor([[1] * 8 + [2] * 12] * 2)
    before = window_codes(table, tokens, segments)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % 30
    assert torch.equal(window_codes(table, changed, segments)[:, :12], before[:, :12])
    changed = tokens.clone()
    changed[:, :8] = (changed[:, :8] + 7) % 30
    assert torch.equal(window_codes(table, changed, segments)[:, 8:], before[:, 8:])


def test_codes_under_autocast_are_float32_and_the_same() -> None:
    table, tokens = torch.randn(30, 8), torch.randint(30, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(window_codes(table, tokens), window_codes(table, tokens).float())
        inside = window_codes(table, tokens)
    assert torch.equal(inside, window_codes(table, tokens))


def test_entry_codes_and_frequencies_are_those_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_functions, "_CHUNK", 3)  # several chunks
    classes = torch.tensor([0, 1, 2, 1, 4, 5])  # 3 is written otherwise, and means what 1 means
    keys = [[1, 3, 2], [2], [], [3, 3], [1, 4], [4, 2, 2], [0]]
    flat = torch.tensor([token for key in keys for token in key])
    starts = torch.tensor([0, 3, 4, 4, 6, 8, 11])
    idf = inverse_frequencies(classes, flat, starts)
    for token in range(6):
        holding = sum(any(classes[other] == classes[token] for other in key) for key in keys)
        expected = math.log((len(keys) + 1) / holding) if holding else 0.0
        assert float(idf[token]) == pytest.approx(expected)
    table = torch.randn(6, 4)
    fast = entry_codes(table, flat, starts)
    for n, key in enumerate(keys):
        total = sum((table[token].double() for token in key), torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(
            fast[n].double(), total / max(float(total.norm()), 1e-12), rtol=0, atol=1e-6
        )


def test_the_vectors_of_tokens_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = random_table(100, 64, seed=3)
    torch.manual_seed(6)
    assert torch.equal(first, random_table(100, 64, seed=3))
    assert not torch.equal(first, random_table(100, 64, seed=4))
    assert abs(float(first.mean())) < 0.05 and float(first.std()) == pytest.approx(1, abs=0.05)
    # The stream that NumPy promises not to change.
    assert first[0, :3].tolist() == pytest.approx([1.78862847, 0.43650985, 0.09649747])


# ---------------------------------------------------------------- the store in memory


@pytest.mark.parametrize(("num_entries", "vocab_size"), [(None, 200), (200, 6400), (37, 40_000), (0, 50)])
def test_slots_and_rows_are_each_others_inverse(num_entries: int | None, vocab_size: int) -> None:
    store = KnowledgeStore.random(16, 8, vocab_size, num_entries)
    n = 256 if num_entries is None else num_entries
    assert store.num_entries == n and store.num_slots == 256
    assert torch.equal(store.rows[store.slots.long()], torch.arange(n, dtype=torch.int32))
    empty = torch.ones(256, dtype=torch.bool)
    empty[store.slots.long()] = False
    assert torch.equal(store.rows == -1, empty) and torch.equal(store.lengths == 0, empty)
    assert not store.ids[empty].any() and not store.codes[empty].any()
    beyond = torch.arange(8) >= store.lengths[:, None]
    assert not store.ids[beyond].any()
    dtypes = {
        "ids": torch.int16 if vocab_size <= 32767 else torch.int32,
        "lengths": torch.uint8,
        "codes": torch.int8,
        "rows": torch.int32,
        "slots": torch.int32,
        "offsets": torch.int64,
        "row_means": torch.float32,
        "column_means": torch.float32,
    }
    assert {name: getattr(store, name).dtype for name in dtypes} == dtypes
    store.verify()


def test_codes_of_the_store_are_the_codes_of_its_entries() -> None:
    store = KnowledgeStore.random(8, 6, 50, 40, code_dim=16, seed=4)
    table = store.token_codes().double()
    codes = torch.zeros(64, 16, dtype=torch.float64)
    for row in range(40):
        total = table[store.tokens_of(row)].sum(0)
        codes[int(store.slots[row])] = total / total.norm()
    held = store.codes.double() * store.code_scale
    assert (held - codes).abs().max() <= store.code_scale / 2 + 1e-6
    grid, there = held.view(8, 8, 16), (store.lengths > 0).view(8, 8)
    for name, across in (("row_means", 1), ("column_means", 0)):
        expected = grid.sum(across) / there.sum(across)[:, None]
        torch.testing.assert_close(getattr(store, name).double(), expected, rtol=0, atol=1e-6)


def test_ids_at_the_ends_of_both_types_come_back() -> None:
    for vocab_size, dtype in ((32767, torch.int16), (32768, torch.int32), (151_936, torch.int32)):
        store = KnowledgeStore.random(2, 4, vocab_size)
        assert store.ids.dtype == dtype and int(store.ids.min()) >= 0
        assert max(store.tokens_of(0)) < vocab_size


def test_a_store_is_shared_and_moves_once() -> None:
    store = KnowledgeStore.random(8, 4, 50)
    assert copy.deepcopy(store) is store and copy.deepcopy({"a": [store]})["a"][0] is store
    assert store.to("cpu") is store
    there = store.to("meta")
    assert there is store.to("meta") and there.to("cpu") is store and there.to("meta") is there
    assert {tensor.device.type for tensor in there.tensors().values()} == {"meta"}
    assert there.fingerprint == store.fingerprint and store.ids.device.type == "cpu"
    assert store.token_codes() is store.token_codes()


def test_the_fingerprint_is_of_the_content() -> None:
    one = KnowledgeStore.random(8, 4, 50)
    assert one.fingerprint == KnowledgeStore.random(8, 4, 50).fingerprint
    others = [
        KnowledgeStore.random(8, 4, 50, seed=1),
        KnowledgeStore.random(8, 4, 50, 63),
        KnowledgeStore.random(8, 4, 51),
        KnowledgeStore.random(8, 5, 50),
        KnowledgeStore.random(8, 4, 50, code_dim=32),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert one.descends_from(one.fingerprint) and not one.descends_from(others[0].fingerprint)


# ---------------------------------------------------------------- the store on the disk


def test_a_store_comes_back_from_the_disk(tmp_path: Path) -> None:
    store = KnowledgeStore.random(8, 4, 50, 60)
    opened = KnowledgeStore.open(write(store, tmp_path / "s"), tokenizer_fingerprint="random-50")
    assert opened.fingerprint == store.fingerprint
    for name, tensor in store.tensors().items():
        assert torch.equal(getattr(opened, name), tensor), name


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write(KnowledgeStore.random(8, 4, 50), tmp_path / "s")
    with pytest.raises(
        ConfigError, match=r"made with the tokenizer .* \(fingerprint random-50\).*another one \(x\)"
    ):
        KnowledgeStore.open(folder, tokenizer_fingerprint="x")


@pytest.mark.parametrize("name", [*DECIDE, *FOLLOW])
def test_one_flipped_bit_is_refused_and_named(name: str, tmp_path: Path) -> None:
    folder = write(KnowledgeStore.random(8, 4, 50), tmp_path / "s")
    tensors = load_file(folder / TENSORS)
    as_bytes = tensors[name].clone().view(torch.uint8).view(-1)
    as_bytes[as_bytes.numel() // 2] ^= 1
    tensors[name] = as_bytes.view(tensors[name].dtype).view(tensors[name].shape)
    save_file(tensors, folder / TENSORS)
    with pytest.raises(CheckpointError, match=f"{name} differs from its checksum"):
        KnowledgeStore.open(folder)


def test_a_permuted_store_is_refused(tmp_path: Path) -> None:
    folder = write(KnowledgeStore.random(8, 4, 50), tmp_path / "s")
    tensors = load_file(folder / TENSORS)
    for name in ("ids", "lengths", "codes"):  # the entries, but not the rows that name them
        tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / TENSORS)
    with pytest.raises(CheckpointError, match=r"(?s)3 problems.*ids differs.*lengths differs.*codes differs"):
        KnowledgeStore.open(folder)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    folder = write(KnowledgeStore.random(8, 4, 50), tmp_path / "s")
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-100])
    for verify in (True, False):
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            KnowledgeStore.open(folder, verify=verify)


def test_tensors_of_another_store_are_refused_with_every_difference(tmp_path: Path) -> None:
    folder = write(KnowledgeStore.random(8, 4, 50), tmp_path / "s")
    other = write(KnowledgeStore.random(8, 5, 50, 60), tmp_path / "o")
    (other / TENSORS).rename(folder / TENSORS)
    with pytest.raises(CheckpointError, match=r"(?s)ids is .*64, 5.*64, 4.*offsets is"):
        KnowledgeStore.open(folder, verify=False)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": "x"}, "does not describe a knowledge store"),
        ({"version": 7}, "has version 7, this minilm reads version 1"),
        ({"seed": 9}, "settings in knowledge.json were altered"),
        ({"lineage": None}, "lacks lineage"),
    ],
)
def test_a_description_that_was_altered_is_refused(change: dict, problem: str, tmp_path: Path) -> None:
    folder = write(KnowledgeStore.random(8, 4, 50), tmp_path / "s")
    description = {**json.loads((folder / DESCRIPTION).read_text()), **change}
    description = {key: value for key, value in description.items() if value is not None}
    (folder / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=problem):
        KnowledgeStore.open(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no knowledge store in"):
        KnowledgeStore.open(tmp_path)
    folder = write(KnowledgeStore.random(8, 4, 50), tmp_path / "s")
    (folder / TENSORS).unlink()
    with pytest.raises(CheckpointError, match="not a whole knowledge store"):
        KnowledgeStore.open(folder)
    (folder / DESCRIPTION).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        KnowledgeStore.open(folder)


def test_slots_that_do_not_hold_every_row_once_are_refused() -> None:
    store = KnowledgeStore.random(8, 4, 50)
    tensors = {name: value.clone() for name, value in store.tensors().items() if name != "slots"}
    tensors["rows"][3] = tensors["rows"][4]
    with pytest.raises(CheckpointError, match="every source row exactly once"):
        KnowledgeStore.sealed(store.description, tensors).verify()
    tensors["rows"] = store.rows.clone()
    tensors["lengths"][5] = 0
    with pytest.raises(CheckpointError, match="which slots are empty"):
        KnowledgeStore.sealed(store.description, tensors).verify()
