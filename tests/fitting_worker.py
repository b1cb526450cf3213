"""A run with train.micro_batch auto on ranks that have different room: the second one fits fewer rows.

    fitting_worker.py ROOM_OF_RANK_0,ROOM_OF_RANK_1 FLAGS ...

ROOM is a number of rows: as if the device had memory for so many and no more. Prints what each rank trains with.
"""

from __future__ import annotations

import json
import sys

import torch

from minilm import launch
from minilm.errors import MinilmError
from minilm.run import load_config
from minilm.training import fitting


def main() -> int:
    rooms, arguments = [int(x) for x in sys.argv[1].split(",")], sys.argv[2:]
    tried = []

    def step(layout, objective, batch, memory):
        """A device that ends at so many rows."""
        tried.append(batch.shape[0])
        if batch.shape[0] > rooms[layout.rank]:
            raise torch.OutOfMemoryError("CUDA out of memory. (stand-in)")

    real = fitting.largest

    def on_a_device(layout, needed, room, fits, *, beside=0):
        """As on CUDA, whatever is free: sizes are tried."""
        config = load_config(None, arguments).value
        from minilm.data.loader import aligned, open_data

        rows = open_data(config.data).train
        with fitting.trial(
            layout, config.model, needed, lambda n: aligned(rows, rows.order(0, 0, 0, n)), recompute="none"
        ) as fits:
            return real(layout, needed, room, fits)

    fitting._step, fitting.largest = step, on_a_device
    cut = launch.Layout.cut

    def told(self, rows):
        cut(self, rows)
        found = {
            "rank": self.rank,
            "tried": tried,
            "rows": self.micro_batch,
            "accumulation": self.accumulation,
        }
        print(json.dumps(found), flush=True)

    launch.Layout.cut = told
    try:
        return launch.train(load_config(None, arguments), resume=False)
    except MinilmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
