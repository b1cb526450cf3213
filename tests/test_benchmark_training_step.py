"""The benchmark of the training step: same work for all, its figures are what they say, and nobody is left behind."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from benchmark_modules import BENCHMARKS, imported

from minilm import models
from minilm.models.hf import to_hf

# What is measured once serves many tests: they stay on one worker.
pytestmark = pytest.mark.xdist_group("benchmark_training_step")

PEER = '''
"""A stand-in for nanoGPT: what the adapter asks of it."""
import dataclasses, os, time
import torch
from torch import nn
import torch.nn.functional as F

@dataclasses.dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        print("a model that talks")

    def forward(self, idx, targets):
        if os.environ.get("PEER_SLEEPS"):
            time.sleep(1000)
        logits = self.lm_head(self.wte(idx))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, decay, rate, betas, device):
        return torch.optim.AdamW(self.parameters(), lr=rate, betas=betas, weight_decay=decay)
'''


@pytest.fixture(scope="module")
def bench():
    """The modules of benchmarks/, as they import each other when they are run; forgotten afterwards."""
    with imported("training_step") as module:
        yield module


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    (folder / "nanoGPT").mkdir()
    (folder / "nanoGPT" / "model.py").write_text(PEER)
    (folder / "litgpt").mkdir()  # nothing in it
    return folder


@pytest.fixture(scope="module")
def quick(bench, peers, tmp_path_factory):
    """The record of a whole run in small. A big parent must not show in the memory of its children."""
    out = tmp_path_factory.mktemp("results") / "out.json"
    ballast = torch.ones(300_000_000)  # 1.2 GB
    names = ["minilm", "transformers", "transformers-trainer", "nanogpt", "litgpt", "minimind"]
    code = bench.main(["--quick", "--only", *names, "--peers", str(peers), "--json", str(out)])
    del ballast
    return code, json.loads(out.read_text())


def small(bench, **changes):
    given = {"size": "tiny", "head_size": 8, "batch": 2, "length": 32, "device": "cpu", "dtype": "fp32"}
    return bench.Shape(**(given | {"threads": 1} | changes))


# ---------------------------------------------------------------- a run in small


def test_minilm_and_transformers_have_the_same_losses(bench, quick):
    code, record = quick
    assert code == 0
    found = record["results"]["cases"][0]["contenders"]
    ours, theirs = found["minilm"], found["transformers"]
    assert len(ours["losses"]) == 2 + 2  # not counted, counted
    assert len(set(ours["losses"])) == 4, "the steps are of different rows"
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["losses"] == pytest.approx(found["transformers-trainer"]["losses"], abs=1e-5)
    assert ours["loss_gap"] < 1e-5 and theirs["loss_gap"] == 0
    # The first loss, by hand.
    shape = small(bench)
    torch.manual_seed(0)
    llama = to_hf(models.build(shape.config()))
    rows = shape.tokens()[0]
    with torch.no_grad():
        by_hand = F.cross_entropy(llama(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    assert theirs["losses"][0] == pytest.approx(float(by_hand), abs=1e-5)


def test_a_peer_is_measured_and_who_cannot_be_is_told_with_the_reason(quick):
    found = quick[1]["results"]["cases"][0]["contenders"]
    assert found["nanogpt"]["in_order"] and found["nanogpt"]["tokens_per_second"]["median"] > 0
    assert set(found["litgpt"]) == {"label", "failed"}
    assert "litgpt" in found["litgpt"]["failed"] and "(exit code 1)" in found["litgpt"]["failed"]
    assert "no folder minimind" in found["minimind"]["failed"]


def test_the_memory_is_that_of_the_contender_alone(quick):
    for name in ("minilm", "transformers", "nanogpt"):
        told = quick[1]["results"]["cases"][0]["contenders"][name]
        assert 50e6 < told["bytes_before"] < told["peak_bytes"] < 1.2e9, name


def test_the_record_has_what_a_reader_asks_first(bench, quick, peers):
    record = quick[1]
    assert record["benchmark"] == "training_step"
    assert record["machine"]["torch"] == torch.__version__ and record["machine"]["threads"] == 1
    assert str(peers) not in json.dumps(record), "where a folder lies on this machine means nothing elsewhere"
    text = bench.section(record)
    for told in record["results"]["cases"][0]["contenders"].values():
        assert told["label"] in text
    assert record["command"] in text and "Floors on paper" in text
    assert "litgpt, eager: `" in text


# ---------------------------------------------------------------- the same work for all


def test_all_are_given_the_same_tokens(bench):
    from contenders.ours import batches

    shape = small(bench)
    for batch, (inputs, targets) in zip(batches(shape, packed=False), shape.pairs(), strict=True):
        assert torch.equal(batch.inputs, inputs) and torch.equal(batch.targets, targets)
        assert float(batch.num_targets()) == inputs.numel()
    for batch, (inputs, _) in zip(batches(shape, packed=True), shape.pairs(), strict=True):
        assert torch.equal(batch.inputs, inputs)
        assert all(2 <= len(row.unique()) <= 4 for row in batch.segments)
        assert float(batch.num_targets()) < inputs.numel()


def test_documents_in_a_row_share_no_operations(bench):
    from contenders.ours import batches, flops_per_token

    shape = small(bench)
    config, rows = shape.config(), batches(shape, packed=True)
    seen = [
        int((row[: i + 1] == row[i]).sum()) for batch in rows for row in batch.segments for i in range(32)
    ]
    attention = 12 * config.num_layers * config.dim * sum(seen) / len(seen)
    products = config.training_flops_per_token(32) - 12 * config.num_layers * config.dim * 33 / 2
    assert flops_per_token(shape, rows) == pytest.approx(products + attention)
    assert flops_per_token(shape, batches(shape, packed=False)) == config.training_flops_per_token(32)


def test_heads_are_cut_anew_and_share_keys_as_before(bench):
    known = {
        (c.num_heads, c.num_kv_heads, c.head_dim) for c in (small(bench, size="26m", head_size=16).config(),)
    }
    assert known == {(32, 8, 16)}
    cut = small(bench, size="26m", head_size=64).config()
    assert (cut.num_heads, cut.num_kv_heads, cut.head_dim) == (8, 2, 64)
    assert cut.num_parameters() == models.preset("original", "26m").num_parameters()
    assert small(bench, size="100m", head_size=64).config().num_kv_heads == 4


@pytest.mark.parametrize("changes", [{}, {"length": 100}, {"head_size": 16}])
def test_operations_are_counted_by_one_formula(bench, changes):
    """Ours are those of the model's config, which counts by its own fields; others' by their linear layers."""
    from contenders import training_flops

    shape = small(bench, **changes)
    config = shape.config()
    counted = training_flops(
        to_hf(models.build(config)), num_layers=config.num_layers, width=config.dim, length=shape.length
    )
    assert counted == config.training_flops_per_token(shape.length)


def test_the_floor_has_all_operations_and_the_traffic_of_each_part(bench):
    shape = small(bench)
    parts = bench.floors(shape, 1e9, 1e6)
    config, tokens = shape.config(), 2 * 32
    assert sum(x["flops"] for x in parts.values()) == config.training_flops_per_token(32) * tokens
    # tiny: width 32, 2 layers, 4 heads sharing 2 of keys (16 wide each), 96 inside, 256 tokens.
    read_and_written = (32 + 64) + (32 + 32) + (32 + 192) + (96 + 32)
    weights = 32 * 64 + 32 * 32 + 32 * 192 + 96 * 32
    assert parts["linear layers"]["bytes"] == 3 * 4 * 2 * (weights + tokens * read_and_written)
    assert parts["output layer and loss"]["bytes"] == 3 * 4 * (256 * 32 + tokens * 32)
    forward, backward = 64 + 32, 64 + 2 * 32 + 64
    assert parts["attention"]["bytes"] == 4 * 2 * tokens * (forward + backward)
    assert parts["AdamW and the gradient's norm"]["bytes"] == 8 * 4 * config.num_parameters()
    for part in parts.values():
        assert part["arithmetic_seconds"] == part["flops"] / 1e9
        assert part["memory_seconds"] == part["bytes"] / 1e6


# ---------------------------------------------------------------- figures


def runners(bench, **seconds):
    """Contenders that took these seconds, one per turn."""
    known = bench.contenders.entries()
    found = []
    for name, times in seconds.items():
        name = name.replace("_", "-")
        facts = {"flops_per_token": 10.0, "peak_bytes": 100 * len(name), "about": "", "parameters": 1}
        losses, frames = [5.5] * (2 + len(times)), [7, 9] + [9] * len(times)
        found.append(bench.Runner(name, known[name], None, facts, times, losses, frames, first_seconds=30.0))
    return found


def test_ratios_are_of_neighbours_and_the_best_peer_is_not_ours(bench):
    """A machine that becomes slower and slower: of medians over all turns the ratio would be another one."""
    found = bench.summary(
        runners(
            bench,
            minilm=[1.0, 2.0, 8.0],
            minilm_compiled=[0.5, 1.0, 4.0],
            transformers=[3.0, 6.0, 24.0],
            transformers_malloc=[0.1, 0.1, 0.1],
            litgpt=[2.0, 4.0, 16.0],
        ),
        small(bench),
        best=1e6,
    )
    assert found["best_peer"] == "litgpt"
    ours = found["contenders"]["minilm-compiled"]
    assert ours["ratio_to_plain"] == {"median": 6.0, "lowest": 6.0, "highest": 6.0}
    assert ours["ratio_to_best_peer"]["lowest"] == 4.0
    assert ours["tokens_per_second"] == {"median": 64.0, "lowest": 16.0, "highest": 128.0}
    assert ours["mfu"] == 64.0 * 10 / 1e6
    assert ours["peak_ratio"] == len("minilm-compiled") / len("transformers")
    assert ours["compile_seconds"] == 29.0 and "compile_seconds" not in found["contenders"]["minilm"]


def test_what_is_compiled_after_the_warm_up_is_counted(bench):
    some = runners(bench, minilm_compiled=[1.0, 1.0], transformers_compiled=[1.0, 1.0])
    some[1].compiled = [7, 9, 9, 12]
    found = bench.summary(some, small(bench), best=1e6)["contenders"]
    assert found["minilm-compiled"]["recompilations"] == 0
    assert found["transformers-compiled"]["recompilations"] == 3


def test_steps_are_timed_after_those_that_are_not_counted(bench, monkeypatch):
    import contender

    now, answers = [0.0], []
    monkeypatch.setattr(contender.time, "perf_counter", lambda: now[0])
    orders = io.StringIO('{"steps": 2, "uncounted": 1}\n{"steps": 1, "uncounted": 0}\n')
    gate = contender.Turns(orders, answers.append, "cpu")
    for step, seconds in enumerate([100.0, 2.0, 4.0, 8.0]):
        assert gate.wait() and gate.step == step
        now[0] += seconds
        gate.done((lambda loss: lambda: loss)(0.5 + step) if step == 1 else torch.tensor(0.5 + step))
        now[0] += 1000.0 if step in (2, 3) else 0.0  # others take their turns
    assert not gate.wait()
    assert [answer["seconds"] for answer in answers] == [3.0, 8.0]
    assert [answer["losses"] for answer in answers] == [[0.5, 1.5, 2.5], [3.5]]


def test_compilations_are_seen(bench):
    import contender

    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    double(torch.ones(3))
    once = contender.compilations()
    assert once >= 1
    double(torch.ones(3))
    assert contender.compilations() == once
    double(torch.ones(4))
    assert contender.compilations() == once + 1
    torch._dynamo.reset()


def test_a_failure_is_no_figure_and_other_losses_fail_the_command(bench):
    some = runners(bench, minilm=[1.0], transformers=[1.0], nanogpt=[1.0])
    some[2].failed = "no answer within 3 s"
    found = bench.summary(some, small(bench), best=1e6)
    assert found["contenders"]["nanogpt"] == {"label": "nanoGPT, eager", "failed": "no answer within 3 s"}
    assert bench.agreeing(found, "fp32")
    for wrong in (5.5 + 2e-4, math.nan):
        some[0].losses = [5.5, 5.5, wrong]
        found = bench.summary(some, small(bench), best=1e6)
        assert not bench.agreeing(found, "fp32")
        assert found["contenders"]["minilm"]["loss_gap"] > 1e-4  # NaN, too, is a gap
    some[0].losses = some[1].losses = [9.0, 5.5, 5.5]  # alike, but not those of a fresh model
    assert not bench.agreeing(bench.summary(some, small(bench), best=1e6), "fp32")


# ---------------------------------------------------------------- processes


def child(bench, tmp_path, code):
    return bench.Child([sys.executable, "-c", code], dict(os.environ), tmp_path / "log")


def test_who_does_not_answer_is_ended_with_all_that_it_started(bench, tmp_path):
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); "
        "print(p.pid, flush=True); p.wait()"
    )
    slow = child(bench, tmp_path, code)
    grandchild = psutil.Process(int(slow.answer(20)))
    with pytest.raises(bench.Failed, match="no answer within 0 s"):
        slow.ask({"steps": 1, "uncounted": 0}, 0.2)
    psutil.wait_procs([grandchild], timeout=10)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_the_reason_of_a_death_is_its_last_line_without_folders(bench, tmp_path):
    code = "import sys; sys.exit('a\\nno such file: /some/where/else/x.py\\n')"
    with pytest.raises(bench.Failed, match=r"^no such file: x\.py \(exit code 1\)$"):
        child(bench, tmp_path, code).ask({"steps": 1, "uncounted": 0}, 20)
    with pytest.raises(bench.Failed, match="killed by signal 9"):
        child(bench, tmp_path, "import os; os.kill(os.getpid(), 9)").answer(20)


def test_children_end_with_a_request_to_stop(bench, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, bench.ended() as children:
        children.append(child(bench, tmp_path, "print(1, flush=True); import time; time.sleep(1000)"))
        children[0].answer(20)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert children[0]._process.returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_leaves_no_contender_behind(peers, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "training_step.py"), "--quick", "--only", "nanogpt"]
    given = ["--peers", str(peers), "--json", str(tmp_path / "out.json")]
    environment = {**os.environ, "PEER_SLEEPS": "1"}
    with subprocess.Popen([*command, *given], env=environment, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stderr:
            if "first steps" in line:
                break
        contenders = psutil.Process(run.pid).children(recursive=True)
        assert contenders
        run.send_signal(signal.SIGINT)
        assert run.wait(20) != 0
    _, alive = psutil.wait_procs(contenders, timeout=10)
    assert not alive
    assert not (tmp_path / "out.json").exists()


# ---------------------------------------------------------------- flags


def test_all_wrong_flags_are_told_at_once(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(
            ["--only", "nobody", "litgpt", "--head-size", "24", "--peers", "nowhere", "--repeats", "0"]
        )
    said = capsys.readouterr().err
    for problem in ("nobody is called nobody", "--head-size 24", "nowhere is no folder", "at least 1"):
        assert problem in said
    with pytest.raises(SystemExit):
        bench.main(["--only", "litgpt"])
    assert "give --peers FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--size", "27m"])
    assert "--size 27m: there are tiny, 6m, 26m" in capsys.readouterr().err


def test_the_defaults_are_the_reference(bench):
    args = bench.parsed(["--head-size", "16", "64", "--device", "cpu"])
    shapes = [bench.shape_of(args, head_size) for head_size in args.head_size]
    assert [dataclasses.astuple(shape) for shape in shapes] == [
        ("26m", size, 8, 512, "cpu", "fp32", 2, None) for size in (16, 64)
    ]
    assert {"minilm", "minilm-compiled", "transformers", "transformers-trainer"} <= set(args.only)
    assert not {"nanogpt", "litgpt-compiled"} & set(args.only)
    assert bench.parsed(["--size", "350m", "--device", "cpu"]).batch == 1


def test_what_was_compiled_before_does_not_count_as_quick_to_compile(bench, monkeypatch, tmp_path):
    """Importing torch's compiler puts the common cache into the environment: with it, 24 seconds came out as 3."""
    given = {}

    class Still:
        def __init__(self, command, environment, log):
            given[log.stem] = environment

    monkeypatch.setattr(bench, "Child", Still)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/common")
    entry = bench.contenders.entries()["minilm-compiled"]
    for name in ("one", "another"):
        bench.started(name, entry, small(bench), tmp_path, [])
    caches = {given[name][key] for name in given for key in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    assert len(caches) == 4 and all(Path(folder).parent == tmp_path for folder in caches)
    assert not any(Path(folder).exists() for folder in caches)
