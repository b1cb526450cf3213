"""Teacher-forced losses: of batches, of whole documents, of continuations.

`evaluate` is the one number that training logs as validation and that eval.py prints. `documents` scores texts
of any length, one sum per document, so that an interval can be given; `continuation` asks how well a model
continues a prompt. All three are rows through `alignment.align` and means of a `Sum`: nothing here cuts logits.

Definitions. A token is counted when it is predicted from at least one token before it in its document:
the first token of a document (BOS, where the tokenizer has one) is not. Bits per byte divides ALL counted nats,
those of special tokens such as EOS included, by the bytes of text that the counted tokens stand for; special
tokens stand for 0 bytes. Accuracy is the share of counted tokens that were the most probable one (or among the five
most probable); of equally probable tokens the one with the lower id stands first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.alignment import Batch, Sum, align, counted, nll, score, score_hidden
from minilm.errors import ConfigError, listed
from minilm.evaluation.intervals import COLUMNS, DocumentSums, Scores, processes
from minilm.evaluation.mode import autocast, context_tokens, device_of, eval_mode, head_of, random_states_kept
from minilm.evaluation.tally import TOP, Predictions, Tally
from minilm.evaluation.text import byte_lengths_of
from minilm.ranking import ranks

POSITIONS_PER_BATCH = 8192  # default size of a batch of rows: rows times length
LOGITS_AT_ONCE = 2**25  # 128 MiB of float32, whatever the vocabulary


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    byte_lengths: Tensor | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
) -> Sum:
    """The loss of the model on all batches of all ranks. Every rank calls this with its own, disjoint batches.

    byte_lengths  [V] bytes that each token stands for; without it there are no bits per byte.
    device        where to compute (default: where the model is).
    precision     "fp32", "bf16" (autocast), or None: as the surrounding code has it.

    Ranks may have different numbers of batches, or none: the only communication is the final sum. The model
    must be the bare module, not a DDP wrapper. Its mode and all random states are as before afterwards.
    """
    place = torch.device(device) if device is not None else device_of(model)
    lengths = None if byte_lengths is None else byte_lengths.to(place)
    total = Sum.zero(place)
    with random_states_kept(), eval_mode(model), autocast(place, precision):
        for batch in batches:
            total = total + _score(model, batch.to(place, non_blocking=True), lengths)
    return total.all_reduce()


def documents(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    sequence_length: int | None = None,
    *,
    stride: int | None = None,
    batch_rows: int | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
) -> Scores:
    """The loss of whole texts, each a document of its own (`tokenizer.document`), longer ones in rolling windows.

    sequence_length  inputs per window (default: the model's context).
    stride           tokens that a further window adds (default: half a window). A token is scored with at least
                     `sequence_length - stride` tokens before it, or with all that its document has.

    Every token except a document's first is counted exactly once, however the windows overlap. Under several
    processes each scores every n-th text; all get the same result.
    """
    length, stride = window_lengths(model, sequence_length, stride)
    found = tally_documents(
        model,
        encoded(tokenizer, texts),
        length,
        stride,
        byte_lengths=byte_lengths_of(tokenizer),
        batch_rows=batch_rows,
        device=device,
        precision=precision,
    )
    return Scores.of(found.gathered().documents, context_tokens=length, least_context_tokens=length - stride)


def tally_documents(
    model: nn.Module,
    token_documents: Iterable[tuple[int, Sequence[int]]],
    length: int,
    stride: int,
    *,
    batch_rows: int | None = None,
    **options: Any,
) -> Tally:
    """`documents` of (number, tokens), before the processes' parts are put together. Options: as of `tally`."""
    rows = (row for index, document in token_documents for row in windows(index, document, length, stride))
    return tally(model, rows, batch_rows=batch_rows or max(1, POSITIONS_PER_BATCH // length), **options)


def continuation(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    prompt_lengths: Sequence[int],
    continuation_tokens: int,
    **options: Any,
) -> dict[int, Scores]:
    """{p: loss of the `continuation_tokens` tokens that follow the first p tokens of each text}.

    The p prompt tokens include BOS where the tokenizer has one. A text with fewer than
    p + continuation_tokens tokens takes no part in the entry of p, and is counted as `num_excluded`.
    Options: batch_rows, device, precision.
    """
    check_continuation(model, prompt_lengths, continuation_tokens)
    longest = max(prompt_lengths, default=0) + continuation_tokens
    mine = [document[:longest] for _, document in encoded(tokenizer, texts)]
    return continuation_of_tokens(
        model, mine, prompt_lengths, continuation_tokens, byte_lengths=byte_lengths_of(tokenizer), **options
    )


def continuation_of_tokens(
    model: nn.Module,
    token_documents: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    continuation_tokens: int,
    *,
    byte_lengths: Tensor | None = None,
    batch_rows: int | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
) -> dict[int, Scores]:
    """`continuation` of documents that are tokens already; each process gives its own, disjoint documents."""
    check_continuation(model, prompt_lengths, continuation_tokens)
    rank, world = processes()
    found = {}
    for prompt_tokens in prompt_lengths:
        whole = prompt_tokens + continuation_tokens
        rows = [
            Row(index * world + rank, document[:whole], prompt_tokens)
            for index, document in enumerate(token_documents)
            if len(document) >= whole
        ]
        sums = measure(
            model,
            rows,
            byte_lengths=byte_lengths,
            batch_rows=batch_rows or max(1, POSITIONS_PER_BATCH // whole),
            device=device,
            precision=precision,
        )
        sums.num_excluded = len(token_documents) - len(rows)
        found[prompt_tokens] = Scores.of(
            sums.gathered(), context_tokens=whole - 1, least_context_tokens=prompt_tokens
        )
    return found


def check_continuation(model: nn.Module, prompt_lengths: Sequence[int], continuation_tokens: int) -> None:
    """Raises ConfigError, listing all problems, if these lengths mean nothing or do not fit the context."""
    context = context_tokens(model)
    problems = [f"a prompt length is {p}; it must be at least 1." for p in prompt_lengths if p < 1]
    if continuation_tokens < 1:
        problems.append(f"continuation tokens is {continuation_tokens}; it must be at least 1.")
    if context is not None:
        problems += [
            f"a prompt of {p} tokens and a continuation of {continuation_tokens} need a context of "
            f"{p + continuation_tokens - 1} tokens; the model has {context}."
            for p in prompt_lengths
            if p + continuation_tokens - 1 > context
        ]
    if problems:
        raise ConfigError(listed(problems))


@dataclass(frozen=True)
class Row:
    """Tokens of one document, of which those from index `learn_from` on are counted for that document."""

    document: int
    tokens: Sequence[int]
    learn_from: int = 0


def windows(document: int, tokens: Sequence[int], length: int, stride: int) -> Iterator[Row]:
    """Rows of at most `length` inputs (`length + 1` tokens) that count every token but the first exactly once.

    The last window is moved back to be full, so that no token is scored with less context than need be.
    """
    counted = 0  # tokens [0, counted) are done; the first needs none, but stands in the first window anyway
    start = 0
    while counted < len(tokens):
        start = max(0, min(start, len(tokens) - (length + 1)))
        stop = min(len(tokens), start + length + 1)
        yield Row(document, tokens[start:stop], counted - start)
        counted, start = stop, start + stride


def measure(model: nn.Module, rows: Iterable[Row], **options: Any) -> DocumentSums:
    """This process's rows, added up per document. Options: as of `tally`."""
    return tally(model, rows, **options).documents


def tally(
    model: nn.Module,
    rows: Iterable[Row],
    *,
    byte_lengths: Tensor | None = None,
    batch_rows: int = 8,
    device: torch.device | str | None = None,
    precision: str | None = None,
) -> Tally:
    """This process's rows, added up per document and by context."""
    place = torch.device(device) if device is not None else device_of(model)
    lengths = None if byte_lengths is None else byte_lengths.to(place, torch.float64)
    total = Tally()
    stream = iter(rows)
    with random_states_kept(), eval_mode(model), autocast(place, precision):
        # Rows of like length go together, so that little is padding; some batches at a time, so that memory
        # does not grow with the corpus.
        while some := sorted(itertools.islice(stream, 32 * batch_rows), key=lambda row: len(row.tokens)):
            for first in range(0, len(some), batch_rows):
                group = some[first : first + batch_rows]
                found = predictions(model, _batch(group).to(place), lengths)
                total.add(np.array([row.document for row in group])[found.row], found)
            # A document without a counted token is there, too, and is stated as left out.
            numbers = np.array([row.document for row in some])
            total.documents.add_all(numbers, np.zeros((len(some), COLUMNS)))
    return total


@torch.no_grad()
def predictions(model: nn.Module, batch: Batch, byte_lengths: Tensor | None = None) -> Predictions:
    """What the model says at the positions that count; the batch is where the model is. `byte_lengths` [V] float64.

    The output layer sees these positions only, at most `LOGITS_AT_ONCE` logits at a time.
    """
    output = _output(model, batch)
    head = head_of(model)
    states, alone = counted(output.logits if head is None else output.hidden, batch)  # [N, 1, D or V]
    number = torch.arange(batch.shape[0], device=batch.inputs.device)[:, None].expand(batch.shape)
    row = counted(number, batch)[0]
    nats, rank = [], []
    size = max(1, LOGITS_AT_ONCE // (states.shape[2] if head is None else head.shape[0]))
    for start in range(0, len(states), size):
        part, truth = states[start : start + size], alone.rows(start, start + size)
        logits = part if head is None else F.linear(part, head)
        nats.append(nll(logits, truth).double())
        rank.append(ranks(logits, truth, TOP))
    num_bytes = torch.full_like(row, torch.nan, dtype=torch.float64)
    if byte_lengths is not None:
        num_bytes = byte_lengths[alone.targets]
    empty = [row.new_zeros(0, 1)]
    fields = (
        row,
        alone.segments,
        alone.positions + 1,
        torch.cat(nats or empty),
        torch.cat(rank or empty),
        num_bytes,
    )
    return Predictions(*(tensor.squeeze(1).cpu().numpy() for tensor in fields))


def _output(model: nn.Module, batch: Batch) -> Any:
    """A memory that reads what the data name (`retrieval: oracle`) must be told here, too."""
    known = {"entries": batch.entries} if getattr(model, "takes_entries", False) else {}
    # Rows that are one whole document each need no mask, and kernels are faster without.
    segments = None if bool((batch.segments == 1).all()) else batch.segments
    return model(batch.inputs, segments=segments, positions=batch.positions, **known)


def encoded(tokenizer: Any, texts: Iterable[str]) -> Iterator[tuple[int, list[int]]]:
    """(index, tokens) of the texts that are this process's: every n-th of n processes."""
    rank, world = processes()
    for index, text in enumerate(texts):
        if index % world == rank:
            yield index, tokenizer.document(text)


def _score(model: nn.Module, batch: Batch, byte_lengths: Tensor | None) -> Sum:
    output = _output(model, batch)
    head = head_of(model)
    if head is None:
        return score(output.logits, batch, byte_lengths)
    return score_hidden(output.hidden, head, batch, byte_lengths)


def _batch(rows: Sequence[Row]) -> Batch:
    """Rows padded on the right."""
    width = max(2, *(len(row.tokens) for row in rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    segments, learn = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids = torch.as_tensor(row.tokens, dtype=torch.int64)
        tokens[number, : len(ids)] = ids
        segments[number, : len(ids)] = 1
        learn[number, row.learn_from : len(ids)] = True
    return align(tokens, segments, learn)


def window_lengths(model: nn.Module, length: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """Inputs per window (default: the model's context) and the tokens that a further one adds (default: half of it).

    Raises ConfigError for lengths that do not fit.
    """
    length = _window_length(model, length)
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError(f"stride is {stride}; it must be 1 to the sequence length {length}.")
    return length, stride


def _window_length(model: nn.Module, asked: int | None) -> int:
    context = context_tokens(model)
    if asked is None:
        if context is None:
            raise ConfigError("This model does not say how long its context is: give a sequence length.")
        return context
    if asked < 1 or (context is not None and asked > context):
        raise ConfigError(
            f"sequence length is {asked}; it must be 1 to the model's context of {context} tokens."
        )
    return asked
