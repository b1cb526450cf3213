"""The incident of docs/incident_slicing.md on a trained model: what each cut says, and which check finds it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from incident_slices import WAYS, last_n, loss, main, right, unshifted
from training_runs import documents, make_store, run_here

from minilm.doctor.core import run_checks, select
from minilm.doctor.targets.our_model import model_subject
from minilm.evaluation.score import continuation_of_tokens
from minilm.run import load_checkpoint

DOCS = Path(__file__).parent.parent / "docs"
P, N, WIDTH = 8, 8, 64


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("incident")
    return run_here(folder, make_store(folder / "store", 400), train__steps=150)


@pytest.fixture(scope="module")
def model(run):
    return load_checkpoint(run).model


@pytest.fixture(scope="module")
def held_out():
    """Documents of the same kind that were not trained on."""
    return [document[: P + N] for document in documents(120, seed=7) if len(document) >= P + N]


def mean(model, held_out, cut, width=None):
    return sum(loss(model, tokens, P, cut, width) for tokens in held_out) / len(held_out)


def test_the_right_cut_is_what_the_evaluation_says(model, held_out):
    expected = continuation_of_tokens(model, held_out, [P], N)[P].loss
    assert mean(model, held_out, right) == pytest.approx(expected, rel=1e-6)
    assert mean(model, held_out, right, WIDTH) == pytest.approx(expected, rel=1e-5)


def test_the_wrong_cuts_give_a_loss_that_nothing_in_the_training_explains(model, held_out):
    """The trained model is far better than chance (ln 48 = 3.87); cut wrongly it seems far worse."""
    true = mean(model, held_out, right)
    assert true < 3.0
    assert mean(model, held_out, unshifted) > true + 1 and mean(model, held_out, last_n) > true + 1
    assert mean(model, held_out, unshifted) == mean(model, held_out, last_n), (
        "one and the same in a row without padding"
    )
    assert abs(mean(model, held_out, last_n, WIDTH) - mean(model, held_out, unshifted, WIDTH)) > 0.5


def examined(model, cut, width=None):
    """What the check `continuation` says of an evaluation with this cut."""

    def continuation(prompt, more):
        return loss(model, [*prompt, *more], len(prompt), cut, width)

    subject = model_subject(model, fresh=False).but(continuation=continuation)
    (finding,) = run_checks(subject, select("full", ["continuation"]))
    return finding


@pytest.mark.parametrize("width", [None, 32])
def test_the_check_continuation_passes_the_right_cut(model, width):
    assert examined(model, right, width).status == "PASS"


@pytest.mark.parametrize(("cut", "width"), [(unshifted, None), (unshifted, 32), (last_n, None), (last_n, 32)])
def test_the_check_continuation_fails_both_wrong_cuts_and_names_the_bug(model, cut, width):
    finding = examined(model, cut, width)
    assert finding.status == "FAIL" and "eval-slice-off-by-one" in finding.bugs
    assert finding.measured > 100 * finding.threshold


def test_the_agreement_report_would_have_differed(model, held_out):
    """The evaluation that the user had, with a wrong cut, beside ours over the same tokens."""
    from minilm.evaluation.agreement import Comparison
    from minilm.evaluation.agreement_rows import loss_noise, padded

    batches = [padded(held_out, learn_from=[P] * len(held_out))]
    limit = loss_noise(model, batches, "fp32")
    numbers = {name: mean(model, held_out, cut) for name, cut in WAYS.items()}
    ours = continuation_of_tokens(model, held_out, [P], N)[P].loss
    verdicts = {
        name: Comparison(what=name, ways=("theirs", "ours"), numbers=(number, ours), noise=limit).verdict
        for name, number in numbers.items()
    }
    assert list(verdicts.values()) == ["AGREES", "DIFFERS", "DIFFERS"]


def test_the_command_of_the_page_prints_the_numbers_of_all_three_ways(run, model, capsys):
    with torch.no_grad():
        code = main(
            [str(run), "--prompt-tokens", str(P), "--continuation-tokens", str(N), "--documents", "8"]
        )
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and re.match(r"\d+ documents, 8 tokens after 8; nats per token", lines[0])
    numbers = {
        name: [float(x) for x in line[26:].split()]
        for line in lines
        for name in WAYS
        if line.startswith(name)
    }
    ours = float(next(line for line in lines if line.startswith("minilm.evaluation")).split()[-1])
    assert list(numbers) == list(WAYS) and numbers["[prompt-1 : prompt-1+n]"][0] == pytest.approx(
        ours, abs=1e-4
    )
    assert numbers["[-n:]"][0] > ours + 1


# ---------------------------------------------------------------- the pages


@functools.cache
def bugs_and_checks():
    """{check: bugs that are planted to prove it}."""
    return {check.name: {plant.bug for plant in check.plants} for check in select("full", ())}


@pytest.mark.parametrize("page", ["incidents.md", "incident_slicing.md"])
def test_every_check_that_the_pages_name_exists_and_is_proven_with_that_bug(page):
    """`minilm doctor --only CHECK` of a page, and the pair `check` / `bug` in its tables."""
    text = (DOCS / page).read_text("utf-8")
    pairs = re.findall(r"^\| `(\w+)` \| `([\w-]+)` \|", text, flags=re.M)
    assert pairs, "a page of incidents names what finds them"
    for check, bug in pairs:
        assert bug in bugs_and_checks()[check], (check, bug)
    commands = re.findall(r"minilm doctor --prove --only ([\w,]+)", text)
    assert commands and {name for names in commands for name in names.split(",")} == {
        check for check, _ in pairs
    }
