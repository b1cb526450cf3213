"""Comparisons: paired over documents, loud about what cannot be compared, and a page that nothing breaks out of."""

from __future__ import annotations

import html.parser
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from experiment_runs import loss_at, write_evaluation, write_run

from minilm.__main__ import main
from minilm.errors import ConfigError
from minilm.experiments import paired
from minilm.experiments.comparing import compare
from minilm.experiments.numbers import curve
from minilm.experiments.page import page
from minilm.experiments.picture import draw, points_hash, told_points
from minilm.experiments.runfiles import RunFiles


def evaluated(folder: Path, documents: list[tuple[float, int, int]], **changes) -> RunFiles:
    run = write_run(folder)
    write_evaluation(run, documents, **changes)
    return RunFiles.read(run)


def documents_of(seed: int, number: int = 60) -> list[tuple[float, int, int]]:
    draw_from = random.Random(seed)
    return [
        (n * draw_from.uniform(2, 5), n, 4 * n) for n in (draw_from.randint(5, 60) for _ in range(number))
    ]


def slow_interval(a, b, below: int, scale: float, resamples: int = 4000) -> tuple[float, float]:
    """The same question in plain Python, with another generator: ratio of sums of drawn documents, both runs alike."""
    draw_from, found = random.Random(1), []
    for _ in range(resamples):
        chosen = [draw_from.randrange(len(a)) for _ in a]
        first = sum(a[k][0] for k in chosen) / sum(a[k][below] for k in chosen)
        second = sum(b[k][0] for k in chosen) / sum(b[k][below] for k in chosen)
        found.append((first - second) / scale)
    found.sort()
    return found[int(0.025 * resamples)], found[int(0.975 * resamples)]


def test_the_interval_is_that_of_a_paired_bootstrap_over_documents(tmp_path):
    a = documents_of(0)
    noise = random.Random(5)
    b = [(nats * noise.uniform(0.97, 1.05), tokens, num_bytes) for nats, tokens, num_bytes in a]
    found = paired.compare(evaluated(tmp_path / "a", a).evaluation, evaluated(tmp_path / "b", b).evaluation)
    assert [one.metric for one in found] == ["loss", "bits_per_byte"]
    for one, below, scale in zip(found, (1, 2), (1.0, math.log(2)), strict=True):
        exact = sum(d[0] for d in a) / sum(d[below] for d in a) - sum(d[0] for d in b) / sum(
            d[below] for d in b
        )
        assert one.value == pytest.approx(exact / scale, rel=1e-12)
        low, high = slow_interval(a, b, below, scale)
        width = high - low
        assert one.interval == pytest.approx((low, high), abs=0.08 * width)
        assert one.num_documents == 60
    # Unpaired, each run's own scatter would drown the difference.
    losses = [nats / tokens for nats, tokens, _ in a]
    assert width < np.std(losses)


def test_a_difference_is_significant_only_if_it_is_on_most_documents(tmp_path):
    a = documents_of(0)
    better = [(nats - 0.1 * tokens, tokens, b) for nats, tokens, b in a]
    on_one = [(nats - (0 if n else 9), tokens, b) for n, (nats, tokens, b) in enumerate(a)]
    base = evaluated(tmp_path / "a", a).evaluation
    assert [d.significant for d in paired.compare(evaluated(tmp_path / "b", better).evaluation, base)] == [
        True,
        True,
    ]
    assert [d.significant for d in paired.compare(evaluated(tmp_path / "c", on_one).evaluation, base)] == [
        False,
        False,
    ]
    assert not any(d.significant for d in paired.compare(base, base))


def test_no_interval_where_the_documents_are_not_the_same(tmp_path):
    a = documents_of(0)
    base = evaluated(tmp_path / "a", a).evaluation

    def against(name: str, documents=a, **changes):
        return paired.compare(evaluated(tmp_path / name, documents, **changes).evaluation, base)

    assert against("b", store_fingerprint="d2") == "the two were scored on other data"
    assert against("c", split="train") == "the two were scored in another way"
    assert against("d", a[:-1]) == "the two scored different documents"
    without = dict(base)
    del without["documents"]
    assert "--per-document" in paired.compare(without, base)
    assert paired.compare(None, base) == "not run"
    few = evaluated(tmp_path / "f", a[:9]).evaluation
    assert paired.compare(few, few) == "too few documents that both scored"
    # Texts cut into other tokens: bits per byte can be held against each other, losses per token cannot.
    other_tokens = [(nats, tokens + 1, num_bytes) for nats, tokens, num_bytes in a]
    text = {"kind": "text", "store_fingerprint": None, "data": ["held_out.jsonl"]}
    mine, other = (
        evaluated(tmp_path / f"t{len(d)}{d[0][1]}", d, **text).evaluation for d in (a, other_tokens)
    )
    assert [one.metric for one in paired.compare(mine, other)] == ["bits_per_byte"]


def test_what_differs_is_told_by_kind(tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", shift=1.0, optim__learning_rate=0.01, model__extra=3)
    text = json.loads((b / "manifest.json").read_text())
    text["packages"]["numpy"] = "1.0"
    text["machine"]["gpus"] = [{"name": "H100"}]
    text["code"]["source_sha256"] = "e" * 64
    (b / "manifest.json").write_text(json.dumps(text))
    told = compare([RunFiles.read(a), RunFiles.read(b)])
    assert told["differs"] == {
        "settings": {"model.extra": [None, 3], "optim.learning_rate": [0.005, 0.01]},
        "code": {"source sha256": ["c" * 64, "e" * 64]},
        "data": {},
        "packages": {"numpy": ["2.4.6", "1.0"]},
        "hardware": {"gpus": [None, "H100"]},
    }
    assert told["results"][1]["validation_loss"] == pytest.approx(loss_at(20, 1.0) + 0.5)
    assert told["results"][0]["tokens_per_second"] == pytest.approx(sum(181 + s for s in range(20)) / 10)
    assert told["warnings"] == []
    assert told["differences"] == [{"run": "b", "base": "a", "scores": [], "why_not": "not run"}]


def test_other_data_tokenizers_and_budgets_are_said_loudly(tmp_path, capsys):
    a = write_run(tmp_path / "a")
    for name, part, value in (("b", "data", "d2"), ("c", "tokenizer", "t2")):
        changed = write_run(tmp_path / name, steps=15)
        record = json.loads((changed / "manifest.json").read_text())
        record[part]["fingerprint"] = value
        (changed / "manifest.json").write_text(json.dumps(record))
    assert main(["compare", str(a), str(tmp_path / "b"), str(tmp_path / "c")]) == 0
    said = capsys.readouterr().out
    assert "NOTE  b and a were trained on other data: their validation losses are not comparable." in said
    assert (
        "NOTE  c and a have other tokenizers: losses per token are not comparable, bits per byte are." in said
    )
    assert "not the same budget" in said
    assert "data      store" in said and "d2" in said


def test_curves_over_tokens_flops_and_time(tmp_path):
    run = RunFiles.read(write_run(tmp_path / "a"))
    tokens = [sum(180 + s for s in range(1, step + 1)) for step in (5, 10, 15, 20)]
    assert curve(run, "validation", "loss", "tokens")[0] == tokens
    assert curve(run, "validation", "loss", "minutes")[0] == pytest.approx(
        [step * 0.5 / 60 for step in (5, 10, 15, 20)]
    )
    from minilm import models

    model = {k.removeprefix("model."): v for k, v in run.settings.items() if k.startswith("model.")}
    per_step = models.from_dict(model).training_flops_per_token(24) * 24 * 8
    assert curve(run, "train", "loss", "flops")[0][:2] == [per_step, 2 * per_step]
    strange = RunFiles.read(write_run(tmp_path / "b", model__name="of_tomorrow"))
    assert curve(strange, "train", "loss", "flops") == ([], [])


def test_a_picture_carries_the_hash_of_its_points(tmp_path):
    runs = [
        RunFiles.read(write_run(tmp_path / name, shift=shift)) for name, shift in (("a", 0.0), ("b", 1e-9))
    ]
    draw(runs, tmp_path / "p.png")
    assert told_points(tmp_path / "p.png") == points_hash(runs)
    assert points_hash(runs[:1]) != points_hash([RunFiles.read(write_run(tmp_path / "c" / "a", shift=1e-9))])


class Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not (name in ("src", "href") and not value.startswith("data:image/png;base64,"))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_complete_and_nothing_breaks_out_of_it(tmp_path):
    name = "<script>alert('1')</script>&amp;"
    runs = [
        RunFiles.read(write_run(tmp_path / "a")),
        RunFiles.read(write_run(tmp_path / "b", run__name=name)),
    ]
    reader = Reader()
    reader.feed(page(compare(runs), draw(runs)))
    assert "script" not in reader.tags and "link" not in reader.tags and reader.tags.count("img") == 1
    assert name in reader.text
    assert f"{loss_at(20):.4f}" in reader.text


def test_the_command_writes_all_three(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "new" / "out")]) == 0
    told = json.loads((tmp_path / "new" / "out" / "comparison.json").read_text())
    assert told["points_sha256"] == told_points(tmp_path / "new" / "out" / "comparison.png")
    assert "data:image/png;base64," in (tmp_path / "new" / "out" / "comparison.html").read_text()
    assert main(["compare", str(a)]) == 2
    assert main(["compare", str(a), str(tmp_path / "none")]) == 2
    assert main(["compare", str(a), str(b), "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "There is no run folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="named twice"):
        compare([RunFiles.read(a), RunFiles.read(a)])
