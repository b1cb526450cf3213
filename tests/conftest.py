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


@pytest.fixture(autouse=True)
def _random_state_of_its_own():
    """A test does not depend on what ran before it."""
    torch.manual_seed(0)
