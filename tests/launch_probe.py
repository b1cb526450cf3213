"""What a launcher file started, seen from inside: run by accelerate, writes one line per process into a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from minilm.training.layout import Asked, Layout

layout = Layout(Asked(8, 1, "fp32", "cpu", 1.0, None))
line = f"{layout.kind} {layout.zero_stage} {layout.world_size} {layout.accelerator.num_processes}"
(Path(sys.argv[1]) / str(layout.rank)).write_text(line, encoding="utf-8")
layout.barrier()
layout.close()
