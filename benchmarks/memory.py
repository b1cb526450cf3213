"""What takes the memory of a training step, part by part, and was it foreseen?

    python benchmarks/memory.py                             variants at 6m, policies at 26m: 2 to 3 minutes on a CPU
    python benchmarks/memory.py --device cuda               the same on a GPU, 128 rows of the reference size in bf16
    python benchmarks/memory.py --quick --json quick.json   the same path in seconds

Beside each estimate (`minilm/training/estimate.py`, what --dry-run shows) stands what was measured: weights, gradients,
moments and activations as the tensors that are there, the loss head and the whole step as the most that the allocator
had given out. Each case has a process of its own, whose own peak (resident memory) is told as well: it has in it what
no tensor explains. A second step is measured, when the moments are there; its time is that of further ones without the
allocator's record. Activation checkpointing is `train.activation_checkpointing`; that it changes no number is what the
equal losses say, and the tests.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import nn

from minilm import models
from minilm.alignment import Batch, align, score_hidden
from minilm.models.base import ModelConfig
from minilm.training import optim, passing
from minilm.training.estimate import Memory, Spread, memory
from minilm.training.host_memory import keep_freed_memory
from minilm.training.objective import Objective
from minilm.training.paths import kernel_of

VARIANTS = ("original", "no_ffn", "persistent", "moe", "knowledge", "pkm")
POLICIES = ("none", "half", "blocks")
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "peak")
PROMISED = 0.15  # of the measured value
REPEATS = 3  # steps that are timed


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--case"]:
        print(json.dumps(measured(**json.loads(argv[1]))))
        return 0
    args = _arguments(argv)
    results = [measured(**case) if args.quick else _in_a_process(case) for case in _cases(args)]
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    path = measuring.write("memory", settings, results, args.json, argv=argv)
    print(section(json.loads(path.read_text(encoding="utf-8"))))
    print(f"wrote {path}", file=sys.stderr)
    return 0 if same_losses(results) else 1


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/memory.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, all in this process, to see that it works"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible")
    return args


def _cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Settings of each process: the variants at a small size, then the policies at the reference size."""
    given = {"device": args.device, "bf16": args.device == "cuda"}
    if args.quick:
        of_variants, reference = (
            {"size": "tiny", "rows": 2, "length": 32},
            {"size": "tiny", "rows": 4, "length": 64},
        )
        variants: Sequence[str] = VARIANTS[:1]
    else:
        rows = 128 if args.device == "cuda" else 8
        of_variants, reference = (
            {"size": "6m", "rows": 8, "length": 256},
            {"size": "26m", "rows": rows, "length": 512},
        )
        variants = VARIANTS
    cases = [{"name": name, "policy": "none", **of_variants} for name in variants]
    cases += [{"name": "original", "policy": policy, **reference} for policy in POLICIES]
    # A step of several micro-batches: gradients and activations are there at the same time.
    cases.append({"name": "original", "policy": "none", **reference, "micro_batches": 2})
    return [{**case, **given} for case in cases]


def _in_a_process(case: Mapping[str, Any]) -> dict[str, Any]:
    print(" ".join(str(value) for value in case.values()), file=sys.stderr)
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    # The profiler tells of each of its recordings on stderr.
    quiet = {**os.environ, "KINETO_LOG_LEVEL": "6"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------- one case


def measured(
    *, name: str, policy: passing.Recompute, size: str, rows: int, length: int, device: str, bf16: bool,
    micro_batches: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Estimate and measurement of one model and policy, in bytes. rows: of the step, in all micro-batches."""
    torch.manual_seed(0)
    config = models.preset(
        name, size, **({"store": "random", "store_side": 64} if name == "knowledge" else {})
    )
    batches = [_batch(config, rows // micro_batches, length, device) for _ in range(micro_batches)]
    if device == "cpu":
        keep_freed_memory()  # as a run does
    before = _process_bytes(device)
    run = _Run(config, policy, device, bf16)
    run.step(batches)
    found = run.parts(batches[0])
    with _Record(device) as record:
        loss = run.step(batches)
    found |= {"peak": record.most + run.lasting, "optimizer": run.moments(), "gradients": run.gradients}
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        run.step(batches)
        times.append(time.perf_counter() - begun)
    weights = sum(p.nbytes for p in run.objective.parameters())
    foreseen = _estimate(config, policy, rows, length, device, bf16, micro_batches, run.optimizer)
    return {
        "case": {"name": name, "policy": policy, "size": size, "rows": rows, "length": length,
                 "micro_batches": micro_batches, "parameters": config.num_parameters()},
        "estimate": {
            **{part: getattr(foreseen, part) for part in PARTS},
            "activations": (foreseen.activations or 0) - foreseen.recomputed,  # at the end of the forward pass
        },
        "measured": {part: ({"weights": weights} | found)[part] for part in PARTS},
        "process_peak": _process_bytes(device) - before,
        "seconds": measuring.spread(times),
        "loss": loss,
    }  # fmt: skip


def _batch(config: ModelConfig, rows: int, length: int, device: str) -> Batch:
    """Random tokens, two documents a row."""
    tokens = torch.randint(
        0, config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(1)
    )
    segments = torch.ones_like(tokens)
    segments[:, length // 2 :] = 2
    return align(tokens, segments).to(torch.device(device))


def _estimate(
    config: ModelConfig, policy: passing.Recompute, rows: int, length: int, device: str, bf16: bool,
    micro_batches: int, optimizer: torch.optim.Optimizer,
) -> Memory:  # fmt: skip
    spread = Spread(
        kind="single", ranks=1, bf16=bf16, device="cuda" if device == "cuda" else "cpu", rows=rows // micro_batches,
        accumulation=micro_batches, recompute=policy,
    )  # fmt: skip
    moments = 2 * sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    kernel = kernel_of(config, torch.device(device), bf16=bf16)
    return memory(config, spread, length=length, backend=kernel, num_moments=moments)


class _Run:
    """A model that trains: whole steps, and what lies between their parts."""

    def __init__(self, config: ModelConfig, policy: passing.Recompute, device: str, bf16: bool) -> None:
        model = models.build(config)
        passing.arrange(model, recompute=policy, compiled=False)
        self.objective: nn.Module = Objective(model).to(device).train()
        self.optimizer = optim.build(self.objective.model, optim.OptimConfig())
        self.device, self.bf16 = device, bf16
        self.gradients = 0

    @property
    def lasting(self) -> int:
        """Bytes that lie there between two steps."""
        store = getattr(self.objective.model, "store", None)
        tables = [] if store is None else store.tensors().values()
        return sum(t.nbytes for t in (*self.objective.parameters(), *tables)) + self.moments()

    def loss_of(self, batch: Batch) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            part, extra = self.objective(batch)
        return part.share(float(batch.num_targets())) + sum(extra.values())

    def step(self, batches: Sequence[Batch]) -> float:
        loss = 0.0
        for batch in batches:
            value = self.loss_of(batch)
            value.backward()
            loss += float(value.detach()) / len(batches)
            del value
        self.gradients = sum(p.grad.nbytes for p in self.objective.parameters() if p.grad is not None)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def moments(self) -> int:
        states = self.optimizer.state.values()
        return sum(
            v.nbytes for state in states for key, v in state.items() if torch.is_tensor(v) and key != "step"
        )

    def parts(self, batch: Batch) -> dict[str, int]:
        """What a forward leaves for the backward pass, and what the loss head takes beyond that for a moment."""
        with _Record(self.device) as whole:
            loss = self.loss_of(batch)
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            hidden = self.objective.model(
                batch.inputs, segments=batch.segments, positions=batch.positions
            ).hidden
        hidden.requires_grad_()
        with _Record(self.device) as head, torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            nats = score_hidden(hidden, self.objective.model.head_weight, batch)
        del loss, nats
        return {"activations": whole.now, "logits": head.most - head.now}


class _Record:
    """Bytes in tensors over those before it: at most, and at the end. On a CPU torch's profiler knows them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.most = self.now = 0

    def __enter__(self) -> _Record:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ).__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.most = torch.cuda.max_memory_allocated() - self.before
            self.now = torch.cuda.memory_allocated() - self.before
            return
        self.profile.__exit__(None, None, None)
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        sums = list(itertools.accumulate((event.nbytes() for event in events), initial=0))
        self.most, self.now = max(sums), sums[-1]


def _process_bytes(device: str) -> int:
    """The most that this process has had so far: resident, or reserved on the device."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- what comes of it


def same_losses(results: Sequence[Mapping[str, Any]]) -> bool:
    """Cases that differ in the policy alone must have one loss, bit for bit."""
    losses: dict[str, set[float]] = {}
    for result in results:
        case = {key: value for key, value in result["case"].items() if key != "policy"}
        losses.setdefault(json.dumps(case), set()).add(result["loss"])
    return all(len(found) == 1 for found in losses.values())


def worst(results: Sequence[Mapping[str, Any]]) -> float:
    """The largest error of an estimated peak, as a share of the measured one."""
    return max(abs(r["estimate"]["peak"] / r["measured"]["peak"] - 1) for r in results)


def section(record: Mapping[str, Any]) -> str:
    """Its part of docs/performance.md."""
    results = record["results"]
    rows, policies = [], []
    for result in results:
        case, took = result["case"], result["measured"]
        cut = f" in {case['micro_batches']} parts" if case["micro_batches"] > 1 else ""
        name = f"{case['name']} {case['size']}, {case['rows']} x {case['length']}{cut}, {case['policy']}"
        each = [f"{result['estimate'][part] / 1e6:,.0f} / {took[part] / 1e6:,.0f}" for part in PARTS]
        error = result["estimate"]["peak"] / took["peak"] - 1
        rows.append([name, *each, f"{error:+.1%}", f"{result['process_peak'] / 1e6:,.0f}"])
    same = [r for r in results if (r["case"]["name"], r["case"]["micro_batches"]) == ("original", 1)]
    same = [
        r
        for r in same
        if r["case"]["rows"] == results[-1]["case"]["rows"]
        and r["case"]["size"] == results[-1]["case"]["size"]
    ]
    plain = next(r for r in same if r["case"]["policy"] == "none")
    for result in same:
        less = result["measured"]["peak"] / plain["measured"]["peak"]
        policies.append([result["case"]["policy"], f"{result['measured']['activations'] / 1e6:,.0f}", f"{less:.2f}",
                         f"{result['seconds']['median'] / plain['seconds']['median']:.2f}"])  # fmt: skip
    error = worst(results)
    held = "within" if error <= PROMISED else "NOT within"
    text = [
        "## Memory",
        f"The memory of a step was foreseen to {error:.0%}, {held} the {PROMISED:.0%} that `--dry-run` and "
        "`train.micro_batch: auto` promise.",
        measuring.table(["MB, estimate / measured", *PARTS, "error", "process"], rows),
        "Activations are those at the end of the forward pass; logits, what the loss head takes for a moment; peak, "
        "the most in tensors at once; process, by how much the whole process grew, with its allocator's gaps and the "
        "threads' buffers.",
        "What `train.activation_checkpointing` gives and costs, as shares of none:",
        measuring.table(["policy", "activations, MB", "peak", "time"], policies),
        f"`{record['command']}`",
    ]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
