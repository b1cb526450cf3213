"""Exported folders in lm-evaluation-harness: its log-likelihoods and texts are those of our own model."""

from __future__ import annotations

import pytest
import torch
from evaluation_checkpoint import TEXT
from remote_code import kept_apart
from zoo_models import tiny

from minilm.data.tokenizer import Tokenizer
from minilm.export.folder import export_folder

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
pytestmark = pytest.mark.filterwarnings("default")  # the harness and what it brings warn about each other

PAIRS = [
    ("the cat sat on a", " mat"),
    ("the dog", " ran under 中文"),
    ("def return import x y z and", " the"),
]


@pytest.mark.parametrize("name", ["original", "moe", "knowledge"])
def test_the_harness_sees_our_model(name, tmp_path, monkeypatch):
    kept_apart(monkeypatch, tmp_path / "modules")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = Tokenizer.train([TEXT] * 5, vocab_size=290)
    ours = tiny(name, vocab_size=tokenizer.num_tokens)
    folder = export_folder(ours, tmp_path / "out", tokenizer=tokenizer)
    harness = HFLM(
        pretrained=str(folder),
        device="cpu",
        dtype="float32",
        batch_size=2,
        trust_remote_code=name != "original",
    )

    def asked(kind, arguments):
        return [
            Instance(request_type=kind, doc={}, arguments=a, idx=n, metadata=("t", n, 1))
            for n, a in enumerate(arguments)
        ]

    for (context, text), (got, _) in zip(
        PAIRS, harness.loglikelihood(asked("loglikelihood", PAIRS)), strict=True
    ):
        ids, start = tokenizer.prompt(context + text), len(tokenizer.prompt(context))
        with torch.no_grad():
            each = ours(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        want = sum(float(each[i - 1, ids[i]]) for i in range(start, len(ids)))
        assert got == pytest.approx(want, abs=2e-5)
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    requests = asked("generate_until", [(context, options) for context, _ in PAIRS])
    for (context, _), got in zip(PAIRS, harness.generate_until(requests), strict=True):
        text = start = tokenizer.prompt(context)
        with torch.no_grad():
            while len(text) < len(start) + 8 and text[-1] != tokenizer.eos_id:
                text = [*text, int(ours(torch.tensor([text])).logits[0, -1].argmax())]
        assert got == tokenizer.decode(text[len(start) :]).split("\n")[0]
