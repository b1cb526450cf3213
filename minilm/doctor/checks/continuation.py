"""A continuation's loss is that of its own tokens, each predicted from all before it; no token is scored twice.

Why: a slice that is one off (logits[:, -n:] for the last n tokens) scores each token with the logits that have
already seen it, leaves the first token out, or counts the last of the prompt. Overlapping windows over a long text
count the overlap twice unless it is masked.

How: the chain rule. What prompt and continuation cost together, less what the prompt costs, is what the continuation
costs; both come from the subject's forward pass and a float64 loop. Prompts of 1 to 6 tokens, continuations of 1 to
5. For long documents all weights are set to 0: every token then costs exactly ln V, so the nats say how many were
scored, whatever the windows: one less than the document has (or all, where a start token stands in front). A
document of one window must cost what the loop says.

Cannot see: whether a tokenizer splits a text differently with and without its prompt.

Sources: K2 of the catalogue; llm.c 8d55c4a; lm-evaluation-harness 2382 (windows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minilm.doctor import specimens
from minilm.doctor.checks.examples import logits_of
from minilm.doctor.checks.formulas import LOSS_NOISE, Places, close, off_by, right
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import quiet, redraw_weights, tokens_for
from minilm.doctor.specimens.loss import summed_nats
from minilm.doctor.subject import Rows, Subject

LENGTHS = ((1, 1), (1, 5), (6, 1), (4, 3), (3, 5))  # tokens of prompt, tokens of continuation
LONG = 1024  # the longest context for which documents beyond it are tried


@check(
    group="evaluation",
    needs=("continuation", "forward", "vocab_size"),
    cost="15 forwards of at most 9 tokens",
)
def continuation(subject: Subject) -> Finding:
    """continuation(p, c) x |c| == nats(p + c) - nats(p)."""
    said, expected, others = [], [], []
    with quiet(subject), torch.no_grad():
        tokens = tokens_for(subject, len(LENGTHS), 9)
        start = getattr(subject.tokenizer, "bos_id", None)
        for row, (prompt, more) in zip(tokens.tolist(), LENGTHS, strict=True):
            if prompt + more > len(row):
                continue
            first, second = row[:prompt], row[prompt : prompt + more]
            if start is not None and prompt > 1:
                first[0] = start
            said.append(float(subject.continuation(first, second)))
            expected.append((_nats(subject, first + second) - _nats(subject, first)) / more)
            others.append(_others(subject, first, second))
    if not said:
        raise NotApplicable("rows of two tokens are too long for the subject")
    off = [off_by(s, e) for s, e in zip(said, expected, strict=True)]
    at = off.index(max(off))
    prompt, more = LENGTHS[at]
    seen = f"{more} tokens after {prompt}: it says {said[at]:.6g}, the chain rule {expected[at]:.6g}"
    if max(off) <= LOSS_NOISE:
        return passed(f"{seen}; {len(said)} pairs", max(off), LOSS_NOISE, unit="of the loss")
    why = [key for key in others[0] if all(close(s, o[key]) for s, o in zip(said, others, strict=True))]
    return failed(
        seen + (f": {why[0][1]}" if why else ""),
        max(off),
        LOSS_NOISE,
        unit="of the loss",
        bugs=list(dict.fromkeys([*(bug for bug, _ in why), "eval-slice-off-by-one"])),
        component="continuation",
        advice="the first token of the continuation is predicted by the logits of the prompt's LAST position",
    )


def _nats(subject: Subject, ids: Sequence[int]) -> float:
    rows = Rows.whole(torch.tensor([list(ids)]))
    return right(logits_of(subject, rows), rows) * (len(ids) - 1)


def _others(subject: Subject, first: list[int], second: list[int]) -> dict[tuple[str, str], float]:
    """What wrong ways would say."""
    rows = Rows.whole(torch.tensor([first + second]))
    p, n, end = Places(logits_of(subject, rows), rows, 0), len(first), len(first) + len(second)
    own, after, skip = p.nats(0)[0], p.nats(1)[0], p.nats(2)[0]
    start = getattr(subject.tokenizer, "bos_id", None)
    slice_ = "eval-slice-off-by-one"
    found = {
        (slice_, "each token is scored with the logits that have seen it"): own[n:end],
        (slice_, "the first token of the continuation is left out"): after[n : end - 1],
        (slice_, "the last token of the continuation is left out"): after[n - 1 : end - 2],
        (slice_, "the last token of the prompt is counted as well"): after[max(0, n - 2) : end - 1],
        (slice_, "it is shifted twice"): skip[max(0, n - 2) : end - 2],
        ("mask-from-attention", "the prompt is counted"): after[: end - 1],
    }
    values = {key: float(nats.sum()) / max(1, len(nats)) for key, nats in found.items()}
    whole = float(after[n - 1 : end - 1].sum())
    values["logged-loss-scaled", "the nats are summed, not averaged"] = whole
    values["logged-loss-scaled", "the nats of the continuation are divided by the length of the whole"] = (
        whole / end
    )
    values["logged-loss-scaled", "the divisor is one too large"] = whole / (len(second) + 1)
    if start is not None and (subject.max_length is None or end < subject.max_length):
        longer = _nats(subject, [start, *first, *second]) - _nats(subject, [start, *first])
        values["bos-double", "a start token is put in front of the prompt"] = longer / len(second)
    return values


@check(
    group="evaluation",
    needs=("document", "module", "vocab_size"),
    cost="some windows of the context's length",
)
def windows(subject: Subject) -> Finding:
    """Every token of a document but its first is scored once, however long it is."""
    length = subject.max_length if subject.max_length is not None and subject.max_length <= LONG else 64
    found: dict[int, tuple[float, int]] = {}
    with quiet(subject), torch.no_grad():
        short = tokens_for(subject, 1, min(9, length))[0].tolist()
        nats, count = subject.document(short)
        apart = off_by(float(nats) / max(int(count), 1), _nats(subject, short) / (len(short) - 1))
        redraw_weights(subject.module, 0.0)
        each = _nats(subject, short) / (len(short) - 1)  # ln V, where no bias is left
        plain = subject.but(max_length=None)
        for size in (2, length // 2, length, length + 1, length + 2, 2 * length + 3):
            nats, count = subject.document(tokens_for(plain, 1, size)[0].tolist())
            found[size] = float(nats) / each, int(count)
    if abs(each - math.log(subject.vocab_size or 1)) > 0.01:
        raise NotApplicable("with all weights at 0 the tokens do not cost ln V each")
    missing = {size: (scored - (size - 1), count - (size - 1)) for size, (scored, count) in found.items()}
    started = all(abs(a - 1) < 0.01 and b == 1 for a, b in missing.values())
    worst = max(missing, key=lambda size: max(map(abs, missing[size])))
    scored, count = found[worst]
    seen = f"of the {worst - 1} predictions of a document of {worst} tokens {scored:.5g} are scored, {count} counted"
    off = 0.0 if started else max(map(abs, missing[worst]))
    if off < 0.01 and (started or apart <= LOSS_NOISE):
        return passed(f"{seen}; documents of {', '.join(map(str, found))} tokens", off, 0.5, unit="tokens")
    twice = any(a > 0.5 or b > 0.5 for a, b in missing.values())
    return failed(
        seen if off >= 0.01 else f"a document of one window is off by {apart:.1e} of its loss",
        off if off >= 0.01 else apart,
        0.5 if off >= 0.01 else LOSS_NOISE,
        unit="tokens" if off >= 0.01 else "of the loss",
        bugs=["window-double-count", "eval-slice-off-by-one"] if twice else
        ["eval-slice-off-by-one", "truncation-silent", "window-double-count"],
        component="windows of the evaluation",
        advice="in each further window count only the tokens that the windows before it have not",
    )  # fmt: skip


# ---------------------------------------------------------------- planted


def _scored(prompt: Sequence[int], more: Sequence[int]) -> Rows:
    tokens = torch.tensor([[*prompt, *more]])
    learn = torch.arange(tokens.shape[1]).unsqueeze(0) >= len(prompt)
    return Rows(tokens, torch.ones_like(tokens), learn)


@continuation.plant(
    "eval-slice-off-by-one", component="continuation", what="logits[:, -n:] for the last n tokens"
)
def _() -> Subject:
    class Sliced(specimens.Evaluation):
        @torch.no_grad()
        def continuation(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
            rows, n = _scored(prompt, continuation), len(continuation)
            log_p = self.model(rows.tokens)[0, -n:].log_softmax(-1)
            return -float(log_p.gather(-1, rows.tokens[0, -n:].unsqueeze(-1)).mean())

    return specimens.subject(evaluation=Sliced)


@continuation.plant(
    "eval-slice-off-by-one", component="continuation", what="the mask is one early: mask[:-1]"
)
def _() -> Subject:
    class Early(specimens.Evaluation):
        def continuation(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
            return super().continuation(
                prompt[:-1] or prompt, [*prompt[-1:], *continuation][len(prompt) == 1 :]
            )

    return specimens.subject(evaluation=Early)


@continuation.plant("mask-from-attention", component="continuation", what="the prompt is counted")
def _() -> Subject:
    class Whole(specimens.Evaluation):
        def continuation(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
            return self.evaluate([Rows.whole(torch.tensor([[*prompt, *continuation]]))])

    return specimens.subject(evaluation=Whole)


@continuation.plant(
    "bos-double", component="continuation", what="a start token before the prompt that has one"
)
def _() -> Subject:
    class Started(specimens.Evaluation):
        def continuation(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
            return super().continuation([1, *prompt], continuation)

    return specimens.subject(evaluation=Started)


@windows.plant("window-double-count", component="windows")
def _() -> Subject:
    class Twice(specimens.Evaluation):
        def scored(self, stop: int) -> int:
            return 0

    return specimens.subject(evaluation=Twice, size={"max_length": 16})


@windows.plant("window-double-count", component="windows", what="one token of each overlap")
def _() -> Subject:
    class OneTwice(specimens.Evaluation):
        def scored(self, stop: int) -> int:
            return stop - 1

    return specimens.subject(evaluation=OneTwice, size={"max_length": 16})


@windows.plant(
    "eval-slice-off-by-one", component="windows", what="disjoint windows: the first token of each is lost"
)
def _() -> Subject:
    class Disjoint(specimens.Evaluation):
        def windows(self, length: int) -> list[tuple[int, int]]:
            size = self.model.size.max_length
            return [(start, min(start + size, length)) for start in range(0, length, size)]

    return specimens.subject(evaluation=Disjoint, size={"max_length": 16})


@windows.plant("eval-slice-off-by-one", component="windows", what="scored with its own logits")
def _() -> Subject:
    class OneOff(specimens.Evaluation):
        def nats(self, rows: Rows) -> tuple[Tensor, int]:
            logits = self.model(rows.tokens, rows.segments)
            return summed_nats(torch.cat([logits[:, 1:], logits[:, -1:]], dim=1), rows)

    return specimens.subject(evaluation=OneOff)


@windows.healthy("windows that overlap by much")
def _() -> Subject:
    class Dense(specimens.Evaluation):
        stride = 1

    return specimens.subject(evaluation=Dense, size={"max_length": 16})
