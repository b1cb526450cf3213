"""The same questions through lm-evaluation-harness's own command line and through ours: the same numbers.

Twice: with our model in the harness, and with the exported folder in the harness's own arithmetic (`--model hf`).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluation_checkpoint import WORDS, Made, make_run

from minilm.__main__ import main
from minilm.errors import ConfigError
from minilm.evaluation.tasks import files
from minilm.evaluation.tasks.arithmetic import TextModel
from minilm.evaluation.tasks.asking import ask
from minilm.export.folder import export_folder

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed (pip install 'minilm[harness]')"
)
pytestmark = pytest.mark.filterwarnings("default")  # the harness and what it brings warn about each other

NUMBER = 12
YAML = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {cache}}}
test_split: test
"""
TASKS = {
    "choice": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}, {metric: exact_match}]
""",
    "pairs": """\
output_type: multiple_choice
doc_to_text: ""
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "cloze": """\
output_type: loglikelihood
doc_to_text: "{{text}}"
target_delimiter: ""
doc_to_target: "{{' ' + answer}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "completion": """\
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: answer
generation_kwargs: {until: [" a", "t"], max_gen_toks: 4, do_sample: false}
filter_list: [{name: none, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
""",
}
SHOTS = "num_fewshot: 2\nfewshot_split: test\nfewshot_config: {sampler: first_n}\n"
METRICS = {  # of ours -> of the harness
    "accuracy": "acc", "accuracy_norm": "acc_norm", "accuracy_bytes": "acc_bytes", "greedy": "exact_match",
    "perplexity": "perplexity", "exact_match": "exact_match",
}  # fmt: skip


def questions(kind: str, made: Made) -> list[dict[str, Any]]:
    """Questions of words that the tokenizer knows, each with another length; some answers are the model's own."""
    texts = TextModel(made.model, made.tokenizer)
    found: list[dict[str, Any]] = []
    for n in range(NUMBER):
        words = [WORDS[(3 * n + k * (n + 2)) % len(WORDS)] for k in range(3 + n % 5)]
        begun, choices = (
            " ".join(words),
            list(dict.fromkeys(WORDS[(n + 5 * k) % len(WORDS)] for k in range(4))),
        )
        choices[0] = f"{choices[0]} {choices[1]}"
        if kind == "choice":
            found.append({"question": begun, "choices": choices, "answer": n % len(choices)})
        elif kind == "pairs":
            found.append({"choices": [begun, " ".join([*words[1:], words[0], "中"])], "answer": n % 2})
        elif kind == "cloze":
            (own,) = texts.completions([begun], [], 1)
            known = own.text.startswith(" ") and own.text.strip() == own.text[1:] and own.text[1:] and n % 2
            found.append({"text": begun, "answer": own.text[1:] if known else choices[0]})
        else:
            (own,) = texts.completions([begun], [" a", "t"], 4)
            known = n % 2 and own.text.strip()
            answer = own.text.strip() if known else "x"
            found.append({"prompt": begun, "answer": answer, "stop": [" a", "t"], "max_new_tokens": 4})
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for kind, rest in TASKS.items():
        path = root / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(q) + "\n" for q in questions(kind, made)), encoding="utf-8")
        base = YAML.format(path=path, cache=root / "cache") + rest
        (root / f"{kind}.yaml").write_text(f"task: {kind}\n{base}")
        (root / f"{kind}_shots.yaml").write_text(f"task: {kind}_shots\n{base}{SHOTS}")
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Without what takes the harness half a minute and is not looked at: an index of its own 10,000 tasks, and 100,000
    draws for the error of a perplexity."""
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "none" / "manager.py"))
    monkeypatch.setattr("lm_eval.api.metrics.bootstrap_stderr", lambda metric, values, iters: 0.0)


def through_the_harness(folder: Path, out: str, *arguments: str) -> dict[str, dict[str, Any]]:
    names = [f"{kind}{shots}" for kind in TASKS for shots in ("", "_shots")]
    place = folder / out
    done = main(
        ["lm-eval", "run", *arguments, "--include_path", str(folder), "--tasks", ",".join(names),
         "--batch_size", "5", "--output_path", str(place)]
    )  # fmt: skip
    assert done == 0
    (written,) = place.rglob("results_*.json")
    return json.loads(written.read_text())["results"]


def compare(made: Made, folder: Path, theirs: dict[str, dict[str, Any]], tolerance: float) -> None:
    reader = TextModel(made.model, made.tokenizer)
    for kind in TASKS:
        for shots, name in ((0, kind), (2, f"{kind}_shots")):
            ours = ask(files.read(folder / f"{kind}.jsonl").task(), reader, shots=shots)
            assert ours.failure is None and ours.number == NUMBER
            compared = 0
            for metric, measure in ours.measures.items():
                key = f"{METRICS[metric]},none"
                if key in theirs[name]:
                    assert measure.value == pytest.approx(theirs[name][key], rel=tolerance, abs=tolerance), (
                        name
                    )
                    error = theirs[name][f"{METRICS[metric]}_stderr,none"]
                    if metric != "perplexity":  # there it is drawn by lot
                        assert measure.error == pytest.approx(error, abs=1e-6), name
                    compared += 1
            assert compared == len(
                [key for key in theirs[name] if key.endswith(",none") and "_stderr" not in key]
            )


def test_our_model_in_the_harness_has_the_numbers_of_our_own_report(made, folder, quick):
    theirs = through_the_harness(
        folder, "ours", "--model", "minilm", "--model_args", f"checkpoint={made.run_folder},max_length=128"
    )
    compare(made, folder, theirs, 1e-6)
    # Questions that tell something: not all right, not all wrong.
    assert all(0 < theirs[name][key] < 1 for name, key in (
        ("choice", "acc,none"), ("pairs", "acc,none"), ("cloze", "acc,none"), ("completion", "exact_match,none")
    ))  # fmt: skip


def test_the_arithmetic_of_the_harness_on_the_exported_model_gives_the_same(made, folder, quick):
    exported = export_folder(made.model, folder / "exported", tokenizer=made.tokenizer)
    theirs = through_the_harness(
        folder,
        "theirs",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={exported},dtype=float32",
        "--device",
        "cpu",
    )
    compare(made, folder, theirs, 2e-5)


def harness(made: Made, **arguments: Any) -> Any:
    from minilm.evaluation.tasks.harness import model_class

    made_class = model_class(lambda checkpoint, **rest: (made.model, made.tokenizer))
    return made_class(checkpoint="x", **arguments)


def asked(*arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type="", doc={}, arguments=a, idx=n) for n, a in enumerate(arguments)]


def test_rolling_log_likelihoods_are_those_of_the_harness_in_one_window(made, monkeypatch):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    texts = ["the cat sat on a mat", "", "def return"]
    model = harness(made, batch_size=2)
    found = model.loglikelihood_rolling(asked(*((text,) for text in texts)))
    for text, one in zip(texts, found, strict=True):
        windows = get_rolling_token_windows(
            made.tokenizer.encode(text), made.tokenizer.bos_id, model.texts.max_length, 1
        )
        from evaluation_reference import log_probabilities, row_logits

        want = 0.0
        for context, predicted in map(make_disjoint_window, windows):
            row = [*context, *predicted]
            each = log_probabilities(row_logits(made.model, row))
            want += sum(float(each[n - 1][row[n]]) for n in range(len(context), len(row)))
        assert one == pytest.approx(want, abs=1e-4)


def test_what_is_cut_is_said_in_the_log_and_an_answer_may_be_remembered(made, caplog):
    model = harness(made, max_length=16)
    kept = []
    model.cache_hook = type("Hook", (), {"add_partial": lambda self, *one: kept.append(one)})()
    long = " ".join(WORDS * 3)
    with caplog.at_level("WARNING"):
        found = model.loglikelihood(asked((long, " cat"), ("the", " cat")))
        model.generate_until(asked((long, {"until": ["\n"], "max_gen_toks": 4}), ("the", {})))
    assert "1 of 2 texts are longer than the context of 16 tokens" in caplog.text
    assert "1 of 1 prompts and 4 new tokens are longer than the context of 16 tokens" in caplog.text
    assert kept[:2] == [
        ("loglikelihood", (long, " cat"), found[0]),
        ("loglikelihood", ("the", " cat"), found[1]),
    ]
    assert [one[0] for one in kept[2:]] == ["generate_until"] * 2


def test_wrong_arguments_are_told_all_at_once(made):
    from minilm.evaluation.tasks.harness import model_class

    cls = model_class(lambda checkpoint, **rest: (made.model, None))
    with pytest.raises(ConfigError, match=r"(?s)'pretrained'.*must name a checkpoint.*weights is 'best'"):
        cls(pretrained="x", weights="best")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        cls(checkpoint="x")
    model = harness(made)
    with pytest.raises(ConfigError, match="greedily only"):
        model.generate_until(asked(("the", {"do_sample": True, "temperature": 0.7})))
    with pytest.raises(ConfigError, match="Unknown generation settings: 'num_beams'"):
        model.generate_until(asked(("the", {"num_beams": 4})))


def test_the_models_of_the_harness_are_still_there_in_a_fresh_process(monkeypatch):
    from lm_eval.api.registry import model_registry

    seen = []

    class Command:
        def parse_args(self):
            return sys.argv

        def execute(self, arguments):
            seen.append((list(arguments), set(model_registry.keys())))

    monkeypatch.setattr("lm_eval._cli.HarnessCLI", Command)
    monkeypatch.setattr(model_registry, "_objs", {})
    monkeypatch.delitem(sys.modules, "lm_eval.models", raising=False)
    before = sys.argv
    assert main(["lm-eval", "--tasks", "x", "-h"]) == 0 and sys.argv is before
    ((arguments, names),) = seen
    assert arguments == ["lm-eval", "--tasks", "x", "-h"] and {"minilm", "hf"} <= names


def test_without_the_harness_the_command_says_how_to_install_it(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a)
    )
    assert main(["lm-eval", "--tasks", "x"]) == 2
    assert "pip install 'minilm[harness]'" in capsys.readouterr().err
