"""Which token comes next: the only sampler.

The order is that of transformers: repetition penalty, the ban on ending too early, temperature, top-k, top-p, min-p.
Of equal logits the lower id counts as the higher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.errors import ConfigError, listed

# On a CPU a full sort of 6,400 logits takes as long as a tenth of the reference model. The most probable tokens are
# looked at first, and more only for the rows whose random number falls behind them.
HEADS = 128, 1024
# Numbers up to which numpy is faster than torch on a CPU: torch shares work among threads only above.
FEW = 2**15


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Raises ConfigError listing every value that means nothing.

    max_new_tokens      how many tokens to generate, the ending one included
    min_new_tokens      before so many tokens are there, no end-of-sequence token is taken
    temperature         logits are divided by it; 0 takes the most probable token always
    top_k               keep the k most probable tokens, exactly k also among equals; None keeps all
    top_p               of these keep the fewest whose probabilities reach top_p; 1 (or None) keeps all
    min_p               of these keep those at least min_p times as probable as the most probable; 0 (or None) keeps all
    repetition_penalty  logits of tokens that are in the row already are divided by it where positive, multiplied where
                        negative (arXiv 1909.05858); the prompt counts, padding does not; 1 changes nothing
    seed                sample i of a call uses seed + i
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if found := [*self._lengths(), *self._choices()]:
            raise ConfigError(listed(found))

    def _lengths(self) -> list[str]:
        found = []
        if not is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            found.append(f"max_new_tokens is {self.max_new_tokens!r}; it must be an integer of at least 1.")
        if not is_integer(self.min_new_tokens) or self.min_new_tokens < 0:
            found.append(f"min_new_tokens is {self.min_new_tokens!r}; it must be an integer of at least 0.")
        elif not found and self.min_new_tokens > self.max_new_tokens:
            found.append(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens {self.max_new_tokens}."
            )
        return found

    def _choices(self) -> list[str]:
        found = []
        if not 0 <= self.temperature < float("inf"):
            found.append(f"temperature is {self.temperature!r}; it must be 0 (greedy) or a positive number.")
        if self.top_k is not None and (not is_integer(self.top_k) or self.top_k < 1):
            found.append(
                f"top_k is {self.top_k!r}; it must be an integer of at least 1 (leave it out to keep all)."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p!r}; it must be above 0 and at most 1 (1 keeps all).")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            found.append(f"min_p is {self.min_p!r}; it must be from 0 (keeps all) to 1.")
        if not 0 < self.repetition_penalty < float("inf"):
            found.append(
                f"repetition_penalty is {self.repetition_penalty!r}; it must be a positive number (1: none)."
            )
        if not is_integer(self.seed) or self.seed < 0:
            found.append(f"seed is {self.seed!r}; it must be an integer of at least 0.")
        return found


class Drawn(NamedTuple):
    """The next token of each row.

    tokens  [B] int64
    nats    [B] float64, minus the log of the probability with which it was drawn: after temperature and all cuts
    """

    tokens: Tensor
    nats: Tensor


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """The next token of each row, [B] int64. Arguments as of `draw`."""
    return draw(logits, sampling, uniform).tokens


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] with those of tokens that were seen [B, V] bool made less probable."""
    changed = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, changed, logits)


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Drawn:
    """The next token of each row from its (penalised) logits [B, V].

    uniform [B] float64 in [0, 1), the row's random number: the tokens that are kept, from the most probable down,
    share the unit interval in proportion to their probabilities, and the number falls into one.
    Computed in float64: with a vocabulary of 100,000 a float32 running sum loses the rare tokens.
    """
    if sampling.temperature == 0:
        tokens = _first_highest(logits)
        return Drawn(tokens, torch.zeros(len(tokens), dtype=torch.float64, device=logits.device))
    uniform = uniform.to(logits.device)
    precise = logits.double()
    # The maximum is taken off before dividing, so that no temperature, however small, overflows.
    scaled = (precise - precise.amax(dim=-1, keepdim=True)) / sampling.temperature
    width = scaled.shape[-1]
    if sampling.top_k is not None and sampling.top_k < width:
        return _of_ordered(*_highest(scaled, sampling.top_k), None, sampling, uniform)[0]
    if scaled.device.type == "cpu":
        return _from_the_top(scaled, sampling, uniform)
    return _from_all(scaled, sampling, uniform)


def _first_highest(logits: Tensor) -> Tensor:
    """[B, V] -> [B]; of several maxima the first, NaN counting as the highest."""
    if not _for_numpy(logits):
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.detach().numpy().argmax(axis=-1))


def told(logits: Tensor, drawn: Drawn) -> list[list[float]]:
    """What the host wants to know of each row: token, nats, nats drawn with, highest logit.

    logits [B, V] as the model gives them: `nats` are theirs. The highest is NaN where any is. Token ids are exact.
    """
    if _for_numpy(logits) and logits.numel() <= FEW:
        values, tokens = logits.detach().numpy(), drawn.tokens.numpy()
        highest = values.max(axis=-1)
        with np.errstate(all="ignore"):  # logits that are no numbers are told by the highest
            behind = highest - values[np.arange(len(tokens)), tokens]
            nats = np.log(np.exp(values - highest[:, None]).sum(axis=-1)) + behind
        columns = tokens, nats, drawn.nats.numpy(), highest
        return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    best = logits.amax(dim=-1)
    nats_of = -F.log_softmax(logits, dim=-1).gather(1, drawn.tokens.unsqueeze(1)).squeeze(1)
    # In one piece: an accelerator is waited for once.
    rows = torch.stack((drawn.tokens.double(), nats_of.double(), drawn.nats, best.double()), dim=1)
    told: list[list[float]] = rows.tolist()
    return told


def _for_numpy(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _from_all(scaled: Tensor, sampling: Sampling, uniform: Tensor) -> Drawn:
    ordered = scaled.sort(dim=-1, descending=True, stable=True)
    return _of_ordered(ordered.values, ordered.indices, None, sampling, uniform)[0]


def _from_the_top(scaled: Tensor, sampling: Sampling, uniform: Tensor) -> Drawn:
    """The same, looking at the most probable tokens first, and further down only for the rows that need it."""
    rows, width = scaled.shape
    drawn = Drawn(torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64))
    left = torch.arange(rows)
    total = scaled.exp().sum(dim=-1, keepdim=True)
    for count in HEADS:
        if count * 4 > width or not len(left):
            break
        found, certain = _of_ordered(*_highest(scaled[left], count), total[left], sampling, uniform[left])
        for into, values in zip(drawn, found, strict=True):
            into[left] = values
        left = left[~certain]
    if len(left):
        for into, values in zip(drawn, _from_all(scaled[left], sampling, uniform[left]), strict=True):
            into[left] = values
    return drawn


def _of_ordered(
    scaled: Tensor, ids: Tensor, total: Tensor | None, sampling: Sampling, uniform: Tensor
) -> tuple[Drawn, Tensor]:
    """Draw from the highest logits [B, K], in order, less the maximum; their ids [B, K].

    total  [B, 1] sum of the weights of all tokens; None: those given are all that top-k keeps

    Also tells [B] whether the tokens that were not given could make no difference.
    """
    weights = scaled.exp()  # the first is 1
    reached = weights.cumsum(dim=-1)
    count = weights.shape[-1]
    # [B] how many may be drawn; 1 where an ended row has run into NaN, whose token nobody reads
    kept = (weights > 0).sum(dim=-1)
    everything = reached[..., count - 1 :] if total is None else total  # what top-k left counts as 1
    if sampling.top_p is not None and sampling.top_p < 1:
        kept = torch.minimum(kept, (reached < sampling.top_p * everything).sum(dim=-1) + 1)
    if sampling.min_p:
        kept = torch.minimum(kept, (weights >= sampling.min_p).sum(dim=-1))
    kept = kept.clamp(min=1).unsqueeze(1)
    whole = reached.gather(1, kept - 1)  # [B, 1]
    # Where all that are given are kept, more might be.
    open_end = (kept == count) if total is not None else torch.zeros_like(kept, dtype=torch.bool)
    whole = torch.where(open_end, everything, whole)
    place = torch.searchsorted(reached, uniform.unsqueeze(1) * whole, right=True)
    cut = (sampling.top_p is not None and sampling.top_p < 1) or bool(sampling.min_p)
    certain = ~open_end if cut else (place < count)
    place = torch.minimum(place, kept - 1)  # u * whole may round up to whole
    nats = whole.log() - scaled.gather(1, place)
    return Drawn(ids.gather(1, place).squeeze(1), nats.squeeze(1)), certain.squeeze(1)


def _highest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row [B, V], in order, and their places; of equals the lower places, lowest first.

    What a stable sort would give, in a few passes. `topk` alone may take any of several equals.
    """
    if x.device.type == "cpu" and count < x.shape[-1]:
        values, places = x.topk(count + 1, dim=-1)
        # No equals at the border: there is no choice.
        if bool((values[:, count - 1] > values[:, count]).all()):
            return _in_order(x, places[:, :count].sort(dim=-1).values)
    least = x.topk(count, dim=-1).values[..., count - 1 :]  # [B, 1]
    above, level = x > least, x == least
    room = count - above.sum(dim=-1, keepdim=True)
    kept = above | (level & (level.cumsum(dim=-1) <= room))
    # Each kept place goes to its number among the kept, the others to one slot too many.
    number = torch.where(kept, kept.cumsum(dim=-1) - 1, count)
    every = torch.arange(x.shape[-1], device=x.device).expand_as(x)
    places = every.new_zeros(len(x), count + 1).scatter(1, number, every)[..., :count]
    return _in_order(x, places)


def _in_order(x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The values at rising places [B, K], and the places, from the highest down."""
    values, order = x.gather(1, places).sort(dim=-1, descending=True, stable=True)
    return values, places.gather(1, order)


def is_integer(value: object) -> bool:
    """True is an integer to Python, and to nobody else."""
    return isinstance(value, int) and not isinstance(value, bool)
