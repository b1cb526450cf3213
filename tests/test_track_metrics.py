"""metrics.jsonl: what is written is what is read, whatever happens to the process in between."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm.errors import CheckpointError
from minilm.track import read_metrics
from minilm.track.metrics import FILE, SUPERSEDED, MetricsFile, encode


def bits(value: float) -> bytes:
    """The float itself: == would take -0.0 for 0.0."""
    return struct.pack("<d", value)


def written(folder: Path, steps: range) -> None:
    file = MetricsFile(folder)
    for step in steps:
        file.append("train", step, 100.0 + step, {"loss": 1 / (step + 1)})
    file.close()


@settings(deadline=None, max_examples=200)
@given(st.floats())
def test_every_float_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    line = encode("train", 3, 0.0, {"loss": value})
    path = tmp_path_factory.mktemp("m") / FILE
    path.write_bytes(line)
    got = read_metrics(path)[0]["loss"]
    assert bits(got) == bits(value) or (math.isnan(got) and math.isnan(value))


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=st.characters(codec=None)))
def test_every_text_comes_back_also_line_separators_and_halves_of_characters(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("m") / FILE
    path.write_bytes(encode("sample", 0, 0.0, {"samples": [{"text": text}]}) * 2)
    assert [r["samples"][0]["text"] for r in read_metrics(path)] == [text, text]


def test_numbers_that_are_not_finite_are_valid_json_and_never_repaired() -> None:
    values = {"loss": math.nan, "norm": math.inf, "low": -math.inf, "fine": 1.5}
    line = encode("train", 1, 0.0, values)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(line, parse_constant=refuse)
    assert (record["loss"], record["norm"], record["low"], record["fine"]) == (None, None, None, 1.5)
    assert record["nonfinite"] == {"loss": "nan", "norm": "inf", "low": "-inf"}


def test_reader_gives_back_nan_and_infinities(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(encode("train", 1, 0.0, {"loss": math.nan, "norm": -math.inf}))
    record = read_metrics(tmp_path)[0]
    assert math.isnan(record["loss"]) and record["norm"] == -math.inf
    assert set(record["nonfinite"]) == {"loss", "norm"}


def test_scalars_of_torch_and_numpy_and_nested_names(tmp_path: Path) -> None:
    values = {"loss": torch.tensor(0.1), "n": np.int64(7), "auxiliary": {"balance": np.float32(0.1)}}
    (tmp_path / FILE).write_bytes(encode("train", 1, 0.0, values))
    record = read_metrics(tmp_path)[0]
    assert record["loss"] == torch.tensor(0.1).item() != 0.1  # the float32, not what it was rounded from
    assert record["n"] == 7 and record["auxiliary/balance"] == float(np.float32(0.1))


@pytest.mark.parametrize("values", [{"loss": torch.zeros(2)}, {"loss": object()}])
def test_what_is_not_a_number_or_text_is_refused(values: dict) -> None:
    with pytest.raises(TypeError, match="loss"):
        encode("train", 1, 0.0, values)


@pytest.mark.parametrize(
    ("kind", "step", "values"),
    [("trian", 1, {}), ("train", 1.0, {}), ("train", True, {}), ("train", -1, {}), ("train", 1, {"step": 3})],
)
def test_wrong_kind_step_or_reserved_name_is_refused(kind: str, step: int, values: dict) -> None:
    with pytest.raises(ValueError):
        encode(kind, step, 0.0, values)


def test_half_a_last_line_is_passed_over_by_the_reader_and_set_aside_at_open(tmp_path: Path) -> None:
    written(tmp_path, range(1, 4))
    whole = (tmp_path / FILE).read_bytes()
    for cut in (1, 5, 30):
        (tmp_path / FILE).write_bytes(whole[:-cut])
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    half = whole[:-5]
    (tmp_path / FILE).write_bytes(half)
    file = MetricsFile(tmp_path)
    file.append("train", 3, 0.0, {"loss": 9.0})
    file.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1 / 2), (2, 1 / 3), (3, 9.0)]
    torn = json.loads((tmp_path / SUPERSEDED).read_bytes())
    assert half.endswith(torn["text"].encode()) and torn["kind"] == "torn"


@pytest.mark.parametrize(
    "line", [b"{}", b"[1]", b'{"kind": "train"}', b'{"kind": "x", "step": 1}', b'{"ki', b"\xff"]
)
def test_damage_elsewhere_is_an_error_with_the_line_number(tmp_path: Path, line: bytes) -> None:
    written(tmp_path, range(1, 5))
    lines = (tmp_path / FILE).read_bytes().split(b"\n")
    lines[1] = line
    (tmp_path / FILE).write_bytes(b"\n".join(lines))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_missing_file_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run folder"):
        read_metrics(tmp_path)


def test_lines_of_a_killed_process_are_there(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from minilm.track.metrics import MetricsFile\n"
        "file = MetricsFile(Path(sys.argv[1]))\n"
        "for step in range(1, 101): file.append('train', step, 0.0, {'loss': step / 7})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [r["loss"] for r in read_metrics(tmp_path)] == [step / 7 for step in range(1, 101)]


def test_a_full_disk_is_a_users_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    written(tmp_path, range(1, 4))
    file = MetricsFile(tmp_path)
    real = file._file

    class Full:
        """Takes half of a line, as a disk does that fills up in the middle of it."""

        def write(self, line: bytes) -> int:
            return real.write(line[: len(line) // 2])

        def fileno(self) -> int:
            return real.fileno()

    file._file = Full()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="No space left"):
        file.append("train", 4, 0.0, {"loss": 1.0})
    file._file = real
    file.append("train", 4, 0.0, {"loss": 2.0})
    file.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_truncate_moves_later_lines_of_every_kind_and_loses_none(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in range(1, 8):
        file.append("train", step, 0.0, {"loss": step / 3})
        if step % 2 == 0:
            file.append("validation", step, 0.0, {"loss": step / 5})
    file.append("event", 7, 0.0, {"text": "late"})
    before = (tmp_path / FILE).read_bytes()
    assert file.truncate_after(4) == 5  # train 5, 6, 7, validation 6, the event
    assert file.last_step == {"train": 4, "validation": 4}
    file.append("train", 5, 0.0, {"loss": 0.25})
    file.close()
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [2, 4]
    kept = b"".join((tmp_path / FILE).read_bytes().splitlines(keepends=True)[:6])
    assert sorted((kept + (tmp_path / SUPERSEDED).read_bytes()).split(b"\n")) == sorted(before.split(b"\n"))


@pytest.mark.parametrize("moment", ["copy", "replace"])
def test_truncate_killed_half_way_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    written(tmp_path, range(1, 8))
    before = (tmp_path / FILE).read_bytes()
    file = MetricsFile(tmp_path)

    class Killed(Exception):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "copy":
            patch.setattr("minilm.track.metrics._append_safely", kill)
        else:
            patch.setattr(Path, "replace", kill)
        with pytest.raises(Killed):
            file.truncate_after(3)
    file._file.close()
    assert (tmp_path / FILE).read_bytes() == before
    again = MetricsFile(tmp_path)
    assert again.truncate_after(3) == 4
    again.close()
    assert (tmp_path / FILE).read_bytes() + (tmp_path / SUPERSEDED).read_bytes() == before


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    file.sync()
    assert synced == [file._file.fileno()]
    file.close()
