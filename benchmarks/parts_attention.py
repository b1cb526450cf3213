"""The attention that `parts.py` measures: every backend of minilm, and torch's kernels by themselves."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, get_args

import torch
import torch.nn.functional as F
from parts_cases import BOTH, FORWARD, TOLERANCES, Case, Shape, Way, differentiable, reason
from torch import Tensor

from minilm.errors import ConfigError
from minilm.models import attention, parts
from minilm.models.base import Backend

PACKED_MEAN = 100  # tokens of a document


def attention_cases(shape: Shape) -> Iterator[Case]:
    """By head size, for one document a row and for packed documents; the width of the model stays."""
    for size in shape.head_sizes:
        for packed in (False, True):
            yield _attention(shape, size, packed)


def documents(rows: int, length: int, mean: int) -> Tensor:
    """Segments [rows, length] of documents of 1 to 2 x mean - 1 tokens, one after another from a fixed generator."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 2 * mean, (rows, length), generator=generator)
    ends = lengths.cumsum(dim=1)  # [rows, length]: more documents than fit
    return 1 + torch.searchsorted(ends, torch.arange(length).expand(rows, length).contiguous(), right=True)


def _attention(shape: Shape, size: int, packed: bool) -> Case:
    heads = max(1, shape.config.dim // size)
    kv_heads = max(1, heads // (shape.config.num_heads // shape.config.num_kv_heads))
    ones = torch.ones(shape.rows, shape.length, dtype=torch.long)
    segments = documents(shape.rows, shape.length, PACKED_MEAN) if packed else ones
    segments = segments.to(shape.device)
    before = torch.ones(shape.length, shape.length, dtype=torch.bool, device=shape.device).tril()
    mask = (before & (segments[:, :, None] == segments[:, None, :])).unsqueeze(1)  # [B, 1, L, L]
    q, k, v = (shape.randn(shape.rows, shape.length, count, size) for count in (heads, kv_heads, kv_heads))
    pairs = float(mask.sum())
    once, moved = 4 * size * heads * pairs, sum(x.nbytes for x in (q, k, v, q))
    what = f"packed documents of mean {PACKED_MEAN}" if packed else "one document a row"
    work = {FORWARD: (once, moved), BOTH: (3 * once, 3 * moved)}
    case = Case("attention", f"head size {size}, {what}", work, "", "torch sdpa", TOLERANCES[shape.dtype])
    ways = _backends(shape, segments, size, case)
    ways |= _torch_kernels(shape, mask, packed, case)
    return differentiable(case, (q, k, v), ways, functools.partial(_written_out, mask=mask))


def _backends(shape: Shape, segments: Tensor, size: int, case: Case) -> dict[str, Way]:
    """Every backend that there is in minilm, with the plan that a training step makes of these segments."""
    rotary = parts.Rotary(size, shape.length, 10_000.0).to(shape.device)
    found: dict[str, Way] = {}
    for backend in get_args(Backend):
        try:
            shared = attention.plan(
                backend, *rotary(shape.length), inputs=segments, segments=segments, dtype=shape.dtype,
                head_dim=size, cache=None,
            )  # fmt: skip
        except ConfigError as error:
            case.absent[f"minilm {backend}"] = reason(error)
            continue
        name = f"minilm {shared.backend}"
        case.ours = name if backend == "auto" else case.ours
        found[name] = functools.partial(attention.attend, plan=shared)
    return dict(sorted(found.items()))


def _torch_kernels(shape: Shape, mask: Tensor, packed: bool, case: Case) -> dict[str, Way]:
    """torch by itself, and on CUDA each of its kernels that takes these rows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def plainly(q: Tensor, k: Tensor, v: Tensor, kernel: Any = None) -> Tensor:
        if shape.device.type == "cuda":  # its kernels with a mask know no grouped heads
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        given = {"attn_mask": mask} if packed else {"is_causal": True}
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        if kernel is None:
            out = F.scaled_dot_product_attention(*heads, **given, enable_gqa=k.shape[2] != q.shape[2])
        else:
            with sdpa_kernel(kernel):
                out = F.scaled_dot_product_attention(*heads, **given)
        return out.transpose(1, 2)

    found: dict[str, Way] = {"torch sdpa": plainly}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        name = f"torch sdpa, {kernel.name.lower().removesuffix('_attention')} alone"
        if shape.device.type == "cuda":
            found[name] = functools.partial(plainly, kernel=kernel)
        else:
            case.absent[name] = "a kernel for CUDA"
    return found


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v in float32, head by head."""
    group = q.shape[2] // k.shape[2]
    mixed = []
    for head in range(q.shape[2]):
        one = q[:, :, head].float(), k[:, :, head // group].float(), v[:, :, head // group].float()
        scores = one[0] @ one[1].mT / q.shape[3] ** 0.5  # [B, L, L]
        mixed.append(scores.masked_fill(~mask[:, 0], float("-inf")).softmax(dim=-1) @ one[2])
    return torch.stack(mixed, dim=2)
