"""One attention function, five kernels that give the same answer.

    flash      the flash-attn package: variable-length kernel, no mask, work only inside documents. CUDA, 16 bit.
    varlen     torch's own variable-length kernel, of the same kind (torch.nn.attention.varlen). CUDA, 16 bit.
    blockwise  document by document on a CPU (`minilm.models.blockwise`). float32.
    sdpa       torch's scaled_dot_product_attention, with a mask where rows have several documents
    eager      written out: the reference for reading and testing
    auto       the first of these that can run: flash, varlen, blockwise, sdpa

With a cache sdpa runs in place of the first three: a row there is a few queries over a left-padded buffer. So it does
in place of the last two of them with dropout, which they do not know.

The rule is the same for all: query i attends to the keys j <= i of its own segment. Padding (segment 0)
attends to padding, so that a row of a softmax is never empty and nothing becomes NaN.
What the layers of one forward pass share is made once, in a `Plan`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.errors import ConfigError
from minilm.models.blockwise import attend as attend_by_blocks
from minilm.models.cache import KVCache

BY_DOCUMENT = (
    "flash",
    "varlen",
    "blockwise",
)  # kernels that are told where documents begin, and take no mask


@dataclass(frozen=True)
class Plan:
    """Everything about the rows of one forward pass that its layers share.

    backend  the kernel: never auto
    cos, sin [B or 1, L, 1, head_dim / 2] rotary factors of each position
    mask     [B or 1, 1, L, S] bool, True = may attend; None where plain causal attention says it all: as many keys as
             queries, or one query, the latest
    borders  int32 [documents + 1] first flat index of each document, then B * L (`BY_DOCUMENT` only)
    longest  upper bound of a document's length (likewise)
    cache    keys and values of earlier calls, to be extended
    """

    backend: str
    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    borders: Tensor | None = None
    longest: int = 0
    cache: KVCache | None = None


def plan(
    backend: str,
    cos: Tensor,
    sin: Tensor,
    *,
    inputs: Tensor,
    segments: Tensor | None,
    dtype: torch.dtype,
    head_dim: int,
    cache: KVCache | None,
    dropout: float = 0.0,
    documents: int | None = None,
) -> Plan:
    """Choose the kernel and describe who attends to whom.

    segments   those of the inputs [B, L] or None
    documents  how many runs of one segment they have, where that is known: it saves waiting for an accelerator
    """
    rows, length = inputs.shape
    backend = resolve(backend, inputs.device, dtype, head_dim, dropout)
    if cache is not None:
        backend = "sdpa" if backend in BY_DOCUMENT else backend
        if backend == "sdpa" and cache.unpadded and (length == 1 or cache.length == 0):
            return Plan(backend, cos, sin, cache=cache)
        # The buffer is longer than the queries, so "causal" alone would be aligned wrongly: a mask.
        known = cache.all_segments  # [B, S], the segments of these inputs included
        return Plan(backend, cos, sin, mask=allowed(known[:, -length:], known), cache=cache)
    if backend in BY_DOCUMENT:
        ends = borders(segments, rows, length, inputs.device, documents)
        return Plan(backend, cos, sin, borders=ends, longest=length)
    if segments is not None:
        return Plan(backend, cos, sin, mask=allowed(segments, segments))
    if backend == "eager":
        one = torch.ones(1, length, dtype=torch.long, device=inputs.device)
        return Plan(backend, cos, sin, mask=allowed(one, one))
    return Plan(backend, cos, sin)


def allowed(queries: Tensor, keys: Tensor) -> Tensor:
    """Segments of queries [B, L] and keys [B, S], the queries being the last L keys -> mask [B, 1, L, S]."""
    length, total = queries.shape[1], keys.shape[1]
    same = queries[:, :, None] == keys[:, None, :]  # [B, L, S]
    index = torch.arange(total, device=keys.device)
    causal = index[None, :] <= index[total - length :, None]  # [L, S]
    return (same & causal).unsqueeze(1)


def borders(
    segments: Tensor | None, rows: int, length: int, device: torch.device, documents: int | None = None
) -> Tensor:
    """Where documents begin in the flattened rows, then the end: the `cu_seqlens` of variable-length kernels.

    Every row begins a document, so does every change of segment; padding is a document to itself. How many there are
    is the size of the result: the host has to wait for an accelerator to tell it, or to know (`documents`). Where that
    number is wrong, attention would leave tokens out: RuntimeError, on an accelerator when it gets there.
    """
    if segments is None:
        return torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
    starts = torch.zeros(rows, length, dtype=torch.bool, device=device)
    starts[:, 0] = True
    starts[:, 1:] |= segments[:, 1:] != segments[:, :-1]
    if documents is None:
        first = starts.flatten().nonzero().flatten()
        return F.pad(first, (0, 1), value=rows * length).to(torch.int32)
    begun = starts.flatten().cumsum(0)  # documents so far: the first place with k of them begins the k-th
    torch._assert_async(begun[-1] == documents, "the number of documents given is not that of the segments")
    return torch.searchsorted(begun, torch.arange(1, documents + 2, device=device), out_int32=True)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float = 0.0) -> Tensor:
    """q [B, L, H, d], k and v [B, S, Hkv, d] -> [B, L, H, d]. Query head h uses key/value head h // (H / Hkv).

    `dropout` is the probability to drop an attention weight: the caller passes 0 outside of training.
    """
    return _KERNELS[plan.backend](q, k, v, plan, dropout)


def eager(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    """The reference, written out. Shapes as in `attend`, and so for the other kernels."""
    assert plan.mask is not None
    k, v = (repeated(x, q.shape[2]) for x in (k, v))
    scores = torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
    precise = (
        scores if scores.dtype == torch.float64 else scores.float()
    )  # a softmax in 16 bits loses the tail
    weights = precise.masked_fill(~plan.mask, float("-inf")).softmax(dim=-1).to(v.dtype)
    return torch.einsum("bhls,bshd->blhd", F.dropout(weights, dropout, training=dropout > 0), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    """torch's kernels; it picks the fastest that takes these tensors."""
    if q.shape[1] == 1 and k.shape[2] != q.shape[2] and dropout == 0:
        return _one_query(q, k, v, plan.mask)
    if q.is_cuda and (plan.mask is not None or q.dtype not in (torch.float16, torch.bfloat16)):
        # Only the memory-efficient CUDA kernel takes a mask or float32, and it knows no grouped heads: left
        # alone, torch would fall back to the kernel that writes all scores to memory.
        k, v = (repeated(x, q.shape[2]) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=plan.mask,
        dropout_p=dropout,
        # Without a mask there are as many keys as queries (torch aligns its triangle top left), or one query.
        is_causal=plan.mask is None and q.shape[1] > 1,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One token a row, as in generation: the heads that share keys are queries of one head, and keys are read once."""
    rows, _, heads, width = q.shape
    grouped = q.reshape(rows, k.shape[2], heads // k.shape[2], width)  # [B, Hkv, H / Hkv, d]
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.reshape(rows, 1, heads, width)


def flash(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    """The variable-length kernel of the package flash-attn: all documents of all rows in one flat row."""
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q.flatten(0, 1),  # [B * L, H, d]: rows follow each other, `borders` tells the documents apart
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=plan.borders,
        cu_seqlens_k=plan.borders,
        max_seqlen_q=plan.longest,
        max_seqlen_k=plan.longest,
        dropout_p=dropout,
        causal=True,
    )
    return out.view_as(q)


def varlen(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    """torch's own variable-length kernel. Source: docs.pytorch.org, torch.nn.attention.varlen."""
    if dropout:
        return _one_by_one(q, k, v, plan, dropout)
    from torch.nn.attention.varlen import varlen_attn

    known = _parameters_of_varlen()
    if "enable_gqa" not in known:  # torch 2.11 and before
        k, v = (repeated(x, q.shape[2]) for x in (k, v))
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = {"enable_gqa": k.shape[2] != q.shape[2]} if "enable_gqa" in known else {}
    flat = (x.flatten(0, 1) for x in (q, k, v))
    ends = (plan.borders, plan.borders, plan.longest, plan.longest)
    return varlen_attn(*flat, *ends, **causal, **grouped).view_as(q)


def blockwise(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    """Document by document on a CPU: see `minilm.models.blockwise`."""
    if dropout:
        return _one_by_one(q, k, v, plan, dropout)
    assert plan.borders is not None
    return attend_by_blocks(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), plan.borders).view_as(q)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    """Each document through torch's kernel: where dropout was turned on in a model whose settings have none."""
    assert plan.borders is not None
    sizes = plan.borders.diff().tolist()
    documents = zip(*(x.flatten(0, 1).unsqueeze(0).split(sizes, dim=1) for x in (q, k, v)), strict=True)
    whole = Plan("sdpa", plan.cos, plan.sin)
    return torch.cat([sdpa(*one, whole, dropout) for one in documents], dim=1).view_as(q)


_KERNELS = {"eager": eager, "sdpa": sdpa, "flash": flash, "varlen": varlen, "blockwise": blockwise}


def repeated(x: Tensor, num_heads: int) -> Tensor:
    """[B, S, Hkv, d] -> [B, S, H, d]: each key/value head H / Hkv times in a row."""
    return x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], dim=2)


def resolve(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float = 0.0
) -> str:
    """The kernel that runs. Raises ConfigError where one was asked for that cannot."""
    if backend in ("sdpa", "eager"):
        return backend
    for name in BY_DOCUMENT if backend == "auto" else (backend,):
        reason = refusal(name, device, dtype, head_dim, dropout)
        if reason is None:
            return name
    if backend != "auto":
        raise ConfigError(f"model.attention is {backend}, but {reason}")
    return "sdpa"


def refusal(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float = 0.0
) -> str | None:
    """Why a kernel of `BY_DOCUMENT` cannot run on such tensors here, with what to do; None if it can."""
    if name == "flash":
        return flash_refusal(device, dtype, head_dim) or flash_missing()
    if dropout:
        return f"{name} knows no dropout, and model.dropout is {dropout:g}. Choose attention: auto."
    if name == "varlen":
        return varlen_refusal(device, dtype, head_dim)
    return blockwise_refusal(device, dtype)


@functools.cache
def flash_missing() -> str | None:
    """Why the package flash-attn cannot be used at all, with what to do; None if it can be imported."""
    advice = (
        "Install it on a machine with a CUDA compiler (pip install flash-attn --no-build-isolation), or choose "
        "attention: auto, which uses the flash kernel inside torch."
    )
    if importlib.util.find_spec("flash_attn") is None:
        return f"the package flash-attn is not installed. {advice}"
    try:
        importlib.import_module("flash_attn")
    except (
        ImportError,
        OSError,
    ) as error:  # built for another torch or CUDA: common, and no reason to stop `auto`
        problem = f"the installed flash-attn cannot be imported ({error})"
        warnings.warn(f"{problem}; attention: auto uses torch's kernels instead.", stacklevel=2)
        return f"{problem}. {advice}"
    return None


def flash_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the installed package cannot run on these tensors; None if it can."""
    return _unlike_flash("flash-attn", device, dtype, head_dim)


def varlen_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why torch's variable-length kernel cannot run on these tensors; None if it can."""
    if reason := _unlike_flash("torch's varlen kernel", device, dtype, head_dim):
        return reason
    if (
        torch.version.hip
        or not torch.cuda.is_available()
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return "torch's varlen kernel needs an NVIDIA GPU of compute capability 8.0 or higher. Choose auto."
    if not _parameters_of_varlen():
        return f"torch {torch.__version__} has no torch.nn.attention.varlen. Choose auto."
    return None


def _unlike_flash(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What both kernels want, as they are of one kind."""
    if device.type != "cuda":
        return f"{name} runs on CUDA only, and the model is on {device.type}. Choose attention: auto."
    if dtype not in (torch.float16, torch.bfloat16):
        return (
            f"{name} needs float16 or bfloat16, and attention runs in {dtype}. Train in bf16 or choose auto."
        )
    if head_dim % 8 or head_dim > 256:
        return f"{name} needs a head size that is a multiple of 8 up to 256, not {head_dim}. Choose auto."
    return None


@functools.cache
def _parameters_of_varlen() -> tuple[str, ...]:
    """What torch's kernel can be told, which grew from version to version; nothing where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    return tuple(inspect.signature(varlen_attn).parameters)


def blockwise_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel for CPUs cannot run on these tensors; None if it can."""
    if device.type != "cpu":
        return f"blockwise runs on a CPU only, and the model is on {device.type}. Choose attention: auto."
    if dtype != torch.float32:
        return f"blockwise computes in float32, and attention runs in {dtype}. Choose attention: auto."
    return None
