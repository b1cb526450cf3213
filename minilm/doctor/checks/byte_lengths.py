"""The bytes of the tokens add up to the bytes of the text, and a loss per byte is one.

Why: bits per byte compare models with different tokenizers; a loss per token does not. Counting the bytes of
a token by decoding it alone is wrong for every token that is a part of a character (it decodes to a
replacement of three bytes), and a number per token that is reported per byte is off by the length of a token.

How: for texts of the data and for texts in several scripts, the bytes of the tokens are added and held
against the UTF-8 of the text, wherever decoding gives the text back (elsewhere the tokenizer alters it, and
no count is right). A reported number of bits per byte is computed again from the evaluation's loss per token,
the number of targets and their bytes.

Cannot see: whether the evaluation's loss per token is right (checks of the loss); tokens that no text here
has.

Sources: nanochat commit 2ce972a (193 of 32,768 tokens counted wrongly); EleutherAI's definition of bits per
byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from minilm.doctor import ledger, specimens
from minilm.doctor.checks.vocabulary import BYTES, plain
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.probes import num_targets, quiet
from minilm.doctor.specimens.pipeline import BytePipeline, ByteTokenizer
from minilm.doctor.subject import Rows, Subject

PROBES = (
    "The end.", "naïve café", "中文字符，句号。", "नमस्ते عربى", "🙂👩‍👩‍👧", "  two  spaces\tand\n\nlines",
    "x = f(12345)",
)  # fmt: skip
LOOKED_AT, MOST = 30, 15_000
PARITY = 1e-4  # of two float32 sums over the same tokens


@check(group="data", needs=("tokenizer",), cost="some texts encoded; one small evaluation", quick=True)
def byte_lengths(subject: Subject) -> Finding:
    """Bytes of tokens against bytes of texts, and reported bits per byte against their definition."""
    tokenizer, view = subject.tokenizer, subject.data
    if not hasattr(tokenizer, "token_bytes"):
        raise NotApplicable("the tokenizer does not say which bytes a token stands for")
    texts = list(PROBES)
    if view is not None and view.texts is not None:
        texts += ledger.sample(view.texts("train"), LOOKED_AT, 4 * MOST)
    elif view is not None and view.documents is not None:
        texts += [
            tokenizer.decode(plain(d, tokenizer))
            for d in ledger.sample(view.documents("train"), LOOKED_AT, MOST)
        ]
    wrong, worst, total = [], (0, ""), 0
    for text in texts:
        ids = plain(tokenizer.encode(text), tokenizer)
        if tokenizer.decode(ids) != text:
            continue
        total += 1
        counted = sum(len(tokenizer.token_bytes(i)) for i in ids)
        if counted != len(text.encode()):
            wrong.append(text)
            worst = max(worst, (abs(counted - len(text.encode())), text))
    if not total:
        raise NotApplicable("no text comes back from its ids, so no count of bytes is right")
    if wrong:
        return failed(
            f"{len(wrong)} of {total} texts have other bytes than their tokens, most of all {worst[1][:40]!r}: off by "
            f"{worst[0]}",
            len(wrong),
            0,
            unit="texts",
            bugs=["bpb-bytes-wrong"],
            component="token_bytes",
            advice="count the bytes that the token stands for in the vocabulary, not those of its text: a part of a "
            "character has no text",
        )
    return _reported(subject, total)


def _reported(subject: Subject, total: int) -> Finding:
    """Bits per byte as the evaluation reports them."""
    said = f"in {total} texts the bytes of the tokens are those of the text"
    if subject.bits_per_byte is None or subject.evaluate is None:
        return passed(said, 0, 0, unit="texts")
    rows = _rows(subject)
    predicted = [
        int(row.tokens[b, i + 1]) for row in rows for b in range(len(row)) for i in range(row.tokens.shape[1] - 1)
        if int(row.segments[b, i]) == int(row.segments[b, i + 1]) > 0
    ]  # fmt: skip
    num_bytes = sum(len(subject.tokenizer.token_bytes(i)) for i in predicted)
    with quiet(subject, redraw=None), torch.no_grad():
        nats, reported = subject.evaluate(rows), subject.bits_per_byte(rows)
    count = sum(num_targets(r) for r in rows)
    if not num_bytes:
        raise NotApplicable("the tokens of the texts stand for no bytes")
    expected = nats * count / num_bytes / math.log(2)
    ratio = reported / expected if expected else math.inf
    if abs(ratio - 1) <= PARITY:
        return passed(
            f"{said}; {reported:.4f} bits per byte are reported, {expected:.4f} are right",
            abs(ratio - 1),
            PARITY,
        )
    per_token = count / num_bytes
    known = {"per token, not per byte": 1 / per_token, "in nats, not in bits": math.log(2),
             "in nats per token": math.log(2) / per_token}  # fmt: skip
    name = next((k for k, v in known.items() if math.isclose(ratio, v, rel_tol=1e-3)), "")
    token = name.endswith(("not per byte", "per token"))
    return failed(
        f"{reported:.4f} bits per byte are reported, {expected:.4f} are right: {ratio:.4f} times"
        + (f", as if {name}" if name else ""),
        abs(ratio - 1),
        PARITY,
        unit="relative",
        bugs=["ppl-across-tokenizers", "bpb-bytes-wrong"]
        if token
        else ["bpb-bytes-wrong", "ppl-across-tokenizers"],
        component="evaluation (bits per byte)",
        advice="divide the summed nats by ln 2 and by the bytes of the predicted tokens, special tokens counting none",
    )


def _rows(subject: Subject) -> list[Rows]:
    tokenizer = subject.tokenizer
    special = [i for i in (tokenizer.bos_id,) if i is not None]
    length = (subject.max_length or 64) - 2
    documents: list[Sequence[int]] = []
    for text in PROBES[:4]:
        ids = [*special, *plain(tokenizer.encode(text), tokenizer)][:length]
        if len(ids) > 1:
            documents.append(ids)
    return [Rows.documents(documents[:2]), Rows.documents(documents[2:])]


@byte_lengths.plant("bpb-bytes-wrong", component="token_bytes", what="each token decoded alone")
def _() -> Subject:
    class Alone(ByteTokenizer):
        def token_bytes(self, token: int) -> bytes:
            return super().token_bytes(token).decode(errors="replace").encode()

        def decode(self, ids: Sequence[int]) -> str:
            return ByteTokenizer().decode(ids)

    class Data(BytePipeline):
        tokenizer_type = Alone

    return specimens.subject(pipeline=Data, size=BYTES)


@byte_lengths.plant("bpb-bytes-wrong", component="token_bytes", what="characters counted in place of bytes")
def _() -> Subject:
    class Characters(ByteTokenizer):
        def token_bytes(self, token: int) -> bytes:
            return super().token_bytes(token)[:1] if token >= 256 else super().token_bytes(token)

        def decode(self, ids: Sequence[int]) -> str:
            return ByteTokenizer().decode(ids)

    class Data(BytePipeline):
        tokenizer_type = Characters

    return specimens.subject(pipeline=Data, size=BYTES)


@byte_lengths.plant(
    "ppl-across-tokenizers", component="evaluation", what="per token, reported as if per byte"
)
def _() -> Subject:
    subject = specimens.subject(pipeline=BytePipeline, size=BYTES)
    evaluate = subject.evaluate
    assert evaluate is not None
    return subject.but(bits_per_byte=lambda batches: evaluate(batches) / math.log(2))


@byte_lengths.plant("bpb-bytes-wrong", component="evaluation", what="bytes of the inputs, BOS counted as one")
def _() -> Subject:
    subject = specimens.subject(pipeline=BytePipeline, size=BYTES)
    evaluate, tokenizer = subject.evaluate, subject.tokenizer
    assert evaluate is not None

    def reported(batches: Sequence[Rows]) -> float:
        count = sum(num_targets(r) for r in batches)
        ids = [int(i) for r in batches for i in r.tokens[r.segments > 0]]
        return (
            evaluate(batches) * count / sum(max(1, len(tokenizer.token_bytes(i))) for i in ids) / math.log(2)
        )

    return subject.but(bits_per_byte=reported)


@byte_lengths.healthy("bytes and pieces in several scripts")
def _() -> Subject:
    return specimens.subject(pipeline=BytePipeline, size=BYTES)
