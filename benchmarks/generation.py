"""How fast text is generated: ours against transformers' `generate`, the same weights, the same texts, one run.

    python benchmarks/generation.py                                  original:26m, CPU, float32, 1 and 2 threads
    python benchmarks/generation.py --repeats 9 --json generation.json
    python benchmarks/generation.py --profile                        where a step's time goes, and the floor
    python benchmarks/generation.py --size tiny --repeats 2 --threads 1      the same path in seconds

Freshly drawn weights are exported to a Llama folder and loaded by transformers. Both write the same greedy texts, which
must be equal, token for token. A repetition of one goes before each repetition of the other, and a ratio is that of two
neighbours: what else a machine does meets both. Told are medians, with the lowest and the highest. There is a second
ratio, of processor time of this process, which other people's load moves less. The time is that of a whole call, prompt
and the laying out of weights included.

On a busy machine a call is interrupted many times, a step of a few milliseconds often not at all. So the steps after
the first token are timed one by one, too, and the lowest tenth of them all is told as `undisturbed`; the prompt and the
laying out of weights are not in it.

The floor is the time that the matrix products of one step take alone, with the weights as they lie in the model
(torch's own product), as our generator multiplies, and that of reading them once (a sum). Nothing that uses these
products can be faster.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from minilm import models
from minilm.evaluation.generate import generate
from minilm.evaluation.mode import head_of
from minilm.evaluation.products import Products
from minilm.models.hf import to_hf


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    torch.manual_seed(0)
    # Weights of the usual start give nearly even logits, whose greedy choice rounding would decide.
    ours = models.build(models.preset("original", args.size, init_std=0.06)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs = _exported(ours, Path(folder))
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for rows in args.rows:
            results.append(_measured(ours, theirs, rows, threads, args))
            print(_line(results[-1]), flush=True)
            if args.profile:
                print(_profiled(ours, rows, args), flush=True)
    record = {"machine": _machine(), "settings": vars(args), "results": results}
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["machine"]))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arg = parser.add_argument
    arg("--size", default="26m", help="of model original (default: 26m)")
    arg("--rows", type=int, nargs="+", default=[1, 16], help="streams written together (default: 1 16)")
    arg("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    arg("--prompt", type=int, default=32, help="tokens of a prompt (default: 32)")
    arg("--new", type=int, default=64, help="new tokens (default: 64)")
    arg("--repeats", type=int, default=7, help="of each (default: 7)")
    arg("--profile", action="store_true", help="operators of one call of ours")
    arg("--json", metavar="FILE", help="write everything there")
    return parser.parse_args(argv)


def _exported(ours: Any, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    to_hf(ours, pad_id=0).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocab_size, (rows, length), generator=generator).tolist()


def _measured(ours: Any, theirs: Any, rows: int, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    prompts = _prompts(rows, args.prompt, ours.config.vocab_size)
    ids = torch.tensor(prompts)

    marks: dict[str, list[list[float]]] = {"ours": [], "transformers": []}

    def mine() -> list[list[int]]:
        clock = _Clock(marks["ours"])  # asked before each step
        found = generate(ours, prompts, max_new_tokens=args.new, temperature=0, cancel=clock.tick)
        return [r.tokens for r in found]

    def other() -> list[list[int]]:
        clock = _Clock(marks["transformers"])  # given the prompt, then each token
        with torch.inference_mode():
            whole = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.new,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        return whole[:, args.prompt :].tolist()

    same = mine() == other()  # also the first call of each, which is not counted
    for some in marks.values():
        some.clear()
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    processor: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(args.repeats):
        for name, write in (("ours", mine), ("transformers", other)):
            before = time.process_time()
            times[name].append(_seconds(write) / args.new)
            processor[name].append((time.process_time() - before) / args.new)
    undisturbed = {name: _undisturbed(some) for name, some in marks.items()}
    return {
        "rows": rows,
        "threads": threads,
        "same_text": same,
        "milliseconds_per_step": {name: _spread([1e3 * t for t in some]) for name, some in times.items()},
        "times_faster": _spread(_ratios(times)),
        "processor_milliseconds_per_step": {
            name: _spread([1e3 * t for t in some]) for name, some in processor.items()
        },
        "processor_times_faster": _spread(_ratios(processor)),
        "undisturbed_milliseconds": undisturbed,
        "undisturbed_times_faster": undisturbed["transformers"] / undisturbed["ours"],
        "load_average": os.getloadavg(),
        "tokens_per_second": {name: rows / statistics.median(some) for name, some in times.items()},
        "floor_milliseconds": _floor(ours, rows, args),
    }


class _Clock:
    """When each step of one call began, for either side: `put` and `end` are what transformers calls a streamer by."""

    def __init__(self, calls: list[list[float]]) -> None:
        self.marks: list[float] = []
        calls.append(self.marks)

    def tick(self) -> bool:
        self.marks.append(time.perf_counter())
        return False

    def put(self, value: Any) -> None:
        self.tick()

    def end(self) -> None:
        """Nothing is kept back."""


def _undisturbed(calls: list[list[float]]) -> float:
    """Milliseconds of a step, lowest tenth of all but the first two marks, where the prompt is read."""
    steps = [b - a for marks in calls for a, b in itertools.pairwise(marks[2:])]
    return 1e3 * sorted(steps)[len(steps) // 10]


def _floor(ours: Any, rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the products of one step alone, and of reading all weights once: the lowest of several."""
    layers = [module for module in ours.modules() if isinstance(module, nn.Linear)]
    head = head_of(ours)
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]
    last = torch.randn(rows, head.shape[1])
    products = Products(ours, head, rows=rows, steps=args.new)

    def plain() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)
        F.linear(last, head)

    def fast() -> None:
        with products.within():
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)
            products.head(last)

    def read() -> None:
        for layer in layers:
            layer.weight.sum()
        head.sum()

    kinds = {"torch": plain, "ours": fast, "reading": read}
    with torch.no_grad():
        return {name: 1e3 * min(_seconds(run) for _ in range(15)) for name, run in kinds.items()}


def _profiled(ours: Any, rows: int, args: argparse.Namespace) -> str:
    prompts = _prompts(rows, args.prompt, ours.config.vocab_size)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        generate(ours, prompts, max_new_tokens=args.new, temperature=0)
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)


def _seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _ratios(times: dict[str, list[float]]) -> list[float]:
    return [b / a for a, b in zip(times["ours"], times["transformers"], strict=True)]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _line(result: dict[str, Any]) -> str:
    def told(spread: dict[str, float], form: str) -> str:
        return f"{spread['median']:{form}} ({spread['lowest']:{form}} to {spread['highest']:{form}})"

    steps, floor = result["milliseconds_per_step"], result["floor_milliseconds"]
    undisturbed = result["undisturbed_milliseconds"]
    return (
        f"{result['rows']:3} streams, {result['threads']} threads: ours {told(steps['ours'], '.2f')} ms a step, "
        f"transformers {told(steps['transformers'], '.2f')}; {told(result['times_faster'], '.2f')} times as fast "
        f"(by processor time {told(result['processor_times_faster'], '.2f')}); "
        f"undisturbed steps {undisturbed['ours']:.2f} and {undisturbed['transformers']:.2f}, "
        f"{result['undisturbed_times_faster']:.2f} times as fast; "
        f"products alone {floor['ours']:.2f}, by torch {floor['torch']:.2f}, reading {floor['reading']:.2f}; "
        f"same text: {'yes' if result['same_text'] else 'NO'}"
    )


def _machine() -> dict[str, Any]:
    import transformers

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    """The name of the processor where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
