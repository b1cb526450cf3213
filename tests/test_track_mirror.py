"""SwanLab as a mirror: what it shows is what metrics.jsonl says."""

from __future__ import annotations

import importlib.util
import math
import queue
import time
from pathlib import Path
from typing import Any

import pytest
from swanlab_stand_in import Told, noted, tracker

from minilm.track import dashboard, read_metrics
from minilm.track.metrics import encode
from minilm.track.mirror import follow, values_of


def test_everything_is_mirrored_in_order_and_flattened(tmp_path: Path, fake: Any) -> None:
    notes, told = fake("works"), Told()
    run = tracker(tmp_path / "run", told)
    for step in range(1, 31):
        run.log("train", step, {"loss": step / 7, "auxiliary": {"balance": 0.5}, "text": "no number"})
    run.log("validation", 30, {"loss": 2.5})
    run.sample(30, [{"prompt": "a", "text": "b"}])
    run.close("finished")
    first, *logs, end = noted(notes)
    assert first["init"]["mode"] == "offline" and first["init"]["name"] == "run"
    assert first["init"]["config"] == {"model/dim": 8, "data/store": "None"}
    assert first["terminal"] is False
    train = [(n["step"], n["log"]) for n in logs if "train/loss" in n["log"]]
    assert train == [(s, {"train/loss": s / 7, "train/auxiliary/balance": 0.5}) for s in range(1, 31)]
    assert [n["log"] for n in logs[30:]][:2] == [{"validation/loss": 2.5}, {"samples": "['b']"}]
    assert "curve" in logs[-1]["log"]
    assert (end["finish"], end["error"]) == ("success", None)
    assert told == []


def test_cadence_thins_steps_but_keeps_the_first_the_last_and_those_that_are_not_finite(
    tmp_path: Path, fake: Any
) -> None:
    notes = fake("works")
    run = tracker(tmp_path / "run", Told(), log_every=10)
    for step in range(1, 24):
        run.log("train", step, {"loss": math.nan if step == 7 else 1.0, "gradient_norm": 2.0})
    run.close("finished")
    sent = {n["step"]: n["log"] for n in noted(notes) if "log" in n and "curve" not in n["log"]}
    assert list(sent) == [1, 7, 10, 20, 23]
    assert sent[7] == {
        "train/gradient_norm": 2.0,
        "train/nonfinite": 1,
    }  # E4: one nan breaks the board's chart
    assert len(read_metrics(tmp_path / "run", "train")) == 23


@pytest.mark.parametrize("state", [("finished", None, "success"), ("failed", "no memory", "crashed")])
def test_state_and_reason_arrive(tmp_path: Path, fake: Any, state: tuple[Any, str | None, str]) -> None:
    notes = fake("works")
    run = tracker(tmp_path / "run", Told())
    run.log("train", 1, {"loss": 1.0})
    run.close(state[0], state[1])
    assert noted(notes)[-1] == {"finish": state[2], "error": state[1]}


def test_what_swanlab_prints_is_not_taken_for_a_report(tmp_path: Path, fake: Any) -> None:
    notes, told = fake("init prints"), Told()
    run = tracker(tmp_path / "run", told)
    run.log("train", 1, {"loss": 1.0})
    run.close("finished")
    assert noted(notes)[-1]["finish"] == "success" and told == []
    assert "nonsense" in (tmp_path / "run" / "swanlab.log").read_text()


def test_a_slow_swanlab_gets_everything_in_the_end(tmp_path: Path, fake: Any) -> None:
    notes = fake("log is slow")
    run = tracker(tmp_path / "run", Told(), swanlab_close_seconds=20.0)
    start = time.monotonic()
    for step in range(1, 41):
        run.log("train", step, {"loss": 1.0})
    assert time.monotonic() - start < 1.0
    run.close("finished")
    assert [n["step"] for n in noted(notes) if "train/loss" in n.get("log", {})] == list(range(1, 41))


def test_resumed_run_is_mirrored_whole_without_lost_or_doubled_steps(tmp_path: Path, fake: Any) -> None:
    notes = fake("works")
    run = tracker(tmp_path / "run", Told())
    for step in range(1, 8):
        run.log("train", step, {"loss": 1.0})
    run.close("interrupted", "SIGTERM")
    notes.unlink()
    run = tracker(tmp_path / "run", Told())
    run.resume_at(4)
    for step in range(5, 10):
        run.log("train", step, {"loss": 2.0})
    run.close("finished")
    first, *logs, _ = noted(notes)
    assert first["init"]["name"] == "run (resumed 1)"
    curve = [(n["step"], n["log"]["train/loss"]) for n in logs if "train/loss" in n["log"]]
    assert curve == [(s, 1.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 10)]


@pytest.mark.parametrize(
    ("wanted", "missing", "mode"),
    [
        ("auto", (), "local"),
        ("auto", ("swanboard",), "offline"),
        ("auto", ("swanlab",), "off"),
        ("local", ("swanboard",), "offline"),
        ("offline", ("swanboard",), "offline"),
        ("cloud", ("swanboard",), "cloud"),
        ("cloud", ("swanlab",), "off"),
        ("off", (), "off"),
    ],
)
def test_mode_is_chosen_openly(
    monkeypatch: pytest.MonkeyPatch, wanted: str, missing: tuple[str, ...], mode: str
) -> None:
    """E2: local without the board package would go on and show nothing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else name)
    monkeypatch.setattr(dashboard, "_version", lambda name: "0.1.10b2")
    chosen, why = dashboard.choose_mode(wanted)
    assert chosen == mode
    assert (why is not None) == (mode != wanted and (wanted, mode) != ("auto", "local"))


def test_the_wrong_board_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(dashboard, "_version", lambda name: "0.2.0")
    monkeypatch.delenv("SWANLAB_SKIP_SWANBOARD_VERSION_CHECK", raising=False)
    mode, why = dashboard.choose_mode("local")
    assert mode == "offline" and why is not None and "0.2.0" in why


def test_values_of_takes_numbers_alone() -> None:
    record = {
        "kind": "train",
        "step": 3,
        "unix_seconds": 1.0,
        "loss": 1,
        "flag": True,
        "text": "x",
        "none": None,
    }
    assert values_of(record) == {"train/loss": 1}


def test_lines_that_arrive_in_pieces_are_sent_whole_and_nothing_after_the_end() -> None:
    data = b"".join(encode("train", step, 0.0, {"loss": step / 7}) for step in range(1, 41))
    size = len(data) - len(encode("train", 40, 0.0, {"loss": 40 / 7}))
    stop: queue.Queue[dict[str, Any]] = queue.Queue()

    class Growing:
        """A file that grows by 7 bytes between two looks at it; the end comes in the middle of a line."""

        at = 0

        def read(self, count: int) -> bytes:
            self.at += 7
            if self.at == 700:
                stop.put({"size": size})
            return data[self.at - 7 : self.at]

    class Sent(list[float]):
        def log(self, record: dict[str, Any]) -> None:
            self.append(record["loss"])

    sent = Sent()
    end, step = follow(sent, Growing(), stop)  # type: ignore[arg-type]
    assert sent == [step / 7 for step in range(1, 40)]
    assert (end, step) == ({"size": size}, 39)
