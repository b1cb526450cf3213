"""How a knowledge store is used: columns of the training log, from sums over the tokens of one step.

    usage/blocks.N/null            share of the attention on the null slot
    usage/blocks.N/gate            how far the readings are let through, mean over heads
    usage/blocks.N/coverage        share of the entries that were read at all in the step
    usage/blocks.N/coverage_even   the same if the reads were spread by chance: a step cannot cover a million entries
    usage/blocks.N/entropy         of the reads over the entries, as a share of the largest possible
    usage/blocks.N/top_entry       share of the reads that went to the entry read most, top_row its source row
    usage/blocks.N/top_percent     share of the reads that went to the 1 % of the entries read most
    usage/blocks.N/dead_rows, dead_columns   share of the grid's rows and columns that nothing was read from
    usage/blocks.N/hit, hit_first  share of the labelled tokens whose entry was among the read ones, was the first

The last two are there where the data say which entry a target needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minilm.knowledge.store import KnowledgeStore
from minilm.models.memory import Read


def collected(read: Read, keep: Tensor, labels: Tensor | None, store: KnowledgeStore) -> dict[str, Tensor]:
    """Sums over the tokens of one forward that count (`keep` [B, L] bool). labels [B, L]: slots, -1 where unknown."""
    taken = read.slots[keep]  # [N, m]
    real = store.lengths[taken] > 0
    reads = torch.bincount(taken[real], minlength=store.num_slots)  # [slots]
    sums = {
        "tokens": keep.sum(),
        "null": read.null[keep].sum(),
        "gate": read.gates[keep].mean(dim=-1).sum(),
        "reads": reads,
    }
    if labels is not None:
        known = keep & (labels >= 0)
        same = read.slots[known] == labels[known].unsqueeze(-1)  # [K, m]
        sums |= {"labelled": known.sum(), "hit": same.any(dim=-1).sum(), "hit_first": same[:, 0].sum()}
    return sums


def usage_columns(sums: Mapping[str, Tensor], store: KnowledgeStore) -> dict[str, float]:
    """Names `memory/LAYER/NAME` with the sums of a whole step -> the columns."""
    layers = sorted({name.split("/")[1] for name in sums})
    columns = {}
    for layer in layers:
        own = {name.split("/")[2]: value for name, value in sums.items() if name.split("/")[1] == layer}
        columns |= {f"usage/{layer}/{name}": value for name, value in _of_layer(own, store).items()}
    return columns


def _of_layer(sums: Mapping[str, Tensor], store: KnowledgeStore) -> dict[str, float]:
    tokens = max(float(sums["tokens"]), 1.0)
    columns = {"null": float(sums["null"]) / tokens, "gate": float(sums["gate"]) / tokens}
    reads = sums["reads"].cpu().double()
    total, entries = float(reads.sum()), store.num_entries
    if total:
        share = reads[reads > 0] / total
        falling = share.sort(descending=True).values
        top = int(reads.argmax())
        grid = reads.view(store.side, store.side)
        held = (store.lengths.cpu() > 0).view(store.side, store.side)
        columns |= {
            "coverage": len(share) / entries,
            "coverage_even": -math.expm1(total * math.log1p(-1 / entries)) if entries > 1 else 1.0,
            "entropy": float(-(share * share.log()).sum()) / math.log(entries) if entries > 1 else 1.0,
            "top_entry": float(falling[0]),
            "top_row": float(store.rows[top]),
            "top_percent": float(falling[: max(1, entries // 100)].sum()),
            "dead_rows": _dead(grid.sum(dim=1), held.any(dim=1)),
            "dead_columns": _dead(grid.sum(dim=0), held.any(dim=0)),
        }
    if "labelled" in sums and float(sums["labelled"]):
        labelled = float(sums["labelled"])
        columns |= {name: float(sums[name]) / labelled for name in ("hit", "hit_first")}
    return columns


def _dead(reads: Tensor, held: Tensor) -> float:
    return float((held & (reads == 0)).sum()) / float(held.sum())
