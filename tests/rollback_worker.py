"""train.py with global batches that make the loss spike: run by the tests of going back, alone or by accelerate.

    rollback_worker.py '{"poisoned": [23], "die": [12]}' [arguments of train.py]

poisoned  numbers of global batches: whenever one comes, the hidden states are far too large and turned round, so that
          loss and gradient are finite and huge
die       steps counted from the start of the process, in which it dies (kill -9)
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from minilm.data.loader import Loader
from minilm.training import trainer


def wrong_way(forward):
    def poisoned(*arguments, **keywords):
        output = forward(*arguments, **keywords)
        output.hidden = output.hidden * -20
        return output

    return poisoned


def plan(poisoned, *, die=(), patch=setattr):
    """Replace the trainer's step by one in which these global batches are poisoned. patch: as setattr."""
    real_step, real_next = trainer.optimizer_step, Loader.__next__
    seen = {"batch": -1, "steps": 0}

    def following(loader):
        seen["batch"] = loader.next_step
        return real_next(loader)

    def step(layout, batches, **keywords):
        seen["steps"] += 1
        if seen["steps"] in die:
            os.kill(os.getpid(), signal.SIGKILL)
        forward = layout.model.forward
        if seen["batch"] in poisoned:
            layout.model.forward = wrong_way(forward)
        try:
            return real_step(layout, batches, **keywords)
        finally:
            layout.model.forward = forward

    patch(Loader, "__next__", following)
    patch(trainer, "optimizer_step", step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plan(**json.loads(sys.argv[1]))
    sys.exit(train.main(sys.argv[2:]))
