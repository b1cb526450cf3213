"""The only shift, the only mask, the only mean.

A loss is wrong without any error when tokens, targets and weights disagree about which position predicts
which token. Here they can only be made together: `align` takes rows of tokens and returns a `Batch` in which
every field is already in the frame of the logits. Upstream nothing is shifted, downstream nothing is
unshifted, and no function takes a mask beside a batch.

A loss travels as a `Sum` (nats, tokens, bytes). Sums add; means do not: the mean over two micro-batches is
not the mean of their means. So the only divisions are the properties of `Sum`, used where a number is shown,
and `Sum.share`, the part that a micro-batch contributes to the gradient of the mean over a known total.

    rows [B, L+1]        the   cat   sat   EOS | a    dog   EOS   PAD          segments 1 1 1 1 2 2 2 0
    inputs  [B, L]       the   cat   sat   EOS   a    dog   EOS
    targets [B, L]       cat   sat   EOS   a     dog  EOS   PAD
    weights [B, L]       1     1     1     0     1    1     0
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from minilm import onednn
from minilm.errors import DataError

IGNORED = -100  # the Hugging Face mark for "not a target"; it exists at the border only (`from_labels`)
_NO_TARGET = torch.iinfo(torch.int64).min  # the same inside `nll`: equal to no id, not even to a wrong one


@dataclass(frozen=True)
class Batch:
    """Rows ready for a causal language model. Every field is [B, L], in the frame of the logits.

    inputs     int64    hidden[b, i] is computed from inputs[b, : i + 1] of its own segment
    segments   int64    number of the document within the row, 1, 2, ...; 0 is padding
    positions  int64    0, 1, 2, ... within the document; 0 at padding
    targets    int64    logits[b, i] must predict targets[b, i]
    weights    float32  1 where that prediction counts, else 0
    entries    int64    row of the knowledge source from which targets[b, i] can be known, -1 where none is known
                        and where no prediction counts; None where the data carry no such labels
    documents  int      number of runs of one segment, counted as a batch leaves the host (`to`); else None
    """

    inputs: Tensor
    segments: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    entries: Tensor | None = None
    documents: int | None = dataclasses.field(default=None, init=False, compare=False)  # `replace` forgets it

    def __post_init__(self) -> None:
        shapes = {name: tuple(field.shape) for name, field in self._fields().items()}
        if len(set(shapes.values())) > 1:  # one that broadcasts would be averaged over the wrong count
            raise DataError(f"All fields of a batch have one shape [B, L]; these are {shapes}.")

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        moved, documents = self.each(lambda x: x.to(device, non_blocking=non_blocking)), self.documents
        if self.segments.is_cpu and not moved.segments.is_cpu:  # there, counting would hold up the host
            goes_on = self.segments[:, 1:] == self.segments[:, :-1]
            documents = self.segments.numel() - int(goes_on.sum())
        object.__setattr__(moved, "documents", documents)
        return moved

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of all fields after the same change."""
        return Batch(**{name: change(field) for name, field in self._fields().items()})

    def rows(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop` (exclusive) as a batch of their own."""
        return self.each(lambda x: x[start:stop])

    def num_targets(self) -> Tensor:
        """How many predictions count: the denominator of the mean loss, a float64 scalar."""
        return self.weights.sum(dtype=torch.float64)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L): rows and predictions per row."""
        return self.inputs.shape[0], self.inputs.shape[1]

    def _fields(self) -> dict[str, Tensor]:
        """The fields of a value per position that there are: `entries` may be absent."""
        return {name: field for name, field in vars(self).items() if isinstance(field, Tensor)}


def align(
    tokens: Tensor, segments: Tensor, learn: Tensor | None = None, entries: Tensor | None = None
) -> Batch:
    """Rows of tokens -> a batch: position i predicts token i + 1 of the same document.

    tokens    [B, L+1] integers. Ids are not inspected: padding is known by its segment, never by its id, so a
              tokenizer whose PAD is its EOS needs no special care.
    segments  [B, L+1] integers: 0 is padding, documents have numbers that rise along the row. Padding may
              stand before, between and after documents; a document is one unbroken run.
    learn     [B, L+1] bool, optional: is TOKEN i to be learnt (for instance only the answer to a prompt).
    entries   [B, L+1] integers, optional: row of the knowledge source from which TOKEN i can be known, -1 where
              none is known. It travels with its token: in the batch it stands where that token is predicted.

    A prediction counts when input and target are of the same document and the target is to be learnt: the
    first token of a document is nobody's target, padding neither predicts nor is predicted. Where no prediction
    counts there is no label either.

    Raises DataError for shapes, types or segment numbers that do not fit this description.
    """
    _check_types(tokens, segments, learn, entries)
    tokens, segments = tokens.long(), segments.long()  # ids from disk may be of a type with few operations
    _check_documents(segments)
    source, target = segments[:, :-1], segments[:, 1:]
    counts = (source == target) & (target > 0)
    if learn is not None:
        counts = counts & learn[:, 1:]
    return Batch(  # copies: as views of one row, writing to inputs would write to targets
        inputs=tokens[:, :-1].clone(),
        segments=source.clone(),
        positions=positions_within(segments)[:, :-1].clone(),
        targets=tokens[:, 1:].clone(),
        weights=counts.float(),
        entries=None if entries is None else torch.where(counts, entries[:, 1:].long(), -1),
    )


def from_labels(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Batch:
    """The Hugging Face convention at the border: `labels` [B, T] unshifted, -100 where nothing is learnt.

    Labels other than -100 must equal `input_ids`: a causal language model is asked for the token that stands
    there. Labels that were shifted beforehand do not, and are refused (the bug `double-shift`).

    Padding (`attention_mask` 0) neither predicts nor is predicted. transformers itself looks at the labels
    alone: it also counts a label that stands on padding, and the first token after padding on the left.

    Source: https://huggingface.co/docs/transformers (causal language modelling, `labels`).
    """
    for name, value in (("labels", labels), ("attention_mask", attention_mask)):
        if value is not None and value.shape != input_ids.shape:
            raise DataError(
                f"{name} has shape {list(value.shape)}, input_ids {list(input_ids.shape)}: they must be equal."
            )
    learn = labels != IGNORED
    wrong = learn & (labels != input_ids)
    if bool(wrong.any()):
        row, column = (int(x) for x in wrong.nonzero()[0])
        raise DataError(
            f"labels[{row}, {column}] is {int(labels[row, column])} but input_ids[{row}, {column}] is "
            f"{int(input_ids[row, column])}. Labels must be the unshifted input_ids, or -100; "
            "labels that were shifted beforehand would be shifted twice."
        )
    segments = torch.ones_like(input_ids) if attention_mask is None else (attention_mask > 0).long()
    return align(input_ids, segments, learn)


def positions_within(segments: Tensor) -> Tensor:
    """[B, T] segments -> [B, T] positions that restart at 0 with each document; 0 at padding."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return torch.where(segments > 0, index - first, 0)


def _check_types(tokens: Tensor, segments: Tensor, learn: Tensor | None, entries: Tensor | None) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise DataError(f"tokens must be [rows, at least 2 tokens], not {list(tokens.shape)}.")
    for name, value in (("segments", segments), ("learn", learn), ("entries", entries)):
        if value is not None and value.shape != tokens.shape:
            raise DataError(
                f"{name} has shape {list(value.shape)}, tokens {list(tokens.shape)}: they must be equal."
            )
    for name, value in (("tokens", tokens), ("segments", segments), ("entries", entries)):
        if value is None:
            continue
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise DataError(f"{name} must be integers, not {value.dtype}.")
    if learn is not None and learn.dtype != torch.bool:  # labels with -100 in them would be true everywhere
        raise DataError(f"learn must be bool (true where the token is to be learnt), not {learn.dtype}.")
    if entries is not None and bool((entries < -1).any()):  # -100 would be looked up as a row
        raise DataError(
            f"entries has the value {int(entries.min())}: a row of the knowledge source, or -1 where none is known."
        )


def _check_documents(segments: Tensor) -> None:
    # A document is one run and numbers rise, so that "same number" means "same document" to every attention
    # backend, whether it compares numbers (a mask) or looks for borders (variable-length kernels).
    highest_before = segments.cummax(dim=1).values[:, :-1]
    starts = (segments[:, 1:] != segments[:, :-1]) & (segments[:, 1:] > 0)
    wrong = starts & (segments[:, 1:] <= highest_before)
    if bool((segments < 0).any()) or bool(wrong.any()):
        row = int(((segments < 0).any(dim=1) | wrong.any(dim=1)).nonzero()[0])
        raise DataError(
            f"segments of row {row} are {segments[row].tolist()[:32]}: documents must be numbered upward "
            "from 1, each one unbroken run, 0 for padding."
        )


class Sum(NamedTuple):
    """A loss in transit: nats summed over `tokens` predictions that cover `bytes` bytes of text.

    The fields are float64 scalars (`nats` may carry a graph). `+` adds all three. The means are properties
    and Python floats; they raise DataError where nothing was counted instead of returning NaN. Bytes that were
    not counted are NaN, and stay so in every sum: fewer bytes than tokens would be a wrong number of bits per byte.
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    @classmethod
    def of(cls, nats: float, tokens: float, num_bytes: float = math.nan) -> Sum:
        """A Sum of plain numbers, on the CPU; without `num_bytes` it has no bits per byte."""
        return cls(*torch.tensor([nats, tokens, num_bytes], dtype=torch.float64).unbind())

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> Sum:
        """0 nats over 0 tokens: adding it changes nothing."""
        return cls(*torch.zeros(3, dtype=torch.float64, device=device).unbind())

    def __add__(self, other: Any) -> Sum:
        if not isinstance(other, Sum):
            return NotImplemented
        return Sum(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def __radd__(self, other: Any) -> Sum:
        return self if other == 0 else NotImplemented  # so that the built-in sum() works

    def detach(self) -> Sum:
        """The same numbers without a graph: what may be kept after the step."""
        return Sum(self.nats.detach(), self.tokens, self.bytes)

    def all_reduce(self) -> Sum:
        """The sum over all ranks (without a graph); itself where there is one process."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.detach()
        total = torch.stack([self.nats.detach(), self.tokens, self.bytes])
        torch.distributed.all_reduce(total)
        return Sum(*total.unbind())

    def share(self, total: Tensor | float) -> Tensor:
        """nats / total: what this part adds to the mean over `total` tokens. All shares add up to the mean.

        A share of a total of 0 tokens is 0 with gradient 0: rows in which nothing counts teach nothing.
        """
        if not isinstance(total, Tensor):
            return self.nats / (total or 1.0)
        return self.nats / torch.where(total == 0, 1, total)  # no `if`: it would wait for the GPU

    @property
    def mean(self) -> float:
        """Nats per token: the loss that is shown."""
        return self._divided("mean loss", self.tokens, "tokens: no prediction in these rows counts")

    @property
    def perplexity(self) -> float:
        """exp(mean), inf beyond the range of a float."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers: bits needed per byte of the predicted text."""
        why = "bytes: no prediction in these rows counts, or the byte lengths of the tokens were not given for all"
        return self._divided("number of bits per byte", self.bytes, why) / math.log(2)

    def _divided(self, what: str, count: Tensor, why: str) -> float:
        if not float(count) > 0:
            raise DataError(f"There is no {what} over 0 {why}.")
        return float(self.nats.detach()) / float(count)


def nll(logits: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood of each target in nats, [B, L], float32 (float64 for float64 logits).

    Exactly 0 where the weight is 0, and so is the gradient, whatever the logits there (inf and NaN too).
    """
    if logits.dim() != 3 or tuple(logits.shape[:2]) != batch.shape:
        raise DataError(f"logits are {[*logits.shape]}, the batch {[*batch.shape]}: nothing may be cut off.")
    counts = batch.weights > 0
    targets = torch.where(counts, batch.targets, _NO_TARGET)
    if torch.is_grad_enabled() or not bool(counts.all()):  # a copy that a scored text does not need
        logits = torch.where(counts.unsqueeze(-1), logits, 0)  # a gradient of 0 * NaN would be NaN
    logits = _precise(logits)
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_NO_TARGET, reduction="none")
    return flat.view_as(targets)


def counted(x: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
    """Only the predictions that count, row after row: x [B, L, ...] -> [N, 1, ...], and the batch of these, [N, 1]."""
    if tuple(x.shape[:2]) != batch.shape:
        raise DataError(f"The tensor has shape {list(x.shape)}, the batch {list(batch.shape)}.")
    counts = batch.weights > 0
    return x[counts].unsqueeze(1), batch.each(lambda field: field[counts].unsqueeze(1))


def score(logits: Tensor, batch: Batch, byte_lengths: Tensor | None = None) -> Sum:
    """The loss of a batch from its logits [B, L, V]. `byte_lengths` [V]: bytes that each token stands for."""
    return Sum(nll(logits, batch).sum(dtype=torch.float64), batch.num_targets(), _bytes(batch, byte_lengths))


def score_hidden(
    hidden: Tensor, head: Tensor, batch: Batch, byte_lengths: Tensor | None = None, *, chunk: int = 1024
) -> Sum:
    """`score(hidden @ head.T, batch)`, value and gradient, without ever holding the whole [B, L, V].

    hidden [B, L, D], head [V, D] (the weight of the output layer), `chunk` positions at a time. At the
    reference size (128 x 512 rows, vocabulary 6,400) the float32 logits alone would be 1.7 GB.
    """
    if hidden.dim() != 3 or tuple(hidden.shape[:2]) != batch.shape:
        raise DataError(f"hidden states have shape {list(hidden.shape)}, the batch {list(batch.shape)}.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, not {chunk}.")
    flat = hidden.flatten(0, 1), head, batch.targets.flatten(), batch.weights.flatten()
    nats = _ChunkedNats.apply(*flat, chunk, torch.is_grad_enabled())  # type: ignore[no-untyped-call,unused-ignore]
    return Sum(nats, batch.num_targets(), _bytes(batch, byte_lengths))


def last(x: Tensor, lengths: Tensor) -> Tensor:
    """x [B, L, ...] of right-padded rows -> [B, ...]: the position that predicts the token after each row.

    lengths [B]: number of real tokens in each row, 1 to L.
    """
    if lengths.shape != x.shape[:1] or bool((lengths < 1).any()) or bool((lengths > x.shape[1]).any()):
        raise DataError(f"lengths {lengths.tolist()} do not fit rows of shape {list(x.shape)}.")
    return x[torch.arange(x.shape[0], device=x.device), lengths.to(x.device) - 1]


def _precise(x: Tensor) -> Tensor:
    """At least float32: a bfloat16 loss has two to three digits."""
    return x if x.dtype == torch.float64 else x.float()


def _bytes(batch: Batch, byte_lengths: Tensor | None) -> Tensor:
    if byte_lengths is None:
        return torch.full((), math.nan, dtype=torch.float64, device=batch.weights.device)
    lengths = byte_lengths.to(batch.targets.device).double()
    # A target that does not count may be any id (padding): look up only where it does.
    return (lengths[torch.where(batch.weights > 0, batch.targets, 0)] * batch.weights).sum()


class _ChunkedNats(torch.autograd.Function):
    """Summed nats of hidden @ head.T, some positions at a time; gradients are made in the forward pass.

    The logits of a chunk serve the loss and its gradient and are gone before the next chunk: nothing is computed
    twice. The price: with grad mode on, the gradient is made even if backward is never called.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int, grad: bool
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.promote_types(hidden.dtype, head.dtype)
        if torch.is_autocast_enabled(device) and dtype != torch.float64:  # what a linear layer would do
            dtype = torch.get_autocast_dtype(device)
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        wants_hidden, wants_head = grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=precise) if wants_head else None  # a sum: not in bfloat16
        nats = torch.zeros((), dtype=torch.float64, device=hidden.device)
        with torch.autocast(device, enabled=False):
            table = head.to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                counts = weights[part].unsqueeze(1) > 0  # [c, 1]
                wanted = torch.where(counts, targets[part].unsqueeze(1), 0)  # [c, 1]
                # Zeros where nothing counts: a NaN there would get into grad_head, a sum over positions.
                states = torch.where(counts, hidden[part].to(dtype), 0)  # [c, D]
                log_p = F.log_softmax(onednn.product(states, table), dim=1, dtype=precise)  # [c, V]
                nats -= torch.where(counts, log_p.gather(1, wanted), 0).sum(dtype=torch.float64)
                if wants_hidden or wants_head:
                    error = log_p.exp_()  # softmax minus one-hot is the gradient of the nats
                    error.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=precise))
                    error = error.masked_fill_(~counts, 0).to(dtype)
                    if grad_hidden is not None:
                        grad_hidden[part] = onednn.to_inputs(error, table)
                    if grad_head is not None:
                        grad_head += onednn.to_weight(error, states)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = hidden.dtype, head.dtype
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if g is None else (g * grad.to(torch.promote_types(g.dtype, torch.float32))).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], None, None, None, None
