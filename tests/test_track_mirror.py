"""SwanLab as a mirror: whatever it does, training goes on; what it shows is what metrics.jsonl says."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from minilm.track import TrackConfig, Tracker, dashboard, read_metrics
from minilm.track.metrics import encode
from minilm.track.mirror import follow, values_of

# Stands in for the package in the mirror process. How it behaves is in the environment.
FAKE = """
import json, os, sys, time
BEHAVIOUR = os.environ["FAKE_SWANLAB"]

def note(**what):
    with open(os.environ["FAKE_SWANLAB_NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def act(where):
    if BEHAVIOUR == f"{where} hangs": time.sleep(1000)
    if BEHAVIOUR == f"{where} raises": raise RuntimeError("the server said no")
    if BEHAVIOUR == f"{where} dies": os._exit(9)
    if BEHAVIOUR == f"{where} asks": note(answer=input("Enter your API key: "))
    if BEHAVIOUR == f"{where} interrupts": raise KeyboardInterrupt("stopped by the user")
    if BEHAVIOUR == f"{where} prints": print('{"done": true} nonsense', flush=True)
    if BEHAVIOUR == f"{where} is slow": time.sleep(0.05)

class Run:
    dir = os.environ["FAKE_SWANLAB_NOTES"] + ".run"

def init(**options):
    note(init=options, terminal=os.isatty(0) or os.isatty(1) or os.isatty(2), pid=os.getpid())
    act("init")
    return Run()

def log(values, step):
    act("log")
    note(log={k: v if isinstance(v, (int, float)) else repr(v) for k, v in values.items()}, step=step)

def finish(state, error):
    act("finish")
    note(finish=state, error=error)

class Text(str):
    def __new__(cls, text, caption=None): return str.__new__(cls, text)

class Image(str):
    pass
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """fake("log hangs") -> the path of the notes that the stand-in takes."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "swanlab.py").write_text(FAKE)
    notes = tmp_path / "notes"

    def behave(behaviour: str) -> Path:
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("FAKE_SWANLAB", behaviour)
        monkeypatch.setenv("FAKE_SWANLAB_NOTES", str(notes))
        return notes

    return behave


class Told(list[str]):
    """The warnings that the user sees, without the line that says which mode was chosen."""

    def __call__(self, text: str) -> None:
        if not text.startswith(("SwanLab: offline", "SwanLab: local")):
            self.append(text)


def tracker(run: Path, told: Told, **config: Any) -> Tracker:
    config = {"swanlab": "offline", "log_every": 1, "swanlab_close_seconds": 5.0, **config}
    return Tracker(run, TrackConfig(**config), {"model": {"dim": 8}, "data": {"store": None}}, message=told)


def noted(notes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


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


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_swanlab_that_hangs_neither_stalls_nor_stops_training(
    tmp_path: Path, fake: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "STALL_SECONDS", 0.3)
    notes, told = fake(f"{where} hangs"), Told()
    run = tracker(tmp_path / "run", told, swanlab_close_seconds=1.0)
    start = time.monotonic()
    for step in range(1, 2001):
        run.log("train", step, {"loss": 1.0})
    assert time.monotonic() - start < 2.0
    wait_for(lambda: noted(notes))
    if where != "finish":
        for step in range(2001, 2201):  # a step every 0.1 s, until the clock of the mirror has noticed
            run.log("train", step, {"loss": 1.0})
            if told:
                break
            time.sleep(0.1)
        assert len(told) == 1 and "has not answered" in told[0]
    start = time.monotonic()
    run.close("finished")
    assert time.monotonic() - start < 4.0  # one second for SwanLab, the rest is the drawing of the curve
    assert "did not finish within 1 s" in told[-1]
    assert [r["text"] for r in read_metrics(tmp_path / "run", "event") if "SwanLab" in r["text"]] == told
    assert len(read_metrics(tmp_path / "run", "train")) >= 2000
    assert not alive(noted(notes)[0]["pid"])


@pytest.mark.parametrize("failure", ["init raises", "log raises", "init dies", "log interrupts", "init asks"])
def test_a_swanlab_that_fails_is_one_warning_and_one_event(tmp_path: Path, fake: Any, failure: str) -> None:
    """Also a question on a terminal (E1: the job would wait for ever) and a stop pressed in the board."""
    fake(failure)
    told = Told()
    run = tracker(tmp_path / "run", told)
    run.log("train", 1, {"loss": 1.0})
    assert run._dashboard is not None
    process = run._dashboard._process
    wait_for(lambda: process.poll() is not None)
    for step in range(2, 50):
        run.log("train", step, {"loss": 1.0})
    run.close("finished")
    reasons = {"raises": "the server said no", "dies": "exit code 9", "interrupts": "stopped", "asks": "EOF"}
    assert len(told) == 1
    assert "SwanLab stopped" in told[0] and reasons[failure.split()[1]] in told[0]
    events = [r["text"] for r in read_metrics(tmp_path / "run", "event")]
    assert events.count(told[0]) == 1
    assert [r["step"] for r in read_metrics(tmp_path / "run", "train")] == list(range(1, 50))


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


def test_ctrl_c_does_not_reach_the_mirror_and_sets_no_handler_here(tmp_path: Path, fake: Any) -> None:
    notes, told = fake("works"), Told()
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    run = tracker(tmp_path / "run", told)
    run.log("train", 1, {"loss": 1.0})
    assert run._dashboard is not None
    assert os.getpgid(run._dashboard._process.pid) != os.getpgid(0)
    run.close("interrupted", "SIGINT")
    assert noted(notes)[-1] == {"finish": "aborted", "error": "SIGINT"} and told == []
    assert signal.getsignal(signal.SIGINT) is handler and sys.excepthook is hook


def test_the_mirror_of_a_killed_run_ends_by_itself(tmp_path: Path, fake: Any) -> None:
    notes = fake("works")
    program = (
        "import os, signal, sys, time\nfrom minilm.track import Tracker, TrackConfig\n"
        "run = Tracker(sys.argv[1], TrackConfig(swanlab='offline', log_every=1), {})\n"
        "for step in (1, 2, 3): run.log('train', step, {'loss': 1.0})\n"
        "while not os.path.exists(sys.argv[2]): time.sleep(0.02)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run"), str(notes)], timeout=60)
    wait_for(lambda: noted(notes) and "finish" in noted(notes)[-1])
    assert noted(notes)[-1] == {"finish": "crashed", "error": "the training process ended without a word"}
    assert [n["step"] for n in noted(notes) if "log" in n] == [1, 2, 3]
    wait_for(lambda: not alive(noted(notes)[0]["pid"]))


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


def test_no_folder_for_swanlab_is_one_warning(tmp_path: Path, fake: Any) -> None:
    fake("works")
    (tmp_path / "file").write_text("not a folder")
    told = Told()
    run = tracker(tmp_path / "run", told, swanlab_folder=str(tmp_path / "file" / "swanlog"))
    for step in (1, 2, 3):
        run.log("train", step, {"loss": 1.0})
    run.close("finished")
    assert len(told) == 1 and "SwanLab is off" in told[0]


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


# ---- the real thing ----


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, route: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/api/v1/{route}", timeout=10) as answer:
        return json.loads(answer.read())["data"]


@pytest.mark.skipif(dashboard.choose_mode("auto")[0] != "local", reason="needs swanlab[dashboard]")
def test_the_real_board_shows_what_metrics_jsonl_says(tmp_path: Path) -> None:
    """Through swanlab's own server: every point of every curve, and the tables (E3: shifted by one column)."""
    told = Told()
    for attempt in (1, 2):
        run = tracker(tmp_path / "run", told, swanlab="local", log_every=2, swanlab_close_seconds=60.0)
        if attempt == 2:
            run.resume_at(20)
        for step in range(1, 31) if attempt == 1 else range(21, 42):
            loss = math.nan if step == 13 else 9.0 / step + attempt * 1e-9
            run.log("train", step, {"loss": loss, "learning_rate": 1e-3 / step, "auxiliary": {"z": step}})
        run.log("validation", 30 if attempt == 1 else 41, {"loss": 2.0 + attempt / 3})
        run.sample(30 if attempt == 1 else 41, [{"prompt": "def", "text": f"attempt {attempt}: 你好 \udc80"}])
        run.close("finished" if attempt == 2 else "failed", None if attempt == 2 else "test")
    assert told == []

    folder, port = tmp_path / "swanlog", free_port()
    command = [sys.executable, "-c", "from swanlab.cli import cli; cli()", "watch", str(folder)]
    with (tmp_path / "watch.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log
        )
    try:

        def answers() -> bool:
            try:
                get(port, "project")
            except OSError:
                return False
            return True

        wait_for(answers, 60)
        experiments = {e["name"]: e for e in get(port, "project")["experiments"]}
        assert set(experiments) == {"run (superseded 1)", "run (resumed 1)"}
        number = experiments["run (resumed 1)"]["id"]
        records = read_metrics(tmp_path / "run", "train")
        assert [r["step"] for r in records] == list(range(1, 42))
        shown = [r for r in records if r["step"] % 2 == 0 or r["step"] in (1, 13, 41)]
        for name in ("loss", "learning_rate", "auxiliary/z"):
            points = get(port, f"experiment/{number}/tag/train/{name}")["list"]
            want = [(r["step"], r[name]) for r in shown if math.isfinite(r[name])]
            assert [(int(p["index"]), p["data"]) for p in points] == want
        summaries = get(port, "project/summaries?experiment_names=" + "")["summaries"]["run (resumed 1)"]
        card = {s["key"]: s["value"] for s in get(port, f"experiment/{number}/summary")["summaries"]}
        for table in (summaries, card):
            assert table["train/loss"] == records[-1]["loss"]
            assert table["train/learning_rate"] == records[-1]["learning_rate"]
            assert table["train/auxiliary/z"] == 41
            assert table["train/nonfinite"] == 1
            assert table["validation/loss"] == 2.0 + 2 / 3
            assert table["samples"] == ["attempt 2: 你好 ?"]
    finally:
        server.terminate()
        server.wait()
