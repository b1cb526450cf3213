"""What a launcher file started, seen from inside: run by accelerate, writes a file per process into a folder.

Its first line says what the layout is; then come the variables of the environment that decide it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from minilm.training.layout import Asked, Layout

SAY = (
    "ACCELERATE_",
    "FSDP_",
    "PARALLELISM_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
)
said = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SAY)]
layout = Layout(Asked(8, 1, "fp32", "cpu", 1.0, None))
line = f"{layout.kind} {layout.zero_stage} {layout.world_size} {layout.accelerator.num_processes}"
(Path(sys.argv[1]) / str(layout.rank)).write_text("\n".join([line, *said]), encoding="utf-8")
layout.barrier()
layout.close()
