"""A second, slow definition of the loss, and a comparison of an alignment module with it.

Nothing here comes from `minilm.alignment`. `expected` walks over the UNSHIFTED rows in plain Python floats
(float64) and asks of every token: is it to be predicted, and from which position? `disagreement(module)` runs
a module through all its public functions and names the first number that differs; the planted bugs of
`test_alignment_planted.py` are held against it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from minilm.errors import MinilmError

TOLERANCE = 1e-9  # everything below is float64


@dataclass
class Case:
    """Rows of tokens and a tiny language model: logits = hidden(token, position in its document) @ head.T."""

    name: str
    tokens: list[list[int]]
    segments: list[list[int]]
    learn: list[list[bool]] | None
    vocabulary: int
    width: int = 3
    seed: int = 0
    entries: list[list[int]] | None = None  # [B][T] row of the knowledge source for each token, -1 for none
    table: list[list[float]] = field(init=False)  # [V, D] what a token brings to its hidden state
    drift: list[list[float]] = field(init=False)  # [T, D] what its position brings
    head: list[list[float]] = field(init=False)  # [V, D]
    byte_lengths: list[float] = field(init=False)  # [V]

    def __post_init__(self) -> None:
        dice = random.Random(self.seed)
        length = len(self.tokens[0]) if self.tokens else 2

        def gauss(rows: int) -> list[list[float]]:
            return [[dice.gauss(0, 1.5) for _ in range(self.width)] for _ in range(rows)]

        self.table, self.drift, self.head = gauss(self.vocabulary), gauss(length), gauss(self.vocabulary)
        self.byte_lengths = [float(dice.randint(0, 5)) for _ in range(self.vocabulary)]


@dataclass
class Expected:
    """What the definition says about a case; lists are [B][T - 1], gradients are of the summed nats."""

    inputs: list[list[int]]
    positions: list[list[int]]
    targets: list[list[int | None]]  # None: not a target
    entries: list[list[int]]
    nll: list[list[float]]
    d_hidden: list[list[list[float]]]
    d_head: list[list[float]]
    nats: float
    tokens: int
    bytes: float


def expected(case: Case) -> Expected:
    """The double loop: token j of a row is predicted from token j - 1, if both are of one document."""
    width, vocabulary = range(case.width), range(case.vocabulary)
    d_head = [[0.0] * case.width for _ in vocabulary]
    result = Expected([], [], [], [], [], [], d_head, 0.0, 0, 0.0)
    for b, row in enumerate(case.tokens):
        document = case.segments[b]
        position, inputs, positions, targets, nll, d_hidden = 0, [], [], [], [], []
        entries = []
        for j in range(len(row)):
            if j > 0:
                position = position + 1 if document[j] == document[j - 1] else 0
            here = position if document[j] else 0
            if j == len(row) - 1:
                break
            inputs.append(row[j])
            positions.append(here)
            wanted = document[j + 1] != 0 and document[j + 1] == document[j]
            wanted = wanted and (case.learn is None or case.learn[b][j + 1])
            if not wanted:
                targets.append(None)
                entries.append(-1)
                nll.append(0.0)
                d_hidden.append([0.0] * case.width)
                continue
            target = row[j + 1]
            hidden = [case.table[row[j]][d] + case.drift[here][d] for d in width]
            logits = [math.fsum(hidden[d] * case.head[v][d] for d in width) for v in vocabulary]
            top = max(logits)
            log_z = top + math.log(math.fsum(math.exp(x - top) for x in logits))
            error = [math.exp(logits[v] - log_z) - (v == target) for v in vocabulary]
            targets.append(target)
            entries.append(-1 if case.entries is None else case.entries[b][j + 1])
            nll.append(log_z - logits[target])
            d_hidden.append([math.fsum(error[v] * case.head[v][d] for v in vocabulary) for d in width])
            for v in vocabulary:
                for d in width:
                    d_head[v][d] += error[v] * hidden[d]
            result.tokens += 1
            result.bytes += case.byte_lengths[target]
        result.inputs.append(inputs)
        result.positions.append(positions)
        result.targets.append(targets)
        result.entries.append(entries)
        result.nll.append(nll)
        result.d_hidden.append(d_hidden)
    result.nats = math.fsum(x for row in result.nll for x in row)
    return result


def random_case(dice: random.Random, name: str) -> Case:
    """Rows with padding anywhere, documents of any length from 1, and PAD equal to EOS or to any other id."""
    num_rows, length, vocabulary = dice.randint(1, 4), dice.randint(2, 9), dice.choice([2, 3, 7, 11])
    pad = dice.randrange(vocabulary)  # may well be a token of the text too
    tokens, segments = [], []
    for _ in range(num_rows):
        row: list[int] = []
        document, number = [], 0
        while len(row) < length:
            run = dice.randint(1, 4)
            padding = dice.random() < 0.3
            if not padding:
                number += dice.randint(1, 2)  # numbers rise, not always by one
            document += [0 if padding else number] * run
            row += [pad if padding else dice.randrange(vocabulary) for _ in range(run)]
        tokens.append(row[:length])
        segments.append(document[:length])
    learn = None
    if dice.random() < 0.7:
        share = dice.choice([0.2, 0.5, 0.9])
        learn = [[dice.random() < share for _ in range(length)] for _ in range(num_rows)]
    entries = None
    if dice.random() < 0.7:  # also at padding and at the first token of a document, where they must vanish
        entries = [[dice.randint(-1, 40) for _ in range(length)] for _ in range(num_rows)]
    return Case(name, tokens, segments, learn, vocabulary, seed=dice.randrange(10**6), entries=entries)


def cases() -> list[Case]:
    """The same cases in every run: layouts with a name, then random ones."""
    yes, no = True, False
    named = [
        Case("one document", [[3, 1, 4, 1, 5]], [[1] * 5], None, 6),
        Case("right padding", [[3, 1, 4, 0, 0], [2, 5, 1, 3, 1]], [[1, 1, 1, 0, 0], [1] * 5], None, 6),
        Case("left padding", [[0, 0, 3, 1, 4], [2, 5, 1, 3, 1]], [[0, 0, 1, 1, 1], [1] * 5], None, 6),
        Case("padding between documents", [[3, 1, 0, 0, 4, 5]], [[1, 1, 0, 0, 2, 2]], None, 6),
        Case("packed, PAD is EOS", [[3, 4, 2, 5, 3, 2, 2, 2]], [[1, 1, 1, 2, 2, 2, 0, 0]], None, 6),
        Case(
            "answer to a prompt",
            [[3, 1, 4, 1, 5, 2]],
            [[1] * 6],
            [[no, no, no, yes, yes, yes]],
            6,
        ),
        Case("first token to be learnt", [[3, 1, 4, 1]], [[1] * 4], [[yes, no, no, no]], 6),
        Case("last token to be learnt", [[3, 1, 4, 1]], [[1] * 4], [[no, no, no, yes]], 6),
        Case("every document of one token", [[3, 1, 4, 1]], [[1, 2, 3, 4]], None, 6),
        Case("nothing but padding", [[0, 0, 0], [0, 0, 0]], [[0] * 3, [0] * 3], None, 6),
        Case("nothing to be learnt", [[3, 1, 4]], [[1] * 3], [[no] * 3], 6),
        Case("two tokens, two words", [[1, 0]], [[1, 1]], None, 2),
        Case(
            "rows of very unequal counts",
            [[1, 2, 0, 0, 0], [2, 1, 2, 2, 1]],
            [[1, 1, 0, 0, 0], [1] * 5],
            None,
            3,
        ),
    ]
    dice = random.Random(20)
    return named + [random_case(dice, f"random {n}") for n in range(12)]


def disagreement(module: ModuleType | Any) -> str | None:
    """The first difference between an alignment module and the definition; None where there is none."""
    for case in cases():
        difference = compare(module, case)
        if difference is not None:
            return f"{case.name}: {difference}"
    return _compare_last(module)


def compare(module: ModuleType | Any, case: Case) -> str | None:
    """One case through every public function. An exception of the module is a difference too."""
    try:
        return _compare(module, case, expected(case))
    except (RuntimeError, ValueError, LookupError, TypeError, MinilmError) as error:
        return f"{type(error).__name__}: {error}"


def model(case: Case, batch: Any) -> tuple[Tensor, Tensor]:
    """hidden [B, L, D] and head [V, D] in float64, leaves that want a gradient."""
    table, drift = _double(case.table), _double(case.drift)
    hidden = (table[batch.inputs] + drift[batch.positions]).requires_grad_()
    return hidden, _double(case.head).requires_grad_()


def align_case(module: ModuleType | Any, case: Case) -> Any:
    """The batch that a module makes of a case."""
    learn = None if case.learn is None else torch.tensor(case.learn, dtype=torch.bool)
    entries = None if case.entries is None else torch.tensor(case.entries)
    return module.align(torch.tensor(case.tokens), torch.tensor(case.segments), learn, entries)


def _compare(module: Any, case: Case, want: Expected) -> str | None:
    batch = align_case(module, case)
    if (difference := _compare_fields(batch, case, want)) is not None:
        return difference
    if (difference := _compare_labels(module, case, want)) is not None:
        return difference
    byte_lengths = torch.tensor(case.byte_lengths)
    hidden, head = model(case, batch)

    each = module.nll(hidden @ head.T, batch)
    if (difference := _differs("nll", each, want.nll)) is not None:
        return difference
    if any(x != 0 for row, wanted in zip(each.tolist(), want.targets, strict=True)
           for x, target in zip(row, wanted, strict=True) if target is None):  # fmt: skip
        return "nll is not exactly 0 where nothing counts"

    num_positions = batch.inputs.numel()
    ways = [
        ("score", None),
        *((f"score_hidden, chunk {c}", c) for c in (1, 7, num_positions, num_positions + 5)),
    ]
    for name, chunk in ways:
        hidden, head = model(case, batch)
        if chunk is None:
            total = module.score(hidden @ head.T, batch, byte_lengths)
        else:
            total = module.score_hidden(hidden, head, batch, byte_lengths, chunk=chunk)
        if (difference := _compare_sum(name, total, want, module)) is not None:
            return difference
        d_hidden, d_head = torch.autograd.grad(total.nats * 0.5, (hidden, head))
        for what, got, wanted in (("hidden", d_hidden, want.d_hidden), ("head", d_head, want.d_head)):
            if (difference := _differs(f"{name}, gradient of {what}", got * 2, wanted)) is not None:
                return difference
    return _compare_parts(module, case, want, batch)


def _compare_fields(batch: Any, case: Case, want: Expected) -> str | None:
    segments = [row[:-1] for row in case.segments]
    for name, wanted in (("inputs", want.inputs), ("positions", want.positions), ("segments", segments)):
        if getattr(batch, name).tolist() != wanted:
            return f"{name} are {getattr(batch, name).tolist()}, not {wanted}"
    weights = [[float(target is not None) for target in row] for row in want.targets]
    if batch.weights.tolist() != weights:
        return f"weights are {batch.weights.tolist()}, not {weights}"
    if (batch.entries is None) != (case.entries is None):
        return f"entries are {batch.entries}, those of the tokens are {case.entries}"
    if batch.entries is not None and batch.entries.tolist() != want.entries:
        return f"entries are {batch.entries.tolist()}, not {want.entries}"
    targets = [
        [got if target is not None else None for got, target in zip(*rows, strict=True)]
        for rows in zip(batch.targets.tolist(), want.targets, strict=True)
    ]
    return None if targets == want.targets else f"targets are {targets}, not {want.targets}"


def _compare_labels(module: Any, case: Case, want: Expected) -> str | None:
    """The same rows in the Hugging Face convention, if it can express them: one unbroken document a row."""
    padded = torch.tensor(case.segments) == 0
    runs = ["".join("1" if number else "0" for number in row).strip("0") for row in case.segments]
    if any("0" in run or len(set(row) - {0}) > 1 for run, row in zip(runs, case.segments, strict=True)):
        return None
    tokens = torch.tensor(case.tokens)
    learn = torch.ones_like(padded) if case.learn is None else torch.tensor(case.learn, dtype=torch.bool)
    batch = module.from_labels(tokens, torch.where(learn & ~padded, tokens, -100), (~padded).long())
    weights = [[float(target is not None) for target in row] for row in want.targets]
    if batch.weights.tolist() != weights:
        return f"from_labels: weights are {batch.weights.tolist()}, not {weights}"
    wanted = [target for row in want.targets for target in row if target is not None]
    got = batch.targets[batch.weights > 0].tolist()
    return None if got == wanted else f"from_labels: targets are {got}, not {wanted}"


def _compare_sum(name: str, total: Any, want: Expected, module: Any) -> str | None:
    for what, got, wanted in zip(
        ("nats", "tokens", "bytes"), total, (want.nats, want.tokens, want.bytes), strict=True
    ):
        if (difference := _differs(f"{name}: {what}", got, wanted)) is not None:
            return difference
    for what, count, scale in (("mean", want.tokens, 1.0), ("bits_per_byte", want.bytes, math.log(2))):
        try:
            got = getattr(total, what)
        except module.DataError:
            if count:
                return f"{name}: {what} raises over a count of {count}"
            continue
        if not count:
            return f"{name}: {what} is {got} over a count of 0"
        if (
            difference := _differs(
                f"{name}: {what}", torch.tensor(got, dtype=torch.float64), want.nats / count / scale
            )
        ) is not None:
            return difference
    return None


def _compare_parts(module: Any, case: Case, want: Expected, batch: Any) -> str | None:
    """Micro-batches of one row: sums add up, shares and their gradients add up, ranks add up."""
    hidden, head = model(case, batch)
    byte_lengths = torch.tensor(case.byte_lengths)
    rows = range(len(case.tokens))
    parts = [
        module.score_hidden(hidden[b : b + 1], head, batch.rows(b, b + 1), byte_lengths, chunk=4)
        for b in rows
    ]
    if (difference := _compare_sum("sum of micro-batches", sum(parts), want, module)) is not None:
        return difference
    total = sum(part.num_targets() for part in (batch.rows(b, b + 1) for b in rows))
    share = sum(part.share(total) for part in parts)
    mean = want.nats / want.tokens if want.tokens else 0.0
    if (difference := _differs("sum of shares", share, mean)) is not None:
        return difference
    d_hidden, d_head = torch.autograd.grad(share, (hidden, head))
    scale = max(want.tokens, 1)
    for what, got, wanted in (("hidden", d_hidden, want.d_hidden), ("head", d_head, want.d_head)):
        if (difference := _differs(f"gradient of {what} from shares", got * scale, wanted)) is not None:
            return difference
    first, others = parts[0], sum(parts[1:], module.Sum.zero())

    def add_the_other_rank(tensor: Tensor, *_: Any, **__: Any) -> None:
        tensor += torch.stack([x.detach() for x in others])

    with (
        mock.patch("torch.distributed.is_initialized", lambda: True),
        mock.patch("torch.distributed.all_reduce", add_the_other_rank),
    ):
        reduced = first.all_reduce()
    return _compare_sum("sum over ranks", reduced, want, module)


def _compare_last(module: Any) -> str | None:
    x, lengths = torch.arange(24).view(3, 4, 2), torch.tensor([1, 4, 2])
    wanted = [x[b, n - 1].tolist() for b, n in enumerate(lengths.tolist())]
    got = module.last(x, lengths).tolist()
    return None if got == wanted else f"last: {got}, not {wanted}"


def _differs(name: str, got: Tensor, wanted: Any) -> str | None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    if got.shape != wanted.shape:
        return f"{name} has shape {list(got.shape)}, not {list(wanted.shape)}"
    error = (got.detach().double() - wanted).abs()
    close = error <= TOLERANCE * (1 + wanted.abs())  # false for NaN
    if bool(close.all()):
        return None
    return f"{name} is {got.detach().tolist()}, not {wanted.tolist()}"


def _double(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def one_row(length: int, counting: int, vocabulary: int = 7) -> tuple[Tensor, Tensor]:
    """Tokens and segments [1, length + 1]: one document with `counting` predictions, then padding."""
    tokens = torch.randint(vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(0))
    document = 0 if counting == 0 else 1
    return tokens, torch.where(torch.arange(length + 1) <= counting, document, 0)[None]


def random_rows(rows: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens and segments [rows, length + 1]: two documents a row, then some padding."""
    dice = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=dice)
    place = torch.arange(length + 1).expand(rows, -1)
    border = torch.randint(1, length, (rows, 1), generator=dice)
    return tokens, torch.where(place > length - border // 2, 0, torch.where(place < border, 1, 2))
