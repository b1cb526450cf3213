"""One encoding everywhere: what training, evaluation and generation make of a text begins with the same ids.

Why: a model that has always seen BOS first and is evaluated without it has a perplexity of billions; two BOS
are a little worse than one; a context and its continuation that are encoded apart meet at a token which
training never had.

How: texts of the data go through every entry point that the subject shows (an EOS at the end is not looked
at) and must give equal ids; these must be how documents begin. Two BOS never stand together. The ids of a
context followed by those of its continuation are those of the whole text, at every place of a cut. And
decoding gives the text back. All exact.

Cannot see: an entry point that was not shown; a text with characters that the data has not.

Sources: lm-evaluation-harness issue 1455 (gemma-7b without BOS: perplexity 5.9e9 in place of 3.5), 2049,
3333.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minilm.doctor import ledger, specimens
from minilm.doctor.checks.vocabulary import BYTES, plain
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.specimens.pipeline import BytePipeline
from minilm.doctor.subject import DataView, Subject

LOOKED_AT, MOST, CUTS = 24, 15_000, 12  # texts, tokens in all, cuts of a text


@check(group="data", needs=("tokenizer", "data"), cost="some texts encoded and decoded", quick=True)
def encoding(subject: Subject) -> Finding:
    """Round trip, one beginning everywhere, and continuations that are cut out of the whole."""
    view, tokenizer = subject.data, subject.tokenizer
    assert view is not None
    documents, texts = _given(view, tokenizer)
    done = []
    for part in (_twice, _entry_points, _pairs, _round_trip):
        outcome = part(view, tokenizer, documents, texts)
        if isinstance(outcome, Finding):
            return outcome
        done += [outcome] if outcome else []
    if not done:
        raise NotApplicable("needs documents, texts or entry points of the data")
    return passed("; ".join(done), 0, 0, unit="texts that differ")


def _given(view: DataView, tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """Some documents as they are trained on, and some texts."""
    part = view.stored or view.documents
    given = part("train") if part is not None else []
    texts = view.texts("train") if view.texts is not None else []
    if len(given) and not hasattr(given[0], "__len__"):  # one stream: no documents to be told apart
        given = []
    if len(texts) == len(given):
        documents = ledger.sample(given, LOOKED_AT, MOST)  # both lists are sampled at the same places
        same = ledger.sample(texts, LOOKED_AT, most=10**12)[: len(documents)]
        return [[int(i) for i in d] for d in documents], list(same)
    documents = [[int(i) for i in d] for d in ledger.sample(given, LOOKED_AT, MOST)]
    if len(texts):
        return documents, ledger.sample(texts, LOOKED_AT, 4 * MOST)
    return documents, [tokenizer.decode(plain(d, tokenizer)) for d in documents]


def _twice(view: DataView, tokenizer: Any, documents: list[list[int]], texts: list[str]) -> Finding | str:
    bos = tokenizer.bos_id
    if bos is None or bos == tokenizer.eos_id:
        return ""
    entries = {"documents": documents} | {
        name: [list(encode(text)) for text in texts] for name, encode in (view.encoders or {}).items()
    }
    for name, rows in entries.items():
        if count := sum(list(ids[:2]) == [bos, bos] for ids in rows):
            return failed(
                f"{count} of {len(rows)} texts begin with two BOS in {name}",
                count,
                0,
                unit="texts",
                bugs=["bos-double"],
                component=name,
                advice="add BOS in one place: here the tokenizer adds it, and somebody adds it again",
            )
    return "no text begins with two BOS" if any(entries.values()) else ""


def _entry_points(
    view: DataView, tokenizer: Any, documents: list[list[int]], texts: list[str]
) -> Finding | str:
    encoders = dict(view.encoders or {})
    if not encoders or not texts:
        return ""
    eos = tokenizer.eos_id

    def begun(ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in ids]
        return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids

    # What documents look like is the truth; else the entry point of training, else the first one.
    part = view.stored or view.documents
    by_text = view.texts is not None and part is not None and len(view.texts("train")) == len(part("train"))
    by_text = by_text and len(documents) == len(texts)
    first = "training" if "training" in encoders else next(iter(encoders))
    truth = [begun(d) for d in documents] if by_text else [begun(encoders[first](t)) for t in texts]
    for name, encode in encoders.items():
        made = [begun(encode(t)) for t in texts]
        wrong = [(a, b) for a, b in zip(truth, made, strict=True) if a != b]
        if wrong:
            a, b = wrong[0]
            missing = tokenizer.bos_id is not None and a[:1] == [tokenizer.bos_id] != b[:1]
            return failed(
                f"{len(wrong)} of {len(texts)} texts are encoded otherwise by {name}: {b[:6]} in place of {a[:6]}",
                len(wrong),
                0,
                unit="texts",
                bugs=["bos-missing-eval", "bos-double"] if missing else ["bos-double", "bos-missing-eval"],
                component=name,
                advice=f"let {name} use the function that makes training documents, and take only the EOS off",
            )
    return f"{len(texts)} texts begin alike in {', '.join(encoders)}"


def _pairs(view: DataView, tokenizer: Any, documents: list[list[int]], texts: list[str]) -> Finding | str:
    if view.encode_pair is None or not texts:
        return ""
    wrong, total, shown = 0, 0, ""
    for text in texts:
        text = text[:200]
        for cut in range(1, len(text), max(1, len(text) // CUTS)):
            context, rest = view.encode_pair(text[:cut], text[cut:])
            together = plain([*context, *rest], tokenizer)
            total += 1
            if together != plain(tokenizer.encode(text), tokenizer):
                wrong += 1
                shown = shown or f"{text[max(0, cut - 8) : cut]!r} + {text[cut : cut + 8]!r}"
    if not wrong:
        return f"{total} pairs of context and continuation have the ids of the whole"
    return failed(
        f"{wrong} of {total} pairs of context and continuation have other ids than the whole text, first at {shown}",
        wrong,
        0,
        unit="pairs",
        bugs=["ctx-boundary-retokenise"],
        component="encode_pair (evaluation of continuations)",
        advice="encode context and continuation as one text, and cut the ids where the context's own tokens end",
    )


def _round_trip(
    view: DataView, tokenizer: Any, documents: list[list[int]], texts: list[str]
) -> Finding | str:
    if not texts or not documents:
        return ""
    back = [tokenizer.decode(plain(tokenizer.encode(text), tokenizer)) for text in texts]
    lost = [(a, b) for a, b in zip(texts, back, strict=True) if a.strip() != b.strip()]
    if not lost:
        return f"{len(texts)} texts come back from their ids"
    a, b = lost[0]
    place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return failed(
        f"{len(lost)} of {len(texts)} texts do not come back: {a[max(0, place - 8) : place + 8]!r} becomes "
        f"{b[max(0, place - 8) : place + 8]!r}",
        len(lost),
        0,
        unit="texts",
        bugs=["val-set-wrong-tokenizer", "tok-id-mod-vocab"],
        component="tokenizer",
        advice="use a tokenizer that can write every character of the data (byte-level), or accept the loss knowingly",
    )


@encoding.plant("bos-double", component="evaluation")
def _() -> Subject:
    class Twice(specimens.Pipeline):
        def beginning(self, text: str) -> list[int]:
            return [1, *super().beginning(text)]

    return specimens.subject(pipeline=Twice)


@encoding.plant("bos-double", component="documents", what="in the training data itself")
def _() -> Subject:
    class Twice(specimens.Pipeline):
        def stored(self, split: str) -> list[list[int]]:
            return [[1, *d] for d in self.documents(split)]

    return specimens.subject(pipeline=Twice)


@encoding.plant("bos-missing-eval", component="evaluation")
def _() -> Subject:
    class Without(specimens.Pipeline):
        def beginning(self, text: str) -> list[int]:
            return super().beginning(text)[1:]

    return specimens.subject(pipeline=Without)


@encoding.plant("ctx-boundary-retokenise", component="encode_pair")
def _() -> Subject:
    class Apart(BytePipeline):
        def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            return self.tokenizer.encode(context), self.tokenizer.encode(continuation)

    return specimens.subject(pipeline=Apart, size=BYTES)


@encoding.healthy("pieces of several bytes, characters of several bytes")
def _() -> Subject:
    return specimens.subject(pipeline=BytePipeline, size=BYTES)


@encoding.healthy("no BOS at all")
def _() -> Subject:
    class Plain(specimens.Pipeline):
        def document(self, text: str) -> list[int]:
            return [*self.tokenizer.encode(text), 2]

        def stored(self, split: str) -> list[list[int]]:
            return [self.document(t) for t in self.texts[split]]

    subject = specimens.subject(pipeline=Plain)
    assert subject.data is not None
    subject.data.documents = subject.data.stored
    return subject
