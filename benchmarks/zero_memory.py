"""Bytes of the model states on each rank, added up from the tensors that DeepSpeed really holds after a step.

    accelerate launch --config_file run_file/accelerate/cpu2_zero2.yaml benchmarks/zero_memory.py 26m

Each rank prints one line per kind of state, beside the formula of docs/launching.md. Tensors only: buckets in which
gradients travel, activations and what the allocator keeps are not in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import torch

from minilm import models
from minilm.alignment import align
from minilm.training import optim
from minilm.training.layout import Asked, Layout
from minilm.training.objective import Objective
from minilm.training.step import optimizer_step


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def measure(layout: Layout, model_size: str) -> dict[str, tuple[int, float]]:
    """Name -> bytes held by this rank, bytes by the formula."""
    torch.manual_seed(0)
    model = models.build(models.preset("original", model_size)).to(layout.device)
    n, ranks = sum(p.numel() for p in model.parameters()), layout.world_size
    layout.prepare(Objective(model), optim.build(model, optim.OptimConfig()))
    tokens = torch.randint(0, 256, (1, 33), generator=torch.Generator().manual_seed(layout.rank))
    zero = layout.engine.optimizer
    found: dict[str, tuple[int, float]] = {}

    def before_update() -> None:
        shards = (part for parts in zero.averaged_gradients.values() for part in parts or ())
        found["gradients, float32"] = size(shards), 4 * n / ranks

    optimizer_step(layout, [align(tokens, torch.ones_like(tokens))], before_update=before_update)
    moments = (x for state in zero.optimizer.state.values() for name, x in state.items() if name != "step")
    found["weights, bf16"] = size(layout.model.parameters()), 2 * n
    found["master weights, float32"] = size(zero.single_partition_of_fp32_groups), 4 * n / ranks
    found["moments, float32"] = size(moments), 8 * n / ranks
    found["sum"] = sum(held for held, _ in found.values()), (2 + 16 / ranks) * n
    return found


def main() -> None:
    layout = Layout(Asked(int(os.environ.get("WORLD_SIZE", "1")), 1, "bf16", "auto", 1.0, None))
    found = measure(layout, sys.argv[1] if len(sys.argv) > 1 else "26m")
    for rank in range(layout.world_size):
        layout.barrier()
        if rank == layout.rank:
            for name, (held, formula) in found.items():
                print(
                    f"rank {rank} of {layout.world_size}: {name:24} {held:>13,} formula {formula:>15,.0f}",
                    flush=True,
                )
    layout.close()


if __name__ == "__main__":
    main()
