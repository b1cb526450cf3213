"""What is examined: a `Subject` hands over what its owner has, as plain callables; checks use what is there.

Rows, the doctor's own notion of a batch, are unshifted, as a person would write them down. Who shifts, where, and
by how much is what is being examined, so nothing here knows it.

    tokens    [B, T]  int64   token ids
    segments  [B, T]  int64   number of the document within the row, 1, 2, ...; 0 is padding
    learn     [B, T]  bool    is this TOKEN to be learnt (False: a prompt)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """Token rows, unshifted. See the module's text."""

    tokens: Tensor
    segments: Tensor
    learn: Tensor

    @classmethod
    def whole(cls, tokens: Tensor) -> Rows:
        """One document a row, every token to be learnt."""
        return cls(tokens, torch.ones_like(tokens), torch.ones_like(tokens, dtype=torch.bool))

    @classmethod
    def documents(
        cls, documents: Sequence[Sequence[int]], pad_id: int = 0, length: int | None = None
    ) -> Rows:
        """One document a row, padded on the right to the longest (or to `length`)."""
        length = length or max(len(d) for d in documents)
        tokens = torch.full((len(documents), length), pad_id)
        segments = torch.zeros_like(tokens)
        for row, document in enumerate(documents):
            tokens[row, : len(document)] = torch.as_tensor(document)
            segments[row, : len(document)] = 1
        return cls(tokens, segments, segments > 0)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, rows: slice | Sequence[int]) -> Rows:
        """Some of the rows."""
        return Rows(self.tokens[rows], self.segments[rows], self.learn[rows])

    def split(self, micro_batch: int) -> list[Rows]:
        """The same rows in micro-batches."""
        return [self.take(slice(i, i + micro_batch)) for i in range(0, len(self), micro_batch)]


@dataclass(kw_only=True)
class Training:
    """A training set-up that is ready for its first step; `Subject.training` makes a new one at each call.

    module         the model that is trained, in training mode
    step           ONE optimizer step over micro-batches -> what would be logged, by the names below as far as it logs
                   them: loss (nats per token of the whole step), gradient_norm, learning_rate (used in this step)
    optimizer      the torch optimizer inside; with it gradients are seen as they enter the update
    forward        module, tokens [B, T], segments [B, T] -> logits [B, T, V] of the module in its training path
    clip_norm      the configured limit of the gradient's norm; None: no clipping
    planned_rate   step number from 0 -> the configured learning rate of that step; num_steps: for how many steps
    decays         parameter name -> is weight decay meant for it (the owner's policy)
    save, load     to and from a folder: everything that a continued run needs
    position       -> number of the next batch of data (for a resume)
    next_rows      -> the rows of the next step, from the owner's data pipeline (for a resume)
    """

    module: nn.Module
    step: Callable[[list[Rows]], Mapping[str, float]]
    forward: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    clip_norm: float | None = None
    planned_rate: Callable[[int], float] | None = None
    num_steps: int | None = None
    decays: Callable[[str, nn.Parameter], bool] | None = None
    save: Callable[[Path], object] | None = None
    load: Callable[[Path], object] | None = None
    next_rows: Callable[[], list[Rows]] | None = None
    average: Callable[[], Mapping[str, Tensor]] | None = None  # the moving average of the weights, by name
    average_decay: float | None = None


@dataclass(kw_only=True)
class DataView:
    """A data pipeline, as far as its owner can show it.

    documents   split ("train", "validation") -> token ids of each document, special tokens included, as they were
                BEFORE they were stored: the truth that everything downstream is held against
    batches     (epoch, seed, rank, world) -> the rows that this rank is given in this epoch, in order
    lost_targets  how many targets per epoch the owner knows to be left out (dropped rows, cuts); a function of
                (epoch, seed) where it differs; None: unknown
    stored      split -> token ids as read back from storage, one stream or one list per document
    texts       split -> the text of each document, before it was encoded
    encoders    name of an entry point ("training", "evaluation", "prompt") -> text -> ids with which it begins a text,
                special tokens included; an EOS at the end is not looked at
    encode_pair  context, continuation -> ids of each, as an evaluation of continuations gives them to the model
    validation_batches  (rank, world) -> the rows on which this rank evaluates
    resumed     (epoch, seed, rank, world, done) -> all that a loader gives, to the end of the NEXT epoch, after `done`
                batches of `epoch` were used up and its state was saved and loaded into a new one
    worker_rows  (epoch, seed, worker, workers) -> the rows that this worker process of the loader makes
    sources     split -> the source of each document; weights: source -> passes over it per epoch (others: 1)
    knowledge   -> token ids of each entry of a knowledge base that the model looks things up in
    isolated    is a document's first token nobody's target (False: rows are one stream, by design)
    repeated_rows  how many rows an epoch gives twice by design, over all ranks (to make ranks even)
    excerpt     what of the data is shown, where it is not all of it ("the first 2,000 documents")
    """

    documents: Callable[[str], Sequence[Any]] | None = None
    stored: Callable[[str], Any] | None = None
    batches: Callable[[int, int, int, int], Iterable[Rows]] | None = None
    lost_targets: int | Callable[[int, int], int] | None = None
    fingerprint_of_tokenizer: str | Mapping[str, str] | None = None  # of what made the data, or by split
    texts: Callable[[str], Sequence[str]] | None = None
    encoders: Mapping[str, Callable[[str], Sequence[int]]] | None = None
    encode_pair: Callable[[str, str], tuple[Sequence[int], Sequence[int]]] | None = None
    validation_batches: Callable[[int, int], Iterable[Rows]] | None = None
    resumed: Callable[[int, int, int, int, int], Iterable[Rows]] | None = None
    worker_rows: Callable[[int, int, int, int], Iterable[Rows]] | None = None
    sources: Callable[[str], Sequence[str]] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    knowledge: Callable[[], Sequence[Sequence[int]]] | None = None
    isolated: bool = True
    repeated_rows: int = 0
    excerpt: str = ""


@dataclass(kw_only=True)
class Subject:
    """Everything that may be handed over; each part is optional, and a check without its part is NOT RUN.

    forward         tokens [B, T] -> logits [B, T, V]; must not remember anything between calls
    masked_forward  tokens [B, T], keep [B, T] bool (False: padding, on the right or on the left) -> logits
    packed_forward  tokens [B, T], segments [B, T] -> logits, each document on its own
    incremental     tokens [B, T], n -> logits [B, T, V]: the first n tokens at once, then one by one with the cache
    backends        name -> another implementation of `forward` (eager, sdpa, flash, compiled)
    reference       an independent implementation with the same weights, tokens -> logits
    left_padding    `masked_forward` counts positions from the first real token: padding on the left changes nothing
    windows         for each layer, how many tokens a position sees, itself included (None: all before it); None
                    instead of the tuple: not known
    shifted_forward tokens, offset -> logits, all positions counted from offset; only if positions are relative
    lowered         -> the same subject in bfloat16, brought there as its owner does it (cast, loaded, prepared)
    module          what has the parameters; train() and eval() are called on it
    unused          parameters (patterns of names) that get no gradient by design
    initial_stds    pattern of parameter names -> standard deviation of freshly drawn values, by the owner's rule
    same_start      patterns of parameter names that begin alike by design, whatever the seed gives them
    resize          module, new size of the vocabulary -> the module with that size
    fresh           its weights are freshly drawn (False: loaded or trained)
    build           seed -> a freshly drawn subject of the same kind
    loss            rows -> mean loss in nats per token that would be trained on, with its graph; auxiliary losses not
                    included
    criterion       logits [B, T, V], rows -> the same from given logits
    auxiliary       rows -> auxiliary losses by name, already weighted, with their graph
    total_loss      rows -> what backward is called on: loss and auxiliary losses together
    evaluate        list of batches of rows -> mean loss in nats per token, as evaluation reports it
    perplexity      the same, as perplexity
    bits_per_byte   the same, in bits per byte of the predicted text
    continuation    prompt ids, continuation ids -> mean loss of the continuation in nats per token
    document        token ids of a document of any length -> (summed nats, number of tokens that were scored)
    generate        list of prompts, max_new_tokens, and by keyword temperature, top_k, top_p, seed, eos_id
                    -> for each prompt the new tokens only
    choose          logits [B, V], and the same keywords -> chosen ids [B] (the sampler alone)
    save, load      module -> folder; folder -> module: what a checkpoint of the weights is
    training        -> a `Training` at its start; may take clip_norm, seed, num_steps by keyword
    data            a `DataView`
    tokenizer       an object with encode, decode, eos_id, bos_id, pad_id, num_tokens
    memory, router  what the checks of knowledge memories and mixtures need (see checks of those groups)
    ranks           (function, world size) -> what function(training, rank, world size) returns on each rank, in their
                    order; training is that rank's own, as above. The function and what it returns can be sent to
                    other processes
    """

    name: str = "subject"
    vocab_size: int | None = None
    max_length: int | None = None
    special_ids: tuple[int, ...] = ()
    forward: Callable[[Tensor], Tensor] | None = None
    masked_forward: Callable[[Tensor, Tensor], Tensor] | None = None
    packed_forward: Callable[[Tensor, Tensor], Tensor] | None = None
    incremental: Callable[[Tensor, int], Tensor] | None = None
    backends: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    reference: Callable[[Tensor], Tensor] | None = None
    left_padding: bool = False
    windows: tuple[int | None, ...] | None = None
    shifted_forward: Callable[[Tensor, int], Tensor] | None = None
    lowered: Callable[[], Subject] | None = None
    module: nn.Module | None = None
    unused: tuple[str, ...] = ()
    initial_stds: Mapping[str, float] = field(default_factory=dict)
    same_start: tuple[str, ...] = ()
    resize: Callable[[nn.Module, int], nn.Module] | None = None
    fresh: bool = True
    build: Callable[[int], Subject] | None = None
    loss: Callable[[Rows], Tensor] | None = None
    criterion: Callable[[Tensor, Rows], Tensor] | None = None
    auxiliary: Callable[[Rows], Mapping[str, Tensor]] | None = None
    total_loss: Callable[[Rows], Tensor] | None = None
    evaluate: Callable[[Sequence[Rows]], float] | None = None
    perplexity: Callable[[Sequence[Rows]], float] | None = None
    bits_per_byte: Callable[[Sequence[Rows]], float] | None = None
    continuation: Callable[[Sequence[int], Sequence[int]], float] | None = None
    document: Callable[[Sequence[int]], tuple[float, int]] | None = None
    generate: Callable[..., Sequence[Sequence[int]]] | None = None
    choose: Callable[..., Tensor] | None = None
    save: Callable[[nn.Module, Path], object] | None = None
    load: Callable[[Path], nn.Module] | None = None
    training: Callable[..., Training] | None = None
    data: DataView | None = None
    tokenizer: Any = None
    memory: Any = None
    router: Any = None
    ranks: Callable[[Callable[..., Any], int], list[Any]] | None = None
    exceptions: Mapping[str, str] = field(
        default_factory=dict
    )  # check name -> why it does not apply, by design
    spare: dict[Any, Any] = field(
        default_factory=dict, repr=False, compare=False
    )  # memory of the checks, not yours

    def lacks(self, needs: Sequence[str]) -> list[str]:
        """Which of `needs` (attribute names; `data.batches` for a part of a part) it does not have."""
        return [need for need in needs if not _part(self, need)]

    def but(self, **changes: Any) -> Subject:
        """A copy with some parts replaced."""
        return dataclasses.replace(self, **changes)


NEEDS = {
    "forward": "a forward pass from tokens to logits",
    "masked_forward": "a forward pass that takes a padding mask",
    "packed_forward": "a forward pass that takes document segments",
    "incremental": "a forward pass with a key/value cache",
    "backends": "a second attention backend",
    "reference": "an independent implementation with the same weights",
    "module": "the torch module",
    "left_padding": "a promise that left padding is honoured",
    "shifted_forward": "a forward pass that counts relative positions from an offset",
    "lowered": "the same subject in bfloat16",
    "resize": "a function that resizes the vocabulary",
    "build": "a function that builds it afresh",
    "loss": "the training loss",
    "criterion": "the loss as a function of logits",
    "auxiliary": "auxiliary losses",
    "total_loss": "the loss that backward is called on",
    "evaluate": "an evaluation",
    "perplexity": "an evaluation that reports perplexity",
    "bits_per_byte": "an evaluation that reports bits per byte",
    "continuation": "an evaluation of continuations",
    "document": "an evaluation of documents of any length",
    "generate": "a generator",
    "choose": "a sampler",
    "save": "a function that saves",
    "load": "a function that loads",
    "training": "a training step",
    "data": "a data pipeline",
    "data.documents": "the documents that the data was made of",
    "data.stored": "the token ids as read back from storage",
    "data.batches": "the batches of an epoch",
    "data.validation_batches": "the batches of an evaluation",
    "data.resumed": "a loader that can be continued",
    "data.worker_rows": "the rows that each worker process makes",
    "data.sources": "the source of each document",
    "tokenizer": "a tokenizer",
    "memory": "a knowledge memory",
    "router": "a mixture-of-experts router",
    "ranks": "several processes",
    "vocab_size": "the size of the vocabulary",
}


def _part(subject: Subject, need: str) -> Any:
    value: Any = subject
    for name in need.split("."):
        value = getattr(value, name, None)
    return value
