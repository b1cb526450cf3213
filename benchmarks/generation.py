"""How fast text is generated: ours against transformers' `generate`, the same weights, the same texts, one run.

    python benchmarks/generation.py                          original:26m, CPU, float32, 1 and 2 threads: two minutes
    python benchmarks/generation.py --repeats 9 --json generation.json
    python benchmarks/generation.py --profile                where a step's time goes
    python benchmarks/generation.py --quick                  a tiny model, the same path in seconds

Freshly drawn weights are exported to a Llama folder and loaded by transformers. Both write the same greedy texts, which
must be equal, token for token. transformers is called as its users call it, with its default cache that grows, and with
`cache_implementation="static"`; the faster of the two is what ours is compared with. (On a CPU transformers compiles
neither by itself.) All take turns, and a ratio is that of two neighbours: what else a machine does meets all. Told are
medians, with the lowest and the highest. There is a second ratio, of processor time of this process, which other
people's load moves less. The time is that of a whole call, prompt and the laying out of weights included.

On a busy machine a call is interrupted many times, a step of a few milliseconds often not at all. So the steps after
the first token are timed one by one, too, and the lowest tenth of them all is told as `undisturbed`; the prompt and the
laying out of weights are not in it.

The floor is the time that the matrix products of one step take alone, with the weights as they lie in the model
(torch's own product), as our generator multiplies, and that of reading them once (a sum). Nothing that uses these
products can be faster.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from minilm import models
from minilm.evaluation import single
from minilm.evaluation.generate import generate
from minilm.evaluation.mode import head_of
from minilm.evaluation.products import Products
from minilm.models.hf import to_hf

CACHES: dict[str, dict[str, Any]] = {"dynamic": {}, "static": {"cache_implementation": "static"}}
QUICK = {"size": "tiny", "rows": [1, 3], "threads": [1], "prompt": 5, "new": 20, "repeats": 2}


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    torch.manual_seed(0)
    # Weights of the usual start give nearly even logits, whose greedy choice rounding would decide.
    ours = models.build(models.preset("original", args.size, init_std=0.06)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs = _exported(ours, Path(folder))
    usual, results = torch.get_num_threads(), []
    try:
        for threads, rows in itertools.product(args.threads, args.rows):
            torch.set_num_threads(threads)
            results.append(_measured(ours, theirs, rows, threads, args))
            print(_line(results[-1]), flush=True)
            if args.profile:
                print(_profiled(ours, rows, args), flush=True)
    finally:
        torch.set_num_threads(usual)
    settings = {name: getattr(args, name) for name in QUICK}
    path = measuring.write("generation", settings, results, args.json, argv=argv)
    print(section(json.loads(path.read_text(encoding="utf-8"))))
    print(f"wrote {path}")
    different = [x for x in results if not x["same_text"]]
    for result in different:
        print(
            f"error: other texts with {result['rows']} streams, {result['threads']} threads", file=sys.stderr
        )
    return 1 if different else 0


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
    arg(
        "--quick", action="store_true", help="a tiny model, few repetitions, one thread: to see that it works"
    )
    arg("--profile", action="store_true", help="operators of one call of ours")
    arg("--json", metavar="FILE", help="default: benchmarks/results/generation.json")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    return args


def _exported(ours: Any, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    to_hf(ours, pad_id=0).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocab_size, (rows, length), generator=generator).tolist()


class _Contender:
    """One way to write the texts, and what was measured of it."""

    def __init__(self, write: Callable[[_Clock], list[list[int]]], steps: int) -> None:
        self.write, self.steps = write, steps
        self.seconds: list[float] = []  # of a step, in a whole call
        self.processor: list[float] = []
        self.marks: list[list[float]] = []

    def call(self) -> list[list[int]]:
        clock = _Clock()
        begun, processor = time.perf_counter(), time.process_time()
        texts = self.write(clock)
        self.seconds.append((time.perf_counter() - begun) / self.steps)
        self.processor.append((time.process_time() - processor) / self.steps)
        self.marks.append(clock.marks)
        return texts

    def forget(self) -> None:
        for some in (self.seconds, self.processor, self.marks):
            some.clear()

    def undisturbed(self) -> float:
        """Milliseconds of a step, lowest tenth of all but the first two marks, where the prompt is read."""
        steps = [b - a for marks in self.marks for a, b in itertools.pairwise(marks[2:])]
        return 1e3 * sorted(steps)[len(steps) // 10]


class _Clock:
    """When each step of one call began, for either side: `put` and `end` are what transformers calls a streamer by."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def tick(self) -> bool:
        self.marks.append(time.perf_counter())
        return False

    def put(self, value: Any) -> None:
        self.tick()

    def end(self) -> None:
        """Nothing is kept back."""


def _contenders(
    ours: Any, theirs: Any, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, _Contender]:
    ids = torch.tensor(prompts)

    def mine(clock: _Clock) -> list[list[int]]:
        # `cancel` is asked before each step.
        found = generate(ours, prompts, max_new_tokens=args.new, temperature=0, cancel=clock.tick)
        return [r.tokens for r in found]

    def other(clock: _Clock, cache: dict[str, Any]) -> list[list[int]]:
        with torch.inference_mode():
            whole = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.new,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
                **cache,
            )
        return whole[:, args.prompt :].tolist()

    ways = {"ours": mine, **{name: functools.partial(other, cache=cache) for name, cache in CACHES.items()}}
    return {name: _Contender(way, args.new) for name, way in ways.items()}


def _measured(ours: Any, theirs: Any, rows: int, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    contenders = _contenders(ours, theirs, _prompts(rows, args.prompt, ours.config.vocab_size), args)
    texts = [contender.call() for contender in contenders.values()]  # the first of each is not counted
    for contender in contenders.values():
        contender.forget()
    for _ in range(args.repeats):
        for contender in contenders.values():
            contender.call()
    mine = contenders["ours"]
    cache = min(CACHES, key=lambda name: statistics.median(contenders[name].seconds))
    best = contenders[cache]
    told = {"ours": mine, "transformers": best}
    undisturbed = {name: contender.undisturbed() for name, contender in told.items()}
    return {
        "rows": rows,
        "threads": threads,
        "same_text": all(text == texts[0] for text in texts),
        "transformers_cache": cache,
        "milliseconds_per_step": _milliseconds({n: c.seconds for n, c in {**told, **contenders}.items()}),
        "times_faster": measuring.paired(best.seconds, mine.seconds),
        "times_faster_than": {n: measuring.paired(contenders[n].seconds, mine.seconds) for n in CACHES},
        "processor_milliseconds_per_step": _milliseconds({n: c.processor for n, c in told.items()}),
        "processor_times_faster": measuring.paired(best.processor, mine.processor),
        "undisturbed_milliseconds": undisturbed,
        "undisturbed_times_faster": undisturbed["transformers"] / undisturbed["ours"],
        "load_average": measuring.machine()["load_average"],
        "tokens_per_second": {n: rows / statistics.median(c.seconds) for n, c in told.items()},
        "floor_milliseconds": _floor(ours, rows, args),
    }


def _milliseconds(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: measuring.spread([1e3 * t for t in some]) for name, some in times.items()}


def _floor(ours: Any, rows: int, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the products of one step alone, and of reading all weights once: the lowest of several."""
    layers = [module for module in ours.modules() if isinstance(module, nn.Linear)]
    head = head_of(ours)
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]
    last = torch.randn(rows, head.shape[1])

    def plain() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            F.linear(x, layer.weight)
        F.linear(last, head)

    def read() -> None:
        for layer in layers:
            layer.weight.sum()
        head.sum()

    with torch.no_grad():
        fast = _fast(ours, layers, inputs, last, args.new)
        kinds = {"torch": plain, "ours": fast, "reading": read}
        return {name: 1e3 * min(_seconds(run) for _ in range(15)) for name, run in kinds.items()}


def _fast(
    ours: Any, layers: list[nn.Linear], inputs: list[torch.Tensor], last: torch.Tensor, steps: int
) -> Callable[[], None]:
    """The products as our generator multiplies."""
    head, rows = head_of(ours), len(last)
    if rows == 1 and single.available():
        weights = [layer.weight.detach().numpy() for layer in layers] + [head.detach().numpy()]
        vectors = [x[0].numpy() for x in (*inputs, last)]
        blas = single.openblas()

        def alone() -> None:
            with single.held(blas):
                for weight, x in zip(weights, vectors, strict=True):
                    weight.dot(x)

        return alone
    products = Products(ours, head, rows=rows, steps=steps)

    def together() -> None:
        with products.within():
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)
            products.head(last)

    return together


def _profiled(ours: Any, rows: int, args: argparse.Namespace) -> str:
    prompts = _prompts(rows, args.prompt, ours.config.vocab_size)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        generate(ours, prompts, max_new_tokens=args.new, temperature=0)
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)


def _seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _line(result: dict[str, Any]) -> str:
    steps, undisturbed = result["milliseconds_per_step"], result["undisturbed_milliseconds"]
    return (
        f"{result['rows']:3} streams, {result['threads']} threads: ours {measuring.told(steps['ours'])} ms a step, "
        f"transformers {measuring.told(steps['transformers'])}: {measuring.told(result['times_faster'])} times as "
        f"fast; undisturbed steps {undisturbed['ours']:.2f} and {undisturbed['transformers']:.2f}: "
        f"{result['undisturbed_times_faster']:.2f}; same text: {'yes' if result['same_text'] else 'NO'}"
    )


def section(record: dict[str, Any]) -> str:
    """The part of docs/performance.md for these results."""
    results, given = record["results"], record["settings"]
    factors = [x["times_faster"]["median"] for x in results]
    texts = "the same texts, token for token" if all(x["same_text"] for x in results) else "**OTHER TEXTS**"
    answer = (
        f"minilm writes text {min(factors):.2f} to {max(factors):.2f} times as fast as transformers' `generate`, with "
        f"the same weights and {texts}."
    )
    about = (
        f"`original:{given['size']}`, float32 on a CPU, prompts of {given['prompt']} tokens and {given['new']} new "
        f"ones, greedy, whole calls, {given['repeats']} turns: milliseconds a step, that is for a new token in each "
        'stream. transformers with the faster of its caches, dynamic (its default) and static. "Steps alone" is the '
        "lowest tenth of all steps after the first token, timed one by one. The floor is the time of the matrix "
        "products of a step alone, and of reading the weights once."
    )
    head = ("streams", "threads", "minilm", "transformers", "its cache", "times as fast", "steps alone",
            "products alone", "reading the weights")  # fmt: skip
    rows = [
        [
            str(x["rows"]),
            str(x["threads"]),
            measuring.told(x["milliseconds_per_step"]["ours"]),
            measuring.told(x["milliseconds_per_step"]["transformers"]),
            x["transformers_cache"],
            measuring.told(x["times_faster"]),
            f"{x['undisturbed_times_faster']:.2f}",
            f"{x['floor_milliseconds']['ours']:.2f}",
            f"{x['floor_milliseconds']['reading']:.2f}",
        ]
        for x in results
    ]
    command = f"```\n{record['command']}\n```"
    return "\n\n".join(["## Generation", answer, about, measuring.table(head, rows), command])


if __name__ == "__main__":
    sys.exit(main())
