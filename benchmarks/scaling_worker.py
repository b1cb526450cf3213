"""The process that `scaling.py` measures in: steps of some points, turn by turn; started by hand or by a launcher.

    python benchmarks/scaling_worker.py PLAN.json OUT.json

PLAN  {"points": [{"size", "rows", "length", "threads", ...}], "repeats", "steps", "device", "dtype", "compile",
      "ceiling_seconds"}; what else a point has travels into its result
OUT   a list of results, written by the first rank

`rows` are those of a step over all ranks; a turn is `steps` of them. A point that does not fit into the memory of a GPU
is told with that reason, and the others go on.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import measuring
import torch
from peak import peak_bytes

from minilm import models
from minilm.alignment import Batch, align
from minilm.data.loader import pinned
from minilm.training import host_memory, optim, passing
from minilm.training.layout import Asked, Layout
from minilm.training.objective import Objective
from minilm.training.step import StepResult, Unread, optimizer_step

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


class Point:
    """One model with its rows, ready to train."""

    def __init__(self, wanted: dict[str, Any], plan: dict[str, Any], layout: Layout) -> None:
        self.wanted, self.failed, self.losses = wanted, "", list[float]()
        self.layout, self.threads, self.steps = layout, wanted["threads"], plan["steps"]
        self.unread: Unread | None = None
        rows, length = wanted["rows"], wanted["length"]
        known = models.preset("original", wanted["size"])
        changes = {"max_length": max(length, known.max_length)}
        if wanted.get("head_size"):
            heads, shared = known.dim // wanted["head_size"], known.num_heads // known.num_kv_heads
            changes |= {"num_heads": heads, "num_kv_heads": max(1, heads // shared)}
        self.config = models.preset("original", wanted["size"], **changes)
        self.tokens = rows * length
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.config.vocab_size, (rows, length + 1), generator=generator)
        mine = rows // layout.world_size
        part = tokens[layout.rank * mine : (layout.rank + 1) * mine]
        # On the host, as the loader hands it over: the way to the device is part of a step.
        batch = align(part, torch.ones_like(part))
        self.batch: Batch = pinned(batch) if layout.device.type == "cuda" else batch
        # Drawn on every rank alike: the ranks of a run begin with the same weights.
        torch.manual_seed(0)
        model = models.build(self.config).to(layout.device)
        optimizer = optim.build(model, optim.OptimConfig())
        passing.arrange(model, recompute="none", compiled=plan["compile"])
        layout.prepare(Objective(model).train(), optimizer)

    def turn(self) -> None:
        """Some steps, on the threads of this point; nothing once it did not fit."""
        if self.failed:
            return
        torch.set_num_threads(self.threads)
        try:
            for _ in range(self.steps):
                self._step()
            self._read()
        except torch.OutOfMemoryError:
            self.failed = "it takes more memory than the device has"
            self.layout.optimizer.zero_grad(set_to_none=True)

    def _step(self) -> None:
        found = optimizer_step(self.layout, [self.batch], may_wait=self._may_wait)
        self.unread = found if isinstance(found, Unread) else None
        if isinstance(found, StepResult):
            self.losses.append(found.loss.mean)

    def _may_wait(self) -> bool:
        """As the trainer: the numbers of a step are read when the next one is in the device's queue."""
        self._read()
        return self.layout.can_wait

    def _read(self) -> None:
        if self.unread is not None:
            self.losses.append(self.unread.read().loss.mean)
            self.unread = None

    def held_bytes(self) -> int:
        """Weights and the state of the optimizer on this rank, as tensors that are there between two steps."""
        engine = self.layout.engine
        tensors = list(self.layout.model.parameters())
        optimizer = self.layout.optimizer
        if engine is not None:
            tensors += engine.optimizer.single_partition_of_fp32_groups
            optimizer = engine.optimizer.optimizer
        tensors += [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        return sum(x.nbytes for x in {x.data_ptr(): x for x in tensors}.values())


def measure(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a plan, the same on every rank."""
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            return _measured(plan)
    finally:
        torch.set_num_threads(before)


def _measured(plan: dict[str, Any]) -> list[dict[str, Any]]:
    points, last = [], None
    for wanted in plan["points"]:
        torch.set_num_threads(wanted["threads"])
        asked = Asked(wanted["rows"], None, PRECISIONS[plan["dtype"]], plan["device"], 1.0, None)  # type: ignore[arg-type]
        points.append(Point(wanted, plan, last := Layout(asked)))
    assert last is not None
    ceiling = functools.cache(lambda threads: _ceiling(threads, plan, last))
    runs = {str(number): point.turn for number, point in enumerate(points)}
    seconds = measuring.interleaved(runs, plan["repeats"])
    return [_result(point, seconds[str(number)], ceiling) for number, point in enumerate(points)]


def _ceiling(threads: int, plan: dict[str, Any], layout: Layout) -> float:
    """FLOP/s of all ranks together, each measured while the others measure theirs."""
    torch.set_num_threads(threads)
    layout.barrier()
    own = measuring.ceiling(getattr(torch, plan["dtype"]), layout.device, seconds=plan["ceiling_seconds"])
    return layout.all_reduce([own])[0]


def _result(point: Point, seconds: list[float], ceiling: Any) -> dict[str, Any]:
    from minilm.training.hardware import peak_flops

    layout = point.layout
    common = {**point.wanted, "parameters": point.config.num_parameters(), "layout": str(layout)}
    if point.failed:
        return {**common, "absent": point.failed}
    # The slowest rank's memory is what has to fit; times are those of the first, as ranks wait for each other.
    peak = point.held_bytes() + peak_bytes(point.turn, layout.device)
    if layout.world_size > 1:
        most = torch.tensor(float(peak), device=layout.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        peak = int(most)
    flops = point.config.training_flops_per_token(point.wanted["length"])
    speeds = [point.tokens * point.steps / each for each in seconds]
    limit, sheet = ceiling(point.threads), peak_flops(layout.device, bf16=layout.bf16)
    done = measuring.spread(speeds)["median"] * flops
    return {
        **common,
        "tokens_per_second": measuring.spread(speeds),
        "speeds": speeds,
        "peak_megabytes": peak / 2**20,
        "mfu": done / limit,
        "mfu_of_data_sheet": None if sheet is None else done / (sheet * layout.world_size),
        "ceiling_flops": limit,
        "loss_of_first_step": point.losses[0],
    }


def main(argv: list[str]) -> int:
    plan = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    if plan["device"] == "cpu":
        host_memory.keep_freed_memory()  # as in a run
    results = measure(plan)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(argv[1]).write_text(json.dumps(results), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
