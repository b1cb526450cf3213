"""Rows on which losses are compared: whole, padded, with prompts, with a single target, packed. Not a check."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minilm.doctor.core import NotApplicable
from minilm.doctor.probes import tokens_for
from minilm.doctor.subject import Rows, Subject

LENGTH = 12


class Case(NamedTuple):
    """Rows, and what is special about them."""

    name: str
    rows: Rows


def marks(subject: Subject) -> tuple[int, int]:
    """(id that fills padding, id that ends a document); the same where the subject has but one such id."""
    tokenizer = subject.tokenizer
    end = getattr(tokenizer, "eos_id", None)
    fill = getattr(tokenizer, "pad_id", None)
    special = [i for i in subject.special_ids if i != fill]
    if end is None:
        end = special[-1] if special else fill
    if fill is None:
        fill = subject.special_ids[0] if len(subject.special_ids) > 1 else end
    return (0 if fill is None else int(fill)), (0 if end is None else int(end))


def cases(subject: Subject, seed: int = 0) -> list[Case]:
    """Whole rows; padded ones; prompts; a single target; packed ones where the subject can pack."""
    tokens = tokens_for(subject, 4, LENGTH, seed)
    length = tokens.shape[1]
    if length < 6:
        raise NotApplicable(f"needs rows of at least 6 tokens, the subject takes {length}")
    fill, end = marks(subject)
    for row, token in enumerate(_edges(subject)):  # a mask by id is often one of id 0, or of the last
        tokens[row % 3, 2 + row % 3] = token
    cut = [length, length - 3, length // 2, 3]
    ended = [[*row[: n - 1], end] for row, n in zip(tokens.tolist(), cut, strict=True)]
    padded = Rows.documents(ended, fill, length)
    answers, single = padded.learn.clone(), torch.zeros_like(padded.learn)
    for row, start in enumerate((length // 2, 2, length // 3, 1)):
        answers[row, :start] = False
    answers[0, -2] = False
    single[1, 4] = True
    found = [
        Case("whole rows", Rows.whole(tokens[:3])),
        Case("padded rows", padded),
        Case("prompts that are not learnt", Rows(padded.tokens, padded.segments, answers)),
        Case("a single target", Rows(padded.tokens, padded.segments, single)),
    ]
    if subject.packed_forward is not None:
        tokens, segments = tokens.clone(), torch.ones_like(tokens)
        for row, border in enumerate((3, 5, 2, 4)):
            segments[row, border:] = 2
            tokens[row, border - 1] = end
        segments[0, -2:], tokens[0, -2:] = 0, fill
        found.append(Case("packed rows", Rows(tokens, segments, segments > 0)))
    return found


def _edges(subject: Subject) -> list[int]:
    """The first two and the last ordinary ids."""
    assert subject.vocab_size is not None
    ordinary = [i for i in range(subject.vocab_size) if i not in set(subject.special_ids)]
    return [*ordinary[:2], ordinary[-1]]


def logits_of(subject: Subject, rows: Rows) -> Tensor:
    """The subject's own logits of rows, by the narrowest of its forwards that knows of padding and documents."""
    padding, several = bool((rows.segments == 0).any()), bool((rows.segments > 1).any())
    if subject.packed_forward is not None and (padding or several):
        return subject.packed_forward(rows.tokens, rows.segments)
    if several:
        raise NotApplicable("needs a forward pass that takes document segments")
    if subject.masked_forward is not None and padding:
        return subject.masked_forward(rows.tokens, rows.segments > 0)
    if subject.forward is None:
        raise NotApplicable("needs a forward pass from tokens to logits")
    return subject.forward(rows.tokens)


def uneven(subject: Subject, rows: int = 5, seed: int = 0) -> Rows:
    """Rows with clearly different numbers of targets, padded on the right."""
    tokens = tokens_for(subject, rows, LENGTH, seed)
    length = tokens.shape[1]
    cut = [2 + (k * (length - 2)) // max(rows - 1, 1) for k in range(rows)]
    fill, _ = marks(subject)
    return Rows.documents([row[:n] for row, n in zip(tokens.tolist(), cut, strict=True)], fill, length)
