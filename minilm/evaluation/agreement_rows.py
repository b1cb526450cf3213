"""The rows of the agreement report that need nothing but a model and some documents.

Every function returns one `Comparison`. Numbers are over the same documents, through `minilm.alignment`; none of them
changes the model: modes, buffers, weights and random states are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilm.alignment import Batch, Sum, align
from minilm.evaluation.agreement import Comparison
from minilm.evaluation.agreement_noise import noise
from minilm.evaluation.generate import generate
from minilm.evaluation.intervals import device_of_messages, processes
from minilm.evaluation.mode import autocast, context_tokens, device_of, eval_mode, random_states_kept
from minilm.evaluation.score import predictions

MOST_TOKENS = 256  # of a document
PROMPT_TOKENS, NEW_TOKENS, TEXTS = 16, 48, 4  # of the cached text


def compare_all(
    model: nn.Module, documents: Sequence[Sequence[int]], *, dropout: float = 0.0, seed: int = 0
) -> list[Comparison]:
    """All rows over these documents (tokens; those with fewer than two are left out). The same in every process."""
    context = context_tokens(model)
    most = MOST_TOKENS if context is None else min(MOST_TOKENS, context + 1)
    usable = [list(document[:most]) for document in documents if len(document) > 1]
    if not usable:
        reason = "no document of the data has two tokens"
        return [Comparison(what="evaluation", ways=("", ""), numbers=(None, None), why_not=reason)]
    return [
        modes(model, usable, dropout=dropout),
        batch_sizes(model, usable),
        packed(model, usable, most),
        precisions(model, usable),
        cached(model, usable, seed=seed),
        *ranks(model, usable),
    ]


def modes(model: nn.Module, documents: Sequence[Sequence[int]], *, dropout: float = 0.0) -> Comparison:
    """Train mode and eval mode. dropout: of the settings; with any, the train mode's loss is another one by intent."""
    batches = [padded(documents)]
    numbers = _mean(nats_of(model, batches, training=True)), _mean(nats_of(model, batches))
    return Comparison(
        what="train mode and eval mode",
        ways=("train", "eval"),
        numbers=numbers,
        over=_over(batches),
        noise=loss_noise(model, batches, "fp32"),
        why_not=f"dropout is {dropout:g}: in train mode it is at work" if dropout else None,
    )


def batch_sizes(model: nn.Module, documents: Sequence[Sequence[int]]) -> Comparison:
    """All documents together, padded, and each alone."""
    together, alone = [padded(documents)], [padded([document]) for document in documents]
    return Comparison(
        what="batch sizes",
        ways=(f"{len(documents)} rows", "1 row"),
        numbers=(_mean(nats_of(model, together)), _mean(nats_of(model, alone))),
        over=_over(together),
        noise=loss_noise(model, together, "fp32"),
    )


def packed(model: nn.Module, documents: Sequence[Sequence[int]], most_tokens: int) -> Comparison:
    """Documents end to end in rows, as training packs them, and one a row."""
    # Short pieces, so that rows hold several even where the context is short.
    pieces = [list(document[: max(2, most_tokens // 3)]) for document in documents]
    alone, rows = [padded(pieces)], [packed_rows(pieces, most_tokens)]
    return Comparison(
        what="packed rows and single documents",
        ways=("packed", "single"),
        numbers=(_mean(nats_of(model, rows)), _mean(nats_of(model, alone))),
        over=_over(alone),
        noise=loss_noise(model, alone, "fp32"),
        why_not="no row has room for two of the documents" if len(rows[0].inputs) == len(pieces) else None,
    )


def precisions(model: nn.Module, documents: Sequence[Sequence[int]]) -> Comparison:
    """bfloat16 (autocast) and float32."""
    batches = [padded(documents)]
    low, high = _mean(nats_of(model, batches, precision="bf16")), _mean(nats_of(model, batches))
    return Comparison(
        what="bfloat16 and float32",
        ways=("bf16", "fp32"),
        numbers=(low, high),
        over=_over(batches),
        noise=loss_noise(model, batches, "bf16"),
    )


def cached(model: nn.Module, documents: Sequence[Sequence[int]], *, seed: int = 0) -> Comparison:
    """What the generator says that its tokens cost, with its cache, and the same text teacher-forced without one.

    Drawn at temperature 1, so that the texts differ. The row shows the token that is furthest apart.
    """
    what, ways = "cached and uncached", ("cached", "uncached")
    if not hasattr(model, "new_cache"):
        reason = "the model keeps no cache: its text is computed anew for each token"
        return Comparison(what=what, ways=ways, numbers=(None, None), why_not=reason)
    context = context_tokens(model)
    room = PROMPT_TOKENS + NEW_TOKENS if context is None else context
    prompts = [list(document[: min(PROMPT_TOKENS, max(1, room // 2))]) for document in documents[:TEXTS]]
    new_tokens = min(NEW_TOKENS, room - max(map(len, prompts)) + 1)
    with autocast(device_of(model), "fp32"):
        texts = generate(model, prompts, max_new_tokens=new_tokens, temperature=1.0, seed=seed)
    told = torch.tensor([text.nats for text in texts], dtype=torch.float64).flatten()
    rows = [[*text.prompt, *text.tokens] for text in texts]
    batches = [padded(rows, learn_from=[len(text.prompt) for text in texts])]
    forced = nats_of(model, batches)
    worst = int((told - forced).abs().nan_to_num(torch.inf).argmax())
    text, token = divmod(worst, new_tokens)
    return Comparison(
        what=what,
        ways=ways,
        numbers=(float(told[worst]), float(forced[worst])),
        over=f"{_over(batches)}; furthest apart at new token {token + 1} of text {text + 1}",
        noise=noise(model, lambda: nats_of(model, batches), "fp32"),
    )


def ranks(model: nn.Module, documents: Sequence[Sequence[int]]) -> list[Comparison]:
    """The documents shared out over all processes, and all of them in this one; nothing for one process."""
    rank, world = processes()
    if world == 1:
        return []
    mine, whole = [padded([document]) for document in documents[rank::world]], [padded(documents)]
    part = torch.zeros(2, dtype=torch.float64, device=device_of_messages())
    if mine:
        nats = nats_of(model, mine)
        part += torch.tensor([float(nats.sum()), float(len(nats))], dtype=torch.float64, device=part.device)
    torch.distributed.all_reduce(part)
    numbers = Sum.of(*part.tolist()).mean, _mean(nats_of(model, whole))
    return [
        Comparison(
            what="processes",
            ways=(f"{world} processes", "one"),
            numbers=numbers,
            over=_over(whole),
            noise=loss_noise(model, whole, "fp32"),
        )
    ]


# ---------------------------------------------------------------- rows and their losses


def padded(documents: Sequence[Sequence[int]], learn_from: Sequence[int] | None = None) -> Batch:
    """One document a row, padded on the right; of each the tokens from `learn_from` on count (default: all)."""
    width = max(2, *(len(document) for document in documents))
    tokens = torch.zeros(len(documents), width, dtype=torch.int64)
    segments, learn = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row, document in enumerate(documents):
        tokens[row, : len(document)] = torch.tensor(document)
        segments[row, : len(document)] = 1
        learn[row, 0 if learn_from is None else learn_from[row] : len(document)] = True
    return align(tokens, segments, learn)


def packed_rows(documents: Sequence[Sequence[int]], width: int) -> Batch:
    """Documents end to end in rows of `width` tokens, in order; none is cut, rows are padded on the right."""
    rows: list[list[Sequence[int]]] = [[]]
    for document in documents:
        if rows[-1] and sum(map(len, rows[-1])) + len(document) > width:
            rows.append([])
        rows[-1].append(document)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    segments = torch.zeros_like(tokens)
    for row, together in enumerate(rows):
        start = 0
        for number, document in enumerate(together, 1):
            tokens[row, start : start + len(document)] = torch.tensor(document)
            segments[row, start : start + len(document)] = number
            start += len(document)
    return align(tokens, segments)


def nats_of(
    model: nn.Module, batches: Sequence[Batch], *, training: bool = False, precision: str = "fp32"
) -> Tensor:
    """Nats of all predictions that count, row after row, [N] float64 on the CPU. training: in train mode."""
    place = device_of(model)
    found = []
    with random_states_kept(), buffers_kept(model), eval_mode(model), autocast(place, precision):
        model.train(training)
        for batch in batches:
            found.append(torch.as_tensor(predictions(model, batch.to(place)).nats))
    return torch.cat(found).double()


def loss_noise(model: nn.Module, batches: Sequence[Batch], precision: str) -> Any:
    """The noise of the mean loss over these batches."""
    return noise(model, mean_of(model, batches), precision)


def mean_of(model: nn.Module, batches: Sequence[Batch]) -> Callable[[], Tensor]:
    """A function that computes the mean loss in float32, [1]."""
    return lambda: torch.tensor([_mean(nats_of(model, batches))], dtype=torch.float64)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers are afterwards as before: in train mode running statistics move."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in kept:
            with torch.no_grad():
                buffer.copy_(before)
            setattr(module, name, buffer)


def _mean(nats: Tensor) -> float:
    return Sum.of(float(nats.sum()), float(len(nats))).mean


def _over(batches: Sequence[Batch]) -> str:
    tokens, rows = sum(int(b.num_targets()) for b in batches), sum(len(b.inputs) for b in batches)
    return f"{tokens:,} tokens in {rows} rows"
