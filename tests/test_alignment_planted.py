"""Known ways to compute a wrong loss, planted one by one into a copy of `minilm/alignment.py`.

Each plant is a change of the source text. The oracle must see every one of them and must be silent about the
untouched module: so the proof that these tests can fail runs with them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import alignment_oracle
import pytest
from alignment_oracle import Case

import minilm.alignment

SOURCE = Path(minilm.alignment.__file__).read_text(encoding="utf-8")

ADD = "return Sum(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)"
SUPERVISED = "counts = (source == target) & (target > 0)"
ENTRIES = "torch.where(counts, entries[:, 1:].long(), -1)"
RESTART = "return torch.where(segments > 0, index - first, 0)"

PLANTS = {
    "no shift": ("targets=tokens[:, 1:].clone()", "targets=tokens[:, :-1].clone()"),
    "double shift": ("targets=tokens[:, 1:].clone()", "targets=tokens[:, 1:].roll(-1, 1)"),
    "inputs shifted with the targets": ("inputs=tokens[:, :-1].clone()", "inputs=tokens[:, 1:].clone()"),
    "weights left unshifted": ("weights=counts.float()", "weights=counts.float().roll(1, 1)"),
    "weights of the inputs": (
        SUPERVISED,
        "counts = (source == target) & (source > 0)\n    counts = source > 0",
    ),
    "learn mask left unshifted": ("counts & learn[:, 1:]", "counts & learn[:, :-1]"),
    "learn mask ignored: the prompt counts": ("counts & learn[:, 1:]", "counts"),
    "learn mask shifted into the prompt": (
        "counts & learn[:, 1:]",
        "counts & (learn[:, 1:] | learn[:, :-1])",
    ),
    "entries left unshifted": (ENTRIES, ENTRIES.replace("[:, 1:]", "[:, :-1]")),
    "entries shifted twice": (ENTRIES, ENTRIES.replace("[:, 1:]", "[:, 1:].roll(-1, 1)")),
    "entries kept where nothing counts": (ENTRIES, "entries[:, 1:].long()"),
    "entries kept where the prediction crosses a document border": (
        ENTRIES,
        ENTRIES.replace("torch.where(counts", "torch.where(target > 0"),
    ),
    "entries kept for tokens that are not learnt": (
        ENTRIES,
        ENTRIES.replace("torch.where(counts", "torch.where((source == target) & (target > 0)"),
    ),
    "no entry is entry 0": (ENTRIES, ENTRIES.replace("-1)", "0)")),
    "entries dropped": (f"None if entries is None else {ENTRIES}", "None"),
    "PAD counted": (SUPERVISED, "counts = source == target"),
    "PAD counted everywhere": (SUPERVISED, "counts = source >= 0"),
    "first PAD after a document counted": (
        SUPERVISED,
        "counts = ((source == target) & (target > 0)) | ((source > 0) & (target == 0))",
    ),
    "padding known by its id: EOS never learnt where PAD is EOS": (
        SUPERVISED,
        "counts = (source == target) & (target > 0) & (tokens[:, 1:] != 2)",
    ),
    "next document's first token counted": (SUPERVISED, "counts = (target > 0) & (source > 0)"),
    "first token after left padding counted": (
        SUPERVISED,
        "counts = (target > 0) & ((source == target) | (source == 0))",
    ),
    "positions do not restart": (RESTART, "return torch.where(segments > 0, index, 0)"),
    "positions restart one token late": (
        "starts[:, 1:] = segments[:, 1:] != segments[:, :-1]",
        "starts[:, 2:] = segments[:, 1:-1] != segments[:, :-2]",
    ),
    "segments of the targets": ("segments=source.clone()", "segments=target.clone()"),
    "mean of micro-batch means": (
        ADD,
        "n = self.tokens + other.tokens\n"
        "        mean = (self.nats / self.tokens + other.nats / other.tokens) / 2\n"
        "        return Sum(mean * n, n, self.bytes + other.bytes)",
    ),
    "micro-batch mean as its share": ("torch.where(total == 0, 1, total)", "self.tokens"),
    "share of 0 tokens is NaN": ("torch.where(total == 0, 1, total)", "total"),
    "bytes of one part only": (ADD, ADD.replace("self.bytes + other.bytes", "self.bytes")),
    "tokens of the last part only": (ADD, ADD.replace("self.tokens + other.tokens", "other.tokens")),
    "ranks averaged": ("return Sum(*total.unbind())", "return Sum(*(total / 2).unbind())"),
    "mean of rank means": (
        "return Sum(*total.unbind())",
        "return Sum(total[0] / total[1] * self.tokens, self.tokens, self.bytes)",
    ),
    "rank's own loss logged": (
        "torch.distributed.all_reduce(total)",
        "torch.distributed.all_reduce(total.clone())",
    ),
    "empty mean is 0": ('raise DataError(f"There is no {what}', 'return 0.0  # (f"There is no {what}'),
    "denominator counts every position": (
        "return self.weights.sum(dtype=torch.float64)",
        "return torch.ones_like(self.weights).sum(dtype=torch.float64)",
    ),
    "bits per byte in nats": (" / math.log(2)", ""),
    "bytes of the inputs": (
        "lengths[torch.where(batch.weights > 0, batch.targets, 0)]",
        "lengths[torch.where(batch.weights > 0, batch.inputs, 0)]",
    ),
    "bytes of padding counted": (
        "return (lengths[torch.where(batch.weights > 0, batch.targets, 0)] * batch.weights).sum()",
        "return lengths[batch.targets].sum()",
    ),
    "nll of ignored positions kept": (
        "targets = torch.where(counts, batch.targets, _NO_TARGET)",
        "targets = batch.targets",
    ),
    "nll averaged": ("return flat.view_as(targets)", "return flat.view_as(targets) / counts.sum()"),
    "loss in bfloat16": ("return x if x.dtype == torch.float64 else x.float()", "return x.bfloat16()"),
    "chunk means averaged": (
        "nats -= torch.where(counts, log_p.gather(1, wanted), 0).sum(dtype=torch.float64)",
        "nats -= torch.where(counts, log_p.gather(1, wanted), 0).mean(dtype=torch.float64)",
    ),
    "last chunk dropped": (
        "range(0, hidden.shape[0], chunk)",
        "range(0, hidden.shape[0] - chunk + 1, chunk)",
    ),
    "chunk counts ignored positions": (
        "nats -= torch.where(counts, log_p.gather(1, wanted), 0)",
        "nats -= log_p.gather(1, wanted)",
    ),
    "gradient of ignored positions kept": (
        "error = error.masked_fill_(~counts, 0).to(dtype)",
        "error = error.to(dtype)",
    ),
    "gradient of the head from the last chunk": (
        "grad_head += onednn.to_weight(error, states)",
        "grad_head[:] = onednn.to_weight(error, states)",
    ),
    "gradient without the one-hot": ("torch.full_like(wanted, -1, dtype", "torch.full_like(wanted, 0, dtype"),
    "gradient not scaled by what follows": ("(g * grad.to(", "(g * torch.ones_like(grad).to("),
    "labels of -100 learnt": (
        "return align(input_ids, segments, learn)",
        "return align(input_ids, segments)",
    ),
    "attention mask ignored": (
        "torch.ones_like(input_ids) if attention_mask is None else (attention_mask > 0).long()",
        "torch.ones_like(input_ids)",
    ),
    "last token of the row, not of the text": ("lengths.to(x.device) - 1]", "lengths.to(x.device) * 0 - 1]"),
    "one beyond the last token": ("lengths.to(x.device) - 1]", "lengths.to(x.device) - 2]"),
}


def planted(old: str, new: str) -> ModuleType:
    """A module made from the source of the alignment layer with one passage replaced."""
    assert SOURCE.count(old) == 1, (
        f"{old!r} occurs {SOURCE.count(old)} times: the plant must follow the source"
    )
    module = ModuleType("planted_alignment")
    sys.modules[module.__name__] = module  # where dataclasses look up the types of their fields
    try:
        exec(compile(SOURCE.replace(old, new), "planted_alignment.py", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def test_the_oracle_agrees_with_the_alignment_layer() -> None:
    assert alignment_oracle.disagreement(minilm.alignment) is None


def test_the_oracle_agrees_with_an_unchanged_copy() -> None:
    """So that no plant is found because of the copying."""
    assert alignment_oracle.disagreement(planted(SOURCE[:40], SOURCE[:40])) is None


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    found = alignment_oracle.disagreement(planted(*PLANTS[name]))
    assert found is not None, f"the reference tests do not see: {name}"
    assert "Error: " not in found, f"{name} did not compute anything wrong, it stopped: {found}"


def test_a_planted_bug_may_be_invisible_in_a_plain_case() -> None:
    """Why the layouts matter: one unpadded document a row cannot tell these bugs from the right code."""
    plain = Case("plain", [[3, 1, 4, 1, 5]], [[1] * 5], None, 6)
    for name in ("PAD counted", "next document's first token counted", "positions do not restart"):
        assert alignment_oracle.compare(planted(*PLANTS[name]), plain) is None
    assert alignment_oracle.compare(planted(*PLANTS["no shift"]), plain) is not None
