"""What several tests need."""

from __future__ import annotations

import pytest
import torch

# Test models are too small to profit from threads, and two workers of pytest-xdist share the machine.
torch.set_num_threads(1)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its state in class attributes: a test that trains starts and leaves without any."""
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture
def accidents(monkeypatch):
    """accidents((step, what), ...): planned for the next run in this process, in place of those planned before."""
    import survival_worker

    from minilm.training import trainer

    real = trainer.optimizer_step

    def plan(*planned):
        monkeypatch.setattr(trainer, "optimizer_step", real)
        survival_worker.plan([{"step": step, "rank": 0, "what": what} for step, what in planned])

    return plan


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake("log hangs") -> the path of the notes that a stand-in for SwanLab takes, behaving so."""
    import swanlab_stand_in

    return swanlab_stand_in.install(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _random_state_of_its_own():
    """A test does not depend on what ran before it."""
    torch.manual_seed(0)
