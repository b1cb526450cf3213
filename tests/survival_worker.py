"""train.py with an accident planned in: run by the tests of survival, alone or by accelerate.

    survival_worker.py '[{"step": 4, "rank": 1, "what": "loss"}]' [arguments of train.py]

what: loss (the hidden states of that step are infinite), gradient (nan, under a finite loss), die (kill -9 in the
step), infinite loss over a finite gradient (loss only), memory (there is none for the step), disk (from then on it is
full when a checkpoint is sealed)
after: a file that the accident waits for; a checkpoint that is being written in the background has its own pace
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from minilm.training import checkpoint, step, trainer


def full_disk(folder):
    raise OSError(28, "No space left on device")


def wait_for(file):
    """Until it is there; nobody hears of it, so a limit that is far from every honest wait."""
    deadline = time.monotonic() + 60
    while not Path(file).is_file():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file} did not appear")
        time.sleep(0.01)


def infinite(forward):
    def poisoned(*arguments, **keywords):
        output = forward(*arguments, **keywords)
        output.hidden = output.hidden * math.inf
        return output

    return poisoned


def plan(accidents):
    """Replace the step of the trainer by one in which the accidents happen, each at its step and rank."""
    real = trainer.optimizer_step
    taken = []

    def step_with_accidents(layout, batches, **keywords):
        taken.append(1)
        model, undo = layout.model, []
        for accident in accidents:
            if len(taken) != accident["step"] or layout.rank != accident["rank"]:
                continue
            if "after" in accident:
                wait_for(accident["after"])
            if accident["what"] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif accident["what"] == "memory":
                raise MemoryError("no memory for this batch")
            elif accident["what"] == "disk":
                checkpoint._seal = full_disk
            elif accident["what"] == "loss":
                forward = model.forward
                model.forward = infinite(forward)
                undo.append(lambda forward=forward: setattr(model, "forward", forward))
            elif accident["what"] == "gradient":
                handle = next(model.parameters()).register_hook(lambda gradient: gradient * math.nan)
                undo.append(handle.remove)
            elif accident["what"] == "loss only":
                undo.append(_only_the_logged_loss())
        try:
            return real(layout, batches, **keywords)
        finally:
            for function in undo:
                function()

    trainer.optimizer_step = step_with_accidents


def _only_the_logged_loss():
    """The sum that is logged becomes infinite, the gradient stays as it is."""
    accumulate = step.accumulate

    def accumulated(*arguments, **keywords):
        loss, auxiliary = accumulate(*arguments, **keywords)
        return loss._replace(nats=loss.nats * math.inf), auxiliary

    step.accumulate = accumulated
    return lambda: setattr(step, "accumulate", accumulate)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plan(json.loads(sys.argv[1]))
    sys.exit(train.main(sys.argv[2:]))
