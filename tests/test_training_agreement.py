"""Processes that do not mean the same run, or do not see the same run folder, are refused at the start."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from minilm.errors import ConfigError
from minilm.training import agreement
from minilm.training.agreement import same_on_all, shares_folder


class Rank:
    """As much of a layout as the checks need: two ranks are two threads."""

    world_size = 2

    def __init__(self, rank, meeting, boards):
        self.rank, self.is_main, self.meeting, self.boards = rank, rank == 0, meeting, boards

    def barrier(self):
        self.meeting.wait(timeout=10)

    def all_reduce(self, values):
        for board in self.boards:
            board.put(values)
        self.barrier()
        both = [self.boards[self.rank].get(timeout=10) for _ in range(2)]
        self.barrier()
        return [a + b for a, b in zip(*both, strict=True)]


def on_two_ranks(task):
    """What `task(rank)` raised on each of two ranks, as text; "" where nothing."""
    meeting, boards = threading.Barrier(2), [queue.Queue(), queue.Queue()]

    def caught(number):
        try:
            task(Rank(number, meeting, boards))
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(caught, range(2)))


def test_equal_settings_pass_and_a_differing_one_is_named_on_both_ranks():
    same = {"optim.learning_rate": 1e-3, "train.steps": 10}
    assert on_two_ranks(lambda rank: same_on_all(rank, dict(same))) == ["", ""]
    first, second = on_two_ranks(
        lambda rank: same_on_all(rank, same | {"optim.learning_rate": 1e-3 + rank.rank * 1e-9})
    )
    assert "optim.learning_rate (here 0.001)" in first and "optim.learning_rate (here 0.001000001)" in second
    assert "train.steps" not in first + second


def test_settings_of_unequal_number_are_refused_before_they_are_compared():
    messages = on_two_ranks(lambda rank: same_on_all(rank, {str(n): n for n in range(2 + rank.rank)}))
    assert all("the names of the settings" in message for message in messages)


@pytest.mark.parametrize("shared", [True, False])
def test_a_run_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch, shared):
    monkeypatch.setattr(agreement, "PATIENCE_SECONDS", 0.3)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / ".lock").write_text("process 1 on another machine\nstart 12345\n")

    def task(rank):
        file = tmp_path / ("0" if shared or rank.is_main else "1") / ".lock"
        file.parent.mkdir(exist_ok=True)

        def append(text):
            with file.open("a") as lines:
                lines.write(text)

        shares_folder(rank, file, append)

    messages = on_two_ranks(task)
    if shared:
        assert messages == ["", ""]
    else:
        assert messages[0].startswith("Another rank does not see the run folder")
        assert messages[1].startswith("Rank 1 on ") and "run.folder" in messages[1]
