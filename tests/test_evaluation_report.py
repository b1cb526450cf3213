"""eval.py as a user calls it: the numbers of a store and of a file, one process and two, and every refusal."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_checkpoint import make_run
from evaluation_reference import log_probabilities, row_logits, slow_generate, token_losses

from minilm import evaluate as evaluate_public
from minilm.alignment import Sum
from minilm.data.build import build
from minilm.data.loader import validation_batches
from minilm.data.rows import Rows
from minilm.data.store import Store
from minilm.errors import CheckFailed, ConfigError, DataError
from minilm.evaluation.heldout import How, StoreSplit, TextFile, open_held_out
from minilm.evaluation.intervals import Scores, bootstrap
from minilm.evaluation.report import Asked, Report, print_report, printable
from minilm.evaluation.score import documents, evaluate

ROOT = Path(__file__).parent.parent
FLAGS = ["--prompt-lengths", "4,8", "--continuation-tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def eval_main():
    spec = importlib.util.spec_from_file_location("eval_entry", ROOT / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def losses_by_document(model, rows: Rows) -> dict[tuple[int, int], list[float]]:
    """{(source, document): nats of its tokens}, walking the stream of the store, row after row."""
    (shard,), length, found = rows.shards, rows.sequence_length, {}
    owner = np.repeat(np.arange(shard.num_documents), np.diff(shard.offsets.astype(int)))
    for start in range(0, len(owner) - 1, length):
        stop = min(start + length + 1, len(owner))
        for document in np.unique(owner[start:stop]):
            here = start + np.flatnonzero(owner[start:stop] == document)
            tokens = [int(t) for t in shard.tokens[here]]
            if len(tokens) > 1:
                found.setdefault((0, int(document)), []).extend(token_losses(model, tokens))
    return found


@pytest.mark.parametrize("sequence_length", [7, 48])
def test_a_store_is_scored_as_training_validates_on_it_with_an_interval_over_documents(made, sequence_length):
    rows = Rows(made.store, "validation", sequence_length)
    scores = StoreSplit(rows, made.tokenizer, made.model).scores(made.model, How(batch_rows=5))
    trained = evaluate(made.model, validation_batches(rows, 16), byte_lengths=made.tokenizer.byte_lengths)
    assert scores.loss == pytest.approx(trained.mean, rel=1e-6)
    assert scores.num_tokens == float(trained.tokens) == rows.num_targets
    assert scores.num_bytes == float(trained.bytes)
    expected = losses_by_document(made.model, rows)
    flat = [n for nats in expected.values() for n in nats]
    assert scores.loss == pytest.approx(math.fsum(flat) / len(flat), rel=1e-5)
    assert scores.num_documents == len(expected) == made.store.shards("validation")[0].num_documents
    table = np.array([[math.fsum(nats), len(nats)] for _, nats in sorted(expected.items())])
    assert scores.interval == pytest.approx(bootstrap(table), rel=1e-5)
    assert scores.interval[0] < scores.loss < scores.interval[1]


def test_a_file_is_scored_by_whole_documents(made):
    held_out = TextFile(str(made.corpus), made.tokenizer, 32)
    scores = held_out.scores(made.model, How(batch_rows=3))
    direct = documents(made.model, made.tokenizer, made.texts, 32)
    assert scores.loss == pytest.approx(direct.loss, rel=1e-6) and scores.num_tokens == direct.num_tokens
    assert scores.num_bytes == sum(len(text.encode()) for text in made.texts)
    assert held_out.num_documents == len(made.texts)


def test_documents_by_number_are_those_of_the_data(made):
    held_out = TextFile(str(made.corpus), made.tokenizer, 32)
    expected = [made.tokenizer.document(made.texts[n])[:9] for n in (50, 3)]
    assert held_out.token_documents([50, 3], 9) == expected
    split = StoreSplit(Rows(made.store, "validation", 16), made.tokenizer, made.model)
    (shard,) = made.store.shards("validation")
    assert split.token_documents([4], 9) == [shard.document(4)[:9].tolist()]


def test_bad_lines_stop_before_computing_or_are_skipped_and_listed(made, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good cat"}\n{"text": 3}\n{broken\n\xff\xfe\n{"text": "dog"}\n')
    with pytest.raises(DataError) as caught:
        TextFile(str(path), made.tokenizer, 32)
    for part in (
        "3 bad documents",
        f"{path}:2",
        f"{path}:3: not JSON",
        f"{path}:4: not UTF-8",
        "--on-bad-line skip",
    ):
        assert part in str(caught.value)
    held_out = TextFile(str(path), made.tokenizer, 32, skip_bad=True)
    assert held_out.scores(made.model, How()).num_documents == 2
    assert len(held_out.describe()["bad_documents_skipped"]) == 3


def test_the_report_of_a_run_folder(made, eval_main, tmp_path, capsys):
    out = tmp_path / "scores.json"
    flags = ["--checkpoint", str(made.run_folder), "--json", str(out), "--samples", "2", *FLAGS]
    assert eval_main(flags) == 0
    report = json.loads(out.read_text("utf-8"))
    rows = Rows(made.store, "validation", 48)
    flat = [n for nats in losses_by_document(made.model, rows).values() for n in nats]
    scores = report["scores"]
    assert scores["loss"] == pytest.approx(math.fsum(flat) / len(flat), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(math.fsum(flat) / len(flat)), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(
        math.fsum(flat) / math.log(2) / scores["num_bytes"], rel=1e-5
    )
    assert (report["step"], report["split"], report["sequence_length"]) == (7, "validation", 48)
    (shard,) = made.store.shards("validation")
    every = [shard.document(n).tolist() for n in range(shard.num_documents)]
    for p in (4, 8):
        enough = [d for d in every if len(d) >= p + 6]
        nats = [n for d in enough for n in token_losses(made.model, d[: p + 6])[p - 1 :]]
        found = report["continuations"][str(p)]
        assert found["loss"] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)
        assert (found["num_tokens"], found["num_documents"]) == (len(nats), len(enough))
        assert found["num_excluded"] == len(every) - len(enough)
    assert len(report["samples"]) == 2
    for sample in report["samples"]:
        document = every[sample["document"]]
        assert sample["prompt"] == made.tokenizer.decode(document[:8])
        assert sample["truth"] == made.tokenizer.decode(document[8:14])
        greedy = slow_generate(made.model, document[:8], 6, temperature=0, eos_id=made.tokenizer.eos_id)
        assert sample["prediction"] == made.tokenizer.decode(greedy)
        assert sample["loss"] == pytest.approx(np.mean(token_losses(made.model, document[:14])[7:]), rel=1e-4)
    shown = capsys.readouterr()
    assert f"{scores['loss']:.4f}" in shown.out and "after 8" in shown.out
    assert "wrote" in shown.err


def test_a_file_through_eval_and_any_batch_size(made, eval_main, tmp_path, capsys):
    found = []
    for batch_rows in ("1", "50"):
        out = tmp_path / f"{batch_rows}.json"
        flags = ["--checkpoint", str(made.checkpoint), "--data", str(made.corpus), "--json", str(out)]
        assert eval_main([*flags, "--batch-rows", batch_rows, "--sequence-length", "20", *FLAGS]) == 0
        found.append(json.loads(out.read_text("utf-8")))
    one, many = found
    assert one["scores"]["loss"] == pytest.approx(many["scores"]["loss"], rel=1e-6)
    assert one["scores"]["num_tokens"] == sum(len(made.tokenizer.document(t)) - 1 for t in made.texts)
    assert one["scores"]["least_context_tokens"] == 10
    assert "at least 10" in " ".join(capsys.readouterr().out.split())


def test_two_processes_give_the_numbers_of_one(made, eval_main, tmp_path, capfd):
    """The corpus has 60 documents and the split an odd number of rows: ranks get unequal parts."""
    runs = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    for name, data in (("store", []), ("file", ["--data", str(made.corpus), "--sequence-length", "20"])):
        flags = ["--checkpoint", str(made.run_folder), "--samples", "1", *data, *FLAGS]
        out = tmp_path / f"{name}-1.json"
        assert eval_main([*flags, "--json", str(out)]) == 0
        runs[name] = (flags, json.loads(out.read_text("utf-8")))
    # Both data in one launch: starting processes is what takes the time.
    script = tmp_path / "both.py"
    script.write_text(
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('entry', {str(ROOT / 'eval.py')!r})\n"
        "entry = importlib.util.module_from_spec(spec); spec.loader.exec_module(entry)\n"
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)\n"
        "for flags in json.loads(sys.argv[1]):\n"
        "    assert entry.main(flags) == 0\n"
        "from minilm.data.loader import validation_batches\n"
        "from minilm.data.rows import Rows\n"
        "from minilm.data.store import Store\n"
        "from minilm.evaluation.score import evaluate\n"
        "from minilm.run import load_checkpoint\n"
        "loaded = load_checkpoint(sys.argv[2])\n"
        "rows = Rows(Store.open(loaded.config.data.store), 'validation', 48)\n"
        "mine = validation_batches(rows, 4, state.process_index, state.num_processes)\n"
        "from pathlib import Path\n"  # a file of its own: lines of two processes can run into each other
        "Path(f'validated-{state.process_index}').write_text(repr(evaluate(loaded.model, mine).mean))\n"
        "state.destroy_process_group()\n"
    )
    both = [[*flags, "--json", str(tmp_path / f"{name}-2.json")] for name, (flags, _) in runs.items()]
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    extra = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, *extra, str(script), json.dumps(both), str(made.run_folder)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("perplexity") == 2 == len(runs), "only the first process prints"
    for rank in ("0", "1"):
        validated = float((tmp_path / f"validated-{rank}").read_text())
        assert validated == pytest.approx(runs["store"][1]["scores"]["loss"], rel=1e-6)
    for name, (_, alone) in runs.items():
        together = json.loads((tmp_path / f"{name}-2.json").read_text("utf-8"))
        assert together["num_processes"] == 2 and alone["num_processes"] == 1
        pairs = [(alone["scores"], together["scores"])]
        pairs += [(alone["continuations"][p], together["continuations"][p]) for p in ("4", "8")]
        for a, b in pairs:
            assert a["num_tokens"] > 0
            for key in ("loss", "bits_per_byte", "nats", "loss_95"):
                assert b[key] == pytest.approx(a[key], rel=1e-6)
            for key in ("num_tokens", "num_bytes", "num_documents", "num_excluded"):
                assert a[key] == b[key]
        assert alone["samples"] == together["samples"]


def test_default_prompt_lengths_are_those_that_fit(made):
    assert Asked().checked_lengths(made.model) == [16, 64]
    with pytest.raises(ConfigError, match="need a context of 191 tokens; the model has 128"):
        Asked(prompt_lengths=[16, 128]).checked_lengths(made.model)


def test_no_document_long_enough_is_shown_as_absent(made, eval_main, tmp_path, capsys):
    path, out = tmp_path / "short.txt", tmp_path / "short.json"
    path.write_text("cat")
    flags = ["--checkpoint", str(made.run_folder), "--data", str(path), "--json", str(out), *FLAGS]
    assert eval_main(flags) == 0
    report = json.loads(out.read_text())
    assert report["continuations"]["8"]["loss"] is None and report["continuations"]["8"]["num_excluded"] == 1
    assert report["samples"] == [] and report["scores"]["loss_95"] is None


def test_a_model_whose_loss_is_no_number_is_refused(made):
    broken = copy.deepcopy(made.model)
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    batches = list(validation_batches(Rows(made.store, "validation", 16), 4))
    for data in (str(made.store.path), made.texts, batches):
        with pytest.raises(CheckFailed, match="not finite"):
            evaluate_public(broken, data, tokenizer=made.tokenizer)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "/nowhere"], "/nowhere"),
        (["--data", "/nowhere.jsonl"], "There is no file or folder"),
        (["--split", "test"], "no split 'test'"),
        (["--sequence-length", "500"], "sequence length is 500"),
        (["--batch-rows", "0"], "--batch-rows is 0"),
        (["--continuation-tokens", "0"], "continuation tokens is 0"),
        (["--json", "/nowhere/x.json"], "there is no folder /nowhere"),
        (["--device", "cuda"], "no GPU"),
        (["--data", "synthetic:markov?vocab=256&documents=10"], "token ids without text"),
    ],
)
def test_every_refusal_is_a_paragraph_and_exit_code_2(made, eval_main, capsys, flags, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert eval_main(["--checkpoint", str(made.run_folder), "--device", "cpu", *flags]) == 2
    shown = capsys.readouterr()
    assert message in " ".join(shown.err.split()) and "Traceback" not in shown.err
    assert shown.out == ""


def test_a_checkpoint_outside_a_run_needs_data(made, eval_main, tmp_path, capsys):
    alone = tmp_path / "step-00000007"
    alone.symlink_to(made.checkpoint)
    assert eval_main(["--checkpoint", str(alone), "--device", "cpu"]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_store_of_another_tokenizer_or_without_text_is_refused(made, tmp_path):
    with pytest.raises(DataError, match="no tokenizer"):
        open_held_out(str(made.store.path), made.model, None, sequence_length=16)
    with pytest.raises(DataError, match="no tokenizer"):
        open_held_out(str(made.corpus), made.model, None, sequence_length=16)
    other = type(made.tokenizer).train(["something else entirely " * 9], vocab_size=280)
    with pytest.raises(DataError, match="another tokenizer"):
        open_held_out(str(made.store.path), made.model, other, sequence_length=16)


def test_reference_of_these_tests_is_a_distribution(made):
    assert np.exp(log_probabilities(row_logits(made.model, [1, 5, 6]))).sum(-1) == pytest.approx(1)


def test_a_model_cannot_command_the_terminal_through_its_samples():
    assert printable("a\x1b[31m\x07\x9b\x7f\nb\t中") == "a\u241b[31m\u2407\ufffd\u2421\nb\t中"


def test_no_number_of_the_table_is_cut_off_in_a_narrow_place(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    big = Scores(
        total=Sum.of(1.4e12, 123_456_789_012, 4e11),
        intervals={"loss": (10.5, 12.5)},
        num_documents=12_345_678,
    )
    about = {"checkpoint": "runs/" + "x" * 90, "num_processes": 1}
    print_report(Report(about=about, scores=big, continuations={128: big}))
    shown = capsys.readouterr().out
    assert "…" not in shown and "x" * 90 in shown
    assert shown.count("123,456,789,012") == shown.count("12,345,678") == shown.count("84,120.04") == 2


def test_documents_of_several_sources_are_told_apart(made, tmp_path):
    for name, texts in (("a", made.texts[:15]), ("b", made.texts[15:40])):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    places = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    build(
        tmp_path / "store", places[:1], made.tokenizer, validation_sources=places[1:], validation_fraction=0.5
    )
    store = Store.open(tmp_path / "store")
    shards = store.shards("validation")
    assert len(shards) == 2
    rows = Rows(store, "validation", 20)
    split = StoreSplit(rows, made.tokenizer, made.model)
    scores = split.scores(made.model, How())
    assert scores.num_documents == split.num_documents == sum(s.num_documents for s in shards)
    assert scores.num_tokens == rows.num_targets
    every = [s.document(n)[:5].tolist() for s in shards for n in range(s.num_documents)]
    assert split.token_documents(range(len(every)), 5) == every
