"""With a key/value cache the logits are those of the whole forward pass, at every step.

Why: generation runs another path than training: one query at a time against stored keys, with positions, masks and
windows of its own. Where the two differ, a good model writes worse and worse text, and every loss stays good.

How: the first n tokens at once (one, and half of the row), then token by token, two rows together; every step's
logits against the whole forward pass, in float32, where healthy tiny models agree to 5e-6 of the logits' deviation
and one of 26 M parameters to 3e-5. The limit is 1e-4, or ten times the model's own noise between rows of different
length and number, which is measured. The steps must differ from each other, else nothing was fed. On a difference,
rows are tried alone, and earlier tokens are changed one by one: a step that no longer sees some of them, sees only
the first, or sees more than the whole pass does, tells a lost key from a mask laid at the wrong corner and from a
window that the cache does not have; a step that sees the same tokens has them at other positions. The first module
whose output differs is named.

Cannot see: lengths beyond the probe; a cache whose rows are padded (padded_prompts does).

Sources: K7 of the catalogue; transformers pull requests 30437, 48289 and issues of Gemma 2's windows; nanochat
3ba42e8; torch's documentation of is_causal, which aligns the mask to the top left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import FLOAT32_NOISE, described, difference, other_token, quiet, record, tokens_for
from minilm.doctor.subject import Subject

LENGTH = 24
MOST_NOISE = 1e-2  # however noisy the model, a cache that is further off than this is wrong
SEEN = 1e-5  # of the logits' deviation: a changed token that moves less is not seen


@check(group="evaluation", needs=("incremental", "forward", "vocab_size"), cost="4 forwards, 34 single steps")
def cache_parity(subject: Subject) -> Finding:
    """incremental(tokens, n) == forward(tokens), for n = 1 and half of the row."""
    worst, where, found = 0.0, (0, 0), None
    with quiet(subject), torch.no_grad():
        tokens = tokens_for(subject, 2, LENGTH)
        length = tokens.shape[1]
        if length < 4:
            raise NotApplicable(f"needs rows of at least 4 tokens, the subject takes {length}")
        whole = subject.forward(tokens)
        limit = max(FLOAT32_NOISE, min(MOST_NOISE, 10 * _rounding(subject, tokens, whole)))
        if difference(whole[:, :-1], whole[:, 1:], scale=whole) < FLOAT32_NOISE:
            raise NotApplicable("the logits of all positions are the same")
        for n in sorted({1, length // 2}):
            steps = subject.incremental(tokens, n)
            if steps.shape != whole.shape:
                raise NotApplicable(f"the cache gives {list(steps.shape)} for logits of {list(whole.shape)}")
            apart = [difference(whole[:, i], steps[:, i], scale=whole) for i in range(length)]
            if max(apart) > worst:
                worst = max(apart)
                first = next((i for i, d in enumerate(apart) if d > limit), 0)
                where = n, first
        if worst > limit:
            found = _cause(subject, tokens, *where)
    seen = f"over {length} tokens the cache's logits are {worst:.1e} std from the whole pass's"
    if found is None:
        return passed(f"{seen} (prefill of 1 and {length // 2})", worst, limit, unit="logit std")
    n, first = where
    bugs, why, place = found
    return failed(
        f"{seen}, from position {first} on after a prefill of {n}: {why}",
        worst,
        limit,
        unit="logit std",
        bugs=bugs,
        component=place or "cache",
        advice="give a cached step the positions of the whole row, a mask that ends at the bottom right (the last "
        "query sees all keys), and the same window",
    )


def _rounding(subject: Subject, tokens: Tensor, whole: Tensor) -> float:
    """How far rows of another length, and rows alone, move the same logits: the model's own float32 noise."""
    assert subject.forward is not None
    half = tokens.shape[1] // 2
    shorter, alone = subject.forward(tokens[:, :half]), subject.forward(tokens[:1])
    return max(
        difference(whole[:, :half], shorter, scale=whole),
        difference(whole[:1], alone, scale=whole),
    )


def _cause(subject: Subject, tokens: Tensor, n: int, first: int) -> tuple[list[str], str, str]:
    """(bugs, what was seen, where) from what the last position sees, with and without the cache."""
    last = tokens.shape[1] - 1
    place = _module(subject, tokens, n)
    alone = torch.cat([subject.incremental(row, n) for row in tokens.split(1)])
    if difference(alone, subject.forward(tokens)) <= FLOAT32_NOISE:
        return ["kv-cache-mismatch"], "each row alone is right: rows read each other's cache", place
    if first < n:
        return (
            ["kv-cache-mismatch", "pos-offset-generate", "sdpa-topleft"],
            "already the prefill differs",
            place,
        )
    probed = sorted({0, 1, last // 4, last // 2, last - 2, last - 1})
    cached = _seen(lambda t: subject.incremental(t, n), subject, tokens, probed)
    whole = _seen(subject.forward, subject, tokens, probed)
    told = f"the last position sees {_listed(cached)} of the positions {probed}, in the whole pass {_listed(whole)}"
    if cached == whole:
        bugs = ["pos-offset-generate", "kv-cache-mismatch", "rope-state-leak"]
        return bugs, "every step sees the same tokens, at other positions or scaled otherwise", place
    if cached - whole:
        return (
            ["swa-lost", "kv-cache-mismatch"],
            f"{told}: more than it should (a window that is not kept)",
            place,
        )
    if cached <= {0}:
        return ["sdpa-topleft", "kv-cache-mismatch"], f"{told}: the mask is aligned to the top left", place
    return ["kv-cache-mismatch", "sdpa-topleft"], f"{told}: keys are lost", place


def _seen(run: Callable[[Tensor], Tensor], subject: Subject, tokens: Tensor, probed: list[int]) -> set[int]:
    """Which of the probed positions move the logits of the last one."""
    before = run(tokens)
    found = set()
    for place in probed:
        changed = tokens.clone()
        for row in range(len(tokens)):
            changed[row, place] = other_token(subject, int(tokens[row, place]))
        if difference(before[:, -1], run(changed)[:, -1], scale=before) > SEEN:
            found.add(place)
    return found


def _listed(places: set[int]) -> str:
    return ", ".join(map(str, sorted(places))) or "none"


def _module(subject: Subject, tokens: Tensor, n: int) -> str:
    """The first module whose output at the last position differs while its input there does not."""
    if subject.module is None:
        return ""
    length = tokens.shape[1]

    def last(x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() < 2 or not x.is_floating_point():
            return None
        return x[:, -1] if x.shape[1] in (1, length) else None

    once = {
        name: (given, made)
        for name, given, made in record(subject.module, lambda: subject.incremental(tokens, n))
    }
    for name, given, made in record(subject.module, lambda: subject.forward(tokens)):
        pair = once.get(name)
        a, b = last(made), last(pair[1]) if pair else None
        if a is None or b is None or a.shape != b.shape or difference(a, b) <= FLOAT32_NOISE:
            continue
        c, d = last(given), last(pair[0]) if pair else None
        if c is None or d is None or c.shape != d.shape or difference(c, d) <= FLOAT32_NOISE:
            return described(subject.module, name)
    return ""


# ---------------------------------------------------------------- planted

Cache = dict[str, Tensor]


@cache_parity.plant("sdpa-topleft", component="attention")
def _() -> Subject:
    class TopLeft(specimens.Attention):
        def allowed(
            self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor
        ) -> Tensor:
            places = torch.arange(places.shape[1]).expand_as(places)  # as is_causal=True counts queries
            return super().allowed(places, key_places, segments, key_segments)

    return specimens.subject(attention=TopLeft)


@cache_parity.plant("pos-offset-generate", component="attention", what="a step is one position late")
def _() -> Subject:
    class Late(specimens.Model):
        def step(self, tokens: Tensor, segments: Tensor, positions: Tensor, caches: list[Cache]) -> Tensor:
            return super().step(tokens, segments, positions + (tokens.shape[1] == 1), caches)

    return specimens.subject(model=Late)


@cache_parity.plant("kv-cache-mismatch", component="attention", what="the oldest key is dropped")
def _() -> Subject:
    class Dropping(specimens.Attention):
        def remember(self, k: Tensor, v: Tensor, *rest: Any) -> Any:
            cache = rest[-1]
            if cache is not None and "k" in cache and cache["k"].shape[2] >= 16:
                cache.update(k=cache["k"].clone(), v=cache["v"].clone())
                cache["k"][:, :, 0], cache["v"][:, :, 0] = cache["k"][:, :, 1], cache["v"][:, :, 1]
            return super().remember(k, v, *rest)

    return specimens.subject(attention=Dropping)


@cache_parity.plant(
    "kv-cache-mismatch", component="attention", what="values are not turned with the keys: k for v"
)
def _() -> Subject:
    class Swapped(specimens.Attention):
        def remember(self, k: Tensor, v: Tensor, *rest: Any) -> Any:
            cache = rest[-1]
            found = super().remember(k, v, *rest)
            if cache is not None and k.shape[2] == 1:
                cache["v"] = cache["k"]
            return found

    return specimens.subject(attention=Swapped)


@cache_parity.plant("kv-cache-mismatch", component="attention", what="every row reads the first row's keys")
def _() -> Subject:
    class First(specimens.Attention):
        def remember(self, k: Tensor, v: Tensor, *rest: Any) -> Any:
            keys, *others = super().remember(k, v, *rest)
            step = rest[-1] is not None and k.shape[2] == 1
            return (keys[:1].expand_as(keys) if step else keys, *others)

    return specimens.subject(attention=First)


@cache_parity.plant("swa-lost", component="attention", what="the window is not kept in single steps")
def _() -> Subject:
    class Unwindowed(specimens.Attention):
        def allowed(
            self, places: Tensor, key_places: Tensor, segments: Tensor, key_segments: Tensor
        ) -> Tensor:
            if places.shape[1] > 1:
                return super().allowed(places, key_places, segments, key_segments)
            return (places.unsqueeze(2) >= key_places.unsqueeze(1)) & (key_segments > 0).unsqueeze(1)

    return specimens.subject(attention=Unwindowed, size={"window": 4})


@cache_parity.healthy("sliding window of 6, kept by the cache")
def _() -> Subject:
    return specimens.subject(size={"window": 6})


@cache_parity.healthy("a context of 8 tokens")
def _() -> Subject:
    return specimens.subject(size={"max_length": 8})
