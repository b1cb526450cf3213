"""The whole path as a user walks it: corpus, tokenizer, store, training, evaluation, text; and what must agree."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math

import pytest
import torch
from data_stores import texts, write_jsonl
from training_runs import ROOT, column, records

from minilm.__main__ import main as minilm
from minilm.data.rows import Rows
from minilm.data.store import Store
from minilm.models.hf import to_hf
from minilm.run import load_checkpoint

pytestmark = [pytest.mark.usefixtures("fresh_accelerate"), pytest.mark.xdist_group("whole path")]


def script(name):
    """train.py or eval.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder with a spaced, non-ASCII name in which everything was made by the commands of the README."""
    folder = tmp_path_factory.mktemp("walk") / "ein Ordner 字"
    folder.mkdir()
    corpus = write_jsonl(folder / "corpus.jsonl", texts(400, longest=90))
    source = ["--source", str(corpus), "--validation-fraction", "0.1"]
    assert (
        minilm(["tokenizer", "train", *source, "--vocab-size", "330", "--out", str(folder / "tokenizer")])
        == 0
    )
    made = ["--tokenizer", str(folder / "tokenizer"), "--out", str(folder / "store")]
    assert minilm(["data", "build", *source, *made]) == 0
    settings = folder / "first.yaml"
    settings.write_text(
        f"""
data: {{store: {folder / "store"}, sequence_length: 48}}
run: {{folder: {folder / "runs"}}}
model: {{size: tiny}}
train: {{epochs: 1.5, batch_size: 8, micro_batch: 4, validate_every: 40, validation_rows: null, device: cpu}}
optim: {{learning_rate: 1e-2, warmup_steps: 5}}
sample: {{prompts: ["", "the cat"], max_new_tokens: 12}}
track: {{swanlab: off}}
""",
        encoding="utf-8",
    )
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert script("train").main(["--config", str(settings)]) == 0
    return folder


def test_the_run_learned_and_left_what_it_promises(walked):
    run = walked / "runs" / "first"
    validation = records(run, "validation")
    assert validation[0]["loss"] == pytest.approx(math.log(330), abs=0.15)
    assert validation[-1]["loss"] < validation[0]["loss"] - 2
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "loss.png", "samples.md", "log.txt"):
        assert (run / name).stat().st_size > 100, name
    assert "## step" in (run / "samples.md").read_text(encoding="utf-8")
    assert json.loads((run / "manifest.json").read_text())["state"] == "finished"
    assert column(run, "epoch")[-1] == pytest.approx(1.5, abs=0.01)


def test_eval_gives_the_validation_loss_of_the_training_log_and_transformers_agrees(walked):
    run = walked / "runs" / "first"
    out = walked / "scores.json"
    assert (
        script("eval").main(
            ["--checkpoint", str(run), "--device", "cpu", "--json", str(out), "--samples", "1"]
        )
        == 0
    )
    scores = json.loads(out.read_text(encoding="utf-8"))
    logged = records(run, "validation")[-1]
    assert scores["scores"]["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert scores["scores"]["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-6)

    # Independently: each document of each row alone through LlamaForCausalLM and its own loss.
    llama = to_hf(load_checkpoint(run).model)
    nats = count = 0
    rows = Rows(Store.open(walked / "store"), "validation", 48)
    for number in range(len(rows)):
        tokens, segments = (torch.from_numpy(x) for x in rows[number])
        borders = [0, *(i for i in range(1, 49) if segments[i] != segments[i - 1]), 49]
        for begin, end in itertools.pairwise(borders):
            document = tokens[begin:end][None]
            if segments[begin] > 0 and end - begin > 1:
                with torch.no_grad():
                    nats += float(llama(document, labels=document).loss) * (end - begin - 1)
                count += end - begin - 1
    assert count == logged["tokens"]
    assert nats / count == pytest.approx(logged["loss"], rel=1e-5)


def test_eval_refuses_a_store_that_is_not_the_one_of_the_run(walked, tmp_path, capsys):
    import shutil

    store, kept = walked / "store", tmp_path / "kept"
    shutil.move(store, kept)
    try:
        source = ["--source", str(write_jsonl(tmp_path / "other.jsonl", texts(300, seed=5)))]
        made = ["--tokenizer", str(walked / "tokenizer"), "--out", str(store), "--validation-fraction", "0.1"]
        assert minilm(["data", "build", *source, *made]) == 0
        command = ["--checkpoint", str(walked / "runs" / "first"), "--device", "cpu", "--samples", "0"]
        assert script("eval").main(command) == 2
        assert "not the store that the checkpoint was trained on" in capsys.readouterr().err.replace(
            "\n", " "
        )
        assert script("eval").main([*command, "--data", str(store)]) == 0
    finally:
        shutil.rmtree(store)
        shutil.move(kept, store)


def test_a_sample_that_cannot_be_written_does_not_end_the_run(walked, monkeypatch):
    from minilm import launch
    from minilm.errors import DataError

    def refuses(*arguments, **keywords):
        raise DataError("no text today")

    monkeypatch.setattr(launch, "generate", refuses)
    more = ["--run.name=silent", "--train.epochs=none", "--train.steps=6"]
    assert script("train").main(["--config", str(walked / "first.yaml"), *more]) == 0
    events = [r["text"] for r in records(walked / "runs" / "silent", "event")]
    # In this order: a process that dies while it writes text has its weights on disk.
    assert events.index("saved step-00000006") < events.index("no sample: no text today")


def test_bits_per_byte_is_nats_over_the_bytes_of_the_held_out_text(walked):
    logged = records(walked / "runs" / "first", "validation")[-1]
    store = Store.open(walked / "store")
    tokenizer = store.tokenizer()
    # A row's first token is no target, so the bytes are those of all tokens that are one.
    rows, num_bytes = Rows(store, "validation", 48), 0
    for number in range(len(rows)):
        tokens, segments = rows[number]
        for i in range(1, 49):
            if segments[i] > 0 and segments[i] == segments[i - 1]:
                num_bytes += len(tokenizer.token_bytes(int(tokens[i])))
    expected = logged["loss"] * logged["tokens"] / num_bytes / math.log(2)
    assert logged["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_text_comes_on_stdout_and_nothing_else(walked, capsys):
    run = str(walked / "runs" / "first")
    command = [
        "generate",
        "--checkpoint",
        run,
        "--prompt",
        "the cat",
        "--max-new-tokens",
        "9",
        "--temperature",
        "0",
    ]
    assert minilm([*command, "--device", "cpu"]) == 0
    streamed = capsys.readouterr().out
    assert streamed.startswith("the cat")
    assert minilm([*command, "--device", "cpu", "--no-stream"]) == 0
    assert capsys.readouterr().out == streamed


def test_data_show_of_a_run_shows_the_first_step_of_that_run(walked, capsys):
    assert minilm(["data", "show", str(walked / "runs" / "first"), "--rows", "1", "--positions", "4"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "step 0" in shown and "->" in shown
