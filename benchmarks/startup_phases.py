"""One start of train.py with a clock at each of its parts; `benchmarks/startup.py` asks for it.

    python benchmarks/startup_phases.py FILE FLAG ...       FILE: what was found, as JSON; FLAGs: of train.py

A module of its own, for it may import nothing before the clock runs that train.py would import itself.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a start without DeepSpeed, SwanLab, a data set or torch.compile might load and need not.
WATCHED = (
    *(
        "accelerate",
        "datasets",
        "deepspeed",
        "matplotlib",
        "pandas",
        "pyarrow",
        "scipy",
        "sklearn",
        "swanlab",
    ),
    *(
        "sympy",
        "torch._dynamo",
        "torch._inductor",
        "torchvision",
        "transformers",
        "transformers.modeling_utils",
    ),
)
_STARTED = time.time()


def main(argv: list[str]) -> int:
    import psutil

    seconds = {"Python": _STARTED - psutil.Process().create_time()}
    clock = time.perf_counter
    begun = clock()
    from minilm import cli
    from minilm.cli import train

    with cli.importing("torch"):
        import torch

        seconds["import torch"] = clock() - begun
        begun = clock()
        from minilm import checked, launch, run
    seconds["import minilm and the rest"] = clock() - begun
    found: dict[str, Any] = {"seconds": seconds, "torch": torch.__version__}

    def timed(holder: Any, name: str, label: str, after: Callable[[], None] | None = None) -> None:
        inner = getattr(holder, name)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return inner(*args, **kwargs)
            finally:
                seconds[label] = seconds.get(label, 0.0) + clock() - start
                if after is not None:
                    after()

        setattr(holder, name, outer)

    def loaded() -> None:
        found["loaded"] = [name for name in WATCHED if name in sys.modules]

    timed(run, "load_config", "settings")
    timed(launch.Layout, "__init__", "layout")
    timed(launch, "open_data", "store and tokenizer")
    timed(launch, "begin", "run folder, loader")
    timed(launch, "_model", "model")
    timed(launch.optim, "build", "optimizer")
    timed(checked, "before_first_step", "checks")
    timed(launch.Layout, "prepare", "layout")
    timed(launch.Books, "__init__", "manifest and log", loaded)
    code = train.main(argv[1:])
    Path(argv[0]).write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
