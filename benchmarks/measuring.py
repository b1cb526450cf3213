"""What all benchmarks share: the machine, taking turns, medians with their range, ratios of neighbours, the JSON.

A machine is never quiet for long. What is compared is therefore run turn by turn, a ratio is that of two neighbours in
the same turn, and what is told is the median with the lowest and the highest. Nothing is told as a share of a processor
that somebody else's data sheet describes: `ceiling` measures the best matrix product in the run that uses it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
# Sides of square products, and the shapes of a small model: rows x inner x columns.
_SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_SHAPES = ((4096, 512, 1408), (4096, 512, 6400), (4096, 1024, 4096))
_SECONDS_PER_PRODUCT = {
    "cpu": 0.3,
    "cuda": 0.1,
}  # a processor needs some time to reach its speed, and to lose it


def machine() -> dict[str, Any]:
    """Where something was measured, and with what: the first thing that a reader of a number asks."""
    import transformers

    import minilm

    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "minilm": minilm.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str | None:
    """The commit that this code is of, with a + where code was changed since; None outside of a checkout."""
    root = Path(__file__).resolve().parent.parent
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "*.py")
    name = _git(root, "rev-parse", "--short=10", "HEAD")
    return name and name + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str | None:
    """What git says of the checkout at `root`; None where there is none, or no git."""
    try:
        ran = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest. ValueError without a value."""
    if not values:
        raise ValueError("nothing was measured")
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """`spread` of the ratios of neighbours: value i of one over value i of the other. ValueError if one is longer."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call: one uncounted call of each, then one call of each per turn, in the order of `runs`.

    A call that leaves work in the queue of a CUDA device is waited for. Value i of all lists is of the same turn, so
    that two lists can be given to `paired`.
    """
    for run in runs.values():
        run()
    _wait()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            _wait()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def ceiling(dtype: torch.dtype, device: torch.device | str, *, seconds: float = 0.3) -> float:
    """FLOP/s of the best matrix product that is found on this device now, of torch's own and, on a CPU, of oneDNN's.

    Tried are squares and the shapes of small models; the best of several repetitions counts, as what disturbs a
    product only makes it slower. Takes about 2 seconds on a quiet machine.

    seconds  at least, for each product and shape; three repetitions in any case
    """
    device = torch.device(device)
    sizes = [(side, side, side) for side in _SQUARES[device.type]]
    best = 0.0
    for rows, inner, columns in (*sizes, *_SHAPES):
        a = torch.randn(rows, inner, device=device).to(dtype)
        b = torch.randn(columns, inner, device=device).to(dtype)
        for product in _products(a, b):
            best = max(best, 2 * rows * inner * columns / _fastest(product, seconds))
    return best


@torch.no_grad()
def bandwidth(device: torch.device | str, *, seconds: float = 0.5) -> float:
    """Bytes/s of copying in the memory of this device, read and written ones counted: the best of several copies.

    The arrays are larger than processor caches. Takes about a second.
    """
    source = torch.ones(64 * 2**20, device=device)  # 256 MiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), seconds)


def write(
    name: str,
    settings: Mapping[str, Any],
    results: Any,
    path: Path | str | None = None,
    *,
    argv: Sequence[str] | None = None,
) -> Path:
    """JSON {"benchmark", "command", "machine", "settings", "results"}, to benchmarks/results/NAME.json by default.

    argv  arguments of the command where they are not those of this process (default: sys.argv)

    Of an absolute path only the name is written: where a folder lies on one machine means nothing on another.
    """
    given = sys.argv[1:] if argv is None else argv
    record = {
        "benchmark": name,
        "command": " ".join(["python", f"benchmarks/{name}.py", *(_portable(x) for x in given)]),
        "machine": machine(),
        "settings": _portable(dict(settings)),
        "results": results,
    }
    path = Path(path) if path is not None else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.new")
    whole.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    whole.replace(path)  # what was there is not lost by a full disk
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers, on the right."""
    lines = [list(head), ["---"] * left + ["---:"] * (len(head) - left), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def told(found: Mapping[str, float] | None, form: str = ",.2f", scale: float = 1.0) -> str:
    """A `spread` as "median (lowest to highest)"; nothing for None."""
    if found is None:
        return ""
    median, low, high = (f"{scale * found[key]:{form}}" for key in ("median", "lowest", "highest"))
    return f"{median} ({low} to {high})"


def _processor() -> str:
    """The name of the processor where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _products(a: Tensor, b: Tensor) -> Iterator[Callable[[], Tensor]]:
    """a [M, K], b [N, K] -> ways to compute a b^T."""
    yield lambda: a @ b.T
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available() and operator is not None:
        # Half as fast again and more than torch's own float32 product on some processors.
        yield lambda: operator(a, b, None, "none", [], "")


@torch.no_grad()
def _fastest(run: Callable[[], object], at_least: float) -> float:
    """Seconds of the fastest of the calls that fit into `at_least` seconds, three at least, after one more."""
    run()
    _wait()
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        begun = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - begun)
    return min(times)


def _portable(value: Any) -> Any:
    """What JSON can hold; of absolute paths the last part."""
    if isinstance(value, Mapping):
        return {str(key): _portable(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(x) for x in value]
    if isinstance(value, (str, Path)) and Path(value).is_absolute():
        return Path(value).name
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
