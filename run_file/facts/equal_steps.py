"""How many steps cost a run of the settings as much arithmetic as its own steps with another model.

    python run_file/facts/equal_steps.py run_file/facts/cpu.yaml --model.name=knowledge --model.store=...

The words behind the settings file are settings of that other model.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from minilm.data.store import Store
from minilm.run import load_config, with_vocabulary


def main(file: str, *other: str) -> None:
    flops = []
    for words in ((), other):
        resolved = load_config(Path(file), words)
        config = with_vocabulary(resolved, Store.open(resolved.value.data.store))
        flops.append(config.model.training_flops_per_token(config.data.sequence_length))
    assert config.train.steps is not None
    print(math.ceil(config.train.steps * flops[1] / flops[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
