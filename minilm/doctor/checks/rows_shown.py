"""What the model is trained on, as text, for the eye; and that text is what went in.

Why: "become one with the data": a shift, a missing space, wrong characters or another document are seen at a
glance by a person, and by no loss.

How: some rows of the first batches are decoded, run by run, into the details of the finding. Each run must be
found in a text of the data (or in a decoded document): cut-off characters at its ends aside, letter by
letter.

Cannot see: texts that were already wrong when they came.

Sources: Karpathy, A Recipe for Training Neural Networks ("visualize just before the net").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilm.doctor import ledger, specimens
from minilm.doctor.checks.vocabulary import BYTES, plain
from minilm.doctor.core import Finding, NotApplicable, check, failed, passed
from minilm.doctor.specimens.pipeline import BytePipeline
from minilm.doctor.subject import Rows, Subject

SHOWN, LOOKED_AT, LEAST = 6, 40, 4  # rows in the details; rows looked at; characters of a run that is judged


@check(group="data", needs=("tokenizer", "data.batches"), cost="40 rows decoded", quick=True)
def rows_shown(subject: Subject) -> Finding:
    """Decoded rows in the details; each run of them is a piece of a text of the data."""
    view, tokenizer = subject.data, subject.tokenizer
    assert view is not None
    rows = ledger.epoch(view, 0, 0)
    if not len(rows):
        raise NotApplicable("an epoch has no rows")
    chosen = np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).astype(int)
    decoded = [(int(k), _runs(rows, int(k), tokenizer, view.isolated)) for k in chosen]
    shown = {f"row {k}": " | ".join(runs) for k, runs in decoded[:SHOWN]}
    source = _texts(view, tokenizer)
    if source is None:
        raise NotApplicable(
            "rows were decoded, but there are neither texts nor documents to hold them against: " + str(shown)
        )
    judged, strange = 0, []
    for k, runs in decoded:
        for run in runs:
            text = run.strip("�").strip()
            if len(text) >= LEAST:
                judged += 1
                if text not in source:
                    strange.append(f"row {k}: {text[:60]!r}")
    if not judged:
        raise NotApplicable("no row has a run of text that is long enough to be judged")
    if not strange:
        first = decoded[0][1]
        return passed(
            f"{judged} runs of text in {len(chosen)} rows stand in the data, for instance {(first or [''])[0][:50]!r}",
            0,
            0,
            unit="runs",
            details={"rows": shown},
        )
    return failed(
        f"{len(strange)} of {judged} runs of text in rows stand in no text of the data, first {strange[0]}",
        len(strange),
        0,
        unit="runs",
        bugs=["val-set-wrong-tokenizer", "tok-id-mod-vocab", "tok-uint16-wrap", "pack-label-across-docs"],
        component="rows (as text)",
        advice="read the rows in the details: other characters point to ids or tokenizer, joined texts to packing",
        details={"rows": shown, "strange": strange[:10]},
    )


def _runs(rows: ledger.Epoch, k: int, tokenizer: Any, isolated: bool) -> list[str]:
    """The documents of a row as texts; where rows are one stream, cut at special tokens."""
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} - {None}
    found = []
    for run in np.unique(rows.runs[k][rows.runs[k] > 0]):
        ids = rows.tokens[k][rows.runs[k] == run]
        ends = [] if isolated else np.flatnonzero(np.isin(ids, list(special))).tolist()
        found += [tokenizer.decode(plain(part.tolist(), tokenizer)) for part in np.split(ids, ends)]
    return found


def _texts(view: Any, tokenizer: Any) -> str | None:
    """All texts of training, each on its own."""
    if view.texts is not None:
        return "\n\0\n".join(view.texts("train"))
    if view.documents is None or not (truth := ledger.documents(view, "train")).whole:
        return None
    return "\n\0\n".join(tokenizer.decode(plain(truth[k].tolist(), tokenizer)) for k in range(len(truth)))


@rows_shown.plant("tok-id-mod-vocab", component="rows", what="every id one too high")
def _() -> Subject:
    class Up(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            return [Rows((r.tokens + (r.tokens > 2)) % 60, r.segments, r.learn) for r in super().rows(split)]

    return specimens.subject(pipeline=Up)


@rows_shown.plant("val-set-wrong-tokenizer", component="rows", what="rows made by another tokenizer")
def _() -> Subject:
    class Other(BytePipeline):
        def stored(self, split: str) -> list[list[int]]:
            return [[269, *(int(b) ^ 1 for b in text.encode()), 270] for text in self.texts[split]]

    return specimens.subject(pipeline=Other, size=BYTES)


@rows_shown.plant("pack-label-across-docs", component="rows", what="documents of a row are one run")
def _() -> Subject:
    class Whole(specimens.Pipeline):
        def rows(self, split: str) -> list[Rows]:
            return [Rows(r.tokens, (r.segments > 0).long(), r.learn) for r in super().rows(split)]

    return specimens.subject(pipeline=Whole)


@rows_shown.healthy("rows that begin and end within a character")
def _() -> Subject:
    return specimens.subject(pipeline=BytePipeline, size=BYTES)
